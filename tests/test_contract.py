"""What other programs rely on: codes, JSON keys, statuses, names of events, keys of files on a host's disk.

`contract.json` has the names of the last version. New names are fine. A removed name breaks a user's script, or a host
with files of an earlier version. To rewrite the file on purpose: `python -m tests.test_contract`.
"""

from __future__ import annotations

import ast
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import mlxops
from mlxops.core import errors, protocol
from mlxops.core.command import request_type
from mlxops.core.commands.status import PortRow
from mlxops.core.drift import Drift, DriftCode
from mlxops.core.errors import Exit
from mlxops.core.ports import Owner, State
from mlxops.core.records import Operation, Run
from mlxops.core.registry import Model
from mlxops.core.settings import AGREED, Settings
from mlxops.tasks import command_names

GOLDEN = Path(__file__).with_name("contract.json")
PACKAGE = Path(mlxops.__file__).parent
CODES = {"error codes", "drift codes", "gateway findings"}
KINDS = {
    name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, errors.MlxopsError)
}


def present() -> dict[str, list[str]]:
    """Return the names that this version has, sorted."""
    calls = list(_calls())
    return {
        "error codes": sorted({code for kind, code in calls if kind in KINDS}),
        "drift codes": sorted(DriftCode),
        "gateway findings": sorted({code for kind, code in calls if kind == "Finding"}),
        "exit statuses": sorted(f"{each.name} {int(each)}" for each in Exit),
        "port states": sorted(State),
        "owners": sorted(Owner),
        "keys of a port": sorted(each.name for each in fields(PortRow) if each.name != "probe"),
        "keys of a drift": sorted(each.name for each in fields(Drift)),
        "keys of a run record": sorted(each.name for each in fields(Run)),
        "keys of a lock's holder": sorted(each.name for each in fields(Operation)),
        "keys of a registry entry": sorted(each.name for each in fields(Model)),
        "keys of host.json": sorted(Settings().to_wire()),
        "settings that hosts agree on": sorted(AGREED),
        "events and their keys": sorted(_events()),
        "keys of results": sorted(_result_keys()),
    }


def _result_keys() -> Iterator[str]:
    """Yield each JSON key of each command's result, such as `status.ports.port`."""
    for name in command_names():
        kind = request_type(name).result
        if is_dataclass(kind):
            yield from _keys(name, kind)


def _keys(path: str, kind: type) -> Iterator[str]:
    hints = get_type_hints(kind)
    for each in fields(kind):
        yield f"{path}.{each.name}"
        for inner in _dataclasses(hints[each.name]):
            yield from _keys(f"{path}.{each.name}", inner)


def _dataclasses(hint: Any) -> Iterator[type]:
    """Yield the dataclasses of an annotation such as `tuple[PortRow, ...] | None`."""
    if isinstance(hint, type) and is_dataclass(hint):
        yield hint
    for part in get_args(hint):
        yield from _dataclasses(part)


def _calls() -> Iterator[tuple[str, str]]:
    """Yield (class, literal first argument) of each call that has one."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
                name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
                if isinstance(node.args[0].value, str):
                    yield name, node.args[0].value


def _events() -> Iterator[str]:
    """Yield `event.key` of each event."""
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


def missing() -> dict[str, list[str]]:
    """Return the names of `contract.json` that this version does not have."""
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    now = present()
    return {kind: sorted(set(names) - set(now.get(kind, ()))) for kind, names in golden.items()}


def elsewhere(kind: str, names: list[str]) -> set[str]:
    """Return the codes that are no longer the first argument of their class, but still a text in the source."""
    literals = {text for path in PACKAGE.rglob("*.py") for text in _literals(path)} if kind in CODES else set()
    return {name for name in names if name.split()[0] in literals}


def test_recorded_names_of_the_contract_still_exist() -> None:
    gone = {kind: set(names) - elsewhere(kind, names) for kind, names in missing().items()}
    assert {kind: names for kind, names in gone.items() if names} == {}


if __name__ == "__main__":
    os.chdir(Path(__file__).parents[1])
    contract = present()
    for kind, names in missing().items():
        contract[kind] = sorted({*contract.get(kind, ()), *elsewhere(kind, names)})
    GOLDEN.write_text(json.dumps(contract, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(f"{GOLDEN.name}: {sum(map(len, contract.values()))} names\n")
