"""The Invoke collection: the tasks and their flags. How a command runs is `command`'s, what it does the agent's."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from invoke.collection import Collection
from invoke.context import Context
from invoke.tasks import Task, task

from mlxops.cli import runner
from mlxops.cli.runner import Call, Send
from mlxops.control import client, render
from mlxops.control.client import HostReply, HostTarget, ask, ask_all, gateway_warning
from mlxops.core import names
from mlxops.core.errors import MlxopsError, UsageError
from mlxops.core.protocol import Event, LogLine, Note

HOST = "host in hosts.yaml"
HOSTS = "host or hosts in hosts.yaml, separated by commas"
LOCAL = "this machine itself, without SSH"
JSON = "print one JSON document"
DRY = "show the plan; change nothing"
DRAIN = "seconds that open requests get before the server is killed (30)"
TIMEOUT = "seconds from the engine's start to the proof, never the download (180, and 60 more for each 8 GB)"
DEBUG = "print the traceback of a bug"
COMMON = {"local": LOCAL, "json": JSON, "debug": DEBUG}


def _seconds(text: str | None, flag: str, *, zero: bool = False) -> float | None:
    return None if text is None else names.seconds(text, flag, zero=zero)


def _command(iterable: Sequence[str] = (), **help: str) -> Callable[[Callable[..., None]], Task[Callable[..., None]]]:
    """A task whose arguments are all flags: required positionals would swallow `--help`."""

    def make(body: Callable[..., None]) -> Task[Callable[..., None]]:
        made: Task[Callable[..., None]] = task(
            positional=[],
            iterable=list(iterable),
            auto_shortflags=False,
            help={**help, **COMMON},
            name=body.__name__.strip("_"),
        )(body)
        return made

    return make


@_command(host=HOSTS, dry_run=DRY)
def init(
    c: Context,
    host: str | None = None,
    dry_run: bool = False,
    local: bool = False,
    json: bool = False,
    debug: bool = False,
) -> None:
    """Register every complete MLX model of the host's cache."""
    runner.change(Call("init", host, local, json, debug), lambda: {"dry_run": dry_run}, several=True)


@_command(host=HOSTS, memory="estimate each model, and show the budget and what serves already")
def list_(
    c: Context,
    host: str | None = None,
    memory: bool = False,
    local: bool = False,
    json: bool = False,
    debug: bool = False,
) -> None:
    """Show the registered models."""
    show = render.memory_table if memory else render.list_table
    runner.read(Call("list", host, local, json, debug), show, {"memory": memory})


@_command(
    host=HOSTS,
    probe="also ask each ready port for one small completion",
    strict="exit 3 if registry and life disagree anywhere; with --watch as soon as they do",
    watch="stay, and show what changes",
    interval="with --watch: seconds between two looks at a host (2)",
)
def status(
    c: Context,
    host: str | None = None,
    probe: bool = False,
    strict: bool = False,
    watch: bool = False,
    interval: str | None = None,
    local: bool = False,
    json: bool = False,
    debug: bool = False,
) -> None:
    """Show what is on each port, on all hosts."""
    call = Call("status", host, local, json, debug, many=watch)
    if not watch and interval is None:
        return runner.read(call, render.status_table, {"probe": probe}, strict=strict)

    def run(console: render.Console) -> tuple[HostReply, ...]:
        from mlxops.control.watch import command as live

        if not watch:
            why = "without --watch each host is looked at once"
            raise UsageError("watch_missing", "--interval goes with --watch", why=why, hint="add --watch")
        if probe:
            why = "a completion from every ready port at every look would be load, not watching"
            raise UsageError("probe_or_watch", "--probe and --watch exclude each other", why=why, hint="leave one out")
        seconds = live.interval_of(interval)
        answers = live.stay(call.targets(all_by_default=True), seconds, console, json=call.json, until_drift=strict)
        return tuple(map(runner.drift_refused, answers)) if strict else answers

    runner.carry_out(call, run, None)


@_command(
    host=HOST,
    model="registered name, or repo id org/name",
    port="port, or auto; left out: the model's own slot, else its present port",
    repo="org/name[@revision] to register or repoint the name to",
    timeout=TIMEOUT,
    force="swap what is on the port, move the model, or restart it",
    overcommit="load it even if it is estimated not to fit in memory",
    drain=DRAIN,
    dry_run=DRY,
)
def load(
    c: Context,
    model: str | None = None,
    port: str | None = None,
    repo: str | None = None,
    host: str | None = None,
    timeout: str | None = None,
    force: bool = False,
    overcommit: bool = False,
    drain: str | None = None,
    dry_run: bool = False,
    local: bool = False,
    json: bool = False,
    debug: bool = False,
) -> None:
    """Serve a model on a port; download it if missing."""

    def given() -> Mapping[str, object]:
        return {
            "model": _need(model, "--model", f"load --model jerry-xl --port {port or 8100}"),
            "port": port,
            "repo": repo,
            "timeout": _seconds(timeout, "--timeout"),
            "force": force,
            "overcommit": overcommit,
            "drain": _seconds(drain, "--drain", zero=True),
            "dry_run": dry_run,
        }

    call = Call("load", host, local, json, debug)
    runner.change(call, given, around=lambda *asked: _with_gateway(call, *asked), after=_warn_if_unreachable)


def _with_gateway(
    call: Call, target: HostTarget, args: Mapping[str, object], console: render.Console, send: Send
) -> HostReply:
    """A change after which a port serves something else: the gateway's names first, its receipt last."""
    if call.gateway is None:
        return send(args)
    from mlxops.control.gateway import check as gateway

    return gateway.load(call.gateway, target, args, console, send)


def _warn_if_unreachable(console: render.Console, answer: HostReply) -> None:
    """The gateway is where we are: what we cannot connect to, it cannot either."""
    result = answer.result or {}
    if result.get("state") == "ready" and not result.get("dry_run"):
        warning = gateway_warning(str(result.get("url")))
        if warning:
            console.note(f"warning: {warning}")


@_command(
    host=HOST,
    model="the model to unload, wherever it is",
    port="the port to unload",
    force="also a server that was started by hand",
    drain=DRAIN,
    dry_run=DRY,
)
def unload(
    c: Context,
    port: str | None = None,
    model: str | None = None,
    host: str | None = None,
    drain: str | None = None,
    force: bool = False,
    dry_run: bool = False,
    local: bool = False,
    json: bool = False,
    debug: bool = False,
) -> None:
    """Stop a port's server and clear its assignment."""

    def given() -> Mapping[str, object]:
        if port is not None and model is not None:
            why = "each names what is to be unloaded, and they may name different things"
            raise UsageError("port_or_model", "--port and --model exclude each other", why=why, hint="leave one out")
        _need(port or model, "either --port or --model", "unload --port 8100")
        return {
            "port": port,
            "model": model,
            "force": force,
            "drain": _seconds(drain, "--drain", zero=True),
            "dry_run": dry_run,
        }

    runner.change(Call("unload", host, local, json, debug), given)


@_command(
    host=HOST,
    port="the port to bring back",
    timeout=TIMEOUT,
    overcommit="load it even if it is estimated not to fit in memory",
    drain=DRAIN,
    dry_run=DRY,
)
def rollback(
    c: Context,
    port: str | None = None,
    host: str | None = None,
    timeout: str | None = None,
    overcommit: bool = False,
    drain: str | None = None,
    dry_run: bool = False,
    local: bool = False,
    json: bool = False,
    debug: bool = False,
) -> None:
    """Go back to the model that a port served before."""

    def given() -> Mapping[str, object]:
        return {
            "port": _need(port, "--port", "rollback --port 8100"),
            "timeout": _seconds(timeout, "--timeout"),
            "overcommit": overcommit,
            "drain": _seconds(drain, "--drain", zero=True),
            "dry_run": dry_run,
        }

    call = Call("rollback", host, local, json, debug)
    runner.change(call, given, around=lambda *asked: _with_gateway(call, *asked), after=_warn_if_unreachable)


@_command(
    iterable=["set"],
    host=HOST,
    model="the registered model",
    set="KEY=VALUE; again for more; KEY= takes it out, KEY=null switches a family's default off",
    dry_run=DRY,
)
def set_(
    c: Context,
    model: str | None = None,
    set: list[str] | None = None,
    host: str | None = None,
    dry_run: bool = False,
    local: bool = False,
    json: bool = False,
    debug: bool = False,
) -> None:
    """Change a model's own settings in the registry."""

    def given() -> Mapping[str, object]:
        from mlxops.core import model_options

        words = list(set or ())
        model_options.parse(words)
        return {
            "model": _need(model, "--model", "set --model jerry-xl --set context_length=32768"),
            "set": words,
            "dry_run": dry_run,
        }

    runner.change(Call("set", host, local, json, debug), given)


@_command(host=HOSTS, yes="do not ask", dry_run=DRY)
def unload_all(
    c: Context,
    host: str | None = None,
    yes: bool = False,
    dry_run: bool = False,
    local: bool = False,
    json: bool = False,
    debug: bool = False,
) -> None:
    """Stop every MLX server of the host; asks first."""
    call = Call("unload-all", host, local, json, debug)
    before = None if yes or dry_run else _confirm
    runner.change(call, lambda: {"dry_run": dry_run}, several=True, before=before)


def _confirm(targets: Sequence[HostTarget], console: render.Console) -> None:
    """Show what would go and ask, once for all; where nobody can answer, `--yes` must."""
    if not sys.stdin.isatty():
        raise UsageError(
            "confirmation_needed",
            f"unload-all stops every server of {', '.join(target.name for target in targets)}",
            why="nothing is asked when standard input is not a terminal",
            hint="add --yes; or --dry-run to see what it would stop",
        )
    console.many = len(targets) > 1
    for answer in ask_all(targets, "unload-all", {"dry_run": True}, console.hear):
        if answer.error is not None:
            # Of what cannot be shown, nobody can say that it may go.
            console.hear(answer.host, Note("it cannot be shown what would be stopped, so nothing is", "warning"))
            raise answer.error
        for line in render.change_lines("unload-all", answer.result or {}).splitlines():
            console.hear(answer.host, Note(line.removesuffix(" (dry run, nothing changed)")))
    sys.stderr.write("Unload all of this? [y/N] ")
    sys.stderr.flush()
    if sys.stdin.readline().strip().lower() not in {"y", "yes"}:
        raise UsageError(
            "not_confirmed", "nothing was unloaded", why="the answer was not y", hint="answer y, or add --yes"
        )


@_command(
    host=HOSTS,
    through="also one small completion per alias through the running gateway",
    print="print the entries to paste into the gateway's configuration, once; asks no host",
    env="with --print: values as os.environ/NAME, and the lines for the env file as comments",
)
def gateway(
    c: Context,
    host: str | None = None,
    through: bool = False,
    print: bool = False,
    env: bool = False,
    local: bool = False,
    json: bool = False,
    debug: bool = False,
) -> None:
    """Check every alias, from the gateway's files to what answers."""
    call = Call("gateway", host, local, json, debug)
    if print or env:
        return _entries(call, env, print=print)

    def run(console: render.Console) -> tuple[HostReply, ...]:
        from mlxops.control.gateway import check as gateway
        from mlxops.control.gateway.config import read

        if call.gateway is None or not (call.gateway.config or (through and call.gateway.url)):
            raise UsageError(
                "no_gateway",
                "hosts.yaml does not say where the gateway's configuration is",
                why="it is what the hosts are held against",
                hint="add `gateway: {config: ~/litellm/router.yaml}`; see the annotated hosts.yaml of mlxops",
            )
        told = read(call.gateway)
        targets = call.targets(all_by_default=True)
        answers = gateway.check(told, targets, ask_all(targets, call.command, {}, console.hear))
        return gateway.pass_through(call.gateway, told, answers) if through else answers

    runner.carry_out(call, run, render.gateway_table)


def _entries(call: Call, env: bool, *, print: bool) -> None:
    """What to paste. With `--json` the same as data: `model_list`, and `environ` for the env file."""
    from mlxops.control.gateway import check as gateway

    document: dict[str, object] = {}
    environ: dict[str, str] = {}

    def run(console: render.Console) -> tuple[HostReply, ...]:
        if not print:
            why = "it is a form of what is printed; the check itself reads the env file that hosts.yaml names"
            raise UsageError("print_missing", "--env goes with --print", why=why, hint="add --print, or leave it out")
        made, variables = gateway.printed(call.targets(all_by_default=True), env=env)
        document.update(made)
        environ.update(variables)
        return (HostReply("gateway", {**document, "environ": environ}),)

    runner.carry_out(call, run, lambda answers: gateway.as_yaml(document, environ))


@_command(host=HOSTS, dry_run=DRY)
def reconcile(
    c: Context,
    host: str | None = None,
    dry_run: bool = False,
    local: bool = False,
    json: bool = False,
    debug: bool = False,
) -> None:
    """Clear what nothing serves; stop what a crash left."""
    runner.change(Call("reconcile", host, local, json, debug), lambda: {"dry_run": dry_run}, several=True)


@_command(host=HOSTS, cleared="also what the latest reconcile has cleared", dry_run=DRY)
def restore(
    c: Context,
    host: str | None = None,
    cleared: bool = False,
    dry_run: bool = False,
    local: bool = False,
    json: bool = False,
    debug: bool = False,
) -> None:
    """Start what is assigned and nothing serves."""
    given = {"cleared": cleared, "dry_run": dry_run}
    runner.change(Call("restore", host, local, json, debug), lambda: given, several=True)


@_command(
    host=HOSTS,
    install="have the system run restore at boot",
    every="minutes; also have it run that often, which brings crashed servers back (implies --install)",
    remove="have it run it no more",
    show="show what is installed; the default",
)
def boot(
    c: Context,
    host: str | None = None,
    install: bool = False,
    every: str | None = None,
    remove: bool = False,
    show: bool = False,
    local: bool = False,
    json: bool = False,
    debug: bool = False,
) -> None:
    """Have the host start its models at boot."""

    def given() -> Mapping[str, object]:
        given = (("every" if every else "install", install or every), ("remove", remove), ("show", show))
        actions = [name for name, on in given if on] or ["show"]
        if len(actions) > 1:
            raise UsageError(
                "one_action",
                f"--{actions[0]} and --{actions[1]} exclude each other",
                why="each leaves something else installed, or changes nothing",
                hint="one after the other",
            )
        action = "install" if actions == ["every"] else actions[0]
        return {"action": action, "every": _minutes(every), "dry_run": action == "show"}

    runner.change(Call("boot", host, local, json, debug), given, several=True)


def _minutes(text: str | None) -> int | None:
    return None if text is None else names.whole(text, "--every", 1, 1440)


@_command(
    host=HOSTS,
    repo="org/name[@revision] to download, or to refresh",
    verify="compare the content of every file with the hub's hashes",
    dry_run=DRY,
)
def pull(
    c: Context,
    repo: str | None = None,
    host: str | None = None,
    verify: bool = False,
    dry_run: bool = False,
    local: bool = False,
    json: bool = False,
    debug: bool = False,
) -> None:
    """Download a model, or refresh it; nothing is started."""

    def given() -> Mapping[str, object]:
        return {"repo": _need(repo, "--repo", "pull --repo org/name"), "verify": verify, "dry_run": dry_run}

    runner.change(Call("pull", host, local, json, debug), given, several=True)


@_command(host=HOST, model="the model whose files go; its registry entry stays", dry_run=DRY)
def remove(
    c: Context,
    model: str | None = None,
    host: str | None = None,
    dry_run: bool = False,
    local: bool = False,
    json: bool = False,
    debug: bool = False,
) -> None:
    """Delete a model's files from the cache."""

    def given() -> Mapping[str, object]:
        return {"model": _need(model, "--model", "remove --model jerry-xl"), "dry_run": dry_run}

    runner.change(Call("remove", host, local, json, debug), given)


@_command(
    host=HOST,
    port="port whose server's log it is",
    lines="how many lines of its end (100)",
    follow="stay, and show what comes",
)
def logs(
    c: Context,
    port: str | None = None,
    lines: str | None = None,
    follow: bool = False,
    host: str | None = None,
    local: bool = False,
    json: bool = False,
    debug: bool = False,
) -> None:
    """Show a server's log."""
    call = Call("logs", host, local, json, debug, many=follow)
    kept: list[str] = []

    def run(console: render.Console) -> tuple[HostReply, ...]:
        args = {"port": _need(port, "--port", "logs --port 8100"), "lines": _lines_asked(lines), "follow": follow}
        (target,) = call.targets(only_one=True)
        runner.check(target, args)

        def hear(host: str, event: Event) -> None:
            if isinstance(event, LogLine) and json and follow:
                render.say(render.json_line({"host": host, "line": event.text}))
            elif isinstance(event, LogLine) and json:
                kept.append(event.text)
            else:
                console.hear(host, event)

        answer = ask(target, "logs", args, hear)
        return (replace(answer, result={**answer.result, "lines": kept}) if answer.result else answer,)

    runner.carry_out(call, run, lambda answers: "")


def _lines_asked(text: str | None) -> int:
    return 100 if text is None else names.whole(text, "--lines", 0, 100_000)


@_command(
    host=HOSTS,
    follow="operation to follow to its end: its id, or the end of it",
    cancel="operation to end: its id, or the end of it; nothing half done stays",
)
def ops(
    c: Context,
    host: str | None = None,
    follow: str | None = None,
    cancel: str | None = None,
    local: bool = False,
    json: bool = False,
    debug: bool = False,
) -> None:
    """Show running and recent operations; follow or cancel one."""
    call = Call("ops", host, local, json, debug, many=follow is not None)
    if follow is None and cancel is None:
        return runner.read(call, render.ops_table, all_by_default=False)

    def run(console: render.Console) -> tuple[HostReply, ...]:
        if follow is not None and cancel is not None:
            why = "one waits for an operation's end, the other brings it about"
            raise UsageError(
                "follow_or_cancel",
                "--follow and --cancel exclude each other",
                why=why,
                hint=f"mlxctl ops --follow {follow}; or mlxctl ops --cancel {cancel}",
            )
        (target,) = call.targets(only_one=True)
        if cancel is not None:
            return (ask(target, "cancel", {"operation": cancel}, console.hear),)
        return runner.in_turn(
            call,
            [target],
            console,
            lambda target: runner.attended(call, target, {"operation": follow}, console, "follow"),
        )

    runner.carry_out(call, run, lambda answers: runner.change_lines(call, answers), key="result")


@_command(
    host=HOSTS,
    rollback="go back to the build that was there before",
    wheels="folder with all wheels that are needed, for a host without a package index",
    mlxctl="also install mlxctl there, linked into ~/.local/bin",
    dry_run=DRY,
)
def deploy(
    c: Context,
    host: str | None = None,
    rollback: bool = False,
    wheels: str | None = None,
    mlxctl: bool = False,
    dry_run: bool = False,
    local: bool = False,
    json: bool = False,
    debug: bool = False,
) -> None:
    """Install or upgrade the agent on a host."""
    call = Call("deploy", host, local, json, debug)

    def run(console: render.Console) -> tuple[HostReply, ...]:
        from mlxops.control.deploy import DeployOptions

        wish = DeployOptions(mlxctl, Path(wheels) if wheels else None, rollback, dry_run)
        return runner.in_turn(call, call.targets(), console, lambda target: client.deploy(target, console.hear, wish))

    runner.carry_out(call, run, lambda answers: runner.change_lines(call, answers), key="result")


def _need(value: str | None, flag: str, example: str) -> str:
    if value is None:
        raise UsageError(
            "missing_argument", f"{flag} is needed", why="there is no default for it", hint=f"for example: {example}"
        )
    return value


@task(positional=[], auto_shortflags=False, name="help", help={"topic": "page to show; left out: list the pages"})
def help_(c: Context, topic: str | None = None) -> None:
    """Show a page of the manual."""

    def run(console: render.Console) -> tuple[HostReply, ...]:
        from mlxops.cli import manual

        manual.show(topic)
        return ()

    runner.carry_out(Call("help", None, local=True, json=False, debug=False), run, None)


@task(positional=[], auto_shortflags=False)
def demo(c: Context) -> None:
    """Show the main job here, with tiny real models."""

    def run() -> None:
        from tests.lab import demo as lab

        lab.run()

    _develop("demo", run)


@task(
    positional=[],
    auto_shortflags=False,
    help={
        "only": "pytest's -k: only tests whose names match",
        "fast": "only what needs neither engine, hub nor sshd",
        "all_engines": "with every version of mlx-openai-server that is driven; builds 2 GB for each once",
    },
)
def test(c: Context, only: str | None = None, fast: bool = False, all_engines: bool = False) -> None:
    """Check formatting, lint, types, and run the tests."""
    chosen = [*(["-k", only] if only else []), *(["--all-engines"] if all_engines else [])]
    _develop("test", lambda: _checks(chosen, fast))


def _checks(chosen: Sequence[str], fast: bool) -> None:
    """Run every check, also after a failed one, the tests last. Raises `SystemExit` with the failed commands."""
    import subprocess
    from importlib.util import find_spec

    if missing := [name for name in ("ruff", "mypy", "pytest", "hypothesis") if find_spec(name) is None]:
        raise MlxopsError(
            "test_tools_missing",
            f"{', '.join(missing)} cannot be imported",
            why=f"they come with the extra `dev`, which {sys.executable} has not",
            hint="in this folder: pip install -e '.[dev]'",
        )
    tests = ["pytest", *chosen, *(["tests/core", "tests/test_arrows.py"] if fast else [])]
    # One cache for each platform: mypy discards a cache that was made with other options.
    types = [["mypy", "--platform", each, "--cache-dir", f".mypy_cache/{each}"] for each in ("linux", "darwin")]
    failed = []
    for words in (["ruff", "format", "--check"], ["ruff", "check"], *types, tests):
        print(f"$ {' '.join(words)}", flush=True)  # noqa: T201
        if subprocess.run([sys.executable, "-m", *words], check=False).returncode != 0:
            failed.append(" ".join(words))
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


@task(
    positional=[],
    auto_shortflags=False,
    help={"only": "rows to measure, separated by commas; an unknown one lists them", "json": JSON},
)
def bench(c: Context, only: str | None = None, json: bool = False) -> None:
    """Measure mlxops against what it is made of."""

    def run() -> None:
        from tests.benchmarks import bench

        bench.run(only, as_json=json)

    _develop("bench", run, json=json)


@task(
    positional=[],
    auto_shortflags=False,
    help={
        "minutes": "how long it goes on (10)",
        "seed": "which faults: the same number gives the same ones (1)",
        "state": "the file that counts; left out: faults.json in the test cache. The next run goes on with it",
        "only": "kinds of fault, separated by commas",
        "at": "with --only KIND: this one trial again, with all that it says",
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
    """Cause fault after fault, and see what survives."""

    def run() -> None:
        from tests.faults import campaign

        number = int(names.seconds(seed, "--seed"))
        if at is not None:
            campaign.replay(
                _need(only, "--only", "faults --only kills --at 12"), int(names.seconds(at, "--at")), number
            )
        minutes_given = names.seconds(minutes, "--minutes")
        if not campaign.run(minutes_given, number, Path(state) if state else None, only):
            raise MlxopsError(
                "faults_lost",
                "some faults were not survived",
                why="each is in the file that counts, with what was wrong",
                hint="one of them again: inv faults --only KIND --at NUMBER",
            )

    _develop("faults", run)


def _develop(name: str, run: Callable[[], None], *, json: bool = False) -> None:
    """A task for those who work on mlxops: it needs the checkout, and says so."""
    call = Call(name, None, local=True, json=json, debug=False)
    folder = runner.beside()
    try:
        if folder is None or not (folder / "tests" / "lab").is_dir():
            raise UsageError(
                "checkout_needed",
                f"{name} needs the checkout of mlxops",
                why="it is made of the tests, which are not installed",
                hint=f"in its folder: inv {name}",
            )
        os.chdir(folder)
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
        run()
    except MlxopsError as error:
        raise SystemExit(runner.fail(call, error)) from None
    except KeyboardInterrupt:
        raise SystemExit(runner.fail(call, runner.interrupted(call))) from None
    except (RuntimeError, OSError, ModuleNotFoundError) as error:
        failed = MlxopsError(
            f"{name}_failed",
            f"{name} failed",
            why=str(error) or type(error).__name__,
            hint="pip install -e '.[dev]' has what it needs",
        )
        raise SystemExit(runner.fail(call, failed)) from None


namespace = Collection(
    init,
    list_,
    status,
    load,
    rollback,
    unload,
    unload_all,
    set_,
    reconcile,
    restore,
    pull,
    remove,
    gateway,
    boot,
    ops,
    logs,
    deploy,
    help_,
    demo,
    test,
    bench,
    faults,
)
