"""Which options a model is served with, where each comes from, and how `set` reads KEY=VALUE. Pure.

An option comes from the registry entry, from the model's family, from the host, or from the memory that was left at
the load. Without the options of their family, some models answer wrongly: tool calls stay text, reasoning leaks into
the answer. A family's option applies at load if the entry lacks the key. It is shown with its origin and is never
written. A null in the entry switches it off.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from enum import StrEnum

from mlxops.core.errors import UsageError
from mlxops.core.frozen import dataclass
from mlxops.core.names import is_revision, shown
from mlxops.core.registry import Model
from mlxops.core.text import amount

MODEL_TYPES = ("lm", "multimodal")
"""The model types of mlx-openai-server that answer a chat completion, which is the proof of a load."""
MAX_CONTEXT = 100_000_000
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Fields:
    """Changes of an entry: values to write and keys to remove. A value of None switches a default off."""

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
    """Parse a JSON list, or words as a shell splits them."""
    try:
        words: object = json.loads(value) if value.lstrip().startswith("[") else shlex.split(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is neither words nor a JSON list: {error}") from None
    if not isinstance(words, list) or not all(isinstance(word, str) and word.isprintable() for word in words):
        raise ValueError("it is not a list of words")
    return words


def _checks(value: str) -> list[str]:
    from mlxops.core.conformance import PROMISES, parse_checks

    try:
        return list(parse_checks(value, "--set checks=", PROMISES))
    except UsageError as error:
        raise ValueError(f"{error.message}; {error.why}") from None


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
    "checks": _checks,
}
WITH_DEFAULT = ("chat_template", "tool_call_parser", "reasoning_parser", "checks")
"""Keys for which a model's family may have a default. Only these can be null."""


def parse(words: Sequence[str]) -> Fields:
    """Parse the arguments of `set`. `KEY=VALUE` writes a value, `KEY=` removes the key so that a default applies again,
    and `KEY=null` switches a default off.

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
                f"{shown(word)} is not a known setting",
                why=f"write KEY=VALUE with one of the keys {', '.join(KEYS)}",
                hint="for example: --set reasoning_parser=qwen3; to remove it: --set reasoning_parser=",
            )
        if key in written or key in removed:
            raise UsageError(
                "set_twice", f"{key} is set twice", why="an entry has one value for each key", hint="set it once"
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
            f"{key} cannot be null: it has no default to switch off",
            why=f"a model's family has defaults for {', '.join(WITH_DEFAULT)} only",
            hint=f"remove it from the entry: --set {key}=",
        )
    try:
        return KEYS[key](value)
    except ValueError as error:
        raise UsageError(
            "bad_value", f"{shown(value)} is not a value of {key}", why=str(error), hint=f"to remove it: --set {key}="
        ) from None


TEMPLATE = "chat_template.jinja"
"""The chat template as a file of its own in a repository, as transformers writes it since 4.43."""


class Origin(StrEnum):
    REGISTRY = "registry"
    FAMILY = "family"
    SETTINGS = "settings"
    BUDGET = "budget"
    """Chosen by the load from the memory that was left."""


Value = str | int | bool | tuple[str, ...] | None


@dataclass(frozen=True)
class Option:
    """One option of a model: a key of the registry entry with its effective value. None means switched off."""

    key: str
    value: Value
    origin: Origin


_QWEN3 = {"reasoning_parser": "qwen3", "chat_template": TEMPLATE}
_HARMONY = {"tool_call_parser": "harmony", "reasoning_parser": "harmony"}

FAMILIES: Mapping[str, Mapping[str, str]] = {
    "qwen3": {"tool_call_parser": "qwen3", **_QWEN3},
    "qwen3_moe": {"tool_call_parser": "qwen3_moe", **_QWEN3},
    "gpt_oss": _HARMONY,
}
"""config.json's `model_type` -> options. The parsers' names are those of mlx-openai-server since 1.4. GPT-OSS generates
OpenAI's harmony format, whose tags stay in the answer unless they are parsed."""


def options_of(
    model: Model,
    default_engine: str,
    architecture: str | None,
    files: Collection[str],
    *,
    needed: Collection[str],
) -> tuple[Option, ...]:
    """Return the options of `model` in the order in which they are shown.

    `architecture` is config.json's `model_type`, `files` are the names in its snapshot. `needed` are the keys that the
    engine cannot detect by itself. Only these get a default.
    """
    defaults = [Option("engine", model.engine or default_engine, _origin(model.engine is not None))]
    registered: dict[str, Value] = dict(model.options)
    for key, value in FAMILIES.get(architecture or "", {}).items():
        if key in needed and key not in registered and (key != "chat_template" or value in files):
            defaults.append(Option(key, value, Origin.FAMILY))
    if model.context_length is not None:
        registered["context_length"] = model.context_length
    if model.trust_remote_code:
        registered["trust_remote_code"] = True
    if model.args:
        registered["args"] = model.args
    if model.checks is not None:
        registered["checks"] = model.checks or None
    return (*defaults, *(Option(key, value, Origin.REGISTRY) for key, value in registered.items()))


def _origin(registered: bool) -> Origin:
    return Origin.REGISTRY if registered else Origin.SETTINGS


# Sizes behind an alias

_GB = 10**9
SIZE_CLASSES: Mapping[str, tuple[int, int | None]] = {
    "s": (0, 45 * _GB),
    "m": (20 * _GB, 90 * _GB),
    "l": (60 * _GB, 150 * _GB),
    "xl": (120 * _GB, None),
}
"""The size class at the end of a slot's alias -> the usual bytes of weights, from and to. The ranges overlap and are
wide because users ignore a warning that is often wrong."""


def size_warning(alias: str, weight_bytes: int) -> str | None:
    """Return a sentence if the weights do not fit the size class in the alias; else None."""
    _, dash, suffix = alias.rpartition("-")
    bounds = SIZE_CLASSES.get(suffix) if dash else None
    if bounds is None:
        return None
    least, most = bounds
    size = amount(weight_bytes)
    if weight_bytes < least:
        return f"the slot {alias} promises a model of class {suffix} ({least // _GB} GB or more); this one has {size}"
    if most is not None and weight_bytes > most:
        return f"the slot {alias} promises a model of class {suffix} (at most {most // _GB} GB); this one has {size}"
    return None
