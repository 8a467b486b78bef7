"""Make an entry of hosts.yaml from what was found on a host. Pure.

`setup` looks at the host. Here the facts become settings, and what could not be determined becomes a comment.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import field
from itertools import pairwise

from mlxops.core.frozen import dataclass
from mlxops.core.names import is_name
from mlxops.core.redaction import redact
from mlxops.core.settings import DEFAULT_ENGINE, MAX_PORTS, PortRange, Settings, is_loopback
from mlxops.core.text import amount

PROGRAMS = {"mlx-openai-server": "mlx-openai-server", "mlx-lm": "mlx_lm.server"}
"""Engine -> its program."""
FOUND_BY_ITSELF = ("/opt/homebrew/bin", "/usr/local/bin", "/usr/bin", "/bin", "~/.local/bin", "~/bin")
"""The folders in which the agent looks for an engine."""
MOST_NAMED = 10
"""Lines about what was not looked at."""
DEFAULT_HUB = "~/.cache/huggingface/hub"
_PORT = re.compile(r"--port[= ]\"?(\d+)|PORT=\"?(\d+)")


@dataclass(frozen=True)
class BootFile:
    """A file of launchd or systemd that starts a server."""

    path: str
    label: str = ""
    script: str = ""
    """The program that it runs."""
    text: str = ""
    """The file, and the script, as far as they can be read."""


@dataclass(frozen=True)
class HostFacts:
    """What `setup` found. Empty values: nothing was found."""

    home: str = ""
    system: str = ""
    address: str = ""
    """The address at which this machine reached the host; "" if another machine was between."""
    python: str = ""
    """The interpreter that deploy would use, or the uv that would fetch one."""
    programs: tuple[str, ...] = ()
    """Paths of engines."""
    project: bool = False
    """There is a uv project /opt/mlx-launch."""
    hubs: Mapping[str, int] = field(default_factory=dict)
    """Folder -> how many models are in it."""
    registries: tuple[str, ...] = ()
    servers: tuple[str, ...] = ()
    """Command lines of running servers."""
    boot_files: tuple[BootFile, ...] = ()
    memory: int | None = None
    wired_limit_mb: int | None = None
    agent: bool = False
    """An agent is installed already."""
    missing: tuple[str, ...] = ()
    """What could not be looked at: folders that did not answer, and others."""


@dataclass(frozen=True)
class Part:
    """Some lines of an entry: a setting, or only comments."""

    comments: tuple[str, ...] = ()
    key: str = ""
    value: object = None


def entry_name(ssh: str) -> str:
    """Return a name for the host in hosts.yaml: what is typed after ssh, without user and domain."""
    short = ssh.rpartition("@")[2].partition(".")[0]
    host = ssh.rpartition("@")[2] if short.isdecimal() else short
    return host if is_name(host) else "studio"


def parts(ssh: str, facts: HostFacts) -> list[Part]:
    """Return the entry's lines, in the order of the annotated hosts.yaml."""
    return [
        Part((f"{facts.system or 'system: unknown'}, {_memory(facts)}",)),
        *_missing(facts),
        Part((), "ssh", ssh),
        *_address(facts),
        *_hub(facts),
        *_python(facts),
        *_engine(facts),
        *_ports(facts),
        *_boot(facts),
    ]


def _memory(facts: HostFacts) -> str:
    if facts.memory is None:
        return "memory: unknown"
    limit = f", GPU limit {facts.wired_limit_mb} MB" if facts.wired_limit_mb else ""
    return f"{amount(facts.memory)} of memory{limit}; mlxops uses the host's own limit unless `memory` is set"


def _missing(facts: HostFacts) -> list[Part]:
    if not facts.missing:
        return []
    return [
        Part(("Not looked at, because it, or what was before it, did not answer, as a network volume that is gone:",)),
        Part(tuple(f"  {short(each, facts.home)}" for each in facts.missing[:MOST_NAMED])),
        *([Part((f"  and {more} more",))] if (more := len(facts.missing) - MOST_NAMED) > 0 else []),
    ]


def _address(facts: HostFacts) -> list[Part]:
    if not facts.address or "%" in facts.address:
        why = "another machine" if not facts.address else f"{facts.address}, which is valid on its own cable only"
        return [
            Part(
                (
                    "The address at which the gateway reaches the servers could not be determined: ssh goes through",
                    f"{why}. Until both are set, servers listen on 127.0.0.1, for the host itself only.",
                    "address: ADDRESS",
                    "bind: ADDRESS",
                )
            )
        ]
    if is_loopback(facts.address):
        return [Part(("This machine reaches the host at this address.",), "bind", facts.address)]
    return [
        Part(("This machine reaches the host at this address. Servers have no authentication: let a firewall admit",)),
        Part(("only the gateway. Without both keys, servers listen on 127.0.0.1, for the host itself only.",)),
        Part((), "address", facts.address),
        Part((), "bind", facts.address),
    ]


def _hub(facts: HostFacts) -> list[Part]:
    if not facts.hubs:
        return [Part((f"No models were found. The default is {DEFAULT_HUB}.", "hub: ~/models/hub"))]
    first, *others = sorted(facts.hubs, key=lambda path: (-facts.hubs[path], path))
    hub = short(first, facts.home)
    found = [Part((f"It has {_models(facts.hubs[first])}.",), "hub", hub)]
    found += [Part((f"hub: {_word(short(path, facts.home))}   # {_models(facts.hubs[path])}, too",)) for path in others]
    near = [path for path in facts.registries if path.rpartition("/")[0] in (first, first.rpartition("/")[0])]
    registry = next((short(path, facts.home) for path in near if path != f"{first}/registry.json"), "")
    return [*found, *([Part((), "registry", registry)] if registry and f"{first}/registry.json" not in near else [])]


def _models(count: int) -> str:
    return f"{count} model{'s'[: count != 1]}"


def _python(facts: HostFacts) -> list[Part]:
    if facts.agent:
        return [Part(("An agent is installed already.",))]
    if facts.python:
        return [Part((f"The agent is not installed; deploy would use {facts.python}.",))]
    return [
        Part(
            (
                "No Python 3.11 or later, and no uv. On the host, without root:",
                "  curl -LsSf https://astral.sh/uv/install.sh | sh",
            )
        )
    ]


def _engine(facts: HostFacts) -> list[Part]:
    """Name the engine of a running server, otherwise the first that is installed. The others are comments."""
    running = [command for line in facts.servers if (command := _command(split_command(line)))]
    installed = [(name, (path,)) for path in facts.programs if (name := _engine_of(path))]
    commands = [*dict.fromkeys([*running, *installed])]
    engines = [name for name, _ in running] + [name for name in PROGRAMS if name in dict(commands)]
    if not engines and not facts.project:
        return [Part(("No engine was found. Install one, for example: uv tool install mlx-openai-server",))]
    engine = engines[0] if engines else DEFAULT_ENGINE
    own = sorted((argv for name, argv in commands if name == engine), key=lambda argv: not _is_near(argv, facts.home))
    more = [f"Found, too: {shlex.join(argv)}" for name, argv in commands if argv not in own[:1]]
    result = [] if engine == DEFAULT_ENGINE else [Part((), "engine", engine)]
    if not own or _is_near(own[0], facts.home):
        where = shlex.join(own[0]) if own else "the project /opt/mlx-launch"
        return [Part((f"{engine}: {where}",)), *result, *_lines(more)]
    argv = [short(own[0][0], facts.home), *own[0][1:], *(["launch"] if engine == DEFAULT_ENGINE else [])]
    return [*result, Part((), "launch", {engine: argv}), *_lines(more)]


def _lines(comments: Sequence[str]) -> list[Part]:
    return [Part(tuple(comments[:MOST_NAMED]))] if comments else []


def _engine_of(path: str) -> str | None:
    return next((engine for engine, name in PROGRAMS.items() if path.endswith(f"/{name}")), None)


def _command(words: Sequence[str]) -> tuple[str, tuple[str, ...]] | None:
    """Return the engine of a running server, and its program: a file, or Python with a module."""
    for path in words:
        if path.startswith("/") and (engine := _engine_of(path)):
            return engine, (path,)
    if words and words[0].startswith("/") and ("-m", "mlx_lm.server") in pairwise(words):
        return "mlx-lm", (words[0], "-m", "mlx_lm.server")
    return None


def _is_near(argv: Sequence[str], home: str) -> bool:
    """Return whether the agent finds an engine there by itself."""
    return len(argv) == 1 and short(argv[0].rpartition("/")[0], home) in FOUND_BY_ITSELF


def _ports(facts: HostFacts) -> list[Part]:
    default = Settings().ports
    running = sorted({port for line in facts.servers for port in _server_ports(line)})
    running = [port for port in running if port < running[0] + MAX_PORTS - 10]
    outside = [port for port in running if port not in default]
    comments = [f"A server runs now: {each}" for each in dict.fromkeys(map(_described, facts.servers))]
    if not outside:
        aliases = "Give each port the name that the gateway sends, for example: slots: {8100: jerry-xl}"
        return [Part((*comments, f"ports: {default}", aliases))]
    ports = PortRange(running[0], max(running[-1], running[0] + 9))
    return [Part(tuple(comments), "ports", str(ports))]


_SHOWN = ("--model", "--model-path", "--served-model-name", "--host", "--port")


def _described(line: str) -> str:
    """Return the program and the options that matter here. Others may hold a secret."""
    words = split_command(line)
    program = next((word for word in words if word.rpartition("/")[2] in PROGRAMS.values()), "a server")
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    pairs = [(option, value) for option, value in pairwise(words) if option in _SHOWN]
    return " ".join([program, *(f"{option} {redact(value)}" for option, value in pairs)])


def _server_ports(line: str) -> list[int]:
    return [int(one or other) for one, other in _PORT.findall(line) if 0 < int(one or other) < 65527]


def _boot(facts: HostFacts) -> list[Part]:
    ports = next((PortRange(*map(int, str(part.value).split("-"))) for part in _ports(facts) if part.key), None)
    jobs, comments = [], []
    for file in facts.boot_files:
        known = [port for port in _server_ports(file.text) if port in (ports or Settings().ports)]
        job = {key: value for key, value in (("label", file.label), ("script", file.script)) if value}
        if known and job:
            jobs.append({"port": known[0], **job})
        else:
            comments.append(f"{file.path} may start a server; its port is not known:")
            comments.append(f"boot: {{port: PORT, {_flow(job)}}}")
    return [Part(tuple(comments), *(("boot", jobs[0] if len(jobs) == 1 else jobs) if jobs else ()))]


def _flow(job: Mapping[str, str]) -> str:
    return ", ".join(f"{key}: {_word(value)}" for key, value in job.items())


def _word(text: str) -> str:
    """Return a text as YAML, for a comment that is to be made a setting."""
    return text if re.fullmatch(r"[\w/~][\w./~+-]*", text) else json.dumps(text, ensure_ascii=False)


def split_command(line: str) -> list[str]:
    """Split a command line as a shell does; at spaces if its quotes are not closed."""
    try:
        return shlex.split(line)
    except ValueError:
        return line.split()


def short(path: str, home: str) -> str:
    """Return a path with `~` for the home directory."""
    return f"~{path[len(home) :]}" if home and (path == home or path.startswith(f"{home}/")) else path


def notes(entry: Sequence[Part]) -> tuple[str, ...]:
    return tuple(comment for part in entry for comment in part.comments)
