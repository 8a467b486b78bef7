"""The comparison of the gateway's files with the hosts' ports, and the entries to paste."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlxops.control.client import HostTarget
from mlxops.control.gateway.check import check
from mlxops.control.gateway.config import read_if_possible
from mlxops.control.gateway.entries import as_yaml, entries_to_paste
from mlxops.control.inventory import Gateway
from mlxops.core.commands.gateway import ServedPorts
from mlxops.core.errors import Refused, Unreachable
from mlxops.core.litellm import LiteLLMConfig
from mlxops.core.replies import HostReply
from mlxops.core.settings import Settings, SlotOptions
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


class TestPrinted:
    def test_without_a_hold_there_is_only_a_model_list(self) -> None:
        for env in (False, True):
            text = as_yaml(entries_to_paste([target()], [served()], LiteLLMConfig(), env=env))
            assert list(yaml.safe_load(text)) == ["model_list"]

    def test_host_without_slots_has_nothing_to_print(self) -> None:
        with pytest.raises(Refused, match="nothing to print"):
            entries_to_paste([HostTarget("studio", None, (), Settings())], [], LiteLLMConfig(), env=False)

    @pytest.mark.parametrize(
        ("settings", "names"),
        [
            ("", ["jerry-xl"]),
            ("router_settings: {model_group_alias: {best: jerry-xl, other: gpt}}", ["jerry-xl", "best"]),
            ("router_settings: {model_group_alias: {best: {model: jerry-xl, hidden: true}}}", ["jerry-xl", "best"]),
            ("litellm_settings: {model_alias_map: {best: jerry-xl}}", ["jerry-xl", "best"]),
            ("router_settings: {model_group_alias: {best: jerry-xl}, fallbacks: [{best: [gpt]}]}", ["jerry-xl"]),
            ("router_settings: {model_group_alias: {best: jerry-xl}, fallbacks: [{jerry-xl: [gpt]}]}", ["best"]),
        ],
        ids=["none", "synonym", "hidden synonym", "module", "fallback of the synonym", "fallback of the alias"],
    )
    def test_each_name_of_a_client_gets_the_policy(self, tmp_path: Path, settings: str, names: list[str]) -> None:
        document = printed(tmp_path, ENTRY + settings + "\n")
        assert list(document["router_settings"]["model_group_retry_policy"]) == names

    @pytest.mark.parametrize(
        ("entries", "names"),
        [
            ("", ["jerry-xl", "best"]),
            (ENTRY.replace("model_name: jerry-xl", "model_name: mine"), ["jerry-xl", "mine", "best"]),
            (ENTRY.replace("model_name: jerry-xl", "model_name: studio/*"), ["jerry-xl", "studio/jerry-xl", "best"]),
            (2 * ENTRY.replace("model_name: jerry-xl", "model_name: mine"), ["jerry-xl", "best"]),
            (ENTRY.replace("model_name: jerry-xl", "model_name: mine").replace(":8100", ":9"), ["jerry-xl", "best"]),
        ],
        ids=["entry not pasted yet", "own entry", "pattern", "two entries", "other server"],
    )
    def test_entries_of_other_names_are_considered(self, tmp_path: Path, entries: str, names: list[str]) -> None:
        first, *others = entries.split("model_list:\n")
        text = "model_list:\n" + "".join(others) if others else first
        document = printed(tmp_path, text + "router_settings: {model_group_alias: {best: jerry-xl}}\n")
        assert list(document["router_settings"]["model_group_retry_policy"]) == names

    @pytest.mark.parametrize(
        ("text", "why"),
        [
            ("a: [", "cannot be read as YAML"),
            ("[]", "is not a configuration that LiteLLM starts with"),
            ("include: [no.yaml]", "cannot be included"),
            (None, "router.yaml"),
        ],
    )
    def test_files_that_cannot_be_read_are_named(self, tmp_path: Path, text: str | None, why: str) -> None:
        if text is not None:
            (tmp_path / "router.yaml").write_text(text)
        config, not_known = read_if_possible(Gateway(str(tmp_path / "router.yaml"), None, None, "KEY"))
        text = as_yaml(entries_to_paste([held()], [served()], config, not_known, env=False))
        (note,) = (line for line in text.splitlines() if line.startswith("#") and "compare them yourself" in line)
        assert why in note
        assert "router_settings" in yaml.safe_load(text)

    def test_configuration_that_hosts_yaml_does_not_name_is_said(self) -> None:
        notes = entries_to_paste([held()], [served()], *read_if_possible(None), env=False).notes
        assert notes[0].startswith("hosts.yaml does not name the gateway's configuration. ")
        notes = entries_to_paste([target()], [served()], *read_if_possible(None), env=False).notes
        assert not any("hosts.yaml" in note for note in notes)

    @pytest.mark.parametrize(
        ("reply", "tokens", "note"),
        [
            (served(smallest_context=2048), 2048, "the smallest context of the alias's latest models"),
            (served(), None, "jerry-xl: no max_input_tokens, because no model on its port has a known context."),
            (
                HostReply("studio", error=Unreachable("host_down", "studio is down")),
                None,
                "jerry-xl: no max_input_tokens, because studio did not answer.",
            ),
        ],
        ids=["known", "not known", "host down"],
    )
    @pytest.mark.parametrize("env", [False, True])
    def test_context_is_promised_where_it_is_known(
        self, reply: HostReply[ServedPorts], tokens: int | None, note: str, env: bool
    ) -> None:
        text = as_yaml(entries_to_paste([target()], [reply], LiteLLMConfig(), env=env))
        (entry,) = yaml.safe_load(text)["model_list"]
        assert entry["model_info"].get("max_input_tokens") == tokens
        assert note in text

    def test_alias_of_two_hosts_promises_the_smaller_context(self) -> None:
        targets = [target(), replace(target(), name="other")]
        replies = [served(smallest_context=4096), replace(served(smallest_context=2048), host="other")]
        document = entries_to_paste(targets, replies, LiteLLMConfig(), env=False).document
        listed = document["model_list"]
        assert isinstance(listed, list)
        assert [entry["model_info"]["max_input_tokens"] for entry in listed] == [2048, 2048]

    def test_note_stays_a_comment(self) -> None:
        text = as_yaml(entries_to_paste([held()], [served()], LiteLLMConfig(), "a\nmodel_list: []", env=False))
        assert yaml.safe_load(text)["model_list"]


def held() -> HostTarget:
    return replace(target(), settings=replace(target().settings, slot_options={8100: SlotOptions(hold=60)}))


def printed(folder: Path, text: str) -> dict[str, Any]:
    """Return what is printed beside a configuration of the gateway."""
    entries = entries_to_paste([held()], [served()], read_config(folder, text).config, env=False)
    document = yaml.safe_load(as_yaml(entries))
    assert isinstance(document, dict)
    return document
