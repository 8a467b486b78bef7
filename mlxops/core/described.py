"""Enums whose members carry a one-sentence description. The manual's tables are made from them. Pure.

The description may be left out for type checkers only, which take a lookup such as `State("idle")` for a new member.
"""

from __future__ import annotations

from enum import IntEnum, StrEnum
from typing import Self


class DescribedText(StrEnum):
    """Members are `NAME = "value", "meaning"`."""

    _value_: str
    meaning: str

    def __new__(cls, value: str, meaning: str = "") -> Self:
        member = str.__new__(cls, value)
        member._value_, member.meaning = value, meaning
        return member


class DescribedNumber(IntEnum):
    """Members are `NAME = number, "meaning"`."""

    _value_: int
    meaning: str

    def __new__(cls, value: int, meaning: str = "") -> Self:
        member = int.__new__(cls, value)
        member._value_, member.meaning = value, meaning
        return member
