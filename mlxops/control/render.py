"""The one sink of output: data on standard output, talk on standard error; tables, progress, JSON.

Text from a host is from outside: it is escaped before a terminal sees it.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from mlxops.control.client import HostReply
from mlxops.control.hints import aimed
from mlxops.core.errors import Exit, MlxopsError, OutputFailed, worst
from mlxops.core.protocol import Event, LogLine, Note, Phase, Progress

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

SCHEMA = 1
LINE_SECONDS = 60.0
"""How often progress is told at least, where there is no terminal to draw a bar on."""
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def harmless(text: object) -> str:
    """Text that cannot steer a terminal: control and direction characters are escaped, tabs and ends of lines stay."""
    return _CONTROL.sub(lambda found: ascii(found.group())[1:-1], str(text))


def one_log_line(text: object) -> str:
    """A line of a log, its spaces kept."""
    return harmless(text).replace("\n", " ")


def one_line(text: object) -> str:
    return " ".join(harmless(text).split())


def document(command: str, answers: Sequence[HostReply], per_host: Mapping[str, Mapping[str, object]]) -> str:
    """The JSON document of a command. `per_host` holds what each host's row shows beside its name and error."""
    return _json(_document(command, answers, per_host))


def document_line(command: str, answers: Sequence[HostReply], per_host: Mapping[str, Mapping[str, object]]) -> str:
    """The same, where there are many, one a line."""
    return json_line(_document(command, answers, per_host))


def _document(
    command: str, answers: Sequence[HostReply], per_host: Mapping[str, Mapping[str, object]]
) -> dict[str, object]:
    hosts = [
        {
            "host": answer.host,
            "reachable": answer.reachable,
            "error": answer.error.to_wire() if answer.error else None,
            **per_host.get(answer.host, {}),
        }
        for answer in answers
    ]
    return {"schema": SCHEMA, "command": command, "ok": all(a.error is None for a in answers), "hosts": hosts}


def error_document(command: str, error: MlxopsError, *, indent: int | None = 2) -> str:
    """The JSON document of a command that came to no host. `indent` None: on one line."""
    document = {"schema": SCHEMA, "command": command, "ok": False, "hosts": [], "error": error.to_wire()}
    return _json(document) if indent else json_line(document)


def _json(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=True)


def json_line(value: object) -> str:
    """One of many documents, on one line."""
    return json.dumps(value, ensure_ascii=True)


def exit_of(answers: Sequence[HostReply]) -> Exit:
    return worst([answer.error.exit for answer in answers if answer.error])


class Console:
    """Notes, phases, progress and errors on standard error, as they come; from several hosts at once, one line each.

    On a terminal a download has a bar; elsewhere its progress is a line for every tenth, and at least every minute.
    A log's lines are data.
    """

    def __init__(self, *, many: bool, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self.many = many
        """What is told begins with its host's name."""
        self._lock = threading.Lock()
        self._tenths: dict[str, tuple[int, float]] = {}
        self._bar: Bar | None = None
        self._tasks: dict[str, TaskID] = {}
        self._terminal = self._stream.isatty()

    def __enter__(self) -> Console:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar away; what follows is plain lines."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
            self._tasks.clear()

    def hear(self, host: str, event: Event) -> None:
        """What an agent tells; the callback of `client.ask`."""
        with self._lock:
            match event:
                case Note(message, level):
                    self._line(host, f"warning: {message}" if level == "warning" else message)
                case Phase(name, message):
                    self._line(host, f"{name}: {message}")
                case Progress() as progress:
                    self._progress(host, progress)
                case LogLine(text):
                    say(one_log_line(text))

    def note(self, message: str) -> None:
        with self._lock:
            self._line("", message)

    def error(self, host: str, error: MlxopsError) -> None:
        """What, why, what next: a line each."""
        with self._lock:
            self._line(host, f"error: {error.message}")
            for word, text in (("why", error.why), ("next", error.hint)):
                if text:
                    self._line(host, f"  {word}: {text}")

    def _line(self, host: str, text: str) -> None:
        prefix = f"{host}: " if self.many and host else ""
        words = prefix + (harmless(text).replace("\n", " "))
        if self._bar is not None:
            self._bar.console.print(words, markup=False, highlight=False, soft_wrap=True)
        else:
            try:
                print(words, file=self._stream, flush=True)
            except OSError:
                discard(self._stream.fileno())  # nobody hears it; what is to be done is done all the same

    def _progress(self, host: str, progress: Progress) -> None:
        name, done, total = progress.name, progress.done, progress.total
        if not self._terminal:
            tenth = done * 10 // total if total else 0
            told, at = self._tenths.get(host, (-1, 0.0))
            if tenth > told or time.monotonic() - at > LINE_SECONDS:
                self._tenths[host] = (tenth, time.monotonic())
                self._line(host, f"{name}: {progress}")
            return
        if self._bar is None:
            self._bar = self._new_bar()
            self._bar.start()
        key = f"{host} {name}"
        if key not in self._tasks:
            self._tasks[key] = self._bar.add_task(key if self.many else name, total=total or None)
        self._bar.update(self._tasks[key], completed=done, total=total or None)

    def _new_bar(self) -> Bar:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
        from rich.progress import Progress as RichProgress

        return RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(file=self._stream),
        )


def discard(number: int) -> None:
    """Nothing more can be written to this descriptor; the interpreter must not complain about that at its end."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, number)
    os.close(null)


def say(text: str, end: str = "\n") -> None:
    """Data, on standard output. Raises `BrokenPipeError` when nobody reads it any more, else `OutputFailed`."""
    try:
        if sys.stdout is None:  # Python's own way to say that it was closed before we began
            raise OSError("it is closed")
        print(text, end=end, flush=True)  # noqa: T201
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputFailed(
            "output_unwritten",
            "the result could not be written to standard output",
            why=error.strerror or str(error),
            hint="what was asked was done all the same; see: mlxctl status, mlxctl ops",
        ) from None


def size(number: object) -> str:
    if not isinstance(number, int):
        return "-"
    if number < 0:
        return f"-{size(-number)}"
    if number < 1000:
        return f"{number} B"
    value = float(number)
    for unit in ("kB", "MB", "GB", "TB"):
        value /= 1000
        if value < 999.5 or unit == "TB":
            break
    return f"{value:.1f} {unit}"


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Plain columns, aligned, without colours or borders: as readable in a pipe as on a terminal."""
    cells = [["-" if cell is None else one_line(cell) or "-" for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [list(columns), *cells]
    ]
    return "\n".join(lines)


def _rows(result: Mapping[str, object] | None, key: str) -> list[Mapping[str, object]]:
    rows = (result or {}).get(key)
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def status_table(answers: Sequence[HostReply]) -> str:
    many = len(answers) > 1
    rows: list[list[object]] = []
    for answer in answers:
        if answer.error is not None and answer.result is None:
            rows.append([answer.host, "", "", answer.error.code, "", "", "", answer.error.message])
        for row in _rows(answer.result, "ports"):
            rows.append(
                [
                    answer.host,
                    *(row.get(key) for key in ("port", "alias", "state", "owner", "model")),
                    size(row.get("memory_bytes")),
                    _detail(row),
                ]
            )
    columns = ["HOST", "PORT", "ALIAS", "STATE", "OWNER", "MODEL", "MEMORY", "DETAIL"]
    text = table(columns if many else columns[1:], rows if many else [row[1:] for row in rows])
    drift = [
        f"drift: {f'{answer.host}: ' if many else ''}{one_line(row.get('message'))}; {one_line(row.get('hint'))}"
        for answer in answers
        for row in _rows(answer.result, "drift")
    ]
    running = [
        one_line(f"running: {row.get('command')} {row.get('operation')}: {row.get('detail')}")
        for answer in answers
        for row in _rows(answer.result, "operations")
    ]
    return "\n".join([text, *running, *drift])


def ops_table(answers: Sequence[HostReply]) -> str:
    rows: list[list[object]] = []
    for answer in answers:
        if answer.error is not None:
            rows.append([answer.host, "", "", "", "", answer.error.code, answer.error.message])
        for row in _rows(answer.result, "operations"):
            what = row.get("model") or row.get("repo")
            about = [answer.host, row.get("operation"), row.get("command"), what, row.get("port")]
            rows.append([*about, row.get("state"), row.get("detail")])
    return table(["HOST", "OPERATION", "COMMAND", "MODEL", "PORT", "STATE", "DETAIL"], rows)


def _detail(row: Mapping[str, object]) -> object:
    """A port's detail, and what came of the completion that was asked for."""
    probe = row.get("probe")
    if not isinstance(probe, dict):
        return row.get("detail")
    if probe.get("not_asked"):
        told = f"not asked: {probe.get('not_asked')}"
    elif probe.get("ok"):
        other = probe.get("name") not in (None, row.get("alias"), row.get("model"))
        told = f"completion in {probe.get('seconds')} s" + (f" as {probe.get('name')}" if other else "")
    else:
        told = "no completion"
    return "; ".join(filter(None, [str(row.get("detail") or ""), told]))


def list_table(answers: Sequence[HostReply]) -> str:
    many = len(answers) > 1
    rows: list[list[object]] = []
    for answer in answers:
        if answer.error is not None:
            rows.append([answer.host, answer.error.code, "", "", "", "", "", "", answer.error.message])
        registry = (answer.result or {}).get("registry_error")
        if isinstance(registry, dict):
            why = f"{registry.get('message')}: {registry.get('why')}"
            rows.append([answer.host, registry.get("code"), "", "", "", "", "", "", why])
        for row in _rows(answer.result, "models"):
            problems = row.get("problems")
            rows.append(
                [
                    answer.host,
                    row.get("name"),
                    row.get("repo_id"),
                    str(row.get("revision") or "")[:12],
                    size(row.get("size_bytes")),
                    row.get("format"),
                    row.get("port"),
                    _options(row.get("flags")),
                    "; ".join(map(str, problems)) if isinstance(problems, list) else "",
                ]
            )
    if not rows:
        flags = "" if many else "".join(answer.flags for answer in answers)
        told = "no models are registered; what the cache holds: mlxctl init; or load one: mlxctl load ORG/NAME PORT"
        return aimed(told, flags)
    columns = ["HOST", "NAME", "REPO", "REVISION", "SIZE", "FORMAT", "PORT", "FLAGS", "PROBLEMS"]
    return table(columns if many else columns[1:], rows if many else [row[1:] for row in rows])


def _options(flags: object) -> str:
    """`key=value (origin)` of each but the host's own default, which is the same for all."""
    shown = []
    for flag in flags if isinstance(flags, list) else []:
        if isinstance(flag, dict) and flag.get("origin") != "settings":
            value = flag.get("value")
            words = " ".join(map(str, value)) if isinstance(value, list) else "null" if value is None else str(value)
            shown.append(f"{flag.get('key')}={words} ({flag.get('origin')})")
    return ", ".join(shown)


def memory_table(answers: Sequence[HostReply]) -> str:
    """What serves, against the budget, and what each registered model would take."""
    return "\n\n".join(_memory_of(answer, many=len(answers) > 1) for answer in answers)


def _memory_of(answer: HostReply, *, many: bool) -> str:
    title = [f"{answer.host}:"] if many else []
    if answer.error is not None:
        return "\n".join([*title, one_line(answer.error.message)])
    memory = (answer.result or {}).get("memory")
    memory = memory if isinstance(memory, dict) else {}
    left = memory.get("left_bytes")
    sizes = ("estimated_bytes", "resident_bytes", "counted_bytes")
    serving = [
        [*(row.get(key) for key in ("port", "model", "owner")), *(size(row.get(key)) for key in sizes)]
        for row in _rows(memory, "servers")
    ]
    models = [_need_row(row, left) for row in _rows(answer.result, "models")]
    return "\n".join(
        [
            *title,
            f"budget {size(memory.get('budget_bytes'))} ({one_line(memory.get('budget_source'))}), "
            f"in use {size(memory.get('used_bytes'))}, left {size(left)}",
            "",
            table(["PORT", "SERVES", "OWNER", "ESTIMATE", "RESIDENT", "COUNTED"], serving),
            "",
            table(["MODEL", "PORT", "WEIGHTS", "CONTEXT", "TOKENS", "NEEDS", "FITS NOW"], models),
        ]
    )


def _need_row(row: Mapping[str, object], left: object) -> list[object]:
    expected = row.get("memory")
    need = expected if isinstance(expected, dict) else {}
    total = need.get("total_bytes")
    fits = "-" if not isinstance(total, int) or not isinstance(left, int) else "yes" if total <= left else "no"
    weights, context = size(need.get("weight_bytes")), size(need.get("context_bytes"))
    if need.get("upper_estimate"):
        context = f"up to {context}"
    return [row.get("name"), row.get("port"), weights, context, need.get("context_tokens"), size(total), fits]


def _set_lines(result: Mapping[str, object]) -> str:
    verb = "would change" if result.get("dry_run") else "changed" if result.get("changed") else "was so already"
    revision = f"revision {result['revision']}" if result.get("revision") else ""
    settings = ", ".join(filter(None, [_options(result.get("options")), revision]))
    return one_line(f"{result.get('model')} {verb}: {settings or 'no settings of its own'}")


def gateway_table(answers: Sequence[HostReply]) -> str:
    many = len(answers) > 1
    rows: list[list[object]] = []
    for answer in answers:
        for row in _rows(answer.result, "aliases"):
            passage = row.get("through")
            through = (
                ("ok" if passage.get("ok") else str(passage.get("code"))) + f" ({passage.get('seconds')} s)"
                if isinstance(passage, dict)
                else ""
            )
            named = (row.get(key) for key in ("port", "sends", "state", "owner", "model", "context_length"))
            names = row.get("names")
            alias = ", ".join(map(str, names)) if isinstance(names, list) and names else row.get("alias")
            rows.append([answer.host, alias, *named, through, row.get("verdict")])
    columns = ["HOST", "ALIAS", "PORT", "SENDS", "STATE", "OWNER", "MODEL", "CONTEXT", "THROUGH", "VERDICT"]
    found = [row for answer in answers for row in _rows(answer.result, "findings")]
    findings = [
        f"{row.get('severity')}: {one_line(row.get('message'))}; {one_line(row.get('hint'))}"
        for row in sorted(found, key=lambda row: row.get("severity") != "fault")
    ]
    return "\n".join([table(columns if many else columns[1:], rows if many else [row[1:] for row in rows]), *findings])


def change_lines(command: str, result: Mapping[str, object]) -> str:
    """What a change came to, for people."""
    match command:
        case "init":
            return _init_lines(result)
        case "unload-all":
            rows = _rows(result, "ports")
            return "\n".join(_unload_line(row) for row in rows) or "nothing to unload"
        case "set":
            return _set_lines(result)
        case "reconcile":
            return _reconcile_lines(result)
        case "unload":
            return _unload_line(result)
        case "pull" | "remove":
            return _files_line(result)
        case "restore":
            return _restore_line(result)
        case "boot":
            return _boot_lines(result)
        case "ops":
            return _ops_line(result)
        case "deploy":
            return _deploy_lines(result)
    return _load_line(result)


def _deploy_lines(result: Mapping[str, object]) -> str:
    verb = "installed" if result.get("changed") else "already installed"
    if result.get("dry_run"):
        verb = "would be installed" if result.get("changed") else "is installed"
    build, own, pruned = result.get("build"), result.get("own_build"), result.get("pruned")
    lines = [f"agent {build} {verb} at {result.get('path')}"]
    if isinstance(pruned, list) and pruned:
        lines.append(f"removed older builds: {', '.join(map(str, pruned))}")
    if build != own:
        lines.append(f"this mlxops is {own}: changes need the control node of {build}, or another deploy")
    return "\n".join(map(one_line, lines))


def _files_line(result: Mapping[str, object]) -> str:
    if "freed_bytes" in result:
        verb = "would free" if result.get("dry_run") else "freed"
        kept = result.get("kept")
        rest = f"; {len(kept)} other revisions of it stay" if isinstance(kept, list) and kept else ""
        return one_line(f"{result.get('model')}: {verb} {size(result.get('freed_bytes'))}{rest}")
    if result.get("dry_run"):
        return one_line(f"would ask the hub for {result.get('repo_id')}; here: {result.get('revision') or 'nothing'}")
    verb = "is here" if result.get("changed") else "was here already"
    checked = result.get("verified_files")
    proof = f", the content of {checked} files verified" if checked is not None else ""
    what = f"{result.get('repo_id')} at {str(result.get('revision'))[:12]} {verb}"
    return one_line(f"{what}: {size(result.get('size_bytes'))}{proof} ({result.get('seconds')} s)")


def _restore_line(result: Mapping[str, object]) -> str:
    def named(key: str) -> str:
        return ", ".join(f"{row.get('model')} on {row.get('port')}" for row in _rows(result, key))

    verb = "would start" if result.get("dry_run") else "started"
    left = f"; left: {named('skipped')}" if named("skipped") else ""
    return one_line(f"{verb} {named('restored') or 'nothing'}{left}")


def _boot_lines(result: Mapping[str, object]) -> str:
    files = result.get("files")
    files = files if isinstance(files, dict) else {}
    lines = [f"restore at boot: {one_line(result.get('state'))}"]
    lines += [f"{'' if text else 'not '}there: {one_line(path)}" for path, text in files.items()]
    for job in _rows(result, "boot_jobs"):
        name, port = job.get("label") or job.get("script"), job.get("port")
        lines.append(
            one_line(f"the host's own boot job {name} of port {port}: {job.get('standing')}; {job.get('detail')}")
        )
    told = result.get("told")
    return "\n".join([*lines, *(map(harmless, told) if isinstance(told, list) else [])])


def _ops_line(result: Mapping[str, object]) -> str:
    """What an operation that was followed or cancelled came to; whose command it was, its result tells."""
    if "cancelled" in result:
        end = (
            "was cancelled; nothing half done is left"
            if result["cancelled"]
            else "was done before it could be cancelled"
        )
        return one_line(f"operation {result.get('operation')} {end}")
    if "size_bytes" in result:
        return _files_line(result)
    if "restored" in result:
        return _restore_line(result)
    if "url" in result:
        return _unload_line(result) if result.get("state") == "idle" else _load_line(result)
    return "it is done"


def _load_line(result: Mapping[str, object]) -> str:
    if result.get("dry_run"):
        return _plan_lines(result)
    verb = "is ready" if result.get("changed") else "was ready already"
    if result.get("state") != "ready":
        verb = f"is {result.get('state')}"
    downtime = result.get("downtime_seconds")
    down = f", {downtime:.1f} s of downtime" if isinstance(downtime, int | float) else ""
    return one_line(
        f"{result.get('model')} {verb} on {result.get('port')} as {result.get('alias')} "
        f"({result.get('seconds')} s{down}): {result.get('url')}"
    )


def _unload_line(result: Mapping[str, object]) -> str:
    if result.get("dry_run"):
        return _plan_lines(result)
    notes = _notes(result)
    if result.get("changed") and result.get("state", "idle") == "idle":
        model = result.get("model") or "its server"
        done = f"{_place(result)} is idle; {model} is unloaded ({result.get('seconds')} s)"
        return "\n".join(map(one_line, [done, *notes]))
    return one_line("; ".join(notes) or f"{_place(result)} had nothing to unload")


def _notes(result: Mapping[str, object]) -> list[str]:
    notes = result.get("notes")
    return [str(note) for note in notes] if isinstance(notes, list) else []


def _place(result: Mapping[str, object]) -> str:
    return f"port {result.get('port')}" if result.get("port") else f"{result.get('model')}"


def _plan_lines(result: Mapping[str, object]) -> str:
    import shlex

    plan = result.get("plan")
    plan = plan if isinstance(plan, dict) else {}
    what = f"{result.get('model')} on {result.get('port')}: {plan.get('outcome', 'unload')}"
    # A load tells its notes while it plans.
    notes = [] if "outcome" in plan else _notes(result)
    if "outcome" not in plan and not plan.get("stops") and not plan.get("clears"):
        if notes:
            what, notes = "; ".join(notes), []
        elif result.get("state") == "idle":
            what = f"{_place(result)} has nothing to unload"
    lines = [f"{what} (dry run, nothing changed)"]
    lines += [f"  download: {plan['download']}"] if plan.get("download") else []
    lines += [f"  stop: {stop}" for stop in plan.get("stops") or []]
    lines += [f"  clear: {name}" for name in plan.get("clears") or []]
    lines += [f"  run: {shlex.join(map(str, plan['argv']))}"] if plan.get("argv") else []
    lines += [f"  note: {note}" for note in notes]
    return "\n".join(one_line(line) if not line.startswith("  ") else "  " + one_line(line) for line in lines)


def _init_lines(result: Mapping[str, object]) -> str:
    def names(key: str) -> list[str]:
        value = result.get(key)
        return [str(each) for each in value] if isinstance(value, list) else []

    word = "would add" if result.get("dry_run") else "added"
    lines = [f"{word} {name}" for name in names("added")]
    lines += [f"skipped {row.get('repo_id')}: {row.get('why')}" for row in _rows(result, "skipped")]
    lines.append(
        f"{word} {len(names('added'))}, already registered {len(names('existing'))}, "
        f"skipped {len(_rows(result, 'skipped'))} ({result.get('hub')})"
    )
    return "\n".join(map(one_line, lines))


def _reconcile_lines(result: Mapping[str, object]) -> str:
    would = "would be " if result.get("dry_run") else ""
    lines = [f"{row.get('model')}: assignment to {row.get('port')} {would}cleared" for row in _rows(result, "cleared")]
    lines += [
        f"{row.get('port')}: {row.get('model')}, pid {row.get('pid')}, {would}stopped: {row.get('why')}"
        for row in _rows(result, "stopped")
    ]
    for key, words in (
        ("interrupted", "closed" if not would else "would be closed"),
        ("leftovers", f"{would}removed"),
        ("kept", "left alone"),
    ):
        told = result.get(key)
        lines += [f"{words}: {each}" for each in told] if isinstance(told, list) else []
    return "\n".join(map(one_line, lines)) or "nothing to reconcile"
