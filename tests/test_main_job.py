"""The main job with a real hub, engine and sshd, over SSH and on the host itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from mlxops.core.text import amount
from tests.lab import cache, models
from tests.lab.homelab import Homelab, Studio
from tests.lab.hub import Hub
from tests.lab.world import can_bind, wait_until
from tests.steps import (
    BROKEN,
    ENDED_BY_SIGINT,
    OTHER,
    REPO,
    WAYS,
    Ask,
    argv_of,
    assigned,
    group_of,
    install,
    listener,
    models_listed,
    nothing_runs,
    port_of,
    tree,
    words_of,
)


@pytest.fixture(params=WAYS)
def ask(request: pytest.FixtureRequest, homelab: Homelab) -> Ask:
    """Ask a Studio with the real engine. Where servers start, one way is enough: TestWholeLife does it both ways, and
    tests/test_operations.py does it both ways with the fake engine."""
    return Ask(homelab, request.param)


@pytest.fixture(params=WAYS)
def online(request: pytest.FixtureRequest, online_homelab: Homelab) -> Ask:
    return Ask(online_homelab, request.param)


class TestInit:
    def test_missing_cache_is_reported(self, ask: Ask) -> None:
        ask.studio.hub.rmdir()
        assert f"there was no cache at {ask.studio.hub}" in ask("init").ok().stderr
        assert "there was no cache" not in ask("init").ok().stderr, "the registry exists"

    def test_init_registers_complete_models_and_explains_the_others(self, ask: Ask) -> None:
        studio = ask.studio
        tiny = models.tiny_models()
        paths = {
            "a/plain": studio.install("a/plain", models.QWEN),
            "b/listed": studio.install("b/listed", models.QWEN, trees=True),
            "c/xet": studio.install("c/xet", models.LLAMA, trees=True, xet=True),
            "d/beside": models.install_snapshot(studio.hub.parent, "d/beside", tiny / models.LLAMA),
        }
        cut = studio.install("e/cut", models.LLAMA)
        sorted(cut.glob("*.safetensors"))[0].unlink()
        other = models.repo_folder(studio.hub, "f/torch") / "snapshots" / ("0" * 40)
        other.mkdir(parents=True)
        (other / "config.json").write_text("{}")
        (other / "pytorch_model.bin").write_bytes(b"x")
        interrupted = models.repo_folder(studio.hub.parent, "g/begun") / "snapshots" / ("1" * 40)
        interrupted.mkdir(parents=True)
        (interrupted / "config.json").write_text("{}")

        result = ask.result("init")

        assert result["added"] == sorted(paths) and result["changed"] is True
        why = {row["repo_id"]: row["why"] for row in result["skipped"]}
        assert sorted(why) == ["e/cut", "f/torch", "g/begun"] and all(why.values())
        assert studio.registry() == {
            "version": 1,
            "models": {
                repo: {"repo_id": repo, "model_id": repo, "cache_path": str(path), "format": "mlx", "port": None}
                for repo, path in paths.items()
            },
        }

    def test_registered_entries_stay_unchanged(self, ask: Ask) -> None:
        install(ask.studio)
        ask("init").ok()
        document = ask.studio.registry()
        document["models"]["mine"] = document["models"].pop(REPO) | {"note": "my own"}
        document["by"] = "hand"
        ask.studio.registry_path.write_text(json.dumps(document))
        before = ask.studio.registry_path.read_bytes()
        result = ask.result("init")
        assert (result["added"], result["existing"], result["changed"]) == ([], [REPO], False)
        assert ask.studio.registry_path.read_bytes() == before

    def test_list_shows_the_models_that_init_found(self, ask: Ask) -> None:
        path = ask.studio.install(REPO, models.QWEN)
        ask("init").ok()
        (row,) = ask.document("list")["models"]
        size = sum(file.stat().st_size for file in path.iterdir())
        assert (row["name"], row["repo_id"], row["model_id"]) == (REPO, REPO, REPO)
        assert (row["revision"], row["cache_path"]) == (path.name, str(path))
        assert (row["format"], row["port"], row["problems"], row["size_bytes"]) == ("mlx", None, [], size)
        assert REPO in ask("list").ok().stdout


class TestWholeLife:
    def test_models_are_downloaded_served_swapped_and_unloaded(self, online: Ask, hub: Hub) -> None:
        """Two models behind one port. Each step is checked from outside."""
        ask, studio, port = online, online.studio, online.port

        # Download and serve a model.
        loaded = ask("load", "--model", REPO, "--port", port, "--json").ok()
        (host,) = loaded.json["hosts"]
        first = host["result"]
        assert (first["model"], first["port"], first["alias"]) == (REPO, port, "jerry-xl")
        assert (first["state"], first["changed"], first["downtime_seconds"]) == ("ready", True, None)
        assert first["url"] == f"http://{studio.address}:{port}/v1"
        snapshot = models.repo_folder(studio.hub, REPO) / "snapshots" / hub.sha(REPO)
        size = sum(file.stat().st_size for file in snapshot.iterdir())
        assert amount(size) in loaded.stderr
        assert "100%" in loaded.stderr
        assert {file.name for file in snapshot.iterdir()} == {
            file.name for file in models.files_of(models.tiny_models() / models.QWEN)
        }
        entry = studio.registry()["models"][REPO]
        assert (entry["cache_path"], entry["format"], entry["port"]) == (str(snapshot), "mlx", port)
        said = words_of(studio, port, "jerry-xl")
        pid = listener(studio, port)
        assert pid is not None
        row = ask.row()
        assert (row["state"], row["owner"], row["model"], row["alias"]) == ("ready", "mlxops", REPO, "jerry-xl")
        assert row["pgid"] == os.getpgid(pid) and row["revision"] == hub.sha(REPO)
        assert row["memory_bytes"] > 10_000_000 and row["proven_at"]

        # The same load again changes nothing. Without a port it means the current one.
        for again in (ask.result("load", "--model", REPO, "--port", port), ask.result("load", "--model", REPO)):
            assert (again["changed"], again["port"], again["state"]) == (False, port, "ready")
            assert listener(studio, port) == pid

        # Another model needs --force.
        install(studio, OTHER)
        assert ask.error(3, "load", "--model", OTHER, "--port", port)["code"] == "port_in_use"
        assert (listener(studio, port), assigned(studio)) == (pid, {REPO: port})
        swap = ask.result("load", "--model", OTHER, "--port", port, "--force")
        assert swap["changed"] is True and 0 < swap["downtime_seconds"] < swap["seconds"] + 1
        assert not group_of(row["pgid"])
        assert listener(studio, port) not in (None, pid)
        assert words_of(studio, port, "jerry-xl") != said
        assert assigned(studio) == {OTHER: port}
        assert port_of(studio, REPO) is None

        # An unload stops the whole group. A second one changes nothing.
        pgid = ask.row()["pgid"]
        gone = ask.result("unload", "--port", port)
        assert (gone["changed"], gone["state"], gone["model"]) == (True, "idle", OTHER)
        assert not group_of(pgid) and can_bind(studio.address, port)
        assert assigned(studio) == {}
        assert ask.result("unload", "--port", port)["changed"] is False
        nothing_runs(studio)

    @pytest.mark.usefixtures("quick_engine")
    def test_unload_all_leaves_no_server_and_no_assignment(self, ask: Ask) -> None:
        install(ask.studio, REPO, OTHER)
        first, second = ask.studio.ports[:2]
        ask("load", "--model", REPO, "--port", first).ok()
        ask("load", "--model", OTHER, "--port", second).ok()

        before = (listener(ask.studio, first), listener(ask.studio, second))
        assert ask.error(2, "unload-all")["code"] == "confirmation_needed"
        assert (listener(ask.studio, first), listener(ask.studio, second)) == before != (None, None)

        result = ask.result("unload-all", "--yes")
        assert sorted((row["port"], row["model"], row["changed"]) for row in result["ports"]) == [
            (first, REPO, True),
            (second, OTHER, True),
        ]
        assert assigned(ask.studio) == {}
        nothing_runs(ask.studio)
        assert ask.result("unload-all", "--yes")["changed"] is False


@pytest.mark.parametrize("ask", ["ssh"], indirect=True)
class TestFailure:
    def test_model_that_cannot_be_loaded_is_reported_and_leaves_nothing(self, ask: Ask) -> None:
        install(ask.studio, BROKEN)
        ask("init").ok()
        registry = ask.studio.registry_path.read_bytes()
        error = ask.error(4, "load", "--model", BROKEN, "--port", ask.port)
        assert "Missing 1 parameters" in error["why"]
        nothing_runs(ask.studio)
        assert ask.studio.registry_path.read_bytes() == registry
        row = ask.row()
        assert (row["state"], row["owner"], row["pid"]) == ("idle", None, None)

    def test_failed_swap_restarts_the_old_model(self, ask: Ask) -> None:
        install(ask.studio, REPO, BROKEN)
        ask("load", "--model", REPO, "--port", ask.port).ok()
        said = words_of(ask.studio, ask.port, "jerry-xl")
        old = listener(ask.studio, ask.port)
        error = ask.error(4, "load", "--model", BROKEN, "--port", ask.port, "--force")
        assert "Missing 1 parameters" in error["why"]
        assert f"{REPO} serves port {ask.port} again" in error["why"]
        assert words_of(ask.studio, ask.port, "jerry-xl") == said
        assert assigned(ask.studio) == {REPO: ask.port}
        row = ask.row()
        assert (row["state"], row["owner"], row["model"]) == ("ready", "mlxops", REPO)
        assert row["pid"] == listener(ask.studio, ask.port) != old


@contextmanager
def started_by_hand(
    studio: Studio, model: str, port: int, *more: str, folder: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a server as a user does in a shell."""
    program = str(cache.engine_venv("mlx-lm") / "bin" / "mlx_lm.server")
    log = (folder / "by-hand.log").open("wb")
    with (
        log,
        subprocess.Popen(
            [program, "--model", model, "--host", studio.address, "--port", str(port), *more],
            cwd=folder,
            env={"HOME": str(studio.home), "PATH": os.defpath, "HF_HUB_OFFLINE": "1"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        ) as process,
    ):
        try:
            wait_until(lambda: studio.listening(port), 60, "the engine's port")
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("ask", ["ssh"], indirect=True)
class TestHandStartedServer:
    def test_server_with_the_planned_command_is_adopted(self, ask: Ask) -> None:
        studio, port = ask.studio, ask.port
        path = studio.install(REPO, models.QWEN)
        folder = studio.folder / "by-hand"
        folder.mkdir()
        (folder / "jerry-xl").symlink_to(path)
        with started_by_hand(studio, "jerry-xl", port, folder=folder) as process:
            row = ask.row()
            assert (row["owner"], row["pid"]) == ("hand", process.pid)
            result = ask.result("load", "--model", REPO, "--port", port)
            assert (result["changed"], result["state"], result["pid"]) == (False, "ready", process.pid)
            assert process.poll() is None and listener(studio, port) == process.pid
            row = ask.row()
            assert (row["state"], row["owner"], row["model"]) == ("ready", "mlxops", REPO)
            assert assigned(studio) == {REPO: port}
            assert ask.result("unload", "--port", port)["changed"] is True
            assert process.wait(30) is not None
        assert can_bind(studio.address, port)

    def test_other_server_is_replaced_only_with_force(self, ask: Ask) -> None:
        studio, port = ask.studio, ask.port
        path = studio.install(REPO, models.QWEN)
        with started_by_hand(studio, str(path), port, "--temp", "0.5", folder=studio.home) as process:
            assert ask.error(3, "load", "--model", REPO, "--port", port)["code"] == "port_in_use"
            assert ask.error(3, "unload", "--port", port)["code"] == "hand_started"
            assert process.poll() is None
            assert ask.result("load", "--model", REPO, "--port", port, "--force")["changed"] is True
            assert process.wait(30) in ENDED_BY_SIGINT
            assert listener(studio, port) is not None
        assert words_of(studio, port, "jerry-xl")
        ask("unload", "--port", port).ok()
        nothing_runs(studio)

    def test_hand_started_server_is_unloaded_only_with_force(self, ask: Ask) -> None:
        studio, port = ask.studio, ask.port
        path = studio.install(REPO, models.QWEN)
        with started_by_hand(studio, str(path), port, folder=studio.home) as process:
            assert ask.error(3, "unload", "--port", port)["code"] == "hand_started"
            assert process.poll() is None
            assert ask.result("unload", "--port", port, "--force")["changed"] is True
            assert process.wait(30) in ENDED_BY_SIGINT
        assert can_bind(studio.address, port)


class TestServer:
    @pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
    def test_server_has_its_own_session_and_no_secret(self, make_homelab: Callable[..., Homelab], hub: Hub) -> None:
        """A token in the agent's environment is for downloads. The server does not get it, nor open files."""
        canary = "hf_canaryCANARYcanary"
        lab = make_homelab(hub_url=hub.url)
        studio = lab.studio
        studio.env["HF_TOKEN"] = studio.sshd.env["HF_TOKEN"] = canary
        studio.sshd.stop()
        studio.sshd.start()
        outputs = []
        for ask, port in zip((Ask(lab, way) for way in WAYS), studio.ports, strict=False):
            model = {"ssh": REPO, "local": OTHER}[ask.way]
            outputs.append(ask("load", "--model", model, "--port", port).ok())
            outputs.append(ask("status", "--json").ok())
            pid = listener(studio, port)
            assert pid is not None
            assert os.getpgid(pid) == os.getsid(pid) == pid
            _holds_only_its_own(studio, pid)
        wait_until(lambda: not [p for p in studio.processes() if "mlxops.agent" in p.command], 30, "the agents' end")
        for process in studio.processes():
            for part in ("environ", "cmdline"):
                assert canary.encode() not in Path(f"/proc/{process.pid}/{part}").read_bytes(), str(process)
        for output in outputs:
            assert canary not in output.stdout + output.stderr
        for path in studio.folder.rglob("*"):
            if path.is_file() and not path.is_symlink():
                assert canary.encode() not in path.read_bytes(), str(path)

    @pytest.mark.parametrize("ask", ["ssh"], indirect=True)
    def test_command_and_environment_are_those_of_the_plan(self, ask: Ask) -> None:
        install(ask.studio)
        plan = ask.result("load", "--model", REPO, "--port", ask.port, "--dry-run")["plan"]
        ask("load", "--model", REPO, "--port", ask.port).ok()
        pid = listener(ask.studio, ask.port)
        assert pid is not None
        running = argv_of(pid)
        # The shebang line of the console script puts the interpreter in front.
        assert list(running[len(running) - len(plan["argv"]) :]) == plan["argv"]
        assert psutil.Process(pid).environ()["HF_HUB_OFFLINE"] == "1"
        # The server lists only its own model. A request for another one would make it load that.
        path = ask.studio.registry()["models"][REPO]["cache_path"]
        assert [each["id"] for each in models_listed(ask.studio, ask.port)["data"]] == [os.path.realpath(path)]

    @pytest.mark.parametrize("ask", ["ssh"], indirect=True)
    def test_completion_changes_no_file(self, ask: Ask) -> None:
        install(ask.studio)
        ask("load", "--model", REPO, "--port", ask.port).ok()
        before = tree(ask.studio.folder)
        words_of(ask.studio, ask.port, "jerry-xl")
        assert tree(ask.studio.folder) == before


def _holds_only_its_own(studio: Studio, pid: int) -> None:
    """Check that the server has no pipe, terminal or state file open: only its log, /dev/null, sockets, models."""
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        target = os.readlink(descriptor)
        log = str(studio.state / "logs")
        assert target.startswith((log, "/dev/null", "socket:", "anon_inode:", str(studio.hub))), target
