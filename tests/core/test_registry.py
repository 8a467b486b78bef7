"""registry.json: tolerant reading, strict writing, changes of single keys."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mlxops.core.errors import Refused
from mlxops.core.registry import EMPTY, MAX_BYTES, Registry, parse
from tests.properties import PROPERTY, json_values

SEED = b"""{
  "version": 1,
  "models": {
    "jerry-xl": {
      "repo_id": "mlx-community/Qwen3-235B-A22B-Instruct-2507-6bit",
      "model_id": "mlx-community/Qwen3-235B-A22B-Instruct-2507-6bit",
      "cache_path": "/Users/thestudio/models/hf/hub/models--.../snapshots/<sha>",
      "format": "mlx",
      "port": 8100
    }
  }
}
"""
FULL: dict[str, object] = {
    "version": 1,
    "note": "of the operator",
    "models": {
        "jerry-l": {"repo_id": "org/l", "port": "8101", "owner": {"since": [1, 2.5, None]}},
        "jerry-m": {"repo_id": "org/m", "port": 8101, "args": ["--x", "é"], "chat_template": None},
        "odd name": {"port": 70000, "context_length": 0, "trust_remote_code": "yes"},
    },
    "zzz": [{"deep": {"er": "\u2028"}}],
}


def encoded(document: object) -> bytes:
    return json.dumps(document).encode()


def models(**entries: object) -> bytes:
    return encoded({"version": 1, "models": entries})


# -- what is kept ---------------------------------------------------------------------------------------------------

names = st.sampled_from(["a", "b", "org/c", "odd name", ""])
ports = st.integers(8100, 8103)
known = st.sampled_from(["repo_id", "model_id", "cache_path", "format", "revision", "args", "context_length"])
entries = st.dictionaries(known | st.text(max_size=5), json_values, max_size=4).flatmap(
    lambda entry: st.one_of(st.none(), ports, ports.map(str), json_values).map(lambda port: {**entry, "port": port})
)
documents = st.builds(
    lambda extra, found: {**extra, "version": 1, "models": found},
    st.dictionaries(st.text(max_size=5), json_values, max_size=3),
    st.dictionaries(names, entries, max_size=4),
)


@dataclass(frozen=True)
class Change:
    """A change, which entries it may touch and which of their keys."""

    apply: Callable[[Registry], Registry]
    name: str
    keys: frozenset[str]
    text: str

    def __repr__(self) -> str:
        return self.text


def _set(name: str, fields: dict[str, object]) -> Change:
    return Change(lambda r: r.set_fields(name, fields), name, frozenset(fields), f"set {name!r} {fields}")


def _assign(name: str, port: int) -> Change:
    return Change(lambda r: r.assign(name, port), name, frozenset({"port"}), f"assign {name!r} {port}")


def _clear(name: str) -> Change:
    return Change(lambda r: r.clear([name]), name, frozenset({"port"}), f"clear {name!r}")


changes = st.lists(
    st.builds(_set, names, st.dictionaries(known, json_values, max_size=3))
    | st.builds(_assign, names, ports)
    | st.builds(_clear, names),
    max_size=6,
)


@given(documents, changes)
@PROPERTY
def test_unknown_keys_survive_changes_and_a_round_trip(document: dict[str, object], made: list[Change]) -> None:
    registry = parse(encoded(document))
    assert registry.unwritable is None
    for change in made:
        registry = parse(change.apply(registry).encode())
    before, after = document, dict(registry.raw)
    assert list(after) == list(before), "the keys keep their order"
    assert {k: v for k, v in after.items() if k != "models"} == {k: v for k, v in before.items() if k != "models"}
    old, new = before["models"], after["models"]
    assert isinstance(old, dict) and isinstance(new, dict)
    assert [name for name in new if name in old] == list(old)
    assert set(new) == set(old) | {change.name for change in made}
    for name, entry in old.items():
        touched = {"port"}.union(*(change.keys for change in made if change.name == name))
        assert list(new[name])[: len(entry)] == list(entry)
        assert {k: v for k, v in new[name].items() if k not in touched} == {
            k: v for k, v in entry.items() if k not in touched
        }


@given(documents, changes)
@PROPERTY
def test_change_makes_a_new_document(document: dict[str, object], made: list[Change]) -> None:
    registry = parse(encoded(document))
    untouched = copy.deepcopy(registry.raw)
    for change in made:
        change.apply(registry)
    assert registry.raw == untouched
    assert dict(EMPTY.raw) == {"version": 1, "models": {}}


@given(documents, names, ports)
@PROPERTY
def test_assigned_port_has_one_claim(document: dict[str, object], name: str, port: int) -> None:
    before = parse(encoded(document))
    after = before.assign(name, port)
    assert [model.name for model in after.on_port(port)] == [name]
    assert [model.name for model in parse(after.encode()).on_port(port)] == [name]
    others = {m.name: m.port for m in before.models.values() if m.port != port and m.name != name}
    assert {n: after.models[n].port for n in others} == others, "no other assignment moves"


@given(documents, st.lists(names, max_size=3))
@PROPERTY
def test_cleared_entry_has_a_null_port(document: dict[str, object], cleared: list[str]) -> None:
    after = parse(encoded(document)).clear(cleared)
    written = json.loads(after.encode())["models"]
    assert all(after.models[name].port is None and written[name]["port"] is None for name in cleared)


def test_encoded_file_is_indented_by_two() -> None:
    assert parse(SEED).encode() == SEED
    text = parse(encoded(FULL)).encode().decode()
    assert '\n  "note"' in text and '\n    "jerry-l"' in text and text.endswith("}\n") and "é" in text


# -- what is read ---------------------------------------------------------------------------------------------------


def test_seed_document_is_accepted() -> None:
    registry = parse(SEED)
    model = registry.models["jerry-xl"]
    assert (registry.unwritable, model.problems) == (None, ())
    assert (model.port, model.format) == (8100, "mlx")
    assert model.cache_path == "/Users/thestudio/models/hf/hub/models--.../snapshots/<sha>"
    assert model.repo_id == model.model_id == "mlx-community/Qwen3-235B-A22B-Instruct-2507-6bit"


def test_missing_file_is_an_empty_registry() -> None:
    assert parse(None).encode() == b'{\n  "version": 1,\n  "models": {}\n}\n'


def test_byte_order_mark_is_accepted() -> None:
    assert parse(b"\xef\xbb\xbf" + SEED).models["jerry-xl"].port == 8100


def test_port_as_a_string_counts_and_is_a_problem() -> None:
    registry = parse(models(m={"repo_id": "org/m", "port": "8101"}))
    assert [model.name for model in registry.on_port(8101)] == ["m"]
    assert registry.models["m"].problems == ("port '8101' is a string",)
    assert registry.unwritable is None


def test_two_models_on_one_port_are_problems() -> None:
    registry = parse(encoded(FULL))
    assert [model.name for model in registry.on_port(8101)] == ["jerry-l", "jerry-m"]
    assert registry.models["jerry-m"].problems == ("port 8101 is also claimed by 'jerry-l'",)
    assert "port 8101 is also claimed by 'jerry-m'" in registry.models["jerry-l"].problems


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ({"port": 0}, "port 0 is not a TCP port"),
        ({"port": -1}, "port -1 is not a TCP port"),
        ({"port": 65536}, "port 65536 is not a TCP port"),
        ({"port": 8100.0}, "port is not an integer or null"),
        ({"port": True}, "port is not an integer or null"),
        ({"port": "81 00"}, "port is not an integer or null"),
        ({"port": "８１００"}, "port is not an integer or null"),
        ({"port": [8100]}, "port is not an integer or null"),
        ({"repo_id": None}, "repo_id is missing"),
        ({"repo_id": 7}, "repo_id is not a string"),
        ({"repo_id": "../x"}, "repo_id '../x' is not org/name"),
        ({"repo_id": "-o/x"}, "repo_id '-o/x' is not org/name"),
        ({"model_id": "a\0b"}, "model_id is not a string"),
        ({"cache_path": {}}, "cache_path is not a string"),
        ({"args": "--x"}, "args is not a list of strings"),
        ({"args": ["a\0"]}, "args is not a list of strings"),
        ({"args": [1]}, "args is not a list of strings"),
        ({"context_length": True}, "context_length is not a positive integer"),
        ({"context_length": 0}, "context_length is not a positive integer"),
        ({"trust_remote_code": "true"}, "trust_remote_code is not true or false"),
        ({"tool_call_parser": 1}, "tool_call_parser is not a string"),
    ],
)
def test_unusable_value_is_a_problem_and_reads_as_absent(entry: dict[str, object], problem: str) -> None:
    registry = parse(models(m={"repo_id": "org/m", **entry}))
    model = registry.models["m"]
    assert registry.unwritable is None and problem in model.problems
    key = next(iter(entry))
    absent = parse(models(m={"repo_id": "org/m"})).models["m"]
    if key != "repo_id" and key != "tool_call_parser":
        assert getattr(model, key) == getattr(absent, key)


def test_unknown_promise_is_a_problem_and_the_others_count() -> None:
    model = parse(models(m={"repo_id": "org/m", "checks": ["tool", "reasoning", "stream"]})).models["m"]
    assert model.checks == ("reasoning",)
    (problem,) = model.problems
    assert problem.startswith("checks has 'tool', which is none of tools, reasoning, system, json")


def test_only_true_trusts_repository_code() -> None:
    values: list[object] = [1, "true", "yes", None, [], {}]
    assert not any(parse(models(m={"trust_remote_code": v})).models["m"].trust_remote_code for v in values)
    assert parse(models(m={"trust_remote_code": True})).models["m"].trust_remote_code


def test_null_option_differs_from_an_absent_one() -> None:
    entry = {"repo_id": "org/m", "chat_template": None, "reasoning_parser": "qwen3", "revision": "abc"}
    model = parse(models(m=entry)).models["m"]
    assert dict(model.options) == {"chat_template": None, "reasoning_parser": "qwen3"}
    assert (model.revision, model.problems) == ("abc", ())


def test_entry_key_that_is_not_a_name_is_a_problem() -> None:
    registry = parse(models(**{"../etc": {"repo_id": "org/m"}, "org/m": {"repo_id": "org/m"}}))
    assert registry.models["../etc"].problems == ("its key is not a model name",)
    assert registry.models["org/m"].problems == ()


# -- what is never written ------------------------------------------------------------------------------------------


def deep(levels: int) -> bytes:
    return b'{"version": 1, "models": {}, "x": ' + b"[" * levels + b"]" * levels + b"}"


UNWRITABLE: dict[str, bytes] = {
    "empty": b"",
    "white space": b" \n\t",
    "half": SEED[:100],
    "not JSON": b"models: {}",
    "NaN": b'{"version": 1, "models": {}, "x": NaN}',
    "Infinity": b'{"version": 1, "models": {}, "x": -Infinity}',
    "a number that is infinite": b'{"version": 1, "models": {}, "x": 1e999}',
    "a huge integer": b'{"version": 1, "models": {}, "x": ' + b"9" * 5000 + b"}",
    "deep nesting": deep(100_000),
    "nesting that only a reader can take": deep(900),
    "one level too deep": deep(100),
    "a list": b"[]",
    "null": b"null",
    "a NUL": b'{"version": 1,\0 "models": {}}',
    "not UTF-8": b'{"version": 1, "models": {"\xff": {}}}',
    "UTF-16": SEED.decode().encode("utf-16"),
    "lone surrogate": b'{"version": 1, "models": {}, "x": "\\ud800"}',
    "lone surrogate in a key": b'{"version": 1, "models": {"\\udfff": {}}}',
    "no version": b'{"models": {}}',
    "version 0": b'{"version": 0, "models": {}}',
    "version 2": b'{"version": 2, "models": {}, "lanes": {}}',
    "version true": b'{"version": true, "models": {}}',
    "version 1.0": b'{"version": 1.0, "models": {}}',
    "version '1'": b'{"version": "1", "models": {}}',
    "no models": b'{"version": 1}',
    "models a list": b'{"version": 1, "models": []}',
    "models null": b'{"version": 1, "models": null}',
    "entry a string": b'{"version": 1, "models": {"a": "org/a"}}',
    "key twice": b'{"version": 1, "version": 1, "models": {}}',
    "model twice": b'{"version": 1, "models": {"a": {"port": 8100}, "a": {"port": 8101}}}',
    "key of an entry twice": b'{"version": 1, "models": {"a": {"port": 8100, "port": 8101}}}',
    "too large": b'{"version": 1, "models": {}}' + b" " * MAX_BYTES,
}


def assert_never_written(data: bytes) -> None:
    registry = parse(data)
    assert registry.unwritable
    attempts: list[Callable[[], object]] = [
        registry.encode,
        lambda: registry.set_fields("a", {"format": "mlx"}),
        lambda: registry.assign("a", 8100),
        lambda: registry.clear([]),
    ]
    for attempt in attempts:
        with pytest.raises(Refused) as caught:
            attempt()
        assert caught.value.code == "registry_unusable" and caught.value.why and caught.value.hint


@pytest.mark.parametrize("case", UNWRITABLE)
def test_document_that_is_not_version_1_is_never_written(case: str) -> None:
    assert_never_written(UNWRITABLE[case])


@pytest.mark.parametrize("case", UNWRITABLE)
def test_unwritable_reason_is_one_printable_line(case: str) -> None:
    why = parse(UNWRITABLE[case]).unwritable
    assert why is not None and why.isprintable() and len(why) < 250


def test_later_version_is_readable() -> None:
    registry = parse(b'{"version": 2, "models": {"a": {"repo_id": "org/a", "port": 8100}}, "lanes": {}}')
    assert registry.models["a"].port == 8100
    assert registry.unwritable == "its version is '2'; this mlxops writes only version 1"


@pytest.mark.parametrize("whole", [SEED, parse(encoded(FULL)).encode()])
def test_truncated_file_is_never_written(whole: bytes) -> None:
    for length in range(len(whole.rstrip())):
        assert parse(whole[:length]).unwritable, whole[:length]


@given(st.binary(max_size=200))
@example(b"\xef\xbb\xbf")
@example(b"\xff\xfe")
@example(b'{"version": 1, "models": {"a": {"port": 1' + b"0" * 4000 + b"}}}")
@PROPERTY
def test_reading_never_fails(data: bytes) -> None:
    parse(data)


@given(st.sampled_from([SEED, encoded(FULL)]), st.data())
@PROPERTY
def test_damaged_file_is_read_and_stays_readable_after_writing(whole: bytes, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(whole)))
    cut = data.draw(st.integers(0, 3))
    inserted = data.draw(st.binary(max_size=3) | st.sampled_from([b"1e999", b"NaN", b"\\ud800", b"[[[", b'""', b"{}"]))
    registry = parse(whole[:at] + inserted + whole[at + cut :])
    if registry.unwritable is None:
        again = parse(registry.encode())
        assert (again.unwritable, again.raw) == (None, registry.raw)


@given(st.integers(1, 200))
@example(99)
@PROPERTY
def test_nested_document_that_is_accepted_can_be_written(levels: int) -> None:
    registry = parse(deep(levels))
    if registry.unwritable is None:
        assert parse(registry.set_fields("a", {"port": None}).encode()).unwritable is None


@given(json_values)
@PROPERTY
def test_other_json_is_never_written(value: object) -> None:
    if not (isinstance(value, dict) and value.get("version") == 1):
        assert_never_written(encoded(value))


def test_add_leaves_other_entries_alone() -> None:
    before = parse(b'{"version": 1, "mine": 1, "models": {"a": {"repo_id": "org/a", "port": 8100, "note": "x"}}}')
    after = before.add({f"org/m{number}": {"repo_id": f"org/m{number}", "port": None} for number in range(1000)})
    assert after.raw["mine"] == 1 and after.entry("a") == before.entry("a")
    assert len(after.models) == 1001 and after.models["org/m999"].repo_id == "org/m999"
    assert parse(after.encode()).models == after.models
