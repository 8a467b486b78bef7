"""doctor's checks of the gateway, with values of a type that nobody means in its configuration."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from mlxops.control import client
from mlxops.control.doctor import gateway
from mlxops.control.inventory import Gateway
from mlxops.core.commands.doctor import DoctorResult, FindingRow, show
from mlxops.core.replies import HostReply
from mlxops.core.settings import SlotOptions
from tests.control.gatewayfiles import served, target

VALUES = (
    *("5", "-5", "1.5", ".nan", ".inf", "9" * 400, "null", "true", "''", "[]", "[a, [b]]", "{}", "{a: {b: c}}"),
    *("{[a]: b}", "{1: 2}", "2026-01-01", "2026-01-01T00:00:00Z", "!!binary aGk=", "!!set {a, b}", "!!python/none x"),
    *("os.environ/", "os.environ/NONE", "'http://['", "http://me:pw@host/v1", "*a", "&b [*b]", '"\\0"', '"\\ud800"'),
    *("[" * 90 + "]" * 90, "{a: " * 90 + "1" + "}" * 90, "[" * 200 + "]" * 200),
)
ENTRY = (
    "model_list: [{model_name: jerry-xl, litellm_params: {model: openai/jerry-xl, "
    "api_base: 'http://127.0.0.1:8100/v1', api_key: x, %s}, model_info: {a: 1, %s}}]\n"
)
WITH_HOLD = replace(target(), settings=replace(target().settings, slot_options={8100: SlotOptions(hold=60)}))
PLAIN = ENTRY % ("b: 1", "b: 1")


def places() -> Iterator[str]:
    """Yield configurations with a place for a value, VALUE."""
    for key in ("model_list", "router_settings", "litellm_settings", "general_settings", "include", "credential_list"):
        yield f"{key}: VALUE"
        yield f"{key}: [VALUE]"
    yield "? VALUE\n: 1\n"
    yield PLAIN.replace("model_name: jerry-xl", "model_name: VALUE")
    yield "model_list: [{model_name: jerry-xl, litellm_params: VALUE}]"
    yield "model_list: [{model_name: jerry-xl, litellm_params: {model: a/b}, model_info: VALUE}]"
    for key in ("model", "api_base", "api_key", "base_url", "custom_llm_provider", "num_retries", "cooldown_time"):
        yield ENTRY % (f"{key}: VALUE", "b: 1")
    for key in ("max_input_tokens", "disable_background_health_check", "mode"):
        yield ENTRY % ("b: 1", f"{key}: VALUE")
    for section, keys in {
        "router_settings": (
            *("num_retries", "retry_after", "cooldown_time", "disable_cooldowns", "default_litellm_params"),
            *("model_group_alias", "retry_policy", "model_group_retry_policy", "fallbacks", "default_fallbacks"),
        ),
        "litellm_settings": ("num_retries", "model_alias_map", "fallbacks"),
        "general_settings": ("background_health_checks", "completion_model"),
        "environment_variables": ("OPENAI_API_BASE",),
    }.items():
        for key in keys:
            yield f"{PLAIN}{section}: {{{key}: VALUE}}"
            yield f"{PLAIN}{section}: {{{key}: {{jerry-xl: VALUE}}}}"


@pytest.mark.parametrize("text", [*places()])
def test_value_of_an_odd_type_ends_no_check(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "ask_all", lambda targets, request, listen: [served() for _ in targets])
    path = tmp_path / "router.yaml"
    for value in VALUES:
        path.write_text(text.replace("VALUE", value))
        rows = tuple(map(FindingRow.of, gateway.findings(Gateway(config=str(path)), [WITH_HOLD])))
        shown = show([HostReply("control node", DoctorResult(rows, ("gateway",)))])
        assert "me:pw" not in shown or "model_name: VALUE" in text, (value, shown)
        shown.encode()


def test_healthy_gateway_has_no_finding_but_its_retries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "ask_all", lambda targets, request, listen: [served() for _ in targets])
    (tmp_path / "router.yaml").write_text(PLAIN)
    (found,) = gateway.findings(Gateway(config=str(tmp_path / "router.yaml")), [WITH_HOLD])
    assert found.code == "gateway_retries"
