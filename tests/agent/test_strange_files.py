"""Pipes, devices and folders in place of files: skipped or reported with their path, without hanging."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mlxops.common.build import build_id
from mlxops.core.protocol import Done, Requester, decode_envelope, decode_event
from mlxops.core.settings import Settings
from tests.lab.envelopes import envelope
from tests.lab.homelab import Completed, Homelab
from tests.steps import REPO, Ask, error_of, register, with_fake

DEEP = b"[" * 100_000
"""JSON for which Python's parser raises another error than for invalid JSON."""
KINDS: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "folder": Path.mkdir,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "loop": lambda path: path.symlink_to(path.name),
    "deep": lambda path: path.write_bytes(DEEP),
}
NO_FILE = sorted(KINDS.keys() - {"deep"})


@contextmanager
def instead(path: Path, kind: str) -> Iterator[None]:
    """Replace a file by something else; put it back at the end."""
    kept = path.with_name(f"kept-{path.name}")
    was = os.path.lexists(path)
    if was:
        path.rename(kept)
    KINDS[kind](path)
    try:
        yield
    finally:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        if was:
            kept.rename(path)


@pytest.fixture
def ask(homelab: Homelab) -> Ask:
    """Commands on the studio itself, with one registered model that is not loaded."""
    register(homelab.studio, "mine")
    return Ask(with_fake(homelab), "local")


@pytest.fixture
def serving(ask: Ask) -> Iterator[Ask]:
    """The model is loaded."""
    ask.result("load", "--model", "mine", "--port", ask.port)
    try:
        yield ask
    finally:
        ask.result("unload", "--port", ask.port)


# -- what an entry names ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", NO_FILE)
def test_template_that_is_not_a_file_is_refused(ask: Ask, tmp_path: Path, kind: str) -> None:
    template = tmp_path / "own.jinja"
    with instead(template, kind):
        error = ask.error(3, "set", "--model", "mine", "--set", f"chat_template={template}", "--dry-run")
    assert error["code"] == "bad_chat_template" and error["why"] == f"{template}: is not a file"


def test_endless_template_is_refused(ask: Ask, tmp_path: Path) -> None:
    template = tmp_path / "own.jinja"
    with open(template, "wb") as file:
        file.truncate(2 * 1024 * 1024)
    error = ask.error(3, "set", "--model", "mine", "--set", f"chat_template={template}")
    assert error["code"] == "bad_chat_template" and "2097152 bytes, more than" in error["why"]


def test_status_names_a_template_that_became_a_pipe(serving: Ask, tmp_path: Path) -> None:
    template = tmp_path / "own.jinja"
    template.write_text("{{ messages }}")
    serving.result("set", "--model", "mine", "--set", f"chat_template={template}")
    with instead(template, "pipe"):
        (found,) = serving.document("status")["drift"]
    assert found["code"] == "settings_changed" and "cannot be used" in found["message"]


# -- the files of the state ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_registry_that_is_not_a_file_is_refused(serving: Ask, kind: str) -> None:
    with instead(serving.studio.registry_path, kind):
        host = serving.document("status")
        assert host["drift"][0]["code"] == "registry_unusable" and host["registry"] == str(serving.studio.registry_path)
        error = serving.error(3, "load", "--model", "mine", "--port", serving.port, "--force")
        assert error["code"] == "registry_unusable"
        if kind != "deep":
            real = os.path.realpath(serving.studio.registry_path)
            assert error["why"] == f"{real} cannot be read: is not a file"
    assert serving.row()["state"] == "ready"


@pytest.mark.parametrize("kind", NO_FILE)
def test_port_lock_that_is_not_a_file_is_reported(serving: Ask, kind: str) -> None:
    """It is then unknown whether an operation holds the port, so nothing is done to it."""
    lock = serving.studio.state / "locks" / f"port-{serving.port}"
    with instead(lock, kind):
        row = serving.row()
        assert row["state"] == "unknown" and f"{lock} cannot be read: is not a file" in row["detail"]
        error = serving.error(3, "load", "--model", "mine", "--port", serving.port)
        assert error["code"] == "state_unwritable" and error["why"] == f"{lock}: is not a file"
        assert serving.result("reconcile")["cleared"] == []


@pytest.mark.parametrize("content", [DEEP, b'{"id": [], "command": {}}', b'{"id": "x", "command": "load", "more": 1}'])
def test_content_of_a_free_lock_is_ignored(ask: Ask, content: bytes) -> None:
    lock = ask.studio.state / "locks" / f"port-{ask.port}"
    lock.parent.mkdir(parents=True)
    lock.write_bytes(content)
    assert ask.document("status")["drift"] == []
    ask.result("load", "--model", "mine", "--port", ask.port)
    ask.result("unload", "--port", ask.port)


def test_download_whose_lock_is_a_pipe_is_not_waited_for(ask: Ask) -> None:
    lock = ask.studio.state / "locks" / "repo-org--name"
    lock.parent.mkdir(parents=True)
    with instead(lock, "pipe"):
        assert ask.document("status")["operations"] == []


@pytest.mark.parametrize("kind", NO_FILE)
def test_run_record_that_is_not_a_file_is_reported(serving: Ask, kind: str) -> None:
    record = serving.studio.state / "run" / f"{serving.port}.json"
    with instead(record, kind):
        row = serving.row()
        assert row["state"] == "unknown" and f"{record} cannot be read: is not a file" in row["detail"]
        assert serving.result("reconcile")["cleared"] == []


def test_damaged_run_record_blocks_nothing(ask: Ask) -> None:
    record = ask.studio.state / "run" / f"{ask.port}.json"
    record.parent.mkdir(parents=True)
    record.write_bytes(DEEP)
    row = ask.row()
    assert row["state"] == "idle" and "unreadable" in row["detail"]
    ask.result("load", "--model", "mine", "--port", ask.port)
    ask.result("unload", "--port", ask.port)


@pytest.mark.parametrize("kind", NO_FILE)
def test_agreed_settings_that_are_not_a_file_are_refused(ask: Ask, kind: str) -> None:
    ask.studio.state.mkdir()
    path = ask.studio.state / "host.json"
    with instead(path, kind):
        for command in (("status",), ("load", "--model", "mine", "--port", ask.port)):
            error = ask.error(3, *command)
            assert error["code"] == "state_unreadable" and str(path) in error["message"]


def test_damaged_settings_are_replaced_by_deploy(tmp_path: Path) -> None:
    """The refusal suggests `deploy`. Other commands do not replace them."""
    path = tmp_path / "host.json"
    path.write_bytes(DEEP)
    settings = Settings(state=str(tmp_path))
    for command, event in (("status", "host_json_unusable"), ("agree", Done), ("status", Done)):
        request = envelope(command, {}, settings, build_id(), Requester("me", "here"))
        output = subprocess.run(
            [sys.executable, "-P", "-m", "mlxops.agent"], input=request.encode(), capture_output=True, check=False
        ).stdout.decode()
        last = decode_event(output.splitlines()[-1])
        assert isinstance(last, Done) if event is Done else f'"code":"{event}"' in output, output


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_history_that_is_not_a_file_is_a_warning(serving: Ask, kind: str) -> None:
    """A change that cannot be recorded is a warning."""
    path = serving.studio.state / "history.jsonl"
    with instead(path, kind):
        assert serving.document("status")["drift"] == []
        unloaded = serving("unload", "--port", serving.port).ok()
        restored = serving("restore").ok()
        refused = serving("rollback", "--port", serving.port, "--json")
        assert error_of(refused)["code"] == "nothing_to_roll_back_to"
        if kind != "deep":
            assert f"could not be written: {path}: is not a file" in unloaded.stderr
            for answer in (restored, refused):
                assert f"could not be read: {path}: is not a file" in answer.stderr


def test_log_that_is_not_a_file_is_reported(ask: Ask) -> None:
    log = ask.studio.state / "logs" / f"{ask.port}.log"
    log.parent.mkdir(parents=True)
    (log.parent / "gone.log").symlink_to("nowhere")
    with instead(log, "pipe"):
        assert ask.document("status")["drift"] == []
        assert names_path(log, ask("logs", "--port", ask.port, "--json"))
        ask.result("load", "--model", "mine", "--port", ask.port)
        ask.result("unload", "--port", ask.port)


# -- the folders of the state ----------------------------------------------------------------------------------------


def names_path(path: Path, answer: Completed) -> bool:
    error = error_of(answer)
    return error["exit"] == 3 and str(path) in f"{error['message']} {error['why']}"


@pytest.mark.parametrize("kind", ["loop", "deep"])
def test_state_folder_that_is_not_a_folder_is_refused(ask: Ask, kind: str) -> None:
    with instead(ask.studio.state, kind):
        for command in (("status",), ("ops",), ("reconcile",), ("load", "--model", "mine", "--port", ask.port)):
            assert names_path(ask.studio.state, ask(*command, "--json")), command


def test_locks_folder_that_is_not_a_folder_is_refused(serving: Ask) -> None:
    with instead(serving.studio.state / "locks", "deep"):
        assert serving.row()["state"] == "unknown"
        assert names_path(serving.studio.state / "locks", serving("reconcile", "--json"))


def test_operations_folder_that_is_not_a_folder_is_refused(serving: Ask) -> None:
    folder = serving.studio.state / "ops"
    with instead(folder, "deep"):
        (drift,) = serving.document("status")["drift"]
        assert drift["code"] == "state_unreadable" and str(folder) in drift["message"]
        assert serving.row()["state"] == "ready"
        for command in (("ops",), ("reconcile", "--dry-run"), ("reconcile",), ("ops", "--follow", "abcdef")):
            assert names_path(folder, serving(*command, "--json")), command


# -- the records of operations ---------------------------------------------------------------------------------------


def test_folders_named_like_operations_are_handled(serving: Ask) -> None:
    ops = serving.studio.state / "ops"
    request = next(ops.glob("*/request.json")).read_bytes()
    decode_envelope(request)
    (ops / "99999999T999999-aaaaaa").mkdir()
    (ops / "99999999T999999-bbbbbb").touch()
    KINDS["loop"](ops / "99999999T999999-cccccc")
    with_request = ops / "99999999T999999-abcdef"
    with_request.mkdir()
    (with_request / "request.json").write_bytes(request.replace(b'"port": "', b'"port": "' + b"9" * 5000))
    (with_request / "events.jsonl").write_text(
        '{"mlxops":1,"event":"progress","name":"x","done":1%s,"total":2}\n' % ("0" * 4000)
    )
    for name in ("request.json", "events.jsonl", "lock"):
        for number, kind in enumerate(sorted(KINDS)):
            folder = ops / f"99999999T99999{number}-{name.encode().hex()[:6]}"
            folder.mkdir()
            (folder / "request.json").write_bytes(request)
            with_kept = folder / name
            with_kept.unlink(missing_ok=True)
            KINDS[kind](with_kept)
    rows = {row["operation"]: row for row in serving.document("ops")["operations"]}
    assert rows[with_request.name]["since"] == "9999-99-99T99:99:99Z"
    assert rows[with_request.name]["state"] == "interrupted"
    assert {drift["code"] for drift in serving.document("status")["drift"]} == {"interrupted_operation"}
    assert any(with_request.name in each for each in serving.result("reconcile")["interrupted"])
    assert rows["99999999T999999-aaaaaa"]["command"] is None
    error = serving.error(3, "ops", "--follow", "99999999T999999-aaaaaa")
    assert error["code"] == "operation_interrupted"


# -- the history's lines ---------------------------------------------------------------------------------------------


def test_rollback_skips_history_lines_that_no_load_wrote(ask: Ask) -> None:
    register(ask.studio, "other")
    for name in ("mine", "other"):
        ask.result("load", "--model", name, "--port", ask.port, "--force")
    good = {"command": "load", "port": ask.port, "model": "x", "repo_id": REPO, "revision": "main"}
    bad: list[dict[str, object]] = [{"model": "../../x"}, {"repo_id": "../.."}, {"revision": "--help"}, {"model": []}]
    with open(ask.studio.state / "history.jsonl", "ab") as file:
        for each in bad:
            file.write(json.dumps(good | each).encode() + b"\n")
        file.write(DEEP + b"\n")
    assert ask.result("rollback", "--port", ask.port)["model"] == "mine"
    ask.result("unload", "--port", ask.port)
