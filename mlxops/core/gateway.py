"""Compare the gateway's entries with the servers. Pure.

The gateway is LiteLLM. An entry says `alias -> name at http://HOST:PORT/v1`; `core.litellm` reads them. Entries for
models of other providers are ignored.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import field
from enum import StrEnum
from urllib.parse import urlsplit

from mlxops.core.frozen import dataclass
from mlxops.core.names import DEFAULT_MODEL, shown
from mlxops.core.ports import Owner, State
from mlxops.core.redaction import redact

ENVIRON = "os.environ/"
CHAT = "/v1/chat/completions"
"""The path that every engine answers."""
SOME_ANSWER = frozenset({"/chat/completions", "/v1/completions", "/v1/responses"})
"""Paths that some engines answer, and others do not."""


class Impact(StrEnum):
    """What a mismatch does to requests."""

    FAULT = "fault"
    """A request by this alias fails, or the wrong server answers it."""
    WARNING = "warning"


@dataclass(frozen=True)
class Mismatch:
    """A problem between the gateway and its servers.

    `alias`, `port` and `host` are None if it is about no single one.
    """

    code: str
    alias: str | None
    port: int | None
    severity: Impact
    message: str
    hint: str
    host: str | None = None


@dataclass(frozen=True)
class GatewayPaths:
    """The names of the gateway's files in messages. `env` None: the environment is not a file."""

    config: str = "the gateway's configuration"
    env: str | None = None


@dataclass(frozen=True)
class Entry:
    """An entry of `model_list`, with all inherited values. It never holds the key, only whether there is one."""

    alias: str
    """The name that clients use. As written in the configuration, it may also be a pattern such as `jerry-*`."""
    model: str | None
    sends: str | None
    """The name in the request to the server; None if LiteLLM would not ask an OpenAI-compatible server."""
    api_base: str | None
    has_key: bool
    default_base: str = "https://api.openai.com/v1"
    """Where LiteLLM asks without an `api_base`."""
    provider: str | None = None
    """`custom_llm_provider`, if it is set."""
    end: str = "/chat/completions"
    """The path that LiteLLM appends to the address."""
    whole_path: bool = False
    """LiteLLM appends nothing to an address that already has this end."""
    max_input_tokens: int | None = None
    variables: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Field of `litellm_params` -> the variable that its value comes from."""
    unset: tuple[str, ...] = ()
    """Variables that are needed and have no value."""
    unsure: frozenset[str] = frozenset()
    """Fields whose value is not certain: findings about them are warnings."""
    place: str = "the gateway's configuration"
    """File and line, for messages."""
    places: Mapping[str, tuple[str, str]] = field(default_factory=dict, hash=False)
    """Field -> the place and the key that its value comes from, if they differ from `place` and the field's name."""
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
    num_retries: int | None = None
    """The entry's own; None: that of the router."""
    cooldown: bool = True
    """LiteLLM sets its server aside after some failures, if the router has that, too."""

    @property
    def address(self) -> tuple[str, int] | None:
        """Host and port of `api_base`; None if it has none."""
        return address_of(self.api_base)

    @property
    def certain_name(self) -> str | None:
        """The name in the request to the server at `address`; None if it is not certain."""
        doubt = self.unsure & {"model", "api_base"} or self.out or self.answers_itself
        return None if doubt else self.sends

    @property
    def path(self) -> str:
        """The path in the request to the server."""
        base_path = urlsplit(self.api_base or "").path
        if self.whole_path:
            base_path = base_path.rstrip("/")
            return base_path if base_path.endswith(self.end) else base_path + self.end
        return base_path.removesuffix("/") + self.end

    def right_model(self, name: str) -> str:
        """Return the value of `model` that makes LiteLLM send this name."""
        if self.provider is not None:
            return name
        first, slash, _ = (self.model or "").partition("/")
        return f"{first if slash and self.sends is not None and self.end == '/chat/completions' else 'openai'}/{name}"


@dataclass(frozen=True)
class GatewayPort:
    """A port of a managed host: its slot and its server. `state` None: its host was not asked or not reached."""

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
    hold: int | None = None
    """The seconds that a request may wait for a server, by hosts.yaml; None: it says nothing."""
    swap_seconds: float | None = None
    """The longest that a swap left it without a server; None: there was none."""
    smallest_context: int | None = None
    """The smallest context of the models that it has, or had lately; None: not known."""

    @property
    def name(self) -> str | None:
        """The name that the gateway must send; None for a port without an alias while it has no server."""
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
    """Return whether two `api_base`s have the same server, port and path, with or without /v1."""
    if one.rstrip("/") == other.rstrip("/"):
        return True
    first, second = address_of(one), address_of(other)
    if first is None or second is None or first[1] != second[1]:
        return False
    paths = {urlsplit(base).path.rstrip("/").removesuffix("/v1") for base in (one, other)}
    return len(paths) == 1 and same_host(first[0], second[0])


def address_of(api_base: str | None) -> tuple[str, int] | None:
    """Return host and port of an `api_base`; None if it has none."""
    try:
        parts = urlsplit(api_base or "")
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    except ValueError:
        return None
    return (parts.hostname, port) if parts.hostname and port else None


# -- what entries send and promise --------------------------------------------------------------------------------


def names_sent(entries: Iterable[Entry], address: str, same_host: SameHost = same_name) -> dict[int, tuple[str, ...]]:
    """Return, for each port of the host at `address`, the names that the gateway certainly sends there."""
    sent: dict[int, list[str]] = {}
    for entry in entries:
        target, name = entry.address, entry.certain_name
        if target is not None and name is not None and same_host(target[0], address):
            sent.setdefault(target[1], []).append(name)
    return {port: tuple(dict.fromkeys(names)) for port, names in sent.items()}


def tokens_promised(entries: Iterable[Entry], address: str, same_host: SameHost = same_name) -> dict[int, int]:
    """Return, for each port of the host at `address`, the most input tokens that an entry promises for it."""
    promised: dict[int, int] = {}
    for entry in entries:
        target, tokens = entry.address, entry.max_input_tokens
        if target is not None and tokens is not None and same_host(target[0], address):
            promised[target[1]] = max(tokens, promised.get(target[1], 0))
    return promised


def edit(entry: Entry, key: str, value: str, files: GatewayPaths) -> str:
    """Return, as a sentence, the change to the gateway's files that gives `litellm_params.key` this value."""
    variable = entry.variables.get(key)
    if variable and files.env:
        return f"in {files.env}: {variable}={value}; then restart the gateway, once"
    if variable:
        return f"in the gateway's environment: {variable}={value}; then restart the gateway, once"
    place, spelled = entry.places.get(key, (entry.place, key))
    return f"in {place}: {spelled}: {value}; then restart the gateway, once"


def url(address: str, port: int) -> str:
    return f"http://{f'[{address}]' if ':' in address else address}:{port}/v1"


# -- the comparison -----------------------------------------------------------------------------------------------


Route = tuple[Entry, GatewayPort | None]
"""An entry and the port that it leads to; None: no port of ours."""


def compare(
    entries: Sequence[Entry], ports: Sequence[GatewayPort], files: GatewayPaths, same_host: SameHost = same_name
) -> tuple[Mismatch, ...]:
    """Return every mismatch between the gateway's entries and the servers, faults first.

    `entries` have the names that clients use, and no patterns (`LiteLLMConfig.concrete`). `ports` are those of all
    managed hosts: an alias may be a slot of several hosts, and is then balanced between them.
    """
    routes = [(entry, port_of(entry, ports, same_host)) for entry in claims(entries, ports, same_host)]
    routes = [(entry, target) for entry, target in routes if target or any(p.alias == entry.alias for p in ports)]
    findings: list[Mismatch] = []
    for entry, target in routes:
        same_alias = [route for route in routes if route[0].alias == entry.alias]
        slots = [port for port in ports if port.alias == entry.alias]
        findings += _EntryCheck(entry, target, slots, same_alias, files).findings()
    findings += _group_findings(routes, files)
    findings += _pattern_findings(routes)
    # A finding already says that the destination of these is unknown.
    unknown = {entry.alias for entry, target in routes if target is None}
    for port in ports:
        leading = [entry for entry, target in routes if target == port]
        if leading or port.alias not in unknown:
            findings += _port_findings(port, leading)
    unique = list(dict.fromkeys(findings))
    return tuple(sorted(unique, key=lambda finding: finding.severity is not Impact.FAULT))


def claims(
    entries: Iterable[Entry], ports: Sequence[GatewayPort], same_host: SameHost = same_name
) -> tuple[Entry, ...]:
    """Remove entries that a pattern makes for the alias of a slot if they lead to another port than this slot's.

    They are not intended: a pattern `*` for one port also matches the aliases of all others.
    """

    def intended(entry: Entry) -> bool:
        if entry.pattern is None:
            return True
        target, address = port_of(entry, ports, same_host), entry.address
        if target is not None:
            return target.alias in (None, entry.alias, entry.sends)
        # It may be the slot's host by another address.
        return address is not None and any(port.alias == entry.alias and port.port == address[1] for port in ports)

    return tuple(entry for entry in entries if intended(entry))


def port_of(entry: Entry, ports: Sequence[GatewayPort], same_host: SameHost) -> GatewayPort | None:
    """Return the port that an entry leads to; None: none of these."""
    address = entry.address
    if address is None:
        return None
    return next((port for port in ports if port.port == address[1] and same_host(address[0], port.address)), None)


_DOTTED_IPV4 = re.compile(r"\d+(?:\.\d+){3}")
"""Four numbers. LiteLLM refuses shorter forms of an IPv4 address."""
_NUMERIC_HOST = re.compile(r"(?:0[xX][0-9a-fA-F]+|[\d.]+)")


@dataclass(frozen=True)
class _EntryCheck:
    """One entry, and what it is compared with."""

    entry: Entry
    target: GatewayPort | None
    """The port that it leads to."""
    slots: Sequence[GatewayPort]
    """The slots with its alias."""
    same_alias: Sequence[Route]
    """All entries of its alias."""
    files: GatewayPaths

    @property
    def slot(self) -> GatewayPort | None:
        """The port that the entry should lead to."""
        return self.target if self.target in self.slots or not self.slots else self.slots[0]

    @property
    def name(self) -> str:
        """The name that the entry should send."""
        return (self.slot.name if self.slot else None) or self.entry.alias

    def finding(self, code: str, message: str, hint: str, certain: bool = True) -> Mismatch:
        """Return a finding about the entry: a fault if it is certain."""
        entry, slot = self.entry, self.slot
        port, host = (slot.port, slot.host) if slot else (None, None)
        severity = Impact.FAULT if certain else Impact.WARNING
        return Mismatch(code, entry.alias, port, severity, f"{entry.alias}: {message}", hint, host)

    def edit(self, key: str, value: str) -> str:
        return edit(self.entry, key, value, self.files)

    def sure(self, *keys: str) -> bool:
        """Return whether the values of these fields are certain."""
        return not self.entry.unsure & set(keys)

    def findings(self) -> Iterator[Mismatch]:
        yield from self._entry_findings()
        if self.slot is not None:
            yield from self._address_findings(self.slot)
        if self.target is not None:
            yield from self._name_findings(self.target)

    def _entry_findings(self) -> Iterator[Mismatch]:
        """Yield what is wrong with the entry itself, independent of any server."""
        entry = self.entry
        if entry.out:
            team = entry.out.startswith("model_info.team_id")
            yield self.finding("entry_not_used", entry.out, f"correct it in {entry.place}", certain=not team)
        if entry.answers_itself:
            hint = f"remove mock_response in {entry.place}"
            yield self.finding("mock_response", "LiteLLM makes up the answers, and asks no server", hint, certain=False)
        for variable in entry.unset:
            message = f"the variable {variable} has no value in {self.files.env or 'the environment'}"
            yield self.finding(
                "unset_variable", message, self._edit_of_variable(variable), certain=bool(self.files.env)
            )
        if entry.model is not None and entry.sends is None:
            message = f"{shown(redact(entry.model))} is not sent to an OpenAI-compatible server"
            yield self.finding("not_openai", message, self.edit("model", entry.right_model(self.name)))
        elif not entry.has_key and "api_key" not in entry.variables:
            hint = self.edit("api_key", "none") + " (any placeholder will do)"
            message = f"has no api_key: LiteLLM answers 'Missing credentials'{entry.lost and f' ({entry.lost})'}"
            yield self.finding("missing_key", message, hint, self.sure("api_key"))

    def _edit_of_variable(self, variable: str) -> str:
        key = next((key for key, name in self.entry.variables.items() if name == variable), "")
        base = url(self.slot.address, self.slot.port) if self.slot else ""
        right = {"model": self.entry.right_model(self.name), "api_base": base, "api_key": PLACEHOLDER_KEY}
        return self.edit(key, right.get(key, "..."))

    def _address_findings(self, slot: GatewayPort) -> Iterator[Mismatch]:
        entry, target, base = self.entry, self.target, self.entry.api_base
        right = self.edit("api_base", url(slot.address, slot.port))
        if base is None:
            if entry.variables.get("api_base") not in entry.unset:
                message = f"has no api_base: LiteLLM would ask {entry.default_base}"
                yield self.finding("no_api_base", message, right, self.sure("api_base"))
            return
        if problem := _address_problem(base):
            yield self.finding(
                "bad_api_base", f"api_base {shown(redact(base))} {problem}", right, self.sure("api_base")
            )
            return
        if self.slots and target not in self.slots:
            served = any(other in self.slots for _, other in self.same_alias)
            message = f"is sent to {shown(redact(base))}; its slot is port {slot.port} of {slot.host}"
            hint = right
            if target is None:
                # Another address of the same server, such as a tunnel's or a container's, is right, too.
                message += ". Whether that address leads to the slot is not known here"
                hint = f"if it does not: {right}"
            certain = target is not None and not served and self.sure("api_base")
            yield self.finding("wrong_address", message, hint, certain)
        if target is not None and urlsplit(base).scheme.lower() == "https":
            message = f"api_base {shown(redact(base))} asks for TLS, and the servers speak plain HTTP"
            yield self.finding("bad_api_base", message, right)
        if entry.path != CHAT and entry.sends is not None:
            yield self._path_finding(slot, base, right)

    def _path_finding(self, slot: GatewayPort, base: str, right: str) -> Mismatch:
        """Return the finding for a path other than the one that every engine answers."""
        path, target = self.entry.path, self.target
        some_engines = path in SOME_ANSWER or path == f"/{CHAT}"
        answered = target is not None and path in target.paths
        certain = target is not None and not answered and (bool(target.paths) or not some_engines)
        problem = "not every engine answers" if some_engines and not certain else "the server does not answer"
        message = f"LiteLLM asks {shown(path)} of {shown(redact(base))}, which {problem}"
        certain = certain and self.sure("api_base")
        if path.endswith("/chat/completions"):
            return self.finding("no_v1", message, right, certain)
        hint = self.edit("model", f"openai/{slot.name or self.entry.alias}")
        return self.finding("not_chat", message, hint, certain)

    def _name_findings(self, target: GatewayPort) -> Iterator[Mismatch]:
        name, sends = target.name, self.entry.sends
        if name is not None and sends is not None and sends != name:
            right = self.edit("model", self.entry.right_model(name))
            message = f"the gateway sends the name {shown(sends)}; port {target.port} answers to {name}"
            if sends == DEFAULT_MODEL and (sends in target.also_answers_to or target.answers_to is None):
                message += ", and to this one only while an engine serves there that knows it"
                yield self.finding("engine_name", message, right, certain=False)
            elif target.answers_to_any or sends in (target.answers_to, *target.also_answers_to):
                message = f"the gateway sends the name {shown(sends)}, which the server on port {target.port} knows. "
                message += f"A model that mlxops loads there answers to {name}"
                yield self.finding("other_name", message, right, certain=False)
            else:
                yield self.finding("wrong_name", message, right, self.sure("model", "api_base"))
        context, promised = target.context_length, self.entry.max_input_tokens
        if context is not None and promised is not None and promised > context:
            message = f"the gateway promises {promised} input tokens; {target.model} takes {context}"
            hint = f"load a model with a longer context, or lower max_input_tokens in {self.files.config}"
            yield self.finding("context_too_small", message, hint, certain=False)


def _address_problem(base: str) -> str:
    """Return why LiteLLM cannot use this address; empty if it can."""
    try:
        parts = urlsplit(base)
        host = parts.hostname
    except ValueError:
        host = None
    if address_of(base) is None or host is None or parts.scheme not in {"http", "https"} or base != base.strip():
        return "is not a URL"
    if " " in parts.netloc or (_NUMERIC_HOST.fullmatch(host) and not _DOTTED_IPV4.fullmatch(host)):
        return "is not a URL with a host that LiteLLM takes"
    if parts.username is not None:
        return "has a user in it, which LiteLLM does not send together with a key"
    return "has a '?' in it, behind which LiteLLM puts the path" if parts.query else ""


def _group_findings(routes: Sequence[Route], files: GatewayPaths) -> Iterator[Mismatch]:
    """Yield what is wrong only with several entries together: LiteLLM balances an alias between all its entries."""
    by_port: dict[GatewayPort, list[str]] = {}
    by_alias: dict[str, dict[tuple[str, int], GatewayPort | None]] = {}
    for entry, target in routes:
        if target is not None and entry.pattern is None:
            by_port.setdefault(target, []).append(entry.alias)
        if entry.address is not None:
            by_alias.setdefault(entry.alias, {})[entry.address] = target
    for port, names in by_port.items():
        aliases = list(dict.fromkeys(names))
        if len(aliases) > 1:
            message = f"port {port.port} of {port.host} has several aliases: {', '.join(aliases)}"
            hint = (
                f"one port, one alias: keep {port.alias or aliases[0]}; a synonym is router_settings.model_group_alias"
            )
            yield Mismatch("two_aliases_one_port", port.alias, port.port, Impact.WARNING, message, hint, port.host)
    for alias, addresses in by_alias.items():
        targets = list(dict.fromkeys(addresses.values()))
        if len(targets) > 1 and not all(target is not None and target.alias == alias for target in targets):
            wrong = any(e.alias == alias and t is not None and e.sends not in _names_of(t) for e, t in routes)
            listed = ", ".join(f"{host}:{number}" for host, number in addresses)
            message = f"{alias} is sent to several ports, in turns: {listed}"
            hint = f"one alias, one port: remove the other entries of {alias} from {files.config}"
            severity = Impact.FAULT if wrong else Impact.WARNING
            yield Mismatch("one_alias_two_ports", alias, None, severity, message, hint)


def _names_of(port: GatewayPort) -> set[str | None]:
    return {port.name, port.answers_to, *port.also_answers_to}


def _pattern_findings(routes: Sequence[Route]) -> Iterator[Mismatch]:
    """Warn of patterns: they send every matching name to their port, whether the server knows it or not."""
    for entry, target in routes:
        if entry.pattern is not None and target is not None and entry.open_pattern:
            message = f"{entry.pattern} sends every name that it matches to port {target.port} of {target.host}"
            if entry.health_checked:
                message += ", and background_health_checks ask it for names that LiteLLM chooses"
            hint = f"some engines drop their model for an unknown name; in {entry.place} name the alias"
            yield Mismatch("pattern", target.alias, target.port, Impact.WARNING, message, hint, target.host)


_BROKEN_STATES = {State.FAILED, State.WEDGED, State.MISMATCH, State.ORPHAN}
_PASSING_STATES = {State.LOADING, State.DRAINING, State.UNKNOWN}
"""States that change by themselves, or may."""


def _port_findings(port: GatewayPort, entries: Sequence[Entry]) -> Iterator[Mismatch]:
    """Yield the mismatches between a port and the entries that lead to it."""
    if not entries:
        yield from _missing_entry_findings(port)
    elif port.state is not None:
        finding = _server_finding(port, entries)
        if finding is not None:
            yield finding


def _server_finding(port: GatewayPort, entries: Sequence[Entry]) -> Mismatch | None:
    """Return what is wrong with the server of a port that has entries; None if it is as it should be."""
    alias, place = port.alias or entries[0].alias, f"port {port.port} of {port.host}"

    def finding(severity: Impact, code: str, message: str, hint: str) -> Mismatch:
        return Mismatch(code, alias, port.port, severity, f"{alias}: {message}", hint, port.host)

    if port.state is State.FOREIGN:
        message = f"a process that is not ours answers on {place}: {port.detail}".rstrip(": ")
        return finding(Impact.FAULT, "foreign_server", message, "stop that process; mlxops never signals it")
    if port.state in _BROKEN_STATES:
        message = f"the server on {place} is {port.state}: {port.detail}".rstrip(": ")
        return finding(
            Impact.FAULT,
            "not_serving",
            message,
            f"see: `mlxctl status`; then `mlxctl load MODEL {port.port} --force`",
        )
    if port.state in _PASSING_STATES:
        return finding(
            Impact.WARNING,
            "not_ready",
            f"{place} is {port.state}",
            "run this again in a moment: `inv gateway`",
        )
    if not port.serves:
        severity = Impact.FAULT if port.assigned else Impact.WARNING
        message = f"{place} has no server{', although the registry assigns a model to it' if port.assigned else ''}"
        hint = f"`mlxctl load MODEL {port.port}`; until then the gateway answers with an error"
        return finding(severity, "alias_without_server", message, hint)
    if port.alias and port.answers_to and port.alias not in (port.answers_to, *port.also_answers_to):
        message = f"the server on {place} answers to {shown(redact(port.answers_to))}, not to {port.alias}"
        fails = any(entry.sends not in (port.answers_to, *port.also_answers_to) for entry in entries)
        model = port.model if port.owner is Owner.MLXOPS and port.model else "MODEL"
        hint = f"`mlxctl load {model} {port.port} --force`"
        if port.owner is Owner.BOOT:  # a load is refused there
            hint = f"let the boot job start it under the name {port.alias}"
        return finding(Impact.FAULT if fails else Impact.WARNING, "server_name", message, hint)
    return None


def _missing_entry_findings(port: GatewayPort) -> Iterator[Mismatch]:
    paste = "paste the entry that `inv gateway --print` shows, then restart the gateway, once"
    server = f"{port.model or 'a server'} on port {port.port} of {port.host}"

    def finding(severity: Impact, code: str, message: str, hint: str) -> Mismatch:
        return Mismatch(code, port.alias, port.port, severity, message, hint, port.host)

    if port.alias and port.serves:
        message = f"the gateway has no entry for {port.alias}: clients cannot reach {server} by it"
        yield finding(Impact.FAULT, "server_without_entry", message, paste)
    elif port.alias:
        message = f"the gateway has no entry for {port.alias}, port {port.port} of {port.host}"
        yield finding(Impact.WARNING, "slot_without_entry", message, paste)
    elif port.serves:
        message = f"{server} has no alias: the gateway does not know it"
        hint = "give the port an alias under slots in hosts.yaml"
        yield finding(Impact.WARNING, "server_without_alias", message, hint)


# -- what to paste ------------------------------------------------------------------------------------------------

PLACEHOLDER_KEY = "none"
MODEL_INFO: Mapping[str, object] = {"mode": "chat", "disable_background_health_check": True}
"""LiteLLM's background health checks send completions: they would keep a server busy, and delay its stop."""


def document_with_values(ports: Sequence[GatewayPort]) -> dict[str, object]:
    """Return the entries of all slots as a document for LiteLLM, with every value written out."""
    return _document((port, _values(port)) for port in ports if port.alias)


def document_with_variables(ports: Sequence[GatewayPort]) -> tuple[dict[str, object], dict[str, str]]:
    """Return the document with an environment variable in place of each value, and the variables' values."""
    slots = [port for port in ports if port.alias]
    environ: dict[str, str] = {}
    rows = []
    for port, prefix in zip(slots, _variable_prefixes(slots), strict=True):
        variables = {key: f"{prefix}_{key.upper()}" for key in _values(port)}
        environ |= {variables[key]: value for key, value in _values(port).items()}
        rows.append((port, {key: f"{ENVIRON}{name}" for key, name in variables.items()}))
    return _document(rows), environ


def _values(port: GatewayPort) -> dict[str, str]:
    return {"model": f"openai/{port.alias}", "api_base": url(port.address, port.port), "api_key": PLACEHOLDER_KEY}


def _document(rows: Iterable[tuple[GatewayPort, Mapping[str, str]]]) -> dict[str, object]:
    listed = [(port, dict(values)) for port, values in rows]
    promised = promised_contexts(port for port, _ in listed)
    model_list = [
        {"model_name": port.alias, "litellm_params": values, "model_info": _model_info(promised.get(port.alias or ""))}
        for port, values in listed
    ]
    return {"model_list": model_list}


def _model_info(tokens: int | None) -> dict[str, object]:
    return {**MODEL_INFO} if tokens is None else {**MODEL_INFO, "max_input_tokens": tokens}


def promised_contexts(ports: Iterable[GatewayPort]) -> dict[str, int]:
    """Return alias -> the input tokens that its entries promise: the smallest context, so that it is true after a
    swap."""
    promised: dict[str, int] = {}
    for port in ports:
        if port.alias and port.smallest_context is not None:
            promised[port.alias] = min(port.smallest_context, promised.get(port.alias, port.smallest_context))
    return promised


def _variable_prefixes(slots: Sequence[GatewayPort]) -> list[str]:
    """Return a prefix of variable names for each slot: its alias. If two are equal, add host and port; if they still
    are, as those of the hosts studio-1 and studio_1, also a number."""
    plain = [_variable_name(port.alias or "") for port in slots]
    longer = [
        name if plain.count(name) == 1 else _variable_name(f"{port.host}_{port.alias}_{port.port}")
        for name, port in zip(plain, slots, strict=True)
    ]
    return [name if longer.count(name) == 1 else f"{name}_{number}" for number, name in enumerate(longer, 1)]


def _variable_name(text: str) -> str:
    name = "".join(letter if letter.isalnum() else "_" for letter in text).upper()
    return name if name[:1].isalpha() else f"SLOT_{name}"
