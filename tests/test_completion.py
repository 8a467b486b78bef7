"""Tab completion: in real bash, zsh and fish, with strange names, from the remembered names, without asking a host."""

from __future__ import annotations

import os
import pty
import re
import resource
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mlxops.cli import complete
from mlxops.cli.completion import SCRIPTS
from tests import completion_words
from tests.lab.homelab import Homelab
from tests.lab.run import run, script
from tests.lab.sshd import missing
from tests.steps import REPO, Ask, register

BREAKS = " \t\n\"'@><=;|&(:"
NAMES = """\
host\t\tstudio\tssh studio
host\t\tstudio2\tssh studio2
port\tstudio\t8100\tjerry-xl qwen ready
port\tstudio2\t8200\tidle
alias\tstudio\tjerry-xl\tport 8100
model\tstudio\tqwen\ton 8100
model\tstudio\torg/llama\t
model\tstudio\tmy model's "best": $1 ü\tstrange
model\tstudio2\tother\t
operation\tstudio\t20261127T023101-5c1f0a7e\tload qwen running
"""
STRANGE = 'my model\'s "best": $1 ü'


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of remembered names."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "cache" / "mlxops"
    folder.mkdir(parents=True)
    (folder / "names").write_text(NAMES, encoding="utf-8")
    return folder


def test_table_is_that_of_the_declarations() -> None:
    assert completion_words.PATH.read_text() == completion_words.generated(), "python -m tests.docs_tables"


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("sta", {"status"}),
        ("--ver", {"--version"}),
        ("load j", {"jerry-xl"}),
        ("load qwen ", {"8100", "8200"}),
        ("load --port 8100 q", {"qwen"}),
        ("load --force q", {"qwen"}),
        ("load --timeout 5 q", {"qwen"}),
        ("load qwen --host studio2 8", {"8200"}),
        ("load --exp", {"--expect"}),
        ("load --expect=q", {"--expect=qwen"}),
        ("load --expect ot", {"other"}),
        ("load --expect x --exp", set()),
        ("load --require tools,str", {"tools,stream"}),
        ("set --set a=1 --se", {"--set"}),
        ("unload 8", {"8100", "8200"}),
        ("ops --follow 2", {"20261127T023101-5c1f0a7e"}),
        ("status --host studio,st", {"studio,studio2"}),
        ("status --host st", {"studio", "studio2"}),
        ("help stat", {"status"}),
        ("schema sta", {"status"}),
        ("completion ", {"bash", "zsh", "fish"}),
        ("deploy --wheels ", {":files"}),
        ("nonsense ", set()),
        ("load --timeout ", set()),
    ],
)
def test_candidates_fit_the_place(line: str, found: set[str]) -> None:
    *words, current = line.split(" ")
    assert {value for value, _ in complete.candidates(words, current) if value.startswith(current)} == found


@pytest.mark.parametrize(
    ("line", "inserted"),
    [
        ("load my", r"my\ model\'s\ \"best\":\ \$1\ ü"),
        ("load my\\ mo", r"my\ model\'s\ \"best\":\ \$1\ ü"),
        ('load "my mo', r"my model's \"best\": \$1 ü"),
        ("load 'my mo", "my model'\\''s \"best\": $1 ü"),
        ("load --expect=q", "qwen"),
        ("A=1 mlxctl load q", "qwen"),
    ],
)
def test_bash_gets_what_it_inserts(line: str, inserted: str) -> None:
    typed = line if "mlxctl" in line else f"mlxctl {line}"
    assert complete._for_bash(BREAKS, typed) == [inserted]


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"model\tstudio\n\tx\n", b"a\tb\tc\td\te\n" * 9])
def test_damaged_file_is_no_problem(cache: Path, content: bytes) -> None:
    (cache / "names").write_bytes(content)
    assert complete.candidates(["load"], "") == []


class TestRemember:
    @pytest.fixture
    def ask(self, homelab: Homelab, cache: Path) -> Ask:
        register(homelab.studio, "mine")
        return Ask(homelab, "ssh")

    def test_commands_remember_what_they_heard(self, ask: Ask, cache: Path) -> None:
        (cache / "names").unlink()
        env = {"XDG_CACHE_HOME": str(cache.parent)}
        ask.lab.mini.mlxctl("status", env=env).ok()
        ask.lab.mini.mlxctl("list", env=env).ok()
        ask.lab.mini.mlxctl("unload", str(ask.port), env=env).ok()
        found = {(kind, name) for kind, _, name, _ in complete.remembered()}
        assert {("host", "studio"), ("alias", "jerry-xl"), ("port", str(ask.port)), ("model", "mine")} <= found
        assert ("repo", REPO) in found
        operation = next(name for kind, name in found if kind == "operation")
        (file,) = cache.iterdir()
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        before = file.stat().st_ino
        ask.lab.mini.mlxctl("list", env=env).ok()
        assert file.stat().st_ino == before, "nothing new is not written"
        ask.lab.mini.mlxctl("ops", env=env).ok()
        assert (operation, "unload done") in [(name, meaning) for _, _, name, meaning in complete.remembered()]

    def test_nothing_is_written_before_completion_is_used(self, ask: Ask, cache: Path, tmp_path: Path) -> None:
        shutil.rmtree(cache.parent)
        ask.lab.mini.mlxctl("status", env={"XDG_CACHE_HOME": str(tmp_path / "cache")}).ok()
        assert not (tmp_path / "cache").exists()
        run([script("mlxctl"), "__complete", "zsh", ""], tmp_path, {"XDG_CACHE_HOME": str(tmp_path / "cache")}).ok()
        assert stat.S_IMODE(cache.stat().st_mode) == 0o700

    def test_command_succeeds_where_nothing_can_be_written(self, ask: Ask, cache: Path) -> None:
        (cache / "names").unlink()
        (cache / "names").mkdir()
        answer = ask.lab.mini.mlxctl("status", env={"XDG_CACHE_HOME": str(cache.parent)}).ok()
        assert answer.stderr == "" and [path.name for path in cache.iterdir()] == ["names"]


# -- real shells ----------------------------------------------------------------------------------------------------


@pytest.fixture
def bin_folder(tmp_path: Path) -> Path:
    """A folder with a `mlxctl` that completes, and otherwise prints its arguments, each between two marks."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "mlxctl"
    program.write_text(
        f'#!/bin/sh\n[ "$1" = __complete ] && exec "{script("mlxctl")}" "$@"\n'
        "printf 'got'; for each; do printf ' <%s>' \"$each\"; done; printf ' end\\n'\n"
    )
    program.chmod(0o755)
    for shell, text in SCRIPTS.items():
        (tmp_path / f"complete.{shell}").write_text(text)
    return folder


def program(shell: str) -> str:
    return shutil.which(shell) or missing(f"{shell} (Debian and Ubuntu: apt-get install {shell})")


START = {
    "bash": (
        ["--norc", "--noprofile", "-i"],
        "PS1='ready> '; bind 'set enable-bracketed-paste off'; . ./complete.bash",
    ),
    "zsh": (
        ["-f", "-i"],
        "PS1='ready> '; unset zle_bracketed_paste; autoload -U compinit; compinit -u -D; . ./complete.zsh",
    ),
}


class Terminal:
    """An interactive shell on a pseudo-terminal."""

    def __init__(self, shell: str, folder: Path) -> None:
        arguments, start = START[shell]
        env = {
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "HOME": str(folder),
            "TERM": "dumb",
            "LC_ALL": "C.UTF-8",
        }
        env["XDG_CACHE_HOME"] = os.environ["XDG_CACHE_HOME"]
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.chdir(folder)
            os.execve(program(shell), [shell, *arguments], env)
        self.type(f"{start}; echo started-$((1+1))\n", "started-2")

    def type(self, text: str, until: str) -> str:
        """Type, and return what is shown up to a text. Raises `AssertionError` after ten seconds."""
        os.write(self.fd, text.encode())
        shown, deadline = b"", time.monotonic() + 20
        while not re.search(until, shown.decode(errors="replace")):
            assert time.monotonic() < deadline, shown.decode(errors="replace")
            shown += os.read(self.fd, 4096)
        return shown.decode(errors="replace")

    def close(self) -> None:
        os.write(self.fd, b"\x03\nexit\n")
        while True:
            try:
                if not os.read(self.fd, 4096):
                    break
            except OSError:
                break
        os.close(self.fd)
        os.waitpid(self.pid, 0)


@pytest.fixture(params=["bash", "zsh"])
def typed(request: pytest.FixtureRequest, bin_folder: Path) -> Callable[[str], str]:
    """Types a line, and returns the arguments that the program got."""
    terminal = Terminal(request.param, bin_folder.parent)
    request.addfinalizer(terminal.close)

    def enter(line: str) -> str:
        shown = terminal.type(f"{line}\n", r"got .* end\r?\n")
        return str(re.findall(r"got (.*) end\r?\n", shown)[-1])

    return enter


@pytest.mark.parametrize("open_quote", ["", "'", '"'])
def test_strange_name_arrives_as_it_is(typed: Callable[[str], str], open_quote: str) -> None:
    assert typed(f"mlxctl load {open_quote}my\t") == f"<load> <{STRANGE}>"


def test_shell_completes_commands_flags_and_names(typed: Callable[[str], str]) -> None:
    assert typed("mlxctl load org\t 81\t --exp\tqw\t") == "<load> <org/llama> <8100> <--expect> <qwen>"
    assert typed("mlxctl load --expect=qw\t") == "<load> <--expect=qwen>"
    assert typed("mlxctl ops --follow 2\t") == "<ops> <--follow> <20261127T023101-5c1f0a7e>"
    assert typed("mlxctl status --host studio,st\t") == "<status> <--host> <studio,studio2>"


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("mlxctl sta", ["status\tShow what is on each port, on all hosts"]),
        ("mlxctl load my", [f"{STRANGE}\tstrange"]),
        ("mlxctl load --expect=qw", ["--expect=qwen\ton 8100"]),
        ("mlxctl ops --follow 2", ["20261127T023101-5c1f0a7e\tload qwen running"]),
        ("mlxctl deploy --wheels ./comp", ["./complete.bash", "./complete.fish", "./complete.zsh"]),
    ],
)
def test_fish_completes(bin_folder: Path, line: str, found: list[str]) -> None:
    env = {"PATH": f"{bin_folder}:{os.environ['PATH']}", "HOME": str(bin_folder), "LC_ALL": "C.UTF-8"}
    env["XDG_CACHE_HOME"] = os.environ["XDG_CACHE_HOME"]
    words = [program("fish"), "-N", "-c", "source complete.fish; complete -C $argv[1]", line]
    answer = run(words, bin_folder.parent, env).ok()
    assert answer.stdout.splitlines() == found


# -- time -----------------------------------------------------------------------------------------------------------


def cpu_seconds(argv: list[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(argv, stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_completion_takes_at_most_three_starts_of_python() -> None:
    python, ours = [sys.executable, "-c", "pass"], [script("mlxctl"), "__complete", "zsh", "load", ""]
    pairs = [(cpu_seconds(python), cpu_seconds(ours)) for _ in range(10)]
    least = [sum(sorted(each)[:5]) for each in zip(*pairs, strict=True)]
    assert least[1] < 3 * least[0], least
