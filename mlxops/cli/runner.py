"""One command, from what was typed to its exit status: where it goes, what is told meanwhile, what Ctrl-C does."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from mlxops.cli import startup
from mlxops.control import render
from mlxops.control.client import HostReply, HostTarget, ask, ask_all, local_python
from mlxops.control.hints import aimed, aimed_error
from mlxops.core import names
from mlxops.core.errors import Exit, MlxopsError, OutputFailed, UsageError, bug
from mlxops.core.protocol import CANCELLABLE, Event, Started
from mlxops.core.settings import Settings

if TYPE_CHECKING:
    from mlxops.control.inventory import Gateway, Inventory


@dataclass(frozen=True)
class Call:
    """What every command is told: where, and how to print."""

    command: str
    host: str | None
    local: bool
    json: bool
    debug: bool
    many: bool = False
    """With `--json` there are many documents, or may be: each on one line."""

    @cached_property
    def inventory(self) -> Inventory | None:
        """hosts.yaml, if there is one. Raises `UsageError` bad_hosts_file."""
        from mlxops.control import inventory

        path = inventory.hosts_file(os.environ, beside())
        return None if path is None else inventory.load(path)

    @property
    def gateway(self) -> Gateway | None:
        """What hosts.yaml says of the gateway."""
        return self.inventory.gateway if self.inventory else None

    def targets(self, *, all_by_default: bool = False, only_one: bool = False) -> tuple[HostTarget, ...]:
        """Raises `UsageError`: bad_hosts_file, unknown_host, one_host."""
        name = self.host
        if name is None and self.local:
            name = os.environ.get("MLXOPS_HOST")
        if self.inventory is None:
            if not self.local:
                raise UsageError(
                    "no_hosts_file",
                    "there is no hosts.yaml",
                    why="its places are MLXOPS_HOSTS_FILE, ~/.config/mlxops/hosts.yaml and, for inv, beside tasks.py",
                    hint="write the second (the repository has an example), or use --local on the host itself",
                )
            return (HostTarget("local", None, local_python(), Settings(), agreed=True, flags=" --local"),)
        hosts = self.inventory.select(name, all_by_default=all_by_default and not self.local)
        if (only_one or self.local) and len(hosts) > 1:
            raise UsageError(
                "one_host",
                f"{self.command} takes one host",
                why=f"{', '.join(host.name for host in hosts)} are {len(hosts)}",
                hint=f"name one of them: --host {hosts[0].name}",
            )
        if self.local:
            flags = self._flags(hosts[0].name)
            return (HostTarget(hosts[0].name, None, local_python(), hosts[0].settings, flags=flags),)
        return tuple(
            HostTarget(host.name, host.ssh, host.interpreter(), host.settings, flags=self._flags(host.name))
            for host in hosts
        )

    def _flags(self, host: str) -> str:
        """What a command needs to go to this host as this one does."""
        chosen = self.inventory.default if self.inventory else None
        if self.local:
            chosen = os.environ.get("MLXOPS_HOST", chosen)
        return ("" if host == chosen else f" --host {host}") + (" --local" if self.local else "")


def beside() -> Path | None:
    """The folder of the tasks.py that `inv` found; for `mlxctl`, the checkout that this package lies in, if it does."""
    loaded = getattr(sys.modules.get("tasks"), "__file__", None)
    folder = Path(loaded).parent if loaded else Path(__file__).resolve().parent.parent
    return folder if os.path.isfile(folder / "tasks.py") else None


Show = Callable[[Sequence[HostReply]], str]
Send = Callable[[Mapping[str, object]], HostReply]


def carry_out(
    call: Call, run: Callable[[render.Console], tuple[HostReply, ...]], show: Show | None, key: str | None = None
) -> None:
    """The one boundary: run, print the data, tell the errors; exit, unless all is well: a further task may follow.

    Without `show`, the data was printed as it came.
    """
    code: int = Exit.DONE
    answers: tuple[HostReply, ...] = ()
    startup.interruptible()
    try:
        with render.Console(many=False) as console:
            answers = run(console)
        if show is not None:
            _print(call, answers, show, key)
        code = render.exit_of(answers)
        _tell(call, answers)
    except BrokenPipeError:
        render.discard(1)  # whoever read it went away
        code = 141
    except OutputFailed as error:
        code = _unwritten(call, answers, error)
    except MlxopsError as error:
        code = fail(call, error)
    except KeyboardInterrupt:
        code = fail(call, interrupted(call))
    except Exception as error:  # noqa: BLE001 - the boundary: what nobody foresaw is a bug, and is told as one
        from traceback import format_exc

        code = fail(call, bug(error, format_exc()))
    startup.told()
    gc.freeze()  # the interpreter collects several times when it ends: a tenth of the time that a `status` takes
    if code:
        raise SystemExit(code)


def _print(call: Call, answers: Sequence[HostReply], show: Show, key: str | None) -> None:
    if call.json:
        rows = {answer.host: _json_row(answer, key) for answer in answers}
        document = render.document_line if call.many else render.document
        render.say(document(call.command, answers, rows))
        return
    text = show(answers)
    if text:
        render.say(text)


def _json_row(answer: HostReply, key: str | None) -> Mapping[str, object]:
    """Reads lay their result beside the host's name; changes put it under `result`."""
    return {key: answer.result} if key else (answer.result or {})


def _tell(call: Call, answers: Sequence[HostReply]) -> None:
    console = render.Console(many=len(answers) > 1)
    for answer in answers:
        if answer.error is not None:
            if isinstance(answer.error, OutputFailed):
                render.discard(1)
            console.error(answer.host, answer.error)
            _traceback(call, answer.error)


def _unwritten(call: Call, answers: Sequence[HostReply], error: OutputFailed) -> int:
    """What was asked has an outcome all the same; where it failed, that counts first."""
    render.discard(1)
    _tell(call, answers)
    failed = render.exit_of(answers)
    if failed:
        error.hint = "see: mlxctl status, mlxctl ops"
    render.Console(many=False).error("", error)
    return failed or error.exit


def fail(call: Call, error: MlxopsError) -> int:
    if call.json:
        try:
            render.say(render.error_document(call.command, error, indent=None if call.many else 2))
        except (BrokenPipeError, OutputFailed):
            render.discard(1)  # it is told on standard error all the same
    render.Console(many=False).error("", error)
    _traceback(call, error)
    return int(error.exit)


def _traceback(call: Call, error: MlxopsError) -> None:
    if call.debug and "traceback" in error.details:
        print(error.details["traceback"], file=sys.stderr)  # noqa: T201


def interrupted(call: Call) -> MlxopsError:
    from mlxops.core.errors import Interrupted
    from mlxops.core.protocol import CHANGES

    if call.command not in CHANGES:
        why, hint = "Ctrl-C was pressed before its end", "asking for the same thing again is safe"
    else:
        why = "if the host had heard of it already, it goes on there"
        hint = "see: mlxctl ops; asking for the same thing again follows it"
    as_typed = f" --host {quote(call.host)}" if call.host else ""
    hint = aimed(hint, as_typed + (" --local" if call.local else ""))
    return Interrupted("interrupted", "interrupted", why=why, hint=hint)


class LeftError(KeyboardInterrupt):
    """Ctrl-C, and what it came to for the operation that was attended."""

    def __init__(self, answer: HostReply) -> None:
        super().__init__()
        self.answer = answer


def in_turn(
    call: Call, targets: Sequence[HostTarget], console: render.Console, one: Callable[[HostTarget], HostReply]
) -> tuple[HostReply, ...]:
    """One host after the other. Ctrl-C ends the whole; what came of it until then is told all the same."""
    console.many = len(targets) > 1
    answers: list[HostReply] = []
    try:
        for target in targets:
            answers.append(one(target))
    except LeftError as left:
        answers.append(left.answer)
    except KeyboardInterrupt:
        if not answers:
            raise
        answers.append(HostReply(targets[len(answers)].name, error=interrupted(call)))
    return (*answers, *(HostReply(target.name, error=_not_asked(target)) for target in targets[len(answers) :]))


def _not_asked(target: HostTarget) -> MlxopsError:
    from mlxops.core.errors import Interrupted

    return Interrupted(
        "not_asked",
        f"{target.name} was not asked",
        why="it would have been its turn after the host at which Ctrl-C was pressed",
        hint=f"ask for the same thing again, with --host {target.name}",
    )


def change(
    call: Call,
    given: Callable[[], Mapping[str, object]],
    *,
    several: bool = False,
    before: Callable[[Sequence[HostTarget], render.Console], None] | None = None,
    around: Callable[[HostTarget, Mapping[str, object], render.Console, Send], HostReply] | None = None,
    after: Callable[[render.Console, HostReply], None] | None = None,
) -> None:
    """A command that changes one host, or `several`, or shows what it would change. `given` may raise `UsageError`.

    `around`: what is done before and after the request itself, which it sends with its last argument.
    """

    def run(console: render.Console) -> tuple[HostReply, ...]:
        args = given()
        targets = call.targets(only_one=not several)
        for target in targets:
            check(target, args)
        if before:
            before(targets, console)

        def one(target: HostTarget) -> HostReply:
            def send(sent: Mapping[str, object]) -> HostReply:
                return attended(call, target, sent, console)

            answer = around(target, args, console, send) if around else send(args)
            if after and answer.result is not None:
                after(console, answer)
            return answer

        return in_turn(call, targets, console, one)

    carry_out(call, run, lambda answers: change_lines(call, answers), key="result")


def attended(
    call: Call, target: HostTarget, args: Mapping[str, object], console: render.Console, command: str | None = None
) -> HostReply:
    """Ask for a change, or follow one, and stay until its end. Raises `LeftError` for a Ctrl-C before that."""
    operation = ""

    def hear(host: str, event: Event) -> None:
        nonlocal operation
        if isinstance(event, Started):
            operation = event.operation
        console.hear(host, event)

    try:
        return ask(target, command or call.command, args, hear)
    except KeyboardInterrupt:
        if not operation:
            raise
        console.close()
        may_end = (command or call.command) in {*CANCELLABLE, "follow"}
        if may_end and _wants_cancel(operation):
            raise LeftError(HostReply(target.name, error=_cancelled(target, operation, console))) from None
        raise LeftError(HostReply(target.name, error=_left_running(target, operation))) from None


def _cancelled(target: HostTarget, operation: str, console: render.Console) -> MlxopsError:
    from mlxops.core.errors import Interrupted

    answer = ask(target, "cancel", {"operation": operation}, console.hear)
    if answer.error is not None:
        return answer.error
    if (answer.result or {}).get("cancelled") is True:
        return Interrupted(
            "cancelled",
            f"operation {operation} was cancelled; nothing half done is left",
            why="it was asked for after Ctrl-C",
            hint=aimed("see: mlxctl status", target.flags),
        )
    return Interrupted(
        "interrupted",
        f"operation {operation} was done before it could be cancelled",
        why="it was near its end when Ctrl-C was pressed",
        hint=aimed("see: mlxctl status", target.flags),
    )


def _left_running(target: HostTarget, operation: str) -> MlxopsError:
    from mlxops.core.errors import Interrupted

    return Interrupted(
        "interrupted",
        f"operation {operation} was left running on {target.name}",
        why="it does not need this connection",
        hint=aimed(f"mlxctl ops --follow {operation}; or --cancel {operation}", target.flags),
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


def check(target: HostTarget, args: Mapping[str, object]) -> None:
    """What can be known to be wrong is said before anything is connected to. Raises `UsageError`."""
    model, port, repo = args.get("model"), args.get("port"), args.get("repo")
    try:
        if isinstance(model, str):
            names.model_name(model)
        if isinstance(repo, str):
            names.repo(repo)
        if isinstance(port, str) and port != names.AUTO and not target.agreed:
            names.port(port, target.settings.ports)
    except UsageError as error:
        raise aimed_error(error, target.flags) from None


def change_lines(call: Call, answers: Sequence[HostReply]) -> str:
    lines = []
    for answer in answers:
        if answer.result is not None:
            prefix = f"{answer.host}: " if len(answers) > 1 else ""
            lines += [prefix + line for line in render.change_lines(call.command, answer.result).splitlines()]
    return "\n".join(lines)


def read(
    call: Call,
    show: Show,
    args: Mapping[str, object] = {},
    *,
    strict: bool = False,
    all_by_default: bool = True,
) -> None:
    def run(console: render.Console) -> tuple[HostReply, ...]:
        targets = call.targets(all_by_default=all_by_default)
        console.many = len(targets) > 1
        answers = ask_all(targets, call.command, args, console.hear)
        if strict:
            answers = tuple(drift_refused(answer) for answer in answers)
        return answers

    carry_out(call, run, show)


def drift_refused(answer: HostReply) -> HostReply:
    from mlxops.core.errors import Refused

    found = (answer.result or {}).get("drift")
    if not isinstance(found, list) or not found:
        return answer
    where = "one place" if len(found) == 1 else f"{len(found)} places"
    codes = ", ".join(dict.fromkeys(str(row.get("code")) for row in found if isinstance(row, dict)))
    error = Refused("drift", f"registry and life disagree in {where}", why=codes, hint="each is named in the status")
    return HostReply(answer.host, answer.result, error)
