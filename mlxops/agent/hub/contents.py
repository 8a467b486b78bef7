"""Read one file of a model repository: with size limits, parsed as engines parse it, compared with the hub's.

A file may differ from the hub's because a person edited it, or because a copy or a disk failed and it ends early.
mlxops keeps edits, and downloads truncated files again.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from pathlib import Path

from mlxops.common import files
from mlxops.core.text import NotUTF8, utf8

MAX_TEXT = 64 * 1024 * 1024
"""A tokenizer.json of 250,000 words has 35 million bytes, a config.json a few thousand."""
_LOST = b"\0\0"
"""The end of a text file whose length, but not its bytes, reached the disk before a power loss. A single NUL may belong
to UTF-16."""
_POINTER = b"version https://git-lfs."
"""The beginning of the small file that a clone without Git LFS has instead of a large one."""
_PIECE = 4 * 1024 * 1024
_LITERALS = ("true", "false", "null", "NaN", "Infinity", "-Infinity")
_TAG = re.compile(r"\{#.*?#\}|\{%[-+]?\s*(\w+)(.*?)%\}|\{\{.*?\}\}", re.DOTALL)
_BLOCKS = frozenset({"for", "if", "macro", "call", "filter", "block", "generation", "raw", "with", "autoescape"})
"""Jinja statements that need an end tag; `set` needs one if it has no `=`."""


class Damaged(Exception):
    """A file exists but cannot be used. The message says why."""

    def __init__(self, text: str, *, ends_early: bool = False) -> None:
        super().__init__(text)
        self.ends_early = ends_early
        """It is the beginning of a good file, so downloading it again would help."""


def printable(text: str) -> str:
    """Return text from outside as one short line of ASCII, with control characters and undecodable bytes escaped."""
    if len(text) <= 200 and text.isascii() and text.isprintable():
        return text
    escaped = text.encode("ascii", "backslashreplace").decode("ascii")
    escaped = "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in escaped)
    return escaped if len(escaped) <= 200 else escaped[:197] + "..."


def base(path: str) -> str:
    """Return the last part of a path, printable."""
    return printable(path.rpartition("/")[2])


def read(path: str, limit: int) -> bytes:
    """Return a file's bytes. Raises `OSError`, and `Damaged` if it is not a regular file or longer than `limit`."""
    try:
        return files.read(path, limit)
    except files.Unfit as error:
        raise Damaged(f"{base(path)} {error.strerror}") from None


def json_object(path: str, limit: int) -> dict[str, object]:
    """Read the JSON object in a file. Raises `OSError`, `Damaged`."""
    return parse(read(path, limit), base(path))


def parse(data: bytes, what: str) -> dict[str, object]:
    """Parse a JSON object as strictly as engines do: UTF-8 without a byte order mark. Raises `Damaged`."""
    try:
        parsed = json.loads(data.decode())
    except UnicodeDecodeError:
        raise Damaged(f"{what}: {_other_text(data)}", ends_early=_json_ends_early(data)) from None
    except json.JSONDecodeError as error:
        if is_pointer(data):
            raise Damaged(f"{what} is a Git LFS pointer, not the file itself", ends_early=True) from None
        if other := _other_text(data):
            raise Damaged(f"{what}: {other}", ends_early=_json_ends_early(data)) from None
        place = f"line {error.lineno}, column {error.colno}: {error.msg}"
        raise Damaged(f"{what} is not JSON ({place})", ends_early=_json_ends_early(data)) from None
    except (ValueError, RecursionError):
        raise Damaged(f"{what} is not JSON") from None
    if not isinstance(parsed, dict):
        raise Damaged(f"{what} is not a JSON object")
    return parsed


def is_pointer(start: bytes) -> bool:
    """Return whether a file with this beginning is a Git LFS pointer."""
    return start.startswith(_POINTER)


def _other_text(data: bytes) -> str | None:
    """Return why bytes are not UTF-8 without a byte order mark; None if they are."""
    if data.startswith(codecs.BOM_UTF8):
        return "it begins with a byte order mark; save it as UTF-8 without one"
    try:
        utf8(data)
    except NotUTF8 as error:
        return str(error)
    return None


def ends_early(path: str, name: str, size: int, whole: int) -> bool:
    """Return whether the file called `name`, of `size` bytes, is the beginning of the hub's file of `whole` bytes.

    False for a possible edit: JSON or a template that parses, text whose last line is complete, any longer file.
    """
    if size == 0:
        return whole > 0
    if size > MAX_TEXT:
        return size < whole
    data = read(path, MAX_TEXT)
    if is_pointer(data) or (data.endswith(_LOST) and is_text(name)):
        return True
    if size >= whole:
        return False
    if name.endswith(".json"):
        return _json_ends_early(data)
    if name.endswith(".jinja"):
        return _template_ends_early(data)
    return not (is_text(name) and data.endswith(b"\n"))


def is_text(name: str) -> bool:
    """Return whether a file of this name is text that people edit."""
    return name.endswith((".json", ".jinja", ".txt", ".py", ".md"))


def may_be_edit(path: str, name: str, size: int, whole: int) -> bool:
    """Return whether a file that differs from the hub's may be an edit: it is text and does not end early."""
    if not is_text(name) or size > MAX_TEXT or ends_early(path, name, size, whole):
        return False
    data = read(path, MAX_TEXT)
    try:
        data.decode("utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8")
    except UnicodeDecodeError:
        return False
    return True


def content_hash(path: str | Path, etag: str, limit: int | None = None) -> str | None:
    """Return the hash of a file's content in the form of `etag`: SHA-256 for LFS files of the hub, else git's SHA-1.

    None if the file cannot be read or is longer than `limit`, or if `etag` has neither form."""
    if re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", etag) is None:
        return None
    try:
        descriptor = files.open_file(path)
        with open(descriptor, "rb", buffering=0) as content:
            size = content.seek(0, 2)
            content.seek(0)
            if limit is not None and size > limit:
                return None
            git = len(etag) == 40
            digest = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False) if git else hashlib.sha256()
            while piece := content.read(_PIECE):
                digest.update(piece)
    except OSError:
        return None
    return digest.hexdigest()


def _text(data: bytes) -> str | None:
    """Decode text that may be cut in the middle of a character; None if it is not UTF-8."""
    try:
        return codecs.getincrementaldecoder("utf-8")().decode(data.rstrip(b"\0"))
    except UnicodeDecodeError:
        return None


def _json_ends_early(data: bytes) -> bool:
    text = _text(data)
    if text is None:
        return False
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        rest = text[error.pos :].strip()
        # If an edit lacks a closing quote, the string ends at its line, and json reports an error other than
        # "Unterminated string".
        return (
            error.msg.startswith("Unterminated string")
            or any(word.startswith(rest) for word in _LITERALS)
            or re.fullmatch(r"[.eE][+-]?", rest) is not None  # the rest of a number
            or (error.msg.startswith("Invalid \\") and len(rest) < len("\\u0000"))
        )
    except (ValueError, RecursionError):
        return False
    return data.endswith(_LOST)


def _template_ends_early(data: bytes) -> bool:
    """Return whether a template ends inside a tag or an open block, so that Jinja would not parse it."""
    text = _text(data)
    if text is None:
        return False
    open_blocks = 0
    for tag in _TAG.finditer(text):
        word, rest = tag[1] or "", tag[2] or ""
        if word in _BLOCKS or (word == "set" and "=" not in rest):
            open_blocks += 1
        elif word.startswith("end"):
            open_blocks -= 1
    remainder = _TAG.sub("", text)
    return open_blocks > 0 or remainder.endswith("{") or any(opening in remainder for opening in ("{%", "{{", "{#"))
