"""Edited files of a snapshot are kept, served and mentioned. Truncated files are downloaded again."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from mlxops.agent.hub.cache import Snapshot, completeness, find
from mlxops.agent.hub.download import download, verify, warn_of_edits
from mlxops.agent.hub.snapshot import edited, inspect
from mlxops.core.errors import DownloadFailed, Refused
from mlxops.core.protocol import Event, Note
from tests.agent.test_hub import LLAMA, QUICK
from tests.lab import models
from tests.lab.faultyhub import FaultyHub
from tests.lab.homelab import Homelab, Studio
from tests.lab.hub import Hub
from tests.steps import words_of

QWEN = "tiny-org/tiny-qwen3"

Edit = Callable[[bytes], bytes]


def longer(content: bytes) -> bytes:
    """Edit as a person does: one more key, other indentation."""
    return json.dumps({**json.loads(content), "my_own_setting": "of some length, so that it shows"}, indent=8).encode()


def shorter(content: bytes) -> bytes:
    document = json.loads(content)
    document.pop(sorted(document)[-1])
    return json.dumps(document, separators=(",", ":")).encode()


def as_long(content: bytes) -> bytes:
    return content.replace(b"e", b"E", 1) if b"e" in content else content[::-1]


TEMPLATE = b"{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
EDITS: dict[str, tuple[str, Edit]] = {
    "a longer config": ("config.json", longer),
    "a shorter config": ("config.json", shorter),
    "a config as long as it was": ("config.json", lambda old: old.replace(b"2048", b"1024")),
    "a shorter tokenizer_config": ("tokenizer_config.json", shorter),
    "a template": ("chat_template.jinja", lambda _: TEMPLATE),
    "a longer template": ("chat_template.jinja", lambda old: old + b"{# mine #}\n"),
    "a config with a mistake": ("config.json", lambda old: old.replace(b",", b",,", 1)),
    "a config in UTF-16": ("config.json", lambda old: old.decode().encode("utf-16")),
    "a config with a byte order mark": ("config.json", lambda old: b"\xef\xbb\xbf" + old),
    "a card": ("README.md", lambda _: b"# mine\n"),
}
LOADABLE = {each for each in EDITS if "mistake" not in each and "UTF-16" not in each and "byte order" not in each}


def in_the_blob(file: Path, content: bytes) -> None:
    """Write through the link, like `vi`."""
    file.resolve().write_bytes(content)


def in_its_place(file: Path, content: bytes) -> None:
    """Replace the link by a file, like `sed -i`."""
    file.unlink()
    file.write_bytes(content)


WAYS = {"in the blob": in_the_blob, "in its place": in_its_place}


def warnings(events: list[Event]) -> list[str]:
    return [event.message for event in events if isinstance(event, Note) and event.level == "warning"]


class TestEdit:
    @pytest.mark.parametrize("way", WAYS)
    def test_edit_is_kept_by_download_and_verify(
        self,
        faulty: FaultyHub,
        cache: Path,
        way: str,
    ) -> None:
        snapshot = download(LLAMA, None, cache, lambda _: None, QUICK).path
        for what, (name, edit) in EDITS.items():
            file = snapshot / name
            original = file.read_bytes()
            mine = edit(original)
            WAYS[way](file, mine)
            if what in LOADABLE:
                assert completeness(snapshot) is None, f"{what}: it can be loaded as it is, without a network"
                download(LLAMA, None, cache, lambda _: None, QUICK)
            verify(LLAMA, snapshot.name, cache, lambda _: None, QUICK)
            assert file.read_bytes() == mine, what
            assert [each.name for each in edited(snapshot)] == [name], what
            file.write_bytes(original)

    @pytest.mark.parametrize("trees", [True, False])
    @pytest.mark.parametrize("xet", [True, False])
    @pytest.mark.parametrize("way", WAYS)
    def test_edit_is_found_in_every_layout(
        self, tmp_path: Path, tiny_models: Path, trees: bool, xet: bool, way: str
    ) -> None:
        snapshot = models.install_snapshot(tmp_path, QWEN, tiny_models / models.QWEN, trees=trees, xet=xet)
        assert edited(snapshot) == ()
        WAYS[way](snapshot / "config.json", as_long((snapshot / "config.json").read_bytes()))
        assert [each.name for each in edited(snapshot)] == ["config.json"]

    def test_warning_has_the_commands_that_restore_the_file(
        self,
        faulty: FaultyHub,
        cache: Path,
    ) -> None:
        for way in WAYS.values():
            snapshot = download(LLAMA, None, cache, lambda _: None, QUICK)
            file = snapshot.path / "config.json"
            original = file.read_bytes()
            way(file, longer(original))
            events: list[Event] = []
            warn_of_edits(snapshot, events.append)
            (text,) = warnings(events)
            assert text.startswith("config.json differs from the hub's (")
            assert f"rm {os.path.realpath(file)}; mlxctl pull --repo {LLAMA}@{snapshot.revision}" in text
            os.unlink(os.path.realpath(file))
            download(LLAMA, snapshot.revision, cache, lambda _: None, QUICK)
            assert file.read_bytes() == original and edited(snapshot.path) == ()

    def test_edit_stays_in_its_snapshot_when_the_branch_moves(
        self,
        hub: Hub,
        faulty: FaultyHub,
        cache: Path,
        tiny_models: Path,
    ) -> None:
        repo = "tiny-org/edited-and-moved"
        hub.add(repo, tiny_models / models.QWEN)
        old = download(repo, None, cache, lambda _: None, QUICK).path
        mine = longer((old / "config.json").read_bytes())
        in_the_blob(old / "config.json", mine)
        hub.update(repo, tiny_models / models.QWEN_B)  # the same config.json: the two share the blob
        new = download(repo, None, cache, lambda _: None, QUICK).path
        assert new != old and (old / "config.json").read_bytes() == mine
        assert isinstance(find(cache, repo), Snapshot)

    def test_edited_weights_that_match_their_header_are_kept(
        self,
        faulty: FaultyHub,
        cache: Path,
        tiny_models: Path,
    ) -> None:
        """For example, weights that were quantized again."""
        file = download(QWEN, None, cache, lambda _: None, QUICK).path / "model.safetensors"
        weights = (tiny_models / models.LLAMA / "model-00001-of-00002.safetensors").read_bytes()
        in_its_place(file, weights)
        download(QWEN, None, cache, lambda _: None, QUICK)
        verify(QWEN, file.parent.name, cache, lambda _: None, QUICK)
        assert file.read_bytes() == weights and completeness(file.parent) is None


class TestEditThatLooksTruncated:
    """A missing brace or last line end: the file looks truncated, but is not the beginning of the hub's file."""

    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize(
        ("name", "mine", "served"),
        [
            ("config.json", b'{"model_type": "llama", "mine": 1', False),
            ("chat_template.jinja", b"{% for m in messages %}{{ m.content }}", False),
            ("README.md", b"mine", True),
        ],
    )
    def test_edit_is_kept_with_a_warning(
        self,
        faulty: FaultyHub,
        cache: Path,
        way: str,
        name: str,
        mine: bytes,
        served: bool,
    ) -> None:
        file = download(LLAMA, None, cache, lambda _: None, QUICK).path / name
        WAYS[way](file, mine)
        if served:
            download(LLAMA, None, cache, lambda _: None, QUICK)
        else:
            with pytest.raises(Refused, match="cannot be served") as caught:
                download(LLAMA, None, cache, lambda _: None, QUICK)
            assert f"rm {os.path.realpath(file)}; mlxctl pull" in caught.value.hint
        with contextlib.suppress(DownloadFailed):
            verify(LLAMA, file.parent.name, cache, lambda _: None, QUICK)
        assert file.read_bytes() == mine


class TestUserLink:
    def test_link_to_another_disk_is_served(self, tmp_path: Path, tiny_models: Path) -> None:
        snapshot = models.install_snapshot(tmp_path / "hub", QWEN, tiny_models / models.QWEN, trees=True)
        disk = tmp_path / "disk"
        disk.mkdir()
        os.rename((snapshot / "model.safetensors").resolve(), disk / "big")
        (snapshot / "model.safetensors").unlink()
        (snapshot / "model.safetensors").symlink_to(disk / "big")
        assert isinstance(find(tmp_path / "hub", QWEN), Snapshot) and edited(snapshot) == ()

    def test_link_to_a_missing_disk_is_not_replaced(
        self,
        faulty: FaultyHub,
        cache: Path,
        tmp_path: Path,
    ) -> None:
        snapshot = download(QWEN, None, cache, lambda _: None, QUICK)
        link = snapshot.path / "model.safetensors"
        link.unlink()
        link.symlink_to(tmp_path / "disk" / "big")
        found = find(cache, QWEN)
        assert not isinstance(found, Snapshot) and found is not None and not found.incomplete
        assert found.why == f"cannot be read: model.safetensors is a link to {tmp_path}/disk/big, which does not exist"
        with pytest.raises(Refused) as caught:
            download(QWEN, None, cache, lambda _: None, QUICK)
        assert caught.value.code == "link_broken" and f"rm {link}" in caught.value.hint
        assert link.is_symlink() and os.readlink(link) == str(tmp_path / "disk" / "big")


TEXTS = ["config.json", "tokenizer_config.json", "tokenizer.json", "chat_template.jinja"]


class TestTruncatedFile:
    @pytest.mark.parametrize("name", TEXTS)
    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_file_truncated_at_any_byte_is_incomplete(
        self, tmp_path: Path, tiny_models: Path, name: str, data: st.DataObject
    ) -> None:
        file = models.install_snapshot(tmp_path, QWEN, tiny_models / models.QWEN, trees=True) / name
        whole = (tiny_models / models.QWEN / name).read_bytes()
        cut = data.draw(st.integers(0, len(whole.rstrip()) - 1))
        assume(not whole[:cut].endswith(b"{% endfor %}"))  # what a template says so far may be all that it says
        file.write_bytes(whole[:cut])
        try:
            found = find(tmp_path, QWEN)
            assert found is not None and not isinstance(found, Snapshot) and found.incomplete
            assert found.why.startswith(f"incomplete: {name} has {cut} of "), found.why
        finally:
            file.write_bytes(whole)

    @pytest.mark.parametrize("way", WAYS)
    def test_truncated_file_is_downloaded_again(
        self,
        faulty: FaultyHub,
        cache: Path,
        way: str,
    ) -> None:
        snapshot = download(LLAMA, None, cache, lambda _: None, QUICK).path
        for name in TEXTS:
            file = snapshot / name
            whole = file.read_bytes()
            WAYS[way](file, whole[: len(whole) // 2])
            events: list[Event] = []
            download(LLAMA, None, cache, events.append, QUICK)
            assert file.read_bytes() == whole
            assert any(f"{name} has" in each and "downloading it again" in each for each in warnings(events))

    def test_file_with_lost_bytes_is_downloaded_again(
        self,
        faulty: FaultyHub,
        cache: Path,
    ) -> None:
        file = download(LLAMA, None, cache, lambda _: None, QUICK).path / "config.json"
        whole = file.read_bytes()
        file.resolve().write_bytes(bytes(len(whole)))
        with pytest.raises(DownloadFailed, match="differ from the hub's"):
            verify(LLAMA, file.parent.name, cache, lambda _: None, QUICK)
        download(LLAMA, None, cache, lambda _: None, QUICK)
        assert file.read_bytes() == whole


class TestServerWithEdit:
    """With the real engine, and a hub that is asked if a file is missing."""

    def warned(self, answer: Any, name: str = "config.json") -> bool:
        return f"{name} differs from the hub's" in answer.ok().stderr

    def test_edit_survives_load_restore_and_pull(self, online_homelab: Homelab) -> None:
        studio = online_homelab.studio
        port = studio.ports[0]
        pulled = studio.mlxctl("pull", "--repo", QWEN, "--json").ok().json["hosts"][0]["result"]
        file = Path(pulled["path"]) / "config.json"
        mine = longer(file.read_bytes())
        file.resolve().write_bytes(mine)
        assert self.warned(studio.mlxctl("load", "--model", QWEN, "--port", str(port), env=offline(studio)))
        assert words_of(studio, port, "jerry-xl") is not None
        listed = studio.mlxctl("list", "--json").ok().json["hosts"][0]["models"]
        assert [row["problems"] for row in listed] == [[]]
        assert self.warned(studio.mlxctl("pull", "--repo", QWEN, "--verify"))
        studio.sweep()
        assert self.warned(studio.mlxctl("restore", env=offline(studio)))
        assert words_of(studio, port, "jerry-xl") is not None
        assert file.read_bytes() == mine
        studio.mlxctl("unload", "--port", str(port)).ok()


def offline(studio: Studio) -> dict[str, str]:
    """Make the hub unreachable: no program listens on port 9 ("discard")."""
    return {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("{}".encode("utf-16"), "it is UTF-16; save it as UTF-8"),
        ('{"a": "b"}'.encode("utf-16-le"), "it is UTF-16; save it as UTF-8"),
        (b'{\n"author": "J\xf6rg"}', "it is not UTF-8, in line 2; save it as UTF-8"),
        (b"\xef\xbb\xbf{}", "it begins with a byte order mark; save it as UTF-8 without one"),
    ],
)
def test_config_in_another_encoding_is_reported(homelab: Homelab, content: bytes, text: str) -> None:
    studio = homelab.studio
    config = studio.install(QWEN, models.QWEN) / "config.json"
    blob = config.resolve()
    blob.write_bytes(content)
    assert f"config.json: {text}" in studio.mlxctl("init").ok().stdout
    words = ("load", "--model", QWEN, "--port", str(studio.ports[0]), "--dry-run", "--json")
    error = studio.mlxctl(*words).json["hosts"][0]["error"]
    assert (error["code"], error["why"]) == ("not_servable", f"cannot be read: config.json: {text}")
    assert error["hint"].startswith(f"correct {config}, or restore the hub's file: rm {blob}; mlxctl pull --local")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer_config.json", "tokenizer.json"])
def test_git_lfs_pointer_is_named_and_downloaded_again(
    faulty: FaultyHub,
    cache: Path,
    name: str,
) -> None:
    file = download(QWEN, None, cache, lambda _: None, QUICK).path / name
    whole = file.read_bytes()
    in_its_place(file, models.lfs_pointer("a" * 64, len(whole)))
    assert not isinstance(find(cache, QWEN), Snapshot)
    shutil.rmtree(file.parents[2] / "trees")  # as most caches have none
    assert any(f"{name} is a Git LFS pointer" in each for each in inspect(file.parent).problems)
    download(QWEN, None, cache, lambda _: None, QUICK)
    assert file.read_bytes() == whole


def test_remove_names_edited_files(homelab: Homelab) -> None:
    studio = homelab.studio
    config = studio.install(QWEN, models.QWEN) / "config.json"
    config.resolve().write_bytes(longer(config.read_bytes()))
    studio.mlxctl("init").ok()
    words = ("remove", "--model", QWEN)
    assert "edited by hand would be deleted with them: config.json" in studio.mlxctl(*words, "--dry-run").ok().stderr
    assert config.exists()
    assert "edited by hand were deleted with them: config.json" in studio.mlxctl(*words).ok().stderr
