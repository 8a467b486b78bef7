"""Observe every port of the host once and determine its state. Changes nothing."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import socket
import threading
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mlxops.agent.engines import ENGINES
from mlxops.agent.host.system import Listener, ProcessTable, System, collides
from mlxops.agent.paths import HostPaths
from mlxops.agent.serving import processes, servers
from mlxops.agent.serving.servers import ServerProcess
from mlxops.agent.state.operation_log import OperationState, operation_state
from mlxops.agent.state.store import Store, format_utc
from mlxops.common import files
from mlxops.core.errors import Interrupted, MlxopsError
from mlxops.core.frozen import dataclass
from mlxops.core.port_drift import find_drift
from mlxops.core.ports import BootClaim, Health, JobState, Signals, Standing, World, judge
from mlxops.core.records import Run, Server, Stranded
from mlxops.core.registry import Registry
from mlxops.core.text import clean

if TYPE_CHECKING:
    from mlxops.agent.service.boot_jobs import BootJobs

PROBE_SECONDS = 2.0


def observe(
    paths: HostPaths,
    store: Store,
    registry: Registry,
    system: System,
    *,
    own: str | None = None,
    only: Iterable[int] | None = None,
    environ: Mapping[str, str] | None = None,
) -> World:
    """Observe all ports of the range and all assigned ports, in one pass.

    `own`: the operation that observes; its locks are ignored. `only` restricts the ports. `environ`: the environment
    for the service managers' programs; default: this process's.
    """
    assigned = {model.port for model in registry.models.values() if model.port is not None}
    ports = sorted(set(only) if only is not None else set(paths.settings.ports) | assigned)
    jobs = _boot_jobs(paths, system, os.environ if environ is None else environ)
    signals, states = _all_signals(paths, store, system, ports, own, jobs)
    health = _probe_health(paths, [each for each in signals if each.listening and (each.run or each.hand)])
    silent = {port for port, answer in health.items() if answer is Health.SILENT}
    signals, busy = _with_connected(system, signals, silent)
    views = {
        each.port: judge(
            replace(each, health=health.get(each.port, Health.NOT_ASKED), busy=each.port in busy), registry
        )
        for each in signals
    }
    stranded = _stranded(store, system) if only is None else None
    drift = find_drift(paths.settings.ports, views, registry, states)
    contexts = {name: each.context_length for name, each in registry.models.items() if each.context_length}
    return World(views, drift, states, stranded, contexts)


def _stranded(store: Store, system: System) -> Stranded | None:
    if not store.stranded_path.exists():
        return None
    from mlxops.agent.serving.stranded import still_missing

    return still_missing(store, system)


def _all_signals(
    paths: HostPaths, store: Store, system: System, ports: list[int], own: str | None, jobs: BootJobs | None
) -> tuple[list[Signals], tuple[JobState, ...]]:
    """Return the signals of the ports, and the state of their boot jobs.

    If the host or a port cannot be observed, the signals have an error: the port may be in use.
    """
    try:
        table, unsure = _with_unseen(system, system.process_table(frozenset(ports)), paths, ports)
        hand = _hand_started(paths, system, table, ports)
    except Interrupted:
        raise
    except MlxopsError as error:
        return [_unknown(paths, port, f"{error.message}: {error.why}") for port in ports], ()
    signals = []
    for port in ports:
        try:
            observed = _signals(paths, store, system, table, hand, port, own, jobs)
        except Interrupted:
            raise
        except MlxopsError as error:
            observed = _unknown(paths, port, f"{error.message}: {error.why}")
        except OSError as error:
            observed = _unknown(paths, port, f"{error.filename or 'its state'} cannot be read: {error.strerror}")
        signals.append(_unknown(paths, port, unsure[port]) if port in unsure else observed)
    return _with_boot_jobs(jobs, table, signals) if jobs else (signals, ())


def _boot_jobs(paths: HostPaths, system: System, environ: Mapping[str, str]) -> BootJobs | None:
    if not paths.settings.boot:
        return None
    from mlxops.agent.service.boot_jobs import BootJobs

    return BootJobs(paths.settings.boot, system, environ)


def _with_boot_jobs(
    jobs: BootJobs, table: ProcessTable, signals: list[Signals]
) -> tuple[list[Signals], tuple[JobState, ...]]:
    """Add a claim to each idle port that a running job is about to take, and return the state of the jobs.

    A job that already serves, on any port, takes no idle port. Service managers are asked only about the other jobs.
    """
    serving = {each.boot.job: each.boot for each in signals if each.boot}
    ports = {each.port for each in signals}
    states = tuple(
        JobState(job, Standing.ACTIVE, serving[job].how, serving[job].stop)
        if job in serving
        else jobs.state(table, job)
        for job in jobs.jobs
        if job.port in ports
    )
    coming = {
        state.job.port: BootClaim(state.job, state.detail, state.stop)
        for state in states
        if state.standing is Standing.ACTIVE and state.job not in serving
    }
    free = {each.port for each in signals if not (each.listening or each.hand or each.members or each.error)}
    return [
        replace(each, boot=coming[each.port]) if each.port in free & set(coming) else each for each in signals
    ], states


def _unknown(paths: HostPaths, port: int, why: str) -> Signals:
    return Signals(port, paths.settings.slots.get(port), error=why)


def _with_connected(system: System, signals: list[Signals], silent: set[int]) -> tuple[list[Signals], frozenset[int]]:
    """Find the silent servers with an open connection: they are busy, the others are wedged."""
    try:
        return signals, system.connected(silent) if silent else frozenset()
    except Interrupted:
        raise
    except MlxopsError as error:
        why = f"{error.message}: {error.why}"
        return [replace(each, error=why) if each.port in silent else each for each in signals], frozenset()


def _with_unseen(
    system: System, table: ProcessTable, paths: HostPaths, ports: Iterable[int]
) -> tuple[ProcessTable, Mapping[int, str]]:
    """Where other users' listeners are invisible, add those that accept a connect. Only a refused connect means that
    there is none. Also return the ports for which that could not be found out, with the reason."""
    if system.sees_all_listeners:
        return table, {}
    unseen, unsure = [], {}
    for port in ports:
        if table.on(paths.settings.bind, port):
            continue
        try:
            with socket.create_connection((paths.connect_host, port), 0.5):
                unseen.append(Listener(paths.connect_host, port))
        except ConnectionRefusedError:
            continue
        except OSError as error:
            unsure[port] = f"cannot find out whether anything listens: {error.strerror or error}"
    return replace(table, listeners=(*table.listeners, *unseen)), unsure


@dataclass(frozen=True)
class ByHand:
    """The servers of this user on one port."""

    listening: Server | None = None
    portless: tuple[Server, ...] = ()
    """Servers that were started for this port and listen nowhere."""

    @property
    def first(self) -> Server | None:
        return next(iter(filter(None, (self.listening, *self.portless))), None)

    def without(self, pids: Collection[int]) -> ByHand:
        listening = self.listening if self.listening and self.listening.pid not in pids else None
        return ByHand(listening, tuple(each for each in self.portless if each.pid not in pids))


def _hand_started(paths: HostPaths, system: System, table: ProcessTable, ports: Iterable[int]) -> Mapping[int, ByHand]:
    """Return this user's servers by port: the port on which they listen, else the port in their arguments."""
    found = (each for each in servers.find_servers(table) if each.process.uid == os.getuid())
    mine = [each for each in found if not processes.waits(system, each.process)]
    silent = [each for each in mine if not any(set(each.family) & listener.pids for listener in table.listeners)]
    by_port: dict[int, ByHand] = {}
    for port in ports:
        pids = {pid for each in table.on(paths.settings.bind, port) for pid in each.pids}
        owner = next((each for each in mine if pids and pids <= set(each.family)), None)
        intended = [each for each in silent if each.detected.port == port and _same_address(each.detected.host, paths)]
        portless = [each for each in intended if _listens_nowhere(system, each)]
        if owner or portless:
            by_port[port] = ByHand(
                _server(system, table, owner) if owner else None,
                tuple(_server(system, table, each) for each in portless),
            )
    return by_port


def _listens_nowhere(system: System, server: ServerProcess) -> bool:
    """Return whether a server listens on no port, observed or not; False if that cannot be seen."""
    return all(system.ports_of(pid) == frozenset() for pid in server.family)


def _server(system: System, table: ProcessTable, server: ServerProcess) -> Server:
    from mlxops.core.redaction import redact

    process = server.process
    path = real_path(system.folder(process.pid), server.detected.model)
    starter = servers.starter(table, process.pid)
    return Server(
        process.pid,
        process.pgid,
        server.engine,
        repo_of(path) or redact(server.detected.model),
        process.argv,
        process.start,
        path=path,
        wrappers=servers.wrappers(table, process.pid),
        starter=_describe(table, [starter.pid]) if starter else "",
    )


def real_path(folder: str | None, model: str) -> str:
    """Resolve a server's model argument from its working directory, through links; "" if it is no folder."""
    path = os.path.realpath(os.path.join(folder or "/", model))
    return path if model and os.path.isdir(path) else ""


def repo_of(path: str) -> str | None:
    """Return the repository of a snapshot path in a Hugging Face cache."""
    match = re.search(r"/models--([^/]+)--([^/]+)/snapshots/[^/]+$", path)
    return f"{match[1]}/{match[2]}" if match else None


def _same_address(host: str | None, paths: HostPaths) -> bool:
    try:
        address = str(ipaddress.ip_address(host or "0.0.0.0"))
    except ValueError:
        address = "127.0.0.1" if host == "localhost" else "0.0.0.0"
    return collides(address, paths.settings.bind)


def _signals(
    paths: HostPaths,
    store: Store,
    system: System,
    table: ProcessTable,
    hand: Mapping[int, ByHand],
    port: int,
    own: str | None,
    jobs: BootJobs | None,
) -> Signals:
    # Read the holder before and after the record: a load that ends in between must not look interrupted.
    holder = store.holder(f"port-{port}")
    run, broken = _run_record(store, port)
    holder = holder or store.holder(f"port-{port}")
    operation = None if holder is None or holder.id == own else holder
    state = operation_state(store.state / "ops", operation.id) if operation else OperationState()
    listeners = table.on(paths.settings.bind, port)
    pids = frozenset(pid for each in listeners for pid in each.pids)
    unowned = any(not each.pids and each.uid in (None, os.getuid()) for each in listeners)
    members = processes.members(system, table, run) if run else ()
    others = pids - set(members)
    by_hand = hand.get(port, ByHand())
    claim = _boot_claim(jobs, table, port, listeners, run, members, by_hand.first) if jobs else None
    if claim is None:
        by_hand = by_hand.without(members)
    portless = by_hand.portless
    server = by_hand.listening
    if not listeners and portless:
        server, portless = portless[0], portless[1:]
    return Signals(
        port=port,
        alias=paths.settings.slots.get(port),
        run=run,
        broken_record=broken,
        leader_proven=run is not None and processes.leader(system, table.processes, run) is not None,
        members=members,
        listening=bool(listeners),
        listener_pids=pids,
        unowned=unowned,
        hand=server,
        portless=portless,
        boot=claim,
        operation=operation,
        activity=str(state),
        progress=state.progress,
        other_listener=_describe(table, others) if listeners and (others or not pids) else "",
        memory_bytes=system.memory(members or _unrecorded(table, hand=server, claim=claim, listening=pids)) or None,
        last_words=_last_words(store.log_path(port)) if run is not None and not members else "",
        rebooted=run is not None and run.boot_id != system.boot_id(),
    )


def _unrecorded(
    table: ProcessTable, *, hand: Server | None, claim: BootClaim | None, listening: Collection[int]
) -> tuple[int, ...]:
    """Return the processes of a server that mlxops did not start."""
    if hand is not None:
        return servers.family(table, hand.pid)
    return tuple(listening) if claim else ()


def _run_record(store: Store, port: int) -> tuple[Run | None, bool]:
    """Return the record, and whether it is damaged. Raises `OSError` if it cannot be read."""
    try:
        return store.run(port), False
    except ValueError:
        return None, True


def _boot_claim(
    jobs: BootJobs,
    table: ProcessTable,
    port: int,
    listeners: tuple[Listener, ...],
    run: Run | None,
    members: tuple[int, ...],
    hand: Server | None,
) -> BootClaim | None:
    """Return the claim of a boot job to a port's server; None for a server that mlxops started."""
    pids = {pid for each in listeners for pid in each.pids} | ({hand.pid} if hand else set())
    if run is not None and not run.adopted and pids & set(members):
        return None
    # If this user's listener has no process, the process is just ending; it is not the boot job's.
    if listeners and not pids and all(each.uid != os.getuid() for each in listeners):
        return jobs.unseen(table, port)
    return jobs.claim(table, port, pids)


def _describe(table: ProcessTable, pids: Iterable[int]) -> str:
    from mlxops.core.redaction import command_line

    descriptions = [
        f"pid {pid}: {command_line(table.processes[pid].argv)[:160]}" for pid in sorted(pids) if pid in table.processes
    ]
    return "; ".join(descriptions) or "another user's process"


def _probe_health(paths: HostPaths, signals: list[Signals]) -> dict[int, Health]:
    """Probe all servers in parallel, so that hung servers delay this by no more than one probe's time limit."""
    health: dict[int, Health] = {}

    def probe(port: int, engine: str) -> None:
        health[port] = ENGINES[engine].health(paths.connect_host, port, PROBE_SECONDS)

    threads: dict[int, threading.Thread] = {}
    for each in signals:
        engine = each.run.engine if each.run and each.members else each.hand.engine if each.hand else None
        thread = threading.Thread(target=probe, args=(each.port, engine), daemon=True)
        # RuntimeError: the system allows no further thread.
        with contextlib.suppress(RuntimeError):
            if engine in ENGINES:
                thread.start()
                threads[each.port] = thread
    for thread in threads.values():
        thread.join(PROBE_SECONDS * 2)
    return {port: health.get(port, Health.SILENT) for port in threads}


def _last_words(log: Path) -> str:
    """Return when a server last wrote to its log, and what: the only evidence of how it ended."""
    from mlxops.agent.serving.last_words import last_line  # its patterns take 2 ms to compile
    from mlxops.core.redaction import redact

    line = redact(last_line(tail(log)))
    try:
        when = format_utc(log.stat().st_mtime)
    except OSError:
        return ""
    return f"last sign of life {when}" + (f": {line}" if line else "")


def tail(path: Path, size: int = 8192) -> str:
    """Return the end of a log without control characters; empty if there is none."""
    try:
        end = files.read_end(path, size).decode(errors="replace")
        return "\n".join(clean(line) for line in end.splitlines())
    except OSError:
        return ""
