"""`mlxctl` and `mlxctl --help`: commands in groups, each with an example; and `--version`."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import mlxops
from mlxops.cli import overview
from mlxops.cli.program import with_flags
from mlxops.common.build import build_id
from mlxops.tasks import overview_entries, tasks

MLXCTL = str(Path(sysconfig.get_path("scripts")) / "mlxctl")
ENTRIES = overview_entries()
EXAMPLES = {entry.example.split()[1]: entry for entry in ENTRIES}
TASKS = {task.name: task for task in tasks(())}


def mlxctl(*args: str, columns: int = 120) -> str:
    env = {"COLUMNS": str(columns), "LC_ALL": "C.UTF-8"}
    done = subprocess.run([MLXCTL, *args], capture_output=True, text=True, env=env, timeout=60, check=True)
    return done.stdout


def test_every_command_is_in_one_group() -> None:
    assert sorted(EXAMPLES) == sorted(TASKS) and len(ENTRIES) == len(EXAMPLES)


@pytest.mark.parametrize("command", EXAMPLES)
def test_example_is_a_command_line_of_its_command(command: str) -> None:
    entry = EXAMPLES[command]
    program, *args = entry.example.split()
    assert program == ("inv" if entry.group == "develop" else "mlxctl")
    arguments = TASKS[command].get_arguments()
    flags = {f"--{(each.name or '').replace('_', '-')}": each.takes_value for each in arguments}
    rest = iter(with_flags(args, frozenset(flag for flag, takes_value in flags.items() if takes_value))[1:])
    for flag in rest:
        assert flag in flags, entry.example
        if flags[flag]:
            next(rest)


def test_program_without_arguments_shows_the_overview() -> None:
    assert mlxctl() == mlxctl("--help") == overview.overview(ENTRIES, 120) + "\n"


def test_groups_come_in_order_and_options_last() -> None:
    lines = overview.overview(ENTRIES, 120).splitlines()
    titles = [line for line in lines[3:] if line and not line.startswith(" ")]
    assert titles == ["serve", "look", "files", "host", "develop", "options of most commands", "options of mlxctl"]


@pytest.mark.parametrize(("columns", "longest"), [(120, 120), (80, 80)])
def test_overview_fits_its_columns(columns: int, longest: int) -> None:
    text = overview.overview(ENTRIES, columns)
    assert max(map(len, text.splitlines())) <= longest
    assert all(entry.example in text and entry.help in text for entry in ENTRIES)


def test_options_of_invoke_without_meaning_are_hidden() -> None:
    shown = set(re.findall(r"--[a-z-]+", "\n".join(option for option, _ in overview.PROGRAM_OPTIONS)))
    assert shown == {"--help", "--list", "--version"}
    assert not {"--pty", "--echo", "--warn-only", "--config", "--write-pyc"} & set(re.findall(r"--[a-z-]+", mlxctl()))


def test_help_of_a_command_names_its_positions() -> None:
    assert "Usage: mlxctl load MODEL PORT [options]\n" in mlxctl("load", "--help")


def test_version_names_build_python_and_place() -> None:
    python = sys.version.split()[0]
    place = Path(mlxops.__file__).parent
    assert mlxctl("--version") == f"mlxctl {mlxops.__version__} (build {build_id()}, Python {python}, {place})\n"
