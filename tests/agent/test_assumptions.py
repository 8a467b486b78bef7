"""`doctor --report`: the trials on this machine, and what the file has."""

from __future__ import annotations

import getpass
import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlxops.agent.host import health
from mlxops.agent.operations import assumptions
from mlxops.core.doctor.assumptions import Assumption
from tests.lab import macos
from tests.lab.homelab import Homelab

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
    text = assumptions.redacted(f"{me}@{host}: /Users/{me}/a/b: no, /home/x/y\x1b[31m; 3 files")
    assert text == "NAME@NAME: PATH: no, PATH; 3 files"


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
    import os

    for name in ("JetsamEvent-2026-11-25-220357.ips", "panic-full-1.panic", "python3-2026.ips", "JetsamEvent-old.ips"):
        (reports / name).write_text("x")
    os.utime(reports / "JetsamEvent-old.ips", macos.long_ago())
    found = health.recent_reports((tmp_path / "missing", reports))
    assert {path.name for path in found} == {"JetsamEvent-2026-11-25-220357.ips", "panic-full-1.panic"}
