"""Servers that people start by hand: recognised, stopped alone, and no other process is signalled."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.lab import models
from tests.lab.homelab import Homelab
from tests.lab.quick import MODELS, QuickHost
from tests.lab.sshd import missing
from tests.lab.world import wait_until
from tests.steps import ENDED_BY_SIGINT

WAIT = 30.0


def command(host: QuickHost, port: int, *options: str, model: str = MODELS[0]) -> str:
    """Return a shell command that runs a server in the foreground."""
    return host.by_hand(model, port, *options).removesuffix(" &")


def rows(host: QuickHost) -> dict[int, dict[str, Any]]:
    return {row["port"]: row for row in host.status()["ports"]}


def row(host: QuickHost, port: int) -> tuple[str, str | None, int | None]:
    found = rows(host)[port]
    return found["state"], found["owner"], found["pid"]


def listener(host: QuickHost, port: int) -> int:
    """Wait for a listener on a port; return its process."""

    def found() -> int:
        for process in psutil.process_iter():
            try:
                connections = process.net_connections("tcp")
            except psutil.Error:
                continue
            if any(c.status == psutil.CONN_LISTEN and c.laddr == (host.studio.address, port) for c in connections):
                return process.pid
        return 0

    return wait_until(found, WAIT, f"a listener on {port}")


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def error(host: QuickHost, exit: int, *words: str) -> dict[str, Any]:
    done = host.mlxctl(*words, "--json")
    assert done.exit == exit, str(done)
    found: dict[str, Any] = done.json["hosts"][0]["error"]
    return found


def result(host: QuickHost, *words: str) -> dict[str, Any]:
    found: dict[str, Any] = host.mlxctl(*words, "--json").ok().json["hosts"][0]["result"]
    return found


def memory(host: QuickHost) -> dict[int | None, list[dict[str, Any]]]:
    """Return the memory use of this host's servers by port."""
    servers = host.mlxctl("list", "--memory", "--json").ok().json["hosts"][0]["memory"]["servers"]
    found: dict[int | None, list[dict[str, Any]]] = {}
    own = {process.pid for process in host.studio.processes()}
    for each in servers:
        if each["pid"] in own:
            found.setdefault(each["port"], []).append(each)
    return found


def needed(program: str) -> str:
    return shutil.which(program) or missing(f"{program} (Debian and Ubuntu: apt-get install {program})")


@contextmanager
def tmux(host: QuickHost, *windows: str) -> Iterator[Callable[..., list[str]]]:
    """Start a private tmux with a window per command; yield a function that runs tmux commands."""
    program = needed("tmux")

    def ask(*words: str) -> list[str]:
        argv = [program, "-S", str(host.studio.folder / "tmux"), *words]
        done = subprocess.run(
            argv, capture_output=True, text=True, env=host.studio.environment, cwd=host.studio.home, check=False
        )
        return done.stdout.splitlines()

    first, *others = [shlex.split(each) for each in windows]
    ask("-f", "/dev/null", "new-session", "-d", "-s", "mlx", *first)
    for each in others:
        ask("new-window", "-d", "-t", "mlx:", *each)
    try:
        yield ask
    finally:
        ask("kill-server")


class TestTmux:
    def test_tmux_loses_only_the_window_of_the_stopped_server(self, host: QuickHost) -> None:
        first, second = host.ports[:2]
        with tmux(host, command(host, first), "sleep 1000", command(host, second, model=MODELS[1])) as ask:
            (carrier,) = map(int, ask("display-message", "-p", "#{pid}"))
            pid, other = listener(host, first), listener(host, second)
            assert row(host, first) == ("ready", "hand", pid) and row(host, second) == ("ready", "hand", other)
            uses = memory(host)
            assert [len(uses[port]) for port in (first, second)] == [1, 1]
            plan = result(host, "unload", str(first), "--force", "--dry-run")
            assert f"pid {pid}, owner hand" in plan["plan"]["stops"][0] and f"pid {carrier}" in plan["notes"][0]
            assert result(host, "unload", str(first), "--force")["state"] == "idle"
            assert not alive(pid) and alive(other)
            assert result(host, "load", MODELS[2], str(second), "--force")["state"] == "ready"
            assert not alive(other)
            assert ask("list-windows", "-F", "#{pane_current_command}") == ["sleep"]

    def test_tmux_without_its_server_is_not_a_server(self, host: QuickHost) -> None:
        port = host.ports[0]
        with tmux(host, command(host, port), "sleep 1000") as ask:
            os.kill(listener(host, port), signal.SIGINT)
            wait_until(lambda: not host.studio.listening(port), WAIT, "its end")
            assert row(host, port) == ("idle", None, None)
            host.mlxctl("unload-all", "--yes").ok()
            assert result(host, "load", MODELS[0], str(port))["state"] == "ready"
            assert ask("list-windows", "-F", "#{pane_current_command}") == ["sleep"]


CARRIERS = ("ssh studio2", "docker exec box", "watch pgrep -fl", "kubectl exec pod --", "python3 notebook.py")


@contextmanager
def carried(host: QuickHost, words: str) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Idle processes of other programs with a server's words in their arguments."""
    folder = host.studio.folder / "carriers"
    folder.mkdir()
    processes = []
    for carrier in map(str.split, CARRIERS):
        (folder / carrier[1]).write_text("import time; time.sleep(1000)")
        argv = [*carrier, *shlex.split(words)]
        processes.append(subprocess.Popen(argv, executable=sys.executable, cwd=folder))
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_process_with_a_servers_words_is_not_a_server(host: QuickHost) -> None:
    port = host.ports[0]
    with carried(host, command(host, port)) as processes:
        assert row(host, port) == ("idle", None, None) and memory(host) == {}
        host.mlxctl("unload-all", "--yes").ok()
        assert result(host, "unload", str(port), "--force")["changed"] is False
        assert result(host, "load", MODELS[0], str(port), "--force")["state"] == "ready"
        assert [process.poll() for process in processes] == [None] * len(processes)


class TestScriptThatStartsSeveral:
    @pytest.mark.parametrize("tee", ["", " | tee log >/dev/null"])
    def test_script_keeps_its_other_servers(self, host: QuickHost, tee: str) -> None:
        ports = host.ports[:3]
        lines = [command(host, port, model=model) + f"{tee} &" for port, model in zip(ports, MODELS, strict=False)]
        with host.running("sh", "-c", "\n".join([*lines, "wait"])) as script:
            pids = [listener(host, port) for port in ports]
            first, second = map(str, ports[:2])
            hints = [each["hint"] for each in host.status()["drift"] if each["port"] == ports[0]]
            assert hints == [f"mlxctl unload --local {first} --force, then load"]
            assert len(result(host, "unload", first, "--force", "--dry-run")["plan"]["stops"]) == 1
            assert result(host, "unload", first, "--force")["state"] == "idle"
            assert [alive(pid) for pid in (*pids, script.pid)] == [False, True, True, True]
            assert result(host, "load", MODELS[0], second, "--force")["state"] == "ready"
            assert [alive(pid) for pid in pids] == [False, False, True]
            host.mlxctl("unload-all", "--yes").ok()
            assert not alive(pids[2])
            wait_until(lambda: script.poll() is not None, WAIT, "the script, which ends by itself")

    def test_one_server_of_a_script_is_adopted_and_stopped(self, host: QuickHost) -> None:
        port, other = host.ports[:2]
        planned = result(host, "load", MODELS[0], str(port), "--dry-run")
        folder = host.studio.folder / "by-hand"
        folder.mkdir()
        (folder / planned["alias"]).symlink_to(host.snapshots[MODELS[0]])
        wanted = shlex.join(planned["plan"]["argv"])
        script = f"cd {folder}\n{wanted} &\n{command(host, other, model=MODELS[1])} &\nwait"
        with host.running("sh", "-c", script):
            pids = [listener(host, port), listener(host, other)]
            assert result(host, "load", MODELS[0], str(port))["pid"] == pids[0]
            assert row(host, port) == ("ready", "mlxops", pids[0])
            assert result(host, "unload", str(port))["state"] == "idle"
            assert [alive(pid) for pid in pids] == [False, True]


def test_program_that_started_a_server_stays_and_is_named(host: QuickHost) -> None:
    port = host.ports[0]
    code = f"import subprocess, time\nsubprocess.Popen({shlex.split(command(host, port))!r})\nwhile 1: time.sleep(1)"
    with host.running(sys.executable, "-c", code) as panel:
        pid = listener(host, port)
        assert f"pid {panel.pid}" in rows(host)[port]["detail"]
        assert f"pid {panel.pid}" in error(host, 3, "unload", str(port))["why"]
        (note,) = result(host, "unload", str(port), "--force", "--dry-run")["notes"]
        assert f"pid {panel.pid}" in note and "may start it again" in note
        assert result(host, "unload", str(port), "--force")["state"] == "idle"
        assert not alive(pid) and panel.poll() is None


def test_wrapper_is_named_and_stopped_with_its_server(host: QuickHost) -> None:
    port = host.ports[0]
    with host.running("sh", "-c", f"while :; do {command(host, port)}; sleep 0.01; done") as loop:
        pid = listener(host, port)
        (stop,) = result(host, "unload", str(port), "--force", "--dry-run")["plan"]["stops"]
        assert stop.endswith(f"pid {pid}, owner hand, with pid {loop.pid}, which runs it")
        assert result(host, "unload", str(port), "--force")["state"] == "idle"
        assert loop.poll() == -signal.SIGTERM and row(host, port) == ("idle", None, None)


class TestServerWithoutItsPort:
    def test_server_without_its_port_is_loading_and_blocks_it(self, host: QuickHost) -> None:
        port = host.ports[-1]  # the only one without an alias
        with host.running("sh", "-c", "exec " + command(host, port, "--fake-late", "1000")) as server:
            assert row(host, port) == ("loading", "hand", server.pid)
            assert error(host, 3, "load", MODELS[1], str(port))["code"] == "port_in_use"
            assert error(host, 3, "load", MODELS[1], "auto")["code"] == "no_idle_port"
            assert result(host, "unload", str(port), "--force")["state"] == "idle"
            assert server.poll() == -signal.SIGINT

    def test_server_without_its_port_is_stopped_beside_the_listening_one(self, host: QuickHost) -> None:
        port = host.ports[0]
        host.mlxctl("load", MODELS[0], str(port)).ok()
        late = "exec " + command(host, port, "--fake-late", "1000", model=MODELS[1])
        with host.running("sh", "-c", late) as server:
            assert row(host, port)[:2] == ("ready", "mlxops")
            (drift,) = host.status()["drift"]
            assert (drift["code"], drift["hint"]) == ("portless_server", f"stop it on the host: kill {server.pid}")
            assert {port: len(uses) for port, uses in memory(host).items()} == {port: 1, None: 1}
            assert "--force" in result(host, "unload", str(port), "--dry-run")["notes"][0]
            assert result(host, "unload", str(port), "--force")["state"] == "idle"
            assert server.poll() == -signal.SIGINT

    def test_foreign_listener_stays_when_the_server_is_stopped(self, host: QuickHost) -> None:
        port = host.ports[0]
        code = f"import socket, time; s = socket.create_server(('{host.studio.address}', {port})); time.sleep(1000)"
        late = "exec " + command(host, port, "--fake-late", "1000")
        with host.running(sys.executable, "-c", code) as stranger, host.running("sh", "-c", late) as server:
            listener(host, port)
            wait_until(lambda: host.status()["drift"], WAIT, "its drift")
            refused = error(host, 3, "unload", str(port))
            assert refused["hint"].endswith(f"kill {stranger.pid}")
            done = result(host, "unload", str(port), "--force")
            assert (done["state"], done["changed"]) == ("foreign", True) and str(stranger.pid) in done["notes"][0]
            assert server.poll() == -signal.SIGINT and stranger.poll() is None


def test_listening_port_counts_and_not_the_one_in_the_arguments(host: QuickHost) -> None:
    said, real = host.ports[:2]
    words = shlex.split(command(host, said))
    # Its arguments stay as they were: what a sitecustomize or a configuration file does.
    program = host.studio.folder / "moved" / "mlx_lm.server"
    program.parent.mkdir()
    move = f"import os, sys\nsys.argv[sys.argv.index('{said}')] = '{real}'\n"
    program.write_text(host.program.read_text(encoding="utf-8").replace("import os\n", move, 1), encoding="utf-8")
    program.chmod(0o755)
    with host.running(str(program), *words[1:]) as server:
        listener(host, real)
        assert row(host, said) == ("idle", None, None)
        assert row(host, real) == ("ready", "hand", server.pid)
        assert list(memory(host)) == [real]
        assert result(host, "load", MODELS[1], str(said))["state"] == "ready"
        assert server.poll() is None
        assert result(host, "unload", str(real), "--force")["state"] == "idle"
        assert server.poll() == -signal.SIGINT


PREFIXES = {
    "nice": ["/usr/bin/nice", "-n", "10", "{engine}"],
    "options behind": ["{appends}"],
    "a wrapper in Python": ["{python}"],
}
SCRIPTS = {
    "appends": '#!/bin/sh\nexec {engine} "$@" --log-level WARNING\n',
    "python": "#!{interpreter}\nimport os, sys\nos.execv('{engine}', ['x', *sys.argv[1:], '--late-option'])\n",
}


@pytest.mark.parametrize("prefix", PREFIXES)
def test_engine_with_any_launch_prefix_is_ready_and_stays(host: QuickHost, prefix: str) -> None:
    port = host.ports[0]
    paths = {"engine": str(host.program), "interpreter": sys.executable}
    for name, text in SCRIPTS.items():
        script = host.studio.folder / name
        script.write_text(text.format(**paths))
        script.chmod(0o755)
        paths[name] = str(script)
    launch = [word.format(**paths) for word in PREFIXES[prefix]]
    host.lab.configure(launch={"mlx-lm": launch}, memory="1000 GB")
    loaded = result(host, "load", MODELS[0], str(port))
    assert loaded["state"] == "ready"
    record = (host.studio.state / "run" / f"{port}.json").read_bytes()
    for words in (["reconcile"], ["restore"], ["load", MODELS[0], str(port)]):
        assert result(host, *words)["changed"] is False, words
    assert host.mlxctl("status", "--strict").exit == 0
    assert (host.studio.state / "run" / f"{port}.json").read_bytes() == record
    assert json.loads(record)["pid"] == loaded["pid"] and alive(loaded["pid"])
    assert result(host, "unload", str(port))["state"] == "idle"
    wait_until(lambda: not host.process("--model"), WAIT, "the end of everything")


def test_real_server_without_its_port_is_reported_with_its_memory(engine: Path, homelab: Homelab) -> None:
    """mlx_lm.server keeps running without a port: its main thread has ended, but not the thread with the model."""
    studio = homelab.studio
    paths = [studio.install(f"tiny-org/{model}", model) for model in (models.QWEN, models.LLAMA)]
    port = str(studio.ports[0])
    where = ["--host", studio.address, "--port", port]
    argv = [[str(engine / "bin" / "mlx_lm.server"), "--model", str(path), *where] for path in paths]
    environ = studio.environment | {"HF_HUB_OFFLINE": "1"}
    log = studio.folder / "second.log"
    with ExitStack() as stack, log.open("wb") as output:

        def started(words: list[str]) -> subprocess.Popen[bytes]:
            process = subprocess.Popen(words, cwd=studio.home, env=environ, stdout=output, stderr=output)
            stack.callback(process.wait)
            stack.callback(process.kill)
            return process

        first = started(argv[0])
        wait_until(lambda: studio.listening(studio.ports[0]), 60, "the first")
        second = started(argv[1])
        wait_until(lambda: b"Address already in use" in log.read_bytes(), 60, "the second to lose")
        found = studio.mlxctl("status", "--json").ok().json["hosts"][0]
        assert [row["pid"] for row in found["ports"] if row["state"] == "ready"] == [first.pid]
        assert [row["portless"] for row in found["ports"] if row["state"] == "ready"] == [[second.pid]]
        assert f"kill {second.pid}" in " ".join(each["hint"] for each in found["drift"])
        studio.mlxctl("unload", port, "--force").ok()
        assert {first.wait(10), second.wait(10)} <= ENDED_BY_SIGINT
