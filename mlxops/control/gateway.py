"""What the gateway was told, held against the hosts: the check, the entries to paste, and what a load owes to both.

Nothing here writes a file of the gateway.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import yaml

from mlxops.control import through
from mlxops.control.client import Answer, Target, reached_at
from mlxops.control.gatewayfiles import Told, key_of, read
from mlxops.control.hints import aimed
from mlxops.control.inventory import Gateway
from mlxops.control.render import Talk
from mlxops.core import gateway as core
from mlxops.core.errors import MlxopsError, Refused, UsageError
from mlxops.core.gateway import Entry, Finding, Port, Severity
from mlxops.core.world import Owner, State

RESOLVE_SECONDS = 3.0
RECEIPT_SECONDS = 30.0
"""How long a load waits for its receipt: the gateway sets a server that just failed aside for five seconds."""


# -- hosts --------------------------------------------------------------------------------------------------------


def same_host(one: str, other: str) -> bool:
    """Whether two names lead to one machine: the same name, or an address in common."""
    return core.same_name(one, other) or bool(_addresses(one) & _addresses(other))


@cache
def _addresses(name: str) -> frozenset[str]:
    """The addresses of a name, as far as they can be had in time."""
    found: set[str] = set()

    def ask() -> None:
        try:
            found.update(str(row[4][0]) for row in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError):
            return

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(RESOLVE_SECONDS)
    return frozenset(found)


def slots(target: Target) -> tuple[Port, ...]:
    """A host's ports as they should be. Raises `Unreachable` if SSH must be asked for its address and cannot."""
    settings = target.settings
    address = reached_at(target)
    return tuple(Port(target.name, address, port, settings.slots.get(port)) for port in settings.ports)


def seen(expected: Sequence[Port], answer: Answer) -> tuple[Port, ...]:
    """The same ports as the host's agent saw them (its answer to `gateway`); as they were, if it was not reached."""
    rows = answer.result.get("ports") if answer.result else None
    by_port = {row.get("port"): row for row in rows if isinstance(row, dict)} if isinstance(rows, list) else {}
    return tuple(_seen(port, by_port[port.port]) if port.port in by_port else port for port in expected)


def _seen(port: Port, row: Mapping[str, object]) -> Port:
    def text(key: str) -> str | None:
        value = row.get(key)
        return value if isinstance(value, str) else None

    owner, state, context = text("owner"), text("state"), row.get("context_length")
    return Port(
        port.host,
        port.address,
        port.port,
        port.alias,
        state=State(state) if state in set(State) else State.UNKNOWN,
        owner=Owner(owner) if owner in set(Owner) else None,
        model=text("model"),
        answers_to=text("answers_to"),
        context_length=context if isinstance(context, int) else None,
        assigned=row.get("assigned") is True,
        detail=text("detail") or "",
    )


# -- the check ----------------------------------------------------------------------------------------------------


def check(told: Told, targets: Sequence[Target], answers: Sequence[Answer]) -> tuple[Answer, ...]:
    """Each host's answer with its aliases and findings; one with a fault is refused. What concerns no single host
    stands with the first."""
    ports: dict[str, tuple[Port, ...]] = {}
    for target, answer in zip(targets, answers, strict=True):
        try:
            ports[target.name] = seen(slots(target), answer)
        except MlxopsError:
            ports[target.name] = ()
    every = [port for each in ports.values() for port in each]
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


def _registry_findings(answer: Answer) -> Iterator[Finding]:
    """That a host's registry cannot be read: then nobody knows what is assigned to its ports."""
    error = (answer.result or {}).get("registry_error")
    if isinstance(error, Mapping):
        message = f"{error.get('message')}: {error.get('why')}"
        code = str(error.get("code"))
        yield Finding(code, None, None, Severity.WARNING, message, str(error.get("hint")), answer.host)


def _checked(told: Told, answer: Answer, ports: Sequence[Port], findings: Sequence[Finding]) -> Answer:
    rows = [_row(told, port, findings) for port in ports if port.alias or port.serves or _leading_to(told, port)]
    result = {"aliases": rows, "findings": [each.to_wire() for each in findings]}
    return Answer(answer.host, result, answer.error or fault(sum(f.severity is Severity.FAULT for f in findings)))


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


def _leading_to(told: Told, port: Port) -> list[Entry]:
    return [
        e for e in told.entries if e.address and e.address[1] == port.port and same_host(e.address[0], port.address)
    ]


def _row(told: Told, port: Port, findings: Sequence[Finding]) -> dict[str, object]:
    entries = _leading_to(told, port)
    about = [each for each in findings if each.port == port.port or (each.alias and each.alias == port.alias)]
    faults = [each.code for each in about if each.severity is Severity.FAULT]
    return {
        "alias": port.alias or next((entry.alias for entry in entries), None),
        "port": port.port,
        "url": core.url(port.address, port.port),
        "sends": next((entry.sends for entry in entries), None),
        "state": port.state.value if port.state else None,
        "owner": port.owner.value if port.owner else None,
        "model": port.model,
        "answers_to": port.answers_to,
        "context_length": port.context_length,
        "verdict": ", ".join(dict.fromkeys(faults or [each.code for each in about])) or "ok",
    }


# -- what to paste ------------------------------------------------------------------------------------------------


def printed(targets: Sequence[Target], *, env: bool) -> tuple[dict[str, object], dict[str, str]]:
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


Send = Callable[[Mapping[str, object]], Answer]
"""Sends a request with these arguments."""


def load(gateway: Gateway | None, target: Target, args: Mapping[str, object], talk: Talk, send: Send) -> Answer:
    """A load that the gateway's names are checked against, and that ends with the receipt: `result.gateway`.

    That is `{"asked": bool, "why": str | None, "aliases": [{"alias", "ok", "code", "seconds", "attempts", ...}]}`. A
    receipt that fails is a warning: the server was proven on its port, and it is the gateway's side that is to be
    looked at. A configuration that cannot be read is one too: it must not keep anybody from serving.
    """
    told = _told(gateway, talk)
    answer = send({**args, **_said_of(target, told)} if told else args)
    if told and answer.error is not None and answer.error.code == "gateway_name":
        _name_the_edit(answer.error, told, target)
    result = answer.result
    if gateway is None or result is None or result.get("state") != "ready" or result.get("dry_run"):
        return answer
    return replace(answer, result={**result, "gateway": _receipt(gateway, told, target, result, talk)})


def _told(gateway: Gateway | None, talk: Talk) -> Told | None:
    """What the gateway was told; None where that is not known here."""
    if gateway is None or gateway.config is None or not Path(gateway.config).expanduser().is_file():
        return None
    try:
        return read(gateway)
    except Refused as error:
        talk.note(f"warning: {error.message}: {error.why}; the gateway's names are not checked")
        return None


def _said_of(target: Target, told: Told) -> dict[str, object]:
    """What the agent is told of the gateway: by port, the names that it sends and the tokens that it promises."""
    try:
        address, ports = reached_at(target), target.settings.ports
    except MlxopsError:
        return {}  # the request itself meets the same, and tells it as its answer
    sent = core.names_sent(told.entries, address, same_host)
    promised = core.tokens_promised(told.entries, address, same_host)
    return {
        "sent": {str(port): list(names) for port, names in sent.items() if port in ports},
        "promised": {str(port): tokens for port, tokens in promised.items() if port in ports},
    }


def _name_the_edit(error: MlxopsError, told: Told, target: Target) -> None:
    name = str(error.details.get("answers_to"))
    wrong = (e for e in told.entries if e.address and e.address[1] == error.details.get("port") and e.sends != name)
    entry = next((e for e in wrong if e.address and same_host(e.address[0], reached_at(target))), None)
    if entry is not None:
        error.hint = core.edit(entry, "model", f"openai/{name}", told.files)


def _receipt(
    gateway: Gateway, told: Told | None, target: Target, result: Mapping[str, object], talk: Talk
) -> dict[str, object]:
    """A completion through the gateway for each of its aliases that leads to the port."""
    port, served = result.get("port"), str(result.get("alias"))
    aliases: tuple[str, ...] = (served,)
    if told is not None and isinstance(port, int):
        aliases = core.aliases_for(told.entries, reached_at(target), port, same_host)
    environ = told.environ if told is not None else {}
    key = key_of(gateway, environ)
    why = None
    if gateway.url is None:
        why = "no url of the gateway is configured"
    elif gateway.key_env and not key:
        why = f"{gateway.key_env} is set neither here nor in the gateway's env file"
    elif not aliases:
        why = aimed(f"the gateway has no entry that leads to port {port}; see: inv gateway", target.flags)
    if why is not None or gateway.url is None:
        if gateway.url is not None:
            talk.note(f"gateway: not asked: {why}")
        return {"asked": False, "why": why, "aliases": []}
    passages = through.ask_all(
        gateway.url, key, [(alias, str(result.get("url"))) for alias in aliases], RECEIPT_SECONDS
    )
    for passage in passages:
        if passage.ok:
            talk.note(f"gateway: {passage.alias} answers through {gateway.url} ({passage.seconds:.1f} s)")
        else:
            see = aimed("see: inv gateway", target.flags)
            talk.note(f"warning: no answer for {passage.alias} through {gateway.url}: {passage.detail}; {see}")
    return {"asked": True, "why": None, "aliases": [passage.to_wire() for passage in passages]}


# -- through ------------------------------------------------------------------------------------------------------


def pass_through(gateway: Gateway, told: Told, answers: Sequence[Answer]) -> tuple[Answer, ...]:
    """One completion for each alias behind which a server is ready; what fails becomes a fault."""
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
    rows = [row for answer in answers for row in _rows(answer) if row.get("state") == State.READY.value]
    asked = [(str(row["alias"]), str(row["url"])) for row in rows if row.get("alias")]
    # An alias of two hosts is one alias of the gateway, and either of them may answer.
    urls = {alias: {url for each, url in asked if each == alias} for alias, _ in asked}
    wanted = [(alias, next(iter(each)) if len(each) == 1 else None) for alias, each in urls.items()]
    passages = {each.alias: each for each in through.ask_all(gateway.url, key, wanted)}
    return tuple(_passed(answer, passages, gateway.url) for answer in answers)


def _rows(answer: Answer) -> list[dict[str, object]]:
    rows = (answer.result or {}).get("aliases")
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def _passed(answer: Answer, passages: Mapping[str, through.Passage], url: str) -> Answer:
    rows, failed = [], []
    for row in _rows(answer):
        passage = passages.get(str(row.get("alias"))) if row.get("state") == State.READY.value else None
        rows.append({**row, "through": passage.to_wire() if passage else None})
        if passage is not None and not passage.ok:
            failed.append(_failed(passage, answer.host, row.get("port"), url))
            before = rows[-1]["verdict"]
            rows[-1]["verdict"] = failed[-1].code if before == "ok" else f"{before}, {failed[-1].code}"
    found = (answer.result or {}).get("findings")
    findings = [*(found if isinstance(found, list) else []), *(each.to_wire() for each in failed)]
    count = sum(each.get("severity") == Severity.FAULT.value for each in findings if isinstance(each, dict))
    error = answer.error if answer.error and answer.error.code != "gateway_faults" else fault(count)
    return replace(answer, result={"aliases": rows, "findings": findings}, error=error)


def _failed(passage: through.Passage, host: str, port: object, url: str) -> Finding:
    hint = {
        "gateway_down": "start the gateway, or correct `gateway.url` in hosts.yaml",
        "other_server": "restart the gateway, once: it reads its files only when it starts",
    }.get(
        passage.code, "if the entry above is right, restart the gateway, once: it reads its files only when it starts"
    )
    message = f"{passage.alias}: no answer through {url}: {passage.detail}"
    number = port if isinstance(port, int) else None
    return Finding(f"through_{passage.code}", passage.alias, number, Severity.FAULT, message, hint, host)
