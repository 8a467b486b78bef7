"""Make an entry of hosts.yaml from what was found on a host. Pure.

`setup` looks at the host. Here the facts become settings, and what could not be determined becomes a comment.
"""

from __future__ import annotations

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
    if not facts.address:
        return [
            Part(
                (
                    "The address at which the gateway reaches the servers could not be determined: ssh goes through",
                    "another machine. Until both are set, servers listen on 127.0.0.1, for the host itself only.",
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
    found += [Part((f"hub: {short(path, facts.home)}   # {_models(facts.hubs[path])}, too",)) for path in others]
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
    words = [word for line in facts.servers for word in split_command(line)]
    paths = [*facts.programs, *(word for word in words if word.startswith("/"))]
    found = {engine: [path for path in paths if path.endswith(f"/{name}")] for engine, name in PROGRAMS.items()}
    usable = [engine for engine in PROGRAMS if found[engine] or (engine == DEFAULT_ENGINE and facts.project)]
    if not usable:
        return [Part(("No engine was found. Install one, for example: uv tool install mlx-openai-server",))]
    engine = usable[0]
    result = [] if engine == DEFAULT_ENGINE else [Part((), "engine", engine)]
    near = [path for path in found[engine] if short(path.rpartition("/")[0], facts.home) in FOUND_BY_ITSELF]
    if near or not found[engine]:
        return [Part((f"{engine}: {near[0] if near else 'the project /opt/mlx-launch'}",)), *result]
    argv = [short(found[engine][0], facts.home), *(["launch"] if engine == DEFAULT_ENGINE else [])]
    return [*result, Part((), "launch", {engine: argv})]


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
    return ", ".join(f"{key}: {value}" for key, value in job.items())


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
