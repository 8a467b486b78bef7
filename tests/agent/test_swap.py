"""Swaps, rollbacks and `set`: checks before the old server stops, and its restart if the new one fails."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.agent.test_openai_server import Stream
from tests.lab import models
from tests.lab.homelab import Completed, Homelab, Studio, run, script
from tests.lab.quick import ENGINE, HeldEngine
from tests.lab.sshd import missing
from tests.lab.world import wait_until

QWEN, LLAMA, BROKEN = "tiny-org/tiny-qwen3", "tiny-org/tiny-llama", "tiny-org/tiny-broken"


@pytest.fixture
def studio(homelab: Homelab) -> Studio:
    """A studio with three models, one of which never loads."""
    for name, model in ((QWEN, models.QWEN), (LLAMA, models.LLAMA), (BROKEN, models.BROKEN)):
        homelab.studio.install(name, model)
    homelab.studio.mlxctl("init").ok()
    return homelab.studio


@contextmanager
def serving(studio: Studio, name: str, port: int) -> Iterator[dict[str, Any]]:
    """Load `name` on `port`. Unload everything at the end."""
    studio.mlxctl("load", name, str(port)).ok()
    try:
        yield row(studio, port)
    finally:
        studio.mlxctl("unload-all", "--yes").ok()


def row(studio: Studio, port: int) -> dict[str, Any]:
    rows = studio.mlxctl("status", "--json").ok().json["hosts"][0]["ports"]
    found: dict[str, Any] = next(each for each in rows if each["port"] == port)
    return found


def record(studio: Studio, port: int) -> Any:
    return json.loads((studio.state / "run" / f"{port}.json").read_text(encoding="utf-8"))


def result(done: Completed) -> Any:
    return done.json["hosts"][0]["result"]


class TestFailure:
    def test_old_server_restarts_unchanged_and_the_error_says_so(self, studio: Studio) -> None:
        port = studio.ports[0]
        with serving(studio, QWEN, port) as before:
            old_run = record(studio, port)
            # This is for its next load. The restart uses the old argv.
            studio.mlxctl("set", "--model", QWEN, "--set", "args=--max-tokens 7").ok()
            registry = studio.registry_path.read_bytes()

            failed = studio.mlxctl("load", BROKEN, str(port), "--force", "--json")

            error = failed.json["hosts"][0]["error"]
            assert failed.exit == 4 and error["code"] == "server_did_not_start"
            assert "Missing 1 parameters" in error["why"] and f"{QWEN} serves port {port} again" in error["why"]
            assert error["details"]["previous"] == f"{QWEN} serves port {port} again"
            # The old server writes to the port's log again. The new server's log was rotated.
            log = Path(error["details"]["log_path"])
            assert "Missing 1 parameters" in log.read_text() and error["hint"].endswith(str(log))
            after = row(studio, port)
            assert (after["state"], after["model"]) == ("ready", QWEN) and after["pid"] != before["pid"]
            assert record(studio, port)["argv"] == old_run["argv"]
            assert record(studio, port)["budget"] == old_run["budget"] != []
            assert studio.registry_path.read_bytes() == registry
            assert studio.completion(port, "jerry-xl")["choices"]

    def test_failed_move_leaves_the_model_on_its_port(self, studio: Studio, homelab: Homelab) -> None:
        first, second = studio.ports[0], studio.ports[1]
        HeldEngine(homelab).let(first)
        with serving(studio, QWEN, first):
            failed = studio.mlxctl("load", QWEN, str(second), "--force", "--timeout", "1")
            assert failed.exit == 4 and f"{QWEN} serves port {first} again" in failed.stderr
            assert row(studio, first)["state"] == "ready" and row(studio, second)["state"] == "idle"
            assert studio.registry()["models"][QWEN]["port"] == first

    @pytest.mark.usefixtures("quick_engine")
    def test_two_failed_starts_leave_no_assignment_and_no_process(self, studio: Studio) -> None:
        port = studio.ports[0]
        with serving(studio, QWEN, port):
            # The engine is broken while the old server serves, so neither server starts.
            program = Path(record(studio, port)["argv"][0])
            assert program.name == ENGINE
            program.write_text("#!/bin/sh\nexit 1\n")
            failed = studio.mlxctl("load", LLAMA, str(port), "--force")
            assert failed.exit == 4 and f"{QWEN} did not come back to port {port} either" in failed.stderr
            assert row(studio, port)["state"] == "idle"
            assert all(entry["port"] is None for entry in studio.registry()["models"].values())


class TestPreflight:
    """Checks that refuse a load before the old server stops."""

    def test_refused_load_does_not_touch_the_old_server(self, studio: Studio) -> None:
        port = studio.ports[0]
        with serving(studio, LLAMA, port) as before:
            for spoil, code in (
                ("template", "bad_chat_template"),
                ("args", "reserved_argument"),
                ("architecture", "unknown_architecture"),
            ):
                good = studio.registry_path.read_bytes()
                _spoil(studio, QWEN, spoil)
                refused = studio.mlxctl("load", QWEN, str(port), "--force", "--json")
                studio.registry_path.write_bytes(good)
                assert (refused.exit, refused.json["hosts"][0]["error"]["code"]) == (3, code)
            after = row(studio, port)
            assert (after["pid"], after["since"], after["state"]) == (before["pid"], before["since"], "ready")

    def test_dry_run_refuses_what_the_load_would_refuse(self, studio: Studio) -> None:
        _spoil(studio, QWEN, "architecture")
        refused = studio.mlxctl("load", QWEN, str(studio.ports[0]), "--dry-run")
        assert refused.exit == 3 and "mlx-lm 0.32.2" in refused.stderr and "'no_such_type'" in refused.stderr

    def test_too_big_model_is_refused_with_ways_to_make_room(self, studio: Studio, homelab: Homelab) -> None:
        port = studio.ports[0]
        homelab.configure(memory="900MB")
        # Other tests' servers on this machine count too: here it does not matter whether this one fits.
        studio.mlxctl("load", QWEN, str(port), "--overcommit").ok()
        try:
            refused = studio.mlxctl("load", LLAMA, str(studio.ports[1]), "--json")
            error = refused.json["hosts"][0]["error"]
            assert (refused.exit, error["code"]) == (3, "does_not_fit")
            assert error["details"]["budget_bytes"] == 900_000_000 and f"{QWEN} on {port} " in error["why"]
            shown = studio.mlxctl("list", "--memory").ok().stdout
            assert "budget 900.0 MB (memory in hosts.yaml)" in shown
            assert next(line for line in shown.splitlines() if line.startswith(LLAMA)).endswith("no")
        finally:
            studio.mlxctl("unload", str(port)).ok()

    @pytest.mark.usefixtures("quick_engine")
    def test_full_state_disk_is_found_before_the_old_server_stops(self, studio: Studio) -> None:
        port = str(studio.ports[0])
        done = _in_a_small_state(
            studio,
            f"$mlxctl load {QWEN} {port} --local >&2 && head -c 6m /dev/zero > {studio.state}/filler",
            f"$mlxctl load {LLAMA} {port} --force --json --local && exit 9; echo ,",
            f"$mlxctl status --json --local && rm {studio.state}/filler && $mlxctl unload {port} --local >&2",
        )
        refused, status = (document["hosts"][0] for document in json.loads(f"[{done.ok().stdout}]"))
        assert refused["error"]["code"] == "does_not_fit" and "the disk of" in refused["error"]["message"]
        assert next(each for each in status["ports"] if each["port"] == studio.ports[0])["state"] == "ready"

    def test_slot_name_that_promises_another_size_is_a_warning(self, studio: Studio) -> None:
        done = studio.mlxctl("load", QWEN, str(studio.ports[0]), "--dry-run", "--json").ok()
        assert any("promises a model of class xl" in note for note in result(done)["notes"])


def _in_a_small_state(studio: Studio, *steps: str) -> Completed:
    """Run lines of shell where the state folder is a disk of 12 MB; `$mlxctl` is the program."""
    own = ["unshare", "-Urm", "sh", "-c"]
    if sys.platform != "linux" or subprocess.run([*own, "mount -t tmpfs t /mnt"], check=False).returncode:
        missing("the right to make a mount namespace (unshare -Urm)")
    studio.state.mkdir(parents=True, exist_ok=True)
    mount = f"mount -t tmpfs -o size=12m,mode=700 t {studio.state}"
    return run([*own, "\n".join([mount, *steps])], studio.home, studio.environment | {"mlxctl": script("mlxctl")})


def _spoil(studio: Studio, name: str, how: str) -> None:
    document = studio.registry()
    entry = document["models"][name]
    match how:
        case "architecture":
            config = Path(entry["cache_path"]) / "config.json"
            changed = json.loads(config.read_text()) | {"model_type": "no_such_type"}
            config.unlink()
            config.write_text(json.dumps(changed))
        case "template":
            entry["chat_template"] = "no/such.jinja"
        case "args":
            entry["args"] = ["--po=1"]
    studio.registry_path.write_text(json.dumps(document))


@pytest.mark.usefixtures("quick_engine")
class TestStreams:
    """mlx_lm.server drops its open requests on SIGINT, so mlxops waits for them first."""

    def test_open_stream_is_waited_for(self, studio: Studio) -> None:
        port = studio.ports[0]
        with serving(studio, QWEN, port) as before:
            stream = Stream(studio, port, 1_000_000)
            ended: list[Completed] = []
            swap = threading.Thread(
                target=lambda: ended.append(studio.mlxctl("load", LLAMA, str(port), "--force", "--drain", "100"))
            )
            enough = threading.Event()
            reader = threading.Thread(target=_read_until, args=(stream, enough))
            reader.start()
            swap.start()
            wait_until(lambda: "1 open requests get up to 100 s" in _events(studio), 60, "the swap to wait")
            assert reader.is_alive() and row(studio, port)["pid"] == before["pid"]
            enough.set()
            stream.hang_up()
            reader.join()
            stream.close()
            swap.join()
            assert ended[0].ok() and "cut off" not in ended[0].stderr
            assert row(studio, port)["model"] == LLAMA

    def test_stream_that_does_not_end_is_cut_off_with_a_warning(self, studio: Studio) -> None:
        port = studio.ports[0]
        with serving(studio, QWEN, port):
            stream = Stream(studio, port, 1_000_000)
            swapped = studio.mlxctl("load", LLAMA, str(port), "--force", "--drain", "1", "--json").ok()
            assert "1 open requests did not end within 1 s and are cut off" in swapped.stderr
            assert b"[DONE]" not in stream.rest()
            stream.close()
            # The wait does not count as downtime: the old server still answered.
            assert result(swapped)["downtime_seconds"] < result(swapped)["seconds"] - 0.9


def _read_until(stream: Stream, enough: threading.Event) -> None:
    while not enough.is_set() and stream.response.readline():
        pass


def _events(studio: Studio) -> str:
    return "".join(path.read_text(encoding="utf-8") for path in studio.state.glob("ops/*/events.jsonl"))


@pytest.mark.usefixtures("quick_engine")
class TestRollback:
    def test_rollback_can_be_repeated(self, studio: Studio) -> None:
        port = studio.ports[0]
        with serving(studio, QWEN, port):
            studio.mlxctl("load", LLAMA, str(port), "--force").ok()
            plan = studio.mlxctl("rollback", str(port), "--dry-run", "--json").ok()
            assert result(plan)["model"] == QWEN and row(studio, port)["model"] == LLAMA
            back = result(studio.mlxctl("rollback", str(port), "--json").ok())
            assert (back["model"], back["state"], back["changed"]) == (QWEN, "ready", True)
            assert back["downtime_seconds"] > 0 and studio.registry()["models"][LLAMA]["port"] is None
            assert studio.mlxctl("unload", str(port)).ok()
            # An idle port gets the model that it served last.
            assert result(studio.mlxctl("rollback", "--port", str(port), "--json").ok())["model"] == QWEN

    def test_rollback_never_empties_another_port(self, studio: Studio) -> None:
        first, second = studio.ports[0], studio.ports[1]
        with serving(studio, QWEN, first):
            studio.mlxctl("load", LLAMA, str(first), "--force").ok()
            studio.mlxctl("load", QWEN, str(second)).ok()
            refused = studio.mlxctl("rollback", str(first), "--json")
            assert (refused.exit, refused.json["hosts"][0]["error"]["code"]) == (3, "model_elsewhere")
            assert row(studio, second)["model"] == QWEN and row(studio, first)["model"] == LLAMA

    def test_repointed_name_is_pointed_back(self, studio: Studio) -> None:
        port = studio.ports[0]
        studio.mlxctl("load", "mine", str(port), "--repo", QWEN).ok()
        try:
            studio.mlxctl("load", "mine", str(port), "--repo", LLAMA, "--force").ok()
            studio.mlxctl("rollback", str(port)).ok()
            assert studio.registry()["models"]["mine"]["repo_id"] == QWEN
            assert (row(studio, port)["model"], row(studio, port)["repo_id"]) == ("mine", QWEN)
        finally:
            studio.mlxctl("unload", str(port)).ok()

    def test_rollback_without_history_is_refused(self, studio: Studio) -> None:
        port = studio.ports[1]
        refused = studio.mlxctl("rollback", str(port), "--json")
        assert (refused.exit, refused.json["hosts"][0]["error"]["code"]) == (3, "nothing_to_roll_back_to")


class TestSet:
    @pytest.mark.usefixtures("quick_engine")
    def test_changed_setting_is_drift_until_the_restart(self, studio: Studio) -> None:
        port = studio.ports[0]
        with serving(studio, QWEN, port):
            done = studio.mlxctl("set", "--model", QWEN, "--set", "args=--max-tokens 64", "--json").ok()
            assert result(done)["changed"] is True and result(done)["restart_needed_on"] == port
            assert _drift(studio) == ["settings_changed"]
            studio.mlxctl("load", QWEN, str(port), "--force").ok()
            assert _drift(studio) == [] and record(studio, port)["argv"][-2:] == ["--max-tokens", "64"]
            again = studio.mlxctl("set", "--model", QWEN, "--set", "args=--max-tokens 64", "--json").ok()
            assert result(again)["changed"] is False
            # mlx-lm has no option for it, so the running server is not outdated.
            context = studio.mlxctl("set", "--model", QWEN, "--set", "context_length=512", "--json").ok()
            assert result(context)["changed"] is True and result(context)["restart_needed_on"] is None
            studio.mlxctl("set", "--model", QWEN, "--set", "args=").ok()
            assert "args" not in studio.registry()["models"][QWEN]

    def test_settings_that_cannot_be_served_are_not_written(self, studio: Studio) -> None:
        before = studio.registry_path.read_bytes()
        for words, exits in (
            (["context_length=big"], 2),
            (["nonsense=1"], 2),
            (["args=--port 1"], 3),
            (["engine=nonsense"], 3),
            (["chat_template=no/such.jinja"], 3),
            (["tool_call_parser=qwen3"], 3),  # mlx-lm has no such option
            (["args=--max-tokenz 7"], 3),
        ):
            flags = [part for word in words for part in ("--set", word)]
            assert studio.mlxctl("set", "--model", QWEN, *flags).exit == exits, words
        assert studio.mlxctl("set", "--model", "unknown", "--set", "engine=mlx-lm").exit == 3
        studio.mlxctl("set", "--model", QWEN, "--set", "args=--max-tokens 9", "--dry-run").ok()
        assert studio.registry_path.read_bytes() == before

    def test_missing_revision_is_a_warning(self, studio: Studio) -> None:
        done = studio.mlxctl("set", "--model", QWEN, "--set", "revision=deadbeef").ok()
        assert "not checked" in done.stderr and "not in the cache" in done.stderr
        assert "revision deadbeef" in done.stdout
        studio.mlxctl("set", "--model", QWEN, "--set", "revision=").ok()

    def test_list_shows_each_setting_with_its_origin(self, studio: Studio) -> None:
        studio.mlxctl("set", "--model", LLAMA, "--set", "engine=mlx-lm", "--set", "context_length=512").ok()
        rows = {each["name"]: each for each in studio.mlxctl("list", "--json").ok().json["hosts"][0]["models"]}
        assert {"key": "context_length", "value": 512, "origin": "registry"} in rows[LLAMA]["flags"]
        assert rows[QWEN]["flags"] == [{"key": "engine", "value": "mlx-lm", "origin": "settings"}]
        assert (rows[LLAMA]["context_length"], rows[QWEN]["context_length"]) == (512, 2048)


def _drift(studio: Studio) -> list[str]:
    return [each["code"] for each in studio.mlxctl("status", "--json").ok().json["hosts"][0]["drift"]]


def test_model_uses_the_template_of_its_entry(studio: Studio, tmp_path: Path) -> None:
    """mlx_lm.server needs the template's text. The entry names a file, as for mlx-openai-server."""
    port = studio.ports[0]
    template = tmp_path / "own.jinja"
    template.write_text("{{ 'hello ' * 40 }}")
    studio.mlxctl("set", "--model", QWEN, "--set", f"chat_template={template}").ok()
    with serving(studio, QWEN, port):
        assert studio.completion(port, "jerry-xl")["usage"]["prompt_tokens"] >= 40
