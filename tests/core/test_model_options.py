"""The options of a model and their origins, what `set` accepts, and the size class of an alias."""

from __future__ import annotations

import pytest

from mlxops.core import registry
from mlxops.core.errors import UsageError
from mlxops.core.model_options import (
    FAMILIES,
    KEYS,
    WITH_DEFAULT,
    options_of,
    parse,
    size_warning,
)
from mlxops.core.registry import Model

NEEDED = ("tool_call_parser", "reasoning_parser", "chat_template")
FILES = ("config.json", "chat_template.jinja")


def shown_options(
    model: Model, architecture: str | None, needed: tuple[str, ...] = NEEDED
) -> dict[str, tuple[object, str]]:
    options = options_of(model, "mlx-openai-server", architecture, FILES, needed=needed)
    return {option.key: (option.value, option.origin.value) for option in options}


def test_known_families_get_the_options_that_they_need() -> None:
    qwen = shown_options(Model("jerry-xl", "mlx-community/Qwen3-235B-A22B-Instruct-2507-6bit"), "qwen3_moe")
    assert qwen == {
        "engine": ("mlx-openai-server", "settings"),
        "tool_call_parser": ("qwen3_moe", "family"),
        "reasoning_parser": ("qwen3", "family"),
        "chat_template": ("chat_template.jinja", "family"),
    }
    gpt = shown_options(Model("jerry-l", "halley-ai/gpt-oss-120b-MLX-6bit-gs64"), "gpt_oss")
    assert (gpt["tool_call_parser"], gpt["reasoning_parser"]) == (("harmony", "family"), ("harmony", "family"))


def test_unknown_family_gets_no_options() -> None:
    assert shown_options(Model("m"), "llama").keys() == shown_options(Model("m"), None).keys() == {"engine"}


def test_entry_overrides_family_and_null_switches_off() -> None:
    entry = registry.parse(
        b'{"version": 1, "models": {"m": {"reasoning_parser": null, "tool_call_parser": "hermes"}}}'
    ).models["m"]
    options = shown_options(entry, "qwen3")
    assert options["reasoning_parser"] == (None, "registry")
    assert options["tool_call_parser"] == ("hermes", "registry")
    assert options["chat_template"] == ("chat_template.jinja", "family")


def test_missing_template_file_is_no_default() -> None:
    options = options_of(Model("m"), "mlx-openai-server", "qwen3", ("config.json",), needed=NEEDED)
    assert "chat_template" not in {option.key for option in options}


def test_option_that_the_engine_detects_gets_no_default() -> None:
    assert shown_options(Model("m"), "qwen3", needed=()).keys() == {"engine"}


def test_option_of_the_entry_has_origin_registry() -> None:
    entry = Model("m", engine="mlx-lm", context_length=4096, trust_remote_code=True, args=("--seed", "1"))
    assert shown_options(entry, None) == {
        "engine": ("mlx-lm", "registry"),
        "context_length": (4096, "registry"),
        "trust_remote_code": (True, "registry"),
        "args": (("--seed", "1"), "registry"),
    }


def test_no_family_trusts_repository_code() -> None:
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
def test_usual_size_gives_no_warning(alias: str, gigabytes: int) -> None:
    assert size_warning(alias, gigabytes * 10**9) is None


@pytest.mark.parametrize(("alias", "gigabytes"), [("jerry-xl", 34), ("jerry-s", 75), ("bench-l", 190), ("jerry-m", 5)])
def test_unusual_size_gives_a_warning(alias: str, gigabytes: int) -> None:
    warning = size_warning(alias, gigabytes * 10**9)
    assert warning is not None and alias in warning and f"{gigabytes}" in warning


# -- `set` --------------------------------------------------------------------------------------------------------


def test_set_parses_each_key_with_its_type() -> None:
    words = [
        *("revision=main", "engine=mlx-lm", "model_type=multimodal", "chat_template=/a b/t.jinja"),
        *("tool_call_parser=qwen3_moe", "reasoning_parser=harmony", "context_length=32768", "trust_remote_code=true"),
        'args=--max-tokens 512 --stop "a b"',
        "checks=tools,reasoning",
    ]
    written = parse(words).written
    assert written.keys() == KEYS.keys()
    assert written["context_length"] == 32768 and written["trust_remote_code"] is True
    assert written["args"] == ["--max-tokens", "512", "--stop", "a b"]
    assert written["checks"] == ["tools", "reasoning"]
    assert parse(['args=["--a", "b c"]']).written == {"args": ["--a", "b c"]}


def test_set_removes_a_key_or_writes_null() -> None:
    change = parse(["reasoning_parser=null", "context_length="])
    assert (change.written, change.removed) == ({"reasoning_parser": None}, ("context_length",))


@pytest.mark.parametrize(
    "word",
    [
        *(
            "context_length=0",
            "context_length=-1",
            "context_length=1e3",
            "context_length=٣",
            "context_length=9999999999",
        ),
        *("trust_remote_code=yes", "trust_remote_code=True", "model_type=whisper", "revision=../x", "revision=-o"),
        *(
            "tool_call_parser=a b",
            "tool_call_parser=--port",
            "engine=$(id)",
            "args=[1]",
            'args="',
            "args=[",
        ),
        *("chat_template=a\x1b[0m", "args=\x00", "engine=null", "context_length=null"),
    ],
)
def test_set_rejects_a_bad_value(word: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse([word])
    assert caught.value.code == "bad_value" and "remove it" in caught.value.hint
    assert caught.value.message.isprintable()


@pytest.mark.parametrize(
    "word", ["port=8100", "repo_id=a/b", "cache_path=/", "nonsense=1", "engine", "=x", "", "Engine=x"]
)
def test_set_rejects_other_keys(word: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse([word])
    assert caught.value.code == "unknown_key"


def test_set_rejects_no_key_and_a_repeated_key() -> None:
    for words in ([], ["engine=a", "engine="]):
        with pytest.raises(UsageError):
            parse(words)


@pytest.mark.parametrize("key", KEYS)
def test_set_key_is_read_back_without_a_problem(key: str) -> None:
    values = {"context_length": "1", "trust_remote_code": "false", "args": "--a", "model_type": "lm", "checks": "tools"}
    before = registry.parse(b'{"version": 1, "models": {"m": {"repo_id": "org/m", "x": 1}}}')
    written = before.set_fields("m", parse([f"{key}={values.get(key, 'abc')}"]).written)
    assert written.models["m"].problems == ()
    assert written.without_fields("m", [key]).raw == before.raw
    if key in WITH_DEFAULT:
        assert before.set_fields("m", {key: None}).models["m"].problems == ()
