"""The Invoke collection: parse, call, render, exit code. What a command does is decided elsewhere."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from invoke.collection import Collection
from invoke.context import Context
from invoke.tasks import Task, task

from mlxops import entry
from mlxops.control import client, render
from mlxops.control.client import Answer, Target, ask, ask_all, gateway_warning, local_python
from mlxops.core import fields, names
from mlxops.core.errors import Exit, MlxopsError, OutputFailed, UsageError, bug
from mlxops.core.protocol import CANCELLABLE, Event, Line, Started
from mlxops.core.settings import Settings

if TYPE_CHECKING:
    from mlxops.control.inventory import Gateway, Inventory

HOST = "host in hosts.yaml"
HOSTS = "host or hosts in hosts.yaml, separated by commas"
LOCAL = "this machine itself, without SSH"
JSON = "print one JSON document"
DRY = "show the plan; change nothing"
DRAIN = "seconds that open requests get before the server is killed (30)"
DEBUG = "print the traceback of a bug"
COMMON = {"local": LOCAL, "json": JSON, "debug": DEBUG}


@dataclass(frozen=True)
class Call:
    """What every command is told: where, and how to print."""

    command: str
    host: str | None
    local: bool
    json: bool
    debug: bool
    many: bool = False
    """With `--json` there are many documents, one a line."""

    @cached_property
    def inventory(self) -> Inventory | None:
        """hosts.yaml, if there is one. Raises `UsageError` bad_hosts_file."""
        from mlxops.control import inventory

        path = inventory.hosts_file(os.environ, _beside())
        return None if path is None else inventory.load(path)

    @property
    def gateway(self) -> Gateway | None:
        """What hosts.yaml says of the gateway."""
        return self.inventory.gateway if self.inventory else None

    def targets(self, *, all_by_default: bool = False, only_one: bool = False) -> tuple[Target, ...]:
        """Raises `UsageError`: bad_hosts_file, unknown_host, one_host."""
        name = self.host
        if name is None and self.local:
            name = os.environ.get("MLXOPS_HOST")
        if self.inventory is None:
            if not self.local:
                raise UsageError(
                    "no_hosts_file",
                    "there is no hosts.yaml",
                    why="it is looked for in MLXOPS_HOSTS_FILE, ~/.config/mlxops/hosts.yaml and beside tasks.py",
                    hint="write one (the repository has an example), or use --local on the host itself",
                )
            return (Target("local", None, local_python(), Settings(), agreed=True),)
        hosts = self.inventory.select(name, all_by_default=all_by_default and not self.local)
        if (only_one or self.local) and len(hosts) > 1:
            raise UsageError("one_host", f"{self.command} takes one host", hint=f"--host {hosts[0].name}")
        if self.local:
            return (Target(hosts[0].name, None, local_python(), hosts[0].settings),)
        return tuple(Target(host.name, host.ssh, host.interpreter(), host.settings) for host in hosts)


def _beside() -> Path | None:
    """The folder of the tasks.py that `inv` found; for `mlxctl`, the checkout that this package lies in, if it does."""
    loaded = getattr(sys.modules.get("tasks"), "__file__", None)
    folder = Path(loaded).parent if loaded else Path(__file__).resolve().parent.parent
    return folder if (folder / "tasks.py").is_file() else None


Show = Callable[[Sequence[Answer]], str]
Send = Callable[[Mapping[str, object]], Answer]


def _answer(call: Call, run: Callable[[render.Talk], tuple[Answer, ...]], show: Show, key: str | None = None) -> None:
    """The one boundary: run, print the data, tell the errors; exit, unless all is well: a further task may follow."""
    code: int = Exit.DONE
    entry.interruptible()
    try:
        with render.Talk(many=False) as talk:
            answers = run(talk)
        _print(call, answers, show, key)
        code = render.exit_of(answers)
        _tell(call, answers)
    except BrokenPipeError:
        render.discard(1)  # whoever read it went away
        code = 141
    except OutputFailed as error:
        render.discard(1)
        render.Talk(many=False).error("", error)
        code = error.exit
    except MlxopsError as error:
        code = _fail(call, error)
    except KeyboardInterrupt:
        code = _fail(call, _interrupted(call))
    except Exception as error:  # noqa: BLE001 - the boundary: what nobody foresaw is a bug, and is told as one
        from traceback import format_exc

        code = _fail(call, bug(error, format_exc()))
    entry.told()
    if code:
        raise SystemExit(code)


def _print(call: Call, answers: Sequence[Answer], show: Show, key: str | None) -> None:
    if call.many:
        return  # they were printed as they came
    if call.json:
        rows = {answer.host: _json_row(answer, key) for answer in answers}
        render.say(render.document(call.command, answers, rows))
        return
    text = show(answers)
    if text:
        render.say(text)


def _json_row(answer: Answer, key: str | None) -> Mapping[str, object]:
    """Reads lay their result beside the host's name; changes put it under `result`."""
    return {key: answer.result} if key else (answer.result or {})


def _tell(call: Call, answers: Sequence[Answer]) -> None:
    talk = render.Talk(many=len(answers) > 1)
    for answer in answers:
        if answer.error is not None:
            talk.error(answer.host, answer.error)
            _traceback(call, answer.error)


def _fail(call: Call, error: MlxopsError) -> int:
    if call.json:
        render.say(render.error_document(call.command, error, indent=None if call.many else 2))
    render.Talk(many=False).error("", error)
    _traceback(call, error)
    return int(error.exit)


def _traceback(call: Call, error: MlxopsError) -> None:
    if call.debug and "traceback" in error.details:
        print(error.details["traceback"], file=sys.stderr)  # noqa: T201


def _interrupted(call: Call) -> MlxopsError:
    from mlxops.core.errors import Interrupted
    from mlxops.core.protocol import CHANGES

    going_on = call.command in CHANGES
    return Interrupted(
        "interrupted",
        "interrupted",
        why="if the host had heard of it already, it goes on there" if going_on else "",
        hint="see: mlxctl ops; asking for the same thing again follows it" if going_on else "",
    )


def _change(
    call: Call,
    given: Callable[[], Mapping[str, object]],
    *,
    before: Callable[[Target, render.Talk], None] | None = None,
    around: Callable[[Target, Mapping[str, object], render.Talk, Send], Answer] | None = None,
    after: Callable[[render.Talk, Answer], None] | None = None,
) -> None:
    """A command that changes one host, or shows what it would change. `given` may raise `UsageError`.

    `around`: what is done before and after the request itself, which it sends with its last argument.
    """

    def run(talk: render.Talk) -> tuple[Answer, ...]:
        args = given()
        (target,) = call.targets(only_one=True)
        _check(target, args)
        if before:
            before(target, talk)

        def send(sent: Mapping[str, object]) -> Answer:
            return _attended(call, target, sent, talk)

        answer = around(target, args, talk, send) if around else send(args)
        if after and answer.result is not None:
            after(talk, answer)
        return (answer,)

    _answer(call, run, lambda answers: _lines(call, answers), key="result")


def _attended(
    call: Call, target: Target, args: Mapping[str, object], talk: render.Talk, command: str | None = None
) -> Answer:
    """Ask for a change, or follow one, and stay until its end or Ctrl-C."""
    operation = ""

    def hear(host: str, event: Event) -> None:
        nonlocal operation
        if isinstance(event, Started):
            operation = event.operation
        talk.hear(host, event)

    try:
        return ask(target, command or call.command, args, hear)
    except KeyboardInterrupt:
        if not operation:
            raise
        talk.close()
        may_end = (command or call.command) in {*CANCELLABLE, "follow"}
        if may_end and _wants_cancel(operation):
            return Answer(target.name, error=_cancelled(target, operation, talk))
        return Answer(target.name, error=_left_running(target, operation))


def _cancelled(target: Target, operation: str, talk: render.Talk) -> MlxopsError:
    from mlxops.core.errors import Interrupted

    answer = ask(target, "cancel", {"operation": operation}, talk.hear)
    if answer.error is not None:
        return answer.error
    if (answer.result or {}).get("cancelled") is True:
        return Interrupted("cancelled", f"operation {operation} was cancelled; nothing half done is left")
    return Interrupted("interrupted", f"operation {operation} was done before it could be cancelled")


def _left_running(target: Target, operation: str) -> MlxopsError:
    from mlxops.core.errors import Interrupted

    on = f" --host {target.name}" if target.ssh else " --local"
    return Interrupted(
        "interrupted",
        f"operation {operation} was left running on {target.name}",
        why="it does not need this connection",
        hint=f"mlxctl ops{on} --follow {operation}; or --cancel {operation}",
    )


def _wants_cancel(operation: str) -> bool:
    """After Ctrl-C whoever sits at a terminal is asked; else it goes on."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    sys.stderr.write(f"\nOperation {operation}: leave it running (l) or cancel it (c)? [l] ")
    sys.stderr.flush()
    try:
        return sys.stdin.readline().strip().lower() in {"c", "cancel"}
    except KeyboardInterrupt:
        return False


def _check(target: Target, args: Mapping[str, object]) -> None:
    """What can be known to be wrong is said before anything is connected to. Raises `UsageError`."""
    model, port, repo = args.get("model"), args.get("port"), args.get("repo")
    if isinstance(model, str):
        names.model_name(model)
    if isinstance(repo, str):
        names.repo(repo)
    if isinstance(port, str) and port != names.AUTO and not target.agreed:
        names.port(port, target.settings.ports)


def _lines(call: Call, answers: Sequence[Answer]) -> str:
    return "\n".join(render.change_lines(call.command, a.result) for a in answers if a.result is not None)


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


@_command(host=HOST, dry_run=DRY)
def init(
    c: Context,
    host: str | None = None,
    dry_run: bool = False,
    local: bool = False,
    json: bool = False,
    debug: bool = False,
) -> None:
    """Register every complete MLX model of the host's cache."""
    _change(Call("init", host, local, json, debug), lambda: {"dry_run": dry_run})


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
    _read(Call("list", host, local, json, debug), show, {"memory": memory})


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
        return _read(call, render.status_table, {"probe": probe}, strict=strict)

    def run(talk: render.Talk) -> tuple[Answer, ...]:
        from mlxops.control import live

        if not watch:
            raise UsageError("watch_missing", "--interval goes with --watch", hint="inv status --watch --interval 5")
        if probe:
            why = "a completion from every ready port at every look would be load, not watching"
            raise UsageError("probe_or_watch", "--probe and --watch exclude each other", why=why, hint="leave one out")
        seconds = live.interval_of(interval)
        answers = live.stay(call.targets(all_by_default=True), seconds, talk, json=call.json, until_drift=strict)
        return tuple(map(_strict, answers)) if strict else answers

    _answer(call, run, lambda answers: "")


def _read(call: Call, show: Show, args: Mapping[str, object] = {}, *, strict: bool = False) -> None:
    def run(talk: render.Talk) -> tuple[Answer, ...]:
        answers = ask_all(call.targets(all_by_default=True), call.command, args, talk.hear)
        if strict:
            answers = tuple(_strict(answer) for answer in answers)
        return answers

    _answer(call, run, show)


def _strict(answer: Answer) -> Answer:
    from mlxops.core.errors import Refused

    found = (answer.result or {}).get("drift")
    if not isinstance(found, list) or not found:
        return answer
    error = Refused("drift", f"registry and life disagree in {len(found)} places", hint="each is named in the status")
    return Answer(answer.host, answer.result, error)


@_command(
    host=HOST,
    model="registered name, or repo id org/name",
    port="port, or auto; left out: the model's own slot, else its present port",
    repo="org/name[@revision] to register or repoint the name to",
    timeout="seconds from the engine's start to the proof; never covers the download",
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
            "model": _need(model, "--model", "load --model NAME --port 8100"),
            "port": port,
            "repo": repo,
            "timeout": _seconds(timeout, "--timeout"),
            "force": force,
            "overcommit": overcommit,
            "drain": _seconds(drain, "--drain", zero=True),
            "dry_run": dry_run,
        }

    call = Call("load", host, local, json, debug)
    _change(call, given, around=lambda *asked: _with_gateway(call, *asked), after=_warn_if_unreachable)


def _with_gateway(call: Call, target: Target, args: Mapping[str, object], talk: render.Talk, send: Send) -> Answer:
    """A change after which a port serves something else: the gateway's names first, its receipt last."""
    if call.gateway is None:
        return send(args)
    from mlxops.control import gateway

    return gateway.load(call.gateway, target, args, talk, send)


def _warn_if_unreachable(talk: render.Talk, answer: Answer) -> None:
    """The gateway is where we are: what we cannot connect to, it cannot either."""
    result = answer.result or {}
    if result.get("state") == "ready" and not result.get("dry_run"):
        warning = gateway_warning(str(result.get("url")))
        if warning:
            talk.note(f"warning: {warning}")


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
            raise UsageError("port_or_model", "--port and --model exclude each other", hint="mlxctl unload 8100")
        _need(port or model, "either --port or --model", "unload --port 8100")
        return {
            "port": port,
            "model": model,
            "force": force,
            "drain": _seconds(drain, "--drain", zero=True),
            "dry_run": dry_run,
        }

    _change(Call("unload", host, local, json, debug), given)


@_command(
    host=HOST,
    port="the port to bring back",
    timeout="seconds from the engine's start to the proof; never covers the download",
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
    _change(call, given, around=lambda *asked: _with_gateway(call, *asked), after=_warn_if_unreachable)


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
        words = list(set or ())
        fields.parse(words)
        return {
            "model": _need(model, "--model", "set --model jerry-xl --set context_length=32768"),
            "set": words,
            "dry_run": dry_run,
        }

    _change(Call("set", host, local, json, debug), given)


@_command(host=HOST, yes="do not ask", dry_run=DRY)
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
    _change(call, lambda: {"dry_run": dry_run}, before=None if yes or dry_run else _confirm)


def _confirm(target: Target, talk: render.Talk) -> None:
    """Show what would go and ask; where nobody can answer, `--yes` must."""
    if not sys.stdin.isatty():
        raise UsageError(
            "confirmation_needed",
            "unload-all stops every server of the host",
            why="nothing is asked when standard input is not a terminal",
            hint="add --yes; or --dry-run to see what it would stop",
        )
    answer = ask(target, "unload-all", {"dry_run": True}, talk.hear)
    if answer.error is not None:
        raise answer.error
    for line in render.change_lines("unload-all", answer.result or {}).splitlines():
        talk.note(line.removesuffix(" (dry run, nothing changed)"))
    sys.stderr.write("Unload all of this? [y/N] ")
    sys.stderr.flush()
    if sys.stdin.readline().strip().lower() not in {"y", "yes"}:
        raise UsageError("not_confirmed", "nothing was unloaded", hint="answer y, or add --yes")


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
    if print:
        return _entries(call, env)

    def run(talk: render.Talk) -> tuple[Answer, ...]:
        from mlxops.control import gateway
        from mlxops.control.gatewayfiles import read

        if call.gateway is None or not (call.gateway.config or (through and call.gateway.url)):
            hint = "add `gateway: {config: ~/litellm/router.yaml}`; see the annotated hosts.yaml of mlxops"
            raise UsageError("no_gateway", "hosts.yaml does not say where the gateway's configuration is", hint=hint)
        told = read(call.gateway)
        targets = call.targets(all_by_default=True)
        answers = gateway.check(told, targets, ask_all(targets, call.command, {}, talk.hear))
        return gateway.pass_through(call.gateway, told, answers) if through else answers

    _answer(call, run, render.gateway_table)


def _entries(call: Call, env: bool) -> None:
    """What to paste. With `--json` the same as data: `model_list`, and `environ` for the env file."""
    from mlxops.control import gateway

    document: dict[str, object] = {}
    environ: dict[str, str] = {}

    def run(talk: render.Talk) -> tuple[Answer, ...]:
        made, variables = gateway.printed(call.targets(all_by_default=True), env=env)
        document.update(made)
        environ.update(variables)
        return (Answer("gateway", {**document, "environ": environ}),)

    _answer(call, run, lambda answers: gateway.as_yaml(document, environ))


@_command(host=HOST, dry_run=DRY)
def reconcile(
    c: Context,
    host: str | None = None,
    dry_run: bool = False,
    local: bool = False,
    json: bool = False,
    debug: bool = False,
) -> None:
    """Clear what nothing serves; stop what a crash left."""
    _change(Call("reconcile", host, local, json, debug), lambda: {"dry_run": dry_run})


@_command(host=HOST, cleared="also what the latest reconcile has cleared", dry_run=DRY)
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
    _change(Call("restore", host, local, json, debug), lambda: {"cleared": cleared, "dry_run": dry_run})


@_command(
    host=HOST,
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
                "one_action", f"--{actions[0]} and --{actions[1]} exclude each other", hint="one after the other"
            )
        action = "install" if actions == ["every"] else actions[0]
        return {"action": action, "every": _minutes(every), "dry_run": action == "show"}

    _change(Call("boot", host, local, json, debug), given)


def _minutes(text: str | None) -> int | None:
    return None if text is None else names.whole(text, "--every", 1, 1440)


@_command(
    host=HOST,
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

    _change(Call("pull", host, local, json, debug), given)


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
        return {"model": _need(model, "--model", "remove --model NAME"), "dry_run": dry_run}

    _change(Call("remove", host, local, json, debug), given)


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
    call = Call("logs", host, local, json, debug)
    kept: list[str] = []

    def run(talk: render.Talk) -> tuple[Answer, ...]:
        args = {"port": _need(port, "--port", "logs --port 8100"), "lines": _lines_asked(lines), "follow": follow}
        (target,) = call.targets(only_one=True)
        _check(target, args)

        def hear(host: str, event: Event) -> None:
            if isinstance(event, Line) and json and follow:
                render.say(render.json_line({"host": host, "line": event.text}))
            elif isinstance(event, Line) and json:
                kept.append(event.text)
            else:
                talk.hear(host, event)

        answer = ask(target, "logs", args, hear)
        return (replace(answer, result={**answer.result, "lines": kept}) if answer.result else answer,)

    _answer(call, run, lambda answers: "")


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
    call = Call("ops", host, local, json, debug)
    if follow is None and cancel is None:
        return _read(call, render.ops_table)

    def run(talk: render.Talk) -> tuple[Answer, ...]:
        if follow is not None and cancel is not None:
            raise UsageError("follow_or_cancel", "--follow and --cancel exclude each other", hint="one after the other")
        (target,) = call.targets(only_one=True)
        if cancel is not None:
            return (ask(target, "cancel", {"operation": cancel}, talk.hear),)
        return (_attended(call, target, {"operation": follow}, talk, "follow"),)

    _answer(call, run, lambda answers: _lines(call, answers), key="result")


@_command(
    host=HOST,
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

    def run(talk: render.Talk) -> tuple[Answer, ...]:
        (target,) = call.targets(only_one=True)
        from mlxops.control.deploy import Wish

        wish = Wish(mlxctl, Path(wheels) if wheels else None, rollback, dry_run)
        return (client.deploy(target, talk.hear, wish),)

    _answer(call, run, lambda answers: _lines(call, answers), key="result")


def _need(value: str | None, flag: str, example: str) -> str:
    if value is None:
        raise UsageError("missing_argument", f"{flag} is needed", hint=f"for example: {example}")
    return value


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
    """Every check is run, so that one run tells all; the tests come last."""
    import subprocess

    tests = ["pytest", *chosen, *(["tests/core", "tests/test_arrows.py"] if fast else [])]
    failed = []
    for words in (["ruff", "format", "--check"], ["ruff", "check"], ["mypy"], tests):
        print(f"$ {' '.join(words)}", flush=True)  # noqa: T201
        if subprocess.run([sys.executable, "-m", *words], check=False).returncode != 0:
            failed.append(words[0])
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


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
            raise MlxopsError("faults_lost", "some faults were not survived", hint="inv faults --only KIND --at NUMBER")

    _develop("faults", run)


def _develop(name: str, run: Callable[[], None]) -> None:
    """A task for those who work on mlxops: it needs the checkout, and says so."""
    call = Call(name, None, local=True, json=False, debug=False)
    folder = _beside()
    try:
        if folder is None or not (folder / "tests" / "lab").is_dir():
            raise UsageError(
                "checkout_needed", f"{name} needs the checkout of mlxops", hint=f"in its folder: inv {name}"
            )
        os.chdir(folder)
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
        run()
    except MlxopsError as error:
        raise SystemExit(_fail(call, error)) from None
    except KeyboardInterrupt:
        raise SystemExit(_fail(call, _interrupted(call))) from None
    except (RuntimeError, OSError, ModuleNotFoundError) as error:
        failed = MlxopsError(
            f"{name}_failed", f"{name} failed: {error}", hint="pip install -e '.[dev]' has what it needs"
        )
        raise SystemExit(_fail(call, failed)) from None


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
    gateway,
    ops,
    logs,
    deploy,
    demo,
    test,
    faults,
)
