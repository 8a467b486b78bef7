"""Snapshots in Hugging Face caches: complete, incomplete, of other formats, and hostile."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlxops.agent.hub.cache import Scan, Skipped, Snapshot, completeness, find, inspect, roots, scan
from mlxops.agent.paths import default_hub
from tests.lab.models import install_snapshot, repo_folder

REPO = "org/model"
OLD, NEW = "a" * 40, "b" * 40
SHARDS = tuple(f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3))
QUANTIZED = {"model_type": "qwen3", "quantization": {"group_size": 64, "bits": 6}}


def safetensors(size: int = 40, written_by: str | None = "mlx") -> bytes:
    header: dict[str, object] = {"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}
    if written_by:
        header["__metadata__"] = {"format": written_by}
    encoded = json.dumps(header).encode()
    return len(encoded).to_bytes(8, "little") + encoded + bytes(size)


def model(folder: Path, config: object = QUANTIZED, written_by: str | None = "mlx", shards: int = 1) -> Path:
    """Create the folder of a complete model."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "README.md").write_text("---\nlicense: mit\n---\nA model.\n")
    if shards == 1:
        (folder / "model.safetensors").write_bytes(safetensors(written_by=written_by))
        return folder
    for name in SHARDS:
        (folder / name).write_bytes(safetensors(written_by=written_by))
    index = {"weight_map": {f"layer.{number}": name for number, name in enumerate(SHARDS)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    folder = tmp_path / "hf" / "hub"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return model(tmp_path / "source")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return model(tmp_path / "sharded", shards=3)


def only_snapshot(found: Scan) -> Snapshot:
    assert not found.skipped
    (snapshot,) = found.snapshots
    return snapshot


def only_skipped(found: Scan) -> Skipped:
    assert not found.snapshots
    (skipped,) = found.skipped
    return skipped


def why(hub: Path) -> tuple[str, bool]:
    skipped = only_skipped(scan(hub))
    assert find(hub, REPO) == skipped, "find and scan agree"
    return skipped.why, skipped.incomplete


class TestRoots:
    @pytest.mark.parametrize(
        ("environ", "folder"),
        [
            ({"HOME": "/h"}, "/h/.cache/huggingface/hub"),
            ({"HOME": "/h", "XDG_CACHE_HOME": "/x"}, "/x/huggingface/hub"),
            ({"HOME": "/h", "XDG_CACHE_HOME": "/x", "HF_HOME": "/y"}, "/y/hub"),
            ({"HOME": "/h", "HF_HOME": "~/models/hf"}, "/h/models/hf/hub"),
            ({"HOME": "/h", "HF_HOME": "$DISK/hf", "DISK": "/d"}, "/d/hf/hub"),
            ({"HOME": "/h", "HF_HOME": "/y", "HUGGINGFACE_HUB_CACHE": "/z"}, "/z"),
            ({"HOME": "/h", "HF_HOME": "/y", "HUGGINGFACE_HUB_CACHE": "/z", "HF_HUB_CACHE": "/w"}, "/w"),
        ],
    )
    def test_hub_is_where_huggingface_hub_keeps_it(self, environ: dict[str, str], folder: str) -> None:
        assert default_hub(environ) == Path(folder)

    def test_parent_folder_with_models_is_a_root(self, hub: Path, source: Path) -> None:
        assert roots(hub) == (hub,)
        install_snapshot(hub.parent, REPO, source)
        assert roots(hub) == (hub, hub.parent)
        shutil.rmtree(hub)
        assert roots(hub) == (hub.parent,)
        assert only_snapshot(scan(hub)).path.is_relative_to(hub.parent / "models--org--model")

    def test_missing_hub_has_no_models(self, tmp_path: Path) -> None:
        assert scan(tmp_path / "no" / "hub") == Scan((), ())
        assert find(tmp_path / "no" / "hub", REPO) is None


class TestCompleteSnapshot:
    @pytest.mark.parametrize(("trees", "xet"), [(False, False), (True, False), (True, True), (False, True)])
    @pytest.mark.parametrize("shards", [1, 3])
    def test_complete_snapshot_is_found_in_every_layout(
        self, hub: Path, source: Path, sharded: Path, trees: bool, xet: bool, shards: int
    ) -> None:
        directory = source if shards == 1 else sharded
        path = install_snapshot(hub, REPO, directory, OLD, trees=trees, xet=xet)
        snapshot = only_snapshot(scan(hub))
        distinct = {file.read_bytes() for file in directory.iterdir()}
        assert snapshot == Snapshot(REPO, OLD, path, sum(map(len, distinct)))
        assert find(hub, REPO) == snapshot
        assert completeness(path) is None

    def test_card_and_pictures_may_be_missing(self, hub: Path, source: Path) -> None:
        (source / "picture.png").write_bytes(b"x")
        path = install_snapshot(hub, REPO, source, trees=True)
        (path / "README.md").unlink()
        (path / "picture.png").unlink()
        only_snapshot(scan(hub))

    def test_weights_that_no_engine_loads_may_be_missing(self, hub: Path, source: Path) -> None:
        (source / "original").mkdir()
        for name in ("consolidated.safetensors", "original/model.safetensors", "model.gguf", "adapter.safetensors"):
            (source / name).write_bytes(b"not downloaded")
        path = install_snapshot(hub, REPO, source, trees=True)
        for name in ("consolidated.safetensors", "original/model.safetensors", "model.gguf", "adapter.safetensors"):
            (path / name).unlink()
        only_snapshot(scan(hub))

    def test_main_is_preferred_to_a_newer_snapshot(self, hub: Path, source: Path) -> None:
        install_snapshot(hub, REPO, source, OLD)
        os.utime(install_snapshot(hub, REPO, source, NEW, ref=None), (2e9, 2e9))
        assert only_snapshot(scan(hub)).revision == OLD

    @pytest.mark.parametrize("main", ["", "junk\n", "c" * 40, "\x00" * 40, "a" * 1000])
    def test_newest_snapshot_replaces_an_unusable_main(self, hub: Path, source: Path, main: str) -> None:
        os.utime(install_snapshot(hub, REPO, source, OLD), (1e9, 1e9))
        install_snapshot(hub, REPO, source, NEW, ref=None)
        (repo_folder(hub, REPO) / "refs" / "main").write_text(main)
        assert only_snapshot(scan(hub)).revision == NEW

    def test_complete_snapshot_replaces_an_incomplete_main(self, hub: Path, source: Path) -> None:
        install_snapshot(hub, REPO, source, OLD)
        (install_snapshot(hub, REPO, source, NEW) / "model.safetensors").unlink()
        snapshot = only_snapshot(scan(hub))
        assert snapshot.revision == OLD
        assert find(hub, REPO) == snapshot

    def test_hub_is_preferred_to_its_parent_if_complete(self, hub: Path, source: Path) -> None:
        outer = install_snapshot(hub.parent, REPO, source, OLD)
        inner = install_snapshot(hub, REPO, source, NEW)
        assert only_snapshot(scan(hub)).path == inner
        (inner / "model.safetensors").unlink()
        assert only_snapshot(scan(hub)).path == outer
        assert find(hub, REPO) == only_snapshot(scan(hub))


class TestRevision:
    def test_revision_is_found_by_commit_prefix_and_branch(self, hub: Path, source: Path) -> None:
        install_snapshot(hub, REPO, source, OLD, ref="refs-of/a-branch")
        install_snapshot(hub, REPO, source, NEW)
        for revision, sha in ((OLD, OLD), (OLD[:7], OLD), (NEW[:12], NEW), ("refs-of/a-branch", OLD), ("main", NEW)):
            found = find(hub, REPO, revision)
            assert isinstance(found, Snapshot) and found.revision == sha, revision

    def test_missing_revision_returns_none(self, hub: Path, source: Path) -> None:
        install_snapshot(hub, REPO, source, OLD)
        install_snapshot(hub, REPO, source, OLD[:39] + "b", ref=None)
        for revision in ("c" * 40, OLD[:6], OLD[:7], "v1", "../refs/main", "-x", "", "refs"):
            assert find(hub, REPO, revision) is None, revision

    def test_incomplete_revision_is_reported(self, hub: Path, source: Path) -> None:
        (install_snapshot(hub, REPO, source, OLD) / "config.json").unlink()
        found = find(hub, REPO, OLD)
        assert isinstance(found, Skipped) and found.incomplete

    @pytest.mark.parametrize("repo_id", ["org", "org/a/b", "../x", "a--b/c", "", "org/model/../x"])
    def test_invalid_repository_returns_none(self, hub: Path, source: Path, repo_id: str) -> None:
        install_snapshot(hub, REPO, source)
        assert find(hub, repo_id) is None


class TestIncompleteSnapshot:
    def test_interrupted_download_is_reported(self, hub: Path, source: Path) -> None:
        path = install_snapshot(hub, REPO, source)
        weights = (path / "model.safetensors").resolve()
        weights.rename(weights.with_name(weights.name + ".1234abcd.incomplete"))
        (path / "model.safetensors").unlink()
        assert why(hub) == ("incomplete: no weights (*.safetensors)", True)

    @pytest.mark.parametrize("trees", [False, True])
    def test_missing_shard_is_reported(self, hub: Path, sharded: Path, trees: bool) -> None:
        (install_snapshot(hub, REPO, sharded, trees=trees) / SHARDS[1]).unlink()
        assert why(hub) == (f"incomplete: {SHARDS[1]} is missing", True)

    def test_missing_shard_is_reported_without_an_index(self, hub: Path, sharded: Path) -> None:
        path = install_snapshot(hub, REPO, sharded)
        (path / "model.safetensors.index.json").unlink()
        only_snapshot(scan(hub))
        (path / SHARDS[2]).unlink()
        assert why(hub) == (f"incomplete: {SHARDS[2]} is missing", True)

    @pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
    @pytest.mark.parametrize(("trees", "xet"), [(False, False), (True, False), (True, True)])
    def test_dangling_link_is_reported(self, hub: Path, source: Path, name: str, trees: bool, xet: bool) -> None:
        (install_snapshot(hub, REPO, source, trees=trees, xet=xet) / name).resolve().unlink()
        assert why(hub) == (f"incomplete: {name} is missing", True)

    def test_truncated_tokenizer_is_reported(self, hub: Path, source: Path) -> None:
        (source / "tokenizer.json").write_text('{"vocab": 1}')
        path = install_snapshot(hub, REPO, source, trees=True)
        (path / "tokenizer.json").resolve().write_text('{"vocab"')
        assert why(hub) == ("incomplete: tokenizer.json has 8 of 12 bytes", True)

    def test_repository_without_snapshots_is_reported(self, hub: Path) -> None:
        (repo_folder(hub, REPO) / "blobs").mkdir(parents=True)
        assert why(hub) == ("incomplete: no snapshot", True)

    @pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"])
    def test_unreadable_config_is_reported(self, hub: Path, source: Path, content: bytes) -> None:
        path = install_snapshot(hub, REPO, source)
        (path / "config.json").resolve().write_bytes(content)
        reason, _ = why(hub)
        assert "config.json is not" in reason or "config.json: it is UTF-16" in reason

    def test_too_long_weights_are_reported(self, hub: Path, source: Path) -> None:
        path = install_snapshot(hub, REPO, source)
        with (path / "model.safetensors").open("ab") as file:
            file.write(b"more")
        reason, incomplete = why(hub)
        assert "model.safetensors has" in reason and incomplete

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_weights_truncated_at_any_byte_are_reported(self, hub: Path, source: Path, data: st.DataObject) -> None:
        whole = safetensors()
        path = install_snapshot(hub, REPO, source)
        cut = data.draw(st.integers(0, len(whole) - 1))
        (path / "model.safetensors").resolve().write_bytes(whole[:cut])
        assert completeness(path) is not None
        assert only_skipped(scan(hub)).incomplete
        (path / "model.safetensors").resolve().write_bytes(whole)
        assert completeness(path) is None

    @pytest.mark.parametrize("total", [0, 8, -8, None], ids=["right", "too much", "too little", "missing"])
    @pytest.mark.parametrize("cut", [0, 1, 60, 10**6])
    def test_truncated_shard_is_reported_with_any_index(
        self, hub: Path, sharded: Path, total: int | None, cut: int
    ) -> None:
        """An old cache without the hub's listing. If the sum in the index is right, no header is read."""
        path = install_snapshot(hub, REPO, sharded)
        index = json.loads((path / "model.safetensors.index.json").read_text())
        weights = {name: (path / name).read_bytes() for name in set(index["weight_map"].values())}
        tensors = sum(len(data) - 8 - int.from_bytes(data[:8], "little") for data in weights.values())
        metadata = {} if total is None else {"metadata": {"total_size": tensors + total}}
        (path / "model.safetensors.index.json").resolve().write_text(json.dumps({**metadata, **index}))
        name = sorted(weights)[1]
        (path / name).unlink()  # its content is that of the others too
        (path / name).write_bytes(weights[name][: max(0, len(weights[name]) - cut)])
        if cut:
            reason, incomplete = why(hub)
            assert name in reason and incomplete
        else:
            assert only_snapshot(scan(hub)).path == path

    @pytest.mark.parametrize(
        "content",
        [
            (2**63).to_bytes(8, "little") + b"{}",
            (2).to_bytes(8, "little") + b"[]",
            (9).to_bytes(8, "little") + b'{"w": {}}',
            (9).to_bytes(8, "little") + b"not json!",
            json.dumps({"version": "https://git-lfs.github.com/spec/v1"}).encode(),
        ],
    )
    def test_invalid_weight_header_is_reported(self, hub: Path, source: Path, content: bytes) -> None:
        path = install_snapshot(hub, REPO, source)
        (path / "model.safetensors").resolve().write_bytes(content)
        reason, incomplete = why(hub)
        assert reason.startswith("incomplete: model.safetensors ") and incomplete

    def test_completeness_detects_wrong_header_of_right_size(self, hub: Path, source: Path) -> None:
        path = install_snapshot(hub, REPO, source, trees=True)
        weights = (path / "model.safetensors").resolve()
        weights.write_bytes(b"\xff" * weights.stat().st_size)
        assert completeness(path) is not None
        assert any("model.safetensors" in problem for problem in inspect(path).problems)

    @pytest.mark.parametrize("named", ["../../../../etc/passwd", "sub/model.safetensors", "", 7, [], None])
    def test_paths_in_the_index_are_ignored(self, hub: Path, source: Path, named: object) -> None:
        """Engines do not read the index, and no path in it is opened."""
        (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": named}}))
        install_snapshot(hub, REPO, source)
        only_snapshot(scan(hub))

    @pytest.mark.parametrize(
        "listing", ["", "[]", '{"format_version": 2, "files": {}}', '{"format_version": 1, "files": {"x": 1}}']
    )
    def test_headers_decide_if_the_hubs_listing_is_unusable(self, hub: Path, source: Path, listing: str) -> None:
        path = install_snapshot(hub, REPO, source, OLD, trees=True)
        (repo_folder(hub, REPO) / "trees" / f"{OLD}.json").write_text(listing)
        only_snapshot(scan(hub))
        with (path / "model.safetensors").resolve().open("r+b") as file:
            file.truncate(20)
        assert why(hub)[1]


class TestFormat:
    def weights(self, folder: Path, **names: bytes) -> Path:
        (folder / "model.safetensors").unlink()
        for name, content in names.items():
            (folder / name.replace("__", ".")).write_bytes(content)
        return folder

    @pytest.mark.parametrize("trees", [False, True])
    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            ("pytorch_model__bin", "not MLX: PyTorch weights (pytorch_model.bin)"),
            ("model-Q4_K_M__gguf", "not MLX: GGUF (model-Q4_K_M.gguf)"),
            ("weights__npz", "not MLX: weights of an MLX older than safetensors (weights.npz)"),
        ],
    )
    def test_other_weight_format_is_named(self, hub: Path, source: Path, name: str, reason: str, trees: bool) -> None:
        install_snapshot(hub, REPO, self.weights(source, **{name: b"x"}), trees=trees)
        assert why(hub) == (reason, False)

    def test_consolidated_weights_are_not_mlx(self, hub: Path, source: Path) -> None:
        install_snapshot(hub, REPO, self.weights(source, consolidated__safetensors=safetensors()), trees=True)
        assert why(hub) == ("not MLX: the repository has no weights (*.safetensors)", False)

    def test_repository_without_weights_is_not_incomplete(self, hub: Path, source: Path) -> None:
        install_snapshot(hub, REPO, self.weights(source), trees=True)
        assert why(hub) == ("not MLX: the repository has no weights (*.safetensors)", False)

    @pytest.mark.parametrize(
        ("written_by", "reason"),
        [
            ("pt", "not MLX: safetensors in PyTorch's format"),
            (None, "not MLX: neither its safetensors nor its README.md mention MLX"),
        ],
    )
    def test_safetensors_of_other_libraries_are_reported(
        self, hub: Path, tmp_path: Path, written_by: str | None, reason: str
    ) -> None:
        install_snapshot(hub, REPO, model(tmp_path / "m", config={}, written_by=written_by))
        assert why(hub) == (reason, False)

    @pytest.mark.parametrize("bits", ["4", None, 0, True])
    def test_other_quantization_does_not_prove_mlx(self, hub: Path, tmp_path: Path, bits: object) -> None:
        config = {"quantization": {"group_size": 64, "bits": bits}, "quantization_config": {"bits": 4}}
        install_snapshot(hub, REPO, model(tmp_path / "m", config=config, written_by="pt"))
        assert why(hub)[0].startswith("not MLX")

    def test_weight_metadata_proves_mlx(self, hub: Path, tmp_path: Path) -> None:
        install_snapshot(hub, REPO, model(tmp_path / "m", config={}, written_by="mlx"))
        only_snapshot(scan(hub))

    def test_quantization_proves_mlx(self, hub: Path, tmp_path: Path) -> None:
        install_snapshot(hub, REPO, model(tmp_path / "m", written_by=None))
        only_snapshot(scan(hub))

    def test_organisation_proves_mlx(self, hub: Path, tmp_path: Path) -> None:
        install_snapshot(hub, "mlx-community/m", model(tmp_path / "m", config={}, written_by=None))
        only_snapshot(scan(hub))

    @pytest.mark.parametrize(
        ("card", "is_mlx"),
        [
            ("---\nlibrary_name: mlx\n---\n", True),
            ("---\nlicense: mit\ntags:\n- text\n- mlx\n---\n", True),
            ("---\ntags: [text, mlx]\n---\n", True),
            ('---\r\nlibrary_name: "mlx"\r\n---\r\n', True),
            ("---\nlicense: mit\n---\nlibrary_name: mlx\n", False),
            ("---\nlibrary_name: mlx-lm-not\n---\n", False),
            ("library_name: mlx\n", False),
            ("---\n" * 100_000, False),
        ],
    )
    def test_model_card_proves_mlx(self, hub: Path, tmp_path: Path, card: str, is_mlx: bool) -> None:
        directory = model(tmp_path / "m", config={}, written_by=None)
        (directory / "README.md").write_text(card)
        install_snapshot(hub, REPO, directory)
        assert isinstance(find(hub, REPO), Snapshot) == is_mlx


class TestHostileContents:
    def test_other_folders_are_ignored(self, hub: Path, source: Path) -> None:
        path = install_snapshot(hub, REPO, source, xet=True)
        for folder in (".locks/models--org--other", "datasets--org--d", "spaces--org--s", "tmp"):
            (hub / folder).mkdir(parents=True)
        for file in ("registry.json", "version.txt", "CACHEDIR.TAG", "models--a--file", ".DS_Store"):
            (hub / file).write_text("{}")
        assert only_snapshot(scan(hub)).path == path

    @pytest.mark.parametrize(
        "name", ["models--a--b--c", "models--gpt2", "models--", "models--a--..", "models--\x1b[1m--b"]
    )
    def test_invalid_repository_name_is_reported(self, hub: Path, name: str) -> None:
        (hub / name / "snapshots" / OLD).mkdir(parents=True)
        skipped = only_skipped(scan(hub))
        assert skipped.why == "its name is not that of a repository org/name"
        assert skipped.repo_id.isprintable() and skipped.repo_id.isascii()

    @pytest.mark.parametrize("target", ["/nowhere/else", "models--a--link"], ids=["a disk that is away", "a loop"])
    def test_dangling_links_are_reported_and_hide_no_model(self, hub: Path, source: Path, target: str) -> None:
        path = install_snapshot(hub, REPO, source)
        for name in ("models--a--link", "models--z--link"):
            (hub / name).symlink_to(target)
        found = scan(hub)
        assert [each.path for each in found.snapshots] == [path]
        assert [each.why for each in found.skipped] == [f"a link to {target}, which does not exist"] * 2
        assert find(hub, "a/link") == find(hub, "a/link", OLD) == found.skipped[0]

    @pytest.mark.skipif(os.uname().sysname == "Darwin", reason="macOS has no file names that are not UTF-8")
    def test_undecodable_name_is_reported(self, hub: Path, source: Path) -> None:
        os.mkdir(os.fsencode(hub) + b"/models--a--\xff")
        assert only_skipped(scan(hub)).repo_id == "models--a--\\udcff"
        path = install_snapshot(hub, REPO, source)
        os.symlink("nowhere", os.fsencode(path) + b"/model-\xff.safetensors")
        found = find(hub, REPO)
        assert isinstance(found, Skipped) and found.why == "incomplete: model-\\udcff.safetensors is missing"

    @pytest.mark.parametrize("part", ["snapshots", "refs/main", "refs", "trees", f"trees/{OLD}.json", "blobs"])
    @pytest.mark.parametrize("kind", ["file", "folder", "pipe", "loop", "nowhere"])
    def test_odd_files_instead_of_folders_neither_raise_nor_block(
        self, hub: Path, source: Path, part: str, kind: str
    ) -> None:
        install_snapshot(hub, REPO, source, OLD, trees=True)
        replace(repo_folder(hub, REPO) / part, kind)
        found = scan(hub)
        assert len(found.snapshots) + len(found.skipped) == 1
        assert find(hub, REPO) == (*found.snapshots, *found.skipped)[0]
        find(hub, REPO, "main")
        find(hub, REPO, OLD)

    @pytest.mark.parametrize(
        "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors", "README.md", "."]
    )
    @pytest.mark.parametrize("kind", ["file", "folder", "pipe", "loop", "nowhere"])
    @pytest.mark.parametrize("trees", [False, True])
    def test_odd_files_instead_of_files_neither_raise_nor_block(
        self, hub: Path, tmp_path: Path, name: str, kind: str, trees: bool
    ) -> None:
        path = install_snapshot(hub, REPO, model(tmp_path / "m", config={}, written_by=None), trees=trees)
        replace(path / name, kind)
        assert not scan(hub).snapshots
        inspect(path)
        completeness(path)

    def test_too_large_files_are_not_read(self, hub: Path, source: Path) -> None:
        path = install_snapshot(hub, REPO, source)
        with (path / "config.json").resolve().open("r+b") as file:
            file.truncate(10**12)
        reason, _ = why(hub)
        assert "config.json has 1000000000000 bytes" in reason
        assert inspect(path).problems

    def test_folder_loops_are_not_followed(self, hub: Path, source: Path) -> None:
        path = install_snapshot(hub, REPO, source)
        (path / "deep" / "/".join("d" * 30)).mkdir(parents=True)
        (path / "up").symlink_to("..")
        only_snapshot(scan(hub))

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
    def test_unreadable_repository_is_reported(self, hub: Path, source: Path) -> None:
        install_snapshot(hub, REPO, source)
        (repo_folder(hub, REPO) / "snapshots").chmod(0)
        try:
            assert why(hub)[0].startswith("cannot be read")
        finally:
            (repo_folder(hub, REPO) / "snapshots").chmod(0o700)

    @settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(content=st.binary(max_size=200), name=st.sampled_from(["config.json", "model.safetensors", "README.md"]))
    def test_arbitrary_bytes_never_raise(self, hub: Path, source: Path, content: bytes, name: str) -> None:
        path = install_snapshot(hub, REPO, source)
        original = (path / name).read_bytes()
        (path / name).resolve().write_bytes(content)
        try:
            scan(hub)
            inspect(path)
        finally:
            (path / name).resolve().write_bytes(original)


def replace(path: Path, kind: str) -> None:
    """Replace a file or folder by something else."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    make: dict[str, Callable[[], object]] = {
        "file": path.touch,
        "folder": path.mkdir,
        "pipe": lambda: os.mkfifo(path),
        "loop": lambda: path.symlink_to(path.name or "x"),
        "nowhere": lambda: path.symlink_to("no/where"),
    }
    make[kind]()


class TestModelFacts:
    def test_facts_come_from_the_config(self, tmp_path: Path) -> None:
        config = {**QUANTIZED, "architectures": ["Qwen3ForCausalLM"], "max_position_embeddings": 40960}
        facts = inspect(model(tmp_path / "m", config=config, shards=3))
        assert (facts.shape.model_type, facts.architectures) == ("qwen3", ("Qwen3ForCausalLM",))
        assert (facts.shape.context_length, facts.quantization) == (40960, "6-bit gs64")
        assert facts.weight_bytes == 3 * len(safetensors())
        assert (facts.model_file, facts.auto_map, facts.has_chat_template, facts.problems) == (None, (), False, ())

    def test_text_config_is_read_too(self, tmp_path: Path) -> None:
        config = {"text_config": {"max_position_embeddings": 131072}}
        assert inspect(model(tmp_path / "m", config=config)).shape.context_length == 131072

    @pytest.mark.parametrize("value", ["8192", 0, -1, True, None, [8192]])
    def test_invalid_numbers_are_ignored(self, tmp_path: Path, value: object) -> None:
        assert inspect(model(tmp_path / "m", config={"max_position_embeddings": value})).shape.context_length is None

    def test_code_named_in_files_is_reported(self, tmp_path: Path) -> None:
        directory = model(tmp_path / "m", config={"model_file": "evil.py", "auto_map": {"AutoConfig": "x.Y"}})
        (directory / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["x.Y", null]}}')
        facts = inspect(directory)
        assert (facts.model_file, facts.auto_map) == ("evil.py", ("config.json", "tokenizer_config.json"))

    @pytest.mark.parametrize("name", ["chat_template.jinja", "chat_template.json"])
    def test_chat_template_file_is_found(self, tmp_path: Path, name: str) -> None:
        directory = model(tmp_path / "m")
        (directory / name).write_text("{}")
        assert inspect(directory).has_chat_template

    def test_chat_template_of_the_tokenizer_is_found(self, tmp_path: Path) -> None:
        directory = model(tmp_path / "m")
        (directory / "tokenizer_config.json").write_text('{"chat_template": "{{ x }}"}')
        assert inspect(directory).has_chat_template

    @pytest.mark.parametrize(
        ("name", "problem"),
        [
            ("config.json", "config.json is missing"),
            ("tokenizer.json", "no tokenizer (tokenizer.json, tokenizer.model, vocab.json)"),
            (SHARDS[0], f"{SHARDS[0]} is missing"),
        ],
    )
    def test_missing_file_is_a_problem(self, tmp_path: Path, name: str, problem: str) -> None:
        directory = model(tmp_path / "m", shards=3)
        (directory / name).unlink()
        assert inspect(directory).problems == (problem,)

    def test_missing_weights_are_a_problem(self, tmp_path: Path) -> None:
        directory = model(tmp_path / "m")
        (directory / "model.safetensors").unlink()
        assert inspect(directory).problems == ("no weights (*.safetensors)",)

    def test_missing_folder_is_a_problem(self, tmp_path: Path) -> None:
        assert inspect(tmp_path / "gone").problems
