"""Compare the gateway's entries with the servers. Pure.

The gateway is LiteLLM. An entry says `alias -> name at http://HOST:PORT/v1`; `core.litellm` reads them. Entries for
models of other providers are ignored.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, field
from enum import StrEnum
from urllib.parse import urlsplit

from mlxops.core.frozen import dataclass
from mlxops.core.names import shown
from mlxops.core.ports import Owner, State

ENVIRON = "os.environ/"
CHAT = "/v1/chat/completions"
"""The path that every engine answers."""
SOME_ANSWER = frozenset({"/chat/completions", "/v1/completions", "/v1/responses"})
"""Paths that some engines answer, and others do not."""
DEFAULT_NAME = "default_model"
"""mlx_lm.server's name for the model that it was started with."""


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
class GatewayPaths:
    """How the gateway's files are called in messages; `env` None: the environment is not a file."""

    config: str = "the gateway's configuration"
    env: str | None = None


@dataclass(frozen=True)
class Entry:
    """One entry of `model_list`, with everything that it inherits. Instead of the key, only whether there is one."""

    alias: str
    """The name that clients use; in a configuration as it is written also a pattern, such as `jerry-*`."""
    model: str | None
    sends: str | None
    """The name that the server is asked for; None if LiteLLM would not ask an OpenAI-compatible server."""
    api_base: str | None
    has_key: bool
    default_base: str = "https://api.openai.com/v1"
    """Where LiteLLM asks without an `api_base`."""
    provider: str | None = None
    """`custom_llm_provider`, if it is given."""
    end: str = "/chat/completions"
    """What is appended to the address."""
    whole_path: bool = False
    """Nothing is appended to an address that already has this end."""
    max_input_tokens: int | None = None
    variables: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Field of `litellm_params` -> the variable that its value comes from."""
    unset: tuple[str, ...] = ()
    """Variables that are needed and have no value."""
    unsure: frozenset[str] = frozenset()
    """Fields whose value is not certain: findings about them are warnings."""
    where: str = "the gateway's configuration"
    """File and line, for messages."""
    places: Mapping[str, tuple[str, str]] = field(default_factory=dict, hash=False)
    """Field -> the place and the key that its value comes from, where these are not `where` and the field's name."""
    pattern: str | None = None
    """The pattern that the alias came from."""
    open_pattern: bool = False
    """The name that is sent depends on what the pattern matched."""
    lost: str = ""
    """A reference to something that does not exist; empty if there is none."""
    out: str = ""
    """Why LiteLLM does not use the entry; empty if it does."""
    answers_itself: bool = False
    """LiteLLM makes up the answers and asks no server (`mock_response`)."""
    health_checked: bool = False
    """LiteLLM's own health checks ask for a name of their choice."""

    @property
    def address(self) -> tuple[str, int] | None:
        """Host and port of `api_base`; None if it has none."""
        return address_of(self.api_base)

    @property
    def certain_name(self) -> str | None:
        """The name that the server at `address` is asked for, if that is certain."""
        doubt = self.unsure & {"model", "api_base"} or self.out or self.answers_itself
        return None if doubt else self.sends

    @property
    def path(self) -> str:
        """The path that the server is asked for."""
        given = urlsplit(self.api_base or "").path
        if self.whole_path:
            given = given.rstrip("/")
            return given if given.endswith(self.end) else given + self.end
        return given.removesuffix("/") + self.end

    def right_model(self, name: str) -> str:
        """Return the value of `model` that makes LiteLLM send this name."""
        if self.provider is not None:
            return name
        first, slash, _ = (self.model or "").partition("/")
        return f"{first if slash and self.sends is not None and self.end == '/chat/completions' else 'openai'}/{name}"


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
    """It drops its model for an unknown name."""
    not_asked: str = ""
    """Why it must not be asked for a completion; empty if it may be."""
    paths: frozenset[str] = frozenset()
    """The paths at which its engine gives completions; empty: not known."""
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
    """Whether two `api_base`s have the same server, port and path, with or without /v1."""
    if one.rstrip("/") == other.rstrip("/"):
        return True
    first, second = (address_of(each) for each in (one, other))
    if first is None or second is None or first[1] != second[1]:
        return False
    paths = {urlsplit(each).path.rstrip("/").removesuffix("/v1") for each in (one, other)}
    return len(paths) == 1 and same_host(first[0], second[0])


def address_of(api_base: str | None) -> tuple[str, int] | None:
    """Return host and port of an `api_base`; None if it has none."""
    try:
        parts = urlsplit(api_base or "")
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    except ValueError:
        return None
    return (parts.hostname, port) if parts.hostname and port else None


# -- what an entry has to be --------------------------------------------------------------------------------------


def names_sent(entries: Iterable[Entry], address: str, same_host: SameHost = same_name) -> dict[int, tuple[str, ...]]:
    """Return, for each port of the host at `address`, the names that the gateway certainly sends there."""
    sent: dict[int, list[str]] = {}
    for entry in entries:
        where, name = entry.address, entry.certain_name
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


def edit(entry: Entry, key: str, value: str, files: GatewayPaths) -> str:
    """The one change to the gateway's files that gives `litellm_params.key` this value, as a sentence."""
    variable = entry.variables.get(key)
    if variable and files.env:
        return f"in {files.env}: {variable}={value}; then restart the gateway, once"
    if variable:
        return f"in the gateway's environment: {variable}={value}; then restart the gateway, once"
    place, spelled = entry.places.get(key, (entry.where, key))
    return f"in {place}: {spelled}: {value}; then restart the gateway, once"


def url(address: str, port: int) -> str:
    return f"http://{f'[{address}]' if ':' in address else address}:{port}/v1"


# -- the comparison -----------------------------------------------------------------------------------------------


def compare(
    entries: Sequence[Entry], ports: Sequence[Port], files: GatewayPaths, same_host: SameHost = same_name
) -> tuple[Finding, ...]:
    """Everything between the gateway's entries and what answers that is not as it should be; faults first.

    `entries` under names that clients use, without patterns (`litellm.Config.concrete`). `ports` are those of all
    managed hosts: an alias may be a slot of several hosts, and is balanced between them.
    """
    ours = [(entry, _targets(entry, ports, same_host)) for entry in claims(entries, ports, same_host)]
    ours = [(entry, target) for entry, target in ours if target or any(p.alias == entry.alias for p in ports)]
    found: list[Finding] = []
    for entry, target in ours:
        together = [each for each in ours if each[0].alias == entry.alias]
        found += _of_entry(entry, target, [port for port in ports if port.alias == entry.alias], together, files)
    found += _of_groups(ours, files)
    found += _of_patterns(ours)
    # Where these lead is not known, and a finding already says so.
    nowhere = {entry.alias for entry, target in ours if target is None}
    for port in ports:
        here = [entry for entry, target in ours if target == port]
        if here or port.alias not in nowhere:
            found += _of_port(port, here, files)
    unique = list(dict.fromkeys(found))
    return tuple(sorted(unique, key=lambda each: each.severity is not Severity.FAULT))


def claims(entries: Iterable[Entry], ports: Sequence[Port], same_host: SameHost = same_name) -> tuple[Entry, ...]:
    """Remove entries that a pattern makes for the alias of a slot if they lead to another port than this slot's.

    They are not meant: a pattern `*` for one port also matches the aliases of all others.
    """

    def claimed(entry: Entry) -> bool:
        if entry.pattern is None:
            return True
        target, where = _targets(entry, ports, same_host), entry.address
        if target is not None:
            return target.alias in (None, entry.alias, entry.sends)
        # It may be the slot's host by another address.
        return where is not None and any(port.alias == entry.alias and port.port == where[1] for port in ports)

    return tuple(entry for entry in entries if claimed(entry))


def _targets(entry: Entry, ports: Sequence[Port], same_host: SameHost) -> Port | None:
    where = entry.address
    if where is None:
        return None
    return next((port for port in ports if port.port == where[1] and same_host(where[0], port.address)), None)


Together = Sequence[tuple[Entry, "Port | None"]]
"""All entries of an alias, and the ports that they lead to."""
Say = Callable[..., Finding]
"""(code, message, hint, certain=True) -> a finding about the entry; a fault if it is certain."""


def _of_entry(
    entry: Entry, target: Port | None, own: Sequence[Port], together: Together, files: GatewayPaths
) -> Iterator[Finding]:
    """What is wrong with one entry, whatever is behind it. `own`: the slots with its alias."""
    slot = target if target in own or not own else own[0]
    port, host = (slot.port, slot.host) if slot else (None, None)
    name = (slot.name if slot else None) or entry.alias

    def say(code: str, message: str, hint: str, certain: bool = True) -> Finding:
        severity = Severity.FAULT if certain else Severity.WARNING
        return Finding(code, entry.alias, port, severity, f"{entry.alias}: {message}", hint, host)

    if entry.out:
        team = entry.out.startswith("model_info.team_id")
        yield say("entry_not_used", entry.out, f"correct it in {entry.where}", certain=not team)
    if entry.answers_itself:
        hint = f"remove mock_response in {entry.where}"
        yield say("mock_response", "LiteLLM makes the answers up, and asks no server", hint, certain=False)
    for variable in entry.unset:
        where = files.env or "the environment"
        message = f"the variable {variable} has no value in {where}"
        yield say("unset_variable", message, _value_for(entry, variable, name, slot, files), certain=bool(files.env))
    if entry.model is not None and entry.sends is None:
        message = f"{shown(entry.model)} is not sent to an OpenAI-compatible server"
        yield say("not_openai", message, edit(entry, "model", entry.right_model(name), files))
    elif not entry.has_key and "api_key" not in entry.variables:
        hint = edit(entry, "api_key", "none", files) + " (any placeholder will do)"
        message = f"has no api_key: LiteLLM answers 'Missing credentials'{entry.lost and f' ({entry.lost})'}"
        yield say("missing_key", message, hint, _sure(entry, "api_key"))
    if slot is not None:
        yield from _of_base(entry, target, slot, say, own, together, files)
    if target is not None:
        yield from _of_name(entry, target, say, files)


def _sure(entry: Entry, *fields: str) -> bool:
    return not entry.unsure & set(fields)


def _value_for(entry: Entry, variable: str, name: str, slot: Port | None, files: GatewayPaths) -> str:
    key = next((key for key, each in entry.variables.items() if each == variable), "")
    base = url(slot.address, slot.port) if slot else ""
    right = {"model": entry.right_model(name), "api_base": base, "api_key": "none"}
    return edit(entry, key, right.get(key, "..."), files)


_PLAIN_HOST = re.compile(r"\d+(?:\.\d+){3}")
"""As four numbers. LiteLLM refuses shorter forms of an IPv4 address."""
_DIGITS = re.compile(r"(?:0[xX][0-9a-fA-F]+|[\d.]+)")


def _of_base(
    entry: Entry,
    target: Port | None,
    slot: Port,
    say: Say,
    own: Sequence[Port],
    together: Together,
    files: GatewayPaths,
) -> Iterator[Finding]:
    right, base = edit(entry, "api_base", url(slot.address, slot.port), files), entry.api_base
    if base is None:
        if entry.variables.get("api_base") not in entry.unset:
            message = f"has no api_base: LiteLLM would ask {entry.default_base}"
            yield say("no_api_base", message, right, _sure(entry, "api_base"))
        return
    if wrong := _no_url(base):
        yield say("bad_api_base", f"api_base {shown(base)} {wrong}", right, _sure(entry, "api_base"))
        return
    if own and target not in own:
        served = any(each in own for _, each in together)
        message = f"is sent to {shown(base)}; its slot is port {slot.port} of {slot.host}"
        if target is None:
            message += ". Whether that leads to it is not known here"
            right = f"if it does not: {right}"
        # Another way to the same server, such as a tunnel or a container's address, is as good.
        yield say("wrong_address", message, right, target is not None and not served and _sure(entry, "api_base"))
    if target is not None and urlsplit(base).scheme.lower() == "https":
        yield say("bad_api_base", f"api_base {shown(base)} asks for TLS, and the servers speak plain HTTP", right)
    path = entry.path
    if path != CHAT and entry.sends is not None:
        answered = target is not None and path in target.paths
        some = path in SOME_ANSWER or path == f"/{CHAT}"
        certain = target is not None and not answered and (bool(target.paths) or not some)
        who = "not every engine answers" if some and not certain else "the server does not answer"
        message = f"LiteLLM asks {shown(path)} of {shown(base)}, which {who}"
        if path.endswith("/chat/completions"):
            yield say("no_v1", message, right, certain and _sure(entry, "api_base"))
        else:
            hint = edit(entry, "model", f"openai/{slot.name or entry.alias}", files)
            yield say("not_chat", message, hint, certain and _sure(entry, "api_base"))


def _no_url(base: str) -> str:
    """Return why LiteLLM cannot use this address; empty if it can."""
    try:
        parts = urlsplit(base)
        host = parts.hostname
    except ValueError:
        host = None
    if address_of(base) is None or host is None or parts.scheme not in {"http", "https"} or base != base.strip():
        return "is not a URL"
    if " " in parts.netloc or (_DIGITS.fullmatch(host) and not _PLAIN_HOST.fullmatch(host)):
        return "is not a URL with a host that LiteLLM takes"
    if parts.username is not None:
        return "has a user in it, which LiteLLM does not send together with a key"
    return "has a '?' in it, behind which LiteLLM puts the path" if parts.query else ""


def _of_name(entry: Entry, target: Port, say: Say, files: GatewayPaths) -> Iterator[Finding]:
    name, sends = target.name, entry.sends
    if name is not None and sends is not None and sends != name:
        right = edit(entry, "model", entry.right_model(name), files)
        message = f"the gateway sends the name {shown(sends)}; port {target.port} answers to {name}"
        if sends == DEFAULT_NAME and (sends in target.also_answers_to or target.answers_to is None):
            message += ", and to this one only if an mlx_lm.server is there: mlx-openai-server does not know it"
            yield say("engine_name", message, right, certain=False)
        elif target.answers_to_any or sends in (target.answers_to, *target.also_answers_to):
            message = f"the gateway sends the name {shown(sends)}, which the server on port {target.port} knows. "
            message += f"One that is loaded there answers to {name}"
            yield say("other_name", message, right, certain=False)
        else:
            yield say("wrong_name", message, right, _sure(entry, "model", "api_base"))
    context, promised = target.context_length, entry.max_input_tokens
    if context is not None and promised is not None and promised > context:
        message = f"the gateway promises {promised} input tokens; {target.model} takes {context}"
        hint = f"load a model with a longer context, or lower max_input_tokens in {files.config}"
        yield say("context_too_small", message, hint, certain=False)


def _of_groups(ours: Together, files: GatewayPaths) -> Iterator[Finding]:
    """Entries that are wrong only together: LiteLLM balances an alias between all that it is given."""
    by_port: dict[Port, list[str]] = {}
    by_alias: dict[str, dict[tuple[str, int], Port | None]] = {}
    for entry, target in ours:
        if target is not None and entry.pattern is None:
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
            yield Finding("two_aliases_one_port", port.alias, port.port, Severity.WARNING, message, hint, port.host)
    for alias, addresses in by_alias.items():
        targets = list(dict.fromkeys(addresses.values()))
        if len(targets) > 1 and not all(target is not None and target.alias == alias for target in targets):
            wrong = any(e.alias == alias and t is not None and e.sends not in _names(t) for e, t in ours)
            listed = ", ".join(f"{host}:{number}" for host, number in addresses)
            hint = f"one alias, one port: remove the other entries of {alias} from {files.config}"
            message = f"{alias} is sent to several ports, in turns: {listed}"
            severity = Severity.FAULT if wrong else Severity.WARNING
            yield Finding("one_alias_two_ports", alias, None, severity, message, hint)


def _names(port: Port) -> set[str | None]:
    return {port.name, port.answers_to, *port.also_answers_to}


def _of_patterns(ours: Together) -> Iterator[Finding]:
    """Warn of patterns: they send every matching name to their port, known there or not."""
    for entry, target in ours:
        if entry.pattern is not None and target is not None and entry.open_pattern:
            message = f"{entry.pattern} sends every name that it matches to port {target.port} of {target.host}"
            if entry.health_checked:
                message += ", and background_health_checks ask it for names that LiteLLM chooses"
            hint = f"an mlx_lm.server drops its model for a name that it does not know; in {entry.where} name the alias"
            yield Finding("pattern", target.alias, target.port, Severity.WARNING, message, hint, target.host)


_BROKEN = {State.FAILED, State.WEDGED, State.MISMATCH, State.ORPHAN}
_PASSING = {State.LOADING, State.DRAINING, State.UNKNOWN}


def _of_port(port: Port, here: Sequence[Entry], files: GatewayPaths) -> Iterator[Finding]:
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
    elif port.alias and port.answers_to and port.alias not in (port.answers_to, *port.also_answers_to):
        message = f"{alias}: the server on {where} answers to {shown(port.answers_to)}, not to {port.alias}"
        model = port.model if port.owner is Owner.MLXOPS and port.model else "MODEL"
        fails = any(entry.sends not in (port.answers_to, *port.also_answers_to) for entry in here)
        severity = Severity.FAULT if fails else Severity.WARNING
        hint = f"mlxctl load {model} {port.port} --force"
        if port.owner is Owner.BOOT:  # a load is refused there
            hint = f"have the boot job start it under the name {port.alias}"
        yield finding(severity, "server_name", message, hint)


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
