"""Read a model's weights into the system's page cache while the old server still serves: the new one then starts from
memory, and the port is without an answer for that much less."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from mlxops.agent.context import Context
from mlxops.agent.hub.snapshot import weight_files
from mlxops.core.errors import Refused
from mlxops.core.protocol import Phase, Progress
from mlxops.core.text import amount

SECONDS = 600.0
"""As long as a slow disk may take; a swap does not wait for more."""
SHARE = 0.9
"""Of the available memory that may be filled: what the system would have to swap out for it is not worth it."""
CHUNK = 16 * 1024 * 1024
TELL_SECONDS = 1.0


def warm(ctx: Context, path: Path, name: str) -> None:
    """Tells its progress. Raises `Refused` (unreadable_weights): better now than with nothing serving."""
    files = weight_files(path)
    total = sum(files.values())
    available = ctx.system.available()
    if available is None or total > available * SHARE:
        room = "unknown" if available is None else amount(available)
        ctx.note(f"the weights of {name} are not read ahead: {amount(total)} of them, {room} of memory to spare")
        return
    ctx.emit(Phase("warm", f"reading the weights of {name} ahead ({amount(total)})"))
    deadline = time.monotonic() + SECONDS
    done, told = 0, time.monotonic()
    buffer = bytearray(CHUNK)
    for file in files:
        try:
            with open(path / file, "rb", buffering=0) as weights:
                _announce(weights.fileno())
                while count := weights.readinto(buffer):
                    done += count
                    if time.monotonic() - told > TELL_SECONDS:
                        told = time.monotonic()
                        ctx.emit(Progress("warm", done, total))
                    if time.monotonic() > deadline:
                        ctx.note(f"{amount(done)} of {amount(total)} are read ahead after {SECONDS:.0f} s: enough")
                        return
        except OSError as error:
            raise Refused(
                "unreadable_weights",
                f"the weights of {name} cannot be read",
                why=f"{file}: {error.strerror}",
                hint="see to the host's disk; then delete the model's folder in the cache and load it again",
            ) from None


def _announce(fd: int) -> None:
    """Have the system read the whole file ahead. macOS has no posix_fadvise."""
    if sys.platform != "darwin":
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_WILLNEED)
