"""Decode UTF-8, format bytes and seconds, and remove control characters. Pure."""

from __future__ import annotations

import re

_TERMINAL = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b[@-_]|[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class NotUTF8(ValueError):
    """`what` completes "it ..." and says what the bytes are instead; `line` is the first bad line, 0 for all lines."""

    def __init__(self, what: str, line: int = 0) -> None:
        super().__init__(f"it {what}" + (f", in line {line}" if line else "") + "; save it as UTF-8")
        self.what = what
        self.line = line


def utf8(data: bytes) -> str:
    """Return the text without a byte order mark. Raises `NotUTF8`."""
    if data and not data.strip(b"\0"):
        raise NotUTF8("holds nothing but zero bytes, as after a power loss")
    if encoding := _wide(data):
        raise NotUTF8(f"is {encoding}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise NotUTF8("is not UTF-8", data.count(b"\n", 0, error.start) + 1) from None


def _wide(data: bytes) -> str | None:
    """Return "UTF-16" or "UTF-32" if the bytes look like it; else None."""
    if data.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return "UTF-32"
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "UTF-16"
    # Without a byte order mark: in mostly ASCII text, every second byte is zero.
    head = data[:64]
    if len(head) >= 8 and (not any(head[1::2]) or not any(head[::2])):
        return "UTF-16"
    return None


def is_argument(text: str) -> bool:
    """Return whether a program can be given the text as an argument or a path. JSON can hold others."""
    return "\0" not in text and not any("\ud800" <= character <= "\udfff" for character in text)


def amount(size: int) -> str:
    """Return a size in bytes as text, in powers of ten, as disks and hubs count."""
    value = float(size)
    for unit in ("bytes", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.0f} {unit}" if unit == "bytes" or value >= 99.5 else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def duration(seconds: float) -> str:
    """Return seconds as text: `42 s`, `7 min`, `1 h 20 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def clean(text: str) -> str:
    """Return text without control characters and terminal escapes."""
    return _TERMINAL.sub("", text)
