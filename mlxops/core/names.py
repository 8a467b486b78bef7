"""Check arguments: names, repositories, ports, numbers, durations. A wrong one is refused before the host is asked."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from mlxops.core.errors import UsageError

if TYPE_CHECKING:
    from mlxops.core.settings import PortRange

AUTO = "auto"
DEFAULT_MODEL = "default_model"
"""mlx_lm.server's own name for the model that it was started with."""

# Compiled at the first use: compiling all of them takes a millisecond, at every start.
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
_REPO_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
_REVISION = r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}"


def is_name(text: str) -> bool:
    """Return whether this can be a model name or alias: `[A-Za-z0-9][A-Za-z0-9._-]{0,63}`."""
    return re.fullmatch(_NAME, text) is not None


def is_repo_id(text: str) -> bool:
    """Return whether this can be the `org/name` of a repository on the Hugging Face hub.

    Its rules (huggingface_hub's `validate_repo_id`): at most 96 characters, no `..`, no `--`, no leading or trailing
    `-` or `.`.
    """
    parts = text.split("/")
    return (
        len(parts) == 2
        and len(text) <= 96
        and all(re.fullmatch(_REPO_PART, part) for part in parts)
        and "--" not in text
        and ".." not in text
        and not text.endswith(".git")
    )


def is_model_name(text: str) -> bool:
    return is_name(text) or is_repo_id(text)


def is_revision(text: str) -> bool:
    """Return whether this can be a branch, tag or commit. An option, or a path that leaves its folder, cannot."""
    return re.fullmatch(_REVISION, text) is not None and ".." not in text


def shown(text: str) -> str:
    """Return user-supplied text in a form that is safe to print: quoted, escaped, of limited length."""
    return ascii(text if len(text) <= 80 else text[:77] + "...")


def model_name(text: str) -> str:
    """Raises `UsageError` (bad_name)."""
    if is_model_name(text):
        return text
    raise UsageError(
        "bad_name",
        f"{shown(text)} is not a model name",
        why="a name is 1-64 letters, digits, '.', '_' or '-', a letter or digit first; or a repo id org/name",
        hint="see the registered names: `mlxctl list`",
    )


def repo(text: str) -> tuple[str, str | None]:
    """Split `org/name[@revision]` into repo id and revision. Raises `UsageError` (bad_repo)."""
    repo_id, at, revision = text.partition("@")
    if not is_repo_id(repo_id) or (at and not is_revision(revision)):
        raise UsageError(
            "bad_repo",
            f"{shown(text)} is not a repository",
            why="a repository is org/name or org/name@revision",
            hint="for example: --repo mlx-community/Qwen3-4B-4bit",
        )
    return repo_id, revision if at else None


def port(text: str, ports: PortRange) -> int:
    """Raises `UsageError` (bad_port)."""
    number = int(text) if re.fullmatch(r"[0-9]{1,5}", text, re.ASCII) else None
    if number is None or number not in ports:
        raise UsageError(
            "bad_port",
            f"{shown(text)} is not a port of this host",
            why=f"the host's ports are {ports}",
            hint="see the slots: `mlxctl status`",
        )
    return number


def whole(text: str, flag: str, least: int, most: int) -> int:
    """Return a whole number. Raises `UsageError` (bad_number)."""
    if re.fullmatch(r"[0-9]{1,10}", text, re.ASCII) and least <= int(text) <= most:
        return int(text)
    raise UsageError(
        "bad_number",
        f"{shown(text)} is not a number for {flag}",
        why=f"it is a whole number from {least} to {most}",
        hint=f"for example: {flag} {max(least, 10)}",
    )


def seconds(text: str, flag: str, *, zero: bool = False) -> float:
    """Return a duration of at most a day, more than 0 s; `zero` allows 0 s. Raises `UsageError` (bad_duration)."""
    if re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,3})?", text, re.ASCII) and (zero or float(text)) and float(text) <= 86400:
        return float(text)
    raise UsageError(
        "bad_duration",
        f"{shown(text)} is not a duration for {flag}",
        why=f"a duration is a number of seconds, {'from 0' if zero else 'more than 0'} and at most 86400",
        hint=f"for example: {flag} 600",
    )
