"""Configurations and what LiteLLM does with them: a table, checked against our parser and against the real LiteLLM.

A row has, for each name that a client sends, the name that reaches the server at `BASE`. None: no request reaches it.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import pytest

from mlxops.control.gateway import config as gatewayfiles
from mlxops.control.gateway.check import with_client_names
from mlxops.control.gateway.ports import same_host
from mlxops.control.inventory import Gateway
from mlxops.core import gateway as core
from mlxops.core.errors import Refused
from mlxops.core.gateway import GatewayPort, Impact
from mlxops.core.ports import Owner, State
from tests.lab import verdicts
from tests.lab.verdicts import CHAT, PORT

BASE = f"http://127.0.0.1:{PORT}/v1"
B, K = f"api_base: '{BASE}'", "api_key: none"
UNUSED = "http://127.0.0.1:9/v1"


@dataclass(frozen=True)
class Case:
    config: str
    sends: Mapping[str, str | None] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    encoding: str = "utf-8"
    starts: bool = True


def listed(*entries: tuple[str, str]) -> str:
    """Return a `model_list` of (model_name, litellm_params)."""
    rows = [f"- model_name: {json.dumps(name)}\n  litellm_params: {{{params}}}\n" for name, params in entries]
    return "model_list:\n" + "".join(rows)


def one(params: str, sends: str | None, rest: str = "", **env: str) -> Case:
    return Case(listed(("a", params)) + rest, {"a": sends}, env)


def many(*rows: tuple[str, str | None], rest: str = "", **env: str) -> Case:
    """Return one configuration with an entry for each row: (litellm_params, the name that is sent)."""
    entries = [(f"a{index}", params) for index, (params, _) in enumerate(rows)]
    return Case(listed(*entries) + rest, {f"a{index}": sends for index, (_, sends) in enumerate(rows)}, env)


def credential(values: str, info: str = "credential_info: {}, ") -> str:
    return f"credential_list: [{{credential_name: c, {info}credential_values: {{{values}}}}}]\n"


def include(what: str) -> str:
    return f"include: {what}\n"


A = ("a", f"model: openai/n, {B}, {K}")
ENTRY = listed(A)

CASES = {
    "providers": many(
        (f"model: openai/n, {B}, {K}", "n"),
        (f"model: openai/n, {B}", None),
        (f"model: custom_openai/n, {B}, {K}", "n"),
        (f"model: custom_openai/n, {B}", None),
        (f"model: openai_like/n, {B}, {K}", None),
        (f"model: hosted_vllm/n, {B}", "n"),
        (f"model: lm_studio/n, {B}", "n"),
        (f"model: llamafile/n, {B}", "n"),
        (f"model: litellm_proxy/n, {B}, {K}", "n"),
        (f"model: litellm_proxy/n, {B}", None),
        (f"model: text-completion-openai/n, {B}, {K}", None),
        (f"model: ollama/n, {B}", None),
        (f"model: ollama_chat/n, {B}", None),
        (f"model: anthropic/n, {B}, {K}", None),
        (f"model: azure/n, {B}, {K}", None),
        (f"model: vllm/n, {B}, {K}", None),
        (f"model: deepseek/n, {B}", "n"),
        (f"model: lemonade/n, {B}", "n"),
        (f"model: xinference/n, {B}, {K}", "n"),
        (f"model: compactifai/n, {B}, {K}", "n"),
        (f"model: minimax/n, {B}, {K}", "n"),
        (f"model: openai/org/n, {B}, {K}", "org/n"),
        (f"model: openai/openai/n, {B}, {K}", "openai/n"),
        (f"model: OpenAI/n, {B}, {K}", None),
        (f"model: ' openai/n', {B}, {K}", None),
        (f"model: mlx-community/n, {B}, {K}", None),
        (f"model: n, {B}, {K}", None),
        (f"model: openai, {B}, {K}", None),
        (f"model: openai/7, {B}, {K}", "7"),
        (f"model: gpt-4o, {B}, {K}", "gpt-4o"),
        (f"model: openai/responses/n, {B}, {K}", None),
    ),
    "a provider beside the model": many(
        (f"model: n, custom_llm_provider: openai, {B}, {K}", "n"),
        (f"model: org/n, custom_llm_provider: openai, {B}, {K}", "org/n"),
        (f"model: openai/n, custom_llm_provider: openai, {B}, {K}", "n"),
        (f"model: openai/n, custom_llm_provider: hosted_vllm, {B}, {K}", "openai/n"),
        (f"model: hosted_vllm/n, custom_llm_provider: openai, {B}, {K}", "hosted_vllm/n"),
        (f"model: n, custom_llm_provider: openai_like, {B}, {K}", None),
    ),
    "keys": many(
        (f"model: openai/n, {B}, api_key: ''", None),
        (f"model: openai/n, {B}, api_key: null", None),
        (f"model: openai/n, {B}, api_key: os.environ/NOT_SET", None),
        (f"model: openai/n, {B}, api_key: os.environ/EMPTY", None),
        (f"model: openai/n, {B}, api_key: os.environ/TRUE", None),
        (f"model: openai/n, {B}, api_key: os.environ/SET", "n"),
        (f"model: openai/n, {B}, api_key: 123", None),
        (f"model: openai/n, {B}, api_key: true", None),
        (f"model: hosted_vllm/n, {B}, api_key: os.environ/NOT_SET", "n"),
        (f"model: lm_studio/n, {B}, api_key: os.environ/NOT_SET", "n"),
        (f"model: llamafile/n, {B}, api_key: ''", "n"),
        EMPTY="",
        TRUE="true",
        SET="x",
    ),
    "the usual key": many(
        (f"model: openai/n, {B}", "n"),
        (f"model: openai/n, {B}, api_key: os.environ/NOT_SET", "n"),
        (f"model: custom_openai/n, {B}", "n"),
        (f"model: litellm_proxy/n, {B}", "n"),
        OPENAI_API_KEY="x",
    ),
    "a provider's own key": many(
        (f"model: litellm_proxy/n, {B}", "n"),
        (f"model: custom_openai/n, {B}", None),
        LITELLM_PROXY_API_KEY="x",
        CUSTOM_OPENAI_API_KEY="x",
    ),
    "addresses from providers' variables": many(
        ("model: hosted_vllm/n", "n"),
        ("model: lm_studio/n", "n"),
        ("model: llamafile/n", "n"),
        (f"model: litellm_proxy/n, {K}", "n"),
        HOSTED_VLLM_API_BASE=BASE,
        LM_STUDIO_API_BASE=BASE,
        LLAMAFILE_API_BASE=BASE,
        LITELLM_PROXY_API_BASE=BASE,
    ),
    "an address for all": many(
        (f"model: openai/n, {K}", "n"),
        (f"model: openai/n, {K}, api_base: os.environ/NOT_SET", "n"),
        (f"model: custom_openai/n, {K}", "n"),
        ("model: lm_studio/n", "n"),
        (f"model: litellm_proxy/n, {K}", "n"),
        OPENAI_API_BASE=BASE,
    ),
    "the other variable of it": one(f"model: openai/n, {K}", "n", OPENAI_BASE_URL=BASE, OPENAI_API_BASE=UNUSED),
    "base_url": many(
        (f"model: openai/n, base_url: '{BASE}', {K}", "n"),
        (f"model: openai/n, base_url: '{BASE}', api_base: '{UNUSED}', {K}", "n"),
        (f"model: openai/n, base_url: os.environ/URL, {K}", "n"),
        (f"model: hosted_vllm/n, base_url: '{BASE}'", "n"),
        URL=BASE,
    ),
    "a model from a variable": one(f"model: os.environ/M, {B}, {K}", "n", M="openai/n"),
    "a variable within a value": many(
        (f"model: openai/os.environ/M, {B}, {K}", "os.environ/M"),
        (f"model: openai/n, api_base: 'http://127.0.0.1:${{THE_PORT}}/v1', {K}", None),
        M="n",
        THE_PORT=PORT,
    ),
    "settings of the module": many(
        ("model: openai/n", "n"),
        ("model: hosted_vllm/n", "n"),
        rest="litellm_settings: {api_base: os.environ/HERE, api_key: none, drop_params: true}\n",
        HERE=BASE,
    ),
    "openai_key of the module": one(f"model: openai/n, {B}", "n", "litellm_settings: {openai_key: none}\n"),
    "general settings do not apply to models": one(
        "model: openai/n", None, f"general_settings: {{api_base: '{BASE}', api_key: none}}\n"
    ),
    "default parameters": many(
        ("model: openai/n", "n"),
        (f"model: openai/n, api_base: '{UNUSED}', {K}", "n"),
        rest=f"router_settings: {{default_litellm_params: {{api_base: '{BASE}', api_key: os.environ/KEY}}}}\n",
        KEY="x",
    ),
    "default parameters go before the model, too": one(
        f"model: openai/m, {B}, {K}", "n", "router_settings: {default_litellm_params: {model: openai/n}}\n"
    ),
    "completion_model": Case(
        listed(A, ("b", f"model: openai/m, {B}, {K}")) + "general_settings: {completion_model: b}\n",
        {"a": "m", "b": "m"},
    ),
    "completion_model, in the provider's words": Case(
        listed(A, ("b", f"model: openai/m, {B}, {K}")) + "general_settings: {completion_model: openai/m}\n",
        {"a": "m", "b": "m"},
    ),
    "completion_model, and it is not there": one(
        f"model: openai/n, {B}, {K}", None, "general_settings: {completion_model: missing}\n"
    ),
    **{
        f"a section of a wrong type: {section}": Case(ENTRY + section + "\n", starts=False)
        for section in (
            "litellm_settings: x",
            "general_settings: [x]",
            "environment_variables: [x]",
            "router_settings: {default_litellm_params: x}",
            "router_settings: {model_group_alias: [{b: a}]}",
        )
    },
    "sections that are empty": Case(
        ENTRY + "litellm_settings:\ngeneral_settings:\nrouter_settings:\nenvironment_variables:\n", {"a": "n"}
    ),
    "variables of the configuration": many(
        ("model: openai/n", "n"),
        ("model: openai/n, api_base: os.environ/XB, api_key: os.environ/XK", "n"),
        rest=f"environment_variables: {{OPENAI_API_BASE: '{BASE}', OPENAI_API_KEY: 5, XB: '{UNUSED}', XK: x}}\n",
        OPENAI_API_BASE=UNUSED,
    ),
    "variables of the configuration come too late for its entries": one(
        "model: openai/n, api_base: os.environ/XB, api_key: os.environ/XK",
        None,
        f"environment_variables: {{XB: '{BASE}', XK: none}}\n",
    ),
    "credentials": many(
        ("model: openai/n, litellm_credential_name: c", "n"),
        ("model: openai/n, litellm_credential_name: os.environ/NAME", "n"),
        ("model: openai/n, litellm_credential_name: c, api_key: own", "n"),
        (f"model: openai/n, litellm_credential_name: not-there, {B}, {K}", "n"),
        (f"model: openai/n, litellm_credential_name: not-there, {B}", None),
        (f"model: openai/n, litellm_credential_name: C, {B}", None),
        (f"model: hosted_vllm/n, litellm_credential_name: not-there, {B}", "n"),
        rest=credential(f"{B}, {K}"),
        NAME="c",
    ),
    "a credential's key from a variable": one(
        "model: openai/n, litellm_credential_name: c", "n", credential(f"{B}, api_key: os.environ/KEY"), KEY="x"
    ),
    "a credential's key from a variable that is not set": one(
        "model: openai/n, litellm_credential_name: c", None, credential(f"{B}, api_key: os.environ/KEY")
    ),
    "a credential without a key": one("model: openai/n, litellm_credential_name: c", None, credential(B)),
    "a credential without a key, and the usual one": one(
        "model: openai/n, litellm_credential_name: c", "n", credential(B), OPENAI_API_KEY="x"
    ),
    "a credential with base_url": one(
        "model: openai/n, litellm_credential_name: c", "n", credential(f"base_url: '{BASE}', {K}")
    ),
    "a credential that names the provider": many(
        ("model: openai/n, litellm_credential_name: c", "openai/n"),
        ("model: n, litellm_credential_name: c", None),
        rest=credential(f"custom_llm_provider: hosted_vllm, {B}, {K}"),
    ),
    "two credentials of one name": one(
        "model: openai/n, litellm_credential_name: c",
        "n",
        credential(f"{B}, {K}").replace(
            "]\n", f", {{credential_name: c, credential_info: {{}}, credential_values: {{api_base: '{UNUSED}'}}}}]\n"
        ),
    ),
    "a credential without its info": Case(ENTRY + credential(B, info=""), starts=False),
    "a credential list of a wrong type": Case(ENTRY + "credential_list: {c: {}}\n", starts=False),
    "a pattern": Case(
        listed(("jerry-*", f"model: 'openai/jerry-*', {B}, {K}")),
        {"jerry-xl": "jerry-xl", "jerry-l": "jerry-l", "other": None},
    ),
    "a pattern for all": Case(
        listed(("*", f"model: 'openai/*', {B}, {K}")),
        {"jerry-xl": "jerry-xl", "openai/jerry-xl": "openai/jerry-xl", "gpt-4o": "gpt-4o"},
    ),
    "a pattern of a provider": Case(
        listed(("openai/*", f"model: 'openai/*', {B}, {K}")),
        {"jerry-xl": None, "openai/jerry-xl": "jerry-xl", "gpt-4o": "gpt-4o"},
    ),
    "a pattern with a prefix": Case(
        listed(("studio/*", f"model: 'openai/*', {B}, {K}")), {"studio/jerry-xl": "jerry-xl", "jerry-xl": None}
    ),
    "a pattern at the beginning": Case(
        listed(("*-xl", f"model: 'openai/*-xl', {B}, {K}")),
        {"jerry-xl": "jerry-xl", "jerry-xl-2": "jerry-xl", "xl": None},
    ),
    "a pattern for one name": Case(listed(("*", f"model: openai/n, {B}, {K}")), {"jerry-xl": "n"}),
    "a pattern of a provider that needs no key": Case(listed(("*", f"model: 'hosted_vllm/*', {B}")), {"x": "x"}),
    "more patterns than one": Case(
        listed(
            ("jerry-*", f"model: openai/m, {B}, {K}"),
            ("*", f"model: openai/n, {B}, {K}"),
            ("jerry-x*", f"model: openai/x, {B}, {K}"),
        ),
        {"jerry-xl": "x", "jerry-l": "m", "other": "n"},
    ),
    "equal patterns": Case(
        listed(("ab*", f"model: openai/one, {B}, {K}"), ("*bc", f"model: openai/two, {B}, {K}")), {"abbc": "one"}
    ),
    "a pattern and a name": Case(
        listed(("jerry-*", f"model: 'openai/jerry-*', {B}, {K}"), ("jerry-xl", f"model: openai/exact, {B}, {K}")),
        {"jerry-xl": "exact", "jerry-l": "jerry-l"},
    ),
    "patterns with two stars": Case(
        listed(("*-*", f"model: 'openai/*_*', {B}, {K}"), ("*.*", f"model: 'openai/*', {B}, {K}")),
        {"jerry-xl": "jerry_xl", "jerry.xl": None},
    ),
    "a model with more stars than its pattern": Case(
        listed(("jerry-*", f"model: 'openai/*/*', {B}, {K}")), {"jerry-xl": "xl/*"}
    ),
    "other letters of a pattern are themselves": Case(
        listed(("jerry.*", f"model: 'openai/*', {B}, {K}"), ("JERRY-*", f"model: 'openai/*', {B}, {K}")),
        {"jerry.xl": "xl", "jerryxl": None, "jerry-xl": None},
    ),
    "a model that is only a star": Case(listed(("*", f"model: '*', {B}, {K}")), {"jerry-xl": None}),
    "synonyms": Case(
        ENTRY + "router_settings: {model_group_alias: {b: a, c: {model: a, hidden: true}, d: missing, e: b}}\n",
        {"a": "n", "b": "n", "c": "n", "d": None, "e": None},
    ),
    "a synonym goes before an entry": Case(
        listed(A, ("b", f"model: openai/m, {B}, {K}")) + "router_settings: {model_group_alias: {a: b}}\n", {"a": "m"}
    ),
    "a synonym for what a pattern matches": Case(
        listed(("j*", f"model: 'openai/j*', {B}, {K}")) + "router_settings: {model_group_alias: {b: jxl}}\n",
        {"b": "jxl"},
    ),
    "other names for models": Case(
        listed(A, ("b", f"model: openai/m, {B}, {K}"))
        + "litellm_settings: {model_alias_map: {c: a, openai/m: openai/k}}\n",
        {"c": "n", "b": "k"},
    ),
    "what the entry says of the model": many(
        (f"model: openai/n, {B}, {K}, order: 1, weight: 1, rpm: 5, timeout: 5, drop_params: true", "n"),
        (f"model: openai/n, {B}, {K}, extra_headers: {{a: b}}, timeout: os.environ/NOT_SET", "n"),
        (f"model: openai/n, {B}, {K}, rpm: many", None),
    ),
    "model_info": Case(
        ENTRY
        + "".join(
            f"- model_name: {name}\n  litellm_params: {{model: openai/n, {B}, {K}}}\n  model_info: {{{info}}}\n"
            for name, info in (
                ("b", "mode: embedding"),
                ("c", "disabled: true"),
                ("d", "blocked: true"),
                ("e", "supported_environments: [production]"),
                ("f", "supported_environments: [staging]"),
                ("g", "mode: responses"),
                ("h", "id: x, base_model: gpt-4o, access_groups: [y]"),
            )
        ),
        {"b": "n", "c": "n", "d": None, "e": "n", "f": None, "g": None, "h": "n"},
        {"LITELLM_ENVIRONMENT": "production"},
    ),
    "addresses": many(
        (f"model: openai/n, api_base: 'http://127.0.0.1:{PORT}/v1/', {K}", "n"),
        (f"model: openai/n, api_base: 'HTTP://LOCALHOST:{PORT}/v1', {K}", "n"),
        (f"model: openai/n, api_base: 'http://0.0.0.0:{PORT}/v1', {K}", "n"),
        (f"model: openai/n, api_base: 'http://[::ffff:127.0.0.1]:{PORT}/v1', {K}", "n"),
        (f"model: openai/n, api_base: 'http://127.0.0.1:0{PORT}/v1', {K}", "n"),
        (f"model: hosted_vllm/n, api_base: '{BASE}/chat/completions', {K}", "n"),
        (f"model: hosted_vllm/n, api_base: '{BASE}//', {K}", "n"),
        (f"model: openai/n, api_base: 'http://127.0.0.1:{PORT}', {K}", None),
        (f"model: hosted_vllm/n, api_base: 'http://127.0.0.1:{PORT}/', {K}", None),
        (f"model: openai/n, api_base: '{BASE}//', {K}", None),
        (f"model: openai/n, api_base: '{BASE}/chat/completions', {K}", None),
        (f"model: openai/n, api_base: 'http://127.0.0.1:{PORT}/V1', {K}", None),
        (f"model: openai/n, api_base: '{BASE}?x=1', {K}", None),
        (f"model: openai/n, api_base: 'http://u:p@127.0.0.1:{PORT}/v1', {K}", None),
        (f"model: openai/n, api_base: '127.0.0.1:{PORT}/v1', {K}", None),
        (f"model: openai/n, api_base: 'localhost:{PORT}/v1', {K}", None),
        (f"model: openai/n, api_base: 'http://127.1:{PORT}/v1', {K}", None),
        (f"model: openai/n, api_base: 'http://2130706433:{PORT}/v1', {K}", None),
        (f"model: openai/n, api_base: 'https://127.0.0.1:{PORT}/v1', {K}", None),
        (f"model: openai/n, api_base: ' {BASE}', {K}", None),
        (f"model: openai/n, api_base: '{BASE} ', {K}", None),
        (f"model: openai/n, api_base: 'http:/127.0.0.1:{PORT}/v1', {K}", None),
        (f"model: openai/n, api_base: 7, {K}", None),
        (f"model: openai/n, api_base: [x], {K}", None),
    ),
    "anchors and merge keys": Case(
        f"x: &e\n  model: openai/n\n  api_base: '{BASE}'\n  api_key: none\nmodel_list:\n- model_name: a\n"
        "  litellm_params: *e\n- model_name: b\n  litellm_params: {<<: *e, model: openai/m}\n",
        {"a": "n", "b": "m"},
    ),
    "keys that are given twice": Case(
        listed(("old", f"model: openai/old, {B}, {K}")) + listed(("a", f"model: openai/m, model: openai/n, {B}, {K}")),
        {"a": "n", "old": None},
    ),
    "a byte order mark": Case(ENTRY, {"a": "n"}, encoding="utf-8-sig"),
    "CRLF": Case(ENTRY.replace("\n", "\r\n"), {"a": "n"}),
    "UTF-16": Case(ENTRY, encoding="utf-16", starts=False),
    "tabs": Case("model_list:\n\t- model_name: a\n", starts=False),
    "two documents": Case(ENTRY + "---\nmodel_list: []\n", starts=False),
    "nothing": Case("", starts=False),
    "comments alone": Case("# nothing\n", starts=False),
    "no models": Case("model_list: null\n", {"a": None}),
    "a list": Case("- a\n", starts=False),
    "a model_list that is none": Case("model_list: {a: b}\n", starts=False),
    "an item that is nothing": Case(ENTRY + "- null\n", starts=False),
    "an item without parameters": Case(ENTRY + "- {model_name: b}\n", starts=False),
    "an item without a model": Case(ENTRY + "- {model_name: b, litellm_params: {}}\n", starts=False),
    "an item without a name": Case(ENTRY + "- {litellm_params: {model: openai/n}}\n", starts=False),
    "an item with a number for a name": Case(
        ENTRY + "- {model_name: 7, litellm_params: {model: openai/n, api_key: x}}\n", starts=False
    ),
    "an item with empty information": Case(ENTRY + "  model_info:\n", starts=False),
    "a model that has no value": Case(listed(A, ("b", "model: os.environ/NOT_SET")), starts=False),
    "an include": Case(include("[m.yaml]"), {"a": "n"}, files={"m.yaml": ENTRY}),
    "includes are joined": Case(
        include("[config.yaml, m.yaml, m.yaml]") + listed(("b", f"model: openai/m, {B}, {K}")),
        {"a": "n", "b": "m"},
        files={"m.yaml": ENTRY},
    ),
    "an include in an include, beside it": Case(
        include("[d/m.yaml]"), {"a": "n"}, files={"d/m.yaml": include("[k.yaml]"), "d/k.yaml": ENTRY}
    ),
    "an include in an include, beside the first": Case(
        include("[d/m.yaml]"), {"a": "n"}, files={"d/m.yaml": include("[k.yaml]"), "k.yaml": ENTRY}
    ),
    "an include that is empty": Case(include("[m.yaml]") + ENTRY, {"a": "n"}, files={"m.yaml": ""}),
    "an include replaces what is not a list": Case(
        include("[m.yaml]") + listed(("a", f"model: openai/n, {B}")) + "litellm_settings: {api_key: none}\n",
        {"a": None},
        files={"m.yaml": "litellm_settings: {drop_params: true}\n"},
    ),
    "an include without models takes them away": Case(
        include("[m.yaml]") + ENTRY, {"a": None}, files={"m.yaml": "model_list:\n"}
    ),
    "no includes": Case(include("[]") + ENTRY, {"a": "n"}),
    # Written by people, for other servers; only the address is ours.
    "one model under every name": Case(
        listed(
            ("default", f"model: openai/n, {B}, api_key: not-needed"),
            ("*", f"model: openai/n, {B}, api_key: not-needed"),
            ("hipfire", f"model: openai/n, {B}, api_key: not-needed"),
        ),
        {"default": "n", "hipfire": "n", "claude-opus": "n"},
    ),
    "what a chat client needs in every request": one(
        f"model: openai/n, {B}, {K}, extra_body: {{chat_template_kwargs: {{enable_thinking: false}}}}, "
        "drop_params: true, max_tokens: 2048, temperature: 0.2, timeout: 3600",
        "n",
        "litellm_settings: {drop_params: true, set_verbose: false, request_timeout: 600}\n",
    ),
    "an address in the shell's way": one(
        "model: lm_studio/my/model, api_base: '${LM_STUDIO_API_BASE}', api_key: lm-studio",
        None,
        LM_STUDIO_API_BASE=BASE,
    ),
    "a provider's name twice, and the usual variables": one(
        "model: openai/openai/gpt-5.1, api_base: os.environ/OPENAI_BASE_URL, api_key: os.environ/OPENAI_API_KEY",
        "openai/gpt-5.1",
        OPENAI_BASE_URL=BASE,
        OPENAI_API_KEY="x",
    ),
    "an LM Studio without v1": one(
        f"model: lm_studio/n, api_base: 'http://localhost:{PORT}', api_key: lm-studio", None
    ),
    "an ollama with v1": one(f"model: ollama/PetrosStav/gemma3-tools:4b, {B}", None),
    "a server of text-generation-webui": one(
        f"model: openai/n, custom_llm_provider: openai, api_base: 'http://127.0.0.1:{PORT}', api_key: dummy",
        None,
    ),
    "a vLLM in the words of its first guide": one(
        f"model: openai/facebook/opt-125m, api_base: 'http://0.0.0.0:{PORT}'", None
    ),
    "names with a provider, a colon and a slash": Case(
        listed(
            ("lm_studio/my-model", f"model: lm_studio/google/gemma-4-e4b, {B}"),
            ("qwen3:32b", f"model: openai/qwen3:32b, {B}, {K}"),
        ),
        {"lm_studio/my-model": "google/gemma-4-e4b", "qwen3:32b": "qwen3:32b"},
    ),
    "tiers of one family, and a pattern for the rest": Case(
        listed(
            ("claude-3-5-sonnet", f"model: openai/n, {B}, {K}"),
            ("claude-*", f"model: openai/m, {B}, {K}"),
            ("gpt-*", f"model: 'openai/gpt-*', {B}, {K}"),
        ),
        {"claude-3-5-sonnet": "n", "claude-opus-4": "m", "gpt-4o": "gpt-4o"},
    ),
    **{
        f"include: {what}": Case(include(what) + ENTRY, files={"m.yaml": ENTRY, "l.yaml": "- a\n"}, starts=False)
        for what in (
            "m.yaml",
            "5",
            "null",
            "{a: b}",
            "[5]",
            "[m.yaml, null]",
            "[not-there.yaml]",
            "['*.yaml']",
            "[l.yaml]",
            "['']",
        )
    },
}


def parsed(case: Case, folder: Path, port: int = 28123) -> dict[str, str | None] | None:
    """Return what our parser makes of a case; None if LiteLLM does not start with it."""
    for name, text in {"config.yaml": case.config, **case.files}.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text.replace(PORT, str(port)).encode(case.encoding))
    env = folder / "gateway.env"
    env.write_text("".join(f"{name}={value}\n" for name, value in case.env.items()).replace(PORT, str(port)))
    try:
        config = gatewayfiles.read(Gateway(str(folder / "config.yaml"), str(env), None, None))
    except Refused:
        return None
    if any(finding.severity is Impact.FAULT for finding in config.findings):
        return None
    return {name: _sent(config, name, port) for name in case.sends}


def _sent(config: gatewayfiles.GatewayConfig, name: str, port: int) -> str | None:
    """Return the name that reaches the server; None if a finding says that the request fails."""
    # A server that knows every name, at the path that all engines have.
    here = GatewayPort("here", "127.0.0.1", port, name, State.READY, Owner.MLXOPS, "m", answers_to_any=True)
    ports = [replace(here, paths=frozenset({CHAT}))]
    entries = [entry for entry in with_client_names(config, ports).entries if entry.alias == name]
    findings = core.compare(entries, ports, config.files, same_host)
    faults = [finding.code for finding in findings if finding.severity is Impact.FAULT]
    return None if faults or not entries else entries[0].certain_name


@pytest.mark.parametrize("name", CASES)
def test_configuration_is_read_as_litellm_reads_it(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    assert parsed(case, tmp_path) == (dict(case.sends) if case.starts else None)


@pytest.mark.timeout(400)
def test_real_litellm_does_what_the_table_says(litellm: Path) -> None:
    rows = [{**asdict(case), "asks": list(case.sends)} for case in CASES.values()]
    done = subprocess.run(
        [litellm / "bin" / "python", "-P", verdicts.__file__],  # its folder has a litellm of its own
        input=json.dumps(rows),
        env={"PATH": os.defpath, "LC_ALL": "C.UTF-8", "LITELLM_LOCAL_MODEL_COST_MAP": "True"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    wrong = []
    for (name, case), verdict in zip(CASES.items(), json.loads(done.stdout), strict=True):
        real = None if "start" in verdict else {asked: _reached(*answer) for asked, answer in verdict.items()}
        if real != (dict(case.sends) if case.starts else None):
            wrong.append(f"{name}: {verdict}")
    assert not wrong, "\n".join(wrong)


def _reached(status: int, names: list[str]) -> str | None:
    return names[-1] if status == 200 and names else None
