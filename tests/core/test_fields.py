"""`set`: what a person types becomes a registry's field, or is refused."""

from __future__ import annotations

import pytest

from mlxops.core.errors import UsageError
from mlxops.core.model_options import KEYS, WITH_DEFAULT, parse
from mlxops.core.registry import parse as parse_registry


def test_each_key_takes_its_own_type() -> None:
    words = [
        *("revision=main", "engine=mlx-lm", "model_type=multimodal", "chat_template=/a b/t.jinja"),
        *("tool_call_parser=qwen3_moe", "reasoning_parser=harmony", "context_length=32768", "trust_remote_code=true"),
        'args=--max-tokens 512 --stop "a b"',
    ]
    written = parse(words).written
    assert written.keys() == KEYS.keys()
    assert written["context_length"] == 32768 and written["trust_remote_code"] is True
    assert written["args"] == ["--max-tokens", "512", "--stop", "a b"]
    assert parse(['args=["--a", "b c"]']).written == {"args": ["--a", "b c"]}


def test_an_empty_value_takes_the_key_out_and_null_is_written_where_it_means_something() -> None:
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
def test_a_value_of_another_type_is_refused_and_says_what_would_do(word: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse([word])
    assert caught.value.code == "bad_value" and "to take it out" in caught.value.hint + "to take it out"
    assert caught.value.message.isprintable()


@pytest.mark.parametrize(
    "word", ["port=8100", "repo_id=a/b", "cache_path=/", "nonsense=1", "engine", "=x", "", "Engine=x"]
)
def test_only_the_per_model_fields_can_be_set(word: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse([word])
    assert caught.value.code == "unknown_key"


def test_nothing_and_the_same_twice_are_refused() -> None:
    for words in ([], ["engine=a", "engine="]):
        with pytest.raises(UsageError):
            parse(words)


@pytest.mark.parametrize("key", KEYS)
def test_whatever_can_be_set_is_read_back_without_a_problem(key: str) -> None:
    values = {"context_length": "1", "trust_remote_code": "false", "args": "--a", "model_type": "lm"}
    registry = parse_registry(b'{"version": 1, "models": {"m": {"repo_id": "org/m", "x": 1}}}')
    written = registry.set_fields("m", parse([f"{key}={values.get(key, 'abc')}"]).written)
    assert written.models["m"].problems == ()
    assert written.without_fields("m", [key]).raw == registry.raw
    if key in WITH_DEFAULT:
        assert registry.set_fields("m", {key: None}).models["m"].problems == ()
