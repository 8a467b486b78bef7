"""One command, from its request to its exit status: ask hosts, print the result, report errors, answer Ctrl-C."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from shlex import quote
from typing import Any, TypeVar, cast

from mlxops.cli import names_folder, startup
from mlxops.cli.options import Common
from mlxops.cli.targets import Targets
from mlxops.control import client, output
from mlxops.control.client import HostTarget
from mlxops.control.hints import aimed, aimed_error
from mlxops.core import names, wire
from mlxops.core.command import AnyRequest, Hosts, Request, command_module
from mlxops.core.errors import Exit, Interrupted, MlxopsError, OutputFailed, UsageError, bug
from mlxops.core.protocol import Event, Note, Started
from mlxops.core.replies import HostReply, Show

R = TypeVar("R")


class Cli:
    """What a command's body works with: the hosts, the ways to ask them, and the one place for its result."""

    def __init__(self, kind: type[AnyRequest], common: Common, name: str = "") -> None:
        self.kind = kind
        self.name = name or kind.name
        self.common = common
        self.targets = Targets(self.name, common.host, common.local)
        self.console = output.Console(many=False)
        self.replies: Sequence[HostReply[object]] = ()
        """The outcome: it decides the exit status."""
        self.one_line = False
        """With `--json` there may be several documents, each on a line of its own."""
        self.began: dict[str, tuple[str, str]] = {}
        """Host -> the operation that this command began there, and its command."""
        self.interrupted = False
        """Ctrl-C was pressed while a change was carried out. No further host is asked."""

    # -- which hosts

    def hosts(self) -> tuple[HostTarget, ...]:
        """Return the hosts that this command goes to. Raises `UsageError`."""
        kind = self.kind.hosts
        return self.targets.select(all_by_default=kind is Hosts.ALL, only_one=kind is Hosts.ONE)

    def one_host(self) -> HostTarget:
        return self.targets.select(only_one=True)[0]

    # -- asking them

    def ask_all(self, targets: Sequence[HostTarget], request: Request[R]) -> tuple[HostReply[R], ...]:
        self.console.many = len(targets) > 1
        return client.ask_all(targets, request, self.console.hear)

    def change(self, target: HostTarget, request: Request[R]) -> HostReply[R]:
        """Ask for a change, or follow one, until its end.

        After Ctrl-C the reply says what became of the operation. Before the operation has begun, Ctrl-C is raised.
        """
        if self.common.detach and not request.acts:
            why = "nothing is changed, so there is no operation to leave running"
            raise UsageError("nothing_to_detach", "--detach needs a change", why=why, hint="leave --detach out")
        operation = ""

        def hear(host: str, event: Event) -> None:
            nonlocal operation
            if isinstance(event, Started):
                operation = event.operation
                self.began[target.name] = (operation, request.name)
            self.console.hear(host, event)

        try:
            if not self.common.detach:
                return client.ask(target, request, hear)
            return self._started(client.start(target, request, hear))
        except KeyboardInterrupt:
            if not operation:
                raise
        self.interrupted = True
        self.console.close()
        may_end = request.cancellable or request.name == "follow"
        if may_end and _wants_cancel(operation):
            return HostReply(target.name, error=self._cancel(target, operation))
        return HostReply(target.name, error=_left_running(target, operation))

    def _started(self, reply: HostReply[R]) -> HostReply[R]:
        """Say how to follow an operation that was started."""
        if reply.operation:
            text = aimed(f"it was started; wait for it: `mlxctl ops --follow {reply.operation}`", reply.flags)
            self.console.hear(reply.host, Note(text))
        return reply

    def change_each(self, targets: Sequence[HostTarget], request: Request[R]) -> tuple[HostReply[R], ...]:
        """Ask for the same change on one host after the other."""
        for target in targets:
            check(target, request)
        return self.each(targets, lambda target: self.change(target, request))

    def each(
        self, targets: Sequence[HostTarget], ask: Callable[[HostTarget], HostReply[R]]
    ) -> tuple[HostReply[R], ...]:
        """Ask one host after the other. Ctrl-C ends this; the replies until then are kept."""
        self.console.many = len(targets) > 1
        replies: list[HostReply[R]] = []
        for target in targets:
            if self.interrupted:
                replies.append(HostReply(target.name, error=_not_asked(target)))
                continue
            try:
                replies.append(ask(target))
            except KeyboardInterrupt:
                if not replies:
                    raise
                self.interrupted = True
                replies.append(HostReply(target.name, error=self.interruption()))
        return tuple(replies)

    def _cancel(self, target: HostTarget, operation: str) -> MlxopsError:
        from mlxops.core.commands.cancel import Cancel

        reply = client.ask(target, Cancel(operation=operation), self.console.hear)
        if reply.error is not None:
            return reply.error
        hint = aimed("see: `mlxctl status`", target.flags)
        if reply.result is not None and reply.result.cancelled:
            what = f"operation {operation} was cancelled; {reply.result.outcome or 'nothing half done is left'}"
            return Interrupted("cancelled", what, why="you chose to cancel it after Ctrl-C", hint=hint)
        what = f"operation {operation} was done before it could be cancelled"
        return Interrupted("interrupted", what, why="it was almost done when Ctrl-C was pressed", hint=hint)

    def interruption(self) -> MlxopsError:
        """Return the error for Ctrl-C before a host had named its operation."""
        why, hint = "Ctrl-C was pressed before its end", "it is safe to run the same command again"
        if self.kind.changes:
            why = "if the host had received the request already, the operation goes on there"
            hint = "see: `mlxctl ops`; the same command again follows the operation"
        as_typed = f" --host {quote(self.common.host)}" if self.common.host else ""
        hint = aimed(hint, as_typed + (" --local" if self.common.local else ""))
        return Interrupted("interrupted", "interrupted", why=why, hint=hint)

    # -- showing the outcome

    def show(self, replies: Sequence[HostReply[R]], show: Show[R] | None = None, *, nested: bool | None = None) -> None:
        """Print the result on standard output, as text or as one JSON document.

        `show` turns the replies into text; by default it is the command's own. `nested`: give the result its own key in
        the JSON document.
        """
        self.replies = replies
        if self.common.json:
            nested = self.kind.nested if nested is None else nested
            rows = {reply.host: _json_row(reply, nested=nested) for reply in replies}
            document = output.document_line if self.one_line else output.document
            output.say(document(self.name, replies, rows))
            return
        text = started(replies) if self.common.detach else (show or self._show)(replies)
        if text:
            output.say(text)

    def _show(self, replies: Sequence[HostReply[Any]]) -> str:
        command = next((reply.command for reply in replies if reply.result is not None), self.name)
        if not command:
            return "it is done"
        return cast("Show[Any]", command_module(command).show)(replies)

    def fail(self, error: MlxopsError) -> int:
        """Report an error that is not of one host; return the exit status."""
        if self.common.json:
            try:
                output.say(output.error_document(self.name, error, indent=None if self.one_line else 2))
            except (BrokenPipeError, OutputFailed):
                output.discard(1)  # standard error has it, too
        output.Console(many=False).error("", error)
        self._traceback(error)
        return int(error.exit)

    def report_errors(self) -> None:
        """Report the error of each host on standard error."""
        console = output.Console(many=len(self.replies) > 1)
        for reply in self.replies:
            if reply.error is not None:
                if isinstance(reply.error, OutputFailed):
                    output.discard(1)
                console.error(reply.host, reply.error)
                self._traceback(reply.error)

    def remember(self) -> None:
        """Remember names for tab completion, if it is used."""
        if not os.path.isdir(names_folder()):
            return
        from mlxops.cli.remember import remember

        inventory = self.targets.__dict__.get("inventory")
        with suppress(OSError):
            remember(inventory.hosts if inventory else {}, self.replies, self.began)

    def unwritten(self, error: OutputFailed) -> int:
        """Report that the result could not be written. An error of a host comes first."""
        output.discard(1)
        self.report_errors()
        failed = output.exit_of(self.replies)
        if failed:
            error.set_hint("see: `mlxctl status`, `mlxctl ops`")
        output.Console(many=False).error("", error)
        return failed or error.exit

    def _traceback(self, error: MlxopsError) -> None:
        if self.common.debug and "traceback" in error.details:
            print(error.details["traceback"], file=sys.stderr)  # noqa: T201


def run(cli: Cli, body: Callable[[], None]) -> None:
    """Run a command's body; the one place where exceptions become exit statuses.

    Raises `SystemExit` unless all is well: a further task may follow on the same command line.
    """
    code: int = Exit.DONE
    startup.interruptible()
    try:
        with cli.console:
            body()
        code = output.exit_of(cli.replies)
        cli.report_errors()
        cli.remember()
    except BrokenPipeError:
        output.discard(1)  # the reader of our output is gone
        code = 141
    except OutputFailed as error:
        code = cli.unwritten(error)
    except MlxopsError as error:
        code = cli.fail(error)
    except KeyboardInterrupt:
        code = cli.fail(cli.interruption())
    except Exception as error:  # noqa: BLE001 - the boundary: an unexpected exception is a bug, and is reported as one
        from traceback import format_exc

        code = cli.fail(bug(error, format_exc()))
    startup.ignore_interrupts()
    gc.freeze()  # the interpreter collects several times when it ends: a tenth of the time that a `status` takes
    if code:
        raise SystemExit(code)


def _json_row(reply: HostReply[object], *, nested: bool) -> dict[str, Any]:
    result = wire.encode(reply.result)
    row = {"result": result} if nested else (result or {})
    return row | ({"operation": reply.operation} if reply.operation else {})


def started(replies: Sequence[HostReply[object]]) -> str:
    """Return the ids of operations that were started, each behind its host's name if there are several hosts."""
    many = len(replies) > 1
    return "\n".join(f"{each.host}: {each.operation}" if many else each.operation for each in replies if each.operation)


def check(target: HostTarget, request: AnyRequest) -> None:
    """Refuse invalid names and ports before any connection is made. Raises `UsageError`."""
    subject = request.subject
    try:
        if subject.model is not None:
            names.model_name(subject.model)
        if subject.repo is not None:
            names.repo(subject.repo)
        if subject.port not in (None, names.AUTO) and not target.agreed:
            names.port(subject.port, target.settings.ports)
    except UsageError as error:
        raise aimed_error(error, target.flags) from None


def _not_asked(target: HostTarget) -> MlxopsError:
    return Interrupted(
        "not_asked",
        f"{target.name} was not asked",
        why="it comes after the host at which Ctrl-C was pressed",
        hint=f"run the same command again, with --host {target.name}",
    )


def _left_running(target: HostTarget, operation: str) -> MlxopsError:
    return Interrupted(
        "interrupted",
        f"operation {operation} was left running on {target.name}",
        why="it does not need this connection",
        hint=aimed(f"`mlxctl ops --follow {operation}`; or --cancel {operation}", target.flags),
    )


def _wants_cancel(operation: str) -> bool:
    """Ask the person at the terminal after Ctrl-C. Without a terminal the operation goes on."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    sys.stderr.write(f"\nOperation {operation}: leave it running (l) or cancel it (c)? [l] ")
    sys.stderr.flush()
    try:
        return sys.stdin.readline().strip().lower() in {"c", "cancel"}
    except KeyboardInterrupt:
        return False
