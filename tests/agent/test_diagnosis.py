"""Failures of the real mlx-lm, and how they are explained: the table of causes matches its messages.

The engine is started by a script, so its version is unknown. Checks that need the version are then skipped, as for a
launcher with its own environment, and the errors come from the engine itself.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.lab import cache, models
from tests.lab.homelab import Homelab, Studio
from tests.lab.world import wait_until
from tests.steps import quiet

REPO = "tiny-org/spoiled"


@pytest.fixture
def studio(homelab: Homelab) -> Studio:
    """Return a studio with a registered model that a test can spoil, and with the engine behind a script."""
    studio = homelab.studio
    launcher = studio.folder / "launcher"
    engine = cache.engine_venv("mlx-lm") / "bin" / "mlx_lm.server"
    launcher.write_text(
        f"#!/bin/sh\ntouch {studio.folder}/begun\n[ -e {studio.folder}/wait ] && while [ ! -e {studio.folder}/go ]; "
        f'do sleep 0.05; done\nexec {engine} "$@"\n'
    )
    launcher.chmod(0o755)
    homelab.configure(launch={"mlx-lm": [str(launcher)]})
    studio.install(REPO, models.QWEN)
    studio.mlxctl("init").ok()
    return studio


def replaced(studio: Studio, name: str, text: str) -> None:
    """Replace the content of a file of the snapshot."""
    path = Path(studio.registry()["models"][REPO]["cache_path"]) / name
    path.unlink()
    path.write_text(text, encoding="utf-8")


def failure(studio: Studio) -> Any:
    """Return the error of a load that must fail and leave nothing behind."""
    port = studio.ports[0]
    done = studio.mlxctl("load", REPO, str(port), "--json", "--timeout", "60")
    assert done.exit == 4, done
    quiet(studio)
    assert studio.registry()["models"][REPO]["port"] is None
    return done.json["hosts"][0]["error"]


def of_another_architecture(studio: Studio) -> None:
    path = Path(studio.registry()["models"][REPO]["cache_path"]) / "config.json"
    replaced(studio, "config.json", json.dumps(json.loads(path.read_text()) | {"model_type": "qwen9"}))


def of_another_width(studio: Studio) -> None:
    path = Path(studio.registry()["models"][REPO]["cache_path"]) / "config.json"
    replaced(studio, "config.json", json.dumps(json.loads(path.read_text()) | {"intermediate_size": 64}))


def with_a_broken_template(studio: Studio) -> None:
    replaced(studio, "chat_template.jinja", "{% for m in messages %}{{ m.content }}")


@pytest.mark.parametrize(
    ("spoil", "cause", "says"),
    [
        (of_another_architecture, "unknown_architecture", "'qwen9'"),
        (with_a_broken_template, "no_chat_template", "chat_template"),
        (of_another_width, "files_do_not_fit", "Expected shape (64, 64) but received shape (128, 64)"),
    ],
)
def test_failed_start_is_explained(studio: Studio, spoil: Callable[[Studio], None], cause: str, says: str) -> None:
    spoil(studio)
    error = failure(studio)
    assert error["details"]["cause"] == cause, error
    assert says in f"{error['why']} {error['hint']}", error


@contextmanager
def starting(studio: Studio) -> Iterator[Future[Any]]:
    """Start a load that must fail, and hold its engine at its start, after all checks have passed."""
    (studio.folder / "wait").touch()
    with ThreadPoolExecutor() as pool:
        failing = pool.submit(failure, studio)
        wait_until((studio.folder / "begun").exists, 30, "the engine's start")
        try:
            yield failing
        finally:
            (studio.folder / "go").touch()


def test_deleted_files_are_reported_as_missing(studio: Studio) -> None:
    with starting(studio) as failing:
        path = Path(studio.registry()["models"][REPO]["cache_path"])
        for file in path.glob("*.safetensors"):
            file.unlink()
    error = failing.result()
    assert error["details"]["cause"] == "files_missing", error
    assert REPO in error["hint"], error


def test_port_taken_during_the_start_is_reported(studio: Studio) -> None:
    with starting(studio) as failing, socket.create_server((studio.address, studio.ports[0])):
        error = failing.result()
    assert error["details"]["cause"] == "port_taken", error
    assert "mlxctl status" in error["hint"], error
