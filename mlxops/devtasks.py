"""Tasks for people who work on mlxops: they need the checkout."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from invoke.context import Context
from invoke.tasks import Task, task

from mlxops.cli.options import COMMON, Common
from mlxops.cli.runner import Cli
from mlxops.cli.targets import checkout
from mlxops.core import names
from mlxops.core.command import Request
from mlxops.core.errors import MlxopsError, UsageError


@task(positional=[], auto_shortflags=False)
def demo(c: Context) -> None:
    """Show the main commands on this machine, with small real models."""

    def run() -> None:
        from tests.lab import demo as lab

        lab.run()

    _develop("demo", run)


@task(
    positional=[],
    auto_shortflags=False,
    help={
        "only": "pytest's -k: only tests whose names match",
        "fast": "neither mypy nor the tests that need the lab: engine, hub, sshd, deploy, faults; about a minute",
        "long": "also the tests that are marked as long",
        "all_engines": "also older versions of mlx-openai-server; each takes 2 GB of disk",
    },
)
def test(
    c: Context, only: str | None = None, fast: bool = False, long: bool = False, all_engines: bool = False
) -> None:
    """Check formatting, lint, types, and run the tests."""
    marks = ["-m", "not lab"] if fast else []
    selection = ["-k", only] if only else []
    options = [*marks, *selection, *(["--long"] if long else []), *(["--all-engines"] if all_engines else [])]
    _develop("test", lambda: _checks(options, types=not fast))


WORKERS = ("-n", str(min(4, (os.cpu_count() or 1) + 1)), "--dist", "loadgroup")
"""pytest-xdist: one worker more than processors, because a quarter of a lab test's time is waiting; at most four,
because the lab's programs take memory. `loadgroup`: tests/conftest.py says which tests one worker runs together."""


def _checks(options: Sequence[str], *, types: bool) -> None:
    """Run the checks and the tests, which get pytest's `options`. Go on after a failure.

    Raises `SystemExit` with the failed commands.
    """
    import subprocess
    from importlib.util import find_spec

    if missing := [name for name in ("ruff", "mypy", "pytest", "xdist", "hypothesis") if find_spec(name) is None]:
        raise MlxopsError(
            "test_tools_missing",
            f"{', '.join(missing)} cannot be imported",
            why=f"the extra `dev` installs them, and {sys.executable} does not have it",
            hint="in this folder: pip install -e '.[dev]'",
        )
    # One cache for each platform: mypy discards a cache that was made with other options.
    platforms = ("linux", "darwin") if types else ()
    mypy = [["mypy", "--platform", name, "--cache-dir", f".mypy_cache/{name}"] for name in platforms]
    failed = []
    for command in (["ruff", "format", "--check"], ["ruff", "check"], *mypy, ["pytest", *WORKERS, *options]):
        print(f"$ {shlex.join(command)}", flush=True)  # noqa: T201
        if subprocess.run([sys.executable, "-m", *command], check=False).returncode != 0:
            failed.append(shlex.join(command))
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


@task(
    positional=[],
    auto_shortflags=False,
    help={"only": "rows to measure, separated by commas; an unknown one lists them", "json": COMMON["json"]},
)
def bench(c: Context, only: str | None = None, json: bool = False) -> None:
    """Measure mlxops against the programs that it uses."""

    def run() -> None:
        from tests.benchmarks import bench

        bench.run(only, as_json=json)

    _develop("bench", run, json=json)


@task(
    positional=[],
    auto_shortflags=False,
    help={
        "engine": "fake (a fake mlx-lm, the default) or mlx-lm (with a change to mlx-openai-server)",
        "seconds": "how much longer each server takes to start (20)",
        "hold": "the seconds that a request may wait (60)",
    },
)
def lost(c: Context, engine: str = "fake", seconds: str = "20", hold: str = "60") -> None:
    """Count what clients of the gateway lose while models change."""

    def run() -> None:
        from tests.benchmarks import lost

        if engine not in lost.ENGINES:
            why = f"there are {', '.join(lost.ENGINES)}"
            hint = "for example: inv lost --engine mlx-lm"
            raise UsageError("unknown_engine", f"there is no engine {names.shown(engine)}", why=why, hint=hint)
        if not lost.run(engine, _number(seconds, "--seconds"), _number(hold, "--hold")):
            raise MlxopsError(
                "requests_lost",
                "clients lost requests, or a generation was run twice",
                why="the table says in which change",
                hint="the notes above it have the errors that clients got",
            )

    _develop("lost", run)


@task(
    positional=[],
    auto_shortflags=False,
    help={
        "minutes": "how long to run (10)",
        "seed": "the same number causes the same faults (1)",
        "state": "the file with the results; default: faults.json in the test cache. The next run adds to it",
        "only": "kinds of fault, separated by commas",
        "at": "with --only KIND: run only this trial, with its full output",
    },
)
def faults(
    c: Context,
    minutes: str = "10",
    seed: str = "1",
    state: str | None = None,
    only: str | None = None,
    at: str | None = None,
) -> None:
    """Cause faults, and check that mlxops survives them."""

    def run() -> None:
        from tests.faults import campaign

        number = _number(seed, "--seed")
        if at is not None:
            campaign.replay(_need(only, "--only", "faults --only kills --at 12"), _number(at, "--at"), number)
        minutes_given = names.seconds(minutes, "--minutes")
        if not campaign.run(minutes_given, number, Path(state) if state else None, only):
            raise MlxopsError(
                "faults_lost",
                "mlxops did not survive some faults",
                why="the results file lists them, each with what went wrong",
                hint="to run one of them again: inv faults --only KIND --at NUMBER",
            )

    _develop("faults", run)


def _number(text: str, flag: str) -> int:
    """Return a whole number of at most nine digits. Raises `UsageError` (bad_number)."""
    if text.isascii() and text.isdigit() and len(text) <= 9:
        return int(text)
    why = "it is a whole number from 0, of at most nine digits"
    raise UsageError(
        "bad_number", f"{names.shown(text)} is not a number for {flag}", why=why, hint=f"for example: {flag} 12"
    )


def _need(value: str | None, flag: str, example: str) -> str:
    if value is None:
        why = "there is no default for it"
        raise UsageError("missing_argument", f"{flag} is needed", why=why, hint=f"for example: {example}")
    return value


def _develop(name: str, run: Callable[[], None], *, json: bool = False) -> None:
    """Run a task in the checkout. Raises `SystemExit`, with an error that says so if there is no checkout."""
    cli = Cli(Request, Common(local=True, json=json), name=name)
    folder = checkout()
    try:
        if folder is None or not (folder / "tests" / "lab").is_dir():
            raise UsageError(
                "checkout_needed",
                f"{name} needs the checkout of mlxops",
                why="it uses the tests, which are not installed",
                hint=f"in its folder: inv {name}",
            )
        os.chdir(folder)
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
        run()
    except MlxopsError as error:
        raise SystemExit(cli.fail(error)) from None
    except KeyboardInterrupt:
        raise SystemExit(cli.fail(cli.interruption())) from None
    except (RuntimeError, OSError, ModuleNotFoundError) as error:
        failed = MlxopsError(
            f"{name}_failed",
            f"{name} failed",
            why=str(error) or type(error).__name__,
            hint="pip install -e '.[dev]' has what it needs",
        )
        raise SystemExit(cli.fail(failed)) from None


TASKS: Mapping[str, Task[Any]] = {"demo": demo, "test": test, "bench": bench, "lost": lost, "faults": faults}
EXAMPLES = {
    "demo": "inv demo",
    "test": "inv test --fast",
    "bench": "inv bench --only status",
    "lost": "inv lost --engine mlx-lm",
    "faults": "inv faults --minutes 10",
}
