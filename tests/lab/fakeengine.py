"""A server program that takes the options of `mlx_lm.server` and misbehaves on request.

    python fakeengine.py [--act MODE] [--until FILE] [--only PORT] --model NAME --host ADDRESS --port PORT

A real process with a real HTTP server, for what a real engine does rarely: hang, end with status 0, leave its children
behind. Needs the standard library only; starts in a twentieth of the real one's time.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import signal
import socketserver
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

MODES = {
    "ok": "serves",
    "until": "serves as soon as FILE is there; until then nothing listens",
    "deaf": "never listens",
    "silent": "listens, and never answers",
    "exit0": "says that it failed and ends with status 0",
    "exit1": "ends with status 1",
    "broken": "is healthy, and answers every completion with 500",
    "stranger": "has a process of another session answer on its port",
    "stubborn": "serves, and ignores SIGTERM and SIGINT",
    "leaves": "ends, and leaves a child in its group that serves",
    "family": "serves, with a child in its group",
    "heavy": "serves, with a gigabyte of memory that the system takes a while to get back when it ends",
    "heavy-child": "serves, with a child in its group that holds such memory",
}


HEAVY = 1_000_000_000
held: list[mmap.mmap] = []


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        super().__init__((options.host, options.port), Handler)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's own looks the name up


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._hang_if_silent()
        if self.path == "/v1/models":
            self._answer(200, {"object": "list", "data": [{"id": self.server.options.model}]})
        else:
            self._answer(200, {"status": "ok"})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._hang_if_silent()
        options = self.server.options
        if options.act == "broken":
            self._answer(500, {"error": "BatchEncoding has no attribute input_ids"})
        elif asked.get("model") != options.model:
            self._answer(404, {"error": f"no model {asked.get('model')}"})
        elif asked.get("stream"):
            self._stream()
        else:
            message = {"role": "assistant", "content": f"from {os.getpid()}"}
            self._answer(200, {"model": options.model, "choices": [{"index": 0, "message": message}]})

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _hang_if_silent(self) -> None:
        if self.server.options.act == "silent":
            wait_for_ever()

    def _answer(self, status: int, document: object) -> None:
        body = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _stream(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        while True:
            self.wfile.write(b'data: {"choices": [{"delta": {"content": "and"}}]}\n\n')
            time.sleep(0.05)


def hold_memory(size: int = HEAVY) -> None:
    """Touch every page, so that all of it is there."""
    memory = mmap.mmap(-1, size)
    memory[:: mmap.PAGESIZE] = b"\1" * -(-size // mmap.PAGESIZE)
    held.append(memory)


def handle_signals(options: argparse.Namespace) -> None:
    if options.linger:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: threading.Thread(target=end_after, args=(options.linger,)).start())
    for name in filter(None, options.ignore.split(",")):
        signal.signal(signal.Signals[f"SIG{name.upper()}"], signal.SIG_IGN)


def end_after(seconds: float) -> None:
    time.sleep(seconds)
    os._exit(0)


def wait_for_ever() -> None:
    while True:
        signal.pause()


def serve(options: argparse.Namespace) -> None:
    with Server(options) as server:
        server.serve_forever(poll_interval=0.05)


def main() -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--act", choices=MODES, default="ok")
    parser.add_argument("--until", type=Path)
    parser.add_argument("--only", type=int, help="it ends at once on any other port")
    parser.add_argument("--fake-memory", dest="memory", type=int, default=0, help="MB of real memory that it holds")
    parser.add_argument("--fake-ignore", dest="ignore", default="", help="int, term or both: signals that it ignores")
    parser.add_argument("--fake-linger", dest="linger", type=float, default=0, help="seconds from a signal to its end")
    parser.add_argument("--model", required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    options = parser.parse_args()
    print("loading", options.model, flush=True)  # noqa: T201
    if options.only not in (None, options.port):
        return 1
    handle_signals(options)
    if options.memory:
        hold_memory(options.memory * 1_000_000)
    match options.act:
        case "until":
            while not options.until.exists():
                time.sleep(0.01)
        case "deaf":
            wait_for_ever()
        case "exit0":
            sys.stderr.write("Application startup failed. Exiting.\n")
            return 0
        case "exit1":
            sys.stderr.write("\x1b[31mValueError: Missing 1 parameters\x1b[0m\x07\n")
            return 1
        case "stranger":
            if os.fork():
                wait_for_ever()
            os.setsid()
        case "stubborn":
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
        case "leaves":
            if os.fork():
                return 0
        case "heavy":
            hold_memory()
        case "heavy-child":
            ready, announce = os.pipe()
            if not os.fork():
                hold_memory()
                os.write(announce, b"\n")
                wait_for_ever()
            os.read(ready, 1)
        case "family":
            if not os.fork():
                wait_for_ever()
    serve(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
