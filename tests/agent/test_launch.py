"""Whose a listener is at the moment of the proof. What is seen of it is given: no system shows it on demand."""

from __future__ import annotations

import os
import shlex
from collections.abc import Container
from pathlib import Path
from typing import cast

import pytest

from mlxops.agent.engines.base import EngineCommand, ServerSpec
from mlxops.agent.engines.mlx_lm import MlxLm
from mlxops.agent.host.system import Listener, Look, System, this_system
from mlxops.agent.paths import host_paths
from mlxops.agent.serving import launch
from mlxops.agent.state.store import Store
from mlxops.common.http import NoCompletion
from mlxops.core.errors import NotStarted
from mlxops.core.registry import Model
from mlxops.core.settings import Settings
from tests.core.worlds import run

RUN = run(port=8103)
NOBODYS = Look(listeners=(Listener("127.0.0.1", RUN.port),))


class Seen:
    """What is seen, look by look; the last one for ever."""

    def __init__(self, *looks: Look) -> None:
        self._looks = list(looks)

    def boot_id(self) -> str:
        return RUN.boot_id

    def environment(self, pid: int, key: str) -> str | None:
        return None

    def look(self, ports: Container[int]) -> Look:
        return self._looks.pop(0) if len(self._looks) > 1 else self._looks[0]


def prove(tmp_path: Path, *looks: Look) -> None:
    paths = host_paths(Settings(hub=str(tmp_path), state=str(tmp_path)), os.environ)
    launch.prove(paths, RUN.alias, RUN, cast(System, Seen(*looks)), 1.0)


def test_a_listener_whose_process_is_just_ending_is_no_stranger(tmp_path: Path) -> None:
    with pytest.raises(ConnectionRefusedError, match="nothing listens on 8103 yet"):
        prove(tmp_path, NOBODYS, Look())


def test_one_whose_process_cannot_be_seen_for_a_while_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "UNSEEN_SECONDS", 0.05)
    with pytest.raises(NoCompletion, match="a process that cannot be seen"):
        prove(tmp_path, NOBODYS)


def test_a_strangers_is_told_at_once_and_nothing_is_sent_to_it(tmp_path: Path) -> None:
    other = Look(listeners=(Listener("127.0.0.1", RUN.port, frozenset({77})),))
    with pytest.raises(NoCompletion, match="pid 77"):
        prove(tmp_path, other)


def failure(tmp_path: Path, *argv: str) -> NotStarted:
    """How a load fails whose server is this command."""
    settings = Settings(hub=str(tmp_path), state=str(tmp_path / "state"))
    paths = host_paths(settings, os.environ)
    store = Store(paths.state, paths.registry)
    store.create_folders()
    serving = ServerSpec(Model("a"), "a", tmp_path, "127.0.0.1", RUN.port, store.run_folder(RUN.port))
    started = launch.Launch(paths, store, this_system(), MlxLm(), EngineCommand(argv[:1], "here"), serving, argv=argv)
    started.launch({}, "org/a", "1", "op")
    with pytest.raises(NotStarted) as caught:
        started.wait(30, lambda event: None)
    started.abort()
    assert shlex.quote(argv[-1]) in started.log.read_text()
    return caught.value


def test_a_command_that_leaves_its_server_alone_is_told_to_stay(tmp_path: Path) -> None:
    assert "what starts it (here) must stay" in failure(tmp_path, "/bin/sh", "-c", "exit 0").hint
    assert "must stay" not in failure(tmp_path, "/bin/sh", "-c", "echo no model; exit 0").hint


def test_what_a_server_says_begins_behind_the_line_with_which_its_log_is_headed(tmp_path: Path) -> None:
    """That line has its whole command, in which anything may stand."""
    error = failure(tmp_path, "/bin/sh", "-c", "exit 3", "ValueError: Model type qwen9 not supported.")
    assert error.why == "it wrote nothing to its log"
