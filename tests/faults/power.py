"""Power loss during one registry transaction.

Record its system calls. Then build every state that the disk may have if the power fails between two of them. Each
write that was not flushed may be missing or partial. If a folder was not flushed, its names may be old or new.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mlxops.core import registry as registries
from mlxops.core.registry import Registry
from tests.faults import children
from tests.faults.arena import Arena

Writer = Callable[[Path, bytes], None]
TRACED = "openat,write,pwrite64,fsync,fdatasync,rename,renameat,renameat2,unlink,unlinkat,close,ftruncate,truncate"
_LINE = re.compile(r"^(\w+)\((.*)\)\s+= (-?\d+)")
_TEXT = re.compile(r'"((?:\\x[0-9a-f]{2})*)"')


@dataclass(frozen=True)
class Call:
    """One recorded call. `file` numbers what was opened or made, in the order of opening."""

    kind: str
    """write, truncate, flush, link (make or rename), unlink, flush folder"""
    file: int = -1
    data: bytes = b""
    name: str = ""
    source: str = ""


@dataclass
class Disk:
    """The flushed state, and the writes that are not flushed."""

    content: dict[int, bytes] = field(default_factory=dict)
    pending: dict[int, list[Call]] = field(default_factory=dict)
    names: dict[str, int] = field(default_factory=dict)
    changes: list[Call] = field(default_factory=list)

    def take(self, call: Call) -> None:
        match call.kind:
            case "write" | "truncate":
                self.pending.setdefault(call.file, []).append(call)
            case "flush":
                self.content[call.file] = _apply(self.content.get(call.file, b""), self.pending.pop(call.file, []))
            case "link" | "unlink":
                self.changes.append(call)
            case "flush folder":
                for change in self.changes:
                    _change(self.names, change)
                self.changes.clear()

    def states(self, name: str) -> Iterator[bytes | None]:
        """Yield every content that the file `name` may have after the power loss; None: the file is missing."""
        for kept in _subsets(self.changes):
            names = dict(self.names)
            for change in kept:
                _change(names, change)
            file = names.get(name)
            if file is None:
                yield None
                continue
            for writes in _subsets(self.pending.get(file, [])):
                yield _apply(self.content.get(file, b""), writes)
                if writes and len(writes[-1].data) > 1:
                    half = writes[-1].data[: len(writes[-1].data) // 2]
                    yield _apply(self.content.get(file, b""), [*writes[:-1], Call("write", file, half)])


def _subsets(calls: Sequence[Call]) -> Iterator[list[Call]]:
    for count in range(len(calls) + 1):
        for chosen in itertools.combinations(calls, count):
            yield list(chosen)


def _apply(content: bytes, calls: Sequence[Call]) -> bytes:
    for call in calls:
        content = b"" if call.kind == "truncate" else content + call.data
    return content


def _change(names: dict[str, int], change: Call) -> None:
    if change.kind == "unlink":
        names.pop(change.name, None)
    else:
        names[change.name] = change.file
        if change.source:
            names.pop(change.source, None)


def record(log: Path, folder: Path, start: dict[str, bytes]) -> tuple[Disk, list[Call]]:
    """Return the calls of a strace log that touch `folder`, and the disk before them, with the files of `start`."""
    files = itertools.count()
    disk = Disk()
    for name, content in start.items():
        disk.names[name] = next(files)
        disk.content[disk.names[name]] = content
    now = dict(disk.names)
    opened: dict[int, int | str] = {}
    calls: list[Call] = []
    for line in log.read_text(encoding="ascii", errors="replace").splitlines():
        found = _LINE.match(line)
        if found is None or int(found[3]) < 0:
            continue
        name, rest, result = found[1], found[2], int(found[3])
        texts = [bytes.fromhex(text.replace("\\x", "")) for text in _TEXT.findall(rest)]
        first = rest.split(",")[0]
        match name:
            case "openat":
                path = os.fsdecode(texts[0])
                if path == str(folder):
                    opened[result] = "folder"
                elif path.startswith(f"{folder}/"):
                    if path not in now and "O_CREAT" in rest:
                        now[path] = next(files)
                        calls.append(Call("link", now[path], name=path))
                    opened[result] = now[path]
                    if "O_TRUNC" in rest:
                        calls.append(Call("truncate", now[path]))
            case "write" | "pwrite64" if isinstance(file := opened.get(int(first)), int):
                calls.append(Call("write", file, texts[0][:result]))
            case "fsync" | "fdatasync" if (file := opened.get(int(first))) is not None:
                calls.append(Call("flush", file) if isinstance(file, int) else Call("flush folder"))
            case "rename" | "renameat" | "renameat2":
                source, target = (os.fsdecode(text) for text in texts[:2])
                if target.startswith(f"{folder}/"):
                    now[target] = now.pop(source)
                    calls.append(Call("link", now[target], name=target, source=source))
            case "unlink" | "unlinkat" if (path := os.fsdecode(texts[0])) in now:
                now.pop(path)
                calls.append(Call("unlink", name=path))
            case "close":
                opened.pop(int(first), None)
    return disk, calls


def crash_states(disk: Disk, calls: Sequence[Call], name: str) -> Iterator[tuple[int, bytes | None]]:
    """Return (completed calls, content) of each state. The last states are those after the success was reported."""
    yield from ((0, content) for content in disk.states(name))
    for done, call in enumerate(calls, 1):
        disk.take(call)
        yield from ((done, content) for content in disk.states(name))


def trial(arena: Arena, number: int, seed: int, writer: Writer | None = None) -> tuple[str, int, list[str]]:
    """Run one transaction on a random registry. Return its name, its crash states, and their errors.

    `writer` replaces the registry's own writer, for the controls.
    """
    rng = random.Random(f"{seed} power {number}")
    arena.sweep()
    arena.store.create_folders()
    models: dict[str, dict[str, object]] = {
        f"m{index}": {"repo_id": f"org/m{index}", "port": None, "note": "x" * rng.randrange(200)}
        for index in range(rng.randrange(1, 12))
    }
    arena.write_registry(models)
    old = arena.registry()
    name, port = rng.choice(list(models)), arena.ports[0]

    def change(registry: Registry) -> Registry:
        return registry.assign(name, port)

    new = change(registries.parse(old)).encode()

    def body() -> int:
        if writer is None:
            arena.store.registry.update(change)
        else:
            writer(arena.registry_path, new)
        return 0

    log = arena.folder / "power"
    pid = children.fork(body, arena.folder / "power.out", stopped=True)
    tracer = children.traced(pid, ["-xx", "-e", f"trace={TRACED}"], log)
    wrong = [] if children.wait(pid, 30) == 0 else ["the transaction failed"]
    children.wait(tracer, 30)
    path = str(arena.registry_path)
    disk, calls = record(log, arena.hub, {path: old})
    states = 0
    for done, content in crash_states(disk, calls, path):
        states += 1
        if content not in (old, new):
            wrong.append(f"after {done} of {len(calls)} calls: {_shown(content)}")
        elif done == len(calls) and content != new:
            wrong.append("acknowledged and lost")
    return f"transaction {number}: {len(calls)} calls", states, sorted(set(wrong))


def _shown(content: bytes | None) -> str:
    if content is None:
        return "the registry is gone"
    try:
        json.loads(content)
    except ValueError:
        return f"a broken registry of {len(content)} bytes"
    return "another registry"


# The positive controls: writers that people write.


def in_place(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)


def renamed(path: Path, data: bytes) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def flushed(path: Path, data: bytes) -> None:
    """Write without flushing the folder, so that a reported change may be lost."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb", buffering=0) as file:
        file.write(data)
        os.fsync(file.fileno())
    os.replace(temporary, path)


NAIVE: tuple[Writer, ...] = (in_place, renamed, flushed)
