"""Wrong arguments and files: one clear message, the right exit status, nothing changed, nothing executed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mlxops import mlxctl as program
from tests.lab import leaks
from tests.lab.homelab import Completed, Homelab, LabUnavailable
from tests.lab.sshd import missing
from tests.steps import REPO, WAYS, Ask, error_of, install, register, tree, with_fake

CANARY = "canary-of-the-tests"
HOSTILE = {
    "spaces": "a b",
    "quotes": "a\"b'c",
    "newline": "a\nb",
    "substitution": f"$(touch {CANARY})",
    "backticks": f"`touch {CANARY}`",
    "command": f"x; touch {CANARY}",
    "ampersand": f"x && touch {CANARY} #",
    "option": "-oProxyCommand=touch",
    "upwards": "../../etc/passwd",
    "upwards-inside": "a/../../b",
    "right-to-left": "\u202ejerry-xl",
    "escapes": "\x1b[31mred\x1b[0m\x07\x9b5m",
    "format": "{0.__class__}%s%n",
    "digits": "８１００",
    "bytes": "\udcff\udcfe",
    "long": "a" * 5000,
    "empty": "",
}
"""No value here is a name, a repository, a port, a host or a number of seconds."""

FLAGS = {
    "--model": ["load", "--port", "{port}"],
    "--repo": ["load", "--model", "mine", "--port", "{port}"],
    "--port": ["load", "--model", "mine"],
    "--host": ["load", "--model", "mine", "--port", "{port}"],
    "--timeout": ["load", "--model", "mine", "--port", "{port}"],
    "--drain": ["unload", "--port", "{port}"],
}
STEERING = ("\x1b", "\x07", "\x9b", "\u202e")


@pytest.fixture(scope="module")
def lab(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory, watch: leaks.Watch) -> Iterator[Homelab]:
    """One lab for all tests. A refused command changes nothing, so the tests do not disturb each other."""
    folder = tmp_path_factory.mktemp("wrong")
    try:
        with watch.spare(folder), Homelab(folder / "lab") as shared:
            with_fake(shared)
            register(shared.studio, "mine")
            # Agree once, so that later requests leave no changes of a first request.
            shared.mini.mlxctl("reconcile").ok()
            yield shared
    except LabUnavailable as error:
        missing(str(error))


@pytest.fixture(params=WAYS)
def ask(request: pytest.FixtureRequest, lab: Homelab) -> Ask:
    return Ask(lab, request.param)


@pytest.fixture
def local(lab: Homelab) -> Ask:
    return Ask(lab, "local")


Typed = Callable[..., Completed]


@pytest.fixture
def typed(lab: Homelab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Typed:
    """Run `mlxctl ... --local --json` on the studio inside this process.

    A wrong command line is refused before anything starts, and an interpreter for each would take too long.
    """
    monkeypatch.setenv("HOME", str(lab.studio.home))
    monkeypatch.chdir(lab.studio.home)

    def run(*words: str) -> Completed:
        argv = ["mlxctl", *words, "--local", "--json"]
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit) as ended:
            program.main()
        assert isinstance(ended.value.code, int)
        return Completed(tuple(argv), ended.value.code, *capsys.readouterr())

    return run


def mlxctl(ask: Ask, *words: str) -> Completed:
    """Run `mlxctl`. It turns every parse error into a usage error; `inv` leaves them to Invoke."""
    return ask.lab.mini.mlxctl(*words) if ask.way == "ssh" else ask.studio.mlxctl(*words)


def refused(ask: Ask, answer: Completed, *statuses: int) -> None:
    """Check that the answer is a refusal with one document, short lines and no terminal escapes."""
    assert answer.exit in statuses, str(answer)
    error_of(answer)
    said = answer.stdout + answer.stderr
    assert "Traceback" not in said
    assert not [mark for mark in STEERING if mark in said], ascii(said)
    lines = [line for line in answer.stderr.splitlines() if not line.startswith(("  why: ", "  next: "))]
    assert len(lines) == 1 and lines[0].startswith("error: "), str(answer)
    assert len(answer.stderr) < 2000
    assert "  next: " in answer.stderr
    assert not list(ask.lab.folder.rglob(CANARY)), "it was executed"


class TestArguments:
    @pytest.mark.parametrize("kind", HOSTILE)
    @pytest.mark.parametrize("flag", FLAGS)
    def test_hostile_text_is_a_usage_error(self, local: Ask, typed: Typed, flag: str, kind: str) -> None:
        before = tree(local.studio.folder)
        words = [word.format(port=local.port) for word in FLAGS[flag]]
        refused(local, typed(*words, f"{flag}={HOSTILE[kind]}"), 2)
        assert tree(local.studio.folder) == before

    @pytest.mark.parametrize("kind", HOSTILE)
    def test_hostile_position_is_a_usage_error_over_ssh(self, lab: Homelab, kind: str) -> None:
        ask = Ask(lab, "ssh")
        before = tree(ask.studio.folder)
        refused(ask, mlxctl(ask, "load", HOSTILE[kind], str(ask.port), "--json"), 2)
        assert tree(ask.studio.folder) == before

    @pytest.mark.parametrize(
        "words",
        [
            ["load", "mine", "{before}"],
            ["load", "mine", "{after}"],
            ["load", "mine", "0"],
            ["load", "mine", "65536"],
            ["load", "mine", "{port}.0"],
            ["load", "mine", " {port}"],
            ["load", "mine", "AUTO"],
            ["unload", "{after}"],
            ["unload", "abc"],
            ["load", "mine", "{port}", "--timeout", "0"],
            ["load", "mine", "{port}", "--timeout", "-5"],
            ["load", "mine", "{port}", "--timeout", "nan"],
            ["load", "mine", "{port}", "--timeout", "inf"],
            ["load", "mine", "{port}", "--timeout", "1e3"],
            ["load", "mine", "{port}", "--timeout", "100000"],
            ["unload", "{port}", "--drain", "soon"],
            ["load", "mine", "{port}", "--repo", "org"],
            ["load", "mine", "{port}", "--repo", "org/name@"],
            ["load", "mine", "{port}", "--repo", "org/name@a..b"],
            ["load", "mine", "{port}", "--repo", "org/name@-x"],
            ["load", "mine", "{port}", "--host", "studio,unknown"],
            ["status", "--host", "unknown"],
            ["status", "--host", "studio,,studio"],
        ],
        ids=" ".join,
    )
    def test_almost_valid_argument_is_a_usage_error(self, local: Ask, typed: Typed, words: list[str]) -> None:
        before = tree(local.studio.folder)
        ports = {"port": local.port, "before": local.port - 1, "after": local.studio.ports[-1] + 1}
        refused(local, typed(*(word.format(**ports) for word in words)), 2)
        assert tree(local.studio.folder) == before

    def test_env_without_print_is_a_usage_error(self, local: Ask, typed: Typed) -> None:
        answer = typed("gateway", "--env")
        refused(local, answer, 2)
        assert error_of(answer)["code"] == "print_missing"

    @pytest.mark.parametrize("name", ["minee", "org/missing", "jerry-l"])
    def test_unknown_model_is_refused_and_changes_no_registry(self, ask: Ask, name: str) -> None:
        before = tree(ask.studio.hub)
        answer = mlxctl(ask, "unload", "--model", name, "--json")
        refused(ask, answer, 3)
        assert error_of(answer)["code"] == "unknown_model"
        assert tree(ask.studio.hub) == before


GOOD = {"repo_id": REPO, "model_id": REPO, "cache_path": None, "format": "mlx", "port": None}
DOCUMENT = json.dumps({"version": 1, "models": {"mine": GOOD}}, indent=2).encode()
UNUSABLE = {
    "empty": b"",
    "blank": b" \n",
    "one byte": DOCUMENT[:1],
    "half": DOCUMENT[: len(DOCUMENT) // 2],
    "all but the end": DOCUMENT[:-1],
    "version 0": DOCUMENT.replace(b'"version": 1', b'"version": 0'),
    "version 2": b'{"version": 2, "lanes": {}, "models": {}}',
    "version as text": DOCUMENT.replace(b'"version": 1', b'"version": "1"'),
    "version true": DOCUMENT.replace(b'"version": 1', b'"version": true'),
    "version 1.0": DOCUMENT.replace(b'"version": 1', b'"version": 1.0'),
    "no version": b'{"models": {}}',
    "a list": b"[]",
    "models a list": b'{"version": 1, "models": []}',
    "an entry a text": b'{"version": 1, "models": {"mine": "x"}}',
    "keys twice": b'{"version": 1, "models": {"mine": {}, "mine": {}}}',
    "not UTF-8": b'{"version": 1, "models": {"\xff": {}}}',
    "NUL": DOCUMENT + b"\0",
    "deep": b'{"version": 1, "models": ' + b"[" * 100_000,
    "half a character": b'{"version": 1, "models": {"mine": {"note": "\\ud800"}}}',
}


@pytest.fixture
def registry(lab: Homelab) -> Iterator[Path]:
    """Return the path of the lab's registry, and restore the file afterwards."""
    path = lab.studio.registry_path
    kept = path.read_bytes()
    yield path
    path.write_bytes(kept)


class TestBrokenRegistry:
    @pytest.mark.parametrize("kind", UNUSABLE)
    def test_unusable_registry_is_reported_and_never_written(self, local: Ask, registry: Path, kind: str) -> None:
        registry.write_bytes(UNUSABLE[kind])
        before = tree(local.studio.hub)
        answer = local("load", "--model", "mine", "--port", local.port, "--json")
        refused(local, answer, 3)
        assert error_of(answer)["code"] == "registry_unusable"
        document = local.document("status")
        assert document["drift"][0]["code"] == "registry_unusable"
        assert tree(local.studio.hub) == before

    def test_no_command_writes_a_truncated_registry(self, ask: Ask, registry: Path) -> None:
        registry.write_bytes(UNUSABLE["half"])
        before = tree(ask.studio.hub)
        for words in (["init"], ["unload", str(ask.port)], ["unload", "--model", "mine"], ["reconcile"]):
            refused(ask, mlxctl(ask, *words, "--json"), 3)
        refused(ask, mlxctl(ask, "unload-all", "--yes", "--json"), 3)
        assert mlxctl(ask, "list").exit == 0
        assert tree(ask.studio.hub) == before

    def test_registry_that_is_a_folder_is_refused(self, local: Ask, registry: Path) -> None:
        content = registry.read_bytes()
        registry.unlink()
        registry.mkdir()
        try:
            refused(local, mlxctl(local, "load", "mine", str(local.port), "--json"), 3)
            refused(local, mlxctl(local, "init", "--json"), 3)
            assert local("status").exit == 0
        finally:
            registry.rmdir()
            registry.write_bytes(content)

    def test_mistakes_of_a_person_are_listed_as_problems(self, local: Ask, registry: Path) -> None:
        outside = local.studio.ports[-1] + 1
        models = {
            "text": GOOD | {"port": str(local.port)},
            "twice": GOOD | {"port": local.port},
            "outside": GOOD | {"port": outside},
            "huge": GOOD | {"port": 10**9},
            "true": GOOD | {"port": True},
            "half": GOOD | {"port": 8100.5},
            "$(touch x) \u202e\x1b[31m": GOOD,
            "no repo": {"port": None},
        }
        registry.write_bytes(b"\xef\xbb\xbf" + json.dumps({"version": 1, "models": models}).encode())
        before = tree(local.studio.hub)
        rows = {row["name"]: row for row in local.document("list")["models"]}
        assert rows.keys() == models.keys()
        for name, problem in {
            "text": "is a string",
            "twice": "also claimed by",
            "huge": "not a TCP port",
            "true": "not an integer",
            "half": "not an integer",
            "$(touch x) \u202e\x1b[31m": "not a model name",
            "no repo": "repo_id is missing",
        }.items():
            assert problem in " ".join(rows[name]["problems"]), name
        codes = {drift["code"] for drift in local.document("status")["drift"]}
        assert {"port_claimed_twice", "port_outside_range"} <= codes
        for command in ("list", "status"):
            shown = local(command).ok()
            assert not [mark for mark in STEERING if mark in shown.stdout + shown.stderr]
        assert tree(local.studio.hub) == before

    def test_registry_with_problems_can_be_changed(self, local: Ask, registry: Path) -> None:
        """A byte order mark or a port as text does not prevent a change. Everything else stays."""
        install(local.studio)
        strange = GOOD | {"port": "x", "note": "\u202e"}
        models = {"mine": GOOD | {"port": str(local.studio.ports[2])}, "strange": strange}
        registry.write_bytes(b"\xef\xbb\xbf" + json.dumps({"version": 1, "models": models, "k": [1]}).encode())
        assert local.result("unload", "--port", local.studio.ports[2])["changed"] is True
        assert local.studio.registry() == {
            "version": 1,
            "models": {"mine": GOOD | {"port": None}, "strange": strange},
            "k": [1],
        }
