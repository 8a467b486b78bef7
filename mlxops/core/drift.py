"""Differences between what should be on a host and what is. Pure."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Drift:
    code: str
    port: int | None
    model: str | None
    message: str
    hint: str

    def to_wire(self) -> dict[str, object]:
        return asdict(self)
