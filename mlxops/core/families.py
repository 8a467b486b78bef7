"""Which options a model is served with, and where each comes from: its registry entry, its family, or the host.

Known families need options without which their answers are wrong: tool calls stay text, reasoning leaks into the
answer. They apply at load to keys that the entry does not have, are shown with their origin, and are never written.
A null in the entry switches one off.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum

from mlxops.core.registry import Model
from mlxops.core.units import amount

TEMPLATE = "chat_template.jinja"
"""The chat template as a file of its own in a repository, as transformers writes it since 4.43."""


class Origin(StrEnum):
    REGISTRY = "registry"
    FAMILY = "family"
    SETTINGS = "settings"


Value = str | int | bool | tuple[str, ...] | None


@dataclass(frozen=True)
class Option:
    """One option of a model: a key of its registry entry with the value that counts. None: switched off."""

    key: str
    value: Value
    origin: Origin

    def to_wire(self) -> dict[str, object]:
        value = list(self.value) if isinstance(self.value, tuple) else self.value
        return {"key": self.key, "value": value, "origin": self.origin.value}


_QWEN3 = {"reasoning_parser": "qwen3", "chat_template": TEMPLATE}
_HARMONY = {"tool_call_parser": "harmony", "reasoning_parser": "harmony"}

FAMILIES: Mapping[str, Mapping[str, str]] = {
    "qwen3": {"tool_call_parser": "qwen3", **_QWEN3},
    "qwen3_moe": {"tool_call_parser": "qwen3_moe", **_QWEN3},
    "gpt_oss": _HARMONY,
}
"""config.json's `model_type` -> options. The parsers' names are those of mlx-openai-server since 1.4; what GPT-OSS
generates is OpenAI's harmony format, the tags of which are part of the answer unless they are parsed."""


def options_of(
    model: Model,
    default_engine: str,
    architecture: str | None,
    files: Collection[str],
    *,
    needed: Collection[str],
) -> tuple[Option, ...]:
    """The options of `model` in the order in which they are shown.

    `architecture` is config.json's `model_type`, `files` are the names in its snapshot. `needed` are the keys that
    the engine has to be told; those that it finds out by itself get no default.
    """
    found = [Option("engine", model.engine or default_engine, _origin(model.engine is not None))]
    given: dict[str, Value] = dict(model.options)
    for key, value in FAMILIES.get(architecture or "", {}).items():
        if key in needed and key not in given and (key != "chat_template" or value in files):
            found.append(Option(key, value, Origin.FAMILY))
    if model.context_length is not None:
        given["context_length"] = model.context_length
    if model.trust_remote_code:
        given["trust_remote_code"] = True
    if model.args:
        given["args"] = model.args
    return (*found, *(Option(key, value, Origin.REGISTRY) for key, value in given.items()))


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
"""The size class that a slot's name ends with -> bytes of weights that nobody would be surprised by. They overlap:
what is large depends on the host, and a warning that is often wrong is soon not read."""


def size_warning(alias: str, weight_bytes: int) -> str | None:
    """A sentence, if the alias promises another size class than that of the model behind it."""
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
