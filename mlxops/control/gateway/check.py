"""What the gateway was told, held against the hosts: the check, the entries to paste, and what a load owes to both.

Nothing here writes a file of the gateway.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from mlxops.control.client import HostReply, HostTarget, reached_at
from mlxops.control.gateway import probe
from mlxops.control.gateway.config import GatewayConfig, key_of, read
from mlxops.control.hints import aimed
from mlxops.control.inventory import Gateway
from mlxops.control.output import Console
from mlxops.core import gateway as core
from mlxops.core import probe_names as asking
from mlxops.core import wire
from mlxops.core.commands.gateway import ServedPort, ServedPorts
from mlxops.core.commands.load import Loading, LoadResult
from mlxops.core.errors import MlxopsError, Refused, UsageError
from mlxops.core.frozen import dataclass
from mlxops.core.gateway import Entry, Finding, Port, Severity
from mlxops.core.litellm import Config, deployed
from mlxops.core.names import shown
from mlxops.core.ports import Owner, State
from mlxops.core.probe_names import Asking, GatewayServer

RESOLVE_SECONDS = 3.0
RECEIPT_SECONDS = 30.0
"""How long a load waits for its receipt: the gateway sets a server that just failed aside for five seconds."""


# -- hosts --------------------------------------------------------------------------------------------------------


def same_host(one: str, other: str) -> bool:
    """Whether two names lead to one machine: the same name, or an address in common."""
    return core.same_name(one, other) or bool(_addresses(one) & _addresses(other))


_ANY = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""A connection to the "any" address goes to this machine."""


@cache
def _addresses(name: str) -> frozenset[str]:
    """The addresses of a name, as far as they can be had in time."""
    found: set[str] = set()

    def ask() -> None:
        try:
            rows = socket.getaddrinfo(_ANY.get(name, name), None, type=socket.SOCK_STREAM)
            found.update(str(row[4][0]).removeprefix("::ffff:") for row in rows)
        except (OSError, UnicodeError):
            return

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(RESOLVE_SECONDS)
    return frozenset(found)


def slots(target: HostTarget) -> tuple[Port, ...]:
    """A host's ports as they should be. Raises `Unreachable` if SSH must be asked for its address and cannot."""
    settings = target.settings
    address = reached_at(target)
    return tuple(Port(target.name, address, port, settings.slots.get(port)) for port in settings.ports)


def seen(expected: Sequence[Port], answer: HostReply[ServedPorts]) -> tuple[Port, ...]:
    """The same ports as the host's agent saw them (its answer to `gateway`); as they were, if it was not reached."""
    by_port = {row.port: row for row in answer.result.ports} if answer.result else {}
    return tuple(_seen(port, by_port[port.port]) if port.port in by_port else port for port in expected)


def _seen(port: Port, row: ServedPort) -> Port:
    return Port(
        port.host,
        port.address,
        port.port,
        port.alias,
        state=State(row.state) if row.state in set(State) else State.UNKNOWN,
        owner=Owner(row.owner) if row.owner in set(Owner) else None,
        model=row.model,
        answers_to=row.answers_to,
        also_answers_to=row.also_answers_to,
        answers_to_any=row.answers_to_any,
        drops_for_others=row.drops_for_others,
        paths=frozenset(row.paths),
        not_asked=row.not_asked or "",
        context_length=row.context_length,
        assigned=row.assigned,
        detail=row.detail,
    )


# -- the check ----------------------------------------------------------------------------------------------------


def under(told: GatewayConfig, ports: Sequence[Port]) -> GatewayConfig:
    """Return it with its entries under the names that clients use: patterns become the aliases of these ports."""
    return replace(told, entries=_under(told.config, ports))


def _under(config: Config, ports: Sequence[Port]) -> tuple[Entry, ...]:
    names = [port.alias for port in ports if port.alias]
    return core.claims(config.concrete(names), ports, same_host)


Rows = Mapping[str, object]
"""`{"aliases": [...], "findings": [...]}`: what `gateway` found on a host."""


def check(
    told: GatewayConfig, targets: Sequence[HostTarget], answers: Sequence[HostReply[ServedPorts]]
) -> tuple[HostReply[Rows], ...]:
    """Each host's answer with its aliases and findings; one with a fault is refused. What concerns no single host
    stands with the first."""
    ports: dict[str, tuple[Port, ...]] = {}
    for target, answer in zip(targets, answers, strict=True):
        try:
            ports[target.name] = seen(slots(target), answer)
        except MlxopsError:
            ports[target.name] = ()
    every = [port for each in ports.values() for port in each]
    told = under(told, every)
    compared = core.compare(told.entries, every, told.files, same_host) if told.known else ()
    flags = {target.name: target.flags for target in targets}
    unreadable = [each for answer in answers for each in _registry_findings(answer)]
    findings = [
        replace(each, hint=aimed(each.hint, flags.get(each.host or "", "")))
        for each in (*told.findings, *compared, *unreadable)
    ]
    first = answers[0].host if answers else None
    return tuple(
        _checked(told, answer, ports[answer.host], [f for f in findings if (f.host or first) == answer.host])
        for answer in answers
    )


def _registry_findings(answer: HostReply[ServedPorts]) -> Iterator[Finding]:
    """Report a registry that cannot be read: the assignments of its host's ports are then not known."""
    error = answer.result.registry_error if answer.result else None
    if error is not None:
        message = f"{error.message}: {error.why}"
        yield Finding(error.code, None, None, Severity.WARNING, message, error.hint, answer.host)


def _checked(
    told: GatewayConfig, answer: HostReply[ServedPorts], ports: Sequence[Port], findings: Sequence[Finding]
) -> HostReply[Rows]:
    rows = [_row(told, port, findings) for port in ports if port.alias or port.serves or _leading_to(told, port)]
    result = {"aliases": rows, "findings": [each.to_wire() for each in findings]}
    return HostReply[Rows](
        answer.host, result, answer.error or fault(sum(f.severity is Severity.FAULT for f in findings))
    )


def fault(count: int) -> MlxopsError | None:
    """What makes the check fail, if anything does."""
    if not count:
        return None
    return Refused(
        "gateway_faults",
        f"{count} {'fault' if count == 1 else 'faults'} between the gateway and its servers",
        why="a request by such an alias fails, or is answered by something else",
        hint="each is named, with what to do",
    )


def _leading_to(told: GatewayConfig, port: Port) -> list[Entry]:
    return [
        e for e in told.entries if e.address and e.address[1] == port.port and same_host(e.address[0], port.address)
    ]


def _row(told: GatewayConfig, port: Port, findings: Sequence[Finding]) -> dict[str, object]:
    entries = _leading_to(told, port)
    about = [each for each in findings if each.port == port.port or (each.alias and each.alias == port.alias)]
    faults = [each.code for each in about if each.severity is Severity.FAULT]
    base = core.url(port.address, port.port)
    names = asking.names_for(told.entries, base, port.alias, same_host)
    return {
        "alias": next(iter(names), None),
        "names": names,
        "slot": port.alias,
        "port": port.port,
        "url": base,
        "sends": next((entry.sends for entry in entries), None),
        "state": port.state.value if port.state else None,
        "owner": port.owner.value if port.owner else None,
        "model": port.model,
        "answers_to": port.answers_to,
        "also_answers_to": list(port.also_answers_to),
        "answers_to_any": port.answers_to_any,
        "drops_for_others": port.drops_for_others,
        "not_asked": port.not_asked or None,
        "context_length": port.context_length,
        "verdict": ", ".join(dict.fromkeys(faults or [each.code for each in about])) or "ok",
    }


# -- what to paste ------------------------------------------------------------------------------------------------


def printed(targets: Sequence[HostTarget], *, env: bool) -> tuple[dict[str, object], dict[str, str]]:
    """The document to paste, and the variables that it refers to. Raises `Refused` (no_slots)."""
    ports = [port for target in targets for port in slots(target)]
    if not any(port.alias for port in ports):
        raise Refused(
            "no_slots",
            "there is nothing to print: no port has an alias",
            why="hosts.yaml gives the host no slots",
            hint="add them, for example: slots: {8100: jerry-xl}",
        )
    return core.printed_env(ports) if env else core.printed(ports)


def as_yaml(document: Mapping[str, object], environ: Mapping[str, str]) -> str:
    """YAML that is `model_list` alone; the lines for the env file are comments below it."""
    text = str(yaml.safe_dump(dict(document), sort_keys=False, default_flow_style=False, width=200)).rstrip("\n")
    if not environ:
        return text
    return "\n".join([text, "# For the gateway's env file:", *(f"# {name}={value}" for name, value in environ.items())])


# -- a load, seen from the gateway --------------------------------------------------------------------------------


def with_names(request: Loading, target: HostTarget, told: GatewayConfig | None) -> Loading:
    """Return the request with what the gateway sends to the host's ports, and promises of them."""
    return replace(request, **_said_of(target, told)) if told else request


def completed(
    reply: HostReply[LoadResult],
    gateway: Gateway,
    told: GatewayConfig | None,
    target: HostTarget,
    console: Console,
) -> HostReply[LoadResult]:
    """Return a load's reply with the receipt of the gateway: `result.gateway`.

    That is `{"asked": bool, "why": str | None, "aliases": [{"alias", "ok", "code", "seconds", "attempts", ...}]}`. A
    receipt that fails is a warning: the server was proven on its port, and the fault is on the gateway's side.
    """
    if told and reply.error is not None and reply.error.code == "gateway_name":
        _name_the_edit(reply.error, told, target)
    result = reply.result
    if result is None or result.state != "ready" or result.dry_run:
        return reply
    return replace(reply, result=replace(result, gateway=_receipt(gateway, told, target, result, console)))


def known_config(gateway: Gateway | None, target: HostTarget, console: Console) -> GatewayConfig | None:
    """What the gateway was told; None where that is not known here."""
    if gateway is None or gateway.config is None or not os.path.isfile(Path(gateway.config).expanduser()):
        return None
    try:
        told = read(gateway)
    except Refused as error:
        console.note(f"warning: {error.message}: {error.why}; the gateway's names are not checked")
        return None
    try:
        return under(told, slots(target))
    except MlxopsError:
        return told  # the load itself fails for the same reason, and reports it


def _said_of(target: HostTarget, told: GatewayConfig) -> dict[str, Any]:
    """What the agent is told of the gateway: by port, the names that it sends and the tokens that it promises."""
    try:
        address, ports = reached_at(target), target.settings.ports
    except MlxopsError:
        return {}  # the request itself meets the same, and tells it as its answer
    sent = core.names_sent(told.entries, address, same_host)
    promised = core.tokens_promised(told.entries, address, same_host)
    return {
        "sent": {str(port): tuple(names) for port, names in sent.items() if port in ports},
        "promised": {str(port): tokens for port, tokens in promised.items() if port in ports},
    }


def _name_the_edit(error: MlxopsError, told: GatewayConfig, target: HostTarget) -> None:
    name = str(error.details.get("answers_to"))
    wrong = (e for e in told.entries if e.address and e.address[1] == error.details.get("port") and e.sends != name)
    entry = next((e for e in wrong if e.address and same_host(e.address[0], reached_at(target))), None)
    if entry is not None:
        error.hint = core.edit(entry, "model", entry.right_model(name), told.files)


def _receipt(
    gateway: Gateway, told: GatewayConfig | None, target: HostTarget, result: LoadResult, console: Console
) -> dict[str, object]:
    """Ask through the gateway for each of its names that leads to the port and that the server knows."""
    port, base = result.port, str(result.url)
    key = key_of(gateway, told.environ if told is not None else {})
    why, receipt = None, None
    if gateway.url is None:
        why = "no url of the gateway is configured"
    elif gateway.key_env and not key:
        why = f"{gateway.key_env} is set neither here nor in the gateway's env file"
    elif port is not None:
        settings, slot = target.settings, str(result.alias)
        beside = asking.slots_beside(port, reached_at(target), settings.slots, settings.ports)
        server = asking.server_of(wire.encode(result), base, slot)
        receipt = _Running.of(gateway, told, key, (server, *beside)).ask(RECEIPT_SECONDS)
        if not receipt.asking.names:
            why = aimed(f"{receipt.running.nowhere(slot, port)}; see: inv gateway", target.flags)
        elif not receipt.passages:
            why = "; ".join(f"{alias}: {each}" for alias, each in receipt.asking.skipped.items())
    if receipt is None or not receipt.asking.names:
        if gateway.url is not None:
            console.note(f"gateway: not asked: {why}")
        return {"asked": False, "why": why, "aliases": [], "skipped": {}}
    see = aimed("see: inv gateway", target.flags)
    for alias, each in receipt.asking.skipped.items():
        console.note(f"warning: {alias} is not asked for through {gateway.url}: {each}; {see}")
    for passage in receipt.passages:
        if passage.ok:
            console.note(f"gateway: {passage.alias} answers through {gateway.url} ({passage.seconds:.1f} s)")
        else:
            help = aimed(receipt.advice(passage), target.flags)
            console.note(f"warning: no answer for {passage.alias} through {gateway.url}: {passage.detail}; {help}")
    return {
        "asked": bool(receipt.passages),
        "why": why,
        "aliases": [passage.to_wire() for passage in receipt.passages],
        "skipped": dict(receipt.asking.skipped),
    }


# -- through ------------------------------------------------------------------------------------------------------


_RESTART = "restart the gateway, once: it runs with other entries than its files have now"


@dataclass(frozen=True)
class _Asked:
    """The requests that were sent through the gateway, and their results."""

    running: _Running
    asking: Asking
    passages: tuple[probe.ProbeResult, ...]

    def advice(self, passage: probe.ProbeResult) -> str:
        return self.running.advice(passage)


@dataclass(frozen=True)
class _Running:
    """The running gateway. It may have been started with other files than there are now."""

    gateway: Gateway
    key: str | None
    files: tuple[Entry, ...] | None
    """The entries of its files; None: not known here."""
    entries: tuple[Entry, ...] | None
    """The entries that it reports; None: it reports none."""
    servers: tuple[GatewayServer, ...]

    @staticmethod
    def of(gateway: Gateway, told: GatewayConfig | None, key: str | None, servers: Sequence[GatewayServer]) -> _Running:
        ports = [each for server in servers if (each := _port_of(server)) is not None]
        files = under(told, ports).entries if told is not None and told.known else None
        running = probe.deployments(gateway.url or "", key)
        if running is None:
            return _Running(gateway, key, files, None, tuple(servers))
        written = told.config if told is not None else Config()
        entries = tuple(_entry_of(_with(each, written.defaults), written.entries) for each in running)
        config = replace(written, entries=entries, findings=())
        return _Running(gateway, key, files, _under(config, ports), tuple(servers))

    def ask(self, seconds: float) -> _Asked:
        entries = self.files if self.entries is None else self.entries
        plan = asking.to_ask(entries, self.servers, same_host)
        questions = [
            probe.Question(alias, plan.bases.get(alias, ()), plan.others.get(alias, ()))
            for alias in plan.names
            if alias not in plan.skipped
        ]
        passages = probe.ask_all(self.gateway.url or "", self.key, questions, seconds, same_host)
        return _Asked(self, plan, passages)

    def nowhere(self, slot: str, port: int) -> str:
        """Why no name leads to a port for certain."""
        entries = self.files if self.entries is None else self.entries
        same = (e for e in entries or () if e.alias == slot and e.address is not None and e.address[1] == port)
        if (entry := next(same, None)) is None:
            return f"the gateway has no entry that leads to port {port}"
        return f"whether {shown(entry.api_base or '')}, where {slot} is sent, is this port cannot be told from here"

    def stale(self, alias: str) -> bool:
        """Whether it treats a name otherwise than its files say: then a restart helps."""
        if self.entries is None or self.files is None:
            return False
        return asking.differ(self.files, self.entries, alias, same_host)

    def advice(self, passage: probe.ProbeResult) -> str:
        """Return what helps after a failed request."""
        if passage.code == "gateway_down":
            return "start the gateway, or correct `gateway.url` in hosts.yaml"
        if self.stale(passage.alias):
            return _RESTART
        words = passage.detail.lower()
        if passage.status == 429 or "budget" in words:
            return "the gateway limits it, or has set the server aside after failures; ask again in a minute"
        if passage.without_key:
            return f"give {passage.alias} an api_key (any placeholder will do), and restart the gateway, once"
        if passage.status in {401, 403} and "exception" in words:
            return "the server behind the gateway refuses the api_key of the entry"
        if passage.not_admitted:
            key = f"the key in {self.gateway.key_env}" if self.gateway.key_env else "a request without a key"
            return f"the gateway does not accept {key} for {passage.alias}; allow it, or name another: gateway.key_env"
        match passage.code:
            case "fallback":
                return "see: mlxctl status --probe; the gateway asks its own server again after a cool-down"
            case "other_deployment":
                return "the gateway asks its deployments in turn; ask again"
            case "other_server":
                return f"see what the running gateway has: GET {self.gateway.url}/v1/model/info"
        return "see: mlxctl status --probe, and the gateway's log"


def _port_of(server: GatewayServer) -> Port | None:
    at = core.address_of(server.url)
    return Port(at[0], at[0], at[1], server.slot) if at else None


def _with(deployment: probe.Deployment, defaults: Mapping[str, str]) -> probe.Deployment:
    """With `default_litellm_params`, which go before its own and are not in what the gateway tells of it."""
    return replace(
        deployment,
        model=defaults.get("model", deployment.model),
        api_base=defaults.get("api_base", deployment.api_base),
        provider=defaults.get("custom_llm_provider", deployment.provider),
    )


def _entry_of(deployment: probe.Deployment, files: Sequence[Entry]) -> Entry:
    """Return the entry of a deployment. The running gateway hides addresses from credentials and providers' defaults,
    so take those from its files."""
    entry = deployed(deployment.alias, deployment.model, deployment.api_base, deployment.provider)
    if entry.api_base is not None:
        return entry
    same = (each for each in files if (each.alias, each.model) == (entry.alias, entry.model))
    return next(same, entry)


def pass_through(
    gateway: Gateway, told: GatewayConfig, answers: Sequence[HostReply[Rows]]
) -> tuple[HostReply[Rows], ...]:
    """Ask for a completion under each name whose ready server knows what the gateway sends. A failure is a fault."""
    if gateway.url is None:
        raise UsageError(
            "no_gateway_url",
            "hosts.yaml does not say where the gateway is",
            why="--through asks the gateway that is running",
            hint="add `url: http://127.0.0.1:4000` under gateway",
        )
    key = key_of(gateway, told.environ)
    if gateway.key_env and not key:
        raise Refused(
            "no_gateway_key",
            f"there is no key for the gateway: {gateway.key_env} is not set",
            why="it is neither in the environment nor in the gateway's env file",
            hint=f"export {gateway.key_env}=..., for this command alone",
        )
    servers = [_server(row) for answer in answers for row in _rows(answer)]
    asked = _Running.of(gateway, told, key, servers).ask(probe.SECONDS)
    return tuple(_passed(answer, asked) for answer in answers)


def _rows(answer: HostReply[Rows]) -> list[dict[str, object]]:
    rows = (answer.result or {}).get("aliases")
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def _server(row: Mapping[str, object]) -> GatewayServer:
    slot = row.get("slot")
    return asking.server_of(row, str(row["url"]), slot if isinstance(slot, str) else None, idle=row["owner"] is None)


def _passed(answer: HostReply[Rows], asked: _Asked) -> HostReply[Rows]:
    rows, found = [], list(_findings(answer))
    for row in _rows(answer):
        here = [alias for alias, urls in asked.asking.names.items() if row["url"] in urls]
        passages = [each for each in asked.passages if each.alias in here]
        before = str(row.get("verdict"))
        worst = next((each for each in passages if not each.ok), next(iter(passages), None))
        skipped = {alias: why for alias, why in asked.asking.skipped.items() if alias in here}
        new = [_failed(each, answer.host, row, asked) for each in passages if not each.ok]
        new += [
            each for alias, why in skipped.items() if (each := _skipped(alias, why, answer.host, row, asked, found))
        ]
        rows.append(
            {
                **row,
                **_named(row, here, asked),
                "through": worst.to_wire() if worst else None,
                "passages": [each.to_wire() for each in passages],
                "skipped": skipped,
                "verdict": ", ".join([*([] if new and before == "ok" else [before]), *(each.code for each in new)]),
            }
        )
        found += [each.to_wire() for each in new]
    count = sum(each.get("severity") == Severity.FAULT.value for each in found)
    error = answer.error if answer.error and answer.error.code != "gateway_faults" else fault(count)
    return HostReply(answer.host, {"aliases": rows, "findings": found}, error)


def _named(row: Mapping[str, object], here: Sequence[str], asked: _Asked) -> dict[str, object]:
    """Return the names of a port for the table, if only the running gateway knows them."""
    names = [alias for alias in here if asking.STAR not in alias]
    return {"alias": names[0], "names": names} if names and asked.running.files is None else {}


def _findings(answer: HostReply[Rows]) -> list[dict[str, object]]:
    found = (answer.result or {}).get("findings")
    return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []


def _skipped(
    alias: str, why: str, host: str, row: Mapping[str, object], asked: _Asked, found: Sequence[Mapping[str, object]]
) -> Finding | None:
    """Return the finding for a skipped name; None if the check has reported the cause already."""
    named = [each for each in found if each.get("alias") == alias and each.get("severity") == Severity.FAULT.value]
    if asking.STAR in alias or any(each.get("code") in {"wrong_name", "server_name"} for each in named):
        return None
    stale = asked.running.stale(alias)
    severity = Severity.FAULT if stale else Severity.WARNING
    hint = _RESTART if stale else "see: inv gateway"
    message = f"{alias} is not asked for: {why}"
    return Finding("through_not_asked", alias, _number(row), severity, message, hint, host)


def _failed(passage: probe.ProbeResult, host: str, row: Mapping[str, object], asked: _Asked) -> Finding:
    message = f"{passage.alias}: no answer through {asked.running.gateway.url}: {passage.detail}"
    hint = asked.advice(passage)
    return Finding(f"through_{passage.code}", passage.alias, _number(row), Severity.FAULT, message, hint, host)


def _number(row: Mapping[str, object]) -> int | None:
    port = row.get("port")
    return port if isinstance(port, int) else None
