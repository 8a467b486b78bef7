"""Cut the connection many times during a long download of many files."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from subprocess import Popen

import pytest

from mlxops.agent.hub.download import download
from tests.agent.test_hub import CONFIG, made, safetensors
from tests.control.test_attach import operations
from tests.lab.faultyhub import FaultyHub, Slow
from tests.lab.homelab import Homelab
from tests.lab.hub import Hub
from tests.lab.models import repo_folder
from tests.lab.wire import Wire
from tests.lab.wired import client, wired
from tests.lab.world import wait_until

BIG = "tiny-org/many-files"
SHARDS = 6
SIZE = 500_000
"""Bytes of a shard."""
RATE = 50_000
"""Bytes a second of each connection to the hub; huggingface_hub has several at once."""
WAIT = 60.0


@pytest.fixture
def big(hub: Hub, tmp_path: Path) -> str:
    """A repository of shards that differ; returns its commit."""
    files = {f"model-{n:05}-of-{SHARDS:05}__safetensors": safetensors(SIZE + n) for n in range(1, SHARDS + 1)}
    weights = {f"w{n}": name.replace("__", ".") for n, name in enumerate(files)}
    index = repr({"metadata": {}, "weight_map": weights}).replace("'", '"').encode()
    tokenizer = {"tokenizer__json": b"{}", "model.safetensors.index__json": index, "config__json": CONFIG}
    return hub.add(BIG, made(tmp_path / "big", **tokenizer, **files))


@pytest.fixture
def slow(hub: Hub) -> Iterator[FaultyHub]:
    with FaultyHub(hub.url) as running:
        running.fail(Slow(RATE), method="GET", part="safetensors")
        yield running


def content(folder: Path) -> dict[str, str]:
    """Return the hash of each file, and the target of each link, by relative path."""
    return {
        str(path.relative_to(folder)): str(path.readlink())
        if path.is_symlink()
        else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() or path.is_symlink()
    }


def stall_and_cut(wire: Wire) -> None:
    wire.stalled = True
    time.sleep(0.3)  # the duration of the stall
    wire.stalled = False
    wire.cut()


def follower(clients: ExitStack, lab: Homelab) -> tuple[Popen[str], str]:
    """Start a `pull`. Return its process and its first line."""
    process = clients.enter_context(client(lab, "pull", "--repo", BIG, both=True))
    assert process.stdout is not None
    return process, process.stdout.readline()


def ended(process: Popen[str]) -> str:
    """Wait for the end of the process. Return the rest of its output."""
    assert process.stdout is not None
    output = process.stdout.read()
    process.wait(WAIT)
    return output


def test_download_cut_at_many_points_ends_like_an_undisturbed_one(
    make_homelab: Callable[..., Homelab],
    hub: Hub,
    slow: FaultyHub,
    big: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lab = make_homelab(hub_url=slow.url)
    points = range(0, SHARDS * SIZE * 9 // 10, SHARDS * SIZE // 12)
    with wired(lab) as wire, ExitStack() as clients:
        cuts: list[Callable[[], None]] = [wire.cut, lab.studio.sshd.kill_connections, lambda: stall_and_cut(wire)]
        process, begun = follower(clients, lab)
        killed = []
        for number, point in enumerate(points):
            wait_until(lambda point=point: slow.sent > point, WAIT, f"{point} bytes")  # type: ignore[misc]
            if number % 4 == 3:
                process.kill()
                killed.append(begun + ended(process))
                process, begun = follower(clients, lab)
            else:
                cuts[number % 4]()
        output = begun + ended(process)
        # The operations of killed clients check the files again when the first has finished.
        wait_until(lambda: not any(row["state"] == "running" for row in operations(lab)), WAIT, "the others")
        states = [row["state"] for row in operations(lab)]
    assert process.returncode == 0, output
    assert "".join([*killed, output]).count("reconnecting") >= 3 and len(killed) == 2
    for text in (*killed, output):
        percentages = [int(percent) for percent in re.findall(r"download: .* (\d+)%", text)]
        assert percentages == sorted(percentages)
        lines = [line for line in text.splitlines() if not line.startswith("warning: the connection was lost")]
        assert len(lines) == len(set(lines)), f"a line is repeated\n{text}"
    assert states == ["done"] * 3
    for shard in range(1, SHARDS + 1):
        assert slow.asked("GET", f"model-{shard:05}-of") == 1, "a shard was downloaded twice"
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    download(BIG, None, tmp_path / "undisturbed", lambda _: None)
    assert content(repo_folder(lab.studio.hub, BIG)) == content(repo_folder(tmp_path / "undisturbed", BIG))
