"""`serve`: from the command line to the running server, and to its end."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from types import FrameType

from mlxops.control.client import HostTarget
from mlxops.core.commands.serve import Address, Serve
from mlxops.core.errors import Refused, UsageError

_FILES = {"alerts": "alerts.yml", "dashboard": "dashboard.json"}


def packaged(name: str) -> str:
    """Return the alert rules or the dashboard."""
    return (files("mlxops.control.serve") / _FILES[name]).read_text(encoding="utf-8")


def serve(
    request: Serve, find: Callable[[], Sequence[HostTarget]], path: Path | None, say: Callable[[str], None]
) -> None:
    """Watch the hosts and serve until SIGTERM or Ctrl-C.

    `find` reads hosts.yaml, which is at `path`. Raises `UsageError` and `Refused` before the server runs.
    """
    try:
        from mlxops.control.serve import web
        from mlxops.control.serve.exposition import Exposition
    except ModuleNotFoundError as error:
        raise UsageError(
            "serve_not_installed",
            f"serve needs a package that is not installed: {error.name}",
            why="only this command needs it",
            hint="install mlxops with the extra: pip install 'mlxops[serve]', in its clone pip install -e '.[serve]'",
        ) from None
    from mlxops.control.serve.access import access_to, read_token
    from mlxops.control.serve.hosts import Hosts

    token = read_token(Path(request.token_file).expanduser()) if request.token_file else None
    access = access_to(request.address, token, request.known_as.split(",") if request.known_as else ())
    listener = _listen(request.address)
    try:
        hosts = Hosts(find, path, request.interval, say)
    except BaseException:
        listener.close()
        raise

    server = web.server(web.application(Exposition(hosts), access, say), hosts.refresh)

    def end() -> None:
        server.should_exit = True
        hosts.begin_close()

    bound = Address(request.address.host, listener.getsockname()[1])
    with _ended_by_signals(end):
        say(f"metrics: http://{bound}/metrics")
        try:
            server.run(sockets=[listener])
        finally:
            hosts.close()


def _listen(address: Address) -> socket.socket:
    """Raises `Refused` (cannot_listen)."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    try:
        return socket.create_server((address.host, address.port), family=family)
    except OSError as error:
        raise Refused(
            "cannot_listen",
            f"{address} cannot be listened on",
            why=error.strerror or str(error),
            hint="is another serve running? `mlxctl serve --address 127.0.0.1:8191` uses another port",
        ) from None


@contextmanager
def _ended_by_signals(end: Callable[[], None]) -> Iterator[None]:
    """Call `end` at SIGTERM and SIGINT. uvicorn replaces the handlers while it runs, and sends its signals here after
    its end."""

    def handle(number: int, frame: FrameType | None) -> None:
        end()

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
