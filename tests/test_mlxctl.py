"""The `mlxctl` program: positional words become flags, and output errors are reported."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxops import devtasks
from mlxops.cli.program import with_flags
from tests.lab.homelab import CHECKOUT
from tests.properties import PROPERTY

VALUES = frozenset({"--model", "--port", "--repo", "--host", "--timeout"})


@pytest.mark.parametrize(
    ("typed", "made"),
    [
        ("load jerry-xl 8100", "load --model jerry-xl --port 8100"),
        ("load org/name 8100", "load --model org/name --port 8100"),
        ("load jerry-xl", "load --model jerry-xl"),
        ("load", "load"),
        ("load --json jerry-xl 8100", "load --json --model jerry-xl --port 8100"),
        ("load jerry-xl --host studio 8100", "load --model jerry-xl --host studio --port 8100"),
        ("load jerry-xl --host=studio 8100", "load --model jerry-xl --host=studio --port 8100"),
        ("load jerry-xl 8100 --repo org/name --force", "load --model jerry-xl --port 8100 --repo org/name --force"),
        ("load --model jerry-xl --port 8100", "load --model jerry-xl --port 8100"),
        ("load --model jerry-xl 8100", "load --model jerry-xl --port 8100"),
        ("load --model=jerry-xl 8100", "load --model=jerry-xl --port 8100"),
        ("load --port 8100 jerry-xl", "load --port 8100 --model jerry-xl"),
        ("load jerry-xl 8100 8101", "load --model jerry-xl --port 8100 8101"),
        ("load jerry-xl --port 8100 8101", "load --model jerry-xl --port 8100 8101"),
        ("load jerry-xl --port", "load --model jerry-xl --port"),
        ("unload 8100", "unload --port 8100"),
        ("unload 8100 --json", "unload --port 8100 --json"),
        ("unload --json 8100", "unload --json --port 8100"),
        ("unload --model jerry-xl", "unload --model jerry-xl"),
        ("unload", "unload"),
        ("status", "status"),
        ("list --host studio", "list --host studio"),
        ("--version", "--version"),
        ("--help load", "--help load"),
        ("reconcile 8100", "reconcile 8100"),
        ("", ""),
    ],
)
def test_positional_words_become_flags(typed: str, made: str) -> None:
    assert with_flags(typed.split(), VALUES) == made.split()


def test_word_is_never_split() -> None:
    assert with_flags(["load", "a b; $(id)", "8100\n"], VALUES) == ["load", "--model", "a b; $(id)", "--port", "8100\n"]
    assert with_flags(["unload", ""], VALUES) == ["unload", "--port", ""]


MLXCTL = str(Path(sysconfig.get_path("scripts")) / "mlxctl")


def mlxctl(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([MLXCTL, *words], capture_output=True, text=True, timeout=60, check=False)


def test_help_of_a_task_explains_each_flag() -> None:
    said = mlxctl("load", "--help").stdout
    assert "registered name, or repo id" in said and "seconds from the engine's start" in said
    assert "180" in said


@pytest.mark.parametrize(
    ("command", "usage", "example"),
    [
        ("load", "mlxctl load MODEL PORT [options]", "mlxctl load jerry-xl 8100"),
        ("list", "mlxctl list [options]", "mlxctl list --memory"),
        ("bench", "mlxctl bench [options]", devtasks.EXAMPLES["bench"]),
    ],
)
def test_help_of_a_task_begins_with_its_usage_and_an_example(command: str, usage: str, example: str) -> None:
    lines = mlxctl(command, "--help").stdout.splitlines()
    assert lines[0] == f"Usage: {usage}" and lines[1] == "" and lines[2].endswith(".")
    assert lines.index(f"Example: {example}") < lines.index("Options:")
    assert not [line for line in lines if "core-opts" in line or "Docstring" in line]


def test_help_of_a_task_without_options_shows_none() -> None:
    lines = mlxctl("demo", "--help").stdout.splitlines()
    assert lines[0] == "Usage: mlxctl demo" and "Example: inv demo" in lines and "Options:" not in lines


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        *(("load --bogus", "mlxctl load --help"), ("set NAME", "mlxctl set --help"), ("x", "mlxctl --list")),
        *((words, "mlxctl --list") for words in ("--help --local", "--help x", "--list x")),
    ],
)
def test_usage_error_names_the_help_of_its_task(words: str, hint: str) -> None:
    done = mlxctl(*words.split())
    assert done.returncode == 2 and done.stderr.endswith(f"next: {hint}\n")


def test_closed_pipe_is_not_an_error() -> None:
    line = f'"{MLXCTL}" --help | true; "{MLXCTL}" --list | true'
    assert subprocess.run(["/bin/sh", "-c", line], capture_output=True, text=True, timeout=60, check=True).stderr == ""


@pytest.mark.parametrize("words", ["status --json", "status"])
def test_unwritable_output_is_reported(words: str, tmp_path: Path) -> None:
    hosts = tmp_path / "hosts.yaml"
    hosts.write_text(f"hosts: {{here: {{hub: {tmp_path}/hub, state: {tmp_path}/state, ports: 1-2}}}}")
    env = {"HOME": str(tmp_path), "MLXOPS_HOSTS_FILE": str(hosts), "LC_ALL": "C.UTF-8"}

    def run(more: str) -> subprocess.CompletedProcess[str]:
        line = f'exec "{MLXCTL}" {words} --local {more}'
        return subprocess.run(["/bin/sh", "-c", line], capture_output=True, text=True, env=env, check=False)

    if Path("/dev/full").exists():
        full = run(">/dev/full")
        assert full.returncode == 74 and full.stderr.startswith("error: the result could not be written")
        assert "Traceback" not in full.stderr and run("2>/dev/full").returncode == 0
        unknown = run("--host nowhere >/dev/full")
        assert unknown.returncode == 2 and unknown.stderr.startswith("error: there is no host"), unknown.stderr
        assert "Traceback" not in unknown.stderr
    closed = run(">&-")
    assert closed.returncode == 74 and "  why: it is closed\n" in closed.stderr
    assert "Traceback" not in closed.stderr
    # A command without standard error still does its work.
    assert run("2>&-").returncode == 0 and run("2>&-").stdout
    assert run("<&-").returncode == 0


WITHOUT_OUTPUT = (
    ("status --local >&-", 74, "the result could not be written"),
    ("status --local --json >&-", 74, "the result could not be written"),
    ("--list >/dev/full", 74, "the result could not be written"),
    ("load --help >/dev/full", 74, "the result could not be written"),
    # The command failed before it had a result.
    ("load --bogus --json >/dev/full", 2, "No idea what '--bogus' is"),
    ("load --bogus --json >&-", 2, "No idea what '--bogus' is"),
    ("status --host nowhere --json >&-", 2, "there is no host 'nowhere'"),
    ("rollback --port 1 --local --json >/dev/full", 3, "no earlier model of port 1"),
    ("logs --port 1 --follow --local >/dev/full", 74, "the result could not be written"),
)
INVOKES_OWN = ("--help", "--list", "--bogus")
"""Answered by Invoke itself under `inv`."""


@pytest.mark.parametrize(
    ("program", "words", "status", "first"),
    [
        (program, *row)
        for program in ("mlxctl", "inv")
        for row in WITHOUT_OUTPUT
        if program == "mlxctl" or not any(part in row[0] for part in INVOKES_OWN)
    ],
)
def test_full_or_closed_output_leaves_no_traceback(
    program: str, words: str, status: int, first: str, tmp_path: Path
) -> None:
    if "/dev/full" in words and not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    hosts = tmp_path / "hosts.yaml"
    hosts.write_text(f"hosts: {{here: {{hub: {tmp_path}/hub, state: {tmp_path}/state, ports: 1-2}}}}")
    env = {"HOME": str(tmp_path), "MLXOPS_HOSTS_FILE": str(hosts), "LC_ALL": "C.UTF-8"}
    logs = tmp_path / "state" / "logs"
    logs.mkdir(parents=True)
    log = logs / "1.log"
    log.write_text("one\ntwo\n")
    line = f'exec "{Path(MLXCTL).with_name(program)}" {words}'
    done = subprocess.run(
        ["/bin/sh", "-c", line], capture_output=True, text=True, env=env, check=False, cwd=CHECKOUT, timeout=60
    )
    with log.open("a") as more:
        more.write("three\n")  # the follower finds that its output has no reader
    assert done.returncode == status, done.stderr
    assert done.stderr.startswith(f"error: {first}"), done.stderr
    assert done.stderr.count("could not be written") <= 1
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


@pytest.mark.parametrize("delay", [0.03, 0.08, 0.15, 0.25, 0.4, 0.6])
def test_ctrl_c_at_any_moment_leaves_one_document(delay: float, tmp_path: Path) -> None:
    """Ctrl-C at any moment leaves one document: of the interruption, or of the result if it was printed."""
    env = {"HOME": str(tmp_path), "LC_ALL": "C.UTF-8"}
    ready = "import sys, os; from mlxops import mlxctl; print(flush=True, file=sys.stderr); mlxctl.main()"
    with subprocess.Popen(
        [sys.executable, "-c", ready, "status", "--local", "--json"],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        process.stderr.readline()
        try:
            process.wait(delay)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    document = json.loads(out)
    assert process.returncode in {0, 130} and "Traceback" not in err, err
    assert document["ok"] is (process.returncode == 0)


def test_tasks_on_one_line_run_until_one_fails(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts.yaml"
    hosts.write_text(f"hosts: {{here: {{hub: {tmp_path}/hub, state: {tmp_path}/state, ports: 1-2}}}}")
    env = {"HOME": str(tmp_path), "MLXOPS_HOSTS_FILE": str(hosts), "LC_ALL": "C.UTF-8"}

    def run(words: str) -> str:
        return subprocess.run([MLXCTL, *words.split()], capture_output=True, text=True, env=env, check=False).stdout

    both = run("list --local status --local")
    assert "no models are registered" in both and "STATE" in both
    assert "STATE" not in run("list --local --host nowhere status --local")


@given(
    st.lists(
        st.sampled_from(["load", "unload", "8100", "x", "--model", "--json", "--port=1", "--host", "-h"]), max_size=7
    )
)
@PROPERTY
def test_words_stay_complete_and_in_order(words: list[str]) -> None:
    rest = iter(with_flags(words, VALUES))
    assert all(word in rest for word in words)
