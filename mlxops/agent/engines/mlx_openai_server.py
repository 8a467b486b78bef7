"""mlx-openai-server: where it is found, in the order that its users rely on, and its options (tried with 1.4.2, 1.5.1,
1.7.1 and 1.8.1).

Until 1.6 it answers to any name, and has no option for one. Since 1.7 it has `--served-model-name`; since 1.8 that
is the only name that it answers to.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence

from mlxops.agent.engines.base import (
    Command,
    DetectedServer,
    Names,
    Serving,
    check_args,
    expand,
    older_than,
    options,
    port_number,
    program,
    runnable,
    split,
    status_health,
    which,
)
from mlxops.core.errors import Refused
from mlxops.core.ports import Health

_EXCEPTION = re.compile(r"^[A-Za-z_][\w.]*(?:Error|Exception): .*(?:\n(?![A-Z]|\s*$).*)?", re.MULTILINE)

VARIABLE = "MLX_LAUNCH_CMD"
PROJECT = "/opt/mlx-launch"
HOMEBREW_UV = "/opt/homebrew/bin/uv"

_NAMED_SINCE = (1, 7)
_STRICT_SINCE = (1, 8)
_CHATS = frozenset({"lm", "multimodal"})
"""Its `--model-type`s that answer chat completions; the others are embeddings, whisper and images."""
_PARSERS = ("tool_call_parser", "reasoning_parser")
_FLAGS = {
    "model_type": "--model-type",
    "chat_template": "--chat-template-file",
    "tool_call_parser": "--tool-call-parser",
    "reasoning_parser": "--reasoning-parser",
}


class MlxOpenAIServer:
    name = "mlx-openai-server"
    distribution = "mlx_openai_server"
    completion_paths = frozenset({"/v1/chat/completions", "/v1/responses"})  # source, 1.8.1
    reserved = frozenset(
        {
            *("--model-path", "--host", "--port", "--served-model-name", "--config"),
            *("--log-file", "--no-log-file", "--trust-remote-code"),
        }
    )
    needs = frozenset({"tool_call_parser", "reasoning_parser", "chat_template"})
    drains = True

    def command(self, launch: Sequence[str], environ: Mapping[str, str]) -> Command:
        if launch:
            return runnable(expand(launch, environ), "`launch` in hosts.yaml")
        if VARIABLE in environ:
            return runnable(expand(split(environ[VARIABLE], VARIABLE), environ), VARIABLE)
        program = which(self.name, environ)
        if program:
            return Command((program, "launch"), "PATH")
        for uv in (which("uv", environ), HOMEBREW_UV):
            if uv and os.path.isfile(uv) and os.path.isdir(PROJECT):
                return Command((uv, "run", "--project", PROJECT, self.name, "launch"), f"{uv} run")
        raise Refused(
            "engine_not_found",
            "the engine mlx-openai-server is not installed on the host",
            why=f"looked at {VARIABLE}, for {self.name} on PATH and in the usual folders, and for uv with {PROJECT}",
            hint=f"install it there, set {VARIABLE} there, or set `launch` or `engine: mlx-lm` in hosts.yaml",
        )

    def inquiry(self, command: Command, serving: Serving) -> tuple[str, ...]:
        # Its names of parsers change from version to version, and it takes seconds to say which it has.
        if command.version is None or serving.model.args or any(serving.text(key) for key in _PARSERS):
            return (*command.argv, "--help")
        return ()

    def argv(self, command: Command, serving: Serving) -> tuple[str, ...]:
        model = serving.model
        check_args(self.name, model, self.reserved, command.help)
        _check_parsers(command, serving)
        own = {word.partition("=")[0] for word in model.args}
        given = {key: serving.text(key) for key in _FLAGS}
        if not serving.has("model_type"):
            given["model_type"] = "lm"
        flags = [
            word for key, flag in _FLAGS.items() if flag not in own and (value := given[key]) for word in (flag, value)
        ]
        tools = "--tool-call-parser" in flags and "--enable-auto-tool-choice" not in own
        return (
            *command.argv,
            *("--model-path", str(serving.path)),
            *(("--served-model-name", serving.alias) if _takes_a_name(command) else ()),
            *("--host", serving.bind, "--port", str(serving.port), "--no-log-file"),
            *flags,
            *(("--enable-auto-tool-choice",) if tools else ()),
            *(("--context-length", str(model.context_length)) if model.context_length else ()),
            *(("--trust-remote-code",) if model.trust_remote_code else ()),
            *model.args,
        )

    def prepare(self, serving: Serving) -> None:
        """It needs nothing in its folder."""

    def environment(self) -> Mapping[str, str]:
        return {"HF_HUB_OFFLINE": "1"}

    def recognise(self, argv: Sequence[str]) -> DetectedServer | None:
        if not _is_server(argv):
            return None
        given = options(argv)
        model, host = given.get("--model-path", ""), given.get("--host", "0.0.0.0")
        if "--config" in given:
            return DetectedServer(None, model, None)  # the file says where it listens; `--port` is ignored
        port = port_number(given.get("--port", "8000"))
        return DetectedServer(port, model, host) if port is not None else None

    def served_name(self, argv: Sequence[str]) -> str | None:
        given = options(argv)
        return given.get("--served-model-name") or given.get("--model-path")

    def any_name(self, version: str | None) -> bool:
        # Since 1.8 the name in a request has to be the served one; before, it is not looked at.
        return older_than(_STRICT_SINCE, version)

    def further_names(self, version: str | None) -> tuple[str, ...]:
        return ()

    def names(self, argv: Sequence[str], version: str | None) -> Names:
        given = options(argv)
        if given.get("--config"):
            return Names(drops=False, not_asked="the names that it serves are in its --config file")
        kind, name = given.get("--model-type", "lm"), self.served_name(argv)
        if not name:
            return Names(drops=False, not_asked="its name is not known: its command names no model")
        return Names(
            (name,),
            any=self.any_name(version),
            # An unknown version that serves under the path of its model may be one that answers to any name.
            sure=version is not None or "--served-model-name" in given,
            drops=False,
            not_asked="" if kind in _CHATS else f"it serves {kind}, which gives no chat completions",
        )

    def health(self, host: str, port: int, timeout: float) -> Health:
        # It binds only after its start-up. /health stays 200 when the process with the weights has died, and
        # /v1/queue/stats would start that one anew, so this says only that the front answers.
        return status_health(host, port, timeout)

    def fatal(self, log: str) -> str | None:
        if "Application startup failed" not in log:
            return None
        found = _EXCEPTION.findall(log)
        return " ".join(str(found[-1]).split()) if found else "Application startup failed"


def _is_server(argv: Sequence[str]) -> bool:
    """Whether this is the console script with `launch`, or its module `app.main`. Others use that name, too, so the
    module must have this program's options."""
    runs = program(argv)
    if runs is None or "--help" in runs.arguments:
        return False
    if runs.name == MlxOpenAIServer.name:
        return "launch" in runs.arguments[:2]
    if runs.module == "app.main" or runs.path.endswith("app/main.py"):
        return bool({"--model-path", "--config"} & options(runs.arguments).keys())
    return False


def known_options(text: str) -> dict[str, tuple[str, ...]]:
    """Its `launch --help` (Click's form): each option with the values that it can have; none where any will do."""
    found = re.findall(r"^  (--[a-z][a-z-]*)(?: \[([^\]]*)\])?", text, re.MULTILINE)
    return {flag: tuple("".join(values.split()).split("|")) if values else () for flag, values in found}


def _takes_a_name(command: Command) -> bool:
    if command.help is not None:
        return "--served-model-name" in known_options(command.help)
    return not older_than(_NAMED_SINCE, command.version)


def _check_parsers(command: Command, serving: Serving) -> None:
    """Raises `Refused` for a parser that the installed version does not have: it would not start."""
    known = known_options(command.help) if command.help is not None else {}
    for key in _PARSERS:
        name, names = serving.text(key), known.get(_FLAGS[key], ())
        if name and names and name not in names:
            raise Refused(
                "unknown_parser",
                f"mlx-openai-server {command.version or ''} has no {key} {name!r}".replace("  ", " "),
                why=f"it has {', '.join(names)}",
                hint=f"set {key} to one of those, or to none: mlxctl set --model {serving.model.name} --set {key}=null",
            )


ENGINE = MlxOpenAIServer()
