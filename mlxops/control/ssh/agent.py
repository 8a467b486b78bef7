"""Ask an SSH agent for its keys and for signatures (draft-ietf-sshm-ssh-agent)."""

from __future__ import annotations

import socket
import time

from mlxops.control.ssh.public_keys import packed, unpacked

_REQUEST_IDENTITIES, _IDENTITIES_ANSWER, _SIGN_REQUEST, _SIGN_RESPONSE = 11, 12, 13, 14
_RSA_FLAGS = {"rsa-sha2-256": 2, "rsa-sha2-512": 4}
_MAX_BYTES = 16 * 1024 * 1024


class AgentError(Exception):
    """The agent does not answer, answers too late, or refuses."""


class Agent:
    """One connection. No call waits beyond `deadline` (monotonic)."""

    def __init__(self, path: str, deadline: float) -> None:
        """Raises `AgentError`."""
        self._deadline = deadline
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.settimeout(self._left)
            self._socket.connect(path)
        except (OSError, ValueError) as error:
            self._socket.close()
            raise AgentError(getattr(error, "strerror", None) or str(error)) from None

    def keys(self) -> list[bytes]:
        """Return the public keys and certificates that it can sign for. Raises `AgentError`."""
        answer = self._ask(bytes([_REQUEST_IDENTITIES]), _IDENTITIES_ANSWER)
        blobs: list[bytes] = []
        rest = answer[4:]
        for _ in range(int.from_bytes(answer[:4], "big")):
            blob, rest = _field(rest)
            _comment, rest = _field(rest)
            blobs.append(blob)
        return blobs

    def sign(self, blob: bytes, data: bytes, algorithm: str) -> bytes:
        """Return a signature by the key or certificate `blob`. May wait for a person. Raises `AgentError`."""
        flags = _RSA_FLAGS.get(algorithm.partition("-cert-")[0], 0)
        request = bytes([_SIGN_REQUEST]) + packed(blob) + packed(data) + flags.to_bytes(4, "big")
        return _field(self._ask(request, _SIGN_RESPONSE))[0]

    def close(self) -> None:
        self._socket.close()

    @property
    def _left(self) -> float:
        return max(0.001, self._deadline - time.monotonic())

    def _ask(self, request: bytes, expected: int) -> bytes:
        try:
            self._socket.settimeout(self._left)
            self._socket.sendall(packed(request))
            size = int.from_bytes(self._read(4), "big")
            if not 0 < size <= _MAX_BYTES:
                raise AgentError(f"it announces an answer of {size} bytes")
            answer = self._read(size)
        except TimeoutError:
            raise AgentError("it did not answer in time; it may wait for a touch or a confirmation") from None
        except OSError as error:
            raise AgentError(error.strerror or str(error)) from None
        if answer[0] != expected:
            raise AgentError("it refuses")
        return answer[1:]

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            self._socket.settimeout(self._left)
            part = self._socket.recv(size - len(data))
            if not part:
                raise AgentError("it closed the connection")
            data += part
        return data


def _field(data: bytes) -> tuple[bytes, bytes]:
    try:
        return unpacked(data)
    except ValueError:
        raise AgentError("its answer ends too early") from None
