"""The start file: imports come before the gate is opened, SIGINT lets open requests finish, and a stream begins with
its first event."""

from __future__ import annotations

import array
import contextlib
import fcntl
import http.client
import json
import os
import select
import signal
import socket
import subprocess
import sys
import termios
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import pytest

from mlxops.agent.engines.argv import is_preloaded, program_of
from mlxops.agent.engines.installation import interpreter_of
from mlxops.agent.host.programs import MARK
from mlxops.agent.host.system import this_system
from mlxops.agent.serving.mlxops_start import SILENCE_SECONDS, Stream
from mlxops.agent.serving.processes import PendingProcess, spawn, waits
from tests.lab.world import wait_until

SYSTEM = this_system()
MODULE = """
import json, os, sys
json.dump({"argv": sys.argv, "cwd": os.getcwd(), "path": sys.path[0]}, open(os.environ["FOLDER"] + "/imported", "w"))
"""
SERVER = """
import json, os, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import engine_module

json.dump({"argv": sys.argv, "cwd": os.getcwd(), "name": __name__, "file": __file__}, open("started", "w"))

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        if "stream" in self.path:
            self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        if "stream" not in self.path:
            self.wfile.write(b"begun ")
        fifo = os.open(self.path, os.O_RDONLY)  # it opens when the test opens it
        while command := os.read(fifo, 1):
            if command == b":":
                self.wfile.write(b": keepalive\\n\\n")
            if command == b"x":
                self.wfile.write(b"done")

server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
with open("port.new", "w") as file:
    file.write(str(server.server_port))
os.rename("port.new", "port")
try:
    server.serve_forever()
except KeyboardInterrupt:
    server.shutdown()
    print("cleaned up", flush=True)
"""


@dataclass
class Engine:
    """A program of an engine, in an environment of its own, and the process that is to run it."""

    folder: Path
    process: PendingProcess

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    def noted(self, name: str) -> dict[str, object]:
        answer = json.loads((self.folder / name).read_text())
        assert isinstance(answer, dict)
        return answer

    def serve(self) -> int:
        self.process.open(self.folder)
        wait_until((self.folder / "port").exists, 20, "the server")
        return int((self.folder / "port").read_text())

    def send(self, port: int, name: str) -> http.client.HTTPConnection:
        """Send a request. Its answer ends when the FIFO is opened and closed."""
        fifo = self.folder / name
        os.mkfifo(fifo)
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        connection.request("GET", str(fifo))
        return connection

    def ask(self, port: int, name: str) -> http.client.HTTPResponse:
        """Send a request, and read the begin of its answer."""
        response = self.send(port, name).getresponse()
        assert response.read(6) == b"begun "
        return response

    def finish(self, name: str) -> None:
        (self.folder / name).write_bytes(b"x")

    def interrupt(self) -> None:
        os.kill(self.process.pid, signal.SIGINT)

    def control(self, name: str) -> BinaryIO:
        """Return the FIFO of a request: `:` lets the answer have a comment, `x` its only event."""
        return (self.folder / name).open("wb", buffering=0)


def script(folder: Path, python: str = sys.executable) -> Path:
    path = folder / "bin" / "engine"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!{python}\n{SERVER}")
    (path.parent / "engine_module.py").write_text(MODULE)
    return path


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    env = {MARK: "run", "FOLDER": str(tmp_path)}
    argv = [str(script(tmp_path)), "--port", "1"]
    process = spawn(SYSTEM, argv, env, tmp_path / "log", (sys.executable, "engine_module"))
    try:
        yield Engine(tmp_path, process)
    finally:
        process.child.kill()
        process.child.wait()
        if process.gate is not None:
            process.gate.close()


def test_modules_are_imported_before_the_gate_opens_and_the_program_runs_after(engine: Engine) -> None:
    assert engine.process.ready(20)
    assert engine.noted("imported")["path"] == str(engine.folder / "bin")
    assert not (engine.folder / "started").exists()
    engine.serve()
    program = str(engine.folder / "bin" / "engine")
    assert engine.noted("started") == {
        "argv": [program, "--port", "1"],
        "cwd": str(engine.folder),
        "name": "__main__",
        "file": program,
    }


def test_program_never_runs_if_its_starter_is_killed(tmp_path: Path) -> None:
    path = script(tmp_path)
    program = f"""
import sys
from pathlib import Path
from mlxops.agent.serving.mlxops_start import SILENCE_SECONDS, Stream
from mlxops.agent.serving.processes import spawn
from mlxops.agent.host.system import this_system
process = spawn(this_system(), [{str(path)!r}], {{"FOLDER": {str(tmp_path)!r}}}, Path({str(tmp_path / "log")!r}),
                (sys.executable, "engine_module"))
assert process.ready(20)
print(process.pid, flush=True)
sys.stdin.readline()
"""
    starter = subprocess.Popen([sys.executable, "-P", "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert starter.stdout is not None
        pid = int(starter.stdout.readline())
    finally:
        starter.kill()
        starter.communicate()
    wait_until(lambda: (found := SYSTEM.process(pid)) is None or found.zombie, 30, "the end of the process")
    assert (tmp_path / "imported").exists() and not (tmp_path / "started").exists()


def test_interrupted_server_finishes_open_requests_and_takes_no_others(engine: Engine) -> None:
    port = engine.serve()
    first, second = engine.ask(port, "first"), engine.ask(port, "second")
    engine.interrupt()
    wait_until(lambda: refuses(port), 20, "the listener to close")
    engine.finish("first")
    assert first.read() == b"done"
    assert engine.process.child.poll() is None
    engine.finish("second")
    assert second.read() == b"done"
    assert engine.process.child.wait(20) == 0 and "cleaned up" in engine.log


def test_second_interrupt_cuts_the_open_requests(engine: Engine) -> None:
    port = engine.serve()
    response = engine.ask(port, "first")
    engine.interrupt()
    wait_until(lambda: refuses(port), 20, "the listener to close")
    engine.interrupt()
    assert engine.process.child.wait(20) == 0 and "cleaned up" in engine.log
    assert response.read() == b""


def test_idle_server_ends_at_once(engine: Engine) -> None:
    engine.serve()
    engine.interrupt()
    assert engine.process.child.wait(20) == 0


def test_connection_without_a_request_is_not_waited_for(engine: Engine) -> None:
    port = engine.serve()
    with socket.create_connection(("127.0.0.1", port), 5):
        response = engine.ask(port, "first")
        engine.interrupt()
        wait_until(lambda: refuses(port), 20, "the listener to close")
        assert engine.process.child.poll() is None
        engine.finish("first")
        assert response.read() == b"done"
        assert engine.process.child.wait(20) == 0


def test_stream_begins_with_its_first_event(engine: Engine) -> None:
    port = engine.serve()
    connection = engine.send(port, "stream")
    with engine.control("stream") as control:
        control.write(b":::")
        assert not readable(connection, 0.3)
        control.write(b"x")
        response = connection.getresponse()
    assert (response.status, response.read()) == (200, b": keepalive\n\n" * 3 + b"done")


def test_stream_without_an_event_is_sent_at_its_end(engine: Engine) -> None:
    connection = engine.send(engine.serve(), "stream")
    engine.control("stream").close()
    assert connection.getresponse().read() == b""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_stream_that_is_cut_before_its_first_event_has_not_begun(engine: Engine, number: int) -> None:
    """Killed, or interrupted twice: the end of a drain. LiteLLM asks again only if not one byte has come."""
    port = engine.serve()
    connection = engine.send(port, "stream")
    with engine.control("stream") as control:
        control.write(b":")
        wait_until(lambda: unread(control) == 0, 20, "the comment")
        if number == signal.SIGINT:
            engine.interrupt()
            wait_until(lambda: refuses(port), 20, "the listener to close")
        os.kill(engine.process.pid, number)
        engine.process.child.wait(20)
    with pytest.raises(http.client.RemoteDisconnected):
        connection.getresponse()


def test_client_that_left_before_the_first_event_is_noticed(engine: Engine) -> None:
    connection = engine.send(engine.serve(), "stream")
    with engine.control("stream") as control:
        connection.close()

        def noticed() -> bool:
            with contextlib.suppress(BrokenPipeError):  # its reader is gone, too
                control.write(b":")
            return "BrokenPipeError" in engine.log

        wait_until(noticed, 20, "the end of the request")


def test_stream_is_not_silent_for_a_minute() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        stream = Stream(theirs)
        stream.sendall(b"HTTP/1.0 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
        stream.sendall(b": 1\n\n")
        stream._until -= SILENCE_SECONDS
        stream.sendall(b": 2\n\n")
        assert ours.recv(1000).endswith(b"\r\n\r\n: 1\n\n: 2\n\n")
    assert SILENCE_SECONDS < 60


def test_module_is_run_as_python_runs_it(tmp_path: Path) -> None:
    package = tmp_path / "packages" / "engine_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "server.py").write_text(SERVER.replace("import engine_module", ""))
    env = {"PYTHONPATH": str(package.parent)}
    argv = [sys.executable, "-m", "engine_package.server", "--port", "1"]
    process = spawn(SYSTEM, argv, env, tmp_path / "log", (sys.executable, "engine_package"))
    try:
        engine = Engine(tmp_path, process)
        assert process.ready(20)
        port = engine.serve()
        file = str(package / "server.py")
        assert engine.noted("started") == {
            "argv": [file, "--port", "1"],
            "cwd": str(tmp_path),
            "name": "__main__",
            "file": file,
        }
        response = engine.ask(port, "first")
        engine.interrupt()
        wait_until(lambda: refuses(port), 20, "the listener to close")
        engine.finish("first")
        assert response.read() == b"done" and process.child.wait(20) == 0
        assert "Warning" not in engine.log
    finally:
        process.child.kill()
        process.child.wait()


def test_module_that_this_version_does_not_have_is_left_out(tmp_path: Path) -> None:
    preload = (sys.executable, "no_such_module", "json.no_such_part")
    process = spawn(SYSTEM, [str(script(tmp_path))], {"FOLDER": str(tmp_path)}, tmp_path / "log", preload)
    try:
        Engine(tmp_path, process).serve()
    finally:
        process.child.kill()
        process.child.wait()


def test_program_that_cannot_import_its_modules_ends_before_the_gate_opens(tmp_path: Path) -> None:
    path = script(tmp_path)
    (path.parent / "broken_module.py").write_text("import no_such_module")
    process = spawn(SYSTEM, [str(path)], {}, tmp_path / "log", (sys.executable, "broken_module"))
    assert process.ready(20) and process.child.wait(20) == 1
    process.open(tmp_path)
    assert "No module named 'no_such_module'" in (tmp_path / "log").read_text()
    assert not (tmp_path / "started").exists()


def test_process_behind_the_gate_is_no_server_yet(tmp_path: Path) -> None:
    process = spawn(
        SYSTEM, [str(script(tmp_path))], {"FOLDER": str(tmp_path)}, tmp_path / "log", (sys.executable, "json")
    )
    try:
        assert process.ready(20)
        row = SYSTEM.process(process.pid)
        assert row is not None and waits(SYSTEM, row)
        Engine(tmp_path, process).serve()
        assert not waits(SYSTEM, row)
    finally:
        process.child.kill()
        process.child.wait()


def test_preloaded_process_is_recognised_by_its_program() -> None:
    argv = ["/venv/bin/python", "/x/mlxops_start.py", "7", "mlx_lm.server", "/venv/bin/mlx_lm.server", "--port", "8100"]
    program = program_of(argv)
    assert is_preloaded(argv) and program is not None
    assert (program.name, program.arguments) == ("mlx_lm.server", ("--port", "8100"))
    assert not is_preloaded(argv[4:]) and not is_preloaded(argv[:4])
    module = program_of([*argv[:4], "/venv/bin/python", "-m", "mlx_lm.server", "--port", "8100"])
    assert module is not None and (module.name, module.arguments) == ("mlx_lm.server", ("--port", "8100"))


INTERPRETERS = [
    ("#!/venv/bin/python\nimport x\n", "/venv/bin/python"),
    ("#!/venv/bin/python3.11 \n", "/venv/bin/python3.11"),
    ("#!/bin/sh\n'''exec' '/a b/bin/python3' \"$0\" \"$@\"\n' '''\n", "/a b/bin/python3"),
    ("#!/bin/sh\n'''exec' /long/bin/python \"$0\" \"$@\"\n' '''\n", "/long/bin/python"),
    ("#!/usr/bin/env python3\n", "PATH/python3"),
    ("#! /bin/env python3.11 \n", "PATH/python3.11"),
    ("#!/usr/bin/env python4\n", None),
    ("#!/usr/bin/env -S python3 -E\n", None),
    ("#!/venv/bin/python -E\n", None),
    ("#!/bin/bash\nexec python\n", None),
    ("\x7fELF", None),
    ("", None),
]


@pytest.mark.parametrize(("text", "python"), INTERPRETERS)
def test_interpreter_is_read_from_the_first_line(tmp_path: Path, text: str, python: str | None) -> None:
    for name in ("python3", "python3.11"):
        (tmp_path / name).touch(0o755)
    path = tmp_path / "program"
    path.write_text(text)
    found = interpreter_of([str(path), "--port", "1"], str(tmp_path))
    assert found == (python and python.replace("PATH", str(tmp_path)))


@pytest.mark.parametrize(
    ("argv", "python"),
    [
        (("/venv/bin/python", "-m", "mlx_lm.server"), "/venv/bin/python"),
        (("/venv/bin/python3.12", "-m", "mlx_lm", "server"), "/venv/bin/python3.12"),
        (("/venv/bin/python", "-m"), None),
        (("/venv/bin/python", "-u", "-m", "mlx_lm.server"), None),
        (("/opt/bin/uv", "run", "mlx_lm.server"), None),
        (("/opt/bin/wrapper", "-m", "mlx_lm.server"), None),
    ],
)
def test_interpreter_of_a_module_is_the_first_word(argv: tuple[str, ...], python: str | None) -> None:
    assert interpreter_of(argv, "/nowhere") == python


def refuses(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 5).close()
    except ConnectionRefusedError:
        return True
    return False


def readable(connection: http.client.HTTPConnection, seconds: float) -> bool:
    return bool(select.select([connection.sock], [], [], seconds)[0])


def unread(fifo: BinaryIO) -> int:
    """Return how many bytes of a FIFO wait for their reader."""
    waiting = array.array("i", [0])
    fcntl.ioctl(fifo, termios.FIONREAD, waiting)
    return waiting[0]
