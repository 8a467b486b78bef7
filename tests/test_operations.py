"""The commands in many situations, over SSH and locally, with an engine that misbehaves on request."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest

from tests.lab import models
from tests.lab.homelab import Homelab, Studio
from tests.lab.quick import ENGINE
from tests.lab.world import Process, can_bind, wait_until
from tests.steps import (
    BROKEN,
    OTHER,
    REPO,
    Ask,
    argv_of,
    assigned,
    error_of,
    finish,
    group_of,
    install,
    listener,
    models_listed,
    nothing_runs,
    quiet,
    register,
    tree,
    with_fake,
    words_of,
)


def engines(studio: Studio) -> set[Process]:
    """Return the engine's processes on this host, without those that still wait at the gate."""
    return {process for process in studio.processes() if ENGINE in process.command and "gate.py" not in process.command}


def started(studio: Studio) -> Process:
    """Wait for the one engine process, and return it."""
    (process,) = wait_until(lambda: engines(studio), 30, "the engine's start")
    return process


class TestPortChoice:
    def test_alias_is_loaded_only_into_its_slot(self, ask: Ask) -> None:
        register(ask.studio, "jerry-l")
        assert ask.error(3, "load", "--model", "jerry-l", "--port", ask.port, "--force")["code"] == "alias_elsewhere"
        assert ask.error(3, "load", "--model", "jerry-m", "--port", ask.port)["code"] == "alias_elsewhere", (
            "unknown too"
        )
        assert ask.result("load", "--model", "jerry-l")["port"] == ask.studio.ports[1]
        assert assigned(ask.studio) == {"jerry-l": ask.studio.ports[1]}
        assert words_of(ask.studio, ask.studio.ports[1], "jerry-l")

    def test_model_without_an_assigned_port_needs_one(self, ask: Ask) -> None:
        register(ask.studio, "mine")
        assert ask.error(2, "load", "--model", "mine")["code"] == "port_needed"
        assert not engines(ask.studio)

    def test_model_may_be_named_like_its_predecessors_organisation(self, ask: Ask) -> None:
        """mlx-lm gets the name as a link in its working directory. The other model's link was in `tiny-org` there."""
        port, organisation = ask.studio.ports[3], REPO.partition("/")[0]
        register(ask.studio, REPO)
        register(ask.studio, organisation)
        ask.result("load", "--model", REPO, "--port", port)
        assert ask.result("load", "--model", organisation, "--port", port, "--force")["changed"]
        assert words_of(ask.studio, port, organisation)

    def test_auto_takes_an_idle_port_that_is_not_a_slot(self, ask: Ask) -> None:
        register(ask.studio, "mine")
        register(ask.studio, "more")
        free = ask.studio.ports[3]
        mine = ask.result("load", "--model", "mine", "--port", "auto")
        assert (mine["port"], mine["alias"]) == (free, "mine")
        assert words_of(ask.studio, free, "mine")
        again = ask.result("load", "--model", "mine", "--port", "auto")
        assert (again["port"], again["changed"]) == (free, False)
        error = ask.error(3, "load", "--model", "more", "--port", "auto")
        assert error["code"] == "no_idle_port"
        assert all(f"{port} ({alias})" in error["why"] for port, alias in ask.studio.slots.items())
        assert assigned(ask.studio) == {"mine": free}

    def test_model_moves_only_with_force(self, ask: Ask) -> None:
        register(ask.studio, "mine")
        old, new = ask.studio.ports[:2]
        ask("load", "--model", "mine", "--port", old).ok()
        first = started(ask.studio)
        assert ask.error(3, "load", "--model", "mine", "--port", new)["code"] == "model_elsewhere"
        assert engines(ask.studio) == {first} and assigned(ask.studio) == {"mine": old}
        assert ask.result("load", "--model", "mine", "--port", new, "--force")["port"] == new
        assert engines(ask.studio) != {first} and len(engines(ask.studio)) == 1
        assert assigned(ask.studio) == {"mine": new} and can_bind(ask.studio.address, old)
        assert words_of(ask.studio, new, "jerry-l")
        states = [row["state"] for row in ask.document("status")["ports"]]
        assert states == ["idle", "ready", "idle", "idle"]

    def test_unload_finds_a_model_by_its_name(self, ask: Ask) -> None:
        register(ask.studio, "mine")
        assert ask.result("unload", "--model", "mine")["changed"] is False
        ask("load", "--model", "mine", "--port", ask.port).ok()
        result = ask.result("unload", "--model", "mine")
        assert (result["port"], result["changed"]) == (ask.port, True)
        assert ask.error(3, "unload", "--model", "yours")["code"] == "unknown_model"
        nothing_runs(ask.studio)

    def test_repo_id_selects_the_entry_with_that_repository(self, ask: Ask) -> None:
        register(ask.studio, "mine")
        assert ask.result("load", "--model", REPO, "--port", ask.port)["model"] == "mine"
        assert assigned(ask.studio) == {"mine": ask.port} and len(ask.studio.registry()["models"]) == 1
        register(ask.studio, "yours")
        error = ask.error(3, "load", "--model", REPO, "--port", ask.port)
        assert error["code"] == "ambiguous_model" and "mine" in error["message"] and "yours" in error["message"]

    def test_repo_option_changes_an_entry_only_after_the_proof(self, ask: Ask) -> None:
        studio, port = ask.studio, ask.port
        install(studio, REPO, OTHER)
        sha = models.commit_name(models.tiny_models() / models.QWEN)
        assert ask.error(3, "load", "--model", "mine", "--port", port)["code"] == "unknown_model"
        ask("load", "--model", "mine", "--port", port, "--repo", f"{REPO}@{sha}").ok()
        first = studio.registry()["models"]["mine"]
        assert (first["repo_id"], first["revision"]) == (REPO, sha)
        pid = listener(studio, port)
        error = ask.error(3, "load", "--model", "mine", "--port", port, "--repo", OTHER)
        assert error["code"] == "port_in_use"
        assert studio.registry()["models"]["mine"] == first and listener(studio, port) == pid
        ask("load", "--model", "mine", "--port", port, "--repo", OTHER, "--force").ok()
        second = studio.registry()["models"]["mine"]
        assert (second["repo_id"], second["model_id"], second["port"]) == (OTHER, OTHER, port)
        assert models.repo_folder(studio.hub, OTHER) in Path(second["cache_path"]).parents
        assert second.get("revision") != sha, "the revision is of the other repository"
        assert listener(studio, port) != pid

    def test_changed_settings_are_reported_and_applied_with_force(self, ask: Ask) -> None:
        register(ask.studio, "mine")
        ask("load", "--model", "mine", "--port", ask.port).ok()
        pid = listener(ask.studio, ask.port)
        document = ask.studio.registry()
        document["models"]["mine"]["args"] = ["--fake-act", "family"]
        ask.studio.registry_path.write_text(json.dumps(document))
        result = ask.result("load", "--model", "mine", "--port", ask.port)
        assert result["changed"] is False and "differ" in " ".join(result["notes"])
        assert listener(ask.studio, ask.port) == pid
        assert [drift["port"] for drift in ask.document("status")["drift"]] == [ask.port]
        assert ask.result("load", "--model", "mine", "--port", ask.port, "--force")["changed"] is True
        now = listener(ask.studio, ask.port)
        assert now != pid and now is not None and "family" in argv_of(now)
        assert ask.document("status")["drift"] == []


FAILURES = {
    "deaf": ("did not answer within 1 s", "loading jerry-xl"),
    "mute": ("did not answer within 1 s", "loading jerry-xl"),
    "exit0": ("ended with status 0", "Application startup failed"),
    "exit1": ("ended with status 1", "ValueError: Missing 1 parameters"),
    "broken": ("it answered 500", "loading jerry-xl"),
    "leaves": ("ended with status 0", "loading jerry-xl"),
}
"""Behaviour -> part of the message, and the engine's last words."""


def patience(behaviour: str) -> str:
    """Return the seconds that a load waits: few only if the server never answers, for a slow machine."""
    return "1" if behaviour in {"deaf", "mute"} else "30"


class TestServerThatDoesNotStart:
    @pytest.mark.parametrize("mode", FAILURES)
    def test_failed_start_shows_the_logs_end_and_leaves_nothing(self, ask: Ask, mode: str) -> None:
        register(ask.studio, "mine", mode)
        before = ask.studio.registry_path.read_bytes()
        answer = ask("load", "--model", "mine", "--port", ask.port, "--timeout", patience(mode), "--json")
        assert answer.exit == 4, str(answer)
        error = error_of(answer)
        what, words = FAILURES[mode]
        assert error["code"] == "server_did_not_start" and what in error["message"], str(answer)
        assert words in error["why"] and str(ask.studio.state / "logs") in error["hint"]
        assert "\x1b" not in answer.stderr and "\x07" not in answer.stderr
        nothing_runs(ask.studio)
        assert ask.studio.registry_path.read_bytes() == before
        assert not list((ask.studio.state / "run").glob("*.json"))
        assert [row["state"] for row in ask.document("status")["ports"]] == ["idle"] * 4

    def test_answer_of_another_process_is_no_proof(self, ask: Ask) -> None:
        register(ask.studio, "mine", "stranger")
        error = ask.error(4, "load", "--model", "mine", "--port", ask.port, "--timeout", "5")
        assert "did not start" in error["message"] and assigned(ask.studio) == {}
        nothing_runs(ask.studio)

    def test_failed_load_can_be_repeated(self, ask: Ask) -> None:
        register(ask.studio, "mine", "exit1")
        ask.error(4, "load", "--model", "mine", "--port", ask.port)
        register(ask.studio, "mine")
        assert ask.result("load", "--model", "mine", "--port", ask.port)["state"] == "ready"

    @pytest.mark.parametrize("mode", ["exit0", "deaf"])
    def test_failed_swap_restarts_the_old_server(self, ask: Ask, mode: str) -> None:
        register(ask.studio, "old")
        register(ask.studio, "new", mode, repo=OTHER)
        ask("load", "--model", "old", "--port", ask.port).ok()
        first = started(ask.studio)
        error = ask.error(4, "load", "--model", "new", "--port", ask.port, "--force", "--timeout", patience(mode))
        assert "new did not start" in error["message"] and f"old serves port {ask.port} again" in error["why"]
        assert len(engines(ask.studio)) == 1 and first not in engines(ask.studio)
        assert assigned(ask.studio) == {"old": ask.port}
        row = ask.row()
        assert (row["state"], row["model"], row["pid"]) == ("ready", "old", listener(ask.studio, ask.port))
        assert words_of(ask.studio, ask.port, "jerry-xl") == f"from {row['pid']}"

    def test_failed_move_restarts_the_old_server(self, ask: Ask) -> None:
        old, new = ask.studio.ports[:2]
        register(ask.studio, "mine", only=old)
        ask("load", "--model", "mine", "--port", old).ok()
        error = ask.error(4, "load", "--model", "mine", "--port", new, "--force")
        assert "did not start" in error["message"]
        assert (listener(ask.studio, new), len(engines(ask.studio))) == (None, 1)
        assert assigned(ask.studio) == {"mine": old}
        assert words_of(ask.studio, old, "jerry-xl")
        assert ask.row(old)["state"] == "ready"

    def test_invalid_model_is_refused_before_the_old_server_stops(self, ask: Ask) -> None:
        register(ask.studio, "old")
        ask("load", "--model", "old", "--port", ask.port).ok()
        first = started(ask.studio)
        register(ask.studio, "flags", repo=OTHER, args=["--port", "1"])
        register(ask.studio, "engine", repo=OTHER, engine="vllm")
        install(ask.studio, BROKEN)
        path = models.repo_folder(ask.studio.hub, BROKEN)
        config = next(path.glob("snapshots/*/config.json")).resolve()
        config.write_text(json.dumps(json.loads(config.read_text()) | {"model_file": "model.py"}))
        register(ask.studio, "branch", repo=OTHER, trust_remote_code=True, revision="main")
        register(ask.studio, "unpinned", repo=OTHER, trust_remote_code=True)
        codes = {"flags": "reserved_argument", "engine": "unknown_engine"}
        codes |= dict.fromkeys([BROKEN, "branch", "unpinned"], "code_would_run")
        for model, code in codes.items():
            assert ask.error(3, "load", "--model", model, "--port", ask.port, "--force")["code"] == code
            assert engines(ask.studio) == {first}
        assert assigned(ask.studio) == {"old": ask.port}


class TestStopping:
    def test_unload_stops_the_whole_process_group(self, ask: Ask) -> None:
        register(ask.studio, "mine", "family")
        ask("load", "--model", "mine", "--port", ask.port).ok()
        assert len(engines(ask.studio)) == 2
        ask("unload", "--port", ask.port).ok()
        nothing_runs(ask.studio)

    @pytest.mark.parametrize("mode", ["heavy", "heavy-child"])
    def test_unload_waits_for_a_server_that_ends_slowly(self, ask: Ask, mode: str) -> None:
        """An ending process releases its memory before its sockets. Until then it has no argv and no environment,
        and still holds the port. With hundreds of gigabytes that takes seconds."""
        register(ask.studio, "mine", mode)
        ask("load", "--model", "mine", "--port", ask.port).ok()
        pid = listener(ask.studio, ask.port) or 0
        assert ask.result("unload", "--port", ask.port)["changed"] is True
        assert not group_of(pid) and can_bind(ask.studio.address, ask.port)
        assert assigned(ask.studio) == {}

    def test_dead_server_is_only_cleared(self, ask: Ask) -> None:
        register(ask.studio, "mine")
        ask("load", "--model", "mine", "--port", ask.port).ok()
        os.kill(started(ask.studio).pid, signal.SIGKILL)
        wait_until(lambda: can_bind(ask.studio.address, ask.port), 30, "its end")
        assert ask.row()["state"] == "failed"
        assert ask.result("unload", "--port", ask.port)["changed"] is True
        assert assigned(ask.studio) == {} and ask.row()["state"] == "idle"


class TestDryRun:
    def test_dry_run_shows_the_plan_and_changes_nothing(self, ask: Ask) -> None:
        studio = ask.studio
        first, second, third, _ = studio.ports
        for name in ("one", "two", "dead"):
            register(studio, name)
        ask("load", "--model", "one", "--port", first).ok()
        ask("load", "--model", "dead", "--port", second).ok()
        os.kill(listener(studio, second) or 0, signal.SIGKILL)
        install(studio, OTHER)
        wait_until(lambda: len(studio.processes()) == 1, 30, "quiet")
        (serving,) = before = studio.processes()
        files = tree(studio.folder)

        def plan(*arguments: object) -> dict[str, object]:
            result = ask.result(*arguments, "--dry-run")
            assert result["dry_run"] is True and result["changed"] is False
            found: dict[str, object] = result.get("plan", result)
            return found

        start = plan("load", "--model", "two", "--port", third)
        assert (start["outcome"], start["stops"]) == ("start", [])
        swap = plan("load", "--model", "two", "--port", first, "--force")
        assert (swap["outcome"], swap["stops"]) == ("start", [f"one on {first}, pid {serving.pid}"])
        already = plan("load", "--model", "one", "--port", first)
        assert already["outcome"] == "already"
        missing = plan("load", "--model", "far/away", "--port", third)
        assert missing["download"] == "far/away"
        assert plan("init")["added"] == [OTHER]
        assert plan("reconcile")["cleared"] == [{"port": second, "model": "dead"}]
        assert str(serving.pid) in str(plan("unload", "--port", first)["stops"])
        assert ask.result("unload", "--port", first, "--dry-run")["state"] == "ready", (
            "what is there, not what is meant"
        )
        everything = ask("unload-all", "--dry-run").ok().stdout
        assert str(first) in everything and str(second) in everything
        wait_until(lambda: len(studio.processes()) == 1, 30, "quiet")
        assert studio.processes() == before
        assert tree(studio.folder) == files

        ask("load", "--model", "two", "--port", third).ok()
        pid = listener(studio, third)
        words = start["argv"]
        assert pid is not None and isinstance(words, list)
        assert list(argv_of(pid))[-len(words) :] == words, "its interpreter comes before"

    def test_dry_run_on_a_fresh_host_creates_no_state(self, ask: Ask) -> None:
        install(ask.studio)
        files = tree(ask.studio.folder)
        for command in (["init"], ["load", "--model", REPO, "--port", ask.port], ["unload-all"], ["reconcile"]):
            ask(*command, "--dry-run").ok()
        for command in (["status"], ["list"]):
            ask(*command).ok()
        assert tree(ask.studio.folder) == files


class TestHandWrittenRegistry:
    def test_hand_written_registry_is_served_and_keeps_unknown_keys(self, ask: Ask) -> None:
        studio = ask.studio
        path = studio.install(REPO, models.QWEN)
        other = {"repo_id": OTHER, "model_id": OTHER, "cache_path": None, "format": "mlx", "port": None, "x": [1]}
        entry = {
            "repo_id": REPO,
            "model_id": REPO,
            "cache_path": f"{studio.hub}/models--.../snapshots/<sha>",
            "format": "mlx",
            "port": ask.port,
            "note": "largest",
        }
        document = {"version": 1, "models": {"jerry-xl": entry, "other": other}, "lanes": {"a": 1}}
        studio.registry_path.write_text(json.dumps(document))
        before = studio.registry_path.read_bytes()
        rows = ask.document("list")["models"]
        assert [row["name"] for row in rows] == ["jerry-xl", "other"]
        assert str(path) in " ".join(rows[0]["problems"])
        drift = ask.document("status")["drift"]
        assert [(each["code"], each["port"]) for each in drift] == [("assigned_not_served", ask.port)]
        assert studio.registry_path.read_bytes() == before

        assert ask.result("load", "--model", "jerry-xl")["port"] == ask.port
        assert words_of(studio, ask.port, "jerry-xl")
        assert studio.registry() == {
            "version": 1,
            "models": {"jerry-xl": entry | {"cache_path": str(path)}, "other": other},
            "lanes": {"a": 1},
        }
        ask("unload", "--port", ask.port).ok()
        assert studio.registry()["models"]["jerry-xl"] == entry | {"cache_path": str(path), "port": None}
        assert studio.registry()["lanes"] == {"a": 1}

    def test_stale_assignment_does_not_prevent_a_load(self, ask: Ask) -> None:
        register(ask.studio, "stale", port=ask.port)
        register(ask.studio, "mine")
        answer = ask("load", "--model", "mine", "--port", ask.port).ok()
        assert "stale" in answer.stderr
        assert assigned(ask.studio) == {"mine": ask.port}

    def test_edit_between_two_commands_takes_effect(self, ask: Ask) -> None:
        register(ask.studio, "mine")
        ask("load", "--model", "mine", "--port", ask.port).ok()
        document = ask.studio.registry()
        document["models"]["mine"]["port"] = None
        ask.studio.registry_path.write_text(json.dumps(document))
        row = ask.row()
        assert row["state"] == "orphan" and row["owner"] == "mlxops"
        pid = listener(ask.studio, ask.port)
        assert ask.result("load", "--model", "mine", "--port", ask.port)["changed"] is False
        assert assigned(ask.studio) == {"mine": ask.port} and listener(ask.studio, ask.port) == pid


@contextmanager
def foreign(studio: Studio, port: int, model: str) -> Iterator[list[str]]:
    """Run a server in the test's process that claims to serve the model; yield the requested paths."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            body = json.dumps({"object": "list", "data": [{"id": model}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer((studio.address, port), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class TestForeignServer:
    def test_foreign_server_is_named_and_never_stopped(self, ask: Ask) -> None:
        studio, port = ask.studio, ask.port
        register(studio, "mine", port=port)
        before = studio.registry_path.read_bytes()
        with foreign(studio, port, "jerry-xl"):
            for command in (
                ["load", "--model", "mine", "--port", port],
                ["load", "--model", "mine", "--port", port, "--force"],
                ["unload", "--port", port],
                ["unload", "--port", port, "--force"],
            ):
                error = ask.error(3, *command)
                assert error["code"] == "foreign_port" and f"pid {os.getpid()}" in error["why"]
            result = ask.result("reconcile")
            assert result["changed"] is False and result["stopped"] == []
            row = ask.row()
            assert (row["state"], row["owner"], row["pid"]) == ("foreign", "foreign", os.getpid())
            assert f"pid {os.getpid()}" in row["detail"] and row["model"] is None
            assert models_listed(studio, port)["data"] == [{"id": "jerry-xl"}]
        assert studio.registry_path.read_bytes() == before
        assert not engines(studio)

    def test_unload_all_leaves_a_foreign_server_alone(self, ask: Ask) -> None:
        studio = ask.studio
        first, second = studio.ports[:2]
        register(studio, "mine")
        ask("load", "--model", "mine", "--port", second).ok()
        with foreign(studio, first, "jerry-xl"):
            assert ask.result("unload-all", "--yes")["changed"] is True
            assert not engines(studio) and assigned(studio) == {}
            assert models_listed(studio, first)


class TestConcurrentCommands:
    def test_equal_loads_start_one_server(self, ask: Ask) -> None:
        go = ask.studio.folder / "go"
        register(ask.studio, "mine", until=go)
        load = ["load", "--model", "mine", "--port", ask.port, "--json"]
        with ask.running(*load) as one, ask.running(*load) as two:
            started(ask.studio)
            go.touch()
            answers = [finish(one), finish(two)]
        assert [answer.exit for answer in answers] == [0, 0], "\n".join(map(str, answers))
        results = [answer.json["hosts"][0]["result"] for answer in answers]
        assert {result["pid"] for result in results} == {listener(ask.studio, ask.port)}
        assert len(engines(ask.studio)) == 1 and assigned(ask.studio) == {"mine": ask.port}

    def test_second_load_follows_the_first(self, ask: Ask) -> None:
        go = ask.studio.folder / "go"
        register(ask.studio, "mine", until=go)
        load = ["load", "--model", "mine", "--port", ask.port]
        with ask.running(*load) as one:
            started(ask.studio)
            with ask.running(*load) as two:
                assert two.stderr is not None
                heard = ""
                while "proof" not in heard:
                    line = two.stderr.readline()
                    assert line, f"it ended after saying: {heard}"
                    heard += line
                assert "following" in heard
                go.touch()
                assert (finish(one).exit, finish(two).exit) == (0, 0)
        assert len(engines(ask.studio)) == 1

    def test_only_one_of_two_models_gets_the_port(self, ask: Ask) -> None:
        for name in ("one", "two"):
            register(ask.studio, name)
        loads = [["load", "--model", name, "--port", ask.port, "--json"] for name in ("one", "two")]
        with ask.running(*loads[0]) as one, ask.running(*loads[1]) as two:
            answers = {"one": finish(one), "two": finish(two)}
        (winner,) = (name for name, answer in answers.items() if answer.exit == 0)
        (loser,) = answers.keys() - {winner}
        assert error_of(answers[loser])["code"] in {"busy", "port_in_use"}
        assert answers[loser].exit in {75, 3}
        assert len(engines(ask.studio)) == 1 and assigned(ask.studio) == {winner: ask.port}

    def test_busy_error_names_the_operation_on_the_port(self, ask: Ask) -> None:
        go = ask.studio.folder / "go"
        register(ask.studio, "one", until=go)
        register(ask.studio, "two")
        with ask.running("load", "--model", "one", "--port", ask.port) as first:
            started(ask.studio)
            row = ask.row()
            assert (row["state"], row["model"]) == ("loading", "one")
            error = ask.error(75, "load", "--model", "two", "--port", ask.port)
            assert error["code"] == "busy" and "load one" in error["message"]
            assert "started by" in error["message"]
            assert ask.error(75, "load", "--model", "one", "--port", ask.studio.ports[1])["code"] == "busy"
            assert ask.result("reconcile")["changed"] is False
            go.touch()
            assert finish(first).exit == 0
        assert assigned(ask.studio) == {"one": ask.port}

    def test_load_with_equivalent_arguments_follows_the_first(self, ask: Ask) -> None:
        go = ask.studio.folder / "go"
        second = ask.studio.ports[1]  # not a slot
        register(ask.studio, "mine", until=go)
        with ask.running("load", "--model", "mine", "--port", second) as one:
            started(ask.studio)
            with (
                ask.running("load", "--model", "mine", "--port", second, "--repo", REPO, "--json") as with_its_repo,
                ask.running("load", "--model", "mine", "--json") as without_a_port,
            ):
                other = ask.error(75, "load", "--model", "mine", "--port", second, "--repo", OTHER)
                assert other["code"] == "busy"
                go.touch()
                answers = [finish(each) for each in (one, with_its_repo, without_a_port)]
        assert [answer.exit for answer in answers] == [0, 0, 0], "\n".join(map(str, answers))
        assert len(engines(ask.studio)) == 1

    def test_dry_run_reports_a_running_operation(self, ask: Ask) -> None:
        register(ask.studio, "mine", "deaf")
        register(ask.studio, "two")
        with ask.running("load", "--model", "mine", "--port", ask.port) as load:
            started(ask.studio)
            same = ask.result("load", "--model", "mine", "--port", ask.port, "--dry-run")
            assert (same["plan"]["outcome"], same["changed"]) == ("attach", False)
            for words in ([], ["--force"]):
                command = ["load", "--model", "two", "--port", ask.port, "--dry-run", *words]
                assert ask.error(75, *command)["code"] == "busy"
            ask("unload", "--port", ask.port).ok()
            assert finish(load).exit == 130

    @pytest.mark.parametrize(
        "way", [lambda ask: ("--port", ask.port), lambda _: ("--model", "mine")], ids=["port", "model"]
    )
    def test_unload_cancels_a_load_and_leaves_nothing(self, ask: Ask, way: Callable[[Ask], tuple[object, ...]]) -> None:
        register(ask.studio, "mine", "deaf")
        with ask.running("load", "--model", "mine", "--port", ask.port, "--json") as load:
            started(ask.studio)
            result = ask.result("unload", *way(ask))
            answer = finish(load)
        assert (result["changed"], result["model"], result["port"]) == (True, "mine", ask.port)
        assert error_of(answer)["code"] == "cancelled" and answer.exit == 130
        nothing_runs(ask.studio)
        assert assigned(ask.studio) == {} and not list((ask.studio.state / "run").glob("*.json"))
        assert ask.row()["state"] == "idle"

    def test_unload_all_cancels_a_load(self, ask: Ask) -> None:
        register(ask.studio, "mine", "deaf")
        register(ask.studio, "other")
        ask("load", "--model", "other", "--port", ask.studio.ports[1]).ok()
        with ask.running("load", "--model", "mine", "--port", ask.port, "--json") as load:
            wait_until(lambda: len(engines(ask.studio)) == 2, 30, "the engine's start")
            rows = ask.result("unload-all", "--yes")["ports"]
            assert finish(load).exit == 130
        assert {row["model"]: row["changed"] for row in rows} == {"mine": True, "other": True}
        nothing_runs(ask.studio)
        assert assigned(ask.studio) == {}

    def test_cancelled_swap_restarts_the_old_server(self, ask: Ask) -> None:
        register(ask.studio, "old")
        register(ask.studio, "new", "deaf")
        ask("load", "--model", "old", "--port", ask.port).ok()
        first = started(ask.studio)
        with ask.running("load", "--model", "new", "--port", ask.port, "--force") as load:
            wait_until(lambda: any("deaf" in each.command for each in engines(ask.studio)), 20, "the new one's start")
            worker = next(p for p in ask.studio.processes() if "--worker" in p.command)
            os.kill(worker.pid, signal.SIGTERM)
            assert finish(load).exit == 130
        assert len(engines(ask.studio)) == 1 and first not in engines(ask.studio)
        assert ask.row()["model"] == "old" and assigned(ask.studio) == {"old": ask.port}

    def test_load_continues_after_its_client_is_killed(self, ask: Ask) -> None:
        go = ask.studio.folder / "go"
        register(ask.studio, "mine", until=go)
        with ask.running("load", "--model", "mine", "--port", ask.port) as client:
            started(ask.studio)
            os.killpg(client.pid, signal.SIGKILL)
            client.wait()
        go.touch()
        wait_until(lambda: ask.row()["state"] == "ready", 20, "the load's end")
        assert words_of(ask.studio, ask.port, "jerry-xl")
        assert assigned(ask.studio) == {"mine": ask.port}
        wait_until(lambda: ask.studio.processes() == engines(ask.studio), 30, "the agent's end")


class TestReconcile:
    def test_reconcile_clears_dead_assignments_and_keeps_running_servers(self, ask: Ask) -> None:
        studio = ask.studio
        first, second = studio.ports[:2]
        for name, port in (("dead", first), ("alive", second)):
            register(studio, name)
            ask("load", "--model", name, "--port", port).ok()
        pid = listener(studio, first)
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not group_of(pid), 30, "its end")
        drift = ask.document("status")["drift"]
        assert [(each["code"], each["port"], each["model"]) for each in drift] == [
            ("assigned_not_served", first, "dead")
        ]
        assert ask.error(3, "status", "--strict")["code"] == "drift"
        cleared = [{"port": first, "model": "dead"}]
        would = ask.result("reconcile", "--dry-run")
        assert (would["cleared"], would["changed"]) == (cleared, False)
        assert assigned(studio) == {"dead": first, "alive": second}
        did = ask.result("reconcile")
        assert (did["cleared"], did["changed"]) == (cleared, True)
        assert assigned(studio) == {"alive": second}
        assert words_of(studio, second, "jerry-l")
        before = studio.registry_path.read_bytes()
        again = ask.result("reconcile")
        assert (again["cleared"], again["stopped"], again["changed"]) == ([], [], False)
        assert studio.registry_path.read_bytes() == before
        assert ask.document("status")["drift"] == []

    def test_reconcile_stops_a_server_without_its_leader(self, ask: Ask) -> None:
        register(ask.studio, "mine", "family")
        ask("load", "--model", "mine", "--port", ask.port).ok()
        leader = listener(ask.studio, ask.port)
        assert leader is not None
        (child,) = (process for process in engines(ask.studio) if process.pid != leader)
        os.kill(leader, signal.SIGKILL)
        wait_until(lambda: leader not in group_of(leader), 30, "the leader's end")
        row = ask.row()
        assert (row["state"], row["owner"]) == ("orphan", "mlxops") and "leader" in row["detail"]
        assert ask.result("reconcile", "--dry-run")["changed"] is False and engines(ask.studio) == {child}
        assert [each["port"] for each in ask.result("reconcile")["stopped"]] == [ask.port]
        nothing_runs(ask.studio)
        assert assigned(ask.studio) == {}
        assert ask.result("reconcile")["changed"] is False

    def test_reconcile_stops_the_server_of_a_killed_worker(self, ask: Ask) -> None:
        register(ask.studio, "mine", "deaf")
        with ask.running("load", "--model", "mine", "--port", ask.port, "--json") as load:
            started(ask.studio)
            worker = next(process for process in ask.studio.processes() if "--worker" in process.command)
            os.kill(worker.pid, signal.SIGKILL)
            answer = finish(load)
        error_of(answer)
        assert answer.exit != 0
        row = ask.row()
        assert row["state"] == "orphan" and "interrupted" in row["detail"]
        assert len(ask.result("reconcile")["stopped"]) == 1
        nothing_runs(ask.studio)
        assert ask.row()["state"] == "idle"

    def test_load_replaces_the_server_of_a_killed_worker(self, ask: Ask) -> None:
        register(ask.studio, "mine", "deaf")
        with ask.running("load", "--model", "mine", "--port", ask.port) as load:
            left = started(ask.studio)
            worker = next(process for process in ask.studio.processes() if "--worker" in process.command)
            os.kill(worker.pid, signal.SIGKILL)
            finish(load)
        register(ask.studio, "mine")
        answer = ask("load", "--model", "mine", "--port", ask.port).ok()
        assert "interrupted" in answer.stderr
        assert len(engines(ask.studio)) == 1 and left not in engines(ask.studio)
        quiet_but_serving(ask.studio)


def quiet_but_serving(studio: Studio) -> None:
    wait_until(lambda: studio.processes() == engines(studio), 30, "the agents' end")
    assert all(psutil.pid_exists(process.pid) for process in engines(studio))
    studio.sweep()
    quiet(studio)


def test_unwritable_registry_refuses_a_swap_before_anything_stops(homelab: Homelab) -> None:
    ask = Ask(with_fake(homelab), "local")
    register(ask.studio, "mine")
    register(ask.studio, "other", repo=OTHER)
    ask.result("load", "--model", "mine", "--port", ask.port)
    pid = listener(ask.studio, ask.port)
    previous = ask.studio.state / "registry.previous.json"
    previous.unlink()
    previous.mkdir()
    error = ask.error(3, "load", "--model", "other", "--port", ask.port, "--force")
    assert error["code"] == "registry_unwritable" and str(previous) in error["message"]
    assert listener(ask.studio, ask.port) == pid and assigned(ask.studio) == {"mine": ask.port}
    previous.rmdir()
    ask.result("unload", "--port", ask.port)
