"""Where a model's options come from, and what a slot's name promises."""

from __future__ import annotations

import pytest

from mlxops.core.model_options import FAMILIES, Option, Origin, options_of, size_warning
from mlxops.core.registry import Model, parse

NEEDED = ("tool_call_parser", "reasoning_parser", "chat_template")
FILES = ("config.json", "chat_template.jinja")


def found(model: Model, architecture: str | None, needed: tuple[str, ...] = NEEDED) -> dict[str, tuple[object, str]]:
    options = options_of(model, "mlx-openai-server", architecture, FILES, needed=needed)
    return {each.key: (each.value, each.origin.value) for each in options}


def test_the_homelabs_occupants_get_the_flags_that_they_need() -> None:
    qwen = found(Model("jerry-xl", "mlx-community/Qwen3-235B-A22B-Instruct-2507-6bit"), "qwen3_moe")
    assert qwen == {
        "engine": ("mlx-openai-server", "settings"),
        "tool_call_parser": ("qwen3_moe", "family"),
        "reasoning_parser": ("qwen3", "family"),
        "chat_template": ("chat_template.jinja", "family"),
    }
    gpt = found(Model("jerry-l", "halley-ai/gpt-oss-120b-MLX-6bit-gs64"), "gpt_oss")
    assert (gpt["tool_call_parser"], gpt["reasoning_parser"]) == (("harmony", "family"), ("harmony", "family"))


def test_a_model_of_no_known_family_gets_nothing() -> None:
    assert found(Model("m"), "llama").keys() == found(Model("m"), None).keys() == {"engine"}


def test_an_entry_wins_over_its_family_and_a_null_switches_off() -> None:
    entry = parse(b'{"version": 1, "models": {"m": {"reasoning_parser": null, "tool_call_parser": "hermes"}}}').models[
        "m"
    ]
    options = found(entry, "qwen3")
    assert options["reasoning_parser"] == (None, "registry")
    assert options["tool_call_parser"] == ("hermes", "registry")
    assert options["chat_template"] == ("chat_template.jinja", "family")


def test_a_template_is_no_default_where_the_repository_has_none() -> None:
    options = options_of(Model("m"), "mlx-openai-server", "qwen3", ("config.json",), needed=NEEDED)
    assert "chat_template" not in {each.key for each in options}


def test_an_engine_that_finds_out_by_itself_is_told_nothing() -> None:
    assert found(Model("m"), "qwen3", needed=()).keys() == {"engine"}


def test_what_is_set_in_the_entry_is_shown_with_that_origin() -> None:
    entry = Model("m", engine="mlx-lm", context_length=4096, trust_remote_code=True, args=("--seed", "1"))
    assert found(entry, None) == {
        "engine": ("mlx-lm", "registry"),
        "context_length": (4096, "registry"),
        "trust_remote_code": (True, "registry"),
        "args": (("--seed", "1"), "registry"),
    }
    assert Option("args", ("--a",), Origin.REGISTRY).to_wire()["value"] == ["--a"]


def test_no_family_trusts_a_repositorys_code() -> None:
    assert all("trust_remote_code" not in defaults for defaults in FAMILIES.values())


@pytest.mark.parametrize(
    ("alias", "gigabytes"),
    [
        ("jerry-xl", 190),
        ("jerry-l", 95),
        ("jerry-m", 75),
        ("jerry-s", 34),
        ("bench-s", 0),
        ("utility-a", 500),
        ("xl", 1),
    ],
)
def test_the_homelabs_own_occupants_are_no_surprise(alias: str, gigabytes: int) -> None:
    assert size_warning(alias, gigabytes * 10**9) is None


@pytest.mark.parametrize(("alias", "gigabytes"), [("jerry-xl", 34), ("jerry-s", 75), ("bench-l", 190), ("jerry-m", 5)])
def test_a_model_of_another_class_than_its_slots_name_is_said(alias: str, gigabytes: int) -> None:
    warning = size_warning(alias, gigabytes * 10**9)
    assert warning is not None and alias in warning and f"{gigabytes}" in warning
