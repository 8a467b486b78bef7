"""Secrets in command lines and texts. In the tables, % is the secret."""

from __future__ import annotations

import shlex
import time

import pytest

from mlxops.core.redaction import command_line, redact, redact_argv, without_key

SECRET = "s3cr3t-Value"


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("mlx_lm.server --api-key % --port 8100", "mlx_lm.server --api-key ... --port 8100"),
        ("server --api-key=% --port 8100", "server --api-key=... --port 8100"),
        ("server --hf-token %", "server --hf-token ..."),
        ("server -token % x", "server -token ... x"),
        ("server --hfToken %", "server --hfToken ..."),
        ("server --apiKey %", "server --apiKey ..."),
        ("server --api-key -%", "server --api-key ..."),
        ("server --API_KEY %", "server --API_KEY ..."),
        ("server --password '% %'", "server --password ..."),
        ("server --basic-auth me:%", "server --basic-auth ..."),
        ("env HF_TOKEN=% mlx_lm.server", "env HF_TOKEN=... mlx_lm.server"),
        ("env OPENAI_API_KEY='a %' x", "env OPENAI_API_KEY=... x"),
        ("env LITELLM_MASTER_KEY=% AWS_SECRET_ACCESS_KEY=%", "env LITELLM_MASTER_KEY=... AWS_SECRET_ACCESS_KEY=..."),
        ("curl -H 'Authorization: Bearer %'", "curl -H 'Authorization: ...'"),
        ("curl -H 'X-Api-Key: %'", "curl -H 'X-Api-Key: ...'"),
        ("curl -H 'Cookie: session=%'", "curl -H 'Cookie: ...'"),
        ("server --model http://user:%@host/m", "server --model http://...@host/m"),
        ("server --model=https://%@host/m", "server --model=https://...@host/m"),
        ("server --model http://user:a@%@host/m", "server --model http://...@host/m"),
        ("server --model http://user:a/%@host/m", "server --model http://...@host/m"),
        ("server --model 'http://host/m?token=%&x=1'", "server --model 'http://host/m?token=...&x=1'"),
        (
            "sh -c 'HF_TOKEN=% exec x --api-key % --port 1'",
            "sh -c 'HF_TOKEN=... exec x --api-key ... --port 1'",
        ),
        ("sh -c 'server --api-key \"a %\" --port 1'", "sh -c 'server --api-key ... --port 1'"),
        ('python -c \'x["HF_TOKEN"] = "%"; y()\'', "python -c 'x[\"HF_TOKEN\"] = ...; y()'"),
        ('server --headers \'{"Authorization": "Bearer %"}\'', "server --headers '{\"Authorization\": ...}'"),
        ("'server --api-key %'", "'server --api-key ...'"),
        ("env MASTERKEY=% SECRET_KEY=% MY_KEY_2=%", "env MASTERKEY=... SECRET_KEY=... MY_KEY_2=..."),
        ('server --config {\\"api_key\\":\\"%\\"}', "server --config '{\"api_key\":...}'"),
        ('sh -c \'x {\\"api_key\\":\\"%\\"}\'', "sh -c 'x {\\\"api_key\\\":...}'"),
        ("server hf_abc%", "server hf_..."),
        ("server sk-proj-s3%", "server sk-..."),
    ],
)
def test_secret_is_hidden(line: str, shown: str) -> None:
    argv = shlex.split(line.replace("%", SECRET))
    assert SECRET not in command_line(argv)
    assert command_line(argv) == command_line(shlex.split(shown))
    assert len(redact_argv(argv)) == len(argv)


@pytest.mark.parametrize(
    "line",
    [
        "mlx_lm.server --model org/m --port 8100 --max-tokens 4096 --temp 0.1",
        "mlx-openai-server launch --model-path /models/m --served-model-name jerry-xl --context-length 32768",
        "server --ssl-keyfile /etc/key.pem --trust-remote-code --tool-call-parser qwen3",
        "server --use-auth-token --port 8100",
        "server --tokenizer-path /t --author me --monkey x",
        "server --model git@host:m --model http://host:8000/m",
        "python -m mlx_lm.server --chat-template-args '{\"enable_thinking\": false}'",
        "server --tokenizer org/tok --prompt-cache-bytes 5000000000",
    ],
)
def test_what_is_no_secret_stays(line: str) -> None:
    assert command_line(shlex.split(line)) == line


def test_control_characters_do_not_hide_a_secret() -> None:
    assert command_line(["server", "--api\x1b[0m-key", SECRET]) == "server --api-key ..."


def test_text_of_another_program_is_redacted() -> None:
    text = redact(f"401 for http://me:{SECRET}@host/v1 with Authorization: Bearer {SECRET}")
    assert text == "401 for http://...@host/v1 with Authorization: ..."
    assert redact("Proxy-Authorization: Basic dTpw, x") == "Proxy-Authorization: ..., x"


@pytest.mark.parametrize(
    "line",
    [
        "ValueError: Missing key: lm_head.weight",
        "KeyError: 'token'",
        "Basic training takes 5 steps",
        "Unexpected token: <unk>",
        "mlx_lm.server: error: unrecognized arguments: --max-tokens 5",
        "Expected keys: ['model', 'layers'] in http://127.0.0.1:8100/v1",
    ],
)
def test_message_of_an_engine_stays(line: str) -> None:
    assert redact(line) == line


def test_long_words_take_no_time() -> None:
    started = time.monotonic()
    for word in ("a" * 100_000, "-" * 100_000, "key=" * 20_000, "://" * 30_000, "a.-" * 30_000, "token " * 20_000):
        redact_argv([word, f"--{word}"])
    assert time.monotonic() - started < 5


KEY_TEXTS = [
    ("no such key: sk-12345678!", "no such key: [key]!"),
    ("no such key: sk-1234", "no such key: [key]"),
    ("no such key: sk-", "no such key: sk-"),
    ("sk-12345678 and sk-1234567", "[key] and [key]"),
    ("sk-1234 is the begin of another", "sk-1234 is the begin of another"),
]


@pytest.mark.parametrize(("text", "shown"), KEY_TEXTS)
def test_known_key_is_removed_also_where_the_text_is_cut(text: str, shown: str) -> None:
    assert without_key(text, "sk-12345678") == shown


def test_text_stays_without_a_known_key() -> None:
    assert without_key("x", None) == without_key("x", "") == "x"
