"""A real LiteLLM proxy: the gateway of the lab, on a port that the system chose.

It starts once, and its configuration never changes afterwards. The tests show that this is enough.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from tests.lab import cache
from tests.lab.ports import free_port
from tests.lab.service import Service
from tests.lab.world import end, processes_below, wait_until

START = 240.0
"""Seconds; on a quiet machine it takes 25."""
PAUSE = 0.1
"""Seconds between two requests of the traffic. Without a pause it takes the processor from what it watches."""
KEY = "sk-lab-5c1d3a"
_SETTINGS = f"""
general_settings:
  master_key: {KEY}
"""


class GatewayFailed(Exception):
    """The gateway did not start; the message has the end of its log."""


@dataclass(frozen=True)
class Reply:
    """What a client of the gateway got. `status` 0: no answer at all."""

    status: int
    body: Any

    @property
    def text(self) -> str:
        """What the model said; empty if none answered."""
        try:
            message = self.body["choices"][0]["message"]
            return str(message.get("content") or "") + str(message.get("reasoning_content") or "")
        except (LookupError, TypeError):
            return ""


@dataclass(frozen=True)
class Identity:
    """What must stay: the process, and its files to the byte and the nanosecond."""

    pid: int
    started: float
    files: tuple[tuple[str, int, str], ...]


class LiteLLM(Service):
    """A gateway whose files lie in `folder`; usable while it is entered.

    `entries` is the YAML that `inv gateway --print` gave; `env` the environment beyond the plain one, for the
    values of its `os.environ/` references.
    """

    def __init__(self, folder: Path, entries: str, env: dict[str, str] | None = None) -> None:
        self.folder = folder
        self.config = folder / "router.yaml"
        self.log = folder / "litellm.log"
        self.key = KEY
        self._env = dict(env or {})
        self._port = 0
        self._process: subprocess.Popen[bytes] | None = None
        (folder / "tmp").mkdir(parents=True)
        self.config.write_text(entries + _SETTINGS, encoding="utf-8")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def ask(self, alias: str, *, timeout: float = 60.0) -> Reply:
        """One chat completion by alias."""
        return ask(f"{self.url}/v1", alias, key=self.key, timeout=timeout)

    def identity(self) -> Identity:
        assert self._process is not None
        process = psutil.Process(self._process.pid)
        assert process.status() != psutil.STATUS_ZOMBIE, "the gateway has ended"
        files = [self.config, *self.folder.glob("*.env")]
        return Identity(process.pid, process.create_time(), tuple(_as_it_is(path) for path in files))

    def start(self) -> None:
        """Raises `GatewayFailed`, `cache.BuildFailed`."""
        program = cache.gateway_venv() / "bin" / "litellm"
        for _ in range(3):
            self._launch(program)
            try:
                wait_until(self._settled, START, "the gateway's first answer")
            except TimeoutError:
                break
            if self._alive():
                return
            if "address already in use" not in self._last_words():
                break
        words = self._last_words()
        self.stop()
        raise GatewayFailed(f"LiteLLM did not start:\n{words}")

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            end(processes_below(self.folder))

    def _launch(self, program: Path) -> None:
        self._port = free_port()
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [program, "--config", self.config, "--host", "127.0.0.1", "--port", str(self._port)],
                cwd=self.folder,
                env={
                    "HOME": str(self.folder),
                    "TMPDIR": str(self.folder / "tmp"),
                    "PATH": os.defpath,
                    "LC_ALL": "C.UTF-8",
                    "PYTHONUNBUFFERED": "1",
                    # Its list of prices comes with it; nothing is fetched.
                    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
                    **self._env,
                },
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _settled(self) -> bool:
        return not self._alive() or _request(f"{self.url}/health/liveliness", None, self.key, 2.0).status == 200

    def _alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def _last_words(self) -> str:
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:])


def _as_it_is(path: Path) -> tuple[str, int, str]:
    return path.name, path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest()


def ask(base: str, name: str, *, key: str = "none", timeout: float = 60.0) -> Reply:
    """One chat completion from any OpenAI-compatible server, greedy: equal models give equal answers."""
    body = {
        "model": name,
        "messages": [{"role": "user", "content": "say hello"}],
        "max_tokens": 8,
        "temperature": 0,
    }
    return _request(f"{base}/chat/completions", json.dumps(body).encode(), key, timeout)


def _request(url: str, data: bytes | None, key: str, timeout: float) -> Reply:
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=timeout) as answer:
            return Reply(answer.status, json.load(answer))
    except urllib.error.HTTPError as error:
        with error:
            return Reply(error.code, error.read().decode(errors="replace"))
    except (OSError, ValueError) as error:
        return Reply(0, str(error))


@dataclass(frozen=True)
class Sent:
    """One request of the traffic; times are monotonic."""

    began: float
    ended: float
    reply: Reply


class Traffic:
    """A client that asks for an alias again and again, one request after the other, while it is entered.

    Bounded in number and time, also if the test hangs.
    """

    MOST = 3000
    SECONDS = 500.0

    def __init__(self, gateway: LiteLLM, alias: str) -> None:
        self.sent: list[Sent] = []
        self._gateway = gateway
        self._alias = alias
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="traffic")

    def _run(self) -> None:
        first = time.monotonic()
        while not self._stop.is_set() and len(self.sent) < self.MOST and time.monotonic() - first < self.SECONDS:
            began = time.monotonic()
            reply = self._gateway.ask(self._alias)
            self.sent.append(Sent(began, time.monotonic(), reply))
            self._stop.wait(PAUSE)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
