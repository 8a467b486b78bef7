"""Tables of the manual and the README that follow from the code.

`python -m tests.docs_tables` writes them into the pages, between `<!-- generated: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import Field, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Protocol, Union, get_args, get_origin, get_type_hints

from mlxops.agent.engines import ENGINES
from mlxops.cli.field_docs import field_docs
from mlxops.cli.manual import DOCS
from mlxops.cli.program import positional_form
from mlxops.core.command import Group, Hosts, request_type
from mlxops.core.conformance import Check, Mark
from mlxops.core.doctor.assumptions import Assumption
from mlxops.core.doctor.findings import FindingCode, Level
from mlxops.core.drift import DriftCode
from mlxops.core.errors import Exit
from mlxops.core.metrics import FAMILIES
from mlxops.core.ports import Owner, State
from mlxops.tasks import command_names, overview_entries
from tests import completion_words

PAGES = (Path(__file__).parents[1] / "README.md", *sorted(DOCS.glob("*.md")))
RESULTS: Mapping[str, type] = {
    name: kind.result
    for name in command_names()
    for kind in [request_type(name)]
    if kind.group is not Group.HIDDEN and is_dataclass(kind.result)
}
"""Command -> the dataclass of its result, for the manual's page on JSON."""
_BLOCK = re.compile(r"(?P<start><!-- generated: (?P<name>[a-z]+) -->\n).*?(?P<end><!-- end -->)", re.DOTALL)
_WORDS: Mapping[object, str] = {
    str: "text",
    int: "integer",
    float: "number",
    bool: "true or false",
    types.NoneType: "null",
    object: "any",
    Any: "any",
}


class Described(Protocol):
    @property
    def value(self) -> object: ...

    @property
    def meaning(self) -> str: ...


def meanings(heading: str, members: Iterable[Described]) -> str:
    """Return a table of the members of an enum and what each means."""
    return table((heading, "meaning"), ((f"`{each.value}`", each.meaning) for each in members))


def metrics() -> str:
    """Return the table of what `serve` exports."""
    rows = ((f"`{each.name}`", ", ".join(each.labels), each.help) for each in FAMILIES)
    return table(("metric", "labels", "meaning"), rows)


def findings(codes: Iterable[FindingCode]) -> str:
    """Return the table of what `doctor` can report."""
    rows = ((f"`{each.value}`", each.level.value, each.meaning, _shown(each.remedy)) for each in codes)
    return table(("finding", "severity", "meaning", "what to do"), rows)


def _shown(remedy: str) -> str:
    """Return a remedy with its fields as words: `{path}` becomes PATH."""
    return re.sub(r"\{([a-z]+)\}", lambda match: match[1].upper(), remedy).replace("{{", "{").replace("}}", "}")


def table(columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [columns, ("---",) * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def json_fields(results: Mapping[str, type]) -> str:
    """Return a section for each command, then one for each dataclass inside their results."""
    inner: dict[str, type] = {}
    sections = [_section(f"`{command}`", result, inner) for command, result in results.items()]
    written: set[str] = set()
    while missing := [name for name in inner if name not in written]:
        for name in missing:
            sections.append(_section(name, inner[name], inner))
            written.add(name)
    return "\n\n".join(sections)


def _section(title: str, kind: type, inner: dict[str, type]) -> str:
    """Return the table of a dataclass. Adds the dataclasses that its fields name to `inner`."""
    hints = get_type_hints(kind)
    helps = field_docs(kind)
    rows = ((f"`{each.name}`", _type(each, hints, inner), _help(each, helps)) for each in fields(kind))
    return "\n\n".join([f"### {title}", *_about(kind), table(("field", "type", "meaning"), rows)])


def _about(kind: type) -> list[str]:
    """Return the first paragraph of the docstring, unless `dataclass` made it."""
    doc = kind.__dict__.get("__doc__") or ""
    return [] if doc.partition("(")[0] in ("", kind.__name__) else [_in_json(doc.partition("\n\n")[0])]


def _type(each: Field[Any], hints: Mapping[str, Any], inner: dict[str, type]) -> str:
    text = json_type(hints[each.name], inner)
    return f"{text.removesuffix(' or null')}, or left out" if each.metadata.get("omit") else text


def _help(each: Field[Any], helps: Mapping[str, str]) -> str:
    return _in_json(helps.get(each.name, ""))


def _in_json(text: str) -> str:
    return re.sub(r"\bNone\b", "null", " ".join(text.split()))


def json_type(annotation: Any, inner: dict[str, type]) -> str:
    """Return the annotation in the words of JSON. Adds the dataclasses that it names to `inner`."""
    if annotation in _WORDS:
        return _WORDS[annotation]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(json_type(each, inner) for each in arguments)
    if is_dataclass(annotation) and isinstance(annotation, type):
        inner.setdefault(annotation.__name__, annotation)
        return annotation.__name__
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return _WORDS[int if issubclass(annotation, int) else str]
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return f"object of {json_type(arguments[1], inner)}"
    if origin is not None and arguments:
        return f"list of {json_type(arguments[0], inner)}"
    return "object"


def commands() -> str:
    """Return the commands of `mlxctl` in their groups, as `mlxctl --help` shows them."""
    rows: list[tuple[str, ...]] = []
    for entry in overview_entries():
        if entry.group == "develop":
            continue
        if (heading := f"**{entry.group}**") not in {first for first, _ in rows}:
            rows.append((heading, ""))
        rows.append((f"`{entry.example}`", entry.help.removesuffix(".")))
    return table(("command", "what it does"), rows)


SIX = ("status", "list", "load", "ops", "probe", "unload")
"""The commands that an agent needs."""


def six() -> str:
    """Return what an agent types, and what it does."""
    rows = ((f"`{positional_form(name)}`", (request_type(name).__doc__ or "").strip()) for name in SIX)
    return table(("command", "what it does"), rows)


def hosts() -> str:
    """Return which hosts each command asks."""
    kinds = [kind for name in command_names() if (kind := request_type(name)).group is not Group.HIDDEN]
    rows = (
        (", ".join(f"`{kind.name}`" for kind in kinds if kind.hosts is each), each.value)
        for each in Hosts
        if each is not Hosts.NONE
    )
    return table(("commands", "which hosts they ask"), rows)


def engines() -> str:
    rows = ((f"`{each.name}`", f"`{each.program}`", each.tested) for each in ENGINES.values())
    return table(("engine", "program", "tested with"), rows)


TABLES: Mapping[str, Callable[[], str]] = {
    "states": lambda: meanings("state", State),
    "owners": lambda: meanings("owner", Owner),
    "drift": lambda: meanings("drift", DriftCode),
    "metrics": metrics,
    "checks": lambda: meanings("check", Check),
    "marks": lambda: meanings("verdict", Mark),
    "levels": lambda: meanings("severity", Level),
    "findings": lambda: findings(FindingCode),
    "trials": lambda: meanings("id", Assumption),
    "exits": lambda: meanings("exit", Exit),
    "json": lambda: json_fields(RESULTS),
    "commands": commands,
    "hosts": hosts,
    "six": six,
    "engines": engines,
}


def generated(page: str) -> str:
    """Return a page with its tables as the code has them now. Raises `KeyError` for an unknown name."""

    def block(match: re.Match[str]) -> str:
        text = TABLES[match["name"]]()
        return f"{match['start']}\n{text}\n\n{match['end']}" if text else f"{match['start']}{match['end']}"

    return _BLOCK.sub(block, page)


def names(page: str) -> list[str]:
    return [match["name"] for match in _BLOCK.finditer(page)]


def write() -> list[Path]:
    """Return the pages that were changed."""
    changed = []
    for path in (*PAGES, completion_words.PATH):
        page = path.read_text(encoding="utf-8")
        new = completion_words.generated() if path == completion_words.PATH else generated(page)
        if new != page:
            path.write_text(new, encoding="utf-8")
            changed.append(path)
    return changed


if __name__ == "__main__":
    for changed_path in write():
        sys.stdout.write(f"{changed_path}\n")
