"""A host with a full or read-only disk: `python -m tests.faults.smalldisk full|read-only FOLDER`.

It runs in a mount namespace in which FOLDER is a small tmpfs. Commands go to the agent as they do over SSH.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from mlxops.agent.operations.preflight import STATE_DISK_BYTES
from mlxops.common.build import build_id
from tests.faults import oracle
from tests.faults.arena import Arena
from tests.lab.envelopes import envelope
from tests.lab.leaks import become_subreaper

PAGE = os.sysconf("SC_PAGE_SIZE")
ROOMS = (0, 1, 2, 4, 64, 2 * STATE_DISK_BYTES // PAGE)
"""Free pages: none; enough for a record but not for the registry; for both but not for a server; for everything."""


def main(what: str, folder: Path) -> None:
    become_subreaper()
    arena = Arena(folder / "host")
    try:
        for command in ("init", "reconcile"):
            assert _ask(arena, command)[0] == 0, command
        _full(arena) if what == "full" else _read_only(arena)
    finally:
        arena.sweep()


def _read_only(arena: Arena) -> None:
    before = arena.registry()
    assert os.system(f"mount --bind {arena.hub} {arena.hub} && mount -o remount,ro,bind {arena.hub}") == 0
    status, last = _load(arena)
    assert (status, last["code"]) == (3, "registry_unwritable"), last
    assert "Read-only file system" in str(last["why"]), last
    _nothing_happened(arena, before)
    assert os.system(f"mount -o remount,rw,bind {arena.hub}") == 0
    _works_again(arena)


def _full(arena: Arena) -> None:
    before = arena.registry()
    ended = []
    for room in ROOMS:
        filler = _fill(arena.folder, room)
        status, last = _load(arena)
        ended.append(status)
        if status == 0:
            assert [row["state"] for row in oracle.rows_by_port(arena).values()].count("ready") == 1, room
            assert arena.registry() != before, room
        else:
            # An operation whose own record could not take its last word says that this may be why.
            assert (
                status == 3
                and last["code"] in EXPECTED_REASONS
                and EXPECTED_REASONS[str(last["code"])] in str(last["why"])
            ), (room, last)
            _nothing_happened(arena, before)
            # An operation whose worker never ran was not interrupted, so there is no record of it.
            assert last["code"] == "operation_interrupted" or not oracle.drift_codes(arena), room
            assert all(path.stat().st_size for path in arena.state.glob("ops/*/request.json")), room
        filler.unlink()
        _works_again(arena)
    assert ended[0] == 3 and ended[-1] == 0, ended


EXPECTED_REASONS = {
    "state_unwritable": "No space left",
    "registry_unwritable": "No space left",
    "does_not_fit": "are free",
    # An operation whose own record could not take its last word says that this may be why.
    "operation_interrupted": "its disk is full",
}


def _fill(folder: Path, room: int) -> Path:
    """Fill the disk, except for so many pages."""
    filler = folder / "filler"
    with open(filler, "wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * PAGE)
        except OSError:
            file.truncate(file.tell() - room * PAGE)
    assert os.statvfs(folder).f_bavail == room
    return filler


def _nothing_happened(arena: Arena, before: bytes) -> None:
    assert arena.registry() == before
    wrong = [f"server: {words}" for words in arena.servers().values()]
    wrong += [f"file: {path}" for path in oracle.leftovers(arena)] + oracle.locks_free(arena)
    assert not wrong, wrong


def _works_again(arena: Arena) -> None:
    status, last = _load(arena)
    assert status == 0, last
    assert _ask(arena, "unload", port=str(arena.ports[0]))[0] == 0
    assert _ask(arena, "reconcile")[0] == 0
    wrong = oracle.empty(arena)
    assert not wrong, wrong


def _load(arena: Arena) -> tuple[int, dict[str, object]]:
    return _ask(arena, "load", model="org/alpha", port=str(arena.ports[0]))


def _ask(arena: Arena, command: str, **args: object) -> tuple[int, dict[str, object]]:
    """Return the agent's exit status and its last event, which is the error of a failure."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "mlxops.agent"],
        input=envelope(command, args, arena.settings, build_id()).encode(),
        env=arena.environ,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert not done.stderr, done.stderr.decode()
    last = json.loads(done.stdout.splitlines()[-1])
    return done.returncode, last.get("error") or last


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
    sys.stdout.write("survived\n")
