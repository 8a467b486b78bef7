"""What `mlxctl` and `mlxctl --help` show: the commands in groups, then the options. Pure."""

from __future__ import annotations

from collections.abc import Mapping

GROUPS: Mapping[str, Mapping[str, str]] = {
    "serve": {
        "load": "mlxctl load jerry-xl 8100",
        "unload": "mlxctl unload 8100",
        "unload-all": "mlxctl unload-all --dry-run",
        "rollback": "mlxctl rollback 8100",
        "restore": "mlxctl restore",
        "reconcile": "mlxctl reconcile --dry-run",
        "set": "mlxctl set --model jerry-xl --set context_length=32768",
    },
    "look": {
        "status": "mlxctl status --watch",
        "list": "mlxctl list --memory",
        "logs": "mlxctl logs 8100 --follow",
        "ops": "mlxctl ops --follow 7f3a",
        "gateway": "mlxctl gateway --through",
        "help": "mlxctl help status",
    },
    "files": {
        "init": "mlxctl init",
        "pull": "mlxctl pull --repo mlx-community/Qwen3-0.6B-4bit",
        "remove": "mlxctl remove --model jerry-xl",
    },
    "host": {
        "deploy": "mlxctl deploy",
        "boot": "mlxctl boot --install --every 5",
    },
    "develop": {
        "demo": "inv demo",
        "test": "inv test --fast",
        "bench": "inv bench --only status",
        "faults": "inv faults --minutes 10",
    },
}
"""Group -> command -> example."""

COMMON_OPTIONS = (
    ("--host NAME[,NAME]", "the hosts to ask, as hosts.yaml names them"),
    ("--local", "this machine, without SSH"),
    ("--json", "print one JSON document"),
    ("--dry-run", "on changes: show the plan; change nothing"),
)
PROGRAM_OPTIONS = (
    ("COMMAND --help", "the options of a command"),
    ("--list", "the commands without groups"),
    ("--version", "version, build, Python and place"),
    ("--print-completion-script SHELL", "tab completion for bash, zsh or fish"),
)
"""Invoke has more of its own. They configure shell commands, and mlxctl runs none."""
_INDENT = "  "


def overview(helps: Mapping[str, str], columns: int) -> str:
    """Return the help of the program, for a terminal of so many columns. `helps`: command -> its help, one line."""
    blocks = [
        "Usage: mlxctl COMMAND [OPTIONS]\n\nThe manual: mlxctl help",
        *(_group(name, examples, helps, columns) for name, examples in GROUPS.items()),
        _options("options of most commands", COMMON_OPTIONS),
        _options("options of mlxctl", PROGRAM_OPTIONS),
    ]
    return "\n\n".join(blocks)


def _group(name: str, examples: Mapping[str, str], helps: Mapping[str, str], columns: int) -> str:
    """Return an example a line with the command's help beside it, or below it if the lines of a group do not fit."""
    width = max(len(example) for group in GROUPS.values() for example in group.values())
    beside = (
        len(_INDENT) * 2 + width + max(len(helps[command]) for group in GROUPS.values() for command in group) <= columns
    )
    lines = [name]
    for command, example in examples.items():
        if beside:
            lines.append(f"{_INDENT}{example:{width}}{_INDENT}{helps[command]}")
        else:
            lines += [f"{_INDENT}{example}", f"{_INDENT * 3}{helps[command]}"]
    return "\n".join(lines)


def _options(title: str, options: tuple[tuple[str, str], ...]) -> str:
    width = max(len(option) for option, _ in (*COMMON_OPTIONS, *PROGRAM_OPTIONS))
    return "\n".join([title, *(f"{_INDENT}{option:{width}}{_INDENT}{text}" for option, text in options)])
