"""mlx-lm's server, `mlx_lm.server`. Behaviour read in its source and tried with 0.32.2; failed loads also with 0.31.3.

It has no option for its served name. A request with a name other than the exact `--model` string makes it drop its
weights and try to load that name. So it runs in a folder where the alias is a link to the snapshot.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping, Sequence

from mlxops.agent.engines.argv import (
    abbreviated_option,
    check_model_args,
    check_model_options,
    is_preloaded,
    parse_port,
    program_of,
)
from mlxops.agent.engines.base import DetectedServer, Engine, EngineCommand, ServedNames, ServerSpec, template_text
from mlxops.agent.engines.installation import older_than
from mlxops.core.budget import LimitOptions
from mlxops.core.names import DEFAULT_MODEL

_ONE_MODEL_SINCE = (0, 27)
"""Older versions took the model's name and `default_model` for two models. Each request loaded the one that it named
(source of 0.20.6 to 0.26.4; 0.27.1 to 0.32.2 take them for one)."""
CACHE = ".cache"
"""An empty Hugging Face cache in the server's folder, which is its working directory."""
_DIED = "generation thread died: "
_EXCEPTION = re.compile(r"^[A-Za-z_][\w.]*(?:Error|Exception): .*$", re.MULTILINE)


class MlxLm(Engine):
    name = "mlx-lm"
    program = "mlx_lm.server"
    tested = "0.32.2"
    reserved = frozenset({"--model", "--host", "--port", "--trust-remote-code", "--adapter-path"})
    completion_paths = frozenset({"/v1/chat/completions", "/chat/completions", "/v1/completions"})  # source, 0.32.2
    # Source of 0.31.3 and 0.32.2. Each request that joins the others trims the kept contexts to --prompt-cache-bytes
    # less the contexts of open requests. At least --prompt-concurrency requests are answered at once.
    limits = LimitOptions("--decode-concurrency", "--prompt-concurrency", "--prompt-cache-bytes")
    preload = ("mlx_lm.server",)
    # It cleans up on SIGINT only. Open streams are cut at once, and it often ends with SIGABRT then (0.32.2). Started
    # with the start file, it finishes them at the first SIGINT, and cuts them at the second.
    stop_signals = (signal.SIGINT, signal.SIGTERM)
    cut_signals = stop_signals

    def argv(self, command: EngineCommand, spec: ServerSpec) -> tuple[str, ...]:
        model = spec.model
        check_model_args(self.name, model, self.reserved, command.help)
        check_model_options(self.name, model, {"chat_template"})
        template = spec.text("chat_template")
        return (
            *command.argv,
            *("--model", spec.alias, "--host", spec.bind, "--port", str(spec.port)),
            # It takes the template's text, not a file name.
            *(("--chat-template", template_text(template)) if template else ()),
            *(("--trust-remote-code",) if model.trust_remote_code else ()),
            *model.args,
        )

    def finishes_requests(self, argv: Sequence[str]) -> bool:
        return is_preloaded(argv)

    def prepare_folder(self, spec: ServerSpec) -> None:
        link = spec.folder / spec.alias
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(spec.path, target_is_directory=True)
        (spec.folder / CACHE).mkdir(exist_ok=True)

    def environment(self) -> Mapping[str, str]:
        # A request with a wrong name must neither start a download nor load another model of the host's cache.
        # Without a cache folder, GET /v1/models fails.
        return {**super().environment(), "HF_HUB_CACHE": CACHE}

    def recognise(self, argv: Sequence[str]) -> DetectedServer | None:
        options = _server_options(argv)
        if options is None:
            return None
        port = parse_port(abbreviated_option(options, "--port", len("--po")) or "8080")
        if port is None:
            return None
        model = abbreviated_option(options, "--model", len("--mo"))
        host = abbreviated_option(options, "--host", len("--ho"))
        return DetectedServer(port, model or "", host or "127.0.0.1")

    def served_name(self, argv: Sequence[str]) -> str | None:
        return abbreviated_option(argv, "--model", len("--mo"))

    def further_names(self, version: str | None) -> tuple[str, ...]:
        return () if older_than(_ONE_MODEL_SINCE, version) else (DEFAULT_MODEL,)

    def accepted_names(self, argv: Sequence[str], version: str | None) -> ServedNames:
        name = self.served_name(argv)
        if name is None:
            return ServedNames(not_asked="its name is not known: it was started without --model")
        if older_than(_ONE_MODEL_SINCE, version):
            return ServedNames(
                not_asked=f"mlx-lm {version} loads its model again if a request uses another of its names"
            )
        if abbreviated_option(argv, "--adapter-path", len("--ad")):
            # A request with the model's own name would load it again, without the adapter.
            return ServedNames((DEFAULT_MODEL,))
        return super().accepted_names(argv, version)

    # GET /health is 200 also while it loads, and 503 once its generation thread has died.

    def fatal_error(self, log: str) -> str | None:
        # 0.32: a message of one or more lines, then a traceback. Older versions: only the thread's traceback.
        died = log.rfind(_DIED)
        if died >= 0:
            return " ".join(log[died + len(_DIED) :].partition("\nTraceback")[0].split())
        if "Exception in thread" not in log:
            return None
        exceptions = _EXCEPTION.findall(log)
        return str(exceptions[-1]).strip() if exceptions else None


def _server_options(argv: Sequence[str]) -> tuple[str, ...] | None:
    """Return the options of `mlx_lm.server` or `mlx_lm server`, run as program, script or module; else None."""
    program = program_of(argv)
    if program is None or {"-h", "--help"} & set(program.arguments):
        return None
    if program.name == "mlx_lm.server" or program.path.endswith("mlx_lm/server.py"):
        return program.arguments
    if program.name == "mlx_lm" and program.arguments[:1] == ("server",):
        return program.arguments[1:]
    return None


ENGINE = MlxLm()
