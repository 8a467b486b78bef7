"""The comparison of the gateway's files with the hosts' ports, and the entries to paste."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from mlxops.control.client import HostTarget
from mlxops.control.gateway.check import check
from mlxops.control.gateway.entries import as_yaml, entries_to_paste
from mlxops.core.errors import Refused, Unreachable
from mlxops.core.hold import RetrySettings
from mlxops.core.replies import HostReply
from mlxops.core.settings import Settings
from tests.control.gatewayfiles import ENTRY, read_config, served, target


class TestCheck:
    def test_host_without_faults_has_no_error(self, tmp_path: Path) -> None:
        config = read_config(tmp_path, ENTRY)
        (reply,) = check(config, [target()], [served()])
        assert reply.error is None
        assert reply.result is not None
        rows = reply.result.aliases
        assert [(row.alias, row.sends, row.verdict) for row in rows] == [("jerry-xl", "jerry-xl", "ok")]

    def test_localhost_is_resolved(self, tmp_path: Path) -> None:
        config = read_config(tmp_path, ENTRY.replace("127.0.0.1", "localhost"))
        (reply,) = check(config, [target()], [served()])
        assert reply.error is None, reply.result

    @pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "[::ffff:127.0.0.1]", "LOCALHOST"])
    def test_every_address_of_this_machine_is_recognized(self, tmp_path: Path, host: str) -> None:
        config = read_config(tmp_path, ENTRY.replace("127.0.0.1", host))
        (reply,) = check(config, [target()], [served()])
        assert (reply.error, reply.result and reply.result.findings) == (None, ())

    def test_huge_token_limit_is_ignored(self, tmp_path: Path) -> None:
        config = read_config(tmp_path, ENTRY + f"    model_info: {{max_input_tokens: 0x{'f' * 5000}}}\n")
        (reply,) = check(config, [target()], [served()])
        assert reply.error is None, reply.result

    def test_unreachable_host_keeps_its_error_and_the_files_findings(self, tmp_path: Path) -> None:
        config = read_config(tmp_path, ENTRY.replace("openai/jerry-xl", "openai/other"))
        down = Unreachable("host_down", "studio is down")
        (reply,) = check(config, [target()], [HostReply("studio", error=down)])
        assert reply.error is down
        assert reply.result is not None
        assert [finding.code for finding in reply.result.findings] == ["wrong_name"]

    def test_state_of_another_version_is_unknown(self, tmp_path: Path) -> None:
        (reply,) = check(read_config(tmp_path, ENTRY), [target()], [served(state="new", owner="new")])
        assert reply.result is not None and reply.error is None
        assert [(row.state, row.owner) for row in reply.result.aliases] == [("unknown", None)]

    def test_hint_of_a_finding_names_its_host(self, tmp_path: Path) -> None:
        config = read_config(tmp_path, ENTRY)
        other = replace(target(), flags=" --host studio")
        (reply,) = check(config, [other], [served(state="idle", owner=None)])
        assert reply.result is not None
        hints = [finding.hint for finding in reply.result.findings]
        assert hints[0].startswith("mlxctl load --host studio MODEL 8100;")

    def test_printed_yaml_has_only_a_model_list(self) -> None:
        for env in (False, True):
            text = as_yaml(entries_to_paste([target()], RetrySettings(), env=env))
            assert list(yaml.safe_load(text)) == ["model_list"]

    def test_host_without_slots_has_nothing_to_print(self) -> None:
        with pytest.raises(Refused, match="nothing to print"):
            entries_to_paste([HostTarget("studio", None, (), Settings())], RetrySettings(), env=False)
