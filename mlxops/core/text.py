"""Bytes that should be UTF-8, as text; or what they are instead."""

from __future__ import annotations


def utf8(data: bytes) -> str:
    """The text, without a byte order mark. Raises `ValueError`, whose words say what the bytes are instead."""
    if data and not data.strip(b"\0"):
        raise ValueError("it holds nothing but zero bytes, as after a power loss")
    if encoding := _wide(data):
        raise ValueError(f"it is {encoding}; save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"it is not UTF-8: byte 0x{data[error.start]:02x} in line {line}; save it as UTF-8") from None


def _wide(data: bytes) -> str | None:
    """The encoding of more than one byte a character that this is, if it is one."""
    if data.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return "UTF-32"
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "UTF-16"
    # Without a mark: every second byte of what is mostly ASCII is zero.
    head = data[:64]
    if len(head) >= 8 and (not any(head[1::2]) or not any(head[::2])):
        return "UTF-16"
    return None
