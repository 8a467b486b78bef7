"""`doctor --report`: the trials on this machine, and what the file has."""

from __future__ import annotations

import getpass
import os
import pwd
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from mlxops.agent.context import Context
from mlxops.agent.host import health
from mlxops.agent.host.system import this_system
from mlxops.agent.operations import assumptions
from mlxops.common.anonymous import anonymous
from mlxops.core.doctor.assumptions import Assumption
from tests.lab import macos
from tests.lab.homelab import Homelab
from tests.lab.world import wait_until

ON_A_MAC_ONLY = {
    *("memory.footprint", "memory.statistics", "memory.wired", "memory.unexplained_wired", "gpu.default_limit"),
    *("files.flush", "reports.readable", "demo"),
}
"""Beside everything about sysctl, launchctl and power."""
LONGER_ON_A_BUSY_MACHINE = {"memory.returned", "memory.in_use", "memory.unexplained"}


def test_every_assumption_has_a_trial() -> None:
    assert set(assumptions.TRIALS) == set(Assumption) - {Assumption.DEMO}


@pytest.mark.skipif(sys.platform != "linux", reason="it says what passes on Linux")
def test_report_of_a_host_has_verdicts_and_no_names(homelab: Homelab) -> None:
    path = homelab.mini.elsewhere / "report.txt"
    homelab.mini.mlxctl("doctor", "--report", str(path), "--host", "studio").ok()
    text = path.read_text()
    verdicts = {id: verdict for verdict, id in re.findall(r"^(PASS|FAIL|UNTRIED) +(\S+)", text, re.MULTILINE)}
    mac = {id for id in verdicts if id.partition(".")[0] in {"sysctl", "launchctl", "power"}} | ON_A_MAC_ONLY
    assert {id for id in mac if verdicts[id] != "UNTRIED"} <= {"memory.footprint"}
    wrong = {id: verdict for id, verdict in verdicts.items() if id not in mac and verdict != "PASS"}
    assert not wrong.keys() - LONGER_ON_A_BUSY_MACHINE, text
    for name in (getpass.getuser(), socket.gethostname(), str(homelab.folder), "/home/"):
        assert not re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text), name


def test_report_that_cannot_be_written_is_an_error_before_the_trials(homelab: Homelab) -> None:
    answer = homelab.mini.mlxctl("doctor", "--report", "/no/such/folder/report")
    assert answer.exit == 2 and "another file" in answer.stderr


def test_names_are_taken_out() -> None:
    me, host = getpass.getuser(), socket.gethostname()
    text = anonymous(
        f"{me}@{host}: /Users/{me}/a/b: no, (/home/x/y)\x1b[31m; /srv/z /System/L 10.1.2.3 and 127.0.0.1; "
        "HF_TOKEN=x 3 files"
    )
    assert text == "NAME@NAME: PATH: no, (PATH); PATH /System/L ADDRESS and 127.0.0.1; HF_TOKEN=... 3 files"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Permission denied: '/Volumes/Jane Doe/x y'", "Permission denied: 'PATH'"),
        ('"/Volumes/Jane\'s Disk/hub"', '"PATH"'),
        ("3.12 (/Volumes/My Disk/bin/python)", "3.12 (PATH)"),
        ("not known (/Volumes/My Disk: closed)", "not known (PATH: closed)"),
        ("/Volumes/My Disk/models/hub is gone", "PATH is gone"),
        ("/System/Volumes/Data/Users/jane/x", "PATH"),
        ("fe80::1%en0, 2001:db8::7; ::1 at 12:30:45", "ADDRESS, ADDRESS; ::1 at 12:30:45"),
        ("at 10.1.2.3. aa:bb:cc:dd:ee:ff", "at ADDRESS. ADDRESS"),
        ("ssh jane@office python@3.12", "ssh NAME@NAME python@3.12"),
        ("janes-mac.local. (host='proxy', port=1) pypi.example.com", "NAME. (host='NAME', port=1) NAME"),
        ("found ('127.0.0.1', frozenset({12})), io.mlxops.no-such-job", None),
    ],
)
def test_names_and_addresses_of_others_are_taken_out(text: str, shown: str | None) -> None:
    assert anonymous(text) == (shown or text)


def test_own_names_are_taken_out_in_every_spelling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "Janes-Mac.fritz.box")
    account = pwd.struct_passwd(("jdoe", "x", 0, 0, "Jane Doe,,,", "/Users/jane.d", "/bin/zsh"))
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: account)
    assert (
        anonymous("janes-mac JDOE_x Doe, Jane of jane.d; Janes-Mac.fritz.box") == "NAME NAME_x NAME, NAME of NAME; NAME"
    )


def test_names_of_an_account_without_an_entry_are_taken_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(getpass, "getuser", lambda: dict[str, str]()["uid"])
    assert anonymous(f"on {socket.gethostname()}") == "on NAME"


# -- trials that go wrong ---------------------------------------------------------------------------------------------

CONTEXT = cast("Context", SimpleNamespace(emit=lambda event: None, beat=lambda: None))


def tried(trying: assumptions.Trying) -> tuple[str, str]:
    verdict, detail = assumptions._within_time(CONTEXT, trying)
    return str(verdict), detail


def test_failure_of_a_trial_is_its_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tried(lambda ctx: f"{1 // 0}") == ("FAIL", "ZeroDivisionError: integer division or modulo by zero")
    monkeypatch.setattr(socket, "gethostname", lambda: f"{1 // 0}")
    assert tried(lambda ctx: "fine") == ("FAIL", "ZeroDivisionError")


def test_trial_that_hangs_is_left_and_heartbeats_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    never, beats = threading.Event(), []
    monkeypatch.setattr(assumptions, "TRIAL_SECONDS", 1.2)
    ctx = cast("Context", SimpleNamespace(beat=lambda: beats.append(1)))
    verdict, detail = assumptions._within_time(ctx, lambda ctx: str(never.wait(30)))
    never.set()
    assert (verdict, detail) == ("FAIL", "it took longer than 1 s") and len(beats) >= 2


PRINTS = "import os, time; os.write(1, {!r}); time.sleep(600)"


@pytest.mark.parametrize(
    ("code", "why"),
    [
        (PRINTS.format(b""), "no line within 2 s"),
        (PRINTS.format(b"half a line"), "no line within 2 s"),
        ("import sys; sys.exit(3)", "it ended with 3"),
        ("import os\nwhile True: os.write(1, b'x' * 4096)", "its output has no end"),
        ("import os, time\nif os.fork(): os._exit(0)\ntime.sleep(600)", "no line within 2 s"),
    ],
)
def test_child_that_does_not_say_its_line_is_ended(code: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assumptions, "START_SECONDS", 2.0)
    ended: list[subprocess.Popen[bytes]] = []
    end = assumptions._end

    def ending(process: subprocess.Popen[bytes]) -> None:
        ended.append(process)
        end(process)

    monkeypatch.setattr(assumptions, "_end", ending)
    with pytest.raises(AssertionError, match=why), assumptions._child(code):
        pass
    (process,) = ended
    assert process.returncode is not None
    wait_until(lambda: not this_system().process_table(()).group(process.pid), 5, "the end of its group")


def test_ending_a_program_forgives_a_group_that_may_not_be_signalled(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(pgid: int, number: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "killpg", refused)
    assumptions._end(subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE))


# -- what is read of the system -----------------------------------------------------------------------------------


def test_program_that_is_not_there_says_nothing(tmp_path: Path) -> None:
    environ = {"PATH": str(tmp_path), "HOME": str(tmp_path)}
    assert health.output_of(environ, "no-such-program") == ""
    program = tmp_path / "pmset"
    program.write_text("#!/bin/sh\necho broken\nexit 3\n")
    program.chmod(0o755)
    with pytest.raises(OSError, match="pmset ended with 3: broken"):
        health.output_of(environ, "pmset")


@pytest.fixture
def reports(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "Library" / "Logs" / "DiagnosticReports"
    folder.mkdir(parents=True)
    yield folder


def test_old_and_other_reports_are_passed_over(reports: Path, tmp_path: Path) -> None:
    for name in ("JetsamEvent-2026-11-25-220357.ips", "panic-full-1.panic", "python3-2026.ips", "JetsamEvent-old.ips"):
        (reports / name).write_text("x")
    os.utime(reports / "JetsamEvent-old.ips", macos.long_ago())
    found = health.recent_reports((tmp_path / "missing", reports))
    assert {path.name for path in found} == {"JetsamEvent-2026-11-25-220357.ips", "panic-full-1.panic"}
