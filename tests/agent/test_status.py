"""`status` shows the truth: owners, states, drift, and leftovers of an interrupted operation."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from mlxops.agent.serving.diagnosis import About, explain
from mlxops.agent.state.operation_log import create
from mlxops.core.protocol import Done, Phase
from mlxops.core.settings import Settings
from tests.lab.envelopes import envelope
from tests.lab.quick import MODELS, QuickHost
from tests.lab.world import wait_until

WAIT = 60.0


def row(host: QuickHost, port: int, *flags: str) -> dict[str, Any]:
    rows = host.status(*flags)["ports"]
    return next(each for each in rows if each["port"] == port)


def codes(host: QuickHost) -> list[str]:
    return [each["code"] for each in host.status()["drift"]]


def found(host: QuickHost, words: str) -> psutil.Process:
    return wait_until(lambda: host.process(words), WAIT, words) or pytest.fail(words)


class TestInterruptedOperation:
    def test_interrupted_operation_is_repaired_by_the_next_command(self, host: QuickHost) -> None:
        port = host.ports[0]
        host.engine("--fake-late", "100")
        with host.start("load", MODELS[0], str(port)) as asker:
            worker = found(host, "--worker")
            wait_until(lambda: host.process("/gate.py") or host.process("--fake-late"), WAIT, "the server's process")
            worker.kill()
            asker.wait(WAIT)
        (cut,) = [each for each in host.status()["drift"] if each["code"] == "interrupted_operation"]
        assert f"load {MODELS[0]} on {port}" in cut["message"] and "was interrupted while it was at" in cut["message"]
        assert row(host, port)["state"] in {"orphan", "idle"}
        host.engine()
        again = host.mlxctl("load", MODELS[0], str(port)).ok()
        assert "was interrupted" in again.stderr
        assert row(host, port)["state"] == "ready" and codes(host) == []

    def test_interrupted_swap_leaves_an_assignment_that_reconcile_clears(self, host: QuickHost) -> None:
        port = host.ports[0]
        host.mlxctl("load", MODELS[0], str(port)).ok()
        host.engine("--fake-late", "100")
        with host.start("load", MODELS[1], str(port), "--force") as asker:
            worker = found(host, "--worker")
            wait_until(lambda: host.process("--fake-late"), WAIT, "the new server's process")
            worker.kill()
            asker.wait(WAIT)
        wait_until(lambda: not host.process("/gate.py"), WAIT, "the end of the gate")
        done = host.mlxctl("reconcile", "--json").ok().json["hosts"][0]["result"]
        assert done["cleared"] == [{"model": MODELS[0], "port": port}]
        assert [f"load {MODELS[1]} on {port}" in each for each in done["interrupted"]] == [True]
        assert '"cleared": [{"model": "org/alpha"' in (host.studio.state / "history.jsonl").read_text()
        assert codes(host) == []
        assert host.mlxctl("reconcile", "--json").ok().json["hosts"][0]["result"]["changed"] is False


class TestDrift:
    def test_server_with_outdated_settings_is_drift(self, host: QuickHost) -> None:
        port = str(host.ports[0])
        host.mlxctl("load", MODELS[0], port).ok()
        assert codes(host) == []
        host.edit(MODELS[0], args=["--fake-words", "x"])
        (drift,) = host.status()["drift"]
        assert drift["code"] == "settings_changed" and "lacks --fake-words x" in drift["message"]
        assert host.mlxctl("status", "--strict").exit == 3
        host.mlxctl("load", MODELS[0], port, "--force").ok()
        assert host.mlxctl("status", "--strict").exit == 0

    def test_contradictory_hand_edits_are_drift(self, host: QuickHost) -> None:
        host.edit(MODELS[0], repo_id="not a repository")
        host.edit(MODELS[1], port=str(host.ports[1]))
        assert sorted(codes(host)) == ["assigned_not_served", "entry_problem", "entry_problem"]

    def test_leftovers_that_reconcile_removes_are_drift(self, host: QuickHost) -> None:
        gone = subprocess.Popen(["true"])
        gone.wait()
        beside = host.studio.hub / f".registry.json.{gone.pid}.abcd.tmp"
        inside = host.studio.state / "run" / f".{host.ports[0]}.json.{gone.pid}.abcd.tmp"
        for path in (beside, inside):
            path.write_text("half")
        assert codes(host) == ["leftover", "leftover"]
        host.mlxctl("reconcile").ok()
        assert not beside.exists() and not inside.exists() and codes(host) == []


class TestOwners:
    def test_boot_jobs_server_is_named_and_never_stopped(self, host: QuickHost) -> None:
        port = host.ports[0]
        script = host.studio.folder / "start.sh"
        alias = host.studio.slots[port]
        (host.studio.folder / alias).symlink_to(host.snapshots[MODELS[0]])
        command = host.by_hand(MODELS[0], port).replace(str(host.snapshots[MODELS[0]]), alias)
        script.write_text(f"#!/bin/sh\ncd {host.studio.folder}\n{command}\nwait\n")
        host.lab.configure(boot={"port": port, "script": str(script), "label": "com.example.mlx"})
        with host.running("sh", str(script)):
            wait_until(lambda: host.studio.listening(port), WAIT, "the boot job's server")
            seen = row(host, port)
            assert (seen["owner"], seen["state"], seen["model"]) == ("boot", "ready", MODELS[0])
            same = host.mlxctl("load", MODELS[0], str(port))
            assert same.exit == 0 and "served by the boot job" in same.stdout + same.stderr
            assert codes(host) == [], "what the system serves need not be assigned"
            (host.studio.folder / "broken").touch()
            mute = host.mlxctl("load", MODELS[0], str(port))
            assert mute.exit == 3 and "does not answer as" in mute.stderr and "bootout" in mute.stderr
            other = host.mlxctl("load", MODELS[1], str(port), "--force")
            assert other.exit == 3 and "launchctl bootout system/com.example.mlx" in other.stderr
            assert host.mlxctl("unload", str(port), "--force").exit == 3
            assert host.mlxctl("unload-all", "--yes").exit == 0
            assert host.studio.listening(port)

    def test_process_that_answers_like_a_server_is_foreign(self, host: QuickHost) -> None:
        port = host.ports[0]
        code = (
            "import http.server as h,sys\n"
            "class A(h.BaseHTTPRequestHandler):\n"
            ' def do_GET(s): s.send_response(200); s.end_headers(); s.wfile.write(b\'{"data":[{"id":"jerry-xl"}]}\')\n'
            f"h.HTTPServer(('{host.studio.address}',{port}),A).serve_forever()"
        )
        with host.running(sys.executable, "-c", code):
            wait_until(lambda: host.studio.listening(port), WAIT, "the stranger")
            seen = row(host, port)
            assert (seen["owner"], seen["state"]) == ("foreign", "foreign") and "pid" in seen["detail"]
            for words in (["load", MODELS[0], str(port), "--force"], ["unload", str(port), "--force"]):
                assert host.mlxctl(*words).exit == 3
            host.mlxctl("reconcile").ok()
            assert host.studio.listening(port)


class TestServerThatMisbehaves:
    @pytest.mark.parametrize(
        ("kind", "why"), [("sick", "reports that it is unhealthy"), ("deep", "without a completion")]
    )
    def test_misbehaving_server_is_not_started(self, host: QuickHost, kind: str, why: str) -> None:
        port = host.ports[0]
        host.edit(MODELS[0], args=["--fake-act", kind])
        done = host.mlxctl("load", MODELS[0], str(port), "--timeout", "20")
        assert done.exit == 4 and why in done.stderr, str(done)
        assert not host.studio.listening(port) and row(host, port)["state"] == "idle"

    def test_misbehaving_server_blocks_no_longer_than_the_timeout(self, host: QuickHost) -> None:
        """Both when it is started and when it is adopted."""
        port, other = host.ports[0], host.ports[-1]
        host.edit(MODELS[0], args=["--fake-act", "endless"])
        began = time.monotonic()
        done = host.mlxctl("load", MODELS[0], str(other), "--timeout", "2")
        assert done.exit == 4 and "did not answer within 2 s" in done.stderr, str(done)
        planned = host.mlxctl("load", MODELS[0], str(port), "--dry-run", "--json").ok().json["hosts"][0]["result"]
        folder = host.studio.folder / "by-hand"
        folder.mkdir()
        (folder / planned["alias"]).symlink_to(host.snapshots[MODELS[0]])
        with host.running("sh", "-c", 'cd "$0" && exec "$@"', str(folder), *planned["plan"]["argv"]):
            wait_until(partial(host.studio.listening, port), WAIT, "the server")
            done = host.mlxctl("load", MODELS[0], str(port), "--timeout", "2")
            assert done.exit == 3 and "does not answer as" in done.stderr, str(done)
        assert time.monotonic() - began < WAIT / 2


class TestPortState:
    def test_state_is_known_within_seconds_if_every_port_hangs(self, host: QuickHost) -> None:
        host.lab.configure(launch={"mlx-lm": [str(host.program), "--fake-act", "mute"]})
        script = "\n".join(host.by_hand(MODELS[0], port, "--fake-act", "mute") for port in host.ports) + "\nwait\n"
        with host.running("sh", "-c", script):
            for port in host.ports:
                wait_until(partial(host.studio.listening, port), WAIT, "the servers")
            began = time.monotonic()
            states = {each["port"]: (each["owner"], each["state"]) for each in host.status()["ports"]}
            took = time.monotonic() - began
        assert states == dict.fromkeys(host.ports, ("hand", "wedged"))
        assert took < 2.0 * len(host.ports), f"{took:.1f} s: the ports were asked one after the other"

    def test_ended_server_is_shown_with_its_last_log_line(self, host: QuickHost) -> None:
        port = host.ports[0]
        host.edit(MODELS[0], args=["--fake-words", "[METAL] Insufficient Memory"])
        host.mlxctl("load", MODELS[0], str(port)).ok()
        found(host, "--fake-words").kill()
        wait_until(lambda: not host.studio.listening(port), WAIT, "the server's end")
        seen = row(host, port)
        assert seen["state"] == "failed"
        assert "last sign of life 20" in seen["detail"] and "Insufficient Memory" in seen["detail"]

    def test_probe_proves_a_server_by_a_completion(self, host: QuickHost) -> None:
        port = host.ports[0]
        host.mlxctl("load", MODELS[0], str(port)).ok()
        assert row(host, port, "--probe")["probe"]["ok"] is True
        (host.studio.state / "run" / str(port) / "broken").touch()
        assert row(host, port)["state"] == "ready", "health checks prove nothing"
        assert row(host, port, "--probe")["probe"]["ok"] is False
        assert host.mlxctl("status", "--probe", "--strict").exit == 3

    def test_server_is_wedged_only_without_a_request_in_flight(self, host: QuickHost) -> None:
        port = host.ports[0]
        host.mlxctl("load", MODELS[0], str(port)).ok()
        server = found(host, f"--port {port}")
        server.suspend()
        try:
            assert row(host, port)["state"] == "wedged"
            with socket.create_connection((host.studio.address, port)):
                assert (row(host, port)["state"], row(host, port)["detail"]) == ("ready", "busy")
        finally:
            server.resume()
        wait_until(lambda: row(host, port)["state"] == "ready", WAIT, "the server to be well again")


ABOUT = About("jerry-xl", "org/model", 8100, "/opt/engine/bin/mlx_lm.server")


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (
            "[METAL] Command buffer execution failed: Insufficient Memory (00000008:kIOGPU...)",
            "out_of_memory",
            "unload",
        ),
        ("RuntimeError: [metal::malloc] Attempting to allocate 123456789 bytes which is", "out_of_memory", "unload"),
        ("ValueError: Model type qwen9 not supported.", "unknown_architecture", "'qwen9'"),
        ("ModuleNotFoundError: No module named 'mlx_lm.models.qwen9'", "unknown_architecture", "'qwen9'"),
        ("Error: Invalid value for '--tool-call-parser': 'bogus' is not one of 'x'", "unknown_parser", "'bogus'"),
        ("huggingface_hub.errors.GatedRepoError: 403 Client Error.", "gated_repository", "hf auth login"),
        (
            "ValueError: Cannot use chat template functions because tokenizer.chat_template is not set and no template",
            "no_chat_template",
            "chat_template",
        ),
        ("OSError: [Errno 48] Address already in use", "port_taken", "8100"),
        ("ModuleNotFoundError: No module named 'tiktoken'", "missing_dependency", "'tiktoken'"),
        ("Missing 1 parameters: model.layers.1.mlp.down_proj.weight.", "files_do_not_fit", "org/model"),
        ("mlx_lm.server: error: unrecognized arguments: --bogus", "option_refused", "--bogus"),
    ],
)
def test_known_last_words_are_explained(words: str, code: str, text: str) -> None:
    cause = explain(words, "", 1, ABOUT)
    assert cause is not None and cause.code == code
    assert text in f"{cause.reason} {cause.help}"


def test_unknown_last_words_are_not_explained_and_braces_are_kept() -> None:
    assert explain("all is well", "", 1, ABOUT) is None
    cause = explain("ValueError: Model type {program!r} not supported.", "", 0, ABOUT)
    assert cause is not None and "{program!r}" in cause.reason
    killed = explain("", "", -signal.SIGKILL, ABOUT)
    assert killed is not None and killed.code == "killed_by_system"


def test_failed_load_has_a_reason_and_a_remedy(host: QuickHost) -> None:
    host.edit(MODELS[0], args=["--fake-exit", "0", "--fake-words", "ValueError: Model type qwen9 not supported."])
    done = host.mlxctl("load", MODELS[0], str(host.ports[0]), "--json")
    assert done.exit == 4
    error = done.json["hosts"][0]["error"]
    assert error["details"]["cause"] == "unknown_architecture"
    assert "'qwen9'" in error["why"] and "upgrade the engine" in error["hint"]
    assert row(host, host.ports[0])["state"] == "idle"


def test_operation_with_a_long_result_is_not_interrupted(tmp_path: Path) -> None:
    log, lock = create(tmp_path, envelope("init", {}, Settings(), ""))
    assert lock is not None
    os.close(lock)
    emit = log.emitter()
    emit(Phase("scan", "the cache"))
    assert not log.ended and log.state().final is None
    emit(Done({"added": ["org/model"] * 20_000}))
    assert log.ended and isinstance(log.state().final, Done)


def test_record_from_before_a_reboot_proves_nothing(host: QuickHost) -> None:
    """The record has another boot id. Pid, group and start time may match by chance and prove nothing."""
    port = host.ports[0]
    host.mlxctl("load", MODELS[0], str(port)).ok()
    record = host.studio.state / "run" / f"{port}.json"
    run = json.loads(record.read_text())
    record.write_text(json.dumps(run | {"boot_id": "another"}))
    assert row(host, port)["owner"] == "hand"
    assert host.mlxctl("unload", str(port)).exit == 3
    assert host.studio.listening(port)
    assert host.mlxctl("unload", str(port), "--force").exit == 0
    assert not host.studio.listening(port) and codes(host) == []
