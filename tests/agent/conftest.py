"""Fixtures of several files of these tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.faultyhub import FaultyHub
from tests.lab.homelab import Homelab
from tests.lab.hub import Hub
from tests.lab.quick import QuickHost


@pytest.fixture
def faulty(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyHub]:
    """A server in front of the hub that misbehaves on request. Downloads of this process go through it."""
    with FaultyHub(hub.url) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        yield running


@pytest.fixture
def host(homelab: Homelab) -> Iterator[QuickHost]:
    """A Studio with the fake engine and three registered models."""
    quick = QuickHost(homelab)
    quick.mlxctl("init").ok()
    yield quick
    quick.studio.sweep()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """The folder of a Hugging Face cache; it does not exist yet."""
    return tmp_path / "hf" / "hub"
