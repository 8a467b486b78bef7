"""What other programs rely on: codes, JSON keys, statuses, names of events and of files on a host's disk.

`contract.json` is what the version before had. More is fine; a name that is gone breaks somebody's script, or a host
whose files an earlier version wrote. To write it anew, on purpose: `python -m tests.test_contract`.
"""

from __future__ import annotations

import ast
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import mlxops
from mlxops.core import errors, protocol
from mlxops.core.drift import Drift, DriftCode
from mlxops.core.errors import Exit
from mlxops.core.ports import Owner, PortView, State
from mlxops.core.records import Operation, Run
from mlxops.core.registry import Model
from mlxops.core.settings import AGREED, Settings

GOLDEN = Path(__file__).with_name("contract.json")
PACKAGE = Path(mlxops.__file__).parent
CODES = {"error codes", "drift codes", "gateway findings"}
KINDS = {
    name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, errors.MlxopsError)
}


def present() -> dict[str, list[str]]:
    """What this version has, each as sorted texts."""
    calls = list(_calls())
    return {
        "error codes": sorted({code for kind, code in calls if kind in KINDS}),
        "drift codes": sorted(DriftCode),
        "gateway findings": sorted({code for kind, code in calls if kind == "Finding"}),
        "exit statuses": sorted(f"{each.name} {int(each)}" for each in Exit),
        "port states": sorted(State),
        "owners": sorted(Owner),
        "keys of a port": sorted(PortView(8100, None, State.IDLE).to_wire()),
        "keys of a drift": sorted(each.name for each in fields(Drift)),
        "keys of a run record": sorted(each.name for each in fields(Run)),
        "keys of a lock's holder": sorted(each.name for each in fields(Operation)),
        "keys of a registry entry": sorted(each.name for each in fields(Model)),
        "keys of host.json": sorted(Settings().to_wire()),
        "settings that hosts agree on": sorted(AGREED),
        "events and their keys": sorted(_events()),
    }


def _calls() -> Iterator[tuple[str, str]]:
    """(the class, its literal first argument) of every call that has one."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
                name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
                if isinstance(node.args[0].value, str):
                    yield name, node.args[0].value


def _events() -> Iterator[str]:
    """The words that say which event a line of the wire is."""
    for event in (
        protocol.Hello("1", ""),
        protocol.Started(""),
        protocol.LogLine(""),
        protocol.Reached(""),
        protocol.Note(""),
        protocol.Phase("check", ""),
        protocol.Progress("download", 0, 0),
        protocol.Done({}),
        protocol.Failed(errors.Refused("code", "what")),
    ):
        wire = json.loads(protocol.encode_event(event))
        yield from (f"{wire['event']}.{key}" for key in wire)


def _literals(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_nothing_that_other_programs_rely_on_is_gone() -> None:
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    now = present()
    # A code may have moved to where it is no longer the first argument of its class.
    literals = {text for path in PACKAGE.rglob("*.py") for text in _literals(path)}
    gone = {
        what: [
            name
            for name in names
            if name not in now.get(what, ()) and not (what in CODES and name.split()[0] in literals)
        ]
        for what, names in golden.items()
    }
    assert {what: names for what, names in gone.items() if names} == {}


if __name__ == "__main__":
    os.chdir(Path(__file__).parents[1])
    GOLDEN.write_text(json.dumps(present(), indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(f"{GOLDEN.name}: {sum(map(len, present().values()))} names\n")
