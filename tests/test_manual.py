"""The manual: its pages are installed, linked, and say what the code reads."""

from __future__ import annotations

import re
from pathlib import Path

import mlxops
from mlxops.control.inventory import load

DOCS = Path(mlxops.__file__).with_name("docs")
README = Path(__file__).parents[1] / "README.md"


def test_every_page_is_linked_from_the_readme() -> None:
    pages = sorted(path.name for path in DOCS.glob("*.md"))
    assert "start-script.md" in pages
    assert [name for name in pages if f"(mlxops/docs/{name})" not in README.read_text()] == []


def test_the_boot_lines_that_it_shows_are_read(tmp_path: Path) -> None:
    shown = re.findall(r"boot: (\{.*\}|\[.*\])", (DOCS / "start-script.md").read_text())
    assert len(shown) == 2
    for line in shown:
        path = tmp_path / "hosts.yaml"
        path.write_text(f"hosts: {{studio: {{boot: {line}}}}}\n")
        assert load(path).host("studio").settings.boot
