"""`setup`: look at a host over SSH, without an agent there, and write its entry for hosts.yaml.

One shell script prints what there is, a line for each thing. It starts no program of mlxops or of an engine and writes
nothing. It arrives on standard input; no value becomes part of its text.
"""

from __future__ import annotations

import plistlib
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise, takewhile

from mlxops.control.channel import ConnectionLost, Transport
from mlxops.control.client import lost
from mlxops.control.deploy import SEARCH_FOLDERS, find_interpreters, run_program
from mlxops.control.ssh.config import resolve
from mlxops.control.ssh.connection import open_ssh
from mlxops.core import host_entry
from mlxops.core.commands.setup import SetupResult
from mlxops.core.errors import AgentProblem, MlxopsError
from mlxops.core.host_entry import BootFile, HostFacts, Part
from mlxops.core.replies import HostReply

RESOLVE_SECONDS = 10.0
_FOUND = "mlxops-setup"
_OWN = "mlxops"
"""Jobs with this word in their name are mlxops' own."""

LOOK = r"""
say() { printf 'mlxops-setup\t%s\t%s\n' "$1" "$2"; }
one_line() { head -c 4000 -- "$1" 2>/dev/null | tr '\n\t' '  '; }
say home "$HOME"
say system "$(uname -s) $(uname -m)"
say connection "$SSH_CONNECTION"
if [ -r /proc/meminfo ]; then say memory_kb "$(sed -n 's/^MemTotal: *\([0-9]*\) kB/\1/p' /proc/meminfo)"
else say memory "$(/usr/sbin/sysctl -n hw.memsize 2>/dev/null)"
    say wired_limit "$(/usr/sbin/sysctl -n iogpu.wired_limit_mb 2>/dev/null)"; fi
[ -x "$HOME/.mlxops/venv/bin/python" ] && say agent yes
[ -d /opt/mlx-launch ] && say project yes
for folder in /opt/homebrew/bin /usr/local/bin /usr/bin "$HOME/.local/bin" "$HOME/bin" "$HOME/.venv/bin" \
    "$HOME"/*/.venv/bin "$HOME"/*/venv/bin "$HOME"/.local/share/uv/tools/*/bin /opt/*/.venv/bin /opt/*/bin; do
    for name in mlx-openai-server mlx_lm.server; do [ -x "$folder/$name" ] && say program "$folder/$name"; done
done
for hub in "$HF_HUB_CACHE" "$HF_HOME/hub" "$HOME/.cache/huggingface/hub" "$HOME"/hub "$HOME"/*/hub "$HOME"/*/*/hub \
    /Volumes/*/hub /Volumes/*/*/hub /Volumes/*/*/*/hub /mnt/*/hub /srv/*/hub /opt/*/hub; do
    [ -d "$hub" ] || continue
    count=0
    for model in "$hub"/models--*; do [ -d "$model" ] && count=$((count + 1)); done
    [ "$count" -gt 0 ] && say hub "$count $hub"
    for folder in "$hub" "${hub%/*}"; do
        [ -f "$folder/registry.json" ] && say registry "$folder/registry.json"
    done
done
ps -A -ww -o args= 2>/dev/null | while read -r line; do
    case "$line" in
        *mlx_lm.server*--port*|*mlx_lm/server.py*|*mlx-openai-server*launch*--*) say server "$line" ;;
    esac
done
for file in /Library/LaunchDaemons/*.plist /Library/LaunchAgents/*.plist "$HOME"/Library/LaunchAgents/*.plist \
    /etc/systemd/system/*.service "$HOME"/.config/systemd/user/*.service; do
    [ -f "$file" ] && [ -r "$file" ] && grep -q -i mlx -- "$file" && say "job $file" "$(one_line "$file")"
done
exit 0
"""
READ_SCRIPTS = r"""
for file in "$@"; do
    [ -f "$file" ] && printf 'mlxops-setup\t%s\t%s\n' "$file" "$(head -c 4000 -- "$file" 2>/dev/null | tr '\n\t' '  ')"
done
exit 0
"""


def look_at(ssh: str) -> HostReply[SetupResult]:
    """Return the entry for `ssh NAME`. An error of the host or the network is part of the reply."""
    name = host_entry.entry_name(ssh)
    try:
        facts = _facts(ssh, name)
    except MlxopsError as error:
        return HostReply(name, error=error)
    parts = host_entry.parts(ssh, facts)
    entry = {part.key: part.value for part in parts if part.key}
    return HostReply(name, SetupResult(as_yaml(name, parts), entry, host_entry.notes(parts)), command="setup")


def _facts(ssh: str, name: str) -> HostFacts:
    """Raises `Unreachable`, `UsageError`, and `AgentProblem` (no_shell)."""
    from mlxops.control.client import HostTarget
    from mlxops.core.settings import Settings

    destination = resolve(ssh, RESOLVE_SECONDS)
    transport = open_ssh(ssh)
    try:
        found = _rows(transport, LOOK)
        python = _python(transport)
        files = _boot_files(transport, found)
    except ConnectionLost as why:
        raise lost(HostTarget(name, ssh, (), Settings()), why) from None
    finally:
        transport.close()
    between = bool(destination.jumps or destination.proxy_command)
    return _read(found, python, files, between=between)


def _rows(transport: Transport, script: str, *arguments: str) -> list[tuple[str, str]]:
    """Return what a script says. Raises `AgentProblem` (no_shell) if it does not run."""
    lines, ended = run_program(transport, ["/bin/sh", "-s", "--", *arguments], script.encode())
    rows = [(parts[1], parts[2]) for line in lines if len(parts := line.split("\t")) == 3 and parts[0] == _FOUND]
    if not rows and not arguments:
        raise AgentProblem(
            "no_shell",
            "the account runs no shell script",
            why=f"/bin/sh ended with status {ended.status}",
            hint="give it a login shell that runs commands",
        )
    return [(key, value) for key, value in rows if value.isprintable()]


def _python(transport: Transport) -> str:
    found = find_interpreters(transport, SEARCH_FOLDERS)
    return next(iter([*found.whole, *found.uv]), "")


def _read(
    rows: Sequence[tuple[str, str]], python: str, boot_files: tuple[BootFile, ...], *, between: bool
) -> HostFacts:
    one = dict(rows)
    connection = one.get("connection", "").split()
    hubs = [value.partition(" ") for key, value in rows if key == "hub"]
    kilobytes, size, limit = (one.get(key, "") for key in ("memory_kb", "memory", "wired_limit"))
    return HostFacts(
        home=one.get("home", ""),
        system=one.get("system", "").replace("Darwin", "macOS"),
        address=connection[2] if len(connection) == 4 and not between else "",
        python=python,
        programs=_all(rows, "program"),
        project="project" in one,
        hubs={path: int(count) for count, _, path in hubs if count.isdecimal()},
        registries=_all(rows, "registry"),
        servers=_all(rows, "server"),
        boot_files=boot_files,
        memory=int(kilobytes) * 1024 if kilobytes.isdecimal() else int(size) if size.isdecimal() else None,
        wired_limit_mb=int(limit) if limit.isdecimal() else None,
        agent="agent" in one,
    )


def _all(rows: Sequence[tuple[str, str]], key: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(value for found, value in rows if found == key))


# -- boot jobs ----------------------------------------------------------------------------------------------------


def _boot_files(transport: Transport, rows: Sequence[tuple[str, str]]) -> tuple[BootFile, ...]:
    files = [_boot_file(key[4:], text) for key, text in rows if key.startswith("job ") and _OWN not in key]
    scripts = sorted({file.script for file in files if file.script})
    texts = dict(_rows(transport, READ_SCRIPTS, *scripts)) if scripts else {}
    return tuple(
        BootFile(file.path, file.label, file.script, f"{file.text} {texts.get(file.script, '')}") for file in files
    )


def _boot_file(path: str, text: str) -> BootFile:
    name = path.rpartition("/")[2]
    if name.endswith(".service"):
        command = text.partition("ExecStart=")[2].lstrip("@-:+! ")
        # The lines of the unit are joined. The next one is a key or a section.
        arguments = takewhile(lambda word: not re.match(r"[A-Z]\w*=|\[", word), host_entry.split_command(command))
        return BootFile(path, name.removesuffix(".service"), _script([*arguments]), text)
    keys = _plist(text)
    argv = keys.get("ProgramArguments")
    first = argv if isinstance(argv, list) else [keys.get("Program")]
    given = [word for word in first if isinstance(word, str)]
    # A server's own command has its port in further arguments.
    words = " ".join(given)
    return BootFile(
        path,
        label if isinstance(label := keys.get("Label"), str) else name.removesuffix(".plist"),
        _script(given),
        f"{words} {text}",
    )


def _script(arguments: Sequence[str]) -> str:
    """Return the path of the script that a job runs; "" if it runs none.

    An argument may be a command line, as after `bash -c`. Only its first word counts: the others may be secrets.
    """
    command = [*takewhile(lambda word: word not in {"-m", "--"}, arguments)]
    values = {after for option, after in pairwise(command) if option.startswith("-") and option not in _SHELL_COMMANDS}
    programs = [line[0] for word in command if word not in values and (line := host_entry.split_command(word))]
    return next((word for word in programs if word.startswith("/") and _is_script(word)), "")


_SHELL_COMMANDS = frozenset({"-c", "-lc", "-ic", "-lic"})
"""Options of a shell whose value is a command line. The value of another option is no script."""


def _is_script(word: str) -> bool:
    return word.rpartition("/")[2] not in {"sh", "bash", "zsh", "env", "python3", "nohup", "caffeinate"}


def _plist(text: str) -> Mapping[str, object]:
    try:
        found = plistlib.loads(text.encode())
    except Exception:  # noqa: BLE001 - for a file that is cut off, plistlib raises expat's errors and AttributeError
        return {}
    return found if isinstance(found, dict) else {}


# -- the text -----------------------------------------------------------------------------------------------------


def as_yaml(name: str, parts: Sequence[Part]) -> str:
    """Return a hosts.yaml with this one host, which can also be pasted below `hosts:` of another."""
    lines = ["hosts:", f"  {_value(name)}:"]
    for part in parts:
        lines += [f"    # {comment}" for comment in part.comments]
        if part.key:
            lines.append(f"    {part.key}: {_value(part.value)}")
    return "\n".join(lines)


def _value(value: object) -> str:
    import yaml

    text: str = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...").removesuffix("...").strip()
