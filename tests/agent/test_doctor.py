"""The checks of `doctor` on a host: each on a host that is healthy but for one thing."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from mlxops.agent.context import Context
from mlxops.agent.host.memory import HostMemory
from mlxops.agent.host.system import LinuxSystem, this_system
from mlxops.agent.operations import doctor, status
from mlxops.agent.paths import host_paths
from mlxops.agent.service import restore_job
from mlxops.agent.service.restore_job import Launchd
from mlxops.agent.serving.memory import in_use
from mlxops.agent.state.store import Lock, Store
from mlxops.common.parallel import reason, within
from mlxops.core import planner
from mlxops.core.commands.doctor import Doctor
from mlxops.core.commands.status import Status
from mlxops.core.doctor.findings import Finding, FindingCode
from mlxops.core.errors import Refused
from mlxops.core.records import Operation, Stranded
from mlxops.core.settings import PortRange, Settings
from tests.lab import macos
from tests.lab import models as tiny
from tests.lab.run import running
from tests.lab.world import free_ports, wait_until

GB = 10**9
SECRET = "s3cr3t-Value"

Change = Callable[[Path], Mapping[str, object] | None]
"""Break the host in this folder; return settings that are different, if any."""


pytestmark = pytest.mark.xdist_group("doctor")  # both modules count the servers of the whole machine
OF_THIS_MACHINE = {"not_agreed", "memory_pressure", "swap_used", "unbounded_servers", "limits_over_budget"}
"""Servers of other tests, which run at the same time, count too."""


def host(folder: Path, **changes: object) -> Context:
    """A host with an empty registry and an engine of known version."""
    site = folder / "engine" / "lib" / "python3.11" / "site-packages"
    (site / "mlx_lm-0.32.2.dist-info").mkdir(parents=True, exist_ok=True)
    engine = program(folder / "engine" / "bin" / "mlx_lm.server")
    (folder / "hub").mkdir(exist_ok=True)
    ports = free_ports(["127.0.0.1"], 2)
    plain = Settings(
        hub=str(folder / "hub"),
        state=str(folder / "state"),
        engine="mlx-lm",
        launch={"mlx-lm": (str(engine),)},
        ports=PortRange(ports[0], ports[1]),
    )
    settings = replace(plain, **changes)  # type: ignore[arg-type]  # fields of Settings
    own = {"HOME": str(folder), "PATH": str(folder / "bin")}
    paths = host_paths(settings, own)
    return Context(Doctor(), paths, Store(paths.state, paths.registry), this_system(), lambda event: None, own)


def program(path: Path, script: str = "exit 0") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def found(ctx: Context) -> dict[str, str]:
    """The codes of the findings, with their levels, without what this machine itself may have."""
    rows = doctor.run(ctx, Doctor()).findings
    return {row.code: row.severity for row in rows if row.code not in OF_THIS_MACHINE}


def registry(folder: Path, text: str) -> None:
    (folder / "hub").mkdir(exist_ok=True)
    (folder / "hub" / "registry.json").write_text(text)


def write(folder: Path, name: str, text: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)


def models(**entry: object) -> str:
    plain = {"repo_id": "org/m", "model_id": "org/m", "cache_path": None, "format": "mlx", "port": None}
    return json.dumps({"version": 1, "models": {"m": plain | entry}})


BROKEN: Mapping[str, tuple[Change, dict[str, str]]] = {
    "nothing": (lambda folder: None, {}),
    "hub on a disk that is gone": (
        lambda folder: {"hub": "/mnt/no-such-disk/hub"},
        {"hub_missing": "error", "registry_unusable": "error"},
    ),
    "hub is a dangling link": (
        lambda folder: {"hub": str(_link(folder / "linked", folder / "gone"))},
        {"hub_missing": "error", "registry_unusable": "error"},
    ),
    "registry cut off": (lambda folder: registry(folder, '{"version": 1, "mod'), {"registry_unusable": "error"}),
    "host.json cut off": (
        lambda folder: write(folder, "state/host.json", "{"),
        {"agreement_unusable": "error", "state_open": "warning"},
    ),
    "state is a file": (
        lambda folder: write(folder, "state", "not a folder"),
        {"state_unwritable": "error", "agreement_unusable": "error", "drift": "warning"},
    ),
    "state open to others": (lambda folder: (folder / "state").mkdir(mode=0o755), {"state_open": "warning"}),
    "engine is gone": (lambda folder: {"launch": {"mlx-lm": ("/gone/mlx_lm.server",)}}, {"engine_missing": "error"}),
    "unknown engine in the registry": (
        lambda folder: registry(folder, models(engine="vllm")),
        {"engine_missing": "error"},
    ),
    "engine without a version": (
        lambda folder: {"launch": {"mlx-lm": (str(program(folder / "x" / "mlx_lm.server")),)}},
        {"engine_version_unknown": "info"},
    ),
    "FAST_SYNCH": (lambda folder: {"env": {"MLX_METAL_FAST_SYNCH": "1"}}, {"metal_fast_synch": "warning"}),
    "FAST_SYNCH, switched off": (lambda folder: {"env": {"MLX_METAL_FAST_SYNCH": "0"}}, {}),
    "bind": (lambda folder: {"bind": "0.0.0.0"}, {"bind_open": "info"}),
    "bind, accepted": (lambda folder: {"bind": "0.0.0.0", "exposure": "accepted"}, {}),
    "budget above RAM": (lambda folder: {"memory": 10**15}, {"budget_high": "info"}),
    "pmset fails": (lambda folder: _as_none(program(folder / "bin" / "pmset", "exit 9")), {"not_checked": "unknown"}),
}


def _link(path: Path, target: Path) -> Path:
    path.symlink_to(target)
    return path


def _as_none(path: Path) -> None:
    """The value of a change that changes no setting."""


@pytest.mark.parametrize("case", BROKEN)
def test_one_fault_is_one_finding(case: str, tmp_path: Path) -> None:
    change, wanted = BROKEN[case]
    changes = change(tmp_path)
    assert found(host(tmp_path, **(changes or {}))) == wanted


class Raised(LinuxSystem):
    """A Mac of 128 GB whose administrator raised the GPU's limit, as far as memory goes."""

    def host_memory(self) -> HostMemory:
        return HostMemory(128 * 1024**3, gpu_limit=120_000 * 1024**2, gpu_limit_set=True)


def test_raised_wired_limit_is_found(tmp_path: Path) -> None:
    assert found(replace(host(tmp_path), system=Raised())) == {"wired_limit_high": "warning"}


def test_stranded_memory_is_found_once(tmp_path: Path) -> None:
    ctx = host(tmp_path)
    ctx.store.create_folders()
    ctx.store.save_stranded(Stranded(ctx.system.boot_id(), 100 * GB, -(10**15), 8101, "big", "2026-01-02T03:04:05Z"))
    (row,) = [row for row in doctor.run(ctx, Doctor()).findings if "100 GB" in row.message]
    assert (row.code, row.severity) == ("memory_stranded", "error")
    assert row.message.startswith("100 GB of memory did not return; big on 8101 was stopped last")
    assert row.hint.startswith("only a reboot returns it") and row.commands == (("mlxctl", "list", "--memory"),)


@contextmanager
def engine(ctx: Context, port: int, *options: str, model: str = "m", **environ: str) -> Iterator[None]:
    """Run a program that looks like the engine and listens on a port."""
    path = Path(ctx.paths.settings.launch["mlx-lm"][0])
    path.write_text(f"#!{sys.executable}\n{LISTENER}")
    with running([str(path), "--model", model, "--port", str(port), *options], path.parent, environ):
        wait_until(
            lambda: any(each.port == port for each in ctx.system.process_table((port,)).listeners), 10, "the listener"
        )
        yield


LISTENER = """\
import socket, sys, time
server = socket.create_server(("127.0.0.1", int(sys.argv[4])))
time.sleep(600)
"""


def test_servers_that_both_grow_without_a_bound_are_found(tmp_path: Path) -> None:
    ctx = host(tmp_path)
    first, second = ctx.paths.settings.ports
    with engine(ctx, first), engine(ctx, second):
        (row,) = [row for row in doctor.run(ctx, Doctor()).findings if row.code == "unbounded_servers"]
    assert row.severity == "warning"
    # Servers of other tests may be named first. It names five.
    named = [f"m on {port}" in row.message for port in (first, second)]
    assert all(named) or " more have no limit" in row.message, row.message


def test_limits_beyond_the_budget_are_found(tmp_path: Path) -> None:
    snapshot = tiny.install_snapshot(tmp_path, "org/m", tiny.tiny_models() / tiny.QWEN)
    ctx = host(tmp_path, memory=10_000 * GB)
    port = ctx.paths.settings.ports.first
    with engine(ctx, port, "--prompt-cache-bytes", str(20_000 * GB), model=str(snapshot)):
        codes = {row.code: row.severity for row in doctor.run(ctx, Doctor()).findings}
    assert codes["limits_over_budget"] == "warning" and "overcommitted" not in codes


def test_server_with_fast_synch_is_found_once(tmp_path: Path) -> None:
    ctx = host(tmp_path)
    port = ctx.paths.settings.ports.first
    with engine(ctx, port, MLX_METAL_FAST_SYNCH="1"):
        rows = [row for row in doctor.run(ctx, Doctor()).findings if "FAST_SYNCH" in row.message]
    assert [(row.code, row.severity, row.port) for row in rows] == [("metal_fast_synch", "warning", port)]
    assert rows[0].message.startswith("MLX_METAL_FAST_SYNCH is set in its environment: it can wedge the GPU")


def test_secrets_of_servers_that_others_started_are_shown_nowhere(tmp_path: Path) -> None:
    ctx = host(tmp_path)
    first, second = ctx.paths.settings.ports
    secrets = ("--api-key", f"{SECRET}-1", "--header", f"Authorization: Bearer {SECRET}-2", f"HF_TOKEN={SECRET}-3")
    write(tmp_path, "x.py", LISTENER.replace("argv[4]", "argv[1]"))
    stranger = [sys.executable, "x.py", str(second), *secrets]
    with running(stranger, tmp_path, {}), engine(ctx, first, *secrets, model=f"http://me:{SECRET}-4@host/m"):
        wait_until(
            lambda: any(each.port == second for each in ctx.system.process_table((second,)).listeners), 10, "listener"
        )
        state = status.run(ctx, Status())
        assert {row.owner for row in state.ports} == {"hand", "foreign"}, state
        world, refusals = ctx.observe(ctx.registry()), []
        for port in (first, second):
            with pytest.raises(Refused) as refused:
                planner.plan_unload(ctx.registry(), world, port, force=False)
            refusals.append(refused.value.to_wire())
        text = repr((state, doctor.run(ctx, Doctor()), refusals, in_use(world, ctx.system, {})))
    assert text.count("--api-key ...") >= 3 and "http://...@host/m" in text
    assert SECRET not in text


def test_checks_that_fail_or_hang_do_not_keep_the_others_from_being_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    never = threading.Event()

    def hang(ctx: Context) -> Iterator[Finding]:
        yield Finding.of(FindingCode.EXPOSED, "it answers")
        never.wait(30)

    def fail(ctx: Context) -> Iterator[Finding]:
        yield Finding.of(FindingCode.SLEEPS, "it sleeps")
        raise Refused("not_seen", "the processes could not be read", why="no memory", hint="`mlxctl status`")

    monkeypatch.setattr(doctor, "CHECK_SECONDS", 1.0)
    monkeypatch.setattr(doctor, "CHECKS", {"hanging": hang, "failing": fail, "files": doctor.CHECKS["files"]})
    started = time.monotonic()
    rows = doctor.run(host(tmp_path, hub="/mnt/no-such-disk/hub"), Doctor()).findings
    never.set()
    assert time.monotonic() - started < 10
    assert [(row.code, row.severity) for row in rows] == [
        ("hub_missing", "error"),
        ("registry_unusable", "error"),
        ("sleeps", "warning"),
        ("exposed", "warning"),
        ("not_checked", "unknown"),
        ("not_checked", "unknown"),
    ]
    assert "hanging could not be checked: it took longer than 1 s" in rows[4].message
    assert "no memory" in rows[5].message and rows[5].commands == (("mlxctl", "status"),)


@pytest.mark.parametrize("name", ["facts", *doctor.CHECKS])
def test_no_failure_ends_the_doctor(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: object) -> list[Finding]:
        raise RecursionError("too deep")

    if name == "facts":
        monkeypatch.setattr(doctor, "_budget", fail)
        result = doctor.run(host(tmp_path), Doctor())
        assert result.facts["budget"] == "not known (RecursionError: too deep)" and result.facts["mlx-lm"] == "0.32.2"
        return
    monkeypatch.setitem(doctor.CHECKS, name, fail)
    (row,) = [row for row in doctor.run(host(tmp_path), Doctor()).findings if row.code == "not_checked"]
    assert row.message == f"{name} could not be checked: RecursionError: too deep"


def test_report_that_cannot_be_read_does_not_hide_the_others(tmp_path: Path) -> None:
    deep = '{"bug_type": "298"}\n' + "[" * 100_000
    write(tmp_path, "Library/Logs/DiagnosticReports/JetsamEvent-2026-11-25-230000.ips", deep)
    write(tmp_path, "Library/Logs/DiagnosticReports/JetsamEvent-2026-11-25-220000.ips", macos.jetsam_report())
    assert found(host(tmp_path)) == {"not_checked": "unknown", "killed_for_memory": "warning"}


def test_outcome_of_a_call_is_its_value_or_its_exception() -> None:
    outcomes = within(5, {"one": lambda: 1, "zero": lambda: 1 // 0})
    assert outcomes["one"] == 1 and isinstance(outcomes["zero"], ZeroDivisionError)
    assert reason(ZeroDivisionError("a\nb")) == "ZeroDivisionError: a b"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """As huggingface_hub does."""
    path.parent.mkdir(parents=True)
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def pulled(ctx: Context, part: Path) -> Iterator[None]:
    """Hold the lock of a pull, which has not opened a part again."""
    ctx.store.create_folders()
    held = ctx.store.lock(f"repo-{part.parent.parent.name}", Operation("1", "pull", repo="org/m"))
    assert isinstance(held, Lock)
    yield
    held.release()


@contextmanager
def opened(ctx: Context, part: Path) -> Iterator[None]:
    with open(part):
        yield


@contextmanager
def changed(ctx: Context, part: Path) -> Iterator[None]:
    part.touch()
    yield


@contextmanager
def between_two_files(ctx: Context, part: Path) -> Iterator[None]:
    part.parent.touch()
    yield


DOWNLOADS: Mapping[str, tuple[Callable[[Context, Path], AbstractContextManager[None]], set[str]]] = {
    "ended": (lambda ctx, part: nullcontext(), {"cache_litter", "cache_incomplete"}),
    "open": (opened, set()),
    "changed": (changed, set()),
    "between two files": (between_two_files, set()),
    "locked": (lambda ctx, part: locked(ctx.paths.hub / ".locks" / "models--org--m" / "abc.lock"), set()),
    "a pull of ours": (pulled, set()),
}


@pytest.mark.parametrize("case", DOWNLOADS)
def test_parts_of_a_running_download_are_not_named(case: str, tmp_path: Path) -> None:
    ctx = host(tmp_path)
    blobs = ctx.paths.hub / "models--org--m" / "blobs"
    part = blobs / "abc.0123abcd.incomplete"
    write(blobs, part.name, "half")
    for path in (part, blobs):
        os.utime(path, (time.time() - 2 * doctor.QUIET_SECONDS,) * 2)
    holding, wanted = DOWNLOADS[case]
    with holding(ctx, part):
        rows = [row for row in doctor.run(ctx, Doctor()).findings if row.code.startswith("cache_")]
    assert {row.code for row in rows} == wanted
    assert all(row.hint.endswith((f"rm {part}", f"rm -r {blobs.parent}")) for row in rows)


class _Locked(BaseHTTPRequestHandler):
    """A server that wants a key."""

    status = 401

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


class _Open(_Locked):
    status = 200


@pytest.mark.skipif(sys.platform != "linux", reason="another address of this machine is needed")
@pytest.mark.parametrize(
    ("address", "handler", "accepted", "severity"),
    [
        ("0.0.0.0", _Open, None, "warning"),
        ("0.0.0.0", _Open, "accepted", None),
        ("0.0.0.0", _Locked, None, None),
        ("127.0.0.1", _Open, None, None),
    ],
)
def test_port_that_answers_others_without_a_key_is_exposed(
    tmp_path: Path, address: str, handler: type[_Locked], accepted: str | None, severity: str | None
) -> None:
    ctx = host(tmp_path, exposure=accepted)
    with HTTPServer((address, ctx.paths.settings.ports.first), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        codes = found(ctx)
        server.shutdown()
    assert codes.get("exposed") == severity


def test_silent_listener_is_not_exposed(tmp_path: Path) -> None:
    ctx = host(tmp_path)
    with socket.create_server(("0.0.0.0", ctx.paths.settings.ports.first)):
        assert "exposed" not in found(ctx)


HAND_STARTED = """\
import socket, time
server = socket.create_server(("127.0.0.1", 0))
print(server.getsockname()[1], flush=True)
time.sleep(600)
"""


def test_port_of_a_server_outside_of_the_range_is_asked_too(tmp_path: Path) -> None:
    ctx = host(tmp_path)
    server = tmp_path / "mlx_lm.server"
    server.write_text(HAND_STARTED)
    argv = [sys.executable, str(server), "--model", "m", "--port", "1"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        ports = doctor.served_ports(ctx)
        process.kill()
    assert ports >= {port, *ctx.paths.settings.ports} and 1 not in ports


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="another file system is needed")
def test_disk_of_a_registry_elsewhere_is_judged(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        ctx = host(tmp_path, registry=f"{folder}/registry.json")
        found = {disk.what: disk.path for disk in doctor.disks(ctx.paths)}
    assert found == {"the models": str(tmp_path / "hub"), "the registry": folder}


# -- launchd ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("launchctl", "interpreter", "wanted"),
    [
        ("exit 0", sys.executable, {"restore_needs_login": "warning"}),
        ("exit 113", sys.executable, {"restore_needs_login": "warning", "restore_job_off": "warning"}),
        ("exit 0", "/gone/python", {"restore_needs_login": "warning", "restore_job_broken": "error"}),
        ("echo no >&2; exit 9", sys.executable, {"restore_needs_login": "warning", "not_checked": "unknown"}),
    ],
)
def test_restore_job_of_launchd_is_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launchctl: str, interpreter: str, wanted: dict[str, str]
) -> None:
    ctx = host(tmp_path)
    program(tmp_path / "bin" / "launchctl", launchctl)
    manager = Launchd(ctx.environ, daemons=tmp_path / "daemons")
    monkeypatch.setattr(restore_job, "service_manager", lambda environ: manager)
    job = replace(restore_job.make_job(ctx.paths.state, ctx.environ, None), argv=(interpreter, "-m", "mlxops.agent"))
    (plist,) = manager.job_paths(job)
    plist.parent.mkdir(parents=True)
    plist.write_bytes(restore_job.launch_agent(job))
    assert found(ctx) == wanted


def test_program_of_an_installed_job_is_read(tmp_path: Path) -> None:
    path = tmp_path / 'a "b" %h $HOME \\n' / "python"
    job = replace(restore_job.make_job(tmp_path, {"HOME": str(tmp_path)}, None), argv=(str(path), "-P"))
    (tmp_path / "x.plist").write_bytes(restore_job.launch_agent(job))
    (tmp_path / "x.service").write_text(restore_job.service(job))
    assert restore_job.installed_program(tmp_path / "x.plist") == str(path)
    assert restore_job.installed_program(tmp_path / "x.service") == str(path)
    for name in ("y.plist", "y.service"):
        (tmp_path / name).write_text("something else")
        assert restore_job.installed_program(tmp_path / name) is None
    assert os.listdir(tmp_path)
