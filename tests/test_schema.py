"""`schema` describes every document that commands print, and the commands of `skill` work."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from mlxops.cli import manual
from mlxops.cli.schema import printed, schema
from mlxops.core.command import Hosts
from mlxops.core.commands.load import Load
from mlxops.core.json_schema import Schemas
from tests.control.gatewayfiles import ENTRY
from tests.docs_tables import SIX
from tests.lab.homelab import Completed, Homelab
from tests.lab.quick import HeldEngine
from tests.lab.run import run, script
from tests.steps import OTHER, REPO, Ask, finish, install, register


def check(answer: Completed) -> list[dict[str, Any]]:
    """Check each document that a command printed. A key that the schema does not have is an error."""
    command = next(word for word in answer.argv[1:] if not word.startswith("-"))
    text = answer.stdout
    documents = [json.loads(text)] if text.startswith("{\n") else [json.loads(line) for line in text.splitlines()]
    assert documents, str(answer)
    for document in documents:
        assert problems(document, command) == [], str(answer)
    return documents


@cache
def validator(command: str) -> Draft202012Validator:
    return Draft202012Validator(schema(command, closed=True))


def problems(document: object, command: str) -> list[str]:
    return [
        f"{error.json_path}: {error.message[:200]}"
        for outer in validator(command).iter_errors(document)
        for error in (outer.context or [outer])
    ]


@pytest.mark.parametrize("command", [None, *(kind.name for kind in printed())])
def test_schema_is_one(command: str | None) -> None:
    for closed in (False, True):
        Draft202012Validator.check_schema(schema(command, closed=closed))


def test_open_schema_allows_the_keys_of_a_later_version() -> None:
    host = {"host": "manual", "reachable": True, "error": None, "topic": None, "text": "", "later": 1}
    document = {"schema": 1, "command": "help", "ok": True, "hosts": [host], "later": 1}
    assert Draft202012Validator(schema("help")).is_valid(document) and problems(document, "help")


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"schema": 2, "command": "ops", "ok": True, "hosts": []},
        {"schema": 1, "command": "load", "ok": True, "hosts": []},
        {"schema": 1, "command": "ops", "ok": True, "hosts": [{"host": "studio", "reachable": True, "error": None}]},
        {"schema": 1, "command": "ops", "ok": False, "hosts": [], "error": {"code": "x"}},
    ],
)
def test_wrong_document_is_found(document: object) -> None:
    assert problems(document, "ops")
    assert not Draft202012Validator(schema("ops")).is_valid(document)


def test_fields_have_their_meaning() -> None:
    port = schema("load")["$defs"]["LoadResult"]["properties"]
    assert port["log_path"] == {"type": ["string", "null"], "description": "The server's log on the host."}


def test_request_has_a_schema_too() -> None:
    properties = Schemas().object_of(Load)["properties"]
    assert properties["require"] == {"type": "array", "items": {"type": "string"}} and "expect" in properties


@pytest.mark.parametrize(
    ("words", "status"),
    [
        ("schema --json", 0),
        ("schema ops --json", 0),
        ("schema follow --json", 2),
        ("schema ../x --json", 2),
        ("skill --json", 0),
        ("help status --json", 0),
        ("help nothing --json", 2),
        ("load --json", 2),
        ("status --interval 3 --local --json", 2),
        ("ops --nonsense --json", 2),
    ],
)
def test_documents_without_a_host_fit(words: str, status: int, tmp_path: Any) -> None:
    answer = run([script("mlxctl"), *words.split()], tmp_path, {"HOME": str(tmp_path)})
    assert answer.exit == status, str(answer)
    check(answer)


class TestDocuments:
    @pytest.fixture
    def ask(self, homelab: Homelab) -> Iterator[Ask]:
        HeldEngine(homelab).let(*homelab.studio.ports)
        yield Ask(homelab, "local")

    def test_documents_of_commands_fit(self, ask: Ask) -> None:
        port = str(ask.port)
        seen = {"measure"}  # the fake engine counts no tokens of a streamed answer
        router = ask.studio.folder / "router.yaml"
        router.write_text(ENTRY)
        ask.lab.configure_gateway(config=str(router))
        for name, repo in (("mine", REPO), ("yours", OTHER)):
            register(ask.studio, name, repo=repo)
        for line in [
            "status",
            "init --dry-run",
            "list --memory",
            f"load --model mine --port {port} --dry-run",
            f"load --model mine --port {port}",
            f"load --model mine --port {port}",
            f"load --model yours --port {port}",
            f"load --model yours --port {port} --force --dry-run",
            f"load --model yours --port {port} --force",
            f"rollback --port {port} --dry-run",
            "status --probe",
            f"probe --port {port}",
            "probe --last",
            f"logs --port {port}",
            "set --model mine --set context_length=4096",
            "set --model mine --set context_length=many",
            f"pull --repo {REPO} --dry-run",
            "reconcile --dry-run",
            "restore --dry-run",
            "boot",
            "gateway",
            "gateway --print --env",
            "doctor",
            "serve --print alerts",
            f"unload --port {port} --dry-run",
            f"unload --port {port}",
            "unload-all --yes --dry-run",
            "unload-all",
            "remove --model yours --dry-run",
            "remove --model yours",
            "ops",
            "ops --follow 000000",
            "ops --cancel 000000",
            "deploy --dry-run",
        ]:
            (document,) = check(ask(*shlex.split(line), "--json"))
            seen |= {line.split()[0] for host in document["hosts"] if host.get("result", host["error"] is None)}
        assert {kind.name for kind in printed() if kind.hosts is not Hosts.NONE} - seen == set(), "with a result"

    def test_documents_of_operations_fit(self, ask: Ask) -> None:
        register(ask.studio, "mine")
        (started,) = check(ask("load", "--model", "mine", "--port", ask.port, "--detach", "--json").ok())
        operation = started["hosts"][0]["operation"]
        check(ask("ops", "--follow", operation, "--timeout", "0", "--json"))
        check(ask("ops", "--follow", operation, "--json").ok())
        check(ask("ops", "--cancel", operation, "--json"))
        with ask.running("status", "--watch", "--interval", "0.2", "--json") as process:
            assert process.stdout is not None
            lines = process.stdout.readline()
            ask("unload", "--port", ask.port).ok()
            lines += process.stdout.readline()
            process.terminate()
            finish(process)
        documents = check(Completed(("mlxctl", "status"), 0, lines, ""))
        assert documents[1]["hosts"][0]["changes"]
        with ask.running("logs", "--port", str(ask.port), "--follow", "--json") as process:
            assert process.stdout is not None
            check(Completed(("mlxctl", "logs"), 0, process.stdout.readline(), ""))

    def test_host_that_is_away_fits(self, homelab: Homelab) -> None:
        homelab.studio.sshd.stop()
        answer = homelab.mini.mlxctl("status", "--json")
        assert answer.exit == 5
        check(answer)


# -- skill ----------------------------------------------------------------------------------------------------------

PAGE = manual.skill()
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]


def test_skill_has_a_head_and_teaches_the_six() -> None:
    head, _, body = PAGE.removeprefix("---\n").partition("---\n")
    assert sorted(yaml.safe_load(head)) == ["description", "name"] and "<!--" not in body
    assert {line.split()[1] for line in COMMANDS} >= set(SIX)


def test_commands_of_the_skill_work_in_their_order(homelab: Homelab) -> None:
    ask = Ask(homelab, "ssh")
    HeldEngine(homelab).let(*homelab.studio.ports)
    install(ask.studio, REPO, OTHER)
    register(ask.studio, "llama3-8b", repo=OTHER)
    register(ask.studio, "qwen3-8b")
    port, operation = str(ask.port), ""
    ask.studio.mlxctl("load", "llama3-8b", port).ok()
    for line in COMMANDS:
        words = [{"8100": port, "ID": operation}.get(word, word) for word in line.split()[1:]]
        answer = homelab.mini.mlxctl(*words)
        assert answer.exit == 0, str(answer)
        (document,) = check(answer)
        operation = document["hosts"][0].get("operation") or operation
    assert operation
