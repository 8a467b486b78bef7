"""Locks that are taken with a time limit."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mlxops.agent import __main__ as agent
from mlxops.agent.state import locks


def test_agent_gets_its_lock_while_a_deploy_probes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stamp = tmp_path / "installed.json"
    stamp.touch()
    monkeypatch.setattr(agent, "STAMP", str(stamp))
    probing = os.open(stamp, os.O_RDONLY)
    assert locks.try_flock(probing)
    monkeypatch.setattr("time.sleep", lambda _: os.close(probing))
    before = set(os.listdir("/dev/fd"))
    agent._use_build()
    held = [int(fd) for fd in set(os.listdir("/dev/fd")) - before if os.path.exists(f"/dev/fd/{fd}")]
    other = os.open(stamp, os.O_RDONLY)
    try:
        assert not locks.try_flock(other)
    finally:
        for fd in (other, *held):
            os.close(fd)
