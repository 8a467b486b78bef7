"""Read a model's weights into the page cache while the old server still serves.

The new server then reads them from memory, which shortens the downtime of the port.
"""

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

LIMIT_SECONDS = 600.0
"""Longest time to spend on reading; a swap does not wait longer for a slow disk."""
MEMORY_SHARE = 0.9
"""Largest share of the available memory to fill. More would make the system swap."""
CHUNK_BYTES = 16 * 1024 * 1024
PROGRESS_SECONDS = 1.0


def prefetch_weights(ctx: Context, path: Path, name: str) -> None:
    """Read the weights, and emit the progress.

    Raises `Refused` (unreadable_weights) now, while the old server still serves.
    """
    files = weight_files(path)
    total = sum(files.values())
    available = ctx.system.available()
    if available is None or total > available * MEMORY_SHARE:
        room = "unknown" if available is None else amount(available)
        ctx.note(f"the weights of {name} are not read ahead: they have {amount(total)}, and {room} of memory is free")
        return
    ctx.emit(Phase("warm", f"reading the weights of {name} ahead ({amount(total)})"))
    deadline = time.monotonic() + LIMIT_SECONDS
    done, reported_at = 0, time.monotonic()
    buffer = bytearray(CHUNK_BYTES)
    for file in files:
        try:
            with open(path / file, "rb", buffering=0) as weights:
                _advise_readahead(weights.fileno())
                while count := weights.readinto(buffer):
                    done += count
                    if time.monotonic() - reported_at > PROGRESS_SECONDS:
                        reported_at = time.monotonic()
                        ctx.emit(Progress("warm", done, total))
                    if time.monotonic() > deadline:
                        progress = f"{amount(done)} of {amount(total)} are read"
                        ctx.note(f"reading ahead ends after {LIMIT_SECONDS:.0f} s: {progress}")
                        return
        except OSError as error:
            raise Refused(
                "unreadable_weights",
                f"the weights of {name} cannot be read",
                why=f"{file}: {error.strerror}",
                hint="check the host's disk; then delete the model's folder in the cache and load it again",
            ) from None


def _advise_readahead(fd: int) -> None:
    """Ask the system to read the whole file ahead. macOS has no posix_fadvise."""
    if sys.platform != "darwin":
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_WILLNEED)
