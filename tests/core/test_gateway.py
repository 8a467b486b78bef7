"""The comparison of the gateway's entries with slots and servers, as tables: entries and ports -> findings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxops.core import gateway, litellm
from mlxops.core.errors import Refused
from mlxops.core.gateway import Entry, GatewayPaths, GatewayPort, Impact, Mismatch
from mlxops.core.litellm import Environ, LiteLLMConfig
from mlxops.core.ports import Owner, State
from tests.properties import PROPERTY, json_values

FILES = GatewayPaths("router.yaml", "local.env")
HOST = "studio.local"


def item(alias: str = "jerry-xl", port: int = 8100, **changes: Any) -> dict[str, Any]:
    """Return an item of `model_list` that is right unless changed. None removes a key."""
    params = {"model": f"openai/{alias}", "api_base": f"http://{HOST}:{port}/v1", "api_key": "none", **changes}
    return {"model_name": alias, "litellm_params": {key: value for key, value in params.items() if value is not None}}


def entries(*items: object, environ: Mapping[str, str] | None = None) -> tuple[Entry, ...]:
    places = [f"router.yaml:{line}" for line in range(2, 2 + len(items))]
    config = litellm.parse({"model_list": list(items)}, Environ(environ or {}), FILES, places)
    assert not config.findings
    return config.entries


def served(alias: str | None = "jerry-xl", port: int = 8100, **changes: Any) -> GatewayPort:
    """Return a port with a server of ours that is as it should be."""
    right = GatewayPort(
        "studio",
        HOST,
        port,
        alias,
        State.READY,
        Owner.MLXOPS,
        "tiny",
        alias or "tiny",
        context_length=2048,
        assigned=True,
    )
    return replace(right, **changes)


def idle(alias: str | None, port: int, **changes: Any) -> GatewayPort:
    return replace(GatewayPort("studio", HOST, port, alias, State.IDLE), **changes)


def found(
    items: list[dict[str, Any]], ports: list[GatewayPort], environ: Mapping[str, str] | None = None
) -> set[tuple[str, str]]:
    return {(f.code, f.severity.value) for f in findings(items, ports, environ)}


def findings(
    items: list[dict[str, Any]], ports: list[GatewayPort], environ: Mapping[str, str] | None = None
) -> tuple[Mismatch, ...]:
    return gateway.compare(entries(*items, environ=environ), ports, FILES)


def test_right_entry_has_no_findings() -> None:
    assert found([item()], [served()]) == set()


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"model": "openai/other"}, "wrong_name"),
        ({"model": "openai/jerry-xl/"}, "wrong_name"),
        ({"model": "jerry-xl"}, "not_openai"),
        ({"model": "anthropic/jerry-xl"}, "not_openai"),
        ({"api_base": f"http://{HOST}:8101/v1"}, "wrong_address"),
        ({"api_base": f"http://{HOST}:8100/v1/chat"}, "no_v1"),
        ({"api_base": None}, "no_api_base"),
        ({"api_base": "studio.local:8100/v1"}, "bad_api_base"),
        ({"api_base": f"http://{HOST}:99999/v1"}, "bad_api_base"),
        ({"api_base": "http://[::1/v1"}, "bad_api_base"),
        ({"api_key": None}, "missing_key"),
        ({"api_key": ""}, "missing_key"),
        ({"api_key": "os.environ/NOT_SET"}, "unset_variable"),
    ],
)
def test_entry_that_does_not_work_is_a_fault(changes: dict[str, Any], code: str) -> None:
    assert (code, "fault") in found([item(**changes)], [served(), idle(None, 8101)])


@pytest.mark.parametrize(
    ("params", "code"),
    [({}, "no_model"), ({"model": ""}, "no_model"), ({"model": "os.environ/NOT_SET"}, "unset_variable")],
)
def test_entry_without_a_model_is_a_fault_for_any_provider(params: dict[str, str], code: str) -> None:
    document = {"model_list": [{"model_name": "cloud's", "litellm_params": params}]}
    (finding,) = litellm.parse(document, Environ(), FILES).findings
    assert (finding.code, finding.severity) == (code, Impact.FAULT)
    assert "LiteLLM does not start" in finding.message


def test_entry_without_an_address_is_not_also_missing() -> None:
    assert found([item(api_base="os.environ/NOT_SET")], [served()]) == {("unset_variable", "fault")}


@pytest.mark.parametrize(
    "changes",
    [
        {"api_base": f"http://{HOST}:8100/v1/"},
        {"api_base": f"HTTP://{HOST.upper()}.:8100/v1"},
        {"api_base": None, "base_url": f"http://{HOST}:8100/v1"},
        {"model": "hosted_vllm/jerry-xl"},
        {"model": "jerry-xl", "custom_llm_provider": "openai"},
    ],
)
def test_right_entry_has_several_spellings(changes: dict[str, Any]) -> None:
    assert found([item(**changes)], [served()]) == set()


@pytest.mark.parametrize(
    "base",
    [
        "http://host.docker.internal:8100/v1",
        "http://172.17.0.1:8100/v1",
        "http://100.101.102.103:8100/v1",
        "http://studio.tail1234.ts.net:8100/v1",
        "http://127.0.0.1:18100/v1",
        "https://studio.local/v1",
        "http://elsewhere:8100/v1",
    ],
)
def test_address_that_may_lead_to_the_slot_is_a_warning(base: str) -> None:
    (finding,) = findings([item(api_base=base)], [served()])
    assert (finding.code, finding.severity) == ("wrong_address", Impact.WARNING)
    assert "is not known here" in finding.message


@pytest.mark.parametrize("base", [f"http://{HOST}:8100", f"http://{HOST}:8100/"])
@pytest.mark.parametrize(
    ("paths", "severity"),
    [
        ({"/v1/chat/completions", "/chat/completions"}, "warning"),
        ({"/v1/chat/completions", "/v1/responses"}, "fault"),
        ((), "warning"),
    ],
)
def test_address_without_v1_is_right_for_some_engines(base: str, paths: Iterable[str], severity: str) -> None:
    assert found([item(api_base=base)], [served(paths=frozenset(paths))]) == {("no_v1", severity)}


@pytest.mark.parametrize(
    ("port", "expected"),
    [
        (served(also_answers_to=("default_model",)), {("engine_name", "warning")}),
        (idle("jerry-xl", 8100), {("engine_name", "warning"), ("alias_without_server", "warning")}),
        (served(), {("wrong_name", "fault")}),
    ],
)
def test_default_model_depends_on_the_engine(port: GatewayPort, expected: set[tuple[str, str]]) -> None:
    assert found([item(model="openai/default_model")], [port]) == expected


def test_name_that_only_the_present_server_knows_is_a_warning() -> None:
    by_hand = served(owner=Owner.HAND, answers_to="org/model")
    assert found([item(model="openai/org/model")], [by_hand]) == {("other_name", "warning"), ("server_name", "warning")}
    assert found([item(model="openai/any")], [served(answers_to=None, answers_to_any=True)]) == {
        ("other_name", "warning")
    }


def concrete(names: Iterable[str], *items: object, **settings: object) -> tuple[Entry, ...]:
    config = litellm.parse({"model_list": list(items), **settings}, Environ(), FILES)
    return config.concrete(names)


def test_entry_for_another_kind_of_server_has_one_finding() -> None:
    entry = item(model="ollama_chat/jerry-xl", api_base=f"http://{HOST}:8100", api_key=None)
    assert found([entry], [served()]) == {("not_openai", "fault")}


def test_pattern_is_never_a_name() -> None:
    pattern = item("jerry-*", model="openai/jerry-*")
    found = concrete(["jerry-xl", "other"], pattern)
    assert [(entry.alias, entry.sends) for entry in found if entry.alias == "jerry-xl"] == [("jerry-xl", "jerry-xl")]
    assert not any("*" in entry.alias for entry in found)
    assert gateway.names_sent(found, HOST)[8100] == ("jerry-xl",)


def test_pattern_claims_only_the_alias_of_its_port() -> None:
    ports = [served(), idle("jerry-l", 8101)]
    entries = gateway.claims(concrete(["jerry-xl", "jerry-l"], item("*", model="openai/*")), ports)
    assert gateway.names_sent(entries, HOST) == {8100: ("jerry-xl",)}
    compared = gateway.compare(concrete(["jerry-xl", "jerry-l"], item("*", model="openai/*")), ports, FILES)
    assert {(f.code, f.severity.value) for f in compared} == {("pattern", "warning"), ("slot_without_entry", "warning")}


@pytest.mark.parametrize(
    ("settings", "info", "mentioned"),
    [
        ({"background_health_checks": True}, {}, True),
        ({"background_health_checks": True}, {"health_check_model": "openai/jerry-xl"}, False),
        ({"background_health_checks": True}, {"disable_background_health_check": True}, False),
        ({"background_health_checks": False}, {}, False),
        ({}, {}, False),
    ],
)
def test_pattern_finding_mentions_health_checks_that_use_other_names(
    settings: dict[str, object], info: dict[str, object], mentioned: bool
) -> None:
    pattern = {**item("*", model="openai/*"), "model_info": info}
    entries = concrete(["jerry-xl"], pattern, general_settings=settings)
    (finding,) = [f for f in gateway.compare(entries, [served()], FILES) if f.code == "pattern"]
    assert ("background_health_checks" in finding.message) == mentioned


def test_pattern_for_one_model_needs_no_warning() -> None:
    compared = gateway.compare(concrete(["jerry-xl"], item("*", model="openai/jerry-xl")), [served()], FILES)
    assert compared == ()


def test_pattern_for_a_cloud_provider_does_not_take_a_slot() -> None:
    cloud = {"model_name": "*", "litellm_params": {"model": "openai/*", "api_key": "x"}}
    assert gateway.compare(concrete(["jerry-xl"], cloud, item()), [served()], FILES) == ()


def test_synonym_is_a_name() -> None:
    found = concrete([], item(), router_settings={"model_group_alias": {"big": "jerry-xl"}})
    assert [(entry.alias, entry.sends) for entry in found] == [("jerry-xl", "jerry-xl"), ("big", "jerry-xl")]


@pytest.mark.parametrize(
    ("name", "params", "severities"),
    [
        ("XL_BASE", {"api_base": "os.environ/XL_BASE"}, {"warning"}),
        ("XL_MODEL", {"model": "os.environ/XL_MODEL"}, {"warning"}),
        ("XL_KEY", {"api_key": "os.environ/XL_KEY"}, set()),
    ],
)
def test_doubtful_value_is_never_a_fault(name: str, params: dict[str, Any], severities: set[str]) -> None:
    environ = Environ({name: "http://elsewhere:1/v1" if name == "XL_BASE" else "openai/other"}, frozenset({name}))
    config = litellm.parse({"model_list": [item(**params)]}, environ, FILES)
    compared = gateway.compare(config.concrete(["jerry-xl"]), [served()], FILES)
    assert {finding.severity.value for finding in compared} == severities
    if name != "XL_KEY":
        assert gateway.names_sent(config.entries, HOST) == {}


def test_unset_variable_of_an_unknown_environment_is_a_warning() -> None:
    config = litellm.parse(
        {"model_list": [item(api_key="os.environ/KEY")]}, Environ({}, whole=False), GatewayPaths("r.yaml")
    )
    compared = gateway.compare(config.entries, [served()], GatewayPaths("r.yaml"))
    assert [(f.code, f.severity.value) for f in compared] == [("unset_variable", "warning")]


@pytest.mark.parametrize(
    ("params", "hint"),
    [
        ({"model": "hosted_vllm/other"}, "in router.yaml:2: model: hosted_vllm/jerry-xl;"),
        ({"model": "openai/x", "custom_llm_provider": "hosted_vllm"}, "in router.yaml:2: model: jerry-xl;"),
        (
            {"api_base": None, "base_url": f"http://{HOST}:8101/v1"},
            f"in router.yaml:2: base_url: http://{HOST}:8100/v1;",
        ),
    ],
)
def test_suggested_edit_removes_the_fault(params: dict[str, Any], hint: str) -> None:
    ports = [served(), idle(None, 8101)]

    def faults(changes: dict[str, Any]) -> list[Mismatch]:
        return [finding for finding in findings([item(**changes)], ports) if finding.severity is Impact.FAULT]

    assert any(finding.hint.startswith(hint) for finding in faults(params))
    key, _, value = hint.rstrip(";").partition(": ")[2].partition(": ")
    assert faults({**params, key: value}) == []


def test_missing_credential_is_named() -> None:
    (finding,) = findings([item(api_key=None, litellm_credential_name="studio")], [served()])
    assert finding.code == "missing_key"
    assert "credential_list has no 'studio'" in finding.message


def test_openai_api_key_is_a_key() -> None:
    assert found([item(api_key=None)], [served()], {"OPENAI_API_KEY": "x"}) == set()


def test_our_own_environment_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XL_MODEL", "openai/from-the-process")
    entry = item(model="os.environ/XL_MODEL", api_base="os.environ/XL_BASE", api_key="os.environ/XL_KEY")
    right = {"XL_MODEL": "openai/jerry-xl", "XL_BASE": f"http://{HOST}:8100/v1", "XL_KEY": "k"}
    assert found([entry], [served()], right) == set()
    (finding,) = findings([entry], [served()], {**right, "XL_MODEL": "openai/other"})
    assert finding.hint == "in local.env: XL_MODEL=openai/jerry-xl; then restart the gateway, once"


def test_hint_is_the_edit() -> None:
    (finding,) = findings([item(model="openai/other")], [served()])
    assert finding.hint == "in router.yaml:2: model: openai/jerry-xl; then restart the gateway, once"


@pytest.mark.parametrize(
    ("port", "expected"),
    [
        (idle("jerry-xl", 8100), {("alias_without_server", "warning")}),
        (idle("jerry-xl", 8100, assigned=True), {("alias_without_server", "fault")}),
        (served(state=State.FOREIGN, owner=Owner.FOREIGN), {("foreign_server", "fault")}),
        (served(state=State.FAILED), {("not_serving", "fault")}),
        (served(state=State.WEDGED), {("not_serving", "fault")}),
        (served(state=State.MISMATCH), {("not_serving", "fault")}),
        (served(state=State.ORPHAN), {("not_serving", "fault")}),
        (served(state=State.LOADING), {("not_ready", "warning")}),
        (served(state=State.UNKNOWN, owner=None), {("not_ready", "warning")}),
        (served(answers_to="other"), {("server_name", "fault")}),
        (served(answers_to=None, owner=Owner.HAND), set()),
        (GatewayPort("studio", HOST, 8100, "jerry-xl"), set()),
    ],
)
def test_state_of_the_server_decides_the_finding(port: GatewayPort, expected: set[tuple[str, str]]) -> None:
    assert found([item()], [port]) == expected


def test_server_of_a_boot_job_is_renamed_in_the_job() -> None:
    (finding,) = findings([item()], [served(answers_to="other", owner=Owner.BOOT)])
    assert finding.hint == "let the boot job start it under the name jerry-xl"


@pytest.mark.parametrize(
    ("port", "expected"),
    [
        (served(), {("server_without_entry", "fault")}),
        (idle("jerry-xl", 8100), {("slot_without_entry", "warning")}),
        (served(alias=None, port=8109), {("server_without_alias", "warning")}),
        (idle(None, 8109), set()),
    ],
)
def test_port_without_an_entry_is_reported(port: GatewayPort, expected: set[tuple[str, str]]) -> None:
    assert found([], [port]) == expected


def test_port_without_an_alias_has_its_models_name() -> None:
    right = item("mine", 8109, model="openai/tiny")
    assert found([right], [served(alias=None, port=8109)]) == set()
    assert found([item("mine", 8109)], [served(alias=None, port=8109)]) == {("wrong_name", "fault")}


@pytest.mark.parametrize(("promised", "codes"), [(2048, set()), (2049, {("context_too_small", "warning")})])
def test_context_smaller_than_promised_is_a_warning(promised: int, codes: set[tuple[str, str]]) -> None:
    entry = item() | {"model_info": {"max_input_tokens": promised}}
    assert found([entry], [served()]) == codes


def test_two_aliases_on_one_port_are_a_warning() -> None:
    ports = [served(), idle("jerry-l", 8101)]
    both = [item(), item("jerry-l", 8100)]
    assert {("two_aliases_one_port", "warning"), ("wrong_address", "fault")} <= found(both, ports)
    synonym = item("big", 8100, model="openai/jerry-xl")
    (finding,) = findings([item(), synonym], [served()])
    assert (finding.code, finding.severity) == ("two_aliases_one_port", Impact.WARNING)
    assert "jerry-xl, big" in finding.message


def test_one_alias_on_two_ports_is_reported() -> None:
    ports = [served(), served("jerry-l", 8101)]
    assert ("one_alias_two_ports", "fault") in found([item(), item(port=8101), item("jerry-l", 8101)], ports)
    elsewhere = [item(), item(api_base="http://elsewhere:9/v1")]
    assert found(elsewhere, [served()]) == {("one_alias_two_ports", "warning"), ("wrong_address", "warning")}
    right = [item(), item(port=8101, model="openai/jerry-l"), item("jerry-l", 8101)]
    assert ("one_alias_two_ports", "warning") in found(right, ports)
    assert found([item(), item()], [served()]) == set()


def test_alias_may_be_balanced_between_two_hosts() -> None:
    second = served(host="studio2", address="studio2.local")
    entry = item(api_base="http://studio2.local:8100/v1")
    assert found([item(), entry], [served(), second]) == set()


def test_entries_for_other_providers_are_ignored() -> None:
    other = {"model_name": "gpt", "litellm_params": {"model": "gpt-5", "api_key": "os.environ/NOT_SET"}}
    assert found([item(), other], [served()]) == set()


def test_any_name_of_a_host_is_recognized() -> None:
    def same(one: str, other: str) -> bool:
        return {one, other} <= {HOST, "192.0.2.7"}

    given_by_address = entries(item(api_base="http://192.0.2.7:8100/v1"))
    assert gateway.compare(given_by_address, [served()], FILES, same) == ()
    assert gateway.names_sent(given_by_address, HOST, same) == {8100: ("jerry-xl",)}
    assert gateway.names_sent(given_by_address, HOST) == {}


def test_faults_come_before_warnings() -> None:
    ports = [idle("jerry-m", 8102), served()]
    severities = [f.severity for f in findings([item(model="openai/other")], ports)]
    assert severities == [Impact.FAULT, Impact.WARNING]


# -- documents ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("document", [None, [], "text", 7, {"model_list": {"a": 1}}, {"model_list": "x"}])
def test_document_that_is_no_configuration_is_refused(document: object) -> None:
    with pytest.raises(Refused, match=r"router\.yaml"):
        litellm.parse(document, Environ(), FILES)


@pytest.mark.parametrize(
    "broken",
    [
        None,
        "text",
        {},
        {"model_name": 7, "litellm_params": {}},
        {"model_name": "a"},
        {"model_name": "a", "litellm_params": []},
        {"model_name": "a", "litellm_params": {"model": 7}},
        {"model_name": 7, "litellm_params": {"model": "openai/a"}},
        {"model_name": "a", "litellm_params": {"model": "openai/a"}, "model_info": None},
    ],
)
def test_broken_item_is_a_fault_and_the_others_are_read(broken: object) -> None:
    config = litellm.parse({"model_list": [broken, item()]}, Environ(), FILES, ("router.yaml:3", "router.yaml:9"))
    assert [entry.alias for entry in config.entries] == ["jerry-xl"]
    assert [(f.code, f.severity) for f in config.findings] == [("bad_entry", Impact.FAULT)]
    assert config.findings[0].message.startswith("router.yaml:3: ")


def test_configuration_without_models_is_empty() -> None:
    assert litellm.parse({"general_settings": {}}, Environ(), FILES) == LiteLLMConfig()


def test_entry_never_holds_the_key() -> None:
    (entry,) = entries(item(api_key="sk-canary"))
    assert "sk-canary" not in repr(entry)


@given(
    st.lists(json_values | st.fixed_dictionaries({"model_name": st.text(max_size=4), "litellm_params": json_values}))
)
@PROPERTY
def test_any_model_list_is_checked(items: list[object]) -> None:
    config = litellm.parse({"model_list": items}, Environ(), FILES)
    gateway.compare(config.concrete(["jerry-xl", "a"]), [served(), idle("a", 8101)], FILES)


SECTIONS = ("credential_list", "environment_variables", "litellm_settings", "router_settings", "model_list")


@given(st.fixed_dictionaries(dict.fromkeys(SECTIONS, json_values)))
@PROPERTY
def test_any_section_is_read_or_refused(document: dict[str, object]) -> None:
    try:
        litellm.parse(document, Environ({"A": "x"}), FILES)
    except Refused as error:
        assert error.code == "bad_gateway_config"


# -- what to paste ------------------------------------------------------------------------------------------------

_aliases = st.lists(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,12}", fullmatch=True), unique=True, max_size=5)


@given(_aliases, st.booleans())
@PROPERTY
def test_printed_entries_pass_the_check(aliases: list[str], env: bool) -> None:
    ports = [served(alias, 8100 + index) for index, alias in enumerate(aliases)]
    document, environ = gateway.document_with_variables(ports) if env else (gateway.document_with_values(ports), {})
    config = litellm.parse(document, Environ(environ), FILES)
    assert not config.findings
    assert len(config.entries) == len(aliases)
    assert gateway.compare(config.concrete(aliases), ports, FILES) == ()


def test_printed_variables_follow_the_alias() -> None:
    document, environ = gateway.document_with_variables([idle("jerry-xl", 8100)])
    assert document["model_list"] == [
        {
            "model_name": "jerry-xl",
            "litellm_params": {
                "model": "os.environ/JERRY_XL_MODEL",
                "api_base": "os.environ/JERRY_XL_API_BASE",
                "api_key": "os.environ/JERRY_XL_API_KEY",
            },
            "model_info": {"mode": "chat", "disable_background_health_check": True},
        }
    ]
    assert environ == {
        "JERRY_XL_MODEL": "openai/jerry-xl",
        "JERRY_XL_API_BASE": "http://studio.local:8100/v1",
        "JERRY_XL_API_KEY": "none",
    }


@pytest.mark.parametrize(
    "ports",
    [
        [idle("a-b", 8100), idle("a.b", 8101), served("a-b", 8100, host="studio2", address="studio2.local")],
        [served("a", 8100, host="studio-2", address="x"), served("a", 8100, host="studio_2", address="y")],
        [idle("a", 8100), idle("A", 8101), idle("studio_a_8100", 8102)],
    ],
    ids=["aliases", "hosts", "an alias as a longer name"],
)
def test_slots_never_share_a_variable(ports: list[GatewayPort]) -> None:
    document, environ = gateway.document_with_variables(ports)
    assert len(environ) == 3 * len(ports)
    entries = litellm.parse(document, Environ(environ), FILES).entries
    assert [(each.sends, each.address) for each in entries] == [
        (port.alias, (port.address, port.port)) for port in ports
    ]


def test_alias_that_begins_with_a_digit_has_valid_variables() -> None:
    assert set(gateway.document_with_variables([idle("70b", 8100)])[1]) == {
        "SLOT_70B_MODEL",
        "SLOT_70B_API_BASE",
        "SLOT_70B_API_KEY",
    }
