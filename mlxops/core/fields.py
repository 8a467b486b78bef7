"""`set --model M --set KEY=VALUE`: the per-model fields of the registry, as a person types them. Pure."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mlxops.core.errors import UsageError
from mlxops.core.names import is_revision, shown

MODEL_TYPES = ("lm", "multimodal")
"""Those of mlx-openai-server that answer a chat completion, which is what a load is proven by."""
MAX_CONTEXT = 100_000_000
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Fields:
    """What changes in an entry: values to write (None is the null that switches a default off), keys to take out."""

    written: Mapping[str, object]
    removed: tuple[str, ...] = ()


def _text(value: str) -> str:
    if not value.isprintable() or len(value) > 1024:
        raise ValueError("it is not plain text of one line")
    return value


def _word(value: str) -> str:
    if _WORD.fullmatch(value) is None:
        raise ValueError("it is not a name: letters, digits, '.', '_', '-'")
    return value


def _model_type(value: str) -> str:
    if value not in MODEL_TYPES:
        raise ValueError(f"it is one of {', '.join(MODEL_TYPES)}")
    return value


def _revision(value: str) -> str:
    if not is_revision(value):
        raise ValueError("it is not a branch, tag or commit")
    return value


def _tokens(value: str) -> int:
    if re.fullmatch(r"[0-9]{1,9}", value, re.ASCII) is None or not 0 < int(value) <= MAX_CONTEXT:
        raise ValueError(f"it is a number of tokens, from 1 to {MAX_CONTEXT}")
    return int(value)


def _yes_or_no(value: str) -> bool:
    if value not in ("true", "false"):
        raise ValueError("it is true or false")
    return value == "true"


def _args(value: str) -> list[str]:
    """A JSON list, or words as a shell would split them."""
    try:
        words: object = json.loads(value) if value.lstrip().startswith("[") else shlex.split(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is neither words nor a JSON list: {error}") from None
    if not isinstance(words, list) or not all(isinstance(word, str) and word.isprintable() for word in words):
        raise ValueError("it is not a list of words")
    return words


KEYS: Mapping[str, Callable[[str], object]] = {
    "revision": _revision,
    "engine": _word,
    "model_type": _model_type,
    "chat_template": _text,
    "tool_call_parser": _word,
    "reasoning_parser": _word,
    "context_length": _tokens,
    "trust_remote_code": _yes_or_no,
    "args": _args,
}
WITH_DEFAULT = ("chat_template", "tool_call_parser", "reasoning_parser")
"""Keys that a model's family may have a default for: only for these does a null mean something."""


def parse(words: Sequence[str]) -> Fields:
    """`KEY=VALUE` writes, `KEY=` takes the key out (a default applies again), `KEY=null` switches a default off.

    Raises `UsageError`: nothing_to_set, unknown_key, set_twice, bad_value.
    """
    if not words:
        raise UsageError(
            "nothing_to_set",
            "--set KEY=VALUE is needed",
            why=f"the keys are {', '.join(KEYS)}",
            hint="for example: set --model jerry-xl --set context_length=32768",
        )
    written: dict[str, object] = {}
    removed: list[str] = []
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key not in KEYS:
            raise UsageError(
                "unknown_key",
                f"{shown(word)} sets nothing that is known",
                why=f"it is KEY=VALUE with one of the keys {', '.join(KEYS)}",
                hint="for example: --set reasoning_parser=qwen3; take it out: --set reasoning_parser=",
            )
        if key in written or key in removed:
            raise UsageError(
                "set_twice", f"{key} is set twice", why="an entry has one value for it", hint="give it once"
            )
        if value:
            written[key] = _value(key, value)
        else:
            removed.append(key)
    return Fields(written, tuple(removed))


def _value(key: str, value: str) -> object:
    if value == "null" and key in WITH_DEFAULT:
        return None
    if value == "null":
        raise UsageError(
            "bad_value",
            f"{key} has no default that null could switch off",
            why=f"a model's family has defaults for {', '.join(WITH_DEFAULT)} only",
            hint=f"take it out of the entry: --set {key}=",
        )
    try:
        return KEYS[key](value)
    except ValueError as error:
        raise UsageError(
            "bad_value", f"{shown(value)} is no value of {key}", why=str(error), hint=f"to take it out: --set {key}="
        ) from None
