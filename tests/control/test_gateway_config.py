"""The gateway's files are read as LiteLLM reads them, or refused with the line."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from mlxops.control.gateway.config import key_of
from mlxops.control.gateway.config import read as read_files
from mlxops.control.inventory import Gateway
from mlxops.core.errors import Refused
from mlxops.core.gateway import Impact
from tests.control.gatewayfiles import ENTRY, read_config


class TestConfiguration:
    def test_entry_knows_its_line(self, tmp_path: Path) -> None:
        config = read_config(tmp_path, "# a comment\n" + ENTRY)
        (entry,) = config.entries
        assert (entry.alias, entry.sends, entry.address) == ("jerry-xl", "jerry-xl", ("127.0.0.1", 8100))
        assert entry.place == f"{tmp_path}/router.yaml:3"

    def test_anchors_and_merge_keys_are_followed(self, tmp_path: Path) -> None:
        text = """\
x-common: &common {api_key: none, api_base: "http://127.0.0.1:8100/v1"}
model_list:
- model_name: jerry-xl
  litellm_params: {<<: *common, model: openai/jerry-xl}
"""
        (entry,) = read_config(tmp_path, text).entries
        assert (entry.sends, entry.has_key) == ("jerry-xl", True)

    def test_included_files_are_read(self, tmp_path: Path) -> None:
        (tmp_path / "more").mkdir()
        (tmp_path / "more" / "models.yaml").write_text(ENTRY + "include: [../router.yaml]\n")
        config = read_config(tmp_path, "include: [more/models.yaml]\n")
        assert [entry.alias for entry in config.entries] == ["jerry-xl"]
        assert config.entries[0].place.endswith("more/models.yaml:2")

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("model_list:\n\t- model_name: x\n", ":2 "),
            ("model_list: [\n", "router.yaml:2 "),
            ("model_list: {a: b}\n", "its model_list is not a list"),
            ("- a\n- b\n", "not a mapping"),
            ("", "it is empty"),
            ("!!python/object/apply:os.system ['touch canary']\n", "router.yaml:1 "),
            ("a: \x07\n", "U+0007"),
            (b"a: \xff\n", "not UTF-8"),
            ("a: 2026-99-99\n", "cannot be read as YAML"),
            (f"a: {'[' * 5000}\n", "nested too deeply"),
            ("a: &a {<<: *a}\n", "cannot be read as YAML"),
            ("x" * 600_000, "too large"),
        ],
    )
    def test_unreadable_configuration_is_refused_with_its_line(
        self, tmp_path: Path, text: str | bytes, expected: str
    ) -> None:
        with pytest.raises(Refused) as refused:
            read_config(tmp_path, text)
        assert refused.value.code == "bad_gateway_config"
        assert expected in f"{refused.value.message}: {refused.value.why}"
        assert not Path("canary").exists()

    @pytest.mark.parametrize(
        "bomb",
        [
            "\n".join(
                ["k0: &k0 {a: 1, b: 2}"]
                + [f"k{i}: &k{i} {{<<: [{', '.join([f'*k{i - 1}'] * 40)}], x{i}: 1}}" for i in range(1, 7)]
            ),
            "\n".join(["k0: &k0 [x]"] + [f"k{i}: &k{i} [{', '.join([f'*k{i - 1}'] * 40)}]" for i in range(1, 9)]),
        ],
        ids=["merge keys", "aliases"],
    )
    def test_document_that_unfolds_is_bounded(self, tmp_path: Path, bomb: str) -> None:
        began = time.process_time()
        try:
            config = read_config(tmp_path, ENTRY + bomb + "\n")
        except Refused as error:
            assert error.code == "bad_gateway_config"
        else:
            assert [entry.alias for entry in config.entries] == ["jerry-xl"]
        assert time.process_time() - began < 20

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("x: 1\ninclude: models.yaml\n", ":2 cannot be included: 'include' must be a list of file paths"),
            ("include: [5]\n", ":1 cannot be included: 'include' must be a list of file paths"),
            ("include: [not-there.yaml]\n", "not-there.yaml is not there"),
            ("\ufeffa: 1".encode("utf-16"), "is UTF-16"),
        ],
    )
    def test_include_that_stops_litellm_is_refused(self, tmp_path: Path, text: str | bytes, expected: str) -> None:
        with pytest.raises(Refused) as refused:
            read_config(tmp_path, text)
        assert refused.value.code == "bad_gateway_config"
        assert expected in f"{refused.value.message}: {refused.value.why}"

    def test_repeated_key_is_reported_and_the_last_counts(self, tmp_path: Path) -> None:
        config = read_config(tmp_path, ENTRY.replace("jerry-xl", "old") + "other: 1\n" + ENTRY)
        assert [(entry.alias, entry.place) for entry in config.entries] == [("jerry-xl", f"{tmp_path}/router.yaml:9")]
        (finding,) = config.findings
        assert (finding.code, finding.severity) == ("repeated_key", Impact.WARNING)
        assert "router.yaml:1: this model_list is not seen by LiteLLM: the one in line 8" in finding.message

    def test_key_that_overrides_a_merged_one_is_not_repeated(self, tmp_path: Path) -> None:
        text = "x: &e {model: openai/a, api_key: none}\nmodel_list:\n- model_name: b\n  litellm_params:\n    <<: *e\n"
        config = read_config(tmp_path, text + "    model: openai/b\n")
        assert ([entry.sends for entry in config.entries], config.findings) == (["b"], ())

    def test_named_pipe_is_refused(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "router.yaml")
        with pytest.raises(Refused, match="is not a file"):
            read_files(Gateway(str(tmp_path / "router.yaml"), None, None, None))

    def test_reading_writes_nothing(self, tmp_path: Path) -> None:
        read_config(tmp_path, ENTRY, "A=1\n")
        before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.iterdir()}
        read_files(Gateway(str(tmp_path / "router.yaml"), str(tmp_path / "local.env"), None, None))
        assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.iterdir()} == before


class TestEnvFile:
    @pytest.mark.parametrize("line", ["SECRET-IN-A-BAD-LINE", 'B="SECRET', "if true; then SECRET"])
    def test_bad_line_is_reported_without_its_text(self, tmp_path: Path, line: str) -> None:
        text = ENTRY.replace("openai/jerry-xl", "os.environ/XL").replace("key: none", "key: os.environ/XL_KEY")
        config = read_config(tmp_path, text, f"XL=openai/jerry-xl\n{line}\nXL_KEY=none\n")
        (finding,) = config.findings
        assert (finding.code, finding.severity) == ("env_line", Impact.WARNING)
        assert finding.message.startswith(f"{tmp_path}/local.env:2: ")
        assert "SECRET" not in str(finding)
        assert [(entry.sends, entry.has_key) for entry in config.entries] == [("jerry-xl", True)]

    def test_variables_of_the_configuration_come_from_the_file(self, tmp_path: Path) -> None:
        text = ENTRY.replace("openai/jerry-xl", "os.environ/XL").replace("key: none", "key: os.environ/XL_KEY")
        config = read_config(tmp_path, text, "XL=openai/jerry-xl\nXL_KEY=sk-canary\n")
        assert [(entry.sends, entry.has_key) for entry in config.entries] == [("jerry-xl", True)]
        assert "sk-canary" not in repr(config.entries)

    def test_key_of_the_environment_precedes_the_files(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        gateway = Gateway(None, None, None, "KEY")
        assert key_of(gateway, {"KEY": "of the file"}) == "of the file"
        monkeypatch.setenv("KEY", "of the environment")
        assert key_of(gateway, {"KEY": "of the file"}) == "of the environment"
        assert key_of(Gateway(None, None, None, None), {"KEY": "x"}) is None
