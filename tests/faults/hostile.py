"""Hostile strings in place of names, ports, repositories, paths and numbers.

They go through the command line, and also directly to the agent, without the command line's checks. A canary file shows
whether any part was executed.
"""

from __future__ import annotations

import io
import json
import os
import random
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from mlxops.core.command import decode_request
from mlxops.core.wire import DecodeError
from tests.faults import children, oracle
from tests.faults.arena import Arena

_STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""Characters that must not reach a terminal. Tabs and line ends may."""
_PLAIN = (
    *(
        "",
        " ",
        ".",
        "..",
        "/",
        "~",
        "-",
        "--",
        "-x",
        "--help",
        "--local",
        "a b",
        "a\tb",
        "a\nb",
        "a\rb",
        "'",
        '"',
        "\\",
    ),
    *("../../etc/passwd", "a/../../b", "/etc/passwd", "~root/x", "a/b/c", "org/", "/name", "org//name", "org/name@"),
    *("org/name@--upload-pack=x", "org/name@../..", "@main", "{0}", "{x!r}", "%s%n", "%(x)s", "{{}}", "${HOME}"),
    *("\x1b[31mred\x1b[0m", "\x1b]0;title\x07", "\u202eevil", "a\u2066b", "\u0000", "a\u0000b", "\x7f", "\x9b31m"),
    *("8100", "0", "-1", "99999999999999999999", "1e3", "0x1fa4", "٨١٠٠", "8100 ", "8100;", "8100\n", "NaN", "inf"),
    *("a" * 63, "a" * 65, "a" * 5000, "ü", "ﬀ", "a\u0301", "\ud83d\ude00", "null", "true", "[]", "*", "?", "!", "#"),
)


def text(rng: random.Random, canary: Path) -> str:
    """Return one string. About half of them would create the canary if they were executed."""
    attacks = (
        f"$(touch {canary})",
        f"`touch {canary}`",
        f"; touch {canary} ;",
        f"| touch {canary}",
        f"&& touch {canary}",
        f"\n touch {canary} \n",
        f"' ; touch {canary} ; '",
        f'" ; touch {canary} ; "',
        f"x'$(touch {canary})'",
        f"-oProxyCommand=touch {canary}",
        f"__import__('os').system('touch {canary}')",
        f"{{x.__class__.__init__.__globals__}}$(touch {canary})",
        f"org/name@$(touch {canary})",
        f"org/$(touch {canary})",
        f"a\0; touch {canary}",
        f"%0a touch {canary}",
        f"> {canary}",
        f"tee {canary} <<< x",
    )
    one = rng.choice(attacks) if rng.random() < 0.5 else rng.choice(_PLAIN)
    return one if rng.random() < 0.7 else rng.choice(("jerry", "org/name", "8100", "")) + one


def words(rng: random.Random, canary: Path, ports: Sequence[int], *, nul: bool) -> list[str]:
    """Return a command line with one or more hostile strings. `nul`: also NUL, which no argument can contain."""

    def evil() -> str:
        found = text(rng, canary)
        return found if nul else found.replace("\0", "\\0")

    port = str(rng.choice(list(ports)))
    lines = (
        lambda: ["load", "--model", evil(), "--port", port],
        lambda: ["load", "--model", "org/alpha", "--port", evil()],
        lambda: ["load", "--model", "name", "--repo", evil(), "--port", port],
        lambda: ["load", "--model", evil(), "--repo", evil(), "--port", evil()],
        lambda: ["load", "--model", "org/alpha", "--port", port, "--timeout", evil()],
        lambda: ["load", evil(), port],
        lambda: ["unload", "--port", evil()],
        lambda: ["unload", "--model", evil()],
        lambda: ["unload", "--port", port, "--drain", evil()],
        lambda: ["status", "--host", evil()],
        lambda: ["list", "--host", evil()],
        lambda: [evil()],
        lambda: ["ops", "--follow", evil()],
        lambda: ["ops", "--cancel", evil()],
    )
    line = rng.choice(lines)()
    return [*line, "--json"] if rng.random() < 0.4 else line


def trial(arena: Arena, number: int, seed: int) -> tuple[str, list[str]]:
    rng = random.Random(f"{seed} hostile {number}")
    canary = arena.folder / "canary"
    if not arena.registry():
        arena.run("init")
    if number % 2:
        name, wrong = _through_agent(arena, rng, canary)
    else:
        name, wrong = _through_command_line(arena, rng, canary)
    if canary.exists():
        canary.unlink()
        wrong.append("executed")
    wrong += oracle.registry_sound(arena)
    if left := arena.servers():
        # A string may happen to be a good one: `--timeout 8100`.
        served = {row["pid"] for row in oracle.rows_by_port(arena).values() if row["state"] == "ready"}
        wrong += [f"a server was started: {words}" for pid, words in left.items() if pid not in served]
        arena.sweep()
    return name, wrong


def _through_agent(arena: Arena, rng: random.Random, canary: Path) -> tuple[str, list[str]]:
    """Call the operation directly: the agent must not rely on the control node's checks."""
    command = rng.choice(("load", "unload", "load"))
    keys = ("model", "port", "repo") if command == "load" else ("model", "port")
    args: dict[str, object] = {key: text(rng, canary) for key in keys if rng.random() < 0.7}
    if rng.random() < 0.2:
        args[rng.choice(keys)] = rng.choice([1, None, [], {}, True, 1.5])
    name = f"agent {command} {args!r}"
    if not all(isinstance(value, str | None) for value in args.values()):
        # The codec refuses a value of another type before there is an operation.
        try:
            decode_request(command, args)
        except DecodeError:
            return name, []
        return name, ["a value of another type was accepted"]
    ended = arena.run(command, **args)
    wrong = oracle.no_bug(ended)
    if ended.exit not in {0, 2, 3, 8}:
        wrong.append(f"an unexpected answer: {ended}")
    return name, wrong


def _through_command_line(arena: Arena, rng: random.Random, canary: Path) -> tuple[str, list[str]]:
    hosts = arena.folder / "hosts.yaml"
    if not hosts.exists():
        hosts.write_text(_hosts(arena), encoding="utf-8")
    line = words(rng, canary, arena.ports, nul=True)
    line = [*line, "--local"] if rng.random() < 0.9 else line
    out, err = arena.folder / "cli.out", arena.folder / "cli.err"
    out.unlink(missing_ok=True)

    def body() -> int:
        from mlxops.mlxctl import main

        os.environ |= {**arena.environ, "MLXOPS_HOSTS_FILE": str(hosts)}
        os.chdir(arena.folder)
        sys.argv = ["mlxctl", *line]
        # As a shell would have it: standard error apart, the text as bytes that any terminal takes.
        # The fork's end flushes them.
        sys.stdout, sys.stderr = _stream(out), _stream(err)
        main()
        return 0

    status = children.wait(children.fork(body, arena.folder / "cli"), 60)
    return f"mlxctl {line!r}", judged(line, status, read(out), read(err))


def _stream(path: Path) -> io.TextIOWrapper:
    return open(path, "w", encoding="utf-8", errors="surrogateescape")


def judged(line: Sequence[str], status: int, stdout: str, stderr: str) -> list[str]:
    """Check the outcome of any command line: a known exit status, no traceback, no control characters, pure JSON."""
    wrong = [] if status in {0, 2, 3, 5, 8, 75} else [f"exit {status}: {stderr[-300:]}"]
    wrong += ["a traceback"] if "Traceback" in stderr + stdout else []
    if found := _STEERING.search(stdout + stderr):
        wrong.append(f"{found.group()!r} was printed")
    # After `--`, nothing is a flag.
    if "--json" in line and status != 0 and not {"--help", "--"} & set(line):
        try:
            json.loads(stdout)
        except ValueError:
            wrong.append(f"not one JSON document: {stdout[:120]!r}")
    return wrong


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _hosts(arena: Arena) -> str:
    entry = {
        "bind": arena.address,
        "hub": str(arena.hub),
        "state": str(arena.state),
        "engine": "mlx-lm",
        "launch": {"mlx-lm": [str(arena.program)]},
        "ports": f"{arena.ports[0]}-{arena.ports[-1]}",
        "env": {"HF_ENDPOINT": "http://127.0.0.1:9"},
    }
    return json.dumps({"hosts": {"here": entry}})
