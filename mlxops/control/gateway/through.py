"""`gateway --through`: probe each name through the running gateway, and say what helps after a failure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from functools import cached_property

from mlxops.control.gateway import probe
from mlxops.control.gateway.check import FAULTS_CODE, client_entries, faults_error, with_client_names
from mlxops.control.gateway.config import GatewayConfig, key_of
from mlxops.control.gateway.ports import same_host
from mlxops.control.gateway.probe import Deployment, ProbeResult, Question
from mlxops.control.gateway.result import AliasRow, GatewayResult, ProbedAliasRow
from mlxops.control.hints import aimed
from mlxops.control.inventory import Gateway
from mlxops.core import gateway as core
from mlxops.core.errors import Refused, UsageError
from mlxops.core.frozen import dataclass
from mlxops.core.gateway import Entry, GatewayPort, Impact, Mismatch
from mlxops.core.litellm import LiteLLMConfig, entry_of_deployment
from mlxops.core.names import shown
from mlxops.core.probe_names import WILDCARD, GatewayServer, ProbePlan, entries_differ, plan_probes, server_of
from mlxops.core.redaction import redact
from mlxops.core.replies import HostReply

_RESTART = "restart the gateway, once: it runs with other entries than its files have now"


@dataclass(frozen=True)
class RunningGateway:
    """The running gateway. It may have been started with other files than there are now."""

    gateway: Gateway
    key: str | None
    file_entries: tuple[Entry, ...] | None
    """The entries of its files; None: not known here."""
    reported_entries: tuple[Entry, ...] | None
    """The entries that it reports; None: it reports none."""
    servers: tuple[GatewayServer, ...]

    @property
    def entries(self) -> tuple[Entry, ...] | None:
        return self.file_entries if self.reported_entries is None else self.reported_entries

    @cached_property
    def plan(self) -> ProbePlan:
        """Which names lead to which servers, and which of them may be asked for."""
        return plan_probes(self.entries, self.servers, same_host)

    def probe_all(self, seconds: float) -> tuple[ProbeResult, ...]:
        """Probe every name that can be probed without harm, each for up to `seconds`."""
        questions = [
            Question(alias, self.plan.bases.get(alias, ()), self.plan.others.get(alias, ()))
            for alias in self.plan.names
            if alias not in self.plan.skipped
        ]
        return probe.probe_all(self.gateway.url or "", self.key, questions, seconds, same_host)

    def names_to(self, url: str) -> list[str]:
        """Return the names that lead to the server at this URL. Some may stand for many names (`WILDCARD`)."""
        return [name for name, urls in self.plan.names.items() if url in urls]

    def why_no_name(self, slot: str, port: int) -> str:
        """Return why it is not certain that a name leads to a port."""
        same = (e for e in self.entries or () if e.alias == slot and e.address is not None and e.address[1] == port)
        if (entry := next(same, None)) is None:
            return f"the gateway has no entry that leads to port {port}"
        base = shown(redact(entry.api_base or ""))
        return f"the gateway sends {slot} to {base}; whether that is port {port} is not known on this machine"

    def is_stale(self, alias: str) -> bool:
        """Return whether the gateway's files say something else about a name. Then a restart helps."""
        if self.reported_entries is None or self.file_entries is None:
            return False
        return entries_differ(self.file_entries, self.reported_entries, alias, same_host)

    def advice(self, result: ProbeResult) -> str:
        """Return what helps after a failed probe."""
        if result.code == "gateway_down":
            return "start the gateway, or correct `gateway.url` in hosts.yaml"
        if self.is_stale(result.alias):
            return _RESTART
        detail = result.detail.lower()
        if result.status == 429 or "budget" in detail:
            return "the gateway limits it, or has set the server aside after failures; run this again in a minute"
        if result.without_key:
            return f"give {result.alias} an api_key (any placeholder will do), and restart the gateway, once"
        if result.status in {401, 403} and "exception" in detail:
            return "the server behind the gateway refuses the api_key of the entry"
        if result.not_admitted:
            key = f"the key in {self.gateway.key_env}" if self.gateway.key_env else "a request without a key"
            return f"the gateway does not accept {key} for {result.alias}; allow it, or name another: gateway.key_env"
        match result.code:
            case "fallback":
                return "see: `mlxctl status --probe`; the gateway asks its own server again after a cool-down"
            case "other_deployment":
                return "the gateway asks its deployments in turn; run this again"
            case "other_server":
                return f"see what the running gateway has: GET {self.gateway.url}/v1/model/info"
        return "see: `mlxctl status --probe`, and the gateway's log"


def read_running(
    gateway: Gateway, config: GatewayConfig | None, key: str | None, servers: Sequence[GatewayServer]
) -> RunningGateway:
    """Ask the running gateway for its entries. `config`: its files, if they can be read here."""
    ports = [port for server in servers if (port := _port_of(server)) is not None]
    in_files = with_client_names(config, ports).entries if config is not None and config.known else None
    deployments = probe.deployments(gateway.url or "", key)
    if deployments is None:
        return RunningGateway(gateway, key, in_files, None, tuple(servers))
    written = config.config if config is not None else LiteLLMConfig()
    entries = tuple(_entry_of(_with_defaults(each, written.defaults), written.entries) for each in deployments)
    reported = client_entries(replace(written, entries=entries, findings=()), ports)
    return RunningGateway(gateway, key, in_files, reported, tuple(servers))


def _port_of(server: GatewayServer) -> GatewayPort | None:
    address = core.address_of(server.url)
    return GatewayPort(address[0], address[0], address[1], server.slot) if address else None


def _with_defaults(deployment: Deployment, defaults: Mapping[str, str]) -> Deployment:
    """Apply `default_litellm_params`. They override a deployment's own values, and the gateway does not report them."""
    return replace(
        deployment,
        model=defaults.get("model", deployment.model),
        api_base=defaults.get("api_base", deployment.api_base),
        provider=defaults.get("custom_llm_provider", deployment.provider),
    )


def _entry_of(deployment: Deployment, in_files: Sequence[Entry]) -> Entry:
    """Return the entry of a deployment.

    The running gateway does not report an address that comes from credentials or a provider's default. Take it from the
    gateway's files.
    """
    entry = entry_of_deployment(deployment.alias, deployment.model, deployment.api_base, deployment.provider)
    if entry.api_base is not None:
        return entry
    same = (written for written in in_files if (written.alias, written.model) == (entry.alias, entry.model))
    return next(same, entry)


# -- the result of `gateway --through` ----------------------------------------------------------------------------


def pass_through(
    gateway: Gateway, config: GatewayConfig, replies: Sequence[HostReply[GatewayResult]]
) -> tuple[HostReply[GatewayResult], ...]:
    """Probe each name whose ready server knows what the gateway sends. A failure is a fault.

    Raises what `required_key` raises.
    """
    key = required_key(gateway, config)
    rows = [row for reply in replies if reply.result for row in reply.result.aliases]
    servers = [server_of(row, row.url, row.slot, idle=row.owner is None) for row in rows]
    running = read_running(gateway, config, key, servers)
    results = running.probe_all(probe.ALIAS_SECONDS)
    return tuple(_with_probes(reply, running, results) for reply in replies)


def required_key(gateway: Gateway, config: GatewayConfig) -> str | None:
    """Return the key for the gateway; None if it needs none.

    Raises `UsageError` (no_gateway_url) and `Refused` (no_gateway_key).
    """
    if gateway.url is None:
        raise UsageError(
            "no_gateway_url",
            "hosts.yaml does not say where the gateway is",
            why="--through asks the running gateway",
            hint="add `url: http://127.0.0.1:4000` under gateway",
        )
    key = key_of(gateway, config.environ)
    if gateway.key_env and not key:
        raise Refused(
            "no_gateway_key",
            f"there is no key for the gateway: {gateway.key_env} is not set",
            why="it is neither in the environment nor in the gateway's env file",
            hint=f"export {gateway.key_env}=..., for this command alone",
        )
    return key


def _with_probes(
    reply: HostReply[GatewayResult], running: RunningGateway, probes: Sequence[ProbeResult]
) -> HostReply[GatewayResult]:
    result = reply.result or GatewayResult((), ())
    rows: list[AliasRow] = []
    findings = list(result.findings)
    for row in result.aliases:
        names = running.names_to(row.url)
        results = [each for each in probes if each.alias in names]
        skipped = {name: why for name, why in running.plan.skipped.items() if name in names}
        new = [*_failures(row, reply, running, results), *_not_asked(row, reply, running, skipped, findings)]
        rows.append(_probed_row(row, running, names, results, skipped, new))
        findings += new
    error = reply.error if reply.error and reply.error.code != FAULTS_CODE else faults_error(findings)
    return replace(reply, result=GatewayResult(tuple(rows), tuple(findings)), error=error)


def _probed_row(
    row: AliasRow,
    running: RunningGateway,
    names: Sequence[str],
    results: Sequence[ProbeResult],
    skipped: Mapping[str, str],
    new: Sequence[Mismatch],
) -> ProbedAliasRow:
    codes = [*([] if new and row.verdict == "ok" else [row.verdict]), *(finding.code for finding in new)]
    probed = ProbedAliasRow(
        **{each.name: getattr(row, each.name) for each in fields(AliasRow)},
        through=next((result for result in results if not result.ok), next(iter(results), None)),
        passages=tuple(results),
        skipped=skipped,
    )
    probed = replace(probed, verdict=", ".join(codes))
    plain = tuple(name for name in names if WILDCARD not in name)
    # Only the running gateway knows the names if its files cannot be read here.
    return replace(probed, alias=plain[0], names=plain) if plain and running.file_entries is None else probed


def _failures(
    row: AliasRow, reply: HostReply[GatewayResult], running: RunningGateway, results: Sequence[ProbeResult]
) -> Iterator[Mismatch]:
    for result in results:
        if not result.ok:
            message = f"{result.alias}: no answer through {running.gateway.url}: {result.detail}"
            hint = aimed(running.advice(result), reply.flags)
            yield Mismatch(f"through_{result.code}", result.alias, row.port, Impact.FAULT, message, hint, reply.host)


def _not_asked(
    row: AliasRow,
    reply: HostReply[GatewayResult],
    running: RunningGateway,
    skipped: Mapping[str, str],
    reported: Sequence[Mismatch],
) -> Iterator[Mismatch]:
    for name, why in skipped.items():
        if WILDCARD in name or _cause_reported(name, reported):
            continue
        stale = running.is_stale(name)
        severity, hint = (
            (Impact.FAULT, _RESTART) if stale else (Impact.WARNING, aimed("see: `inv gateway`", reply.flags))
        )
        message = f"{name} is not asked for: {why}"
        yield Mismatch("through_not_asked", name, row.port, severity, message, hint, reply.host)


def _cause_reported(name: str, reported: Sequence[Mismatch]) -> bool:
    """Return whether the check has already reported why a name is skipped."""
    codes = {finding.code for finding in reported if finding.alias == name and finding.severity is Impact.FAULT}
    return bool(codes & {"wrong_name", "server_name"})
