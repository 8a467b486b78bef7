"""Downloads with the real huggingface_hub from a test hub, through a proxy that misbehaves on request."""

from __future__ import annotations

import gzip
import json
import os
import resource
import sys
import time
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
"""Long limits for slow machines, short pauses between tries."""


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
    assert error.why and error.hint, "each error has a reason and a hint"
    assert "\n" not in error.message + error.why + error.hint
    return error


def ref(cache: Path, repo_id: str, branch: str = "main") -> Path:
    return models.repo_folder(cache, repo_id) / "refs" / branch


def made(folder: Path, **files: bytes) -> Path:
    """Create a folder with these files. `__` in a name stands for a dot."""
    folder.mkdir()
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_bytes(content)
    return folder


def safetensors(size: int, written_by: str = "mlx") -> bytes:
    tensor = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
    header = json.dumps({"__metadata__": {"format": written_by}, "w": tensor}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(size)


CONFIG = b'{"model_type": "qwen3", "quantization": {"group_size": 64, "bits": 4}}'


class TestDownload:
    def test_download_is_complete_and_sets_main(self, hub: Hub, faulty: FaultyHub, cache: Path) -> None:
        snapshot = download(LLAMA, None, cache, lambda _: None, QUICK)
        assert snapshot == find(cache, LLAMA)
        assert snapshot.revision == hub.sha(LLAMA) == ref(cache, LLAMA).read_text()
        assert snapshot.path == models.repo_folder(cache, LLAMA) / "snapshots" / snapshot.revision
        assert completeness(snapshot.path) is None

    def test_download_announces_its_size(self, hub: Hub, faulty: FaultyHub, cache: Path) -> None:
        first = pull(cache)[0]
        assert first == Note(f"downloading {LLAMA} at {hub.sha(LLAMA)[:12]}: 278 kB in 8 files")

    def test_progress_grows_and_ends_at_the_total(self, faulty: FaultyHub, cache: Path, tiny_models: Path) -> None:
        total = sum(file.size for file in models.files_of(tiny_models / models.LLAMA))
        progress = [event for event in pull(cache) if isinstance(event, Progress)]
        done = [event.done for event in progress]
        assert {(event.name, event.total) for event in progress} == {("download", total)}
        assert done == sorted(set(done)) and done[-1] == total

    def test_download_of_a_commit_moves_no_branch(self, hub: Hub, faulty: FaultyHub, cache: Path) -> None:
        sha = hub.sha(LLAMA)
        assert download(LLAMA, sha, cache, lambda _: None, QUICK).revision == sha
        assert not ref(cache, LLAMA).parent.exists()

    def test_repeated_download_transfers_nothing(self, faulty: FaultyHub, cache: Path) -> None:
        pull(cache)
        faulty.heal()
        events = pull(cache)
        assert faulty.asked(part="/resolve/") == 0
        assert isinstance(events[0], Note) and events[0].message.endswith("278 kB of it already here")

    def test_only_files_for_mlx_engines_are_downloaded(
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

    def test_stderr_and_environment_stay_unchanged(
        self, faulty: FaultyHub, cache: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        before = dict(os.environ)
        faulty.fail(Answer(503), part="/resolve/", times=1)
        pull(cache)
        assert dict(os.environ) == before
        assert capfd.readouterr() == ("", "")

    def test_huggingface_hub_gets_its_own_client_back(self, faulty: FaultyHub, cache: Path) -> None:
        from huggingface_hub.utils import _http

        faulty.fail(refusal(404, "RepoNotFound"))
        refused(cache)
        assert _http._GLOBAL_CLIENT_FACTORY is _http.default_client_factory


class TestPresentFiles:
    def test_complete_files_are_kept_after_a_failure(self, faulty: FaultyHub, cache: Path) -> None:
        faulty.fail(Answer(500), method="GET", part="model-00002")
        assert refused(cache).code == "hub_error"
        assert isinstance(find(cache, LLAMA), Skipped)
        faulty.heal()
        pull(cache)
        assert faulty.asked("GET", "/resolve/") == 1

    def test_truncated_file_is_downloaded_again(self, faulty: FaultyHub, cache: Path) -> None:
        pull(cache)
        snapshot = find(cache, LLAMA)
        assert isinstance(snapshot, Snapshot)
        weights = snapshot.path / "model-00001-of-00002.safetensors"
        with weights.resolve().open("r+b") as file:
            file.truncate(100)
        events = pull(cache)
        assert [event.level for event in events if isinstance(event, Note)].count("warning") >= 1
        assert completeness(snapshot.path) is None

    def test_branch_moves_only_when_the_new_commit_is_complete(
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


class TestRefusal:
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
    def test_refusal_has_its_code_and_is_not_retried(
        self, faulty: FaultyHub, cache: Path, answer: Answer, code: str
    ) -> None:
        faulty.fail(answer)
        error = refused(cache)
        assert isinstance(error, DownloadFailed)
        assert error.code == code
        assert faulty.asked() == 1
        assert not cache.exists()

    @pytest.mark.parametrize("code", ["GatedRepo", ""])
    def test_missing_token_hint_names_the_login_command(self, faulty: FaultyHub, cache: Path, code: str) -> None:
        faulty.fail(refusal(401, code))
        hint = refused(cache).hint
        assert "hf auth login" in hint and "on the host that downloads" in hint

    def test_refusal_of_only_the_files_is_reported(self, faulty: FaultyHub, cache: Path) -> None:
        # As huggingface.co does for gated repositories: the list of files is public.
        faulty.fail(refusal(403, "GatedRepo"), part="/resolve/")
        assert refused(cache).code == "gated_repo"

    @pytest.mark.parametrize("token", ["hf_" + "Canary0123456789", "a-mirrors-canary"])
    def test_error_contains_no_token_and_no_control_characters(
        self, faulty: FaultyHub, cache: Path, monkeypatch: pytest.MonkeyPatch, token: str
    ) -> None:
        monkeypatch.setenv("HF_TOKEN", token)
        faulty.fail(refusal(403, message=f"\x1b[31mno, {token} may not " + "x" * 5000))
        error = refused(cache)
        assert f"Bearer {token}" in faulty.requests[0].headers.values(), "the canary is the token"
        assert token not in repr(error.to_wire())
        assert len(error.why) < 300 and error.why.isprintable()

    @pytest.mark.parametrize(("repo_id", "revision"), [("../etc/x", None), ("org", None), (LLAMA, "../../x")])
    def test_invalid_name_is_refused_without_the_hub(
        self, faulty: FaultyHub, cache: Path, repo_id: str, revision: str | None
    ) -> None:
        assert refused(cache, repo_id, revision).code in {"repo_not_found", "revision_not_found"}
        assert faulty.asked() == 0

    def test_other_format_is_refused_before_the_download(
        self, hub: Hub, faulty: FaultyHub, cache: Path, tmp_path: Path
    ) -> None:
        hub.add("tiny-org/torch", made(tmp_path / "torch", config__json=b"{}", pytorch_model__bin=b"x"))
        error = refused(cache, "tiny-org/torch")
        assert isinstance(error, Refused) and error.code == "not_mlx"
        assert faulty.asked(part="/resolve/") == 0 and not cache.exists()

    def test_safetensors_of_pytorch_are_downloaded(
        self, hub: Hub, faulty: FaultyHub, cache: Path, tmp_path: Path
    ) -> None:
        """Engines convert them while they load them. Only `init` skips them."""
        files = {"config__json": b"{}", "tokenizer__json": b"{}", "model__safetensors": safetensors(9, "pt")}
        hub.add("tiny-org/pt", made(tmp_path / "pt", **files))
        snapshot = download("tiny-org/pt", None, cache, lambda _: None, QUICK)
        found = find(cache, "tiny-org/pt")
        assert isinstance(found, Skipped) and found.whole == snapshot
        assert found.why == "not MLX: safetensors in PyTorch's format"

    @pytest.mark.parametrize("name", ["adapter_config.json", "model_index.json", "params.json"])
    def test_repository_without_model_is_refused_before_the_download(
        self, hub: Hub, faulty: FaultyHub, cache: Path, tmp_path: Path, name: str
    ) -> None:
        repo = f"tiny-org/no-model-{name.partition('_')[0].removesuffix('.json')}"
        files = {name.replace(".", "__"): b"{}", "adapters__safetensors": safetensors(9)}
        hub.add(repo, made(tmp_path / "no-model", **files))
        assert refused(cache, repo).code == "not_mlx"
        assert faulty.asked(part="/resolve/") == 0 and not cache.exists()

    def test_lack_of_disk_space_is_reported_in_bytes(self, faulty: FaultyHub, cache: Path) -> None:
        huge = {"rfilename": "model.safetensors", "size": 10**17, "blobId": "b" * 40}
        config: dict[str, Any] = {"rfilename": "config.json", "size": 5, "blobId": "c" * 40}
        info = {"id": LLAMA, "sha": "a" * 40, "siblings": [huge, config]}
        faulty.fail(Answer(200, {"Content-Type": "application/json"}, json.dumps(info).encode()))
        error = refused(cache)
        assert isinstance(error, Refused) and error.code == "disk_full"
        assert "100000.0 TB to download" in error.message and error.details["needed_bytes"] == 10**17 + config["size"]
        assert faulty.asked() == 1

    def test_unusable_cache_folder_is_reported(self, faulty: FaultyHub, cache: Path) -> None:
        cache.parent.mkdir()
        cache.write_text("a file where a folder should be")
        assert refused(cache).code == "cache_not_writable"


class TestTemporaryFailure:
    @pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
    @pytest.mark.parametrize("part", ["/api/", "/resolve/"])
    def test_temporary_failure_is_retried(self, faulty: FaultyHub, cache: Path, status: int, part: str) -> None:
        faulty.fail(Answer(status), part=part, times=1)
        events = pull(cache)
        assert isinstance(find(cache, LLAMA), Snapshot)
        assert [event for event in events if isinstance(event, Note) and f"answers {status}" in event.message]

    @pytest.mark.parametrize(("status", "code"), [(429, "rate_limited"), (500, "hub_error"), (503, "hub_error")])
    def test_retries_end(self, faulty: FaultyHub, cache: Path, status: int, code: str) -> None:
        faulty.fail(Answer(status))
        assert refused(cache).code == code
        assert faulty.asked() == QUICK.tries

    def test_pause_has_the_length_that_the_hub_asks_for(self, faulty: FaultyHub, cache: Path) -> None:
        faulty.fail(Answer(429, {"Retry-After": "1"}), times=1)
        started = time.monotonic()
        pull(cache, timeouts=DownloadTimeouts(backoff=0.01, longest_wait=30))
        assert time.monotonic() - started >= 1

    @pytest.mark.parametrize("part", ["/api/", "/resolve/"])
    @pytest.mark.parametrize("seconds", ["86400", "-1", "Wed, 21 Oct 2015 07:28:00 GMT", "9" * 400])
    def test_pause_has_a_maximum(self, faulty: FaultyHub, cache: Path, seconds: str, part: str) -> None:
        faulty.fail(Answer(429, {"Retry-After": seconds}), part=part, times=1)
        started = time.monotonic()
        pull(cache)
        assert time.monotonic() - started < 20


class TestConnection:
    def test_refused_connection_is_reported(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free_port()}")
        assert refused(cache).code == "hub_unreachable"

    def test_silent_hub_is_reported_as_unreachable(self, faulty: FaultyHub, cache: Path) -> None:
        faulty.fail(Stall())
        assert refused(cache, timeouts=DownloadTimeouts(answer=0.2, tries=2, backoff=0.01)).code == "hub_unreachable"

    def test_offline_mode_is_reported_as_unreachable(
        self, faulty: FaultyHub, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        error = refused(cache)
        assert (error.code, faulty.asked()) == ("hub_unreachable", 0)
        assert "HF_HUB_OFFLINE" in error.why

    def test_interrupted_download_is_retried(self, faulty: FaultyHub, cache: Path) -> None:
        faulty.fail(Cut(after=1000), method="GET", part="model-00001", times=1)
        events = pull(cache)
        assert isinstance(find(cache, LLAMA), Snapshot)
        done = [event.done for event in events if isinstance(event, Progress)]
        assert done == sorted(set(done))

    def test_stalled_download_fails_and_leaves_no_partial_files(self, faulty: FaultyHub, cache: Path) -> None:
        faulty.fail(Stall(after=1000), method="GET", part="model-00002")
        started = time.monotonic()
        error = refused(cache, timeouts=DownloadTimeouts(stall=1, backoff=0.01))
        assert error.code == "download_stalled"
        assert time.monotonic() - started < 10, "our own limit, not the 65 s of huggingface_hub"
        assert not list(cache.rglob("*.incomplete")) and not ref(cache, LLAMA).exists()

    def test_wrong_content_is_detected_and_downloaded_again(self, faulty: FaultyHub, cache: Path) -> None:
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
    """Return the hub's description of a repository with weights and other files, all of the same size."""
    siblings = [
        {"rfilename": name, "size": size, "blobId": "ab" * 20} for name in ("model.safetensors", "config.json", *names)
    ]
    return answer({"id": LLAMA, "sha": sha, "siblings": siblings})


OWN_CHECK = "our own check of the answer finds it, before any check in huggingface_hub"


class TestHostileHub:
    @pytest.mark.parametrize(
        "hostile", ["/{victim}", "../../../{name}", "a/../../../../{name}", "./{name}", "a//{name}"]
    )
    def test_hostile_names_delete_nothing(self, faulty: FaultyHub, cache: Path, hostile: str) -> None:
        victim = cache / "registry.json"
        (models.repo_folder(cache, LLAMA) / "snapshots" / ("c" * 40)).mkdir(parents=True)
        victim.write_text("must stay")
        faulty.fail(described("c" * 40, hostile.format(victim=str(victim)[1:], name=victim.name)), part="/api/")
        error = refused(cache)
        assert (error.code, error.exit.value) == ("hub_error", 8)
        assert victim.read_text() == "must stay"
        with pytest.raises(DownloadFailed) as caught:
            verify(LLAMA, "c" * 40, cache, lambda _: None, QUICK)
        assert caught.value.code == "hub_error" and victim.exists()
        assert faulty.asked(part="/resolve/") == 0

    @pytest.mark.parametrize(
        "name",
        ["", "/", "a/", "..", "a\\b", "a\0b", "a\nb", "\x1b[31m", "\ud800", "a\u2028b", "x" * 256, "ä" * 128, None, 7],
    )
    def test_invalid_name_is_rejected(self, name: object) -> None:
        with pytest.raises(InvalidAnswer) as caught:
            check_name(name)
        assert str(caught.value).isprintable()

    @pytest.mark.parametrize(
        "name", [".gitattributes", "a/b.json", "..x", "-rf", "模型 1.json", "x" * 255, "at 3.04.05\u202fPM.png"]
    )
    def test_unusual_name_is_accepted(self, name: str) -> None:
        assert check_name(name) == name

    @pytest.mark.parametrize("outside", ["../victim", "{tmp_path}/victim", "snapshots/../../victim"])
    def test_path_outside_of_the_repository_is_not_removed(self, tmp_path: Path, outside: str) -> None:
        """All paths lead to a file of this test, so a failure of the check deletes nothing else."""
        folder, victim = tmp_path / "models--a--b", tmp_path / "victim"
        (folder / "snapshots").mkdir(parents=True)
        victim.write_text("must stay")
        with pytest.raises(InvalidAnswer):
            _remove_file(folder, folder / outside.format(tmp_path=tmp_path))
        assert victim.exists()

    @pytest.mark.parametrize("sha", ["../../x", "c" * 39, "C" * 40, "c" * 40 + "\n"])
    def test_invalid_commit_is_rejected(self, faulty: FaultyHub, cache: Path, sha: str) -> None:
        faulty.fail(described(sha))
        assert refused(cache).code == "hub_error"
        assert not cache.exists()

    def test_other_commit_than_requested_is_rejected(self, faulty: FaultyHub, cache: Path) -> None:
        faulty.fail(described("c" * 40))
        assert refused(cache, revision="d" * 40).code == "hub_error"

    @pytest.mark.parametrize("size", [-5, "5", 1e400])
    def test_invalid_size_is_rejected(self, faulty: FaultyHub, cache: Path, size: object) -> None:
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
    def test_invalid_names_in_the_listing_are_rejected(
        self, hub: Hub, faulty: FaultyHub, cache: Path, entry: dict[str, object]
    ) -> None:
        faulty.fail(described(hub.sha(LLAMA)), part="/revision/")
        faulty.fail(answer([{"type": "file", "size": 5, **entry}]), part="/tree/")
        error = refused(cache)
        assert error.code == "hub_error" and ("it names a" in error.why or "it calls the" in error.why), OWN_CHECK
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
    def test_hostile_headers_write_nothing_elsewhere(
        self, hub: Hub, faulty: FaultyHub, cache: Path, headers: dict[str, str]
    ) -> None:
        faulty.fail(answer({}, **{"X_Repo_Commit": hub.sha(LLAMA), **headers}), part="/resolve/")
        error = refused(cache)
        assert error.code == "hub_error" and ("it names a" in error.why or "it calls the" in error.why), OWN_CHECK
        assert not list(cache.parent.parent.rglob("*evil*"))

    @pytest.mark.parametrize("body", [b"[" * 200_000, b'{"sha": "\\ud800"}', b'{"siblings": 7}', b"\xff\xfe"])
    @pytest.mark.parametrize("part", ["/api/models/tiny-org/tiny-llama/revision/", "/tree/"])
    def test_malformed_answer_is_not_retried(self, faulty: FaultyHub, cache: Path, body: bytes, part: str) -> None:
        faulty.fail(Answer(200, {"Content-Type": "application/json"}, body), part=part)
        assert refused(cache).code == "hub_error"
        assert faulty.asked(part=part) == 1

    def test_redirect_to_a_file_is_not_retried(self, faulty: FaultyHub, cache: Path) -> None:
        faulty.fail(Answer(302, {"Location": "file:///dev/null"}))
        assert refused(cache).code == "hub_error"
        assert faulty.asked() == 1


class TestEndlessAnswer:
    def test_answer_has_a_maximum_size(self, faulty: FaultyHub, cache: Path) -> None:
        faulty.fail(Endless(b" " * 65536), part="/api/")
        error = refused(cache)
        assert error.code == "hub_error" and "more than 67.1 MB" in error.why
        assert faulty.sent < MAX_ANSWER_BYTES + 16 * 1024 * 1024, "the rest is in socket buffers"

    @pytest.mark.parametrize("fault", [Endless(b" ", 0.05), EndlessHead(0.05)], ids=["its body", "its head"])
    def test_slow_answer_has_a_deadline(self, faulty: FaultyHub, cache: Path, fault: Endless | EndlessHead) -> None:
        faulty.fail(fault, part="/api/")
        started = time.monotonic()
        error = refused(cache, timeouts=DownloadTimeouts(answer=0.5, tries=2, backoff=0.01))
        assert error.code in {"hub_error", "hub_unreachable"}
        assert time.monotonic() - started < 10

    def test_file_has_the_largest_listed_size_as_limit(self, faulty: FaultyHub, cache: Path, tiny_models: Path) -> None:
        faulty.fail(Endless(), method="GET", part="model-00002")
        assert refused(cache).code == "hub_error"
        largest = max(file.size for file in models.files_of(tiny_models / models.LLAMA))
        left = [path.stat().st_size for path in cache.rglob("*") if path.is_file()]
        assert max(left) <= largest and faulty.sent < largest + 16 * 1024 * 1024
        assert not list(cache.rglob("*.incomplete"))

    def test_compressed_answer_is_not_decoded(self, faulty: FaultyHub, cache: Path) -> None:
        packed = gzip.compress(bytes(200_000_000), 1)
        faulty.fail(Answer(200, {"Content-Type": "application/json", "Content-Encoding": "gzip"}, packed))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert refused(cache).code == "hub_error"
        unit = 1 if sys.platform == "darwin" else 1024
        assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit < 100_000_000


class TestProgress:
    def test_progress_is_reported_a_few_times_a_second(self) -> None:
        events: list[Event] = []
        bar = DownloadProgress(events.append, 10**6, HubClient(QUICK, None)).bars(0)(
            total=0, desc="Reconstructing", unit="B"
        )
        for _ in range(10_000):
            bar.update(10)
        assert 1 <= len(events) <= 3

    def test_progress_does_not_shrink_on_a_retry(self) -> None:
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

    def test_progress_counts_written_not_received_bytes(self) -> None:
        events: list[Event] = []
        progress = DownloadProgress(events.append, 1000, HubClient(QUICK, None))
        network = progress.bars(0)(unit="B", desc="Downloading bytes")
        progress._next = 0
        network.update(500)
        assert [event.done for event in events if isinstance(event, Progress)] == [0]
