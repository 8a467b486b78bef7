"""Which processes belong to a server, decided from a given process table."""

from __future__ import annotations

import shlex

import pytest

from mlxops.agent.host.system import Process, ProcessTable
from mlxops.agent.serving import servers

ENGINE = "python /venv/bin/mlx_lm.server --model a --port 8101"
OTHER = "python /venv/bin/mlx_lm.server --model b --port 8102"


def table_of(text: str) -> ProcessTable:
    """Parse lines of `pid ppid pgid command`. Before the command, `Z` marks a zombie, `U` another user's process."""
    found = {}
    for line in text.strip().splitlines():
        pid, ppid, pgid, *words = shlex.split(line)
        zombie, other = (mark == words[0] for mark in "ZU")
        argv = tuple(words[1:] if zombie or other else words)
        found[int(pid)] = Process(int(pid), int(ppid), int(pgid), 501 if not other else 0, f"s{pid}", zombie, argv)
    return ProcessTable(found)


def test_tmux_with_two_servers_is_not_a_server() -> None:
    table = table_of(f"""
        10 1 10 tmux new-session -d {ENGINE}
        11 10 11 {ENGINE}
        12 10 12 bash
        13 12 13 {OTHER}
    """)
    assert [(each.process.pid, each.family) for each in servers.find_servers(table)] == [(11, (11,)), (13, (13,))]


def test_server_includes_its_descendants_and_forks() -> None:
    table = table_of(f"""
        11 1 11 {ENGINE}
        12 11 11 python -c 'from multiprocessing.spawn import spawn_main'
        13 12 13 python -c tracker
        14 11 14 {ENGINE}
        15 11 11 Z {ENGINE}
    """)
    (found,) = servers.find_servers(table)
    assert (found.process.pid, sorted(found.family)) == (11, [11, 12, 13, 14])


def test_script_that_becomes_a_server_keeps_the_first_server() -> None:
    """`mlx_lm.server ... & exec mlx_lm.server ...`"""
    table = table_of(f"""
        11 1 11 {ENGINE}
        12 11 11 {OTHER}
        13 12 11 python -c child
    """)
    assert [each.family for each in servers.find_servers(table)] == [(11,), (12, 13)]
    assert (servers.family(table, 11), servers.family(table, 12)) == ((11,), (12, 13))
    assert servers.wrappers(table, 12) == ()


def test_process_table_with_a_cycle_is_handled() -> None:
    table = table_of(f"11 12 11 {ENGINE}\n12 11 11 python x.py")
    assert servers.family(table, 11) == (11, 12) and servers.wrappers(table, 11) == ()


WRAPPERS = [
    "uv run --project /opt/x mlx_lm.server",
    "uv tool run --from mlx-lm mlx_lm.server",
    "uvx --from mlx-lm mlx_lm.server",
    "python /opt/poetry/bin/poetry run mlx_lm.server",
    "/opt/conda/bin/python /opt/conda/bin/conda run -n mlx mlx_lm.server",
    "micromamba run -n mlx mlx_lm.server",
    "nohup mlx_lm.server",
    "caffeinate -is mlx_lm.server",
    "/usr/bin/time -l mlx_lm.server",
    "timeout 1d mlx_lm.server",
    "flock -n /tmp/lock mlx_lm.server",
    "sh -c 'mlx_lm.server; echo ended'",
    "/bin/zsh /Users/me/start.command",
    "bash -euo pipefail start.sh",
    "-bash -c 'mlx_lm.server; :'",
    "zsh -lic 'mlx_lm.server; :'",
]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapper_belongs_to_its_server(wrapper: str) -> None:
    table = table_of(f"10 1 10 {wrapper}\n11 10 10 {ENGINE}")
    assert servers.wrappers(table, 11) == (10,) and servers.starter(table, 11) is None


OTHERS = [
    "tmux new-session mlx_lm.server",
    "SCREEN -dmS x mlx_lm.server",
    "python panel.py",
    "python -m ipykernel_launcher -f x.json",
    "python -m jupyterlab",
    "python /opt/bin/honcho start",
    "/usr/bin/python3 /usr/bin/supervisord -n",
    "node server.js",
    "uv pip install mlx-lm",
    "conda activate",
    "python -c 'import subprocess'",
    "sudo mlx_lm.server",
    "script -q log mlx_lm.server",
    "entr -r mlx_lm.server",
    "emacs",
    "code-server",
]


@pytest.mark.parametrize("parent", OTHERS)
def test_parent_with_other_work_is_a_starter_and_no_wrapper(parent: str) -> None:
    table = table_of(f"10 1 10 {parent}\n11 10 10 {ENGINE}")
    starter = servers.starter(table, 11)
    assert servers.wrappers(table, 11) == () and starter is not None and starter.pid == 10


@pytest.mark.parametrize("shell", ["-zsh", "bash", "zsh -l", "bash --norc", "bash -i", "/bin/sh", "sh -s"])
def test_interactive_shell_is_neither_wrapper_nor_starter(shell: str) -> None:
    table = table_of(f"10 1 10 {shell}\n11 10 10 {ENGINE}")
    assert servers.wrappers(table, 11) == () and servers.starter(table, 11) is None


@pytest.mark.parametrize("init", ["/usr/lib/systemd/systemd --user", "/sbin/launchd"])
def test_init_is_not_a_starter(init: str) -> None:
    assert servers.starter(table_of(f"10 1 10 {init}\n11 10 11 {ENGINE}"), 11) is None


@pytest.mark.parametrize(
    "table",
    [
        f"10 1 10 sh start-all.sh\n11 10 10 {ENGINE}\n12 10 10 {OTHER}",
        f"10 1 10 sh -c 'mlx_lm.server | tee log'\n11 10 10 {ENGINE}\n12 10 10 tee log",
        f"10 1 10 sh start.sh\n11 10 11 {ENGINE}",
        f"10 1 10 U sh start.sh\n11 10 10 {ENGINE}",
        f"10 1 10 Z sh start.sh\n11 10 10 {ENGINE}",
    ],
    ids=["two servers", "a tee", "another group", "another user", "a zombie"],
)
def test_script_that_runs_something_else_is_no_wrapper(table: str) -> None:
    assert servers.wrappers(table_of(table), 11) == ()


def test_script_whose_other_child_has_ended_is_a_wrapper() -> None:
    assert servers.wrappers(table_of(f"10 1 10 sh x.sh\n11 10 10 {ENGINE}\n12 10 10 Z {OTHER}"), 11) == (10,)


def test_nested_wrappers_belong_to_the_server() -> None:
    table = table_of(f"""
        8 1 8 tmux
        9 8 9 python notebook.py
        10 9 9 sh run.sh
        11 10 9 uv run mlx_lm.server
        12 11 9 {ENGINE}
    """)
    starter = servers.starter(table, 12)
    assert servers.wrappers(table, 12) == (10, 11) and starter is not None and starter.pid == 9
