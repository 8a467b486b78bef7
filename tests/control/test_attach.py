"""An operation outlives its connection, client and session, and can be found again."""

from __future__ import annotations

import json
import os
import pty
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlxops.agent.state.operation_log import OperationLog
from mlxops.common.build import build_id
from mlxops.control import client as control
from mlxops.control import inventory
from mlxops.control.client import HostTarget, ask
from mlxops.core.commands.load import Load
from mlxops.core.errors import Exit
from mlxops.core.protocol import Event, Phase, Progress
from mlxops.core.settings import PortRange, Settings
from tests.lab import models
from tests.lab.envelopes import envelope
from tests.lab.homelab import Completed, Homelab, script
from tests.lab.quick import HeldEngine
from tests.lab.wire import Wire
from tests.lab.wired import client
from tests.lab.world import wait_until
from tests.steps import quiet

QWEN = "tiny-org/tiny-qwen3"
WAIT = 60.0


def load(lab: Homelab) -> list[str]:
    return ["load", "jerry-xl", str(lab.studio.ports[0]), "--repo", QWEN]


def operations(lab: Homelab) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = lab.mini.mlxctl("ops", "--json").ok().json["hosts"][0]["operations"]
    return rows


def assert_loaded_once(lab: Homelab) -> None:
    """Check for the end state of an undisturbed load."""
    port = lab.studio.ports[0]
    assert lab.studio.completion(port, "jerry-xl")["model"] == "jerry-xl"
    row = lab.mini.mlxctl("status", "--json").ok().json["hosts"][0]["ports"][0]
    assert (row["state"], row["model"], row["owner"]) == ("ready", "jerry-xl", "mlxops")
    assert lab.studio.registry()["models"]["jerry-xl"]["port"] == port
    assert [path.name for path in (lab.studio.state / "logs").iterdir()] == [f"{port}.log"], "it was started once"
    assert not list(lab.studio.hub.rglob("*.incomplete"))


def cut_by_wire(lab: Homelab, wire: Wire) -> None:
    wire.cut()


def cut_by_killing_the_session(lab: Homelab, wire: Wire) -> None:
    lab.studio.sshd.kill_connections()


def cut_until_it_reconnects(cut: Callable[[Homelab, Wire], None], lab: Homelab, wire: Wire) -> None:
    """Repeat the cut: one cut may hit a connection that was accepted but has no session yet."""
    before = wire.accepted

    def connected() -> bool:
        cut(lab, wire)
        return wire.accepted > before

    wait_until(connected, WAIT, "another connection")


class TestCutConnection:
    @pytest.mark.parametrize("cut", [cut_by_wire, cut_by_killing_the_session])
    def test_cuts_at_every_step_do_not_change_the_outcome(
        self, wired: tuple[Homelab, Wire], cut: Callable[[Homelab, Wire], None]
    ) -> None:
        lab, wire = wired
        engine = HeldEngine(lab)
        said: list[str] = []
        with client(lab, *load(lab)) as process:
            assert process.stderr is not None
            for line in process.stderr:
                said.append(line)
                if line.startswith(("download", "check", "start", "proof")):
                    cut_until_it_reconnects(cut, lab, wire)
                if line.startswith("proof"):
                    engine.let(*lab.studio.ports)
        text = "".join(said)
        assert process.returncode == 0, text
        assert text.count("reconnecting") >= 2, text
        for phase in ("check: ", "start: ", "proof: ", "commit: "):
            assert text.count(f"\n{phase}") == 1, f"each step is shown once\n{text}"
        assert_loaded_once(lab)
        assert [row["state"] for row in operations(lab)] == ["done"]

    def test_cut_before_the_operation_is_known_starts_it_once(self, wired: tuple[Homelab, Wire]) -> None:
        lab, wire = wired
        lab.studio.install(QWEN, models.QWEN)
        # Cut at a growing number of bytes: in the handshake, at the request, at the first words.
        refused = 0
        for size in (2500, 3500, 3900, 4200):
            wire.passed, wire.cut_after = 0, size
            done = lab.mini.mlxctl(*load(lab))
            assert done.exit in (0, 5), str(done)
            refused += done.exit == 5
            wire.cut_after = None
        lab.mini.mlxctl(*load(lab)).ok()
        assert refused < 4, "the larger cuts came after the connection was made"
        assert_loaded_once(lab)

    def test_lost_connection_is_an_unknown_outcome_with_a_follow_hint(
        self, wired: tuple[Homelab, Wire], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lab, wire = wired
        monkeypatch.setattr(control, "RECONNECT_SECONDS", 1.0)
        for name, value in lab.mini.env.items():
            monkeypatch.setenv(name, value)

        def listen(host: str, event: Event) -> None:
            if isinstance(event, Phase) and event.name == "download":
                wire.stalled = True
                wire.cut()

        path = inventory.hosts_file(lab.mini.env, None)
        assert path is not None
        host = inventory.load(path).hosts["studio"]
        target = HostTarget(host.name, host.ssh, host.interpreter(), host.settings)
        args: dict[str, Any] = {"model": "jerry-xl", "port": str(lab.studio.ports[0]), "repo": QWEN}
        answer = ask(target, Load(**args), listen)
        assert answer.error is not None and answer.error.exit == Exit.OUTCOME_UNKNOWN
        assert "--follow" in answer.error.hint
        wire.stalled = False
        lab.mini.mlxctl("ops", "--follow", str(answer.error.details["operation"])).ok()
        assert_loaded_once(lab)


class TestRunningLoad:
    def test_repeated_request_follows_the_load_of_a_killed_client(
        self, wired: tuple[Homelab, Wire], slow_hub: Wire
    ) -> None:
        lab, _ = wired
        with client(lab, *load(lab)) as process:
            assert process.stderr is not None
            next(line for line in process.stderr if line.startswith("download: 0"))
            slow_hub.stalled = True
            os.killpg(process.pid, signal.SIGKILL)
        with client(lab, *load(lab)) as process:
            assert process.stderr is not None
            said = next(line for line in process.stderr if "is running already" in line)
            slow_hub.stalled = False
            said += process.stderr.read()
            assert process.wait(WAIT) == 0, said
        assert "proof: " in said
        assert_loaded_once(lab)

    def test_status_shows_phase_and_progress_of_a_load(self, wired: tuple[Homelab, Wire], slow_hub: Wire) -> None:
        lab, _ = wired
        with client(lab, *load(lab)) as process:
            assert process.stderr is not None
            next(line for line in process.stderr if line.startswith("download: 0"))
            slow_hub.stalled = True
            row = lab.mini.mlxctl("status", "--json").ok().json["hosts"][0]["ports"][0]
            assert row["state"] == "loading"
            assert row["detail"].startswith("download") and "load jerry-xl, started by " in row["detail"]
            running = operations(lab)[0]
            assert (running["state"], running["command"], running["model"]) == ("running", "load", "jerry-xl")
            slow_hub.stalled = False
            assert process.wait(WAIT) == 0
        assert operations(lab)[0]["state"] == "done"


class TestCtrlC:
    def test_ctrl_c_without_a_terminal_leaves_the_operation_running(self, wired: tuple[Homelab, Wire]) -> None:
        lab, _ = wired
        with client(lab, *load(lab)) as process:
            assert process.stderr is not None
            next(line for line in process.stderr if line.startswith("download: 0"))
            process.send_signal(signal.SIGINT)
            said = process.stderr.read()
            assert process.wait(WAIT) == 130
        operation = operations(lab)[0]["operation"]
        assert f"operation {operation} was left running on studio" in said
        assert f"--follow {operation}" in said
        lab.mini.mlxctl("ops", "--follow", operation).ok()
        assert_loaded_once(lab)

    @pytest.mark.parametrize(("answer", "state"), [("c\n", "cancelled"), ("\n", "done")])
    def test_ctrl_c_on_a_terminal_offers_to_cancel_a_pull(
        self, wired: tuple[Homelab, Wire], answer: str, state: str
    ) -> None:
        lab, _ = wired
        done = on_a_terminal(lab, ["pull", "--repo", QWEN], "downloading", answer)
        assert done.exit == 130 and "leave it running (l) or cancel it (c)?" in done.stdout, str(done)
        operation = operations(lab)[0]
        if state == "done":
            lab.mini.mlxctl("ops", "--follow", operation["operation"]).ok()
        else:
            assert operation["error"] == "cancelled"
        assert bool(list(lab.studio.hub.glob("models--*"))) == (state == "done")

    @pytest.mark.usefixtures("quick_engine")
    def test_ctrl_c_never_offers_to_cancel_an_unload(self, homelab: Homelab) -> None:
        """The unload waits for an open request."""
        studio = homelab.studio
        studio.install(QWEN, models.QWEN)
        port = studio.ports[0]
        homelab.mini.mlxctl("load", QWEN, str(port)).ok()
        with socket.create_connection((studio.address, port)):
            done = on_a_terminal(homelab, ["unload", str(port), "--drain", "60"], "open requests get", "c\n")
            assert done.exit == 130 and "was left running on studio" in done.stdout, str(done)
            assert "cancel it (c)?" not in done.stdout
            assert operations(homelab)[0]["state"] == "running"
        homelab.mini.mlxctl("ops", "--follow", operations(homelab)[0]["operation"]).ok()
        assert not studio.listening(port)

    @pytest.mark.parametrize(("answer", "state"), [("c\n", "cancelled"), ("\n", "done")])
    def test_ctrl_c_on_a_terminal_offers_to_cancel_a_load(
        self, wired: tuple[Homelab, Wire], answer: str, state: str
    ) -> None:
        lab, _ = wired
        done = on_a_terminal(lab, load(lab), "downloading", answer)
        assert done.exit == 130, str(done)
        assert "leave it running (l) or cancel it (c)?" in done.stdout
        if state == "cancelled":
            assert "was cancelled; nothing half done is left" in done.stdout
            assert operations(lab)[0]["error"] == "cancelled"
            assert not list(lab.studio.hub.rglob("*.incomplete"))
            assert lab.mini.mlxctl("list", "--json").ok().json["hosts"][0]["models"] == []
        else:
            lab.mini.mlxctl("ops", "--follow", operations(lab)[0]["operation"]).ok()
            assert_loaded_once(lab)


class TestCancel:
    def test_cancelled_load_leaves_nothing(self, wired: tuple[Homelab, Wire]) -> None:
        lab, _ = wired
        HeldEngine(lab)
        lab.studio.install(QWEN, models.QWEN)
        with client(lab, *load(lab)) as process:
            assert process.stderr is not None
            next(line for line in process.stderr if line.startswith("proof: "))
            operation = operations(lab)[0]["operation"]
            cancelled = lab.mini.mlxctl("ops", "--cancel", operation[-8:]).ok()
            said = process.stderr.read()
            assert process.wait(WAIT) == 130, said
        assert "nothing half done is left" in cancelled.stdout
        assert operations(lab)[0]["error"] == "cancelled"
        quiet(lab.studio)
        assert lab.mini.mlxctl("list", "--json").ok().json["hosts"][0]["models"] == []

    def test_cancelled_load_keeps_a_finished_download(self, wired: tuple[Homelab, Wire]) -> None:
        """The download may have taken an hour, and the next load needs it."""
        lab, _ = wired
        HeldEngine(lab)
        with client(lab, *load(lab)) as process:
            assert process.stderr is not None
            next(line for line in process.stderr if line.startswith("proof: "))
            lab.mini.mlxctl("ops", "--cancel", operations(lab)[0]["operation"]).ok()
            assert process.wait(WAIT) == 130
        (model,) = lab.mini.mlxctl("list", "--json").ok().json["hosts"][0]["models"]
        assert (model["name"], model["port"], model["problems"]) == ("jerry-xl", None, [])
        quiet(lab.studio)

    def test_ended_or_unknown_operation_is_refused(self, homelab: Homelab) -> None:
        homelab.studio.install(QWEN, models.QWEN)
        homelab.mini.mlxctl("init").ok()
        ended = homelab.mini.mlxctl("ops", "--cancel", operations(homelab)[0]["operation"], "--json")
        assert (ended.exit, ended.json["hosts"][0]["error"]["code"]) == (3, "operation_ended")
        unknown = homelab.mini.mlxctl("ops", "--follow", "../../etc", "--json")
        assert (unknown.exit, unknown.json["hosts"][0]["error"]["code"]) == (3, "unknown_operation")


def on_a_terminal(lab: Homelab, words: list[str], until: str, answer: str) -> Completed:
    """Run `mlxctl` on a pseudo-terminal. Press Ctrl-C after the text `until`, and answer the question."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(lab.mini.elsewhere)
        os.execve(script("mlxctl"), ["mlxctl", *words], lab.mini.env | {"TERM": "xterm"})
    shown = b""
    pressed = answered = False
    try:
        while True:
            try:
                data = os.read(terminal, 4096)
            except OSError:  # Linux: the other end is closed
                break
            if not data:
                break
            shown += data
            if not pressed and until.encode() in shown:
                os.write(terminal, b"\x03")
                pressed = True
            if not answered and b"cancel it (c)?" in shown:
                os.write(terminal, answer.encode())
                answered = True
    finally:
        os.close(terminal)
    _, status = os.waitpid(pid, 0)
    return Completed(tuple(words), os.waitstatus_to_exitcode(status), shown.decode(errors="replace"), "")


def test_state_is_the_latest_phase_and_progress(tmp_path: Path) -> None:
    """The state of an operation is read from the end of its record, however long that is."""
    (tmp_path / "events.jsonl").write_text("")
    journal = OperationLog(tmp_path)
    assert str(journal.state()) == ""
    emit = journal.emitter()
    emit(Phase("download", "x is not in the cache"))
    for done in range(2000):
        emit(Progress("download", done * 10**8, 2 * 10**11, rate=10**8))
    assert str(journal.state()) == "download 200 GB of 200 GB, 99%, 100 MB/s, 1 s left"
    emit(Phase("check", "x at abc"))
    assert str(journal.state()) == "check: x at abc"


def test_request_with_the_same_ticket_runs_once(homelab: Homelab) -> None:
    """A control node that got no answer sends its request again."""
    homelab.studio.install(QWEN, models.QWEN)
    settings = homelab.studio.settings
    wire = Settings(
        bind=homelab.studio.address,
        hub=str(settings["hub"]),
        state=str(settings["state"]),
        ports=PortRange(homelab.studio.ports[0], homelab.studio.ports[-1]),
        slots=dict(homelab.studio.slots),
    )
    request = envelope("init", {}, wire, build_id(), ticket="0123abcd")

    def ask_agent() -> list[dict[str, Any]]:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "mlxops.agent"],
            input=request.encode(),
            env=homelab.studio.env | {"PATH": os.defpath},
            capture_output=True,
            check=True,
        )
        return [json.loads(line) for line in done.stdout.splitlines() if line]

    first, second = ask_agent(), ask_agent()
    assert first[-1]["result"]["added"] == [QWEN]
    assert second == first, "carried out again, it would have found nothing to add"
    assert len(operations(homelab)) == 1
