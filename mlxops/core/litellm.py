"""Read LiteLLM's configuration as LiteLLM does: for each name of a client, which name it sends to which address. Pure.

The reference is LiteLLM 1.109: its source (`proxy_server.load_config`, `get_llm_provider`,
`pattern_match_deployments`) and its behaviour with the rows of `tests/control/test_litellm.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import field, replace

from mlxops.core.errors import Refused
from mlxops.core.frozen import dataclass
from mlxops.core.gateway import ENVIRON, Entry, GatewayPaths, Impact, Mismatch, edit
from mlxops.core.hold import RetrySettings, number, read_retries
from mlxops.core.names import shown

_MAX_ENTRIES = 10_000
_MAX_STARS = 4
"""More stars in one pattern could take exponential time to match."""


@dataclass(frozen=True)
class Environ:
    """The gateway's environment, as far as it is known. Never show its values: they may be secrets."""

    values: Mapping[str, str] = field(default_factory=dict)
    doubtful: frozenset[str] = frozenset()
    """Variables that sh and python-dotenv read differently."""
    whole: bool = True
    """False: the gateway may have further variables."""

    def get(self, name: str) -> _Value:
        return _Value(self.values.get(name) or None, name, name not in self.doubtful)

    def first(self, names: Iterable[str]) -> _Value:
        """Return the first of these variables that is set."""
        return next((value for name in names if (value := self.get(name)).text), _Value())


@dataclass(frozen=True)
class _Value:
    text: str | None = None
    variable: str | None = None
    sure: bool = True
    place: tuple[str, str] | None = None
    """Where to change it, if not in the entry: the place, and the key there."""
    wrong: str = ""
    """Why LiteLLM cannot use it."""

    def __or__(self, other: _Value) -> _Value:
        """Return the first one with a value, as `or` does. It is doubtful if one before it is doubtful."""
        if self.text is not None or (other.text is None and self.variable):
            return self
        return replace(other, sure=other.sure and self.sure)


@dataclass(frozen=True)
class LiteLLMConfig:
    entries: tuple[Entry, ...] = ()
    """As written: an alias may be a pattern, such as `jerry-*`."""
    synonyms: Mapping[str, str] = field(default_factory=dict)
    """`router_settings.model_group_alias`: name -> the model_name that it stands for."""
    findings: tuple[Mismatch, ...] = ()
    completion_model: str | None = None
    """`general_settings.completion_model`: LiteLLM uses it instead of the name that a client sends."""
    defaults: Mapping[str, str] = field(default_factory=dict)
    """`router_settings.default_litellm_params`: the ones that decide on name and address."""
    retry: RetrySettings = RetrySettings()

    def concrete(self, names: Iterable[str]) -> tuple[Entry, ...]:
        """Return the entries under the names that a client can use: written names, synonyms, and those of `names` that
        a pattern matches. No alias of the result is a pattern."""
        entries = [e for e in self.entries if "*" not in e.alias and e.alias not in self.synonyms]
        known = {entry.alias for entry in entries}
        for name, target in self.synonyms.items():
            entries += [replace(entry, alias=name) for entry in self._entries_of(target)]
        for name in dict.fromkeys(names):
            if name not in known and name not in self.synonyms:
                entries += self._matched(name)
            # `studio/*` also makes `studio/jerry-xl` a name for `jerry-xl`.
            longer = dict.fromkeys(e.alias.replace("*", name) for e in self.entries if e.alias.count("*") == 1)
            for longer_name in longer:
                if longer_name != name and longer_name not in known and longer_name not in self.synonyms:
                    entries += [entry for entry in self._matched(longer_name) if entry.sends == name]
        if (used := self.completion_model) is not None:
            targets = self._entries_of(self.synonyms.get(used, used))
            # LiteLLM also accepts an entry's `model` as its name.
            targets = targets or [entry for entry in self.entries if entry.model == used]
            entries = [replace(target, alias=entry.alias) for entry in entries for target in targets]
        return tuple(dict.fromkeys(entries))

    def _entries_of(self, name: str) -> list[Entry]:
        return [entry for entry in self.entries if entry.alias == name] or self._matched(name)

    def _matched(self, name: str) -> list[Entry]:
        """Return the entries of the most specific pattern that matches."""
        patterns = {_regex(e.alias): e.alias for e in self.entries if 0 < e.alias.count("*") <= _MAX_STARS}
        # LiteLLM's order: the longer, then the one with more special characters; equal ones as they stand.
        ordered = sorted(patterns, key=lambda regex: (len(regex), sum(map(regex.count, "*+?\\^$|()"))), reverse=True)
        provider = "openai" if _OPENAI_MODEL.match(name) else None
        for candidate in (name, f"{provider}/{name}"):
            for pattern in ordered:
                # As in LiteLLM, a match need not reach the end of the name.
                if matched := re.match(pattern, candidate):
                    same = (entry for entry in self.entries if _regex(entry.alias) == pattern)
                    return [_filled(entry, name, matched) for entry in same]
        return []


def entry_of_deployment(alias: str, model: str, api_base: str | None, provider: str | None) -> Entry:
    """Return the entry of a deployment of the running gateway. The gateway reports inherited values, too."""
    kind, sends = _upstream(model, provider)
    known = _PROVIDERS.get(kind or "")
    return Entry(alias, model, sends if known else None, api_base, has_key=True, provider=provider)


def _regex(pattern: str) -> str:
    return re.escape(pattern).replace(r"\*", "(.*)")


def _filled(entry: Entry, name: str, matched: re.Match[str]) -> Entry:
    """Return a pattern's entry for one name. Replace the stars of its model with the text that its pattern matched."""
    model = entry.model or ""
    if "*" in model:
        groups = matched.groups()
        if len(groups) > model.count("*"):
            model = matched.string
        else:
            for group in groups:
                model = model.replace("*", group, 1)
    provider, sends = _upstream(model, entry.provider)
    known = _PROVIDERS.get(provider or "")
    return replace(
        entry,
        alias=name,
        model=model,
        sends=sends if known else None,
        pattern=entry.alias,
        open_pattern="*" in (entry.model or ""),
    )


# -- providers ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Provider:
    """A provider of LiteLLM that sends OpenAI-compatible requests, with the rest of `model` as the name."""

    keys: tuple[str, ...] = ()
    """Variables that may hold its key."""
    bases: tuple[str, ...] = ()
    """Variables that may hold its address."""
    keyless: bool = False
    """It needs no key: without one it sends a placeholder, or none."""
    shares: bool = True
    """It also uses an address in OPENAI_BASE_URL or OPENAI_API_BASE."""
    other_keys: bool = False
    """Variables that are not in `keys` may hold its key, too."""
    default: str = "https://api.openai.com/v1"
    """Its address if none is set."""
    end: str = "/chat/completions"
    """The path that it appends to the address."""
    whole_path: bool = False
    """It appends nothing to an address that already has this end."""


_SHARED_BASES = ("OPENAI_BASE_URL", "OPENAI_API_BASE")
_SHARED_KEY = "OPENAI_API_KEY"
_OPENAI_MODEL = re.compile(r"(?:gpt-|chatgpt-|o[1-9](?:-|$)|ft:gpt-)")
"""Names that LiteLLM treats as OpenAI's without a provider in front. Its list changes with each version."""

_OWN_ADDRESS = "its own address"
_WITHOUT_KEY = """
    aiohttp_openai azure_ai cometapi deepseek docker_model_runner edenai huggingface lemonade mistral nadir openrouter
    ovhcloud together_ai xai
"""
_WITH_KEY = """
    abliteration ai21 ai21_chat aiand aihubmix aiml amazon_nova apertis assemblyai baseten cerebras charity_engine
    chutes clf_ai_gateway cloudflare codestral cognition compactifai coralbricks cortecs crusoe darkbloom dashscope
    databricks
    deepinfra empiriolabs empower featherless_ai friendliai galadriel github gmi helicone hostinger_router hyperbolic
    inception inferenceapis kyma lambda_ai libertai llamagate maritalk meta meta_llama minimax modelscope moonshot morph
    nano-gpt nebius neosantara novita nscale nvidia_nim opencode_go openinfer parasail perplexity pinstripes poe prism
    publicai qwen_ai_platform qwencloud refuseless reka sail sambanova sarvam scaleway scx-ai streamlake synthetic
    tencent tensormesh v0 veniceai vercel_ai_gateway volcengine wandb xiaomi_mimo xinference zai zerogpu
"""
"""Other companies' providers that send the same request to an `api_base` of ours. All of 1.109 were tried. Providers in
neither list use another protocol, change the name, or are unknown to LiteLLM, which ignores their entries."""


def _company(name: str, *, keyless: bool) -> _Provider:
    prefix = name.upper().replace("-", "_")
    return _Provider(
        (f"{prefix}_API_KEY",),
        (f"{prefix}_API_BASE",),
        keyless=keyless,
        shares=False,
        other_keys=True,
        default=_OWN_ADDRESS,
    )


_PROVIDERS = {
    **{name: _company(name, keyless=True) for name in _WITHOUT_KEY.split()},
    **{name: _company(name, keyless=False) for name in _WITH_KEY.split()},
    "openai": _Provider(),
    "custom_openai": _Provider(),
    "text-completion-openai": _Provider(end="/completions"),
    "litellm_proxy": _Provider(("LITELLM_PROXY_API_KEY",), ("LITELLM_PROXY_API_BASE",)),
    "hosted_vllm": _Provider(
        ("HOSTED_VLLM_API_KEY",), ("HOSTED_VLLM_API_BASE",), keyless=True, shares=False, whole_path=True
    ),
    "lm_studio": _Provider(("LM_STUDIO_API_KEY",), ("LM_STUDIO_API_BASE",), keyless=True),
    "llamafile": _Provider(
        ("LLAMAFILE_API_KEY",),
        ("LLAMAFILE_API_BASE",),
        keyless=True,
        shares=False,
        default="http://127.0.0.1:8080/v1",
    ),
}


def _upstream(model: str, provider: str | None) -> tuple[str | None, str | None]:
    """Return the provider and the name that it sends. `provider`: the value of `custom_llm_provider`."""
    if provider and model.split("/", 1)[0] != provider:
        return provider, model
    first, slash, rest = model.partition("/")
    if slash:
        return first, rest
    if _OPENAI_MODEL.match(model):
        return "openai", model
    return None, None


# -- reading the document -----------------------------------------------------------------------------------------


def parse(document: object, environ: Environ, files: GatewayPaths, places: Sequence[str] = ()) -> LiteLLMConfig:
    """Read a loaded configuration, its includes merged into it.

    `places`: file and line of each item of `model_list`. Raises `Refused` (bad_gateway_config) if LiteLLM would not
    start with the document.
    """
    if not isinstance(document, dict):
        raise unusable(files, "it is empty" if document is None else "it is not a mapping (key: value)")
    listed = document.get("model_list")
    if listed and not isinstance(listed, list):
        raise unusable(files, "its model_list is not a list")
    if listed and len(listed) > _MAX_ENTRIES:
        raise unusable(files, f"its model_list has more than {_MAX_ENTRIES} items")
    reader = _Reader(document, environ, files)
    entries, findings = [], list(reader.findings)
    for index, item in enumerate(listed or ()):
        place = places[index] if index < len(places) else f"{files.config}, item {index + 1}"
        read = reader.entry(item, place)
        if isinstance(read, Entry):
            entries.append(read)
            if read.model is None:
                findings.append(_without_model(read, files))
        else:
            hint = "write it as `inv gateway --print` does"
            message = f"{place}: {read}: LiteLLM does not start with it"
            findings.append(Mismatch("bad_entry", None, None, Impact.FAULT, message, hint))
    return LiteLLMConfig(
        tuple(entries),
        reader.synonyms,
        tuple(findings),
        reader.completion_model,
        reader.certain_defaults(),
        read_retries(document),
    )


def _without_model(entry: Entry, files: GatewayPaths) -> Mismatch:
    """Return the finding for an entry without a model. LiteLLM does not start with it, for any provider."""
    variable = entry.variables.get("model")
    hint = edit(entry, "model", f"openai/{entry.alias}", files)
    if variable is None:
        message = f"{entry.alias} has no model: LiteLLM does not start with it"
        return Mismatch("no_model", entry.alias, None, Impact.FAULT, message, hint)
    place = files.env or "the environment"
    message = f"{entry.alias}: the variable {variable} has no value in {place}: without a model LiteLLM does not start"
    severity = Impact.WARNING if "model" in entry.unsure else Impact.FAULT
    return Mismatch("unset_variable", entry.alias, None, severity, message, hint)


def unusable(files: GatewayPaths, why: str) -> Refused:
    return Refused(
        "bad_gateway_config",
        f"{files.config} is not a configuration that LiteLLM starts with",
        why=why,
        hint="correct `gateway.config` in hosts.yaml, or that file; mlxops never writes it",
    )


class _Reader:
    """Read entries, and apply the sections of the document that change them."""

    def __init__(self, document: Mapping[object, object], environ: Environ, files: GatewayPaths) -> None:
        self.environ = environ
        self.files = files
        self.default_place = f"router_settings.default_litellm_params of {files.config}"
        self.findings: list[Mismatch] = []
        self.late = self._late(document.get("environment_variables"))
        router, module = _mapping(document.get("router_settings")), _mapping(document.get("litellm_settings"))
        for name in ("litellm_settings", "general_settings", "environment_variables"):
            self._check_mapping(name, document.get(name))
        for name in ("default_litellm_params", "model_group_alias"):
            self._check_mapping(f"router_settings.{name}", router.get(name))
        general = _mapping(document.get("general_settings"))
        self.completion_model = self._value(general.get("completion_model")).text
        self.health_checks = general.get("background_health_checks") is True
        self.defaults = _mapping(router.get("default_litellm_params"))
        self.module = module
        self.credentials = dict(self._credentials(document.get("credential_list")))
        self.renamed = _texts(_mapping(module.get("model_alias_map")))
        self.synonyms = {**self.renamed, **_texts(_mapping(router.get("model_group_alias")))}

    def certain_defaults(self) -> dict[str, str]:
        values = {key: self._value(self.defaults.get(key)) for key in ("model", "api_base", "custom_llm_provider")}
        values["api_base"] = self._value(self.defaults.get("base_url")) | values["api_base"]
        return {key: value.text for key, value in values.items() if value.text and value.sure}

    def _check_mapping(self, name: str, section: object) -> None:
        if section and not isinstance(section, dict):
            raise unusable(self.files, f"its {name} is not a mapping (key: value)")

    def _late(self, section: object) -> Environ:
        """Add `environment_variables`. LiteLLM sets them after it has replaced `os.environ/...` in the document."""
        if not isinstance(section, dict):
            return self.environ
        added: dict[str, str] = {}
        for name, value in section.items():
            read = self._value(value) if isinstance(value, str) else _Value(str(value))
            if isinstance(name, str) and read.text is not None:
                added[name] = read.text
        doubtful = self.environ.doubtful - added.keys()
        return Environ({**self.environ.values, **added}, doubtful, self.environ.whole)

    def _credentials(self, section: object) -> Iterator[tuple[str, Mapping[str, object]]]:
        if not section:
            return
        if not isinstance(section, list):
            raise unusable(self.files, "its credential_list is not a list")
        for item in reversed(section):  # the first item of a name counts
            name = item.get("credential_name") if isinstance(item, dict) else None
            if not isinstance(item, dict) or not isinstance(name, str):
                raise unusable(self.files, "its credential_list has an item without a credential_name")
            for key in ("credential_info", "credential_values"):
                if not isinstance(item.get(key), dict):
                    raise unusable(self.files, f"the credential {shown(name)} has no {key}")
            yield name, item["credential_values"]

    def _value(self, raw: object, place: tuple[str, str] | None = None) -> _Value:
        if raw is None:
            return _Value()
        if not isinstance(raw, str):
            return _Value(wrong="is not text", place=place)
        if not raw.startswith(ENVIRON):
            return _Value(raw or None, place=place)
        value = replace(self.environ.get(raw.replace(ENVIRON, "")), place=place)
        if value.text is None:
            return replace(value, sure=self.environ.whole and value.sure)
        if value.text.strip().lower() in {"true", "false"}:
            return replace(value, wrong=f"is {value.text} in the environment, which LiteLLM reads as a boolean")
        return value

    def entry(self, item: object, place: str) -> Entry | str:
        """Return the entry, or why LiteLLM would not start with it."""
        if not isinstance(item, dict):
            return "is not a mapping"
        alias, params, info = item.get("model_name"), item.get("litellm_params"), item.get("model_info", {})
        if not isinstance(alias, str):
            return "has no model_name" if alias is None else f"the model_name {shown(str(alias))} is not text: quote it"
        if not isinstance(params, dict):
            return f"{shown(alias)} has no litellm_params"
        if not isinstance(info, dict):
            return f"the model_info of {shown(alias)} is not a mapping"
        model = self._value(params.get("model"))
        if model.wrong:
            return f"the model of {shown(alias)} {model.wrong}"
        if model.text is not None:
            model = self._value(self.defaults.get("model"), (self.default_place, "model")) | model
        named = self._value(params.get("litellm_credential_name"))
        credential = self.credentials.get(named.text or "", {})

        def value(key: str, defaults: bool = True) -> _Value:
            def own(spelled: str) -> _Value:
                return self._value(params.get(spelled), (place, spelled))

            result = _Value()
            # base_url is another spelling of api_base, and takes precedence.
            spellings = ("base_url", key) if key == "api_base" else (key,)
            for spelled in spellings if defaults else ():
                result = result | self._value(self.defaults.get(spelled), (self.default_place, spelled))
            for spelled in spellings:
                result = result | own(spelled) if not result.wrong else result
            for spelled in spellings:
                result = result | self._value(credential.get(spelled)) if not result.wrong else result
            return result

        provider = value("custom_llm_provider")
        text = self.renamed.get(model.text or "", model.text or "")
        kind, sends = _upstream(text, provider.text)
        if self.module.get("use_litellm_proxy") is True:
            kind, sends = "litellm_proxy", text.removeprefix("litellm_proxy/")
        known = _PROVIDERS.get(kind or "")
        if text and _upstream(text, self._value(params.get("custom_llm_provider")).text)[0] is None:
            known = None  # LiteLLM reads a credential's provider too late
        base, key = value("api_base"), value("api_key")
        if known is None:
            sends = None
        path_end = known.end if known else "/chat/completions"
        if kind == "openai" and sends is not None and sends.startswith("responses/"):
            sends, path_end = sends.removeprefix("responses/"), "/responses"
        if info.get("mode") == "responses":
            path_end = "/responses"
        used = known or _PROVIDERS["openai"]
        base_found, key_found = self._address(base, used), self._key(key, used)
        wrong = next((f"{k} {v.wrong}" for k, v in (("api_base", base), ("api_key", key)) if v.wrong), "")
        fields = {"model": model, "api_base": base, "api_key": key}
        inherited = (("api_base", base_found), ("api_key", key_found))
        return Entry(
            alias=alias,
            model=text or None,
            sends=sends,
            api_base=base_found.text,
            default_base=used.default,
            has_key=used.keyless or key_found.text is not None,
            provider=provider.text,
            end=path_end,
            whole_path=used.whole_path,
            max_input_tokens=_tokens(info) or _tokens(params),
            variables={name: value.variable for name, value in fields.items() if value.variable},
            unset=tuple(
                dict.fromkeys(
                    own.variable
                    for own, final in ((base, base_found), (key, key_found))
                    if own.variable and not own.text and not final.text and not (own is key and used.keyless)
                )
            ),
            unsure=frozenset(name for name, value in (*fields.items(), *inherited) if not value.sure)
            | ({"model"} if not provider.sure or not named.sure else set()),
            place=place,
            places={name: value.place for name, value in fields.items() if value.place},
            lost=f"credential_list has no {shown(named.text)}" if named.text and not credential else "",
            out=wrong or self._out(info, params),
            answers_itself="mock_response" in params,
            health_checked=self.health_checks
            and not info.get("health_check_model")
            and info.get("disable_background_health_check") is not True,
            num_retries=number(params.get("num_retries")),
            cooldown=number(params.get("cooldown_time")) != 0,
        )

    def _address(self, own: _Value, provider: _Provider) -> _Value:
        address = own | self.late.first(provider.bases)
        if provider.default == _OWN_ADDRESS:
            return address
        if provider.default != _PROVIDERS["openai"].default:
            return address | _Value(provider.default)
        address = address | self._value(self.module.get("api_base"), ("litellm_settings", "api_base"))
        return address | self.late.first(_SHARED_BASES) if provider.shares else address

    def _key(self, own: _Value, provider: _Provider) -> _Value:
        key = own | self.late.first(provider.keys)
        for name in ("api_key", "openai_key"):
            key = key | self._value(self.module.get(name))
        key = key | self.late.get(_SHARED_KEY)
        return key if key.text or not provider.other_keys else replace(key, sure=False)

    def _out(self, info: Mapping[str, object], params: Mapping[str, object]) -> str:
        """Return why LiteLLM does not use the entry; empty if it does."""
        if info.get("blocked") is True:
            return "model_info.blocked is true: LiteLLM answers 'Model is blocked'"
        if info.get("team_id") is not None:
            return "model_info.team_id keeps it to the keys of one team"
        stages = info.get("supported_environments")
        if stages is not None:
            stage = self.environ.get("LITELLM_ENVIRONMENT").text
            if not isinstance(stages, list) or stage not in stages:
                return f"model_info.supported_environments leaves it out: LITELLM_ENVIRONMENT is {stage or 'not set'}"
        wrong = [key for key in ("rpm", "tpm") if isinstance(params.get(key), str) and not str(params[key]).isdigit()]
        return f"{wrong[0]} is not a number" if wrong else ""


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, dict) else {}


def _texts(section: Mapping[str, object]) -> dict[str, str]:
    """Read a mapping of names to names; a value may be `{model: NAME}`."""
    texts: dict[str, str] = {}
    for name, value in section.items():
        target = value.get("model") if isinstance(value, dict) else value
        if isinstance(name, str) and isinstance(target, str):
            texts[name] = target
    return texts


def _tokens(section: object) -> int | None:
    value = section.get("max_input_tokens") if isinstance(section, dict) else None
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
