"""Servers are asked only under names that they know, because mlx-lm drops its model for an unknown name.

To see whether the real engine still has its weights, a test moves the file away. The engine continues from memory until
it must load again.
"""

from __future__ import annotations

import urllib.error
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mlxops.agent.engines import ENGINES
from mlxops.agent.engines.base import ServedNames
from mlxops.agent.operations.server_names import names_of
from mlxops.core.ports import Owner, PortView, State
from mlxops.core.records import Run, Server
from tests.lab import models
from tests.lab.homelab import Homelab
from tests.lab.quick import MODELS, QuickHost
from tests.lab.world import wait_until

NAME = "tiny-org/tiny-qwen3"
LM, OPENAI = ENGINES["mlx-lm"], ENGINES["mlx-openai-server"]


def names(command: str, version: str | None) -> ServedNames:
    argv = command.split()
    return (LM if "mlx_lm" in command else OPENAI).accepted_names(argv, version)


@pytest.mark.parametrize(
    ("command", "version", "known"),
    [
        ("mlx_lm.server --model /models/qwen", "0.32.2", ("/models/qwen", "default_model")),
        ("mlx_lm.server --model=/models/qwen/", "0.32.2", ("/models/qwen/", "default_model")),
        ("python -m mlx_lm server --model ./qwen", "0.31.3", ("./qwen", "default_model")),
        ("mlx_lm.server --mode org/qwen --port 8100", "0.27.1", ("org/qwen", "default_model")),
        ("mlx_lm.server --model a --model b", "0.32.2", ("b", "default_model")),
        ("uv run mlx_lm.server --model qwen", None, ("qwen", "default_model")),
        # 0.32 keeps the adapter for default_model alone: by its path the model is loaded again without one.
        ("mlx_lm.server --model qwen --adapter-path tuned", "0.32.2", ("default_model",)),
        ("mlx_lm.server --model qwen --adapter=tuned", "0.32.2", ("default_model",)),
        ("mlx-openai-server launch --model-path /models/qwen", "1.8.1", ("/models/qwen",)),
        ("mlx-openai-server launch --model-path /m/q --served-model-name=jerry", "1.8.1", ("jerry",)),
        ("mlx-openai-server launch --model-path m --model-type multimodal", "1.8.1", ("m",)),
    ],
)
def test_names_of_a_server_follow_from_its_command(command: str, version: str | None, known: tuple[str, ...]) -> None:
    found = names(command, version)
    assert (found.known, found.not_asked) == (known, "")


@pytest.mark.parametrize(
    ("command", "version", "why"),
    [
        ("mlx_lm.server --port 8100", "0.32.2", "started without --model"),
        ("mlx_lm.server --model", "0.32.2", "started without --model"),
        # Before 0.27 its two names are two models: a request by one name drops the model of clients that use the other.
        ("mlx_lm.server --model /models/qwen", "0.26.4", "loads its model again"),
        ("mlx-openai-server launch --config models.yaml", "1.8.1", "--config file"),
        ("mlx-openai-server launch --port 8100", "1.8.1", "names no model"),
        ("mlx-openai-server launch --model-path bge --model-type embeddings", "1.8.1", "embeddings"),
        ("mlx-openai-server launch --model-path w --model-type=whisper", "1.8.1", "whisper"),
    ],
)
def test_server_without_a_known_name_is_not_asked(command: str, version: str | None, why: str) -> None:
    assert why in names(command, version).not_asked


@pytest.mark.parametrize(
    ("command", "version", "any_name", "sure"),
    [
        ("mlx-openai-server launch --model-path m", "1.6.3", True, True),
        ("mlx-openai-server launch --model-path m", "1.8.1", False, True),
        ("mlx-openai-server launch --model-path m", None, False, False),
        ("mlx-openai-server launch --model-path m --served-model-name n", None, False, True),
        ("mlx_lm.server --model m", None, False, True),
    ],
)
def test_old_versions_answer_to_any_name(command: str, version: str | None, any_name: bool, sure: bool) -> None:
    found = names(command, version)
    assert (found.any, found.sure) == (any_name, sure)


def view(owner: Owner, argv: str = "mlx_lm.server --model /models/qwen", *, engine: str | None = "mlx-lm") -> PortView:
    server = Server(7, 7, engine, "qwen", tuple(argv.split())) if engine else None
    return PortView(8100, "jerry-xl", State.READY, owner, server=server)


def test_unknown_program_of_a_boot_job_is_not_asked() -> None:
    """vllm-mlx, llama.cpp, Ollama or LM Studio: started by a boot job, it is ready without being recognised."""
    found = names_of(view(Owner.BOOT, engine=None))
    assert found.known == () and "not known" in found.not_asked


def test_own_server_is_asked_under_its_proven_alias() -> None:
    texts = dict.fromkeys(("repo_id", "revision", "run_id", "start", "boot_id", "operation", "log_path"), "")
    run = Run(
        **texts,  # type: ignore[arg-type]
        port=8100,
        model="qwen",
        alias="jerry-xl",
        engine="mlx-lm",
        argv=("mlx_lm.server", "--model", "jerry-xl"),
        pid=7,
        pgid=7,
        started_at="",
        engine_version="0.26.4",
    )
    ours = PortView(8100, "renamed", State.READY, Owner.MLXOPS, run=run)
    assert (names_of(ours).known[0], names_of(ours).not_asked) == ("jerry-xl", "")


# -- fakes: real processes that record the names in requests --------------------------------------------------------


@contextmanager
def served(host: QuickHost, port: int, *options: str) -> Iterator[Path]:
    """Start a fake mlx_lm.server by hand; return the file to which it writes the requested names."""
    asked = host.studio.folder / f"asked-{port}"
    argv = [str(host.program), *options, "--host", host.studio.address, "--port", str(port), "--fake-names", str(asked)]
    with host.running(*argv):
        wait_until(lambda: host.studio.listening(port), 30, "the server")
        yield asked


def row(document: Any, port: int) -> Any:
    return next(each for each in document["ports"] if each["port"] == port)


def test_probe_uses_a_known_name_or_says_why_not(host: QuickHost) -> None:
    own, nameless = host.ports[0], host.ports[1]
    snapshot = str(host.snapshots[MODELS[0]])
    with served(host, own, "--model", snapshot) as asked, served(host, nameless) as unasked:
        seen = host.status("--probe")
        shown = host.mlxctl("status", "--probe").ok().stdout
        assert asked.read_text().split() == [snapshot] * 2 and not unasked.exists()
    assert (row(seen, own)["probe"]["ok"], row(seen, own)["probe"]["name"]) == (True, snapshot)
    assert row(seen, nameless)["probe"]["ok"] is None
    assert "probe_failed" not in [each["code"] for each in seen["drift"]]
    assert "not asked: its name is not known" in shown and f"as {snapshot}" in shown


# -- the real engine ----------------------------------------------------------------------------------------------


def test_foreign_server_keeps_its_model_during_probe_and_load(homelab: Homelab, engine: Path) -> None:
    lab, studio, port = homelab, homelab.studio, homelab.studio.ports[0]
    snapshot = studio.install(NAME, models.QWEN)
    studio.mlxctl("init").ok()
    script = studio.folder / "start.sh"
    script.write_text(
        f"#!/bin/sh\ncd {snapshot.parent}\nHF_HUB_OFFLINE=1 {engine}/bin/mlx_lm.server --model {snapshot.name}/ "
        f"--host {studio.address} --port {port} &\nwait\n"
    )
    name = f"{snapshot.name}/"

    def words() -> Any:
        return studio.completion(port, name)["choices"][0]["message"]

    def comes() -> bool:
        try:
            return bool(words())
        except OSError:
            return False

    with QuickHost.running(_Of(studio), "sh", str(script)):  # type: ignore[arg-type]
        wait_until(comes, 120, "the server's first answer")
        (weights,) = snapshot.glob("*.safetensors")
        weights.rename(studio.folder / "weights")

        by_hand = row(studio.mlxctl("status", "--probe", "--json").ok().json["hosts"][0], port)
        assert (by_hand["owner"], by_hand["probe"]["ok"], by_hand["probe"]["name"]) == ("hand", True, name)
        lab.configure(boot={"port": port, "script": str(script), "label": "com.example.mlx"})
        of_boot = row(studio.mlxctl("status", "--probe", "--json").ok().json["hosts"][0], port)
        assert (of_boot["owner"], of_boot["probe"]["ok"]) == ("boot", True)
        refused = studio.mlxctl("load", NAME, str(port), "--json")
        assert refused.exit == 3, str(refused)
        error = refused.json["hosts"][0]["error"]
        assert f"answers to '{name}' and 'default_model', not to jerry-xl" in error["why"], error
        assert error["hint"].startswith("have the boot job start it under the name jerry-xl; or, as the operator")
        assert words(), "it still has its weights"

        # The control: by the slot's alias it drops them.
        with pytest.raises(urllib.error.HTTPError, match="404"):
            studio.completion(port, "jerry-xl")
        with pytest.raises(urllib.error.HTTPError):
            words()
        weights.symlink_to(studio.folder / "weights")


class _Of:
    """What `QuickHost.running` needs of a host."""

    def __init__(self, studio: Any) -> None:
        self.studio = studio
