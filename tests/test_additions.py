"""The examples in the manual's page on development work: a new command is two files, a new engine is one."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from mlxops.cli.manual import DOCS
from mlxops.common.build import PACKAGE

CHECKOUT = PACKAGE.parent
EXAMPLES = {
    found["path"]: textwrap.dedent(found["code"])
    for found in re.finditer(
        r"^ *```python\n(?P<code> *# (?P<path>mlxops/\S+)\n.*?)^ *```$",
        (DOCS / "development.md").read_text(encoding="utf-8"),
        re.DOTALL | re.MULTILINE,
    )
}
Run = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run Python in a copy of the checkout with the examples."""
    for folder in ("mlxops", "tests"):
        shutil.copytree(CHECKOUT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("README.md", "hosts.yaml", "pyproject.toml", "tasks.py"):
        shutil.copy(CHECKOUT / name, tmp_path)
    for path, code in EXAMPLES.items():
        (tmp_path / path).write_text(code, encoding="utf-8")
    entry = f"{{hub: {tmp_path}/hub, state: {tmp_path}/state, engine: some-engine}}"
    (tmp_path / "mine.yaml").write_text(f"hosts: {{here: {entry}}}\n", encoding="utf-8")
    env = {"HOME": str(tmp_path), "PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path)}
    env["MLXOPS_HOSTS_FILE"] = str(tmp_path / "mine.yaml")

    def run(*arguments: str) -> str:
        argv = [sys.executable, *arguments]
        done = subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def test_command_of_the_manual_works(run: Run, tmp_path: Path) -> None:
    asked = ("-c", "from mlxops.mlxctl import main; main()", "free", "--local")
    assert run(*asked).split()[:3] == ["FOLDER", "FREE", str(tmp_path / "hub")]
    (host,) = json.loads(run(*asked, "--state", "--json"))["hosts"]
    assert host["path"] == str(tmp_path / "state") and host["free_bytes"] > 0


def test_additions_of_the_manual_are_complete(run: Run, tmp_path: Path) -> None:
    changed = run("-m", "tests.docs_tables").split()
    assert [Path(path).name for path in changed] == ["README.md", "json.md", "setup.md", "words.py"]
    checks = ("tests/test_declarations.py", "tests/test_docs_tables.py", "-k", "free or some-engine or up_to_date")
    run("-m", "pytest", "-q", "-p", "no:cacheprovider", *checks)
    assert "| `some-engine` |" in (tmp_path / "mlxops/docs/setup.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("tool", ["ruff", "mypy"])
def test_examples_are_clean(run: Run, tool: str) -> None:
    commands = {"ruff": [["check"], ["format", "--check"]], "mypy": [["--cache-dir", os.devnull]]}
    for command in commands[tool]:
        run("-m", tool, *command, *EXAMPLES)
