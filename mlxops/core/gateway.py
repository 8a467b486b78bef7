"""The gateway's entries against what is served: pure.

The gateway is LiteLLM. Its configuration is a document `{"model_list": [{"model_name": ALIAS, "litellm_params":
{"model": "openai/NAME", "api_base": "http://HOST:PORT/v1", "api_key": KEY}, "model_info": {"max_input_tokens": N}}]}`,
in which any value may be `os.environ/NAME` (LiteLLM's documentation, "Proxy: all settings"; tried with 1.109). NAME is
the name that the server is asked for. Entries for other people's models are none of our business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from urllib.parse import urlsplit

from mlxops.core.errors import Refused
from mlxops.core.names import shown
from mlxops.core.world import Owner, State

ENVIRON = "os.environ/"
OPENAI = frozenset({"openai", "custom_openai", "hosted_vllm", "lm_studio", "llamafile", "openai_like"})
"""LiteLLM's providers that send `POST {api_base}/chat/completions` with the rest of `model` as the name."""
_FALLBACK_KEY = "OPENAI_API_KEY"
_MAX_ENTRIES = 10_000


class Severity(StrEnum):
    FAULT = "fault"
    """A request by this alias fails, or is answered by something else than the contract says."""
    WARNING = "warning"


@dataclass(frozen=True)
class Finding:
    """`alias` and `port` are None where the finding is about neither; `host` where it is about no single one."""

    code: str
    alias: str | None
    port: int | None
    severity: Severity
    message: str
    hint: str
    host: str | None = None

    def to_wire(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True)
class Files:
    """How the gateway's files are called in messages; `env` None: the environment is not a file."""

    config: str = "the gateway's configuration"
    env: str | None = None


@dataclass(frozen=True)
class Entry:
    """One entry of `model_list`, its variables resolved. Of the key only whether there is one."""

    alias: str
    model: str | None
    api_base: str | None
    has_key: bool
    provider: str | None = None
    """`custom_llm_provider`, where `model` does not begin with one."""
    max_input_tokens: int | None = None
    variables: Mapping[str, str] = field(default_factory=dict)
    """Field of `litellm_params` -> the variable that its value comes from."""
    unset: tuple[str, ...] = ()
    """Variables that have no value."""
    where: str = "the gateway's configuration"
    """File and line, for messages."""

    @property
    def sends(self) -> str | None:
        """The name that the server is asked for; None if LiteLLM would not ask an OpenAI-compatible server."""
        if self.model is None:
            return None
        first, slash, rest = self.model.partition("/")
        if slash and first in OPENAI:
            return rest
        return self.model if self.provider in OPENAI else None

    @property
    def address(self) -> tuple[str, int] | None:
        """Host and port of `api_base`; None if it has none."""
        return address_of(self.api_base)


@dataclass(frozen=True)
class Port:
    """A port of a managed host: its slot, and what was seen there. `state` None: its host was not asked or reached."""

    host: str
    address: str
    """Where the gateway reaches the host's servers: a name or an IP address."""
    port: int
    alias: str | None = None
    state: State | None = None
    owner: Owner | None = None
    model: str | None = None
    answers_to: str | None = None
    """The name under which the server answers; None: unknown, or to any."""
    also_answers_to: tuple[str, ...] = ()
    """Further names that it knows for the same model."""
    answers_to_any: bool = False
    drops_for_others: bool = True
    """For a name that it does not know it drops its model."""
    not_asked: str = ""
    """Why it must not be asked for a completion; empty if it may be."""
    context_length: int | None = None
    assigned: bool = False
    detail: str = ""

    @property
    def name(self) -> str | None:
        """What the gateway has to send for it; None while nothing without an alias is there."""
        return self.alias or self.answers_to

    @property
    def serves(self) -> bool:
        return self.owner is not None

    def __str__(self) -> str:
        return f"{self.host} {self.port}"


SameHost = Callable[[str, str], bool]
"""Whether two host names mean one machine."""


def same_name(one: str, other: str) -> bool:
    return one.lower().rstrip(".") == other.lower().rstrip(".")


def same_base(one: str, other: str, same_host: SameHost = same_name) -> bool:
    """Whether two `api_base`s are one address: the same server, port and path, with or without /v1."""
    if one.rstrip("/") == other.rstrip("/"):
        return True
    first, second = (address_of(each) for each in (one, other))
    if first is None or second is None or first[1] != second[1]:
        return False
    paths = {urlsplit(each).path.rstrip("/").removesuffix("/v1") for each in (one, other)}
    return len(paths) == 1 and same_host(first[0], second[0])


def address_of(api_base: str | None) -> tuple[str, int] | None:
    """Host and port of an `api_base`; None if it has none."""
    try:
        parts = urlsplit(api_base or "")
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    except ValueError:
        return None
    return (parts.hostname, port) if parts.hostname and port else None


# -- reading the document -----------------------------------------------------------------------------------------


def parse(
    document: object, environ: Mapping[str, str], files: Files, lines: Sequence[int] = ()
) -> tuple[tuple[Entry, ...], tuple[Finding, ...]]:
    """The entries of a loaded configuration, and what is wrong with those that are none.

    `lines`: where in the file each item of `model_list` begins. Raises `Refused` (bad_gateway_config) for a
    document that LiteLLM could not use at all.
    """
    if not isinstance(document, dict):
        raise _unusable(files, "it is not a mapping (key: value)")
    listed = document.get("model_list")
    if listed is None:
        return (), ()
    if not isinstance(listed, list):
        raise _unusable(files, "its model_list is not a list")
    if len(listed) > _MAX_ENTRIES:
        raise _unusable(files, f"its model_list has more than {_MAX_ENTRIES} items")
    entries, findings = [], []
    for index, item in enumerate(listed):
        where = f"{files.config}:{lines[index]}" if index < len(lines) else f"{files.config}, item {index + 1}"
        read = _entry(item, environ, where)
        if isinstance(read, Entry):
            entries.append(read)
        else:
            hint = "write it as `inv gateway --print` does"
            findings.append(Finding("bad_entry", None, None, Severity.FAULT, f"{where}: {read}", hint))
    return tuple(entries), tuple(findings)


def _unusable(files: Files, why: str) -> Refused:
    return Refused(
        "bad_gateway_config",
        f"{files.config} is not a configuration of LiteLLM",
        why=why,
        hint="correct `gateway.config` in hosts.yaml, or that file; mlxops never writes it",
    )


def _entry(item: object, environ: Mapping[str, str], where: str) -> Entry | str:
    """The entry, or what is wrong with it."""
    if not isinstance(item, dict):
        return "is not a mapping"
    alias, params, info = item.get("model_name"), item.get("litellm_params"), item.get("model_info")
    if not isinstance(alias, str) or not alias:
        return "has no model_name"
    if not isinstance(params, dict):
        return f"{shown(alias)} has no litellm_params"
    variables: dict[str, str] = {}
    texts: dict[str, str | None] = {}
    for key in ("model", "api_base", "api_key", "custom_llm_provider"):
        value = params.get(key, params.get("base_url") if key == "api_base" else None)
        if value is not None and not isinstance(value, str):
            return f"{shown(alias)}: {key} is not text"
        if value is not None and value.startswith(ENVIRON):
            variables[key] = value.removeprefix(ENVIRON)
            value = environ.get(variables[key])
        texts[key] = value or None
    credential = params.get("litellm_credential_name")
    return Entry(
        alias=alias,
        model=texts["model"],
        api_base=texts["api_base"],
        has_key=bool(texts["api_key"] or credential or environ.get(_FALLBACK_KEY)),
        provider=texts["custom_llm_provider"],
        max_input_tokens=_tokens(info) or _tokens(params),
        variables=variables,
        unset=tuple(dict.fromkeys(name for key, name in variables.items() if texts[key] is None)),
        where=where,
    )


def _tokens(where: object) -> int | None:
    value = where.get("max_input_tokens") if isinstance(where, dict) else None
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


# -- what an entry has to be --------------------------------------------------------------------------------------


def names_sent(entries: Iterable[Entry], address: str, same_host: SameHost = same_name) -> dict[int, tuple[str, ...]]:
    """Port of the host at `address` -> the names that the gateway sends there."""
    sent: dict[int, list[str]] = {}
    for entry in entries:
        where, name = entry.address, entry.sends
        if where is not None and name is not None and same_host(where[0], address):
            sent.setdefault(where[1], []).append(name)
    return {port: tuple(dict.fromkeys(names)) for port, names in sent.items()}


def tokens_promised(entries: Iterable[Entry], address: str, same_host: SameHost = same_name) -> dict[int, int]:
    """Port of the host at `address` -> the most input tokens that an entry for it promises."""
    promised: dict[int, int] = {}
    for entry in entries:
        where, tokens = entry.address, entry.max_input_tokens
        if where is not None and tokens is not None and same_host(where[0], address):
            promised[where[1]] = max(tokens, promised.get(where[1], 0))
    return promised


def edit(entry: Entry, key: str, value: str, files: Files) -> str:
    """The one change to the gateway's files that gives `litellm_params.key` this value, as a sentence."""
    variable = entry.variables.get(key)
    if variable and files.env:
        return f"in {files.env}: {variable}={value}; then restart the gateway, once"
    if variable:
        return f"in the gateway's environment: {variable}={value}; then restart the gateway, once"
    return f"in {entry.where}: {key}: {value}; then restart the gateway, once"


def url(address: str, port: int) -> str:
    return f"http://{f'[{address}]' if ':' in address else address}:{port}/v1"


# -- the comparison -----------------------------------------------------------------------------------------------


def compare(
    entries: Sequence[Entry], ports: Sequence[Port], files: Files, same_host: SameHost = same_name
) -> tuple[Finding, ...]:
    """Everything between the gateway's entries and what answers that is not as it should be; faults first.

    `ports` are those of all managed hosts: an alias may be a slot of several hosts, and is balanced between them.
    """
    ours = [(entry, _targets(entry, ports, same_host)) for entry in entries]
    ours = [(entry, target) for entry, target in ours if target or any(p.alias == entry.alias for p in ports)]
    found: list[Finding] = []
    for entry, target in ours:
        found += _of_entry(entry, target, [port for port in ports if port.alias == entry.alias], files)
    found += _of_groups(ours, files)
    # Where they lead to is in a variable without a value, which is told of them already.
    nowhere = {entry.alias for entry, target in ours if target is None and entry.unset}
    for port in ports:
        here = [entry for entry, target in ours if target == port]
        if here or port.alias not in nowhere:
            found += _of_port(port, here, files)
    unique = list(dict.fromkeys(found))
    return tuple(sorted(unique, key=lambda each: each.severity is not Severity.FAULT))


def _targets(entry: Entry, ports: Sequence[Port], same_host: SameHost) -> Port | None:
    where = entry.address
    if where is None:
        return None
    return next((port for port in ports if port.port == where[1] and same_host(where[0], port.address)), None)


def _of_entry(entry: Entry, target: Port | None, own: Sequence[Port], files: Files) -> Iterator[Finding]:
    """What is wrong with one entry, whatever is behind it. `own`: the slots with its alias."""
    slot = target if target in own or not own else own[0]
    port, host = (slot.port, slot.host) if slot else (None, None)
    name = (slot.name if slot else None) or entry.alias

    def fault(code: str, message: str, hint: str) -> Finding:
        return Finding(code, entry.alias, port, Severity.FAULT, message, hint, host)

    for variable in entry.unset:
        where = files.env or "the environment"
        message = f"{entry.alias}: the variable {variable} has no value in {where}"
        yield fault("unset_variable", message, _value_for(entry, variable, name, slot, files))
    if entry.model is None and "model" not in entry.variables:
        yield fault("no_model", f"{entry.alias} has no model", edit(entry, "model", f"openai/{name}", files))
    if entry.model is not None and entry.sends is None:
        message = f"{entry.alias}: {shown(entry.model)} is not sent to an OpenAI-compatible server"
        yield fault("not_openai", message, edit(entry, "model", f"openai/{name}", files))
    if not entry.has_key and "api_key" not in entry.variables:
        message = f"{entry.alias} has no api_key: LiteLLM answers 'Missing credentials'"
        yield fault("missing_key", message, edit(entry, "api_key", "none", files) + " (any placeholder will do)")
    if slot is not None:
        yield from _of_base(entry, target, slot, fault, own, files)
    if target is not None and (not own or target in own):
        yield from _of_name(entry, target, fault, files)


def _value_for(entry: Entry, variable: str, name: str, slot: Port | None, files: Files) -> str:
    key = next(key for key, each in entry.variables.items() if each == variable)
    right = {"model": f"openai/{name}", "api_base": url(slot.address, slot.port) if slot else "", "api_key": "none"}
    return edit(entry, key, right.get(key, "..."), files)


Fault = Callable[[str, str, str], Finding]


def _of_base(
    entry: Entry, target: Port | None, slot: Port, fault: Fault, own: Sequence[Port], files: Files
) -> Iterator[Finding]:
    right = edit(entry, "api_base", url(slot.address, slot.port), files)
    if entry.api_base is None:
        if "api_base" not in entry.variables:
            yield fault("no_api_base", f"{entry.alias} has no api_base: LiteLLM would ask OpenAI itself", right)
        return
    if entry.address is None or urlsplit(entry.api_base).scheme not in {"http", "https"}:
        yield fault("bad_api_base", f"{entry.alias}: api_base {shown(entry.api_base)} is not a URL", right)
        return
    if own and target not in own:
        message = f"{entry.alias} is sent to {shown(entry.api_base)}; its slot is port {slot.port} of {slot.host}"
        yield fault("wrong_address", message, right)
    if urlsplit(entry.api_base).path.rstrip("/") != "/v1":
        message = f"{entry.alias}: api_base {shown(entry.api_base)} does not end in /v1"
        yield fault("no_v1", message, right)


def _of_name(entry: Entry, target: Port, fault: Fault, files: Files) -> Iterator[Finding]:
    name = target.name
    if name is not None and entry.sends is not None and entry.sends != name:
        message = (
            f"{entry.alias}: the gateway sends the name {shown(entry.sends)}; port {target.port} answers to {name}"
        )
        yield fault("wrong_name", message, edit(entry, "model", f"openai/{name}", files))
    context, promised = target.context_length, entry.max_input_tokens
    if context is not None and promised is not None and promised > context:
        message = f"{entry.alias}: the gateway promises {promised} input tokens; {target.model} takes {context}"
        hint = f"load a model with a longer context, or lower max_input_tokens in {files.config}"
        yield Finding("context_too_small", entry.alias, target.port, Severity.WARNING, message, hint, target.host)


def _of_groups(ours: Sequence[tuple[Entry, Port | None]], files: Files) -> Iterator[Finding]:
    """Entries that are wrong only together: LiteLLM balances an alias between all that it is given."""
    by_port: dict[Port, list[str]] = {}
    by_alias: dict[str, dict[tuple[str, int], Port | None]] = {}
    for entry, target in ours:
        if target is not None:
            by_port.setdefault(target, []).append(entry.alias)
        if entry.address is not None:
            by_alias.setdefault(entry.alias, {})[entry.address] = target
    for port, aliases in by_port.items():
        several = list(dict.fromkeys(aliases))
        if len(several) > 1:
            message = f"port {port.port} of {port.host} has several aliases: {', '.join(several)}"
            hint = (
                f"one port, one alias: keep {port.alias or several[0]}; a synonym is router_settings.model_group_alias"
            )
            yield Finding("two_aliases_one_port", port.alias, port.port, Severity.FAULT, message, hint, port.host)
    for alias, addresses in by_alias.items():
        targets = list(dict.fromkeys(addresses.values()))
        if len(targets) > 1 and not all(target is not None and target.alias == alias for target in targets):
            listed = ", ".join(f"{host}:{number}" for host, number in addresses)
            hint = f"one alias, one port: remove the other entries of {alias} from {files.config}"
            message = f"{alias} is sent to several ports, in turns: {listed}"
            yield Finding("one_alias_two_ports", alias, None, Severity.FAULT, message, hint)


_BROKEN = {State.FAILED, State.WEDGED, State.MISMATCH, State.ORPHAN}
_PASSING = {State.LOADING, State.DRAINING, State.UNKNOWN}


def _of_port(port: Port, here: Sequence[Entry], files: Files) -> Iterator[Finding]:
    """What a port and its entries are to each other. `here`: the entries that lead to it."""
    alias = port.alias or (here[0].alias if here else None)

    def finding(severity: Severity, code: str, message: str, hint: str) -> Finding:
        return Finding(code, alias, port.port, severity, message, hint, port.host)

    if not here:
        yield from _without_entry(port, finding)
        return
    if port.state is None:
        return
    where = f"port {port.port} of {port.host}"
    load = f"mlxctl load MODEL {port.port}"
    if port.state is State.FOREIGN:
        message = f"{alias}: {where} is answered by a process that is not ours: {port.detail}".rstrip(": ")
        yield finding(Severity.FAULT, "foreign_server", message, "stop that process; mlxops never signals it")
    elif port.state in _BROKEN:
        message = f"{alias}: what is on {where} is {port.state}: {port.detail}".rstrip(": ")
        yield finding(Severity.FAULT, "not_serving", message, f"see: mlxctl status; then {load} --force")
    elif port.state in _PASSING:
        message = f"{alias}: {where} is {port.state}"
        yield finding(Severity.WARNING, "not_ready", message, "ask again in a moment: inv gateway")
    elif not port.serves:
        severity = Severity.FAULT if port.assigned else Severity.WARNING
        why = "although the registry assigns it" if port.assigned else ""
        message = f"{alias}: nothing serves {where} {why}".rstrip()
        yield finding(
            severity, "alias_without_server", message, f"{load}; until then the gateway answers with an error"
        )
    elif port.alias and port.answers_to and port.answers_to != port.alias:
        message = f"{alias}: the server on {where} answers to {shown(port.answers_to)}, not to {port.alias}"
        model = port.model if port.owner is Owner.MLXOPS and port.model else "MODEL"
        yield finding(Severity.FAULT, "server_name", message, f"mlxctl load {model} {port.port} --force")


def _without_entry(port: Port, finding: Callable[[Severity, str, str, str], Finding]) -> Iterator[Finding]:
    paste = "paste the entry that `inv gateway --print` shows, then restart the gateway, once"
    served = f"{port.model or 'a server'} on port {port.port} of {port.host}"
    if port.alias and port.serves:
        message = f"the gateway has no entry for {port.alias}: nobody reaches {served} by it"
        yield finding(Severity.FAULT, "server_without_entry", message, paste)
    elif port.alias:
        message = f"the gateway has no entry for {port.alias}, port {port.port} of {port.host}"
        yield finding(Severity.WARNING, "slot_without_entry", message, paste)
    elif port.serves:
        message = f"{served} has no alias: the gateway does not know it"
        yield finding(
            Severity.WARNING, "server_without_alias", message, "give the port an alias under slots in hosts.yaml"
        )


# -- what to paste ------------------------------------------------------------------------------------------------

PLACEHOLDER_KEY = "none"


def printed(ports: Sequence[Port]) -> tuple[dict[str, object], dict[str, str]]:
    """The entries of all slots as a document for LiteLLM, every value written out; and no variables."""
    return _document((port, _values(port)) for port in ports if port.alias), {}


def printed_env(ports: Sequence[Port]) -> tuple[dict[str, object], dict[str, str]]:
    """The same with every value in a variable; and those variables with their values."""
    slots = [port for port in ports if port.alias]
    environ: dict[str, str] = {}
    rows = []
    for port, prefix in zip(slots, _prefixes(slots), strict=True):
        named = {key: f"{prefix}_{key.upper()}" for key in _values(port)}
        environ |= {named[key]: value for key, value in _values(port).items()}
        rows.append((port, {key: f"{ENVIRON}{name}" for key, name in named.items()}))
    return _document(rows), environ


def _values(port: Port) -> dict[str, str]:
    return {"model": f"openai/{port.alias}", "api_base": url(port.address, port.port), "api_key": PLACEHOLDER_KEY}


def _document(rows: Iterable[tuple[Port, Mapping[str, str]]]) -> dict[str, object]:
    return {"model_list": [{"model_name": port.alias, "litellm_params": dict(values)} for port, values in rows]}


def _prefixes(slots: Sequence[Port]) -> list[str]:
    """A prefix of variable names for each slot: its alias, and where two would be the same, host and port too."""
    plain = [_variable(port.alias or "") for port in slots]
    return [
        name if plain.count(name) == 1 else _variable(f"{port.host}_{port.alias}_{port.port}")
        for name, port in zip(plain, slots, strict=True)
    ]


def _variable(text: str) -> str:
    made = "".join(letter if letter.isalnum() else "_" for letter in text).upper()
    return made if made[:1].isalpha() else f"SLOT_{made}"
