"""The kernel's count of processes killed for memory, of both versions of control groups, and the room that is left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlxops.agent.host import oom
from mlxops.core.doctor.incidents import killed_pids

VERSIONS = {
    2: ("0::/a/b\n", "a/b/memory.events", "low 0\noom 3\noom_kill 2\n", "a/b/memory.max", "a/b/memory.current"),
    1: (
        "5:cpu:/x\n4:memory:/a/b\n0::/a/b\n",
        "memory/a/b/memory.oom_control",
        "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n",
        "memory/a/b/memory.limit_in_bytes",
        "memory/a/b/memory.usage_in_bytes",
    ),
}


@pytest.mark.parametrize("version", VERSIONS)
def test_kills_and_room_of_a_process_are_read(tmp_path: Path, version: int) -> None:
    membership, counter, counts, limit, used = VERSIONS[version]
    groups, processes = tmp_path / "groups", tmp_path / "proc"
    (processes / "17").mkdir(parents=True)
    (processes / "17" / "cgroup").write_text(membership)
    (groups / counter).parent.mkdir(parents=True)
    (groups / counter).write_text(counts)
    (groups / limit).write_text("1000\n")
    (groups / used).write_text("400\n")
    assert oom.counter_of(17, groups, processes) == groups / counter
    assert oom.kills(groups / counter) == 2
    assert oom.room_of(17, groups, processes) == 600
    (groups / limit).write_text("max\n" if version == 2 else f"{2**63 - 4096}\n")
    assert oom.room_of(17, groups, processes) is None


def test_missing_group_is_no_evidence(tmp_path: Path) -> None:
    assert oom.counter_of(17, tmp_path, tmp_path) is None and oom.room_of(17, tmp_path, tmp_path) is None
    assert oom.kills(None) is None and oom.kills(tmp_path / "gone") is None


def test_jetsam_report_names_the_killed_processes() -> None:
    rows = [{"pid": 17, "reason": "per-process-limit", "name": "python3.12"}, {"pid": 18, "name": "zsh"}]
    report = "\n".join(map(json.dumps, ({"bug_type": "298"}, {"processes": rows})))
    assert killed_pids(report) == {17}
    assert killed_pids('{"bug_type": "210"}\n{}') == frozenset()
