"""Take secrets out of command lines and texts before they are shown. Pure.

The command of a server may have an API key, a token or a password. What is shown, sent or logged goes through here.
Code that decides by the words, such as the recognition of a server, gets the real ones.

It hides rather too much than too little: every value after a name that may be a secret's.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

from mlxops.core.text import clean

HIDDEN = "..."
KEY = "[key]"
KEY_BEGIN = 4
"""The first letters of a key that may be shown: `sk-` and one more are no secret."""
_CERTAIN = (
    r"secret|passw(?:or)?d|passphrase|authorization|cookie|(?:hf|access|auth|bearer|api)[-_]?token"
    r"|(?:api|hf|access|private|master|secret|auth|signing|encryption)[-_]?keys?"
)
_END = r"(?:[-_]?\d{1,3})?(?![\w-])"
_SECRET = (
    rf"(?:{_CERTAIN}|token|credentials?|bearer|(?<![a-z0-9])(?:auth|keys?|pass|pwd?)|(?<=[a-z])(?-i:Auth|Key)){_END}"
)
"""The end of a secret's name. Not of `--max-tokens`, whose value is a number, nor of `--ssl-keyfile`, a path."""
_SETTING = rf"(\W{{0,3}}[\w.-]*{_SECRET}\s*[=:]\s*)(?=\S).*"
"""A whole word: `HF_TOKEN=x`, `--api-key=x`, `Authorization: Bearer x`."""
_OPTION = rf"-[\w.-]*{_SECRET}"
_NEXT_OPTION = r"--[a-z][a-z0-9-]+(?:=.*)?"
_VALUE = r"""\\{0,3}(?:"[^"]*"?|'[^']*'?|[^\s"',;&}\])]+)"""
_SCHEME = r"(?:(?:basic|digest|negotiate|bearer)\s{1,9})?"
_INSIDE: tuple[tuple[str, str], ...] = (
    (r"(\w://)(?:[^\s/]{0,300}|[^\s/:]{0,100}:\S{0,300})@", rf"\1{HIDDEN}@"),
    (r"\b(bearer)\s{1,9}[\w.~+/=-]{4,}", rf"\1 {HIDDEN}"),
    (rf"(?<![\w.-])(-[\w.-]{{0,60}}{_SECRET}\s{{1,9}})(?!{_NEXT_OPTION}){_VALUE}", rf"\1{HIDDEN}"),
    (rf"({_SECRET}[\"'\]\\]{{0,4}}\s{{0,9}}=\s{{0,9}}){_VALUE}", rf"\1{HIDDEN}"),
    # In a message, "missing key: lm_head" is no secret.
    (rf"((?:{_SECRET}[\"'\\]{{1,4}}|(?:{_CERTAIN}){_END})\s{{0,9}}:\s{{0,9}}){_SCHEME}{_VALUE}", rf"\1{HIDDEN}"),
    (r"\b(hf_|sk-|gh[pousr]_|github_pat_|glpat-|xox[a-z]-|AKIA|eyJ)[\w.-]{8,}", rf"\1{HIDDEN}"),
)
"""Pattern -> replacement, within a longer text. The last one: tokens that are known by how they begin. All lengths are
bounded, so that no text takes long."""


def redact(text: str) -> str:
    """Return a text without the secrets in it: passwords in URLs, headers, settings of a secret name, known tokens."""
    for pattern, replacement in _INSIDE:
        text = re.sub(pattern, replacement, text, flags=re.IGNORECASE)
    return text


def without_key(text: str, key: str | None) -> str:
    """Return a text without a known key, also if the end of the text cuts it off: LiteLLM repeats a refused one."""
    if not key:
        return text
    text = text.replace(key, KEY)
    cut = next((size for size in range(len(key) - 1, KEY_BEGIN - 1, -1) if text.endswith(key[:size])), 0)
    return text[:-cut] + KEY if cut else text


def redact_argv(argv: Sequence[str]) -> tuple[str, ...]:
    """Return as many words, each without its secrets. The word after an option of a secret name is its value."""
    shown, after_option = [], False
    for word in argv:
        hidden = after_option and not re.fullmatch(_NEXT_OPTION, word)
        shown.append(HIDDEN if hidden else _redact_word(word))
        after_option = not hidden and re.fullmatch(_OPTION, word, re.IGNORECASE) is not None
    return tuple(shown)


def _redact_word(word: str) -> str:
    setting = re.fullmatch(_SETTING, word, re.IGNORECASE | re.DOTALL)
    return f"{setting[1]}{HIDDEN}" if setting else redact(word)


def command_line(argv: Sequence[str]) -> str:
    """Return a command for people: on one line, without secrets and control characters."""
    return shlex.join(redact_argv([clean(word) for word in argv]))
