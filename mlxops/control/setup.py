"""`setup`: look at a host over SSH, without an agent there, and write its entry for hosts.yaml.

Shell scripts print what there is, a line for each thing. They start no program of mlxops or of an engine and write
nothing. They arrive on standard input; no value becomes part of their text. Each has a time limit and says at what it
looks: the folder of a dead network volume does not answer.
"""

from __future__ import annotations

import plistlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise, takewhile

from mlxops.control.channel import ConnectionLost, ReadLimits, Transport
from mlxops.control.client import lost
from mlxops.control.deploy import SEARCH_FOLDERS, TooSlow, find_interpreters
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

LOOK_SECONDS = 15.0
"""For one look. A folder of a dead network volume does not answer at all, and a stuck program cannot be killed."""
MAX_SLOW = 4
"""Stuck looks, each of which keeps a session of the host's sshd, which allows ten."""
MOST_AT_ONCE = 200
"""Folders that one look gets as its arguments: Linux allows 128 kB for the command of an SSH session."""

_SAY = r"""
new_line='
'
say() {
    case "$1$2" in *"$new_line"*) return ;; esac
    printf 'mlxops-setup\t%s\t%s\n' "$1" "$2"
}
"""
"""A name with a line break could pass for other facts."""
LOOK = rf"""{_SAY}
one_line() {{ head -c 4000 -- "$1" 2>/dev/null | tr '\n\t' '  '; }}
say at "the system"
say home "$HOME"
say system "$(uname -s) $(uname -m)"
say connection "$SSH_CONNECTION"
if [ -r /proc/meminfo ]; then say memory_kb "$(sed -n 's/^MemTotal: *\([0-9]*\) kB/\1/p' /proc/meminfo)"
else say memory "$(/usr/sbin/sysctl -n hw.memsize 2>/dev/null)"
    say wired_limit "$(/usr/sbin/sysctl -n iogpu.wired_limit_mb 2>/dev/null)"; fi
say at "the usual folders of programs"
[ -x "$HOME/.mlxops/venv/bin/python" ] && say agent yes
[ -d /opt/mlx-launch ] && say project yes
for folder in /opt/homebrew/bin /usr/local/bin /usr/bin "$HOME/.local/bin" "$HOME/bin" "$HOME/.venv/bin" \
    "$HOME"/.local/share/uv/tools/*/bin; do
    for name in mlx-openai-server mlx_lm.server; do [ -x "$folder/$name" ] && say program "$folder/$name"; done
done
say at "the running servers"
ps -A -ww -o args= 2>/dev/null | while read -r line; do
    case "$line" in
        *mlx_lm.server*--port*|*mlx_lm/server.py*|*mlx-openai-server*launch*--*) say server "$line" ;;
    esac
done
say at "the boot jobs"
for file in /Library/LaunchDaemons/*.plist /Library/LaunchAgents/*.plist "$HOME"/Library/LaunchAgents/*.plist \
    /etc/systemd/system/*.service "$HOME"/.config/systemd/user/*.service; do
    [ -f "$file" ] && [ -r "$file" ] && grep -q -i mlx -- "$file" && say "job $file" "$(one_line "$file")"
done
say at "the names of folders"
for place in "$HF_HUB_CACHE" "$HF_HOME/hub" "$HOME/.cache/huggingface/hub" "$HOME"/* /Volumes/* /mnt/* /srv/* /opt/*
do say place "$place"; done
say at ""
exit 0
"""
"""Looks where nothing but the home directory can be a network volume. The folders in its last lines may be; they are
only named, which does not touch them."""
LOOK_IN_PLACES = rf"""{_SAY}
for place in "$@"; do
    say at "$place"
    [ -d "$place" ] || continue
    [ -L "$place" ] && [ "$(cd -- "$place" && pwd -P)" = / ] && continue
    case "$place" in "$HOME"/*|/opt/*)
        for folder in "$place"/.venv/bin "$place"/venv/bin "$place"/bin; do
            for name in mlx-openai-server mlx_lm.server; do [ -x "$folder/$name" ] && say program "$folder/$name"; done
        done ;;
    esac
    for hub in "$place" "$place"/hub "$place"/*/hub "$place"/*/*/hub; do
        [ -d "$hub" ] || continue
        count=0
        for model in "$hub"/models--*; do [ -d "$model" ] && count=$((count + 1)); done
        [ "$count" -gt 0 ] && say hub "$count $hub"
        [ "$hub" = "$place" ] && [ "$count" = 0 ] && continue
        for folder in "$hub" "${{hub%/*}}"; do
            [ -f "$folder/registry.json" ] && say registry "$folder/registry.json"
        done
    done
done
say at ""
exit 0
"""
READ_SCRIPTS = rf"""{_SAY}
for file in "$@"; do
    say at "$file"
    [ -f "$file" ] && say "$file" "$(head -c 4000 -- "$file" 2>/dev/null | tr '\n\t' '  ')"
done
say at ""
exit 0
"""
Rows = list[tuple[str, str]]


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
        facts = _everything(transport)
    except ConnectionLost as why:
        raise lost(HostTarget(name, ssh, (), Settings()), why) from None
    finally:
        transport.close()
    between = bool(destination.jumps or destination.proxy_command)
    return replace(facts, address="") if between else facts


def _everything(transport: Transport) -> HostFacts:
    """Raises `AgentProblem` (no_shell), `ConnectionLost`."""
    found, stuck = _look(transport, LOOK)
    missing = [f"{stuck} and what is looked for after that"] if stuck else []
    more, slow = look_in_places(transport, [place for place in _all(found, "place") if _is_place(place)])
    files, unread = _boot_files(transport, found)
    python, searched = _python(transport)
    missing += [*slow, *unread, *([] if searched else ["the interpreters"])]
    return _read([*found, *more], python, files, tuple(missing))


def _is_place(text: str) -> bool:
    """Return whether this is the name of a folder, and not what is left of an unset variable or an empty folder."""
    return text not in ("", "/hub") and not text.endswith("/*")


def look_in_places(transport: Transport, places: Sequence[str]) -> tuple[Rows, list[str]]:
    """Look for models and engines in folders. Return what was found, and the folders that could not be looked at.

    If one does not answer, go on after it. Raises `ConnectionLost`.
    """
    rows: Rows = []
    slow: list[str] = []
    left = list(dict.fromkeys(places))
    while left and len(slow) < MAX_SLOW:
        now = left[:MOST_AT_ONCE]
        found, stuck = _look(transport, LOOK_IN_PLACES, *now)
        rows += found
        if not stuck:
            left = left[len(now) :]
        elif stuck in now:
            slow.append(stuck)
            left = left[left.index(stuck) + 1 :]
        else:
            break
    return rows, [*slow, *left]


def _look(transport: Transport, script: str, *arguments: str) -> tuple[Rows, str]:
    """Return what a script says, and at what it got stuck; "" if it came to its end.

    Raises `AgentProblem` (no_shell) if it does not run, `ConnectionLost`.
    """
    session = transport.start(["/bin/sh", "-s", "--", *arguments], script.encode())
    limits = ReadLimits(LOOK_SECONDS)
    rows: Rows = []
    try:
        for row in _said(session.lines(limits)):
            rows.append(row)
        status = session.wait(LOOK_SECONDS).status
    except ConnectionLost:
        if not limits.over:
            raise
        status = None
    finally:
        session.close()
    at = next((value for key, value in reversed(rows) if key == "at"), None)
    if at is None:
        raise AgentProblem(
            "no_shell",
            "the account runs no shell script",
            why=f"/bin/sh ended with status {status}" if status is not None else "/bin/sh did not answer",
            hint="give it a login shell that runs commands",
        )
    return [row for row in rows if row[0] != "at"], at


def _said(lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    for line in lines:
        parts = line.split("\t")
        if len(parts) == 3 and parts[0] == _FOUND and parts[2].isprintable():
            yield parts[1], parts[2]


def _python(transport: Transport) -> tuple[str, bool]:
    """Return the interpreter that deploy would use, and whether all were looked at."""
    try:
        found = find_interpreters(transport, SEARCH_FOLDERS, LOOK_SECONDS)
    except TooSlow:
        return "", False
    return next(iter([*found.whole, *found.uv]), ""), True


def _read(rows: Rows, python: str, boot_files: tuple[BootFile, ...], missing: tuple[str, ...]) -> HostFacts:
    one = dict(rows)
    connection = one.get("connection", "").split()
    hubs = [value.partition(" ") for key, value in rows if key == "hub"]
    kilobytes, size, limit = (one.get(key, "") for key in ("memory_kb", "memory", "wired_limit"))
    return HostFacts(
        home=one.get("home", ""),
        system=one.get("system", "").replace("Darwin", "macOS"),
        address=connection[2] if len(connection) == 4 else "",
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
        missing=missing,
    )


def _all(rows: Sequence[tuple[str, str]], key: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(value for found, value in rows if found == key))


# -- boot jobs ----------------------------------------------------------------------------------------------------


def _boot_files(transport: Transport, rows: Rows) -> tuple[tuple[BootFile, ...], list[str]]:
    """Return the boot jobs, each with the text of its script, and the scripts that could not be read."""
    files = [_boot_file(key[4:], text) for key, text in rows if key.startswith("job ") and _OWN not in key]
    scripts = sorted({file.script for file in files if file.script})
    read, stuck = _look(transport, READ_SCRIPTS, *scripts) if scripts else ([], "")
    texts = dict(read)
    with_scripts = [
        BootFile(file.path, file.label, file.script, f"{file.text} {texts.get(file.script, '')}") for file in files
    ]
    return tuple(with_scripts), [stuck] if stuck else []


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
