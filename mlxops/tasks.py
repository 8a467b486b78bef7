"""The Invoke collection. Each task comes from a request (`mlxops.core.command`); most need no code here.

A command that only reads asks all its hosts at once and shows their replies. A command that changes something asks
them one after the other. What is different has a function below, with the command's name.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from invoke.collection import Collection
from invoke.tasks import Task

from mlxops.cli import options, runner
from mlxops.cli.options import Arguments, Common
from mlxops.cli.runner import Cli
from mlxops.control import client, output
from mlxops.control.hints import aimed
from mlxops.core import commands
from mlxops.core.command import AnyRequest, Group, Request, request_type
from mlxops.core.errors import Bug, Refused, StillRunning, UsageError
from mlxops.core.hints import mark
from mlxops.core.protocol import Event, LogLine, Note
from mlxops.core.replies import HostReply

if TYPE_CHECKING:
    from mlxops.cli.overview import Entry
    from mlxops.control import inventory
    from mlxops.control.gateway.result import GatewayResult
    from mlxops.control.gateway.route import Route
    from mlxops.core.commands.completion import Completion
    from mlxops.core.commands.deploy import Deploy
    from mlxops.core.commands.doctor import Doctor
    from mlxops.core.commands.gateway import Gateway
    from mlxops.core.commands.help import Help
    from mlxops.core.commands.list import List
    from mlxops.core.commands.load import Loading, LoadResult
    from mlxops.core.commands.logs import Logs
    from mlxops.core.commands.measure import Measure
    from mlxops.core.commands.ops import Ops
    from mlxops.core.commands.probe import Probe, ProbeResult
    from mlxops.core.commands.schema import Schema
    from mlxops.core.commands.serve import Serve
    from mlxops.core.commands.setup import Setup
    from mlxops.core.commands.skill import Skill
    from mlxops.core.commands.status import Status, StatusResult
    from mlxops.core.commands.unload_all import UnloadAll

R = TypeVar("R")
Replies: TypeAlias = tuple[HostReply[R], ...]


def read(cli: Cli, request: Request[Any]) -> None:
    cli.show(cli.ask_all(cli.hosts(), request))


def change(cli: Cli, request: Request[Any]) -> None:
    cli.show(cli.change_each(cli.hosts(), request))


# -- serve --------------------------------------------------------------------------------------------------------


def load(cli: Cli, request: Loading) -> None:
    """Check the gateway's names before, and ask through the gateway afterwards."""
    target = cli.one_host()
    runner.check(target, request)
    gateway = cli.targets.gateway
    if gateway is None:
        reply = cli.change(target, request)
    else:
        from mlxops.control.gateway import receipt

        config = receipt.readable_config(gateway, target, cli.console)
        reply = cli.change(target, receipt.with_names(request, target, config))
        reply = receipt.with_receipt(reply, gateway, config, target, cli.console)
    _warn_if_unreachable(cli, reply)
    cli.show([reply])


def _warn_if_unreachable(cli: Cli, reply: HostReply[LoadResult]) -> None:
    """Warn if this machine, where the gateway runs, cannot connect to the port."""
    if reply.result is not None and reply.result.state == "ready" and not reply.result.dry_run:
        warning = client.gateway_warning(str(reply.result.url))
        if warning:
            cli.console.note(f"warning: {warning}")


def unload_all(cli: Cli, request: UnloadAll) -> None:
    targets = cli.hosts()
    if not (request.yes or request.dry_run):
        _confirm(cli, targets, request)
    cli.show(cli.change_each(targets, request))


def _confirm(cli: Cli, targets: Sequence[client.HostTarget], request: UnloadAll) -> None:
    """Show what would be stopped, and ask once for all hosts. Without a terminal only `--yes` confirms."""
    from mlxops.core.commands.unload_all import lines

    if not sys.stdin.isatty():
        raise UsageError(
            "confirmation_needed",
            f"unload-all stops every server of {', '.join(target.name for target in targets)}",
            why="it needs a confirmation, and standard input is not a terminal",
            hint="add --yes; or --dry-run to see what it would stop",
        )
    for reply in cli.ask_all(targets, replace(request, dry_run=True)):
        if reply.error is not None or reply.result is None:
            cli.console.hear(
                reply.host, Note("nothing is stopped, because mlxops cannot show what it would stop", "warning")
            )
            raise reply.error or Bug(
                "no_result",
                f"{reply.host} sent no result",
                why="the agent answered without one",
                hint="see: `mlxctl ops`",
            )
        for line in lines(reply.result).splitlines():
            cli.console.hear(reply.host, Note(line.removesuffix(" (dry run, nothing changed)")))
    sys.stderr.write("Unload all of this? [y/N] ")
    sys.stderr.flush()
    if sys.stdin.readline().strip().lower() not in {"y", "yes"}:
        raise UsageError(
            "not_confirmed", "nothing was unloaded", why="the answer was not y", hint="answer y, or add --yes"
        )


# -- look ---------------------------------------------------------------------------------------------------------


def status(cli: Cli, request: Status) -> None:
    if request.watch:
        return _watch(cli, request)
    if request.interval is not None:
        why = "without --watch each host is asked once"
        raise UsageError("watch_missing", "--interval needs --watch", why=why, hint="add --watch")
    replies = tuple(map(_refuse_disagreement, cli.ask_all(cli.hosts(), request)))
    cli.show(tuple(map(_refuse_drift, replies)) if request.strict else replies)


def _refuse_disagreement(reply: HostReply[StatusResult]) -> HostReply[StatusResult]:
    """Return the reply, with the error that every change of the host gets if its settings differ from hosts.yaml."""
    drift = reply.result.drift if reply.result else ()
    for row in (each for each in drift if each.code == "settings_differ"):
        message, _, why = row.message.partition(": ")
        return replace(reply, error=Refused(row.code, message, why=why, hint=mark(row.hint, row.commands)))
    return reply


def _watch(cli: Cli, request: Status) -> None:
    from mlxops.control.watch import command

    cli.one_line = True
    if request.probe:
        why = "each poll would send a completion to every ready port, which is too much load"
        raise UsageError("probe_or_watch", "--probe and --watch cannot be used together", why=why, hint="leave one out")
    seconds = command.parse_interval(request.interval)
    targets = cli.hosts()
    replies = command.watch_hosts(targets, seconds, cli.console, json=cli.common.json, until_drift=request.strict)
    cli.replies = tuple(map(_refuse_drift, replies)) if request.strict else replies


def _refuse_drift(reply: HostReply[StatusResult]) -> HostReply[StatusResult]:
    """Return the reply, with an error if its status has drift."""
    if reply.result is None or not reply.result.drift:
        return reply
    count = len(reply.result.drift)
    error = Refused(
        "drift",
        "1 difference between the registry and what is running"
        if count == 1
        else f"{count} differences between the registry and what is running",
        why=", ".join(dict.fromkeys(row.code for row in reply.result.drift)),
        hint="the status lists each one",
    )
    return replace(reply, error=error)


def list_(cli: Cli, request: List) -> None:
    from mlxops.core.commands.list import show, show_memory

    cli.show(cli.ask_all(cli.hosts(), request), show_memory if request.memory else show)


def ops(cli: Cli, request: Ops) -> None:
    if request.timeout is not None and request.follow is None:
        why = "nothing else of this command takes long"
        raise UsageError("follow_missing", "--timeout needs --follow", why=why, hint="add --follow ID")
    if request.follow is None and request.cancel is None:
        return read(cli, request)
    cli.one_line = request.follow is not None
    if request.follow is not None and request.cancel is not None:
        raise UsageError(
            "follow_or_cancel",
            "--follow and --cancel cannot be used together",
            why="--follow waits for an operation, --cancel ends it",
            hint=f"`mlxctl ops --follow {request.follow}`; or `mlxctl ops --cancel {request.cancel}`",
        )
    target = cli.one_host()
    if request.cancel is not None:
        from mlxops.core.commands.cancel import Cancel

        cli.show([client.ask(target, Cancel(operation=request.cancel), cli.console.hear)], nested=True)
    else:
        from mlxops.core.commands.follow import Follow

        follow = Follow(operation=str(request.follow), timeout=request.timeout)
        cli.show([*map(_refuse_running, cli.each([target], lambda target: cli.change(target, follow)))], nested=True)


def _refuse_running(reply: HostReply[Any]) -> HostReply[Any]:
    """Return the reply, with an error if it is the row of an operation that goes on."""
    if reply.command != "ops" or reply.result is None:
        return reply
    (row,) = reply.result.operations
    error = StillRunning(
        "still_running",
        f"operation {row.operation} still runs",
        why=f"it is at {row.detail}" if row.detail else "it did not end within --timeout",
        hint=aimed(f"wait on: `mlxctl ops --follow {row.operation}`", reply.flags),
    )
    return replace(reply, error=error)


def logs(cli: Cli, request: Logs) -> None:
    """Print the lines as they come; with `--json` and without `--follow` they are part of the one document."""
    cli.one_line = request.follow
    target = cli.one_host()
    runner.check(target, request)
    lines: list[str] = []

    def hear(host: str, event: Event) -> None:
        if isinstance(event, LogLine) and cli.common.json and request.follow:
            output.say(output.json_line({"host": host, "line": event.text}))
        elif isinstance(event, LogLine) and cli.common.json:
            lines.append(event.text)
        else:
            cli.console.hear(host, event)

    reply = client.ask(target, request, hear)
    if reply.result is not None:
        reply = replace(reply, result=replace(reply.result, lines=tuple(lines)))
    cli.show([reply])


def gateway(cli: Cli, request: Gateway) -> None:
    if request.print or request.env:
        return _print_entries(cli, request)
    from mlxops.control.gateway import table
    from mlxops.control.gateway.check import check
    from mlxops.control.gateway.config import read as read_config
    from mlxops.control.gateway.through import pass_through

    configured = cli.targets.gateway
    if configured is None or not (configured.config or (request.through and configured.url)):
        raise UsageError(
            "no_gateway",
            "hosts.yaml does not name the gateway's configuration file",
            why="this command compares it with the hosts",
            hint="add `gateway: {config: ~/litellm/router.yaml}`; see the annotated hosts.yaml of mlxops",
        )
    config = read_config(configured)
    targets = cli.hosts()
    replies = check(config, targets, cli.ask_all(targets, request))
    cli.show(pass_through(configured, config, replies) if request.through else replies, table.show)


def _running_gateway(cli: Cli) -> inventory.Gateway:
    """Return the gateway that `--through` asks. Raises `UsageError` (no_gateway)."""
    if cli.targets.gateway is None:
        why, hint = "--through asks the running gateway", "add `gateway: {url: http://127.0.0.1:4000}`"
        raise UsageError("no_gateway", "hosts.yaml does not name the gateway", why=why, hint=hint)
    return cli.targets.gateway


def probe(cli: Cli, request: Probe) -> None:
    """A check that failed is an error, so that scripts see it."""
    if request.through and request.last:
        why = "the verdicts that are kept are those of the servers themselves"
        raise UsageError(
            "through_or_last", "--through and --last cannot be used together", why=why, hint="leave one out"
        )
    configured = _running_gateway(cli) if request.through else None
    targets = cli.hosts()
    sent = replace(request, last=request.last or request.through)
    replies = cli.ask_all(targets, sent)
    if configured is not None:
        from mlxops.control.gateway.conformance import check_through

        replies = check_through(*_route(cli, configured, targets), replies, lambda: cli.ask_all(targets, sent))
    cli.show(tuple(map(_refuse_failures, replies)))


def _route(
    cli: Cli, configured: inventory.Gateway, targets: Sequence[client.HostTarget]
) -> tuple[Route, Replies[GatewayResult]]:
    """Return the running gateway with its names, and the result of `gateway` that they were compared with."""
    from mlxops.control.gateway.check import check
    from mlxops.control.gateway.config import read as read_config
    from mlxops.control.gateway.route import read_route
    from mlxops.core.commands.gateway import Gateway

    config = read_config(configured)
    aliases = check(config, targets, cli.ask_all(targets, Gateway()))
    return read_route(configured, config, aliases), aliases


def _refuse_failures(reply: HostReply[ProbeResult]) -> HostReply[ProbeResult]:
    """Return the reply, with an error if a check failed."""
    from mlxops.control.hints import aimed_error
    from mlxops.core.commands.probe import CHECK_FAILED, failures

    failed = failures(reply.result) if reply.result and not reply.error else []
    if not failed:
        return reply
    error = Refused(
        CHECK_FAILED,
        "1 check failed" if len(failed) == 1 else f"{len(failed)} checks failed",
        why=", ".join(f"{check} on {port}" for port, check in failed),
        hint=f"the table says why; see also: `mlxctl logs --port {failed[0][0]}`",
    )
    return replace(reply, error=aimed_error(error, reply.flags))


def measure(cli: Cli, request: Measure) -> None:
    """Measure the servers themselves; with `--through`, then through the gateway."""
    if not request.through:
        return read(cli, request)
    from mlxops.control.gateway import speed
    from mlxops.core.commands.status import Status

    targets = cli.hosts()
    route, aliases = _route(cli, _running_gateway(cli), targets)
    direct = cli.ask_all(targets, request)
    before = cli.ask_all(targets, Status())
    pairs = zip(aliases, direct, strict=True)
    through = [speed.measured_through(route, request, known, reply, cli.console.note) for known, reply in pairs]
    after = cli.ask_all(targets, Status())
    cli.show([speed.without_changed(*each) for each in zip(through, before, after, strict=True)])


def _print_entries(cli: Cli, request: Gateway) -> None:
    """Print the entries to paste. With `--json`, print them as data: `model_list`, `router_settings` if an alias has a
    hold, `environ` for the env file, and `notes`."""
    from mlxops.control.gateway.config import read_if_possible
    from mlxops.control.gateway.entries import as_yaml, entries_to_paste
    from mlxops.core.commands.gateway import Gateway

    if not request.print:
        why = "it is a form of what is printed; the check itself reads the env file that hosts.yaml names"
        raise UsageError("print_missing", "--env needs --print", why=why, hint="add --print, or leave it out")
    config, not_known = read_if_possible(cli.targets.gateway)
    targets = cli.hosts()
    printed = entries_to_paste(targets, cli.ask_all(targets, Gateway()), config, not_known, env=request.env)
    document = {**printed.document, "environ": printed.environ, "notes": printed.notes}
    reply: HostReply[Mapping[str, object]] = HostReply("gateway", document)
    cli.show([reply], lambda replies: as_yaml(printed))


def doctor(cli: Cli, request: Doctor) -> None:
    """A hosts.yaml that cannot be used is a finding: this machine is still examined."""
    from mlxops.cli.targets import checkout
    from mlxops.control.doctor import command, report

    if request.report is not None:
        report.check(Path(request.report))
    targets: Sequence[client.HostTarget] = ()
    inventory, problem = None, None
    try:
        inventory, targets = cli.targets.inventory, cli.hosts()
    except UsageError as error:
        if error.code not in {"bad_hosts_file", "no_hosts_file"}:
            raise
        problem = error
    request = replace(request, trials=request.report is not None)
    cli.console.many = len(targets) > 1
    if request.report is not None:
        cli.console.note("trying what mlxops assumes about macOS; it takes about a minute")
    replies = command.examine(inventory, problem, targets, request, cli.console)
    if request.report is not None:
        try:
            report.write(Path(request.report), replies, cli.console.note, local=cli.common.local, clone=checkout())
        except Refused as error:  # the findings are shown, and say why
            replies = (replace(replies[0], error=error), *replies[1:])
    cli.show(tuple(map(command.refuse_errors, replies)) if request.strict else replies)


def serve(cli: Cli, request: Serve) -> None:
    from mlxops.cli.targets import Targets
    from mlxops.control.serve import command
    from mlxops.core.commands.serve import ServeResult

    if request.print is not None:
        return cli.show([HostReply("serve", ServeResult(command.packaged(request.print)), command="serve")])
    inventory = cli.targets.inventory

    def find() -> tuple[client.HostTarget, ...]:
        return Targets(cli.name, cli.common.host, cli.common.local).select(all_by_default=True)

    command.serve(request, find, inventory.path if inventory else None, cli.console.note)


def help_(cli: Cli, request: Help) -> None:
    from mlxops.cli import manual
    from mlxops.core.commands.help import HelpResult

    reply = HostReply("manual", HelpResult(request.topic, manual.text_of(request.topic)))
    cli.show([reply], lambda replies: manual.shown(request.topic))


def schema(cli: Cli, request: Schema) -> None:
    import json

    from mlxops.cli.schema import schema
    from mlxops.core.commands.schema import SchemaResult

    document = schema(request.command)
    reply = HostReply("schema", SchemaResult(request.command, document))
    cli.show([reply], lambda replies: json.dumps(document, indent=2))


def skill(cli: Cli, request: Skill) -> None:
    from mlxops.cli import manual
    from mlxops.core.commands.skill import SkillResult

    text = manual.skill()
    cli.show([HostReply("manual", SkillResult(text))], lambda replies: text)


# -- host ---------------------------------------------------------------------------------------------------------


def deploy(cli: Cli, request: Deploy) -> None:
    from mlxops.control.deploy import DeployOptions

    wheels = Path(request.wheels) if request.wheels else None
    wanted = DeployOptions(request.mlxctl, wheels, request.rollback, request.dry_run)
    cli.show(cli.each(cli.hosts(), lambda target: client.deploy(target, cli.console.hear, wanted)))


def setup(cli: Cli, request: Setup) -> None:
    from mlxops.control.setup import look_at

    reply = look_at(request.ssh)
    cli.show([reply])
    if reply.error is None:
        text = (
            f"put it into ~/.config/mlxops/hosts.yaml and read its comments; then `mlxctl deploy --host {reply.host}`"
        )
        cli.console.hear("", Note.of(text))


def completion(cli: Cli, request: Completion) -> None:
    from mlxops.cli.completion import SCRIPTS
    from mlxops.core.commands.completion import CompletionResult

    script = SCRIPTS[request.shell].rstrip("\n")
    cli.show([HostReply("completion", CompletionResult(request.shell, script))], lambda replies: script)


BODIES: Mapping[str, Callable[[Cli, Any], None]] = {
    "load": load,
    "rollback": load,
    "unload-all": unload_all,
    "status": status,
    "list": list_,
    "ops": ops,
    "serve": serve,
    "logs": logs,
    "gateway": gateway,
    "probe": probe,
    "measure": measure,
    "doctor": doctor,
    "help": help_,
    "schema": schema,
    "skill": skill,
    "deploy": deploy,
    "setup": setup,
    "completion": completion,
}


# -- the collection -----------------------------------------------------------------------------------------------


def carry_out(kind: type[AnyRequest], common: Common, arguments: Arguments) -> None:
    """Run one command. Raises `SystemExit` unless all is well."""
    cli = Cli(kind, common)
    plain = change if kind.changes else read
    body: Callable[[Cli, Any], None] = BODIES.get(kind.name, plain)
    runner.run(cli, lambda: body(cli, options.parse(kind, arguments)))


def command_names() -> list[str]:
    """Return every command that a request declares."""
    return [module.name.replace("_", "-") for module in iter_modules(commands.__path__)]


def overview_entries() -> list[Entry]:
    """Return every command for the overview, in the order of the groups."""
    from mlxops import devtasks
    from mlxops.cli import overview

    kinds = [request_type(name) for name in command_names()]
    entries = [
        overview.Entry(kind.group.value, kind.example, (kind.__doc__ or "").strip())
        for group in Group
        for kind in kinds
        if kind.group is group is not Group.HIDDEN
    ]
    for name, task in devtasks.TASKS.items():
        entries.append(
            overview.Entry("develop", devtasks.EXAMPLES[name], (task.__doc__ or "").strip().partition("\n")[0])
        )
    return entries


def example(command: str) -> str:
    """Return the example of a command for its help."""
    from mlxops import devtasks

    return devtasks.EXAMPLES.get(command) or request_type(command).example


def tasks(words: Sequence[str]) -> list[Task[Any]]:
    """Return the tasks that a command line names, or all.

    To import only the declaration that is needed saves a tenth of the time that `status` takes.
    """
    bare = {word for word in words if not word.startswith("-")}
    wanted = [name for name in command_names() if name in bare]
    some = wanted and "--complete" not in words
    made = _command_tasks(wanted if some else command_names())
    if some and not bare.difference(wanted):
        return made
    from mlxops import devtasks

    return [*made, *devtasks.TASKS.values()]


def _command_tasks(names: Iterable[str]) -> list[Task[Any]]:
    kinds = map(request_type, names)
    return [options.task_of(kind, carry_out) for kind in kinds if kind.group is not Group.HIDDEN]


def collection(words: Sequence[str]) -> Collection:
    """Return the collection for a command line."""
    return Collection(*tasks(words))


def __getattr__(name: str) -> Collection:
    """Make `namespace`, which `inv` imports, for this process's command line."""
    if name != "namespace":
        raise AttributeError(name)
    return collection(sys.argv[1:])
