"""Write the file of `doctor --report`: what was tried on each host, without names."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from mlxops.core.commands.doctor import DoctorResult
from mlxops.core.doctor.assumptions import Assumption, Trial, Verdict, report_text
from mlxops.core.errors import UsageError
from mlxops.core.replies import HostReply

DEMO_SECONDS = 1200.0
_PATHS = re.compile(r"\s*\(/[^)]*\)|/(?:Users|home|root|private|var|tmp|opt)/[^\s:'\"]*")


def check(path: Path) -> None:
    """Raises `UsageError` (report_unwritable) if the file cannot be written: the trials take half a minute."""
    if path.is_dir() or not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise _unwritable(path, "it is a folder, or this account may not write there")


def _unwritable(path: Path, why: str) -> UsageError:
    return UsageError("report_unwritable", f"{path} cannot be written", why=why, hint="name another file")


def write(
    path: Path, replies: Sequence[HostReply[DoctorResult]], note: Callable[[str], None], *, demo: Path | None
) -> None:
    """`demo`: the clone in which to run the demo; None: it is not tried. Raises `UsageError` (report_unwritable)."""
    results = [reply.result for reply in replies if reply.result is not None and reply.result.trials]
    if not results:
        note("no host was tried, so there is no report")
        return
    tried = _demo(demo, note)
    texts = [_text(replace(result, trials=(*result.trials, tried))) for result in results]
    try:
        path.write_text("\n\n".join(texts), encoding="utf-8")
    except OSError as error:
        raise _unwritable(path, error.strerror or str(error)) from None
    note(f"the report is in {path}; read it before you send it")


def _text(result: DoctorResult) -> str:
    facts = {key: _PATHS.sub("", value) for key, value in result.facts.items()}
    return report_text(facts, result.trials, {f"{row.severity} {row.code}" for row in result.findings})


def _demo(clone: Path | None, note: Callable[[str], None]) -> Trial:
    if clone is None:
        return Trial(Assumption.DEMO.value, Verdict.UNTRIED, "it needs --local, in a clone with the extra dev")
    note("running the demo; the first one installs an engine (500 MB)")
    argv = [str(Path(sys.prefix) / "bin" / "inv"), "demo"]
    try:
        done = subprocess.run(
            argv, cwd=clone, stdin=subprocess.DEVNULL, capture_output=True, timeout=DEMO_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Trial(Assumption.DEMO.value, Verdict.FAIL, type(error).__name__)
    if done.returncode == 0:
        return Trial(Assumption.DEMO.value, Verdict.PASS)
    last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
    return Trial(Assumption.DEMO.value, Verdict.FAIL, _PATHS.sub("PATH", " ".join(last))[:300])
