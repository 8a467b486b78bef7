"""An SSH agent that does what real ones do on a bad day: refuses, waits for a person, holds keys of other hardware."""

from __future__ import annotations

import hashlib
import os
import secrets
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from mlxops.control.ssh.public_keys import packed

FAILURE, IDENTITIES, ANSWER, SIGN, SIGNED = 5, 11, 12, 13, 14
SECURITY_KEY, APPLICATION = b"sk-ssh-ed25519@openssh.com", b"ssh:"


class FakeAgent:
    """`answer` makes a signature of the data; None: it refuses. What was asked to be signed is in `signed`."""

    def __init__(self, blobs: list[bytes], answer: Callable[[bytes], bytes | None]) -> None:
        self.path = Path(f"/tmp/mlxops-agent-{os.getpid()}-{secrets.token_hex(4)}")
        self.signed: list[bytes] = []
        self._blobs = blobs
        self._answer = answer
        self._listener = socket.socket(socket.AF_UNIX)
        self._open: list[socket.socket] = []
        self._threads: list[threading.Thread] = []

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self._open.append(connection)
                self._start(partial(self._serve, connection))

    def _start(self, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=work, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _serve(self, connection: socket.socket) -> None:
        with suppress(OSError), connection, connection.makefile("rb") as stream:
            while size := stream.read(4):
                request = stream.read(int.from_bytes(size, "big"))
                connection.sendall(packed(self._reply(request)))

    def _reply(self, request: bytes) -> bytes:
        if request[0] == IDENTITIES:
            keys = b"".join(packed(blob) + packed(b"fake") for blob in self._blobs)
            return bytes([ANSWER]) + len(self._blobs).to_bytes(4, "big") + keys
        if request[0] != SIGN:
            return bytes([FAILURE])
        end = 5 + int.from_bytes(request[1:5], "big")
        self.signed.append(request[5:end])
        data = request[end + 4 : end + 4 + int.from_bytes(request[end : end + 4], "big")]
        signature = self._answer(data)
        return bytes([FAILURE]) if signature is None else bytes([SIGNED]) + packed(signature)

    def __enter__(self) -> Self:
        self._listener.bind(str(self.path))
        self._listener.listen()
        self._start(self._accept)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for each in (self._listener, *self._open):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        for thread in self._threads:
            thread.join(5)
        self.path.unlink()


class SecurityKey:
    """A key on a FIDO token, without the token (PROTOCOL.u2f)."""

    def __init__(self) -> None:
        self._key = Ed25519PrivateKey.generate()
        public = self._key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        self.blob = packed(SECURITY_KEY) + packed(public) + packed(APPLICATION)

    def sign(self, data: bytes) -> bytes:
        touched = b"\x01" + (7).to_bytes(4, "big")
        signed = hashlib.sha256(APPLICATION).digest() + touched + hashlib.sha256(data).digest()
        return packed(SECURITY_KEY) + packed(self._key.sign(signed)) + touched
