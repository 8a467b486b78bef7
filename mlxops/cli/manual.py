"""The manual: the packaged pages of mlxops/docs, rendered on a terminal and plain in a pipe."""

from __future__ import annotations

import re
import sys
from difflib import get_close_matches

from mlxops.common.build import PACKAGE
from mlxops.core.errors import UsageError
from mlxops.core.frozen import dataclass

DOCS = PACKAGE / "docs"
SKILL = "Operate MLX model servers with mlxctl. See what runs, load, swap and unload models, and check them."
MAX_COLUMNS = 100
"""Wider lines are hard to read."""
_COMMENT_LINE = re.compile(r"^<!--.*-->\n", re.MULTILINE)
_PAGE_LINK = re.compile(r"\[([^\]]+)\]\(([a-z-]+)\.md(?:#[a-z-]*)?\)")
_SECTION_LINK = re.compile(r"\[([^\]]+)\]\(#[a-z-]*\)")
_SECTION = re.compile(r"^##? .*", re.MULTILINE)
_CODE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Page:
    topic: str
    text: str
    """Markdown without comments. Links to other pages are `mlxctl help` commands."""

    @property
    def summary(self) -> str:
        """The first sentence under the title."""
        paragraph = " ".join(self.text.split("\n\n")[1].split())
        return paragraph.partition(". ")[0].rstrip(".")

    @property
    def sections(self) -> str:
        """The title and the headings of sections, in small letters."""
        return "\n".join(_SECTION.findall(_CODE.sub("", self.text))).lower()


def topics() -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in DOCS.glob("*.md")))


def page(topic: str) -> Page:
    """Return a page of the manual. Raises `UsageError` unknown_topic."""
    names = topics()
    if topic not in names:
        raise UsageError(
            "unknown_topic",
            f"the manual has no page {topic!r}",
            why=f"its pages are {', '.join(names)}",
            hint=f"`mlxctl help {nearest}`" if (nearest := nearest_topic(topic)) else "`mlxctl help`",
        )
    source = (DOCS / f"{topic}.md").read_text(encoding="utf-8")
    text = _PAGE_LINK.sub(r"\1 (`mlxctl help \2`)", _COMMENT_LINE.sub("", source))
    return Page(topic, _SECTION_LINK.sub(r"\1", text))


def skill() -> str:
    """Return the page `skill` with the head that agents look for."""
    text = page("skill").text.rstrip("\n")
    return f"---\nname: mlxops\ndescription: {SKILL}\n---\n\n{text}"


def nearest_topic(word: str) -> str:
    """Return the topic with a similar name, else the first with `word` in a heading, else ""."""
    wanted = word.lower()
    similar = get_close_matches(wanted, topics(), n=1, cutoff=0.7)
    if similar:
        return similar[0]
    has_word = re.compile(rf"(?<![\w-]){re.escape(wanted)}(?![\w-])" if wanted else r"(?!)")
    return next((topic for topic in topics() if has_word.search(page(topic).sections)), "")


def overview() -> str:
    """Return one line per topic."""
    pages = [page(topic) for topic in topics()]
    width = max(len(entry.topic) for entry in pages)
    return "\n".join([*(f"{entry.topic:{width}}  {entry.summary}" for entry in pages), "", "A page: mlxctl help TOPIC"])


def text_of(topic: str | None) -> str:
    """Return a page as Markdown, or the list of topics. Raises `UsageError` (unknown_topic)."""
    return overview() if topic is None else page(topic).text.rstrip("\n")


def shown(topic: str | None) -> str:
    """Return what is printed: a page with colours on a terminal, else its text. Raises `UsageError` (unknown_topic)."""
    if topic is not None and sys.stdout is not None and sys.stdout.isatty():
        return rendered(page(topic)).rstrip("\n")
    return text_of(topic)


def rendered(page: Page) -> str:
    """Return the page for the terminal, with its colours and at most `MAX_COLUMNS` wide."""
    from rich.console import Console
    from rich.markdown import Markdown
    from rich.theme import Theme

    # Styles without a background suit dark and light terminals.
    console = Console(theme=Theme({"markdown.code": "bold cyan"}))
    with console.capture() as capture:
        markdown = Markdown(page.text, hyperlinks=False, code_theme="ansi_dark")
        console.print(markdown, width=min(console.width, MAX_COLUMNS))
    return capture.get()
