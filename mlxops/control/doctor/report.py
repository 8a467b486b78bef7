"""Write the file of `doctor --report`: what was tried on each host, without names."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from mlxops.common import files
from mlxops.common.anonymous import anonymous
from mlxops.core.commands.doctor import CONTROL_NODE, DoctorResult
from mlxops.core.doctor.assumptions import Assumption, Trial, Verdict, report_text
from mlxops.core.errors import Refused, UsageError
from mlxops.core.replies import HostReply

DEMO_SECONDS = 1200.0
DEMO_END_SECONDS = 60.0
"""For the demo to stop its server after Ctrl-C."""
INV = Path(sys.prefix, "bin", "inv")
Say = Callable[[str], None]


def check(path: Path) -> None:
    """Raises `UsageError` (report_unwritable) if the file cannot be written: the trials take a minute."""
    folder = path.absolute().parent
    try:
        if files.is_folder(path):
            raise _unwritable(path, "it is a folder", "name a file in it")
        if not files.is_folder(folder):
            raise _unwritable(path, f"there is no folder {folder}", "create that folder, or name another file")
        there = path.exists()
    except OSError as error:
        raise _unwritable(path, error.strerror or str(error), "name another file") from None
    if not os.access(path if there else folder, os.W_OK):
        raise _unwritable(path, "this account may not write there", "name another file")


def _unwritable(path: Path, why: str, hint: str) -> UsageError:
    return UsageError("report_unwritable", f"{path} cannot be written", why=why, hint=hint)


def write(
    path: Path, replies: Sequence[HostReply[DoctorResult]], note: Say, *, local: bool, clone: Path | None
) -> None:
    """Write what was tried, and try the demo if the host is this machine (`local`) and there is a clone to run it in.

    Raises `Refused` (nothing_tried) if no host could be tried, and `UsageError` (report_unwritable).
    """
    results = [reply.result for reply in replies if reply.result is not None and reply.result.trials]
    if not results:
        raise Refused(
            "nothing_tried",
            f"no host could be tried, so {path} was not written",
            why="the findings say why",
            hint="correct what they name, then try again",
        )
    own = [row for reply in replies if reply.host == CONTROL_NODE and reply.result for row in reply.result.findings]
    here = {f"{row.severity} {row.code} (control node)" for row in own}
    demo = _demo(clone, note, local=local)
    texts = [_text(replace(result, trials=(*result.trials, demo)), here) for result in results]
    try:
        files.write_privately(path, "\n\n".join(texts).encode())
    except OSError as error:
        raise _unwritable(path, error.strerror or str(error), "name another file") from None
    note(f"the report is in {path}; read it before you send it")


def _text(result: DoctorResult, here: set[str]) -> str:
    found = {f"{row.severity} {row.code}" for row in result.findings}
    # The host has taken its own names out of the trials; an older agent leaves some.
    trials = [replace(trial, detail=anonymous(trial.detail)) for trial in result.trials]
    return report_text(_without_places(result.facts), trials, found | here)


def _without_places(facts: Mapping[str, str]) -> dict[str, str]:
    return {anonymous(key): anonymous(value) for key, value in facts.items()}


# -- the demo -----------------------------------------------------------------------------------------------------


def _demo(clone: Path | None, note: Say, *, local: bool) -> Trial:
    if missing := _missing_for_demo(clone, local=local):
        return Trial(Assumption.DEMO.value, Verdict.UNTRIED, missing)
    note("running `inv demo`; it takes a minute, and the first time ten, because it installs an engine (500 MB)")
    with tempfile.TemporaryFile() as output:
        status = _run([str(INV), "demo"], clone or Path(), output.fileno())
        output.seek(0)
        lines = output.read().decode(errors="replace").strip().splitlines()
    if status == 0:
        return Trial(Assumption.DEMO.value, Verdict.PASS)
    ended = f"ended with {status}" if status is not None else f"took longer than {DEMO_SECONDS:.0f} s"
    last = " | ".join(line.strip() for line in lines[-3:])
    return Trial(Assumption.DEMO.value, Verdict.FAIL, anonymous(f"it {ended}: {last}"))


def _missing_for_demo(clone: Path | None, *, local: bool) -> str:
    """Return why the demo is not tried; "" if it is."""
    if not local:
        return "the demo runs on this machine only: it needs --local"
    if clone is None or not (clone / "tests" / "lab").is_dir():
        return "it needs a clone of mlxops: run doctor in its folder, or with an mlxops installed from it (-e)"
    if not os.access(INV, os.X_OK):
        return "it needs the clone's own environment: pip install -e '.[dev]'"
    return ""


def _run(argv: Sequence[str], folder: Path, output: int) -> int | None:
    """Run a program in a group of its own; return its status, None if it took too long. Leave none of its processes."""
    with subprocess.Popen(
        argv, cwd=folder, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
    ) as process:
        try:
            return process.wait(DEMO_SECONDS)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a demo that runs, as Ctrl-C does: it then stops its server. Kill what does not end."""
    if process.returncode is not None:
        return
    for number in (signal.SIGINT, signal.SIGKILL):  # the second also for children that outlived their parent
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(DEMO_END_SECONDS)
