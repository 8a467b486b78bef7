"""The base class of engines, and the types that it works with. A new engine is one new file in `engines`.

The steps are in `mlxops/docs/development.md`.
"""

from __future__ import annotations

import re
import signal
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

from mlxops.agent.engines.argv import long_options
from mlxops.agent.engines.installation import check_executable, expand_command, find_program
from mlxops.common import files
from mlxops.common.http import CHAT_COMPLETIONS, probe_health
from mlxops.core.budget import LimitOptions, Limits
from mlxops.core.errors import Refused
from mlxops.core.frozen import dataclass
from mlxops.core.model_options import Option
from mlxops.core.ports import Health
from mlxops.core.registry import Model
from mlxops.core.text import utf8

MAX_TEMPLATE_BYTES = 1024 * 1024
"""The longest chat templates have about 30,000 bytes."""


@dataclass(frozen=True)
class EngineCommand:
    """How to run an engine: the argv before its options, and where that argv was found."""

    argv: tuple[str, ...]
    source: str
    version: str | None = None
    """Known only for a plain Python installation, where it can be read without running the engine."""
    help: str | None = None
    """The engine's help text; None if it was not needed."""


@dataclass(frozen=True)
class ServerSpec:
    """One model to serve on one port: everything that the server's argv is made from."""

    model: Model
    alias: str
    path: Path
    bind: str
    port: int
    folder: Path
    """The server's own folder, which is its working directory."""
    options: tuple[Option, ...] = ()
    """The model's own options and the defaults of its family. Paths are absolute."""

    def text(self, key: str) -> str | None:
        """Return the value of a text option; None if it is absent or switched off."""
        return next((o.value for o in self.options if o.key == key and isinstance(o.value, str)), None)

    def has(self, key: str) -> bool:
        """Return whether the option is set. A null, which switches the option off, counts as set."""
        return any(option.key == key for option in self.options)


@dataclass(frozen=True)
class DetectedServer:
    """What the argv of a running engine shows."""

    port: int | None
    """The configured port; None if the argv does not show it. The process may listen on another port."""
    model: str
    """As in the argv: a path, a repo id or an alias."""
    host: str | None


@dataclass(frozen=True)
class ServedNames:
    """The model names that a running server accepts for its loaded model."""

    known: tuple[str, ...] = ()
    """The first one is preferred. Empty if argv and version do not show any."""
    any: bool = False
    """The server accepts any name."""
    sure: bool = True
    """False: the argv may also belong to an older version, which accepts any name."""
    drops: bool = True
    """A request with an unknown name makes the server drop its model."""
    not_asked: str = ""
    """Why the server must not get a completion request; empty if it may."""


class Engine(ABC):
    """One server program. An engine defines `name`, `program`, `reserved`, `argv`, `recognise` and `served_name`.

    Everything else has a default. Override it where the engine differs.
    """

    name: str
    program: str
    """The executable to look for on PATH."""
    reserved: frozenset[str]
    """Options that only mlxops sets. They are refused in a model's `args`."""
    completion_paths: frozenset[str] = frozenset({CHAT_COMPLETIONS})
    """The URL paths at which its servers give completions."""
    tested: str = ""
    """The versions that the tests drive, for the manual."""
    needs: frozenset[str] = frozenset()
    """Options of a known model family that it cannot find out by itself. Their values are those of
    `model_options.FAMILIES`, with the parsers' names of mlx-openai-server."""
    limits: LimitOptions = LimitOptions()
    """Its options that limit how far it grows beyond its weights."""
    preload: tuple[str, ...] = ()
    """The Python modules that its program imports. They are imported before the server in its place is stopped."""
    json_schema: bool = False
    """It follows a JSON schema that a request gives (`response_format`)."""
    stop_signals: tuple[signal.Signals, ...] = (signal.SIGTERM,)
    """The signals that end it, in order; the next one if it has not ended. They go to the server itself, never to its
    children."""
    cut_signals: tuple[signal.Signals, ...] = ()
    """The signals that end a server which has not finished its open requests in time after the first stop signal."""

    @property
    def distribution(self) -> str:
        """The name of its Python package, as in the package's metadata folder."""
        return self.name.replace("-", "_")

    @abstractmethod
    def argv(self, command: EngineCommand, spec: ServerSpec) -> tuple[str, ...]:
        """Return the complete argv of a server. Raises `Refused` for options that the engine does not have."""

    @abstractmethod
    def recognise(self, argv: Sequence[str]) -> DetectedServer | None:
        """Return what the argv shows if the process runs this engine's server program (see `program_of`); else None."""

    @abstractmethod
    def served_name(self, argv: Sequence[str]) -> str | None:
        """Return the name under which a server with this argv serves its model."""

    def find_command(self, launch: Sequence[str], environ: Mapping[str, str]) -> EngineCommand:
        """Find the engine on the host. `launch` is the configured argv or empty.

        Raises `Refused` (engine_not_found).
        """
        if launch:
            return configured_command(launch, "`launch` in hosts.yaml", environ)
        path = find_program(self.program, environ)
        if path is None:
            raise Refused(
                "engine_not_found",
                f"the engine {self.name} is not installed on the host",
                why=f"{self.program} is neither on PATH nor in a usual folder",
                hint=f"install it there (uv tool install {self.name}), or set launch: {{{self.name}: [...]}} "
                "in hosts.yaml",
            )
        return EngineCommand((path,), "PATH")

    def help_argv(self, command: EngineCommand, spec: ServerSpec) -> tuple[str, ...]:
        """Return the argv that prints the engine's help if `argv` needs that text; else an empty tuple."""
        # Only for a plain installation: another program configured in `launch` may not have --help.
        return (*command.argv, "--help") if spec.model.args and command.version else ()

    def limit_options(self, spec: ServerSpec, argv: Sequence[str]) -> LimitOptions:
        """Return the options that a load may add to this server's command, `argv`.

        What the model's own `args` set stays.
        """
        # argparse accepts abbreviations.
        own = [word.partition("=")[0] for word in spec.model.args if re.match("--[a-z]", word)]
        return self.limits.only({each for each in self.limits.all if not any(map(each.startswith, own))})

    def read_limits(self, argv: Sequence[str]) -> Limits:
        """Return the limits that a command sets."""
        given = {key: value for key, value in long_options(argv).items() if len(key) > len("--d")}
        options = self.limits.all
        return self.limits.read({each: given[key] for key in given for each in options if each.startswith(key)})

    def model_type(self, argv: Sequence[str]) -> str:
        """Return the kind of model that a command serves: `lm` for a language model, as most engines serve only."""
        return "lm"

    def context_length(self, argv: Sequence[str]) -> int | None:
        """Return the tokens of one context that a command sets; None if it sets none."""
        return None

    def keeps_caches_in_memory(self, version: str | None) -> bool:
        """Return whether the contexts that it keeps for later requests stay in memory."""
        return True

    def is_unbounded(self, argv: Sequence[str], version: str | None) -> bool:
        """Return whether nothing limits how many contexts a server with this command keeps in memory."""
        if not self.limits.all:
            return True
        limits = self.read_limits(argv)
        return limits.cache_bytes is None if self.keeps_caches_in_memory(version) else limits.requests is None

    def finishes_requests(self, argv: Sequence[str]) -> bool:
        """Return whether a server process with this argv finishes its open requests after the first stop signal."""
        return bool(self.cut_signals)

    def says_length(self, version: str | None) -> bool:
        """Return whether an answer that `max_tokens` cut has the finish reason `length`. An unknown version does."""
        return True

    def prepare_folder(self, spec: ServerSpec) -> None:
        """Create the files that a server needs in its folder before it starts."""
        return

    def environment(self) -> Mapping[str, str]:
        """Return environment variables that the engine needs besides the usual ones. Servers never download."""
        return {"HF_HUB_OFFLINE": "1"}

    def accepts_any_name(self, version: str | None) -> bool:
        """Return whether this version answers to any model name. An unknown version counts as recent."""
        return False

    def further_names(self, version: str | None) -> tuple[str, ...]:
        """Return the names besides `served_name` that this version accepts for its loaded model."""
        return ()

    def accepted_names(self, argv: Sequence[str], version: str | None) -> ServedNames:
        """Return the names that a running server with this argv accepts. `version` None: not known."""
        name = self.served_name(argv)
        if name is None:
            return ServedNames(not_asked="its name is not known: its command names no model")
        return ServedNames((name, *self.further_names(version)), any=self.accepts_any_name(version))

    def health(self, host: str, port: int, timeout: float) -> Health:
        """Probe a server cheaply. Never make it load, evict or generate anything."""
        return probe_health(host, port, timeout)

    def fatal_error(self, log: str) -> str | None:
        """Return the error in the end of a log which shows that loading failed; None if there is none.

        Needed for servers that keep running after they failed to load their model.
        """
        return None


def configured_command(argv: Sequence[str], source: str, environ: Mapping[str, str]) -> EngineCommand:
    """Return the command for an argv configured in `source`. Raises `Refused` (engine_not_found)."""
    expanded = expand_command(argv, environ)
    check_executable(expanded[0], source)
    return EngineCommand(expanded, source)


def template_text(path: str | Path) -> str:
    """Read a chat template that a registry entry names. Raises `OSError`, and `ValueError` if it is not text."""
    return utf8(files.read(path, MAX_TEMPLATE_BYTES))
