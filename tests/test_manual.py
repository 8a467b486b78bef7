"""The manual: its pages are installed, linked, shown, and agree with the code."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from mlxops.cli import manual
from mlxops.cli.options import positions
from mlxops.control.inventory import load
from mlxops.core.command import request_type
from mlxops.core.errors import UsageError
from mlxops.tasks import tasks

CHECKOUT = Path(__file__).parents[1]
README = (CHECKOUT / "README.md").read_text(encoding="utf-8")
SCRIPTS = Path(sysconfig.get_path("scripts"))
TASKS = {task.name: task for task in tasks(())}


def sources() -> dict[str, str]:
    return {topic: (manual.DOCS / f"{topic}.md").read_text(encoding="utf-8") for topic in manual.topics()}


def run(program: str, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(SCRIPTS / program), *args], capture_output=True, text=True, cwd=CHECKOUT, timeout=60, check=False
    )


def test_readme_links_every_page() -> None:
    assert [topic for topic in manual.topics() if f"(mlxops/docs/{topic}.md)" not in README] == []


def test_readme_has_at_most_200_lines() -> None:
    assert len(README.splitlines()) <= 200


@pytest.mark.parametrize("topic", manual.topics())
def test_links_of_a_page_lead_somewhere(topic: str) -> None:
    source = sources()[topic]
    pages = re.findall(r"\]\(([a-z-]+)\.md", source)
    assert [page for page in pages if page not in manual.topics()] == []
    headings = {
        re.sub(r"[^a-z0-9 -]", "", each.lower()).replace(" ", "-") for each in re.findall(r"^#+ (.*)", source, re.M)
    }
    assert [link for link in re.findall(r"\]\(#([a-z-]*)\)", source) if link not in headings] == []


@pytest.mark.parametrize("text", [README, *sources().values()])
def test_commands_and_flags_exist(text: str) -> None:
    """Checks code spans, and lines that begin with a program."""
    spans = re.findall(r"`([^`\n]+)`", text)
    lines = re.findall(r"^\$? *((?:mlxctl|inv) .*)", text, re.M)
    for span in [*spans, *lines]:
        found = re.match(r"(?:mlxctl|inv) ([a-z][a-z-]*)(.*)", span)
        if found is None:
            continue
        name, rest = found.groups()
        assert name in TASKS, span
        flags = {f"--{(each.name or '').replace('_', '-')}" for each in TASKS[name].get_arguments()}
        used = set(re.findall(r"(?<!\S)(--[a-z-]+)", rest.split(" | ")[0])) - {"--help"}
        assert used <= flags, span


def test_boot_examples_are_valid_settings(tmp_path: Path) -> None:
    shown = re.findall(r"boot: (\{.*\}|\[.*\])", sources()["start-script"])
    assert len(shown) == 2
    for line in shown:
        path = tmp_path / "hosts.yaml"
        path.write_text(f"hosts: {{studio: {{boot: {line}}}}}\n")
        assert load(path).host("studio").settings.boot


def test_every_topic_is_listed_with_one_line() -> None:
    lines = manual.overview().splitlines()
    assert [line.split()[0] for line in lines[:-2]] == list(manual.topics())
    assert all(len(line) <= 120 and len(line.split()) > 4 for line in lines[:-2])


@pytest.mark.parametrize(
    ("word", "topic"),
    [
        ("statsu", "status"),
        ("Gateway", "gateway"),
        ("error", "errors"),
        ("rollback", "load"),
        ("swap", "load"),
        ("deploy", "setup"),
        ("memory", "files"),
        ("zzz", ""),
        ("", ""),
        ("(", ""),
        ("../setup", "setup"),
    ],
)
def test_unknown_word_gets_the_nearest_topic(word: str, topic: str) -> None:
    with pytest.raises(UsageError) as error:
        manual.page(word)
    assert error.value.hint == f"mlxctl help {topic}".strip()


def test_page_in_a_pipe_is_plain_text() -> None:
    shown = run("mlxctl", "help", "status")
    assert shown.returncode == 0 and shown.stdout == manual.page("status").text
    assert shown.stdout.startswith("# Status\n")
    assert "<!--" not in shown.stdout and "\x1b" not in shown.stdout
    assert ".md)" not in shown.stdout and "(`mlxctl help" in manual.page("boot").text


def test_page_under_inv_is_the_same() -> None:
    assert run("inv", "help", "--topic", "status").stdout == manual.page("status").text


def test_unknown_topic_is_a_usage_error() -> None:
    shown = run("mlxctl", "help", "statsu")
    assert shown.returncode == 2 and shown.stdout == ""
    assert shown.stderr.endswith("next: mlxctl help status\n")


def test_page_on_a_terminal_is_rendered() -> None:
    shown = on_terminal([str(SCRIPTS / "mlxctl"), "help", "status"])
    assert "\x1b[" in shown and "# Status" not in shown and "Status" in shown
    assert "\x1b[40m" not in shown


def test_rich_is_imported_only_on_a_terminal() -> None:
    code = "import sys; from mlxops.cli import manual; manual.shown('status'); sys.exit('rich' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=False).returncode == 0


def test_help_is_positional() -> None:
    assert positions(request_type("help")) == ("--topic",)


def on_terminal(command: list[str]) -> str:
    """Run a command on a terminal of 100 columns and return what it prints."""
    parent, child = pty.openpty()
    env = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100"}
    with subprocess.Popen(command, stdin=child, stdout=child, stderr=child, env=env) as process:
        os.close(child)
        chunks = []
        while True:
            try:
                chunk = os.read(parent, 65536)
            except OSError:  # Linux: the other end is closed
                break
            if not chunk:
                break
            chunks.append(chunk)
        process.wait(timeout=60)
    os.close(parent)
    return b"".join(chunks).decode()
