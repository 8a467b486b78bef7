"""registry.json: the models and their ports. Parse, check and change the document. Pure.

Version 1 is `{"version": 1, "models": {name: {repo_id, model_id, cache_path, format, port}}}`. People and other
programs edit the file too. Reading is therefore tolerant: every irregularity becomes a `problem`. Writing is strict:
only single keys change, unknown keys stay, and a document of another version is never written.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import field, replace
from typing import cast

from mlxops.core.errors import Refused
from mlxops.core.frozen import dataclass
from mlxops.core.names import is_name, is_repo_id, shown
from mlxops.core.text import is_argument, utf8

VERSION = 1
MAX_BYTES = 16 * 1024 * 1024
MAX_DEPTH = 100
"""Nesting of objects and lists. It ensures that every document that was read can be written."""

_TEXT_FIELDS = (
    "revision",
    "engine",
    "model_type",
    "chat_template",
    "tool_call_parser",
    "reasoning_parser",
)


@dataclass(frozen=True)
class Model:
    """One entry. Absent and unusable fields are None. `problems` says why a field is unusable."""

    name: str
    repo_id: str | None = None
    model_id: str | None = None
    cache_path: str | None = None
    format: str | None = None
    port: int | None = None
    revision: str | None = None
    engine: str | None = None
    context_length: int | None = None
    trust_remote_code: bool = False
    args: tuple[str, ...] = ()
    checks: tuple[str, ...] | None = None
    """What the model promises, such as `tools` (see `conformance`). None: its family decides; empty: nothing."""
    options: Mapping[str, str | None] = field(default_factory=dict)
    """The optional text fields that are present, including nulls, which switch a default off."""
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class Registry:
    """A registry document, and the typed view of it.

    `raw` is the parsed document, which is never mutated. `unwritable` says why the file must not be written. `missing`
    is set if the file is gone: it was there before, or it should be there.
    """

    raw: Mapping[str, object]
    models: Mapping[str, Model]
    unwritable: str | None = None
    missing: bool = False

    def on_port(self, port: int) -> tuple[Model, ...]:
        """Return the models that are assigned to `port`. Only a hand edit makes them more than one."""
        return tuple(model for model in self.models.values() if model.port == port)

    def with_repo(self, repo_id: str) -> tuple[Model, ...]:
        return tuple(model for model in self.models.values() if model.repo_id == repo_id)

    def named(self, name: str) -> Model | None:
        """Return the entry of that name, else the first of that repository; None if there is neither."""
        return self.models.get(name) or next(iter(self.with_repo(name)), None)

    def set_fields(self, name: str, fields: Mapping[str, object]) -> Registry:
        """Set these fields of the entry `name`, and create it if it is missing. Its other keys stay."""
        return self._with_entries({name: {**self.entry(name), **fields}})

    def add(self, entries: Mapping[str, Mapping[str, object]]) -> Registry:
        """Add or replace whole entries in one step: each single change checks the whole registry again."""
        return self._with_entries(entries)

    def without_fields(self, name: str, keys: Iterable[str]) -> Registry:
        """Remove these keys from the entry `name`."""
        removed = frozenset(keys)
        entry = {key: value for key, value in self.entry(name).items() if key not in removed}
        return self._with_entries({name: entry})

    def assign(self, name: str, port: int) -> Registry:
        """Return a registry that assigns `port` to `name` and to no other entry."""
        entries: dict[str, dict[str, object]] = {
            other.name: {**self.entry(other.name), "port": None} for other in self.on_port(port) if other.name != name
        }
        entries[name] = {**self.entry(name), "port": port}
        return self._with_entries(entries)

    def clear(self, names: Iterable[str]) -> Registry:
        """Clear the ports of these entries."""
        return self._with_entries({name: {**self.entry(name), "port": None} for name in names})

    def encode(self) -> bytes:
        """Return the file's content: JSON, indented by 2, with a line end. Raises `Refused` if `unwritable` is set."""
        if self.unwritable:
            raise refusal(self.unwritable)
        return (json.dumps(self.raw, indent=2, ensure_ascii=False) + "\n").encode()

    def entry(self, name: str) -> dict[str, object]:
        """Return the entry as it is in the file, with every key; empty if there is none."""
        models = self.raw.get("models")
        entry = models.get(name) if isinstance(models, dict) else None
        return dict(entry) if isinstance(entry, dict) else {}

    def _with_entries(self, entries: Mapping[str, Mapping[str, object]]) -> Registry:
        if self.unwritable:
            raise refusal(self.unwritable)
        models = {**cast(dict[str, object], self.raw["models"]), **{k: dict(v) for k, v in entries.items()}}
        return _view({**self.raw, "models": models}, None)


def refusal(why: str, path: str = "", hint: str = "repair it by hand, then try again") -> Refused:
    """Return the error for a registry that must not be written; `path` is its file."""
    return Refused("registry_unusable", f"the registry {path}".strip() + " cannot be changed", why=why, hint=hint)


EMPTY = Registry(raw={"version": VERSION, "models": {}}, models={})


def parse(data: bytes | None) -> Registry:
    """Parse a file's content. None (no file) is an empty registry. Never raises: see `unwritable`."""
    if data is None:
        return EMPTY
    if len(data) > MAX_BYTES:
        return _broken(f"it is larger than {MAX_BYTES} bytes")
    duplicates: list[str] = []

    def checked_object(items: list[tuple[str, object]]) -> dict[str, object]:
        pairs = dict(items)
        if len(pairs) != len(items):
            duplicates.append(next(key for i, (key, _) in enumerate(items) if key in dict(items[:i])))
        return pairs

    def constant(text: str) -> object:
        raise ValueError(f"{text} is not JSON")

    try:
        text = utf8(data)
    except ValueError as error:
        return _broken(str(error))
    try:
        document = json.loads(text, object_pairs_hook=checked_object, parse_constant=constant)
        # 1e999 is JSON and reads as infinity, which is not.
        json.dumps(document, allow_nan=False)
    except (ValueError, RecursionError) as error:
        return _broken(f"it is not JSON: {str(error)[:120]}" if data.strip() else "it is empty")
    if not isinstance(document, dict):
        return _broken("it is not a JSON object")
    if _too_deep(document):
        return _broken(f"it is nested more than {MAX_DEPTH} levels deep")
    return _view(document, _why_unwritable(document, duplicates))


def _too_deep(document: object) -> bool:
    level = [document]
    for _ in range(MAX_DEPTH):
        if not level:
            return False
        level = [inner for value in level for inner in _inside(value)]
    return bool(level)


def _inside(value: object) -> Iterable[object]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _broken(why: str) -> Registry:
    return Registry(raw={}, models={}, unwritable=why)


def _why_unwritable(document: Mapping[str, object], duplicates: list[str]) -> str | None:
    version = document.get("version")
    if type(version) is not int or version != VERSION:
        return f"its version is {shown(json.dumps(version))}; this mlxops writes only version {VERSION}"
    models = document.get("models")
    if not isinstance(models, dict):
        return "its 'models' is not an object"
    if duplicates:
        return f"the key {shown(duplicates[0])} appears twice in one object"
    for name, entry in models.items():
        if not isinstance(entry, dict):
            return f"the entry {shown(name)} is not an object"
    try:
        json.dumps(document, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return "it holds text that is not valid Unicode"
    return None


def _view(document: Mapping[str, object], unwritable: str | None) -> Registry:
    entries = document.get("models")
    models = {
        name: _model(name, entry)
        for name, entry in (entries.items() if isinstance(entries, dict) else ())
        if isinstance(entry, dict)
    }
    return Registry(raw=document, models=_with_conflicts(models), unwritable=unwritable)


def _with_conflicts(models: dict[str, Model]) -> dict[str, Model]:
    by_port: dict[int, list[str]] = {}
    for model in models.values():
        if model.port is not None:
            by_port.setdefault(model.port, []).append(model.name)
    for port, names in by_port.items():
        if len(names) > 1:
            for name in names:
                others = ", ".join(shown(other) for other in names if other != name)
                models[name] = _with_problem(models[name], f"port {port} is also claimed by {others}")
    return models


def _with_problem(model: Model, problem: str) -> Model:
    return replace(model, problems=(*model.problems, problem))


def _model(name: str, entry: Mapping[str, object]) -> Model:
    problems: list[str] = []

    def text(key: str) -> str | None:
        value = entry.get(key)
        if value is None or (isinstance(value, str) and is_argument(value)):
            return value
        problems.append(f"{key} is not a string")
        return None

    if not (is_name(name) or is_repo_id(name)):
        problems.append("its key is not a model name")
    repo_id = text("repo_id")
    if repo_id is None:
        problems.append("repo_id is missing")
    elif not is_repo_id(repo_id):
        problems.append(f"repo_id {shown(repo_id)} is not org/name")
        repo_id = None
    args = entry.get("args", [])
    if not isinstance(args, list) or not all(isinstance(arg, str) and is_argument(arg) for arg in args):
        problems.append("args is not a list of strings")
        args = []
    context = entry.get("context_length")
    if context is not None and (type(context) is not int or not 0 < context < 2**63):
        problems.append("context_length is not a positive integer")
        context = None
    trust = entry.get("trust_remote_code", False)
    if not isinstance(trust, bool):
        problems.append("trust_remote_code is not true or false")
        trust = False
    checks = _checks(entry, problems)
    fields = {key: text(key) for key in _TEXT_FIELDS if key in entry}
    return Model(
        name=name,
        repo_id=repo_id,
        model_id=text("model_id"),
        cache_path=text("cache_path"),
        format=text("format"),
        port=_port(entry.get("port"), problems),
        revision=fields.pop("revision", None),
        engine=fields.pop("engine", None),
        context_length=context,
        trust_remote_code=trust,
        args=tuple(args),
        checks=checks,
        options=fields,
        problems=tuple(problems),
    )


def _checks(entry: Mapping[str, object], problems: list[str]) -> tuple[str, ...] | None:
    """Return what an entry promises. A null promises nothing. An unknown name is a problem, and left out."""
    checks = entry.get("checks", [])
    if checks is not None and not (isinstance(checks, list) and all(isinstance(each, str) for each in checks)):
        problems.append("checks is not a list of strings")
        return None
    if not checks:
        return () if "checks" in entry else None
    from mlxops.core.conformance import PROMISES

    known = [str(each) for each in PROMISES]
    if unknown := [each for each in checks if each not in known]:
        problems.append(f"checks has {shown(unknown[0])}, which is none of {', '.join(known)}, and is ignored")
    return tuple(each for each in checks if each in known)


def _port(value: object, problems: list[str]) -> int | None:
    """Return the port of an entry. A hand-written "8100" counts as 8100 and is reported as a problem."""
    if value is None:
        return None
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 5:
        problems.append(f"port {shown(value)} is a string")
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        problems.append("port is not an integer or null")
        return None
    if not 1 <= value <= 65535:
        problems.append(f"port {value} is not a TCP port")
        return None
    return value
