"""Real processes: none runs unrecorded, none is signalled unless proven ours, and none of ours is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import pytest

from mlxops.agent.host import programs
from mlxops.agent.host.programs import MARK, environment
from mlxops.agent.host.system import Process, ProcessTable, System, this_system
from mlxops.agent.serving import ending
from mlxops.agent.serving.ending import Ended, Terms
from mlxops.agent.serving.processes import PendingProcess, Signaller, leader, members, spawn
from mlxops.agent.serving.servers import find_servers
from mlxops.agent.state.store import Store
from mlxops.core.errors import Busy, NotStarted, Refused
from mlxops.core.protocol import Event, Note
from mlxops.core.records import Run, run_from_wire
from tests.core.worlds import run as sample_run
from tests.lab.world import wait_until

SYSTEM = this_system()
SH = "/bin/sh"
PYTHON = sys.executable


def record(gated: PendingProcess, argv: Sequence[str], run_id: str) -> Run:
    return replace(
        sample_run(),
        argv=tuple(argv),
        run_id=run_id,
        pid=gated.pid,
        pgid=gated.pid,
        start=gated.start,
        boot_id=SYSTEM.boot_id(),
    )


@dataclass
class Lab:
    """Starts servers as a load does, and kills the groups that a test leaves."""

    folder: Path
    started: list[PendingProcess] = field(default_factory=list)

    def gated(self, argv: Sequence[str], extra: Mapping[str, str] | None = None) -> tuple[PendingProcess, Run]:
        env = environment(os.environ, extra or {}, f"run-{len(self.started)}-{os.getpid()}")
        gated = spawn(SYSTEM, argv, env, self.folder / "log")
        self.started.append(gated)
        return gated, record(gated, argv, env[MARK])

    def running(self, argv: Sequence[str], extra: Mapping[str, str] | None = None) -> tuple[PendingProcess, Run]:
        """Start a server and wait until it has written `up` to its log."""
        gated, run = self.gated(argv, extra)
        gated.open(self.folder)
        wait_until(lambda: self.log.startswith("up"), 20, f"{argv} to say that it is up")
        return gated, run

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    def script(self, text: str, name: str = "script") -> str:
        path = self.folder / name
        path.write_text(text)
        path.chmod(0o755)
        return str(path)

    def end(self) -> None:
        for gated in self.started:
            gated._shut()
            try:
                os.killpg(gated.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            gated.child.wait()


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    made = Lab(tmp_path)
    yield made
    made.end()


def group(run: Run) -> set[int]:
    return {process.pid for process in SYSTEM.process_table(()).group(run.pgid)}


def ours(run: Run) -> tuple[int, ...]:
    return members(SYSTEM, SYSTEM.process_table(()), run)


def proven(run: Run) -> bool:
    return leader(SYSTEM, SYSTEM.process_table(()).processes, run) is not None


WAIT = "import signal, sys; sys.stdout.write('up'); sys.stdout.flush(); signal.pause()"
IGNORE = "import signal; [signal.signal(n, signal.SIG_IGN) for n in (signal.SIGINT, signal.SIGTERM)]; "
SERVE = (PYTHON, "-S", "-c", WAIT)
STUBBORN = (PYTHON, "-S", "-c", IGNORE + WAIT)


def stop(system: System, run: Run, *, grace: float, reap: Callable[[], object] = lambda: None) -> Ended:
    """End a server that gets `grace` seconds after the last signal."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ending, "END_SECONDS", grace)
        return ending.end(system, run, Terms("unload"), reap=reap)


# -- the gate -------------------------------------------------------------------------------------------------------


def test_engine_does_not_run_before_the_gate_opens(lab: Lab) -> None:
    gated, run = lab.gated([SH, "-c", "echo up > ran"])
    wait_until(lambda: "gate.py" in " ".join(argv(gated.pid)), 30, "the gate")
    assert proven(run) and ours(run) == (gated.pid,), "it can be recorded, found and stopped already"
    assert not (lab.folder / "ran").exists()
    gated.open(lab.folder)
    assert gated.child.wait(10) == 0
    assert (lab.folder / "ran").exists()


def argv(pid: int) -> tuple[str, ...]:
    process = SYSTEM.process(pid)
    return process.argv if process else ()


def test_abandoned_start_never_runs_the_engine(lab: Lab) -> None:
    gated, run = lab.gated([SH, "-c", "echo up > ran"])
    gated.abandon()
    assert gated.child.returncode is not None
    assert not (lab.folder / "ran").exists() and not group(run)


def test_engine_never_runs_if_its_starter_is_killed_before_the_record(tmp_path: Path) -> None:
    program = f"""
import sys
from pathlib import Path
from mlxops.agent.serving.processes import spawn
from mlxops.agent.host.system import this_system
folder = Path({str(tmp_path)!r})
print(spawn(this_system(), ["/bin/sh", "-c", "echo > ran"], {{}}, folder / "log").pid, flush=True)
sys.stdin.readline()
"""
    starter = subprocess.Popen([PYTHON, "-P", "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert starter.stdout is not None
        pid = int(starter.stdout.readline())
    finally:
        starter.kill()
        starter.communicate()
    wait_until(lambda: (found := SYSTEM.process(pid)) is None or found.zombie, 30, "the end of the gate")
    assert not (tmp_path / "ran").exists()


def test_program_that_cannot_run_is_reported_in_the_log(lab: Lab) -> None:
    gated, _ = lab.gated(["/no/such/engine"])
    gated.open(lab.folder)
    assert gated.child.wait(10) == 127
    assert "cannot run '/no/such/engine': No such file" in lab.log


def test_failed_spawn_leaves_no_descriptor_open(lab: Lab) -> None:
    before = os.listdir("/dev/fd")
    with pytest.raises(NotStarted) as caught:
        spawn(SYSTEM, SERVE, {}, lab.folder / "missing" / "log")
    assert caught.value.code == "spawn_failed" and caught.value.why
    assert len(os.listdir("/dev/fd")) == len(before)


# -- what a server inherits -----------------------------------------------------------------------------------------

DUMP_STATE = """
import json, os, sys
def is_open(fd):
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True
dumped = {"env": dict(os.environ), "fds": [fd for fd in range(1024) if is_open(fd)], "cwd": os.getcwd(),
        "stdin": os.path.realpath("/dev/fd/0"), "sid": os.getsid(0), "pgid": os.getpgid(0), "pid": os.getpid()}
json.dump(dumped, open("dumped", "w"))
"""


def dumped(lab: Lab) -> dict[str, object]:
    answer = json.loads((lab.folder / "dumped").read_text())
    assert isinstance(answer, dict)
    return answer


def test_server_environment_is_built_and_has_no_token(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "SSH_AUTH_SOCK", "PYTHONPATH", "ANY"):
        monkeypatch.setenv(name, "canary")
    extra = {"HF_HUB_OFFLINE": "1", "MINE": "a b", "HF_TOKEN": "canary", "my_token": "canary"}
    gated, run = lab.gated([PYTHON, "-S", "-c", DUMP_STATE], extra)
    gated.open(lab.folder)
    assert gated.child.wait(20) == 0
    env = dumped(lab)["env"]
    assert isinstance(env, dict)
    assert "canary" not in json.dumps(env)
    kept = {"HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "LC_CTYPE", "TMPDIR", "TZ"}
    assert set(env) - kept == {"PATH", "PYTHONUNBUFFERED", "HF_HUB_OFFLINE", "MINE", MARK}
    assert (env["HOME"], env["MINE"], env[MARK]) == (os.environ["HOME"], "a b", run.run_id)
    assert set(env["PATH"].split(":")) >= {"/usr/bin", "/bin"}


def test_server_inherits_no_descriptor_and_no_session(lab: Lab) -> None:
    reader, writer = os.pipe()
    os.set_inheritable(writer, True)
    try:
        gated, _ = lab.gated([PYTHON, "-S", "-c", DUMP_STATE])
        gated.open(lab.folder)
        assert gated.child.wait(20) == 0
    finally:
        os.close(reader)
        os.close(writer)
    answer = dumped(lab)
    assert answer["fds"] == [0, 1, 2]
    assert answer["stdin"] == "/dev/null"
    assert answer["cwd"] == str(lab.folder)
    assert answer["sid"] == answer["pgid"] == answer["pid"] == gated.pid != os.getsid(0)


def test_both_streams_are_appended_to_a_private_log(lab: Lab) -> None:
    (lab.folder / "log").write_text("before\n")
    gated, _ = lab.gated([SH, "-c", "echo out; echo err >&2"])
    gated.open(lab.folder)
    gated.child.wait(10)
    assert lab.log == "before\nout\nerr\n"
    assert (lab.folder / "log").stat().st_mode & 0o777 == 0o600


# -- stopping -------------------------------------------------------------------------------------------------------


IGNORES_INT = (PYTHON, "-S", "-c", "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); " + WAIT)
HANDLES_INT = (PYTHON, "-S", "-c", "import signal; signal.signal(signal.SIGINT, lambda *_: None)\nwhile True: " + WAIT)
ENDS_BY = {
    "mlx-lm by SIGINT": ("mlx-lm", SERVE, signal.SIGINT),
    "mlx-lm that a shell started with &": ("mlx-lm", IGNORES_INT, signal.SIGTERM),
    "mlx-lm that does not end at SIGINT": ("mlx-lm", HANDLES_INT, signal.SIGTERM),
    "mlx-openai-server": ("mlx-openai-server", SERVE, signal.SIGTERM),
    "an unknown engine": ("other", SERVE, signal.SIGTERM),
}


@pytest.mark.parametrize("case", ENDS_BY)
def test_server_gets_the_signals_of_its_engine(lab: Lab, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.setattr(ending, "SIGNAL_SECONDS", 0.3)
    engine, command, number = ENDS_BY[case]
    gated, run = lab.running(command)
    stopped = stop(SYSTEM, replace(run, engine=engine), grace=20, reap=gated.child.poll)
    assert not stopped.killed and gated.child.wait(10) == -number
    assert not group(run)


def test_server_that_was_asked_before_is_not_interrupted_again(lab: Lab) -> None:
    gated, run = lab.running(SERVE)
    stop(SYSTEM, replace(run, stopped_by="unload", stopping_since="now"), grace=20, reap=gated.child.poll)
    assert gated.child.wait(10) == -signal.SIGTERM


def test_program_above_the_server_gets_no_sigint(lab: Lab) -> None:
    """uv passes it on, and two of them interrupt the server's cleanup."""
    code = f"import subprocess; raise SystemExit(subprocess.run([{engine(lab)!r}, '--port', '8103']).returncode & 127)"
    gated, run = lab.running((PYTHON, "-S", "-c", code))
    stop(SYSTEM, run, grace=20, reap=gated.child.poll)
    assert gated.child.wait(10) == -signal.SIGINT & 127, "it ended by itself, after the server"


def test_open_requests_are_cut_after_the_drain(lab: Lab) -> None:
    """As uvicorn: SIGTERM ends it when its requests have ended, SIGINT after that at once."""
    code = "import signal; signal.signal(signal.SIGTERM, lambda *_: None)\nwhile True: " + WAIT
    gated, run = lab.running((PYTHON, "-S", "-c", code))
    events: list[Event] = []
    run = replace(run, engine="mlx-openai-server")
    ended = ending.end(SYSTEM, run, Terms("unload", drain=0.2), emit=events.append, reap=gated.child.poll)
    assert not ended.killed and gated.child.wait(10) == -signal.SIGINT
    assert events == [Note("open requests did not end within 0.2 s and are cut off", "warning")]


def test_server_that_ignores_sigterm_is_killed(lab: Lab) -> None:
    gated, run = lab.running(STUBBORN)
    stopped = stop(SYSTEM, run, grace=0.2, reap=gated.child.poll)
    assert stopped.killed and stopped.seconds >= 0.2
    assert gated.child.wait(10) == -signal.SIGKILL and not group(run)


def test_stubborn_child_is_killed_with_its_group(lab: Lab) -> None:
    code = f"import subprocess, signal; subprocess.Popen({list(STUBBORN)!r}); signal.pause()"
    gated, run = lab.running((PYTHON, "-S", "-c", code))
    assert len(ours(run)) == 2
    assert stop(SYSTEM, run, grace=0.3, reap=gated.child.poll).killed
    assert not group(run)


DRAINS = """
import os, signal, socket, subprocess, sys, time
listener = socket.create_server(("127.0.0.1", 0))
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
def drain(*_):
    time.sleep(0.3)  # the requests under way
    print(" its child is", child.poll(), flush=True)
    if sys.argv[1] == "ends its child":
        child.terminate()
        child.wait()
    os._exit(0)
signal.signal(signal.SIGTERM, drain)
print("up", listener.getsockname()[1], flush=True)
while True:
    time.sleep(600)
"""


@pytest.mark.parametrize("how", ["ends its child", "leaves its child"])
@pytest.mark.parametrize("wrapper", [False, True])
def test_server_keeps_its_child_while_it_drains(lab: Lab, how: str, wrapper: bool) -> None:
    own = (PYTHON, "-S", "-c", DRAINS, how)
    _, run = lab.running((SH, "-c", '"$0" "$@"; exit', *own) if wrapper else own)
    wait_until(lambda: lab.log.endswith("\n"), 20, "its port")
    # A grace beyond the time limit of a test: what the server leaves is not waited for that long.
    run = replace(run, port=int(lab.log.split()[1]), engine="mlx-openai-server")
    stopped = stop(SYSTEM, run, grace=300, reap=lab.started[0].child.poll)
    assert "its child is None" in lab.log and not stopped.killed
    assert group(run) == set()


def test_child_that_outlives_its_leader_is_stopped_by_its_mark(lab: Lab) -> None:
    gated, run = lab.running([SH, "-c", f'{PYTHON} -S -c "$0" & exit', WAIT])
    gated.child.wait(10)
    assert not proven(run)
    (child,) = ours(run)
    assert child != run.pid and SYSTEM.environment(child, MARK) == run.run_id
    stop(SYSTEM, run, grace=20)
    assert not group(run)


def test_zombie_counts_as_gone(lab: Lab) -> None:
    gated, run = lab.running(SERVE)
    stopped = stop(SYSTEM, run, grace=20)  # no process collects it
    assert not stopped.killed and stopped.seconds < 10
    found = SYSTEM.process(gated.pid)
    assert found is not None and found.zombie
    assert ours(run) == () and not proven(run)


def test_stopping_a_gone_server_does_nothing(lab: Lab) -> None:
    gated, run = lab.running(SERVE)
    stop(SYSTEM, run, grace=20, reap=gated.child.poll)
    assert not stop(SYSTEM, run, grace=20).killed


class Fading:
    """A system with a scripted process group."""

    def __init__(self, run: Run, *pids: int) -> None:
        self._run = run
        self.marked = set(pids)
        self.processes = {pid: Process(pid, 1, run.pgid, os.getuid(), f"s{pid}", False, ("engine",)) for pid in pids}

    def boot_id(self) -> str:
        return self._run.boot_id

    def environment(self, pid: int, key: str) -> str | None:
        return self._run.run_id if pid in self.marked else None

    def process_table(self, ports: Container[int]) -> ProcessTable:
        return ProcessTable(self.processes)


def test_exiting_child_that_has_lost_its_mark_is_still_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "killpg", lambda pgid, number: sent.append((pgid, number)))
    run = sample_run()
    system = Fading(run, 2**22 - 1, 2**22 - 2)
    stopping = Signaller(cast(System, system), run, lambda: None)
    assert stopping.send(signal.SIGTERM)
    system.marked.pop()
    assert stopping.send(signal.SIGKILL)
    assert sent == [(run.pgid, signal.SIGTERM), (run.pgid, signal.SIGKILL)]
    (changed,) = system.processes.keys() - system.marked
    system.processes[changed] = replace(system.processes[changed], start="another")
    with pytest.raises(Refused, match="may not be signalled") as caught:
        stopping.send(signal.SIGKILL)
    assert caught.value.hint.endswith(f"kill {changed}; then: mlxctl unload {run.port}")


def test_timed_out_helper_program_leaves_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Late(subprocess.Popen[str]):
        def communicate(self, input: str | None = None, timeout: float | None = None) -> tuple[str, str]:
            if timeout is None:
                return super().communicate(input)
            wait_until((tmp_path / "pid").exists, 20, "its child")
            raise subprocess.TimeoutExpired(self.args, timeout)

    monkeypatch.setattr(subprocess, "Popen", Late)
    text = f"sleep 1000 >/dev/null 2>&1 & echo $! >{tmp_path}/new; mv {tmp_path}/new {tmp_path}/pid; wait"
    assert programs.run_program([SH, "-c", text], {"PATH": "/usr/bin:/bin"}, 1) == (None, "")
    child = int((tmp_path / "pid").read_text())
    try:
        wait_until(lambda: (seen := SYSTEM.process(child)) is None or seen.zombie, 30, "the end of its child")
    finally:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


# -- identity -------------------------------------------------------------------------------------------------------

TAMPERED = {
    "another start time": {"start": "1"},
    "a start time that only begins alike": {"start": "0"},
    "another command": {"argv": ("/bin/engine", "--port", "8103")},
    "a longer command": {"argv": (*SERVE, "--more")},
    "another group": {"pgid": 2**22 - 1},
    "another pid": {"pid": 2**22 - 1},
}


@pytest.mark.parametrize("case", TAMPERED)
def test_process_that_differs_from_the_record_is_not_ours(lab: Lab, case: str) -> None:
    gated, run = lab.running(SERVE)
    other = replace(run, run_id="another", **TAMPERED[case])  # type: ignore[arg-type]  # as the table says
    assert not proven(other) and ours(other) == ()
    assert not stop(SYSTEM, other, grace=0.1).killed
    assert gated.child.poll() is None


def test_command_line_proves_nothing(lab: Lab) -> None:
    """A prefix that execs the engine leaves another argv than the recorded one. The mark of another run counts."""
    _, run = lab.running(SERVE)
    assert proven(replace(run, argv=("/usr/bin/nice", "-n", "10", "/bin/engine")))
    assert not proven(replace(run, run_id="another"))


@pytest.mark.parametrize("prefix", [(), ("/usr/bin/env", "-i")], ids=["a mark", "an empty environment"])
def test_process_without_a_mark_is_identified_by_its_start_time(lab: Lab, prefix: tuple[str, ...]) -> None:
    """An environment that cannot be seen, as of a hardened program on macOS, looks like an empty one."""
    gated, run = lab.running((*prefix, *SERVE))
    assert proven(run) and (SYSTEM.environment(gated.pid, MARK) is None) is bool(prefix)
    assert not proven(replace(run, start="1")) and ours(replace(run, start="1", run_id="another")) == ()
    assert not stop(SYSTEM, run, grace=20, reap=gated.child.poll).killed and not group(run)


def test_child_that_has_left_its_group_is_stopped_with_its_server(lab: Lab) -> None:
    code = f"import subprocess, signal; subprocess.Popen({list(SERVE)!r}, start_new_session=True); signal.pause()"
    gated, run = lab.running((PYTHON, "-S", "-c", code))
    (child,) = [p.pid for p in SYSTEM.process_table(()).processes.values() if p.ppid == gated.pid]
    assert ours(run) == (gated.pid,), "it does not prove the server"
    stop(SYSTEM, run, grace=20, reap=gated.child.poll)
    wait_until(lambda: (seen := SYSTEM.process(child)) is None or seen.zombie, 30, "the end of the child")


def test_process_is_ours_during_exec(lab: Lab) -> None:
    """The kernel then shows no arguments. That must not make a living server look gone."""
    gated, run = lab.running(SERVE)
    observed = SYSTEM.process_table(()).processes
    between = {**observed, gated.pid: replace(observed[gated.pid], argv=())}
    assert leader(SYSTEM, between, run) is not None
    assert leader(SYSTEM, between, replace(run, start="1")) is None


def test_nothing_is_ours_after_a_reboot(lab: Lab) -> None:
    gated, run = lab.running(SERVE)
    other = replace(run, boot_id="the boot before")
    assert not proven(other) and ours(other) == ()
    stop(SYSTEM, other, grace=0.1)
    assert gated.child.poll() is None


def test_adopted_server_is_proven_by_its_leader_only(lab: Lab) -> None:
    gated, run = lab.running(SERVE)
    adopted = replace(run, run_id="", adopted=True)
    assert proven(adopted) and ours(adopted) == (gated.pid,)
    assert ours(replace(adopted, start="1")) == ()


def test_process_without_a_mark_does_not_match_a_record_without_one(lab: Lab) -> None:
    gated = lab_without_mark(lab)
    unknown = replace(record(gated, ("x", "y"), ""), start="1")
    assert ours(unknown) == ()


def lab_without_mark(lab: Lab) -> PendingProcess:
    gated = spawn(SYSTEM, SERVE, {MARK: ""}, lab.folder / "log")
    lab.started.append(gated)
    gated.open(lab.folder)
    wait_until(lambda: lab.log == "up", 20, "the server")
    return gated


WRAPPERS = {
    "a script of a shell that becomes it": "#!/bin/sh\nexec {python} -S -c '{wait}' \"$@\"\n",
    "a script of a shell that waits for it": "#!/bin/sh\n{python} -S -c '{wait}' \"$@\"\n:\n",
    "a script of its own interpreter": "#!{python}\n{wait}\n",
    "a script through env": "#!/usr/bin/env -S {python} -S\n{wait}\n",
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_server_keeps_its_identity(lab: Lab, wrapper: str) -> None:
    wait = WAIT.replace("'", '"')
    program = lab.script(WRAPPERS[wrapper].format(python=PYTHON, wait=wait))
    gated, run = lab.running([program, "--model", "a b", "--port", "8103"])
    assert argv(gated.pid) != run.argv, "it is another command than the one that was started"
    assert proven(run) and gated.pid in ours(run)
    stop(SYSTEM, run, grace=20, reap=gated.child.poll)
    assert not group(run)


# -- in a group that we did not create ---------------------------------------------------------------------------------


@dataclass
class Adopted:
    """A server in the process group of its starter."""

    run: Run
    everyone: frozenset[int]
    starter: PendingProcess

    def stop(self) -> None:
        stop(SYSTEM, self.run, grace=20, reap=self.starter.child.poll)

    @property
    def left(self) -> frozenset[int]:
        self.starter.child.poll()
        return self.everyone & group(self.run)


def adopted(lab: Lab, argv: Sequence[str], processes: int) -> Adopted:
    """Adopt the mlx_lm.server for port 8103 that `argv` starts, in a group of so many processes."""
    starter, run = lab.running(argv)
    wait_until(lambda: len(group(run)) == processes, 20, "its group")
    (server,) = (
        each
        for each in find_servers(SYSTEM.process_table(()))
        if each.process.pgid == run.pgid and each.detected.port == 8103
    )
    own = replace(run, run_id="", adopted=True, pid=server.process.pid, start=server.process.start)
    return Adopted(own, frozenset(group(run)), starter)


def engine(lab: Lab) -> str:
    lab.script(f"#!{PYTHON} -IS\n{WAIT}\n", "mlx_lm.server")
    return f"{lab.folder}/mlx_lm.server"


STARTERS = {
    # Shell script that starts the server; processes in its group; processes left after the stop.
    "alone": ("{engine} --port 8103\n:", 2, 0),
    "with a word to tee": ("{engine} --port 8103 | tee {log}", 3, 0),
    "with something else in the background": ("sleep 1000 &\n{engine} --port 8103\nwait", 3, 2),
    "with a server beside it": ("{engine} --port 8104 &\n{engine} --port 8103\nwait", 3, 2),
    "with itself in the place of another one": ("{engine} --port 8103 &\nexec {engine} --port 8104", 2, 1),
    "in the place of the script, with another one before": ("{engine} --port 8104 &\nexec {engine} --port 8103", 2, 1),
    "again and again": ("while true; do {engine} --port 8103; done", 2, 0),
    "through wrappers": ("flock {lock} stdbuf -o0 {engine} --port 8103\n:", 3, 0),
}


@pytest.mark.parametrize("how", STARTERS)
def test_server_in_a_foreign_group_is_stopped_alone(lab: Lab, how: str) -> None:
    text, processes, left = STARTERS[how]
    script = text.format(engine=engine(lab), log=lab.folder / "log", lock=lab.folder / "lock")
    adopted_one = adopted(lab, [SH, "-c", f": ;{script}"], processes)
    adopted_one.stop()
    wait_until(lambda: len(adopted_one.left) == left, 30, f"{left} of the group to be left")
    assert len(group(adopted_one.run)) == left, "no new server was started"


def test_program_with_other_work_that_started_a_server_stays(lab: Lab) -> None:
    code = f"import subprocess, time; subprocess.Popen([{engine(lab)!r}, '--port', '8103'])\nwhile True: time.sleep(1)"
    panel = adopted(lab, [PYTHON, "-S", "-c", code], 2)
    panel.stop()
    assert panel.left == {panel.starter.pid} and panel.starter.child.poll() is None


def test_process_that_reuses_a_pid_is_not_signalled(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    _, run = lab.running(SERVE)
    other = replace(run, run_id="", adopted=True)
    table = SYSTEM.process_table(())
    monkeypatch.setattr(type(SYSTEM), "process_table", lambda self, ports: table)
    monkeypatch.setattr(type(SYSTEM), "process", lambda self, pid: replace(table.processes[pid], start="1"))
    Signaller(SYSTEM, other, lambda: None).send(signal.SIGTERM)
    monkeypatch.undo()
    assert group(run) == {run.pid}


def test_process_that_survives_sigkill_is_reported(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel may fail to remove a process; here the signals are dropped."""
    _, run = lab.running(SERVE)
    monkeypatch.setattr(ending, "KILL_SECONDS", 0.05)
    monkeypatch.setattr(os, "killpg", lambda pgid, number: None)
    with pytest.raises(Exception, match="still there") as caught:
        stop(SYSTEM, run, grace=0.05)
    assert getattr(caught.value, "code", "") == "will_not_die"


@pytest.mark.parametrize("adopted", [True, False])
def test_child_of_a_server_that_has_ended_stays_ours_until_it_ends(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adopted: bool
) -> None:
    """The leader ends at once. The stop gives up, because the child ignores it and may not be killed."""
    for name in ("SIGNAL_SECONDS", "END_SECONDS", "LEFTOVER_SECONDS"):
        monkeypatch.setattr(ending, name, 0.2)
    child = "import os, time; os.setsid(); os.environ.clear(); print('up', flush=True); time.sleep(600)"
    script = f"trap '' INT TERM; {PYTHON} -c \"{child}\" & trap - INT TERM; exec sleep 600"
    gated, run = lab.running([SH, "-c", script])
    if adopted:
        run = replace(run, adopted=True, run_id="")
    store = Store(tmp_path / "state", tmp_path / "registry.json")
    store.create_folders()
    with pytest.raises(Busy):
        ending.end(SYSTEM, run, Terms("unload", 0), store=store, reap=gated.child.poll)
    recorded = store.run(run.port)
    assert recorded is not None
    (left,) = members(SYSTEM, SYSTEM.process_table(()), recorded)
    assert left != gated.pid and run_from_wire(json.loads(json.dumps(recorded.to_wire()))) == recorded
    assert ending.end(SYSTEM, recorded, Terms("unload", None), reap=gated.child.poll).killed
    assert not members(SYSTEM, SYSTEM.process_table(()), recorded)
