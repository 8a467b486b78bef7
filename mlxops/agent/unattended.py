"""`restore` without anybody who asks: what the system runs at boot, and by a timer.

It prints lines for people, into the job's log; the settings are those that the host was last agreed on.
"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

from mlxops.agent.place import place
from mlxops.agent.store import Store, now
from mlxops.agent.worker import begin
from mlxops.build import build_id
from mlxops.core.errors import MlxopsError, Refused
from mlxops.core.protocol import Asker, Done, Event, Failed, Note, Phase, Request


def run(state: Path) -> int:
    os.umask(0o077)
    try:
        return _restore(state)
    except MlxopsError as error:
        _tell(Failed(error))
        return int(error.exit)


def _restore(state: Path) -> int:
    agreed = Store(state, state / "no-registry-yet").agreed()
    if agreed is None:
        raise Refused(
            "never_agreed",
            f"the host was never agreed with: there is no {state / 'host.json'}",
            hint="inv deploy, or any change, agrees with it",
        )
    where = place(agreed, os.environ)
    asker = Asker("boot", socket.gethostname())
    journal, child = begin(
        Store(where.state, where.registry), Request("restore", {}, agreed, build_id(), asker, agreed=True)
    )
    final: Event | None = None
    for event in journal.follow():
        if event is not None:
            _tell(event)
            final = event
    if child is not None:
        child.wait()
    return int(final.error.exit) if isinstance(final, Failed) else 0


def _tell(event: Event) -> None:
    match event:
        case Note(message):
            text = message
        case Phase(name, message):
            text = f"{name}: {message}"
        case Done(result):
            rows = result.get("restored")
            text = f"restored {len(rows) if isinstance(rows, list) else 0}"
        case Failed(error):
            text = f"error: {error.message}; {error.why}; {error.hint}"
        case _:
            return
    sys.stdout.write(f"{now()} {text}\n")
    sys.stdout.flush()
