"""Downloads by the real huggingface_hub from a real hub, with a server in between that misbehaves on request."""

from __future__ import annotations

import gzip
import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlxops.agent.hub.cache import Skipped, Snapshot, completeness, find
from mlxops.agent.hub.client import (
    MAX_ANSWER_BYTES,
    DownloadProgress,
    DownloadTimeouts,
    HubClient,
    InvalidAnswer,
    check_name,
)
from mlxops.agent.hub.download import _remove_file, download, verify
from mlxops.core.errors import DownloadFailed, MlxopsError, Refused
from mlxops.core.protocol import Event, Note, Progress
from tests.lab import models
from tests.lab.faultyhub import Answer, Cut, Endless, EndlessHead, FaultyHub, Lie, Stall, refusal
from tests.lab.hub import Hub
from tests.lab.world import free_port

LLAMA = "tiny-org/tiny-llama"
QUICK = DownloadTimeouts(stall=60, answer=10, tries=3, backoff=0.01, longest_wait=0.05)
"""Patient with a slow machine, and quick to come back."""


@pytest.fixture
def faulty(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyHub]:
    with FaultyHub(hub.url) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        yield running


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "hf" / "hub"


def pull(
    cache: Path, repo_id: str = LLAMA, revision: str | None = None, timeouts: DownloadTimeouts = QUICK
) -> list[Event]:
    events: list[Event] = []
    download(repo_id, revision, cache, events.append, timeouts)
    return events


def refused(
    cache: Path, repo_id: str = LLAMA, revision: str | None = None, timeouts: DownloadTimeouts = QUICK
) -> MlxopsError:
    with pytest.raises(MlxopsError) as caught:
        pull(cache, repo_id, revision, timeouts)
    error = caught.value
    assert error.why and error.hint, "every error says why, and what to do"
    assert "\n" not in error.message + error.why + error.hint
    return error


def ref(cache: Path, repo_id: str, branch: str = "main") -> Path:
    return models.repo_folder(cache, repo_id) / "refs" / branch


def made(folder: Path, **files: bytes) -> Path:
    """A directory with a complete tiny model, and more files."""
    folder.mkdir()
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_bytes(content)
    return folder


def safetensors(size: int, written_by: str = "mlx") -> bytes:
    tensor = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
    header = json.dumps({"__metadata__": {"format": written_by}, "w": tensor}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(size)


CONFIG = b'{"model_type": "qwen3", "quantization": {"group_size": 64, "bits": 4}}'


class TestADownload:
    def test_is_in_the_cache_as_main_and_complete(self, hub: Hub, faulty: FaultyHub, cache: Path) -> None:
        snapshot = download(LLAMA, None, cache, lambda _: None, QUICK)
        assert snapshot == find(cache, LLAMA)
        assert snapshot.revision == hub.sha(LLAMA) == ref(cache, LLAMA).read_text()
        assert snapshot.path == models.repo_folder(cache, LLAMA) / "snapshots" / snapshot.revision
        assert completeness(snapshot.path) is None

    def test_says_beforehand_how_much_it_is(self, hub: Hub, faulty: FaultyHub, cache: Path) -> None:
        first = pull(cache)[0]
        assert first == Note(f"downloading {LLAMA} at {hub.sha(LLAMA)[:12]}: 278 kB in 8 files")

    def test_reports_progress_that_never_goes_back_and_ends_at_the_total(
        self, faulty: FaultyHub, cache: Path, tiny_models: Path
    ) -> None:
        total = sum(file.size for file in models.files_of(tiny_models / models.LLAMA))
        progress = [event for event in pull(cache) if isinstance(event, Progress)]
        done = [event.done for event in progress]
        assert {(event.name, event.total) for event in progress} == {("download", total)}
        assert done == sorted(set(done)) and done[-1] == total

    def test_of_a_commit_moves_no_branch(self, hub: Hub, faulty: FaultyHub, cache: Path) -> None:
        sha = hub.sha(LLAMA)
        assert download(LLAMA, sha, cache, lambda _: None, QUICK).revision == sha
        assert not ref(cache, LLAMA).parent.exists()

    def test_repeated_downloads_nothing(self, faulty: FaultyHub, cache: Path) -> None:
        pull(cache)
        faulty.heal()
        events = pull(cache)
        assert faulty.asked(part="/resolve/") == 0
        assert isinstance(events[0], Note) and events[0].message.endswith("278 kB of it already here")

    def test_brings_only_what_an_mlx_engine_loads(
        self, hub: Hub, faulty: FaultyHub, cache: Path, tmp_path: Path
    ) -> None:
        files = {"config__json": CONFIG, "tokenizer__json": b"{}", "model__safetensors": safetensors(9)}
        hub.add("tiny-org/mixed", made(tmp_path / "mixed", **files, model__gguf=b"x", pytorch_model__bin=b"x"))
        snapshot = download("tiny-org/mixed", None, cache, lambda _: None, QUICK)
        assert {path.name for path in snapshot.path.iterdir()} == {
            "config.json",
            "tokenizer.json",
            "model.safetensors",
        }

    def test_leaves_stderr_and_the_environment_alone(
        self, faulty: FaultyHub, cache: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        before = dict(os.environ)
        faulty.fail(Answer(503), part="/resolve/", times=1)
        pull(cache)
        assert dict(os.environ) == before
        assert capfd.readouterr() == ("", "")

    def test_gives_huggingface_hub_its_own_client_back(self, faulty: FaultyHub, cache: Path) -> None:
        from huggingface_hub.utils import _http

        faulty.fail(refusal(404, "RepoNotFound"))
        refused(cache)
        assert _http._GLOBAL_CLIENT_FACTORY is _http.default_client_factory


class TestWhatIsThereAlready:
    def test_is_not_downloaded_again_after_a_failure(self, faulty: FaultyHub, cache: Path) -> None:
        faulty.fail(Answer(500), method="GET", part="model-00002")
        assert refused(cache).code == "hub_error"
        assert isinstance(find(cache, LLAMA), Skipped)
        faulty.heal()
        pull(cache)
        assert faulty.asked("GET", "/resolve/") == 1

    def test_and_cut_off_is_downloaded_anew(self, faulty: FaultyHub, cache: Path) -> None:
        pull(cache)
        snapshot = find(cache, LLAMA)
        assert isinstance(snapshot, Snapshot)
        weights = snapshot.path / "model-00001-of-00002.safetensors"
        with weights.resolve().open("r+b") as file:
            file.truncate(100)
        events = pull(cache)
        assert [event.level for event in events if isinstance(event, Note)].count("warning") >= 1
        assert completeness(snapshot.path) is None

    def test_stays_the_branch_until_the_newer_one_is_complete(
        self, hub: Hub, faulty: FaultyHub, cache: Path, tiny_models: Path
    ) -> None:
        old = hub.add("tiny-org/moves", tiny_models / models.QWEN)
        pull(cache, "tiny-org/moves")
        new = hub.update("tiny-org/moves", tiny_models / models.QWEN_B)
        faulty.fail(Answer(500), method="GET", part="model.safetensors")
        refused(cache, "tiny-org/moves")
        assert ref(cache, "tiny-org/moves").read_text() == old
        found = find(cache, "tiny-org/moves")
        assert isinstance(found, Snapshot) and found.revision == old
        faulty.heal()
        assert download("tiny-org/moves", "main", cache, lambda _: None, QUICK).revision == new
        assert ref(cache, "tiny-org/moves").read_text() == new


class TestARefusal:
    @pytest.mark.parametrize(
        ("answer", "code"),
        [
            (refusal(401), "unauthorized"),
            (refusal(401, message="Invalid credentials in Authorization header"), "unauthorized"),
            (refusal(401, "GatedRepo"), "gated_repo"),
            (refusal(403, "GatedRepo"), "gated_repo"),
            (refusal(403), "unauthorized"),
            (refusal(401, "RepoNotFound"), "repo_not_found"),
            (refusal(404, "RepoNotFound"), "repo_not_found"),
            (refusal(404), "repo_not_found"),
            (refusal(404, "RevisionNotFound"), "revision_not_found"),
            (refusal(400), "hub_error"),
            (refusal(403, message="Access to this resource is disabled."), "unauthorized"),
            (Answer(200, {}, b"<html>Log in to the hotel's network</html>"), "hub_error"),
            (Answer(200, {}, b'{"sha": "main", "siblings": []}'), "hub_error"),
            (Answer(200, {}, b"[]"), "hub_error"),
        ],
    )
    def test_has_its_code_and_is_not_asked_again(
        self, faulty: FaultyHub, cache: Path, answer: Answer, code: str
    ) -> None:
        faulty.fail(answer)
        error = refused(cache)
        assert isinstance(error, DownloadFailed)
        assert error.code == code
        assert faulty.asked() == 1
        assert not cache.exists()

    @pytest.mark.parametrize("code", ["GatedRepo", ""])
    def test_for_want_of_a_token_tells_where_to_log_in(self, faulty: FaultyHub, cache: Path, code: str) -> None:
        faulty.fail(refusal(401, code))
        hint = refused(cache).hint
        assert "hf auth login" in hint and "on the host that downloads" in hint

    def test_of_the_files_alone_is_one_too(self, faulty: FaultyHub, cache: Path) -> None:
        # As huggingface.co does for gated repositories: everybody may see the list.
        faulty.fail(refusal(403, "GatedRepo"), part="/resolve/")
        assert refused(cache).code == "gated_repo"

    @pytest.mark.parametrize("token", ["hf_" + "Canary0123456789", "a-mirrors-canary"])
    def test_never_repeats_the_token_nor_the_hubs_control_characters(
        self, faulty: FaultyHub, cache: Path, monkeypatch: pytest.MonkeyPatch, token: str
    ) -> None:
        monkeypatch.setenv("HF_TOKEN", token)
        faulty.fail(refusal(403, message=f"\x1b[31mno, {token} may not " + "x" * 5000))
        error = refused(cache)
        assert f"Bearer {token}" in faulty.requests[0].headers.values(), "the canary is the token"
        assert token not in repr(error.to_wire())
        assert len(error.why) < 300 and error.why.isprintable()

    @pytest.mark.parametrize(("repo_id", "revision"), [("../etc/x", None), ("org", None), (LLAMA, "../../x")])
    def test_of_an_impossible_name_needs_no_hub(
        self, faulty: FaultyHub, cache: Path, repo_id: str, revision: str | None
    ) -> None:
        assert refused(cache, repo_id, revision).code in {"repo_not_found", "revision_not_found"}
        assert faulty.asked() == 0

    def test_of_another_format_comes_before_the_download(
        self, hub: Hub, faulty: FaultyHub, cache: Path, tmp_path: Path
    ) -> None:
        hub.add("tiny-org/torch", made(tmp_path / "torch", config__json=b"{}", pytorch_model__bin=b"x"))
        error = refused(cache, "tiny-org/torch")
        assert isinstance(error, Refused) and error.code == "not_mlx"
        assert faulty.asked(part="/resolve/") == 0 and not cache.exists()

    def test_does_not_meet_safetensors_of_torch(self, hub: Hub, faulty: FaultyHub, cache: Path, tmp_path: Path) -> None:
        """Engines convert those while they load them; `init` alone passes over them."""
        files = {"config__json": b"{}", "tokenizer__json": b"{}", "model__safetensors": safetensors(9, "pt")}
        hub.add("tiny-org/pt", made(tmp_path / "pt", **files))
        snapshot = download("tiny-org/pt", None, cache, lambda _: None, QUICK)
        found = find(cache, "tiny-org/pt")
        assert isinstance(found, Skipped) and found.whole == snapshot
        assert found.why == "not MLX: safetensors in PyTorch's format"

    @pytest.mark.parametrize("name", ["adapter_config.json", "model_index.json", "params.json"])
    def test_of_what_is_no_model_comes_before_the_download(
        self, hub: Hub, faulty: FaultyHub, cache: Path, tmp_path: Path, name: str
    ) -> None:
        repo = f"tiny-org/no-model-{name.partition('_')[0].removesuffix('.json')}"
        files = {name.replace(".", "__"): b"{}", "adapters__safetensors": safetensors(9)}
        hub.add(repo, made(tmp_path / "no-model", **files))
        assert refused(cache, repo).code == "not_mlx"
        assert faulty.asked(part="/resolve/") == 0 and not cache.exists()

    def test_for_want_of_disk_space_has_the_numbers(self, faulty: FaultyHub, cache: Path) -> None:
        huge = {"rfilename": "model.safetensors", "size": 10**17, "blobId": "b" * 40}
        config: dict[str, Any] = {"rfilename": "config.json", "size": 5, "blobId": "c" * 40}
        info = {"id": LLAMA, "sha": "a" * 40, "siblings": [huge, config]}
        faulty.fail(Answer(200, {"Content-Type": "application/json"}, json.dumps(info).encode()))
        error = refused(cache)
        assert isinstance(error, Refused) and error.code == "disk_full"
        assert "100000.0 TB to download" in error.message and error.details["needed_bytes"] == 10**17 + config["size"]
        assert faulty.asked() == 1

    def test_of_the_cache_folder_is_told(self, faulty: FaultyHub, cache: Path) -> None:
        cache.parent.mkdir()
        cache.write_text("a file where a folder should be")
        assert refused(cache).code == "cache_not_writable"


class TestAPostponement:
    @pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
    @pytest.mark.parametrize("part", ["/api/", "/resolve/"])
    def test_is_waited_out(self, faulty: FaultyHub, cache: Path, status: int, part: str) -> None:
        faulty.fail(Answer(status), part=part, times=1)
        events = pull(cache)
        assert isinstance(find(cache, LLAMA), Snapshot)
        assert [event for event in events if isinstance(event, Note) and f"answers {status}" in event.message]

    @pytest.mark.parametrize(("status", "code"), [(429, "rate_limited"), (500, "hub_error"), (503, "hub_error")])
    def test_without_end_is_given_up(self, faulty: FaultyHub, cache: Path, status: int, code: str) -> None:
        faulty.fail(Answer(status))
        assert refused(cache).code == code
        assert faulty.asked() == QUICK.tries

    def test_is_as_long_as_the_hub_says(self, faulty: FaultyHub, cache: Path) -> None:
        faulty.fail(Answer(429, {"Retry-After": "1"}), times=1)
        started = time.monotonic()
        pull(cache, timeouts=DownloadTimeouts(backoff=0.01, longest_wait=30))
        assert time.monotonic() - started >= 1

    @pytest.mark.parametrize("part", ["/api/", "/resolve/"])
    @pytest.mark.parametrize("wish", ["86400", "-1", "Wed, 21 Oct 2015 07:28:00 GMT", "9" * 400])
    def test_is_never_longer_than_we_like(self, faulty: FaultyHub, cache: Path, wish: str, part: str) -> None:
        faulty.fail(Answer(429, {"Retry-After": wish}), part=part, times=1)
        started = time.monotonic()
        pull(cache)
        assert time.monotonic() - started < 20


class TestABadLine:
    def test_that_is_dead_is_unreachable(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free_port()}")
        assert refused(cache).code == "hub_unreachable"

    def test_that_never_answers_is_unreachable(self, faulty: FaultyHub, cache: Path) -> None:
        faulty.fail(Stall())
        assert refused(cache, timeouts=DownloadTimeouts(answer=0.2, tries=2, backoff=0.01)).code == "hub_unreachable"

    def test_that_huggingface_hub_may_not_use_is_unreachable(
        self, faulty: FaultyHub, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        error = refused(cache)
        assert (error.code, faulty.asked()) == ("hub_unreachable", 0)
        assert "HF_HUB_OFFLINE" in error.why

    def test_that_is_cut_is_taken_up_again(self, faulty: FaultyHub, cache: Path) -> None:
        faulty.fail(Cut(after=1000), method="GET", part="model-00001", times=1)
        events = pull(cache)
        assert isinstance(find(cache, LLAMA), Snapshot)
        done = [event.done for event in events if isinstance(event, Progress)]
        assert done == sorted(set(done))

    def test_that_stands_still_is_given_up_and_leaves_nothing_half(self, faulty: FaultyHub, cache: Path) -> None:
        faulty.fail(Stall(after=1000), method="GET", part="model-00002")
        started = time.monotonic()
        error = refused(cache, timeouts=DownloadTimeouts(stall=1, backoff=0.01))
        assert error.code == "download_stalled"
        assert time.monotonic() - started < 10, "our own deadline, not huggingface_hub's 65 s"
        assert not list(cache.rglob("*.incomplete")) and not ref(cache, LLAMA).exists()

    def test_that_brings_other_bytes_is_noticed_and_heals(self, faulty: FaultyHub, cache: Path) -> None:
        faulty.fail(Lie(), method="GET", part="model-00002", times=1)
        error = refused(cache)
        assert error.code == "incomplete_download"
        assert "model-00002-of-00002.safetensors" in error.why
        assert not ref(cache, LLAMA).exists()
        pull(cache)
        assert isinstance(find(cache, LLAMA), Snapshot)


def answer(document: object, **headers: str) -> Answer:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Answer(200, {"Content-Type": "application/json", **named}, json.dumps(document).encode())


def described(sha: str, *names: str, size: object = 5) -> Answer:
    """A repository of weights, and of other files of the same size."""
    siblings = [
        {"rfilename": name, "size": size, "blobId": "ab" * 20} for name in ("model.safetensors", "config.json", *names)
    ]
    return answer({"id": LLAMA, "sha": sha, "siblings": siblings})


OUR_WORDS = "found where it comes in, and not left to whatever huggingface_hub happens to check later"


class TestAHubThatLies:
    @pytest.mark.parametrize(
        "hostile", ["/{victim}", "../../../{name}", "a/../../../../{name}", "./{name}", "a//{name}"]
    )
    def test_of_names_deletes_nothing(self, faulty: FaultyHub, cache: Path, hostile: str) -> None:
        victim = cache / "registry.json"
        (models.repo_folder(cache, LLAMA) / "snapshots" / ("c" * 40)).mkdir(parents=True)
        victim.write_text("what must not go")
        faulty.fail(described("c" * 40, hostile.format(victim=str(victim)[1:], name=victim.name)), part="/api/")
        error = refused(cache)
        assert (error.code, error.exit.value) == ("hub_error", 8)
        assert victim.read_text() == "what must not go"
        with pytest.raises(DownloadFailed) as caught:
            verify(LLAMA, "c" * 40, cache, lambda _: None, QUICK)
        assert caught.value.code == "hub_error" and victim.exists()
        assert faulty.asked(part="/resolve/") == 0

    @pytest.mark.parametrize(
        "name",
        ["", "/", "a/", "..", "a\\b", "a\0b", "a\nb", "\x1b[31m", "\ud800", "a\u2028b", "x" * 256, "ä" * 128, None, 7],
    )
    def test_of_a_name_is_told(self, name: object) -> None:
        with pytest.raises(InvalidAnswer) as caught:
            check_name(name)
        assert str(caught.value).isprintable()

    @pytest.mark.parametrize(
        "name", [".gitattributes", "a/b.json", "..x", "-rf", "模型 1.json", "x" * 255, "at 3.04.05\u202fPM.png"]
    )
    def test_is_not_taken_for_one_that_has_strange_files(self, name: str) -> None:
        assert check_name(name) == name

    @pytest.mark.parametrize("outside", ["../victim", "{tmp_path}/victim", "snapshots/../../victim"])
    def test_could_not_even_then_delete(self, tmp_path: Path, outside: str) -> None:
        """The victim is the test's own, whatever the path: without this wall it is gone, and nothing else."""
        folder, victim = tmp_path / "models--a--b", tmp_path / "victim"
        (folder / "snapshots").mkdir(parents=True)
        victim.write_text("what must not go")
        with pytest.raises(InvalidAnswer):
            _remove_file(folder, folder / outside.format(tmp_path=tmp_path))
        assert victim.exists()

    @pytest.mark.parametrize("sha", ["../../x", "c" * 39, "C" * 40, "c" * 40 + "\n"])
    def test_of_the_commit_is_told(self, faulty: FaultyHub, cache: Path, sha: str) -> None:
        faulty.fail(described(sha))
        assert refused(cache).code == "hub_error"
        assert not cache.exists()

    def test_of_which_commit_was_asked_for_is_told(self, faulty: FaultyHub, cache: Path) -> None:
        faulty.fail(described("c" * 40))
        assert refused(cache, revision="d" * 40).code == "hub_error"

    @pytest.mark.parametrize("size", [-5, "5", 1e400])
    def test_of_a_size_is_told(self, faulty: FaultyHub, cache: Path, size: object) -> None:
        faulty.fail(described("c" * 40, size=size))
        assert refused(cache).code == "hub_error"

    @pytest.mark.parametrize(
        "entry",
        [
            {"path": "../../../../victim", "oid": "ab" * 20},
            {"path": "model.safetensors", "oid": "../../../../victim"},
            {
                "path": "model.safetensors",
                "oid": "ab" * 20,
                "lfs": {"oid": "../../victim", "size": 5, "pointerSize": 1},
            },
        ],
    )
    def test_of_names_in_what_huggingface_hub_asks_by_itself_is_told(
        self, hub: Hub, faulty: FaultyHub, cache: Path, entry: dict[str, object]
    ) -> None:
        faulty.fail(described(hub.sha(LLAMA)), part="/revision/")
        faulty.fail(answer([{"type": "file", "size": 5, **entry}]), part="/tree/")
        error = refused(cache)
        assert error.code == "hub_error" and ("it names a" in error.why or "it calls the" in error.why), OUR_WORDS
        assert faulty.asked(part="/resolve/") == 0

    @pytest.mark.parametrize(
        "headers",
        [
            {"ETag": '"../../../../evil"'},
            {"ETag": '"ab"', "X_Linked_Etag": '"../../evil"'},
            {"ETag": '"ab"', "X_Xet_Hash": "../../evil"},
            {"ETag": '"ab"', "X_Repo_Commit": "../../../evil"},
        ],
    )
    def test_of_what_a_file_is_called_writes_nothing_elsewhere(
        self, hub: Hub, faulty: FaultyHub, cache: Path, headers: dict[str, str]
    ) -> None:
        faulty.fail(answer({}, **{"X_Repo_Commit": hub.sha(LLAMA), **headers}), part="/resolve/")
        error = refused(cache)
        assert error.code == "hub_error" and ("it names a" in error.why or "it calls the" in error.why), OUR_WORDS
        assert not list(cache.parent.parent.rglob("*evil*"))

    @pytest.mark.parametrize("body", [b"[" * 200_000, b'{"sha": "\\ud800"}', b'{"siblings": 7}', b"\xff\xfe"])
    @pytest.mark.parametrize("part", ["/api/models/tiny-org/tiny-llama/revision/", "/tree/"])
    def test_in_another_form_is_told_and_not_asked_again(
        self, faulty: FaultyHub, cache: Path, body: bytes, part: str
    ) -> None:
        faulty.fail(Answer(200, {"Content-Type": "application/json"}, body), part=part)
        assert refused(cache).code == "hub_error"
        assert faulty.asked(part=part) == 1

    def test_about_where_it_is_is_told_and_not_asked_again(self, faulty: FaultyHub, cache: Path) -> None:
        faulty.fail(Answer(302, {"Location": "file:///dev/null"}))
        assert refused(cache).code == "hub_error"
        assert faulty.asked() == 1


class TestAnAnswerWithoutEnd:
    def test_is_read_so_far_and_no_further(self, faulty: FaultyHub, cache: Path) -> None:
        faulty.fail(Endless(b" " * 65536), part="/api/")
        error = refused(cache)
        assert error.code == "hub_error" and "more than 67.1 MB" in error.why
        assert faulty.sent < MAX_ANSWER_BYTES + 16 * 1024 * 1024, "the rest is what sockets hold"

    @pytest.mark.parametrize("fault", [Endless(b" ", 0.05), EndlessHead(0.05)], ids=["its body", "its head"])
    def test_that_trickles_has_a_deadline(self, faulty: FaultyHub, cache: Path, fault: Endless | EndlessHead) -> None:
        faulty.fail(fault, part="/api/")
        started = time.monotonic()
        error = refused(cache, timeouts=DownloadTimeouts(answer=0.5, tries=2, backoff=0.01))
        assert error.code in {"hub_error", "hub_unreachable"}
        assert time.monotonic() - started < 10

    def test_for_a_file_ends_where_the_largest_does(self, faulty: FaultyHub, cache: Path, tiny_models: Path) -> None:
        faulty.fail(Endless(), method="GET", part="model-00002")
        assert refused(cache).code == "hub_error"
        largest = max(file.size for file in models.files_of(tiny_models / models.LLAMA))
        left = [path.stat().st_size for path in cache.rglob("*") if path.is_file()]
        assert max(left) <= largest and faulty.sent < largest + 16 * 1024 * 1024
        assert not list(cache.rglob("*.incomplete"))

    def test_packed_is_not_unpacked(self, faulty: FaultyHub, cache: Path) -> None:
        packed = gzip.compress(bytes(200_000_000), 1)
        faulty.fail(Answer(200, {"Content-Type": "application/json", "Content-Encoding": "gzip"}, packed))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert refused(cache).code == "hub_error"
        unit = 1 if sys.platform == "darwin" else 1024
        assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit < 100_000_000


class TestProgress:
    def test_is_reported_a_few_times_a_second(self) -> None:
        events: list[Event] = []
        bar = DownloadProgress(events.append, 10**6, HubClient(QUICK, None)).bars(0)(
            total=0, desc="Reconstructing", unit="B"
        )
        for _ in range(10_000):
            bar.update(10)
        assert 1 <= len(events) <= 3

    def test_of_a_repeated_try_does_not_go_back(self) -> None:
        events: list[Event] = []
        progress = DownloadProgress(events.append, 1000, HubClient(QUICK, None))
        first = progress.bars(0)(unit="B")
        progress._next = 0
        first.update(800)
        second = progress.bars(100)(unit="B")
        progress._next = 0
        second.update(50)
        progress._next = 0
        second.update(750)
        progress.finish()
        assert [event.done for event in events if isinstance(event, Progress)] == [0, 800, 900, 1000]

    def test_counts_what_is_written_not_what_is_transferred(self) -> None:
        events: list[Event] = []
        progress = DownloadProgress(events.append, 1000, HubClient(QUICK, None))
        network = progress.bars(0)(unit="B", desc="Downloading bytes")
        progress._next = 0
        network.update(500)
        assert [event.done for event in events if isinstance(event, Progress)] == [0]
