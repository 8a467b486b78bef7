"""The start file: imports come before the gate is opened, and SIGINT lets open requests finish."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from mlxops.agent.engines.argv import is_preloaded, program_of
from mlxops.agent.engines.installation import interpreter_of
from mlxops.agent.host.programs import MARK
from mlxops.agent.host.system import this_system
from mlxops.agent.serving.processes import PendingProcess, spawn
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
        self.end_headers()
        self.wfile.write(b"begun ")
        os.read(os.open(self.path, os.O_RDONLY), 1)  # a FIFO: until the test opens it
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

    def ask(self, port: int, name: str) -> http.client.HTTPResponse:
        """Send a request, and read the begin of its answer. It ends when the FIFO is opened."""
        fifo = self.folder / name
        os.mkfifo(fifo)
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        connection.request("GET", str(fifo))
        response = connection.getresponse()
        assert response.read(6) == b"begun "
        return response

    def finish(self, name: str) -> None:
        (self.folder / name).write_bytes(b"x")

    def interrupt(self) -> None:
        os.kill(self.process.pid, signal.SIGINT)


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


def test_preloaded_process_is_recognised_by_its_program() -> None:
    argv = ["/venv/bin/python", "/x/mlxops_start.py", "7", "mlx_lm.server", "/venv/bin/mlx_lm.server", "--port", "8100"]
    program = program_of(argv)
    assert is_preloaded(argv) and program is not None
    assert (program.name, program.arguments) == ("mlx_lm.server", ("--port", "8100"))
    assert not is_preloaded(argv[4:]) and not is_preloaded(argv[:4])


INTERPRETERS = [
    ("#!/venv/bin/python\nimport x\n", "/venv/bin/python"),
    ("#!/venv/bin/python3.11 \n", "/venv/bin/python3.11"),
    ("#!/bin/sh\n'''exec' '/a b/bin/python3' \"$0\" \"$@\"\n' '''\n", "/a b/bin/python3"),
    ("#!/bin/sh\n'''exec' /long/bin/python \"$0\" \"$@\"\n' '''\n", "/long/bin/python"),
    ("#!/usr/bin/env python3\n", None),
    ("#!/venv/bin/python -E\n", None),
    ("#!/bin/bash\nexec python\n", None),
    ("\x7fELF", None),
    ("", None),
]


@pytest.mark.parametrize(("text", "python"), INTERPRETERS)
def test_interpreter_is_read_from_the_first_line(tmp_path: Path, text: str, python: str | None) -> None:
    path = tmp_path / "program"
    path.write_text(text)
    assert interpreter_of(str(path)) == python


def refuses(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 5).close()
    except ConnectionRefusedError:
        return True
    return False
