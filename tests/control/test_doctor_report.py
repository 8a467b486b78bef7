"""`doctor --report` on the control node: the file, and the demo that it runs."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from mlxops.common import files
from mlxops.control.doctor import report
from mlxops.core.commands.doctor import CONTROL_NODE, DoctorResult, FindingRow
from mlxops.core.doctor.assumptions import Trial
from mlxops.core.doctor.findings import Finding, FindingCode
from mlxops.core.errors import Refused, UsageError
from mlxops.core.replies import HostReply
from tests.lab.world import wait_until


@pytest.mark.parametrize(
    ("name", "why", "step"),
    [
        ("gone/report.txt", "there is no folder {}/gone", "create that folder"),
        (".", "it is a folder", "name a file in it"),
        ("file/report.txt", "there is no folder {}/file", "another file"),
        ("n" * 300, "File name too long", "another file"),
    ],
)
def test_path_that_cannot_be_written_says_why(name: str, why: str, step: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError) as refused:
        report.check(tmp_path / name)
    assert why.format(tmp_path) in refused.value.why and step in refused.value.hint


def result(*codes: FindingCode, trials: tuple[Trial, ...] = ()) -> DoctorResult:
    rows = tuple(FindingRow.of(Finding(code, code.level, "at /home/me", "none")) for code in codes)
    return DoctorResult(rows, (), {"python": "3.12 (/home/me/python)"}, trials=trials)


def test_report_has_the_findings_of_both_sides_and_no_places(tmp_path: Path) -> None:
    host = result(FindingCode.SLEEPS, trials=(Trial("boot.id", "PASS", "36 characters"),))
    replies = [HostReply(CONTROL_NODE, result(FindingCode.HOSTS_FILE_WRITABLE)), HostReply("studio", host)]
    notes: list[str] = []
    report.write(tmp_path / "report", replies, notes.append, local=False, clone=None)
    text = (tmp_path / "report").read_text()
    findings = text.partition("findings:\n")[2].splitlines()
    assert findings == ["warning hosts_file_writable (control node)", "warning sleeps"]
    assert "UNTRIED  demo" in text and "it needs --local" in text and "/home/me" not in text
    assert notes == [f"the report is in {tmp_path / 'report'}; read it before you send it"]


def test_report_is_for_its_user_only_and_has_nothing_of_what_it_replaces(tmp_path: Path) -> None:
    path = tmp_path / "report"
    path.write_text("old" * 10_000)
    path.chmod(0o644)
    tried = result(trials=(Trial("boot.id", "FAIL", "at '/Users/jane doe/x', by an older agent"),))
    report.write(path, [HostReply("studio", tried)], lambda note: None, local=False, clone=None)
    assert path.stat().st_mode & 0o777 == 0o600
    assert not re.search("old{2}|jane|doe/", path.read_text())


@pytest.mark.parametrize("before", ["old", None])
def test_report_without_room_leaves_what_was_there(before: str | None, tmp_path: Path) -> None:
    path = tmp_path / "report"
    if before is not None:
        path.write_text(before)
    program = (
        "import resource, sys; from pathlib import Path; from mlxops.common import files\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))\n"
        "files.write_privately(Path(sys.argv[1]), b'x' * 1000)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=False)
    assert "File too large" in done.stderr
    assert {each.name: each.read_text() for each in tmp_path.iterdir()} == ({"report": before} if before else {})


def test_link_and_pipe_are_written_to_and_stay(tmp_path: Path) -> None:
    link, pipe = tmp_path / "link", tmp_path / "pipe"
    link.symlink_to("target")
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    for path in (link, pipe):
        files.write_privately(path, b"x")
    assert link.is_symlink() and link.read_text() == "x" and pipe.is_fifo() and os.read(reader, 9) == b"x"
    os.close(reader)


def test_host_that_was_not_tried_makes_no_report(tmp_path: Path) -> None:
    notes: list[str] = []
    with pytest.raises(Refused, match="no host could be tried"):
        report.write(tmp_path / "report", [HostReply("studio", result())], notes.append, local=True, clone=None)
    assert not (tmp_path / "report").exists() and not notes


def test_what_the_demo_needs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "INV", tmp_path / "inv")
    assert "--local" in report._missing_for_demo(tmp_path, local=False)
    assert "a clone" in report._missing_for_demo(None, local=True)
    (tmp_path / "tests" / "lab").mkdir(parents=True)
    assert "pip install" in report._missing_for_demo(tmp_path, local=True)
    (tmp_path / "inv").touch(mode=0o755)
    assert report._missing_for_demo(tmp_path, local=True) == ""


# -- the demo's processes ---------------------------------------------------------------------------------------------

PARENT = """\
import os, signal, sys, time
{}
child = os.fork()
if not child:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    open(sys.argv[1], "w").write(str(os.getpid()) + "\\n")
time.sleep(600)
"""
DEAF = "signal.signal(signal.SIGINT, signal.SIG_IGN)"


@pytest.mark.skipif(sys.platform != "linux", reason="it looks for the child in /proc")
@pytest.mark.parametrize("before", ["", DEAF])
@pytest.mark.parametrize("interrupted", [False, True])
def test_demo_that_does_not_end_leaves_no_process(
    before: str, interrupted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "DEMO_SECONDS", 600.0 if interrupted else 3.0)
    monkeypatch.setattr(report, "DEMO_END_SECONDS", 1.0)
    mine = tmp_path / "pid"
    argv = [sys.executable, "-c", PARENT.format(before), str(mine)]
    with open(tmp_path / "output", "wb") as output:
        if interrupted:
            threading.Thread(target=_interrupt_when, args=(lambda: _has_line(mine),)).start()
            with pytest.raises(KeyboardInterrupt):
                report._run(argv, tmp_path, output.fileno())
        else:
            assert report._run(argv, tmp_path, output.fileno()) is None
    child = int(mine.read_text())
    wait_until(lambda: _is_gone(child), 5, "the end of the demo's child")


def _has_line(path: Path) -> bool:
    return path.exists() and path.read_text().endswith("\n")


def _interrupt_when(condition: Callable[[], bool]) -> None:
    wait_until(condition, 20, "the demo's child")
    os.kill(os.getpid(), signal.SIGINT)


def _is_gone(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
    return state == "Z"


def test_status_of_the_demo_is_returned(tmp_path: Path) -> None:
    with open(tmp_path / "output", "wb") as output:
        assert report._run([sys.executable, "-c", "print(1); raise SystemExit(4)"], tmp_path, output.fileno()) == 4
    assert (tmp_path / "output").read_bytes() == b"1\n"
