"""The tables of the manual agree with the code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest

from mlxops.core.drift import DriftCode
from mlxops.core.ports import State
from mlxops.core.wire import omitted
from tests import docs_tables

PAGES = {path.name: path.read_text(encoding="utf-8") for path in docs_tables.PAGES}


@pytest.mark.parametrize("name", PAGES)
def test_tables_of_a_page_are_up_to_date(name: str) -> None:
    assert docs_tables.generated(PAGES[name]) == PAGES[name], "run: python -m tests.docs_tables"


def test_every_table_is_in_a_page() -> None:
    assert {name for page in PAGES.values() for name in docs_tables.names(page)} == set(docs_tables.TABLES)


def test_every_drift_code_and_state_is_explained() -> None:
    for code in (*DriftCode, *State):
        assert code.meaning.endswith(".") and f"| `{code.value}` | " in PAGES["status.md"]


@dataclass(frozen=True)
class Row:
    port: int
    state: State = field(metadata={"help": "the port's state"})
    notes: tuple[str, ...] = ()
    """Remarks, in a sentence | each."""
    pid: int | None = omitted(None)
    """None: it has ended."""


@dataclass(frozen=True)
class Result:
    """What every port serves."""

    rows: tuple[Row, ...]
    first: Row | None
    extra: Mapping[str, float] | None = None
    """Further numbers."""


def test_json_fields_are_made_from_dataclasses() -> None:
    assert docs_tables.json_fields({"status": Result}) == "\n".join(
        [
            "### `status`",
            "",
            "What every port serves.",
            "",
            "| field | type | meaning |",
            "| --- | --- | --- |",
            "| `rows` | list of Row |  |",
            "| `first` | Row or null |  |",
            "| `extra` | object of number or null | Further numbers. |",
            "",
            "### Row",
            "",
            "| field | type | meaning |",
            "| --- | --- | --- |",
            "| `port` | integer |  |",
            "| `state` | text | the port's state |",
            "| `notes` | list of text | Remarks, in a sentence / each. |",
            "| `pid` | integer, or left out | null: it has ended. |",
        ]
    )
