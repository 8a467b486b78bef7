"""The owner of a listener at the proof, and the errors of a failed start. Observations are scripted."""

from __future__ import annotations

import os
import shlex
from collections.abc import Container
from pathlib import Path
from typing import cast

import pytest

from mlxops.agent.engines.base import EngineCommand, ServerSpec
from mlxops.agent.engines.mlx_lm import MlxLm
from mlxops.agent.host.system import Listener, ProcessTable, System, this_system
from mlxops.agent.paths import host_paths
from mlxops.agent.serving import launch
from mlxops.agent.serving.ending import Terms
from mlxops.agent.state.store import Store
from mlxops.common.http import NoCompletion
from mlxops.core.errors import NotStarted
from mlxops.core.registry import Model
from mlxops.core.settings import Settings
from tests.core.worlds import run

RUN = run(port=8103)
WITHOUT_PROCESS = ProcessTable(listeners=(Listener("127.0.0.1", RUN.port),))


class ScriptedSystem:
    """Returns the given observations one after the other, then the last one again and again."""

    def __init__(self, *looks: ProcessTable) -> None:
        self._looks = list(looks)

    def boot_id(self) -> str:
        return RUN.boot_id

    def environment(self, pid: int, key: str) -> str | None:
        return None

    def process_table(self, ports: Container[int]) -> ProcessTable:
        return self._looks.pop(0) if len(self._looks) > 1 else self._looks[0]


def prove(tmp_path: Path, *looks: ProcessTable) -> None:
    paths = host_paths(Settings(hub=str(tmp_path), state=str(tmp_path)), os.environ)
    launch.prove(paths, RUN.alias, RUN, cast(System, ScriptedSystem(*looks)), 1.0)


def test_listener_whose_process_is_just_ending_is_not_foreign(tmp_path: Path) -> None:
    with pytest.raises(ConnectionRefusedError, match="nothing listens on 8103 yet"):
        prove(tmp_path, WITHOUT_PROCESS, ProcessTable())


def test_listener_whose_process_stays_invisible_is_foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "UNSEEN_SECONDS", 0.05)
    with pytest.raises(NoCompletion, match="a process that cannot be seen"):
        prove(tmp_path, WITHOUT_PROCESS)


def test_foreign_listener_is_reported_at_once_and_gets_no_request(tmp_path: Path) -> None:
    other = ProcessTable(listeners=(Listener("127.0.0.1", RUN.port, frozenset({77})),))
    with pytest.raises(NoCompletion, match="pid 77"):
        prove(tmp_path, other)


def failure(tmp_path: Path, *argv: str) -> NotStarted:
    """Start this command as a server; return the error."""
    settings = Settings(hub=str(tmp_path), state=str(tmp_path / "state"))
    paths = host_paths(settings, os.environ)
    store = Store(paths.state, paths.registry)
    store.create_folders()
    serving = ServerSpec(Model("a"), "a", tmp_path, "127.0.0.1", RUN.port, store.run_folder(RUN.port))
    started = launch.Launch(paths, store, this_system(), MlxLm(), EngineCommand(argv[:1], "here"), serving, argv=argv)
    started.launch({}, "org/a", "1", "op")
    with pytest.raises(NotStarted) as caught:
        started.wait(30, lambda event: None)
    started.abort(Terms("load"))
    assert shlex.quote(argv[-1]) in started.log.read_text()
    return caught.value


def test_launcher_that_exits_gets_a_hint(tmp_path: Path) -> None:
    assert "its launcher (here) must run" in failure(tmp_path, "/bin/sh", "-c", "exit 0").hint
    assert "must run" not in failure(tmp_path, "/bin/sh", "-c", "echo no model; exit 0").hint


def test_first_line_of_the_log_is_not_searched_for_errors(tmp_path: Path) -> None:
    """That line has the whole command, which may contain words of an error."""
    error = failure(tmp_path, "/bin/sh", "-c", "exit 3", "ValueError: Model type qwen9 not supported.")
    assert error.why == "it wrote nothing to its log"
