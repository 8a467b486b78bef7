"""mlx-lm's server, `mlx_lm.server` (behaviour read in and tried with 0.32.2; failed loads also with 0.31.3's source).

It has no option for the name that it serves under: any name but the exact `--model` string makes it drop its
weights and try to load that name. So it is started in a folder where the alias is a link to the snapshot.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from mlxops.agent.engines.base import (
    Command,
    DetectedServer,
    Names,
    Serving,
    abbreviated,
    check_args,
    expand,
    older_than,
    port_number,
    program,
    runnable,
    status_health,
    template_text,
    which,
)
from mlxops.core.errors import Refused
from mlxops.core.ports import Health

_DEFAULT = "default_model"
"""Its name for the model that it was started with, whatever that is called."""
_BOTH_NAMES_SINCE = (0, 27)
"""Before that, the model's name and `default_model` were two models, and each request loaded the one it named (source
of 0.20.6 to 0.26.4; 0.27.1 to 0.32.2 take them for one)."""
CACHE = ".cache"
"""A Hugging Face cache with nothing in it, in the server's folder, which is its working directory."""
_DIED = "generation thread died: "
_EXCEPTION = re.compile(r"^[A-Za-z_][\w.]*(?:Error|Exception): .*$", re.MULTILINE)


class MlxLm:
    name = "mlx-lm"
    distribution = "mlx_lm"
    completion_paths = frozenset({"/v1/chat/completions", "/chat/completions", "/v1/completions"})  # source, 0.32.2
    reserved = frozenset({"--model", "--host", "--port", "--trust-remote-code", "--adapter-path"})
    needs: frozenset[str] = frozenset()  # it finds template and parsers by itself
    drains = False  # TERM ends it at once, open requests and all

    def command(self, launch: Sequence[str], environ: Mapping[str, str]) -> Command:
        if launch:
            return runnable(expand(launch, environ), "`launch` in hosts.yaml")
        program = which("mlx_lm.server", environ)
        if program is None:
            raise Refused(
                "engine_not_found",
                "the engine mlx-lm is not installed on the host",
                why="mlx_lm.server is neither on PATH nor in a usual folder",
                hint="install it there (uv tool install mlx-lm), or set launch: {mlx-lm: [...]} in hosts.yaml",
            )
        return Command((program,), "PATH")

    def inquiry(self, command: Command, serving: Serving) -> tuple[str, ...]:
        # Only of a plain installation: what else `launch` may name need not know --help.
        return (*command.argv, "--help") if serving.model.args and command.version else ()

    def argv(self, command: Command, serving: Serving) -> tuple[str, ...]:
        model = serving.model
        check_args(self.name, model, self.reserved, command.help)
        unusable = [key for key, value in model.options.items() if value is not None and key != "chat_template"]
        if unusable:
            raise Refused(
                "unsupported_option",
                f"mlx-lm has no option for {', '.join(unusable)}",
                why=f"the entry {model.name!r} sets it; only mlx-openai-server knows it",
                hint="take it out of the entry, or give the entry another engine",
            )
        template = serving.text("chat_template")
        return (
            *command.argv,
            *("--model", serving.alias, "--host", serving.bind, "--port", str(serving.port)),
            # It wants the template itself, not the name of a file.
            *(("--chat-template", template_text(template)) if template else ()),
            *(("--trust-remote-code",) if model.trust_remote_code else ()),
            *model.args,
        )

    def prepare(self, serving: Serving) -> None:
        link = serving.folder / serving.alias
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(serving.path, target_is_directory=True)
        (serving.folder / CACHE).mkdir(exist_ok=True)

    def environment(self) -> Mapping[str, str]:
        # A request under a wrong name must neither start a download nor load another model of the host's cache;
        # and without any cache, GET /v1/models has no answer.
        return {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": CACHE}

    def recognise(self, argv: Sequence[str]) -> DetectedServer | None:
        words = _server_options(argv)
        if words is None:
            return None
        port = port_number(abbreviated(words, "--port", len("--po")) or "8080")
        if port is None:
            return None
        model, host = abbreviated(words, "--model", len("--mo")), abbreviated(words, "--host", len("--ho"))
        return DetectedServer(port, model or "", host or "127.0.0.1")

    def served_name(self, argv: Sequence[str]) -> str | None:
        return abbreviated(argv, "--model", len("--mo"))

    def any_name(self, version: str | None) -> bool:
        return False

    def further_names(self, version: str | None) -> tuple[str, ...]:
        return () if older_than(_BOTH_NAMES_SINCE, version) else (_DEFAULT,)

    def names(self, argv: Sequence[str], version: str | None) -> Names:
        name = self.served_name(argv)
        if name is None:
            return Names(not_asked="its name is not known: it was started without --model")
        if older_than(_BOTH_NAMES_SINCE, version):
            return Names(not_asked=f"mlx-lm {version} loads its model again if a request uses another of its names")
        if abbreviated(argv, "--adapter-path", len("--ad")):
            # A request under the model's own name would load it again, without the adapter.
            return Names((_DEFAULT,))
        return Names((name, _DEFAULT))

    def health(self, host: str, port: int, timeout: float) -> Health:
        # 200 also while loading; 503 once the thread that generates has died.
        return status_health(host, port, timeout)

    def fatal(self, log: str) -> str | None:
        # 0.32: one message of one or more lines, then a traceback. Before: only the traceback of a thread.
        died = log.rfind(_DIED)
        if died >= 0:
            return " ".join(log[died + len(_DIED) :].partition("\nTraceback")[0].split())
        if "Exception in thread" not in log:
            return None
        found = _EXCEPTION.findall(log)
        return str(found[-1]).strip() if found else None


def _server_options(argv: Sequence[str]) -> tuple[str, ...] | None:
    """Return the options of `mlx_lm.server` or `mlx_lm server`, run as program, script or module; None for others."""
    runs = program(argv)
    if runs is None or {"-h", "--help"} & set(runs.arguments):
        return None
    if runs.name == "mlx_lm.server" or runs.path.endswith("mlx_lm/server.py"):
        return runs.arguments
    if runs.name == "mlx_lm" and runs.arguments[:1] == ("server",):
        return runs.arguments[1:]
    return None


ENGINE = MlxLm()
