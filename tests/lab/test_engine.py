"""The fake engine ends as its options say: with its memory, later, or not on this signal."""

from __future__ import annotations

import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.lab.ports import free_port, listening
from tests.lab.quick import install_engine
from tests.lab.run import running
from tests.lab.world import wait_until


@contextmanager
def engine(folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run the fake engine; yield it and its URL."""
    port = free_port()
    argv = [str(install_engine(folder)), "--model", "m", "--host", "127.0.0.1", "--port", str(port), *options]
    with running(argv, folder, {"PATH": os.defpath}) as process:
        wait_until(lambda: listening("127.0.0.1", port), 30, "the engine's port")
        yield process, f"http://127.0.0.1:{port}/health"


def answers(url: str) -> bool:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return bool(answer.status == 200)


def test_lingering_engine_answers_and_keeps_its_memory_until_it_ends(tmp_path: Path) -> None:
    with engine(tmp_path, "--fake-memory", "100", "--fake-linger", "1") as (process, url):
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert answers(url)
        assert psutil.Process(process.pid).memory_info().rss > 100_000_000
        assert process.wait(30) == 0 and time.monotonic() - began > 0.9


def test_ignored_signal_does_not_end_the_engine(tmp_path: Path) -> None:
    with engine(tmp_path, "--fake-ignore", "int") as (process, url):
        process.send_signal(signal.SIGINT)
        assert answers(url)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == -signal.SIGTERM
