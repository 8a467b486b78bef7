"""mlx-openai-server: how it is found, and its options (tried with 1.4.2, 1.5.1, 1.7.1 and 1.8.1).

Versions before 1.7 have no option for the served name and answer to any name. Since 1.7 there is
`--served-model-name`. Since 1.8 that is the only name it answers to.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Mapping, Sequence

from mlxops.agent.engines.argv import check_model_args, long_options, parse_port, program_of
from mlxops.agent.engines.base import (
    DetectedServer,
    Engine,
    EngineCommand,
    ServedNames,
    ServerSpec,
    configured_command,
)
from mlxops.agent.engines.installation import find_program, older_than, split_command
from mlxops.core.budget import LimitOptions
from mlxops.core.errors import Refused

_EXCEPTION = re.compile(r"^[A-Za-z_][\w.]*(?:Error|Exception): .*(?:\n(?![A-Z]|\s*$).*)?", re.MULTILINE)

LAUNCH_VARIABLE = "MLX_LAUNCH_CMD"
UV_PROJECT = "/opt/mlx-launch"
HOMEBREW_UV = "/opt/homebrew/bin/uv"

_NAME_OPTION_SINCE = (1, 7)
_ONE_NAME_SINCE = (1, 8)
_CACHES_ON_DISK_SINCE = (1, 8)
"""It writes the contexts that it keeps to files in its temporary folder, and `--max-bytes` limits those files (tried
with 1.8.1: with a limit of 100000 bytes, the sixth file of 18.6 kB replaced the first)."""
_NO_LENGTH_UNTIL = (1, 8, 1)
"""The last version that was seen to give every answer without a tool call the finish reason `stop`."""
_CHAT_TYPES = frozenset({"lm", "multimodal"})
"""The values of `--model-type` that give chat completions. The others are embeddings, whisper and images."""
_PARSERS = ("tool_call_parser", "reasoning_parser")
_FLAGS = {
    "model_type": "--model-type",
    "chat_template": "--chat-template-file",
    "tool_call_parser": "--tool-call-parser",
    "reasoning_parser": "--reasoning-parser",
}


class MlxOpenAIServer(Engine):
    name = "mlx-openai-server"
    program = "mlx-openai-server"
    tested = "1.8.1; with `inv test --all-engines` also 1.7.1, 1.5.1 and 1.4.2"
    reserved = frozenset(
        {
            *("--model-path", "--host", "--port", "--served-model-name", "--config"),
            *("--log-file", "--no-log-file", "--trust-remote-code"),
        }
    )
    completion_paths = frozenset({"/v1/chat/completions", "/v1/responses"})  # source, 1.8.1
    limits = LimitOptions("--decode-concurrency", "--prompt-concurrency", "--max-bytes")
    needs = frozenset({"tool_call_parser", "reasoning_parser", "chat_template"})
    preload = ("app.cli", "app.main")
    json_schema = True
    # SIGINT after SIGTERM cuts the open requests (uvicorn's handle_exit; tried with 1.8.1).
    stop_signals = (signal.SIGTERM, signal.SIGINT)
    cut_signals = (signal.SIGINT,)

    def find_command(self, launch: Sequence[str], environ: Mapping[str, str]) -> EngineCommand:
        # This order is what users of the engine's own start script expect.
        if launch:
            return super().find_command(launch, environ)
        if LAUNCH_VARIABLE in environ:
            argv = split_command(environ[LAUNCH_VARIABLE], LAUNCH_VARIABLE)
            return configured_command(argv, LAUNCH_VARIABLE, environ)
        path = find_program(self.program, environ)
        if path:
            return EngineCommand((path, "launch"), "PATH")
        for uv in (find_program("uv", environ), HOMEBREW_UV):
            if uv and os.path.isfile(uv) and os.path.isdir(UV_PROJECT):
                return EngineCommand((uv, "run", "--project", UV_PROJECT, self.program, "launch"), f"{uv} run")
        raise Refused(
            "engine_not_found",
            "the engine mlx-openai-server is not installed on the host",
            why=f"{LAUNCH_VARIABLE} is not set, {self.program} is neither on PATH nor in a usual folder, "
            f"and there is no uv with {UV_PROJECT}",
            hint=f"install it there, set {LAUNCH_VARIABLE} there, or set `launch` or `engine: mlx-lm` in hosts.yaml",
        )

    def help_argv(self, command: EngineCommand, spec: ServerSpec) -> tuple[str, ...]:
        # Each version has other names of parsers. --help lists them, but takes seconds.
        if command.version is None or spec.model.args or any(spec.text(key) for key in _PARSERS):
            return (*command.argv, "--help")
        return ()

    def argv(self, command: EngineCommand, spec: ServerSpec) -> tuple[str, ...]:
        model = spec.model
        check_model_args(self.name, model, self.reserved, command.help)
        _check_parsers(command, spec)
        own = {word.partition("=")[0] for word in model.args}
        values = {key: spec.text(key) for key in _FLAGS}
        if not spec.has("model_type"):
            values["model_type"] = "lm"
        flags = [
            word for key, flag in _FLAGS.items() if flag not in own and (value := values[key]) for word in (flag, value)
        ]
        tools = "--tool-call-parser" in flags and "--enable-auto-tool-choice" not in own
        return (
            *command.argv,
            *("--model-path", str(spec.path)),
            *(("--served-model-name", spec.alias) if _has_name_option(command) else ()),
            *("--host", spec.bind, "--port", str(spec.port), "--no-log-file"),
            *flags,
            *(("--enable-auto-tool-choice",) if tools else ()),
            *(("--context-length", str(model.context_length)) if model.context_length else ()),
            *(("--trust-remote-code",) if model.trust_remote_code else ()),
            *model.args,
        )

    def limit_options(self, spec: ServerSpec, argv: Sequence[str]) -> LimitOptions:
        options, kind = super().limit_options(spec, argv), self.model_type(argv)
        if kind not in _CHAT_TYPES:
            return LimitOptions()
        return options if kind == "lm" else options.only({options.requests, options.prompts})

    def model_type(self, argv: Sequence[str]) -> str:
        return long_options(argv).get("--model-type", "lm")

    def context_length(self, argv: Sequence[str]) -> int | None:
        text = long_options(argv).get("--context-length", "")
        return int(text) if text.isascii() and text.isdecimal() else None

    def says_length(self, version: str | None) -> bool:
        numbers = re.match(r"(\d+)\.(\d+)\.(\d+)", version or "")
        return numbers is None or tuple(map(int, numbers.groups())) > _NO_LENGTH_UNTIL

    def keeps_caches_in_memory(self, version: str | None) -> bool:
        return older_than(_CACHES_ON_DISK_SINCE, version)

    def recognise(self, argv: Sequence[str]) -> DetectedServer | None:
        if not _is_server(argv):
            return None
        options = long_options(argv)
        model, host = options.get("--model-path", ""), options.get("--host", "0.0.0.0")
        if "--config" in options:
            return DetectedServer(None, model, None)  # the file sets the port; `--port` is ignored
        port = parse_port(options.get("--port", "8000"))
        return DetectedServer(port, model, host) if port is not None else None

    def served_name(self, argv: Sequence[str]) -> str | None:
        options = long_options(argv)
        return options.get("--served-model-name") or options.get("--model-path")

    def accepts_any_name(self, version: str | None) -> bool:
        return older_than(_ONE_NAME_SINCE, version)

    def accepted_names(self, argv: Sequence[str], version: str | None) -> ServedNames:
        options = long_options(argv)
        if options.get("--config"):
            return ServedNames(drops=False, not_asked="the names that it serves are in its --config file")
        kind, name = self.model_type(argv), self.served_name(argv)
        if not name:
            return ServedNames(drops=False, not_asked="its name is not known: its command names no model")
        return ServedNames(
            (name,),
            any=self.accepts_any_name(version),
            # Without a version and --served-model-name, it may be an old version, which answers to any name.
            sure=version is not None or "--served-model-name" in options,
            drops=False,
            not_asked="" if kind in _CHAT_TYPES else f"it serves {kind}, which gives no chat completions",
        )

    # It opens its port only when its start-up has finished. GET /health shows only that the front end answers: it stays
    # 200 when the process with the weights has died. GET /v1/queue/stats would start that process again.

    def fatal_error(self, log: str) -> str | None:
        if "Application startup failed" not in log:
            return None
        exceptions = _EXCEPTION.findall(log)
        return " ".join(str(exceptions[-1]).split()) if exceptions else "Application startup failed"


def _is_server(argv: Sequence[str]) -> bool:
    """Return whether this is the console script with `launch`, or its module `app.main`.

    Other programs also have a module `app.main`, so its arguments must include an option of this engine.
    """
    program = program_of(argv)
    if program is None or "--help" in program.arguments:
        return False
    if program.name == MlxOpenAIServer.program:
        return "launch" in program.arguments[:2]
    if program.module == "app.main" or program.path.endswith("app/main.py"):
        return bool({"--model-path", "--config"} & long_options(program.arguments).keys())
    return False


def known_options(text: str) -> dict[str, tuple[str, ...]]:
    """Parse the output of `launch --help` (Click's form): each option with its values; none if any value is allowed."""
    options = re.findall(r"^  (--[a-z][a-z-]*)(?: \[([^\]]*)\])?", text, re.MULTILINE)
    return {flag: tuple("".join(values.split()).split("|")) if values else () for flag, values in options}


def _has_name_option(command: EngineCommand) -> bool:
    if command.help is not None:
        return "--served-model-name" in known_options(command.help)
    return not older_than(_NAME_OPTION_SINCE, command.version)


def _check_parsers(command: EngineCommand, spec: ServerSpec) -> None:
    """Raise `Refused` (unknown_parser) for a parser that the installed version does not have: it would not start."""
    known = known_options(command.help) if command.help is not None else {}
    for key in _PARSERS:
        name, names = spec.text(key), known.get(_FLAGS[key], ())
        if name and names and name not in names:
            raise Refused(
                "unknown_parser",
                f"mlx-openai-server {command.version or ''} has no {key} {name!r}".replace("  ", " "),
                why=f"it has {', '.join(names)}",
                hint=f"set {key} to one of those, or to none: `mlxctl set --model {spec.model.name} --set {key}=null`",
            )


ENGINE = MlxOpenAIServer()
