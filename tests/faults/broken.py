"""Invalid registries."""

from __future__ import annotations

import json
import random
from collections.abc import Callable

from mlxops.core import registry as registries
from tests.faults import oracle
from tests.faults.arena import Arena, entry
from tests.lab.quick import MODELS


def trial(arena: Arena, number: int, seed: int) -> tuple[str, list[str]]:
    """Run every command on one invalid registry. None may crash, and none may write an unsupported registry."""
    rng = random.Random(f"{seed} broken {number}")
    arena.sweep()
    good = {name: entry(name, arena.snapshots[name]) for name in MODELS}
    arena.write_registry(good)
    kind = KINDS[number % len(KINDS)]
    data = kind(arena.registry(), rng, arena)
    arena.registry_path.write_bytes(data)
    name = f"{kind.__name__.strip('_')}: {data[:60]!r}"
    wrong: list[str] = []
    for read in ("status", "list"):
        try:
            arena.look(read)
        except Exception as error:  # noqa: BLE001 - that is what is looked for
            wrong.append(f"{read} raised {type(error).__name__}: {error}")
    usable = registries.parse(data).unwritable is None
    for command, args in (
        ("init", {}),
        ("reconcile", {}),
        ("load", {"model": "org/alpha", "port": str(arena.ports[0])}),
        ("unload", {"port": str(arena.ports[0])}),
    ):
        before = arena.registry()
        ended = arena.run(command, **args)
        wrong += oracle.no_bug(ended)
        if not usable:
            wrong += [f"{command} went on: {ended}"] if ended.exit != 3 else []
            wrong += [f"{command} wrote it"] if arena.registry() != before else []
        else:
            wrong += [f"{command} failed: {ended}"] if ended.exit not in {0, 3, 8} else []  # 8: no download
            wrong += _kept(before, arena.registry())
    wrong += oracle.locks_free(arena) + oracle.nothing_hidden(arena)
    return name, wrong + [f"left: {words}" for words in arena.servers().values()]


def _kept(before: bytes, after: bytes) -> list[str]:
    """Foreign data was kept: keys of the document, entries, keys of the entries."""
    old, new = json.loads(before.decode("utf-8-sig")), json.loads(after.decode("utf-8-sig"))
    lost = [key for key in old if key not in new]
    for name, fields in old["models"].items():
        kept = new["models"].get(name)
        lost += [name] if kept is None else [f"{name}.{key}" for key in fields if key not in kept]
    return [f"lost from the registry: {lost}"] if lost else []


Kind = Callable[[bytes, random.Random, Arena], bytes]


def _truncated(data: bytes, rng: random.Random, arena: Arena) -> bytes:
    return data[: rng.randrange(len(data))]


def _flipped(data: bytes, rng: random.Random, arena: Arena) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randrange(1, 4)):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def _with_bom(data: bytes, rng: random.Random, arena: Arena) -> bytes:
    return b"\xef\xbb\xbf" + data


def _other_version(data: bytes, rng: random.Random, arena: Arena) -> bytes:
    document = json.loads(data)
    document["version"] = rng.choice([0, 2, "1", 1.0, True, None, -1, 10**30])
    if rng.random() < 0.3:
        document["lanes"] = document.pop("models")
    return json.dumps(document).encode()


def _twice(data: bytes, rng: random.Random, arena: Arena) -> bytes:
    return (
        data.replace(b'"org/beta"', b'"org/alpha"', 1)
        if rng.random() < 0.5
        else b'{"version":1,"version":1,' + data[1:]
    )


def _strange_ports(data: bytes, rng: random.Random, arena: Arena) -> bytes:
    document = json.loads(data)
    first = arena.ports[0]
    for fields in document["models"].values():
        fields["port"] = rng.choice(
            [str(first), first, -1, 0, 70000, 22, 1.5, True, [], {}, "8100; touch x", "٨", 10**20]
        )
    return json.dumps(document).encode()


def _strange_entries(data: bytes, rng: random.Random, arena: Arena) -> bytes:
    document = json.loads(data)
    odd: list[object] = [None, 1, "x", [], {}, {"repo_id": 1}, {"repo_id": "../x", "cache_path": "\0"}, {"args": "x"}]
    odd += [{"repo_id": "a/b", "cache_path": "/etc/passwd", "port": arena.ports[1], "engine": "../../x"}]
    odd += [{"repo_id": "org/alpha", "cache_path": 7, "revision": "--upload-pack=x", "trust_remote_code": "yes"}]
    document["models"][rng.choice(["x", "", "-x", "a b", "../x", "\x1b[31m", "\u202ex", "org/alpha"])] = rng.choice(odd)
    return json.dumps(document, ensure_ascii=rng.random() < 0.5).encode()


def _not_an_object(data: bytes, rng: random.Random, arena: Arena) -> bytes:
    odd = (b"", b" ", b"[]", b"1", b"null", b'"x"', b"NaN", b"{", b"[" * 5000, b'{"a":' * 3000, b"\0" * 50)
    return rng.choice(odd)


def _not_text(data: bytes, rng: random.Random, arena: Arena) -> bytes:
    return rng.choice(
        [data.decode().encode("utf-16"), data + b"\xff\xfe", data.replace(b"beta", b"b\xe9ta"), rng.randbytes(200)]
    )


def _strange_numbers(data: bytes, rng: random.Random, arena: Arena) -> bytes:
    value = rng.choice(["1e999", "NaN", "-Infinity", "9" * 5000, '"\\ud800"', "1e5"])
    return data.replace(b'"port": null', f'"port": null, "x": {value}'.encode(), 1)


def _with_more(data: bytes, rng: random.Random, arena: Arena) -> bytes:
    document = json.loads(data)
    document["lanes"] = {"a": [1, {"b": None}]}
    document["models"]["org/alpha"]["comment"] = "kept \u00fc\u2028"
    return json.dumps(document).encode()


KINDS: tuple[Kind, ...] = (
    _truncated,
    _flipped,
    _with_bom,
    _other_version,
    _twice,
    _strange_ports,
    _strange_entries,
    _not_an_object,
    _not_text,
    _strange_numbers,
    _with_more,
)
