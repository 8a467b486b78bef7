"""Plain English: words that a reader has to translate are rare. `python -m tests.test_words PATH...` lists them.

The count is a tripwire, not the goal. A text can avoid all of these words and still be a riddle.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
MANNERED = re.compile(
    r"(?<![A-Za-z])(?:"
    r"told|tells?|telling|retold|untold"
    r"|who(?:so)?ever|whomever|whatever|whichever"
    r"|nobody|somebody|anybody|everybody|somebodys"
    r"|anew|afresh|meanwhile|by now|all the same|of late|in vain"
    r"|heed(?:s|ed)?|wish(?:es|ed)?|mend(?:s|ed|ing)?|reckon(?:s|ed|ing)?"
    r"|nowhere else|none of (?:it|them|these)|as it were|for ever|lest|thereby|hence|henceforth"
    r")(?![A-Za-z])",
    re.IGNORECASE,
)
"""Words, also as parts of names with underscores. The projects that this one learns from have 0.0 to 0.5 of them in a
thousand lines."""
ALLOWED = 1.0
"""In a thousand lines."""
SKIPPED = {"contract.json", "test_words.py"}


def texts(places: Iterable[Path]) -> Iterator[Path]:
    for place in places:
        found = sorted(place.rglob("*")) if place.is_dir() else [place]
        yield from (
            path for path in found if path.suffix in {".py", ".md", ".yaml", ".toml"} and path.name not in SKIPPED
        )


def found_in(path: Path) -> list[tuple[int, str]]:
    """Return (line number, word) of each mannered word."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [(number, found.group()) for number, line in enumerate(lines, 1) for found in MANNERED.finditer(line)]


def test_mannered_words_are_rare() -> None:
    names = ("mlxops", "tests", "README.md", "CHANGELOG.md", "hosts.yaml", "pyproject.toml", "tasks.py")
    words = lines = 0
    for path in texts(CHECKOUT / name for name in names):
        lines += len(path.read_text(encoding="utf-8").splitlines())
        words += len(found_in(path))
    assert words / lines * 1000 < ALLOWED, f"{words} in {lines} lines: python -m tests.test_words"


if __name__ == "__main__":
    for each in texts(map(Path, sys.argv[1:])):
        for number, word in found_in(each):
            sys.stdout.write(f"{each}:{number}: {word}\n")
