"""The base of the lab's programs and servers. Standard library only."""

from __future__ import annotations

from types import TracebackType
from typing import Self


class Service:
    """A part of the lab that runs from `start` to `stop`, or while it is entered."""

    def start(self) -> None:
        raise NotImplementedError

    def stop(self) -> None:
        """End it. Also called after a `start` that failed half way."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
