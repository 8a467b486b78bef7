"""Log in with public keys, as OpenSSH does, without prompting."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Protocol

from mlxops.common.files import read_start
from mlxops.control.ssh import private_keys, public_keys
from mlxops.control.ssh.agent import Agent, AgentError
from mlxops.control.ssh.config import Destination, describe_option, error_text
from mlxops.control.ssh.identities import Identity, Offer, offers, signatures
from mlxops.control.ssh.private_keys import PrivateKey
from mlxops.control.ssh.public_keys import packed
from mlxops.core.errors import Unreachable

if TYPE_CHECKING:
    import paramiko

_REPORT_SECONDS = 0.4
"""Time to keep for reporting that an agent did not answer."""
_LAST_DAY = 253402300799
"""Of the year 9999."""
_UNSUPPORTED = {"gssapi-with-mic": "GSSAPIAuthentication", "hostbased": "HostbasedAuthentication"}
"""Methods of a host that mlxops does not have, and the option with which ssh uses each."""


class Login:
    """Replaces paramiko's AuthStrategy, of which only `authenticate` is used."""

    def __init__(self, destination: Destination, deadline: float) -> None:
        self._destination = destination
        self._deadline = deadline
        self._agent: Agent | None = None
        self._files: dict[Path, PrivateKey] = {}
        self._unusable: set[Path] = set()
        self._notes: list[str] = []
        self._hints: list[str] = []
        """Commands that may help."""
        self._refusals = 0
        """Number of keys that the host refused."""

    def authenticate(self, transport: paramiko.Transport) -> None:
        """Raises `Unreachable` authentication_failed, host_locked, or host_down if the connection ended first."""
        import paramiko

        banner = ""
        allowed: list[str] = []
        conversation = Conversation(transport, self._destination.user)
        try:
            offered = self._offers()
            for number, offer in enumerate(offered, 1):
                banner = banner or _banner(transport)
                try:
                    allowed = self._offer(conversation, offer, last=number == len(offered))
                    if not allowed:
                        return
                    if "publickey" not in allowed:
                        break  # the other methods need a person
                except paramiko.BadAuthenticationType as error:
                    allowed = error.allowed_types
                    break
                except paramiko.AuthenticationException:
                    self._refusals += not conversation.ended
                    self._note_refused(offer)
                except (AgentError, ValueError) as error:
                    self._notes.append(f"{_named(offer)}: {error_text(error)}")
                except paramiko.SSHException as error:
                    if conversation.ended:
                        break
                    self._notes.append(error_text(error))
            banner = banner or _banner(transport)
            if not conversation.ended and not allowed:
                try:
                    conversation.log_in_without()
                    return
                except paramiko.BadAuthenticationType as error:
                    allowed = error.allowed_types
                except paramiko.SSHException:
                    pass
            banner = banner or _banner(transport)
        finally:
            if self._agent is not None:
                self._agent.close()
        raise self._refused(banner, allowed, ended=conversation.ended)

    # -- choose what to offer

    def _offers(self) -> list[Offer]:
        destination = self._destination
        named = [identity for path in destination.identities for identity in self._identities(path)]
        held = self._held()
        certificates = [
            blob
            for path in destination.certificates
            if (blob := public_keys.from_file(path)) and public_keys.certificate(blob)
        ]
        possible = offers(
            named,
            certificates,
            held,
            identities_only=destination.identities_only,
            accepted=destination.algorithms("PubkeyAcceptedAlgorithms"),
        )
        return [offer for offer in possible if isinstance(offer.signer, bytes) or self._load(offer.signer)]

    def _identities(self, path: Path) -> list[Identity]:
        """Return a file's key, and the certificate beside it. OpenSSH reads that only if no CertificateFile is set."""
        blob = public_keys.from_file(path)
        if blob is None and self._load(path):
            blob = self._files[path].blob
        identities = [Identity(path, blob)] if blob else []
        beside = public_keys.from_file(path.with_name(f"{path.name}-cert"))
        if beside and not self._destination.certificates and public_keys.certificate(beside):
            identities.append(Identity(path, beside))
        return identities

    def _held(self) -> list[bytes]:
        path = self._destination.agent
        if path is None:
            return []
        try:
            # Give up on an agent that waits for a person while there is still time to report it.
            left = self._deadline - time.monotonic()
            self._agent = Agent(path, self._deadline - min(_REPORT_SECONDS, left / 5))
            return self._agent.keys()
        except AgentError as error:
            self._notes.append(f"the agent at {path} does not answer: {error}")
            return []

    def _load(self, path: Path) -> bool:
        """Read a private key. If that fails, note why and return False."""
        if path in self._files:
            return True
        if not os.path.isfile(path) or path in self._unusable:
            return False
        try:
            self._files[path] = private_keys.read(path)
            return True
        except private_keys.Encrypted:
            why = "is encrypted, and no agent has it"
            self._hints.append(shlex.join(["ssh-add", str(path)]))
        except (OSError, ValueError) as error:
            blob = public_keys.from_file(path)
            why = f"cannot be read: {error_text(error)}"
            if blob and public_keys.kind(blob).startswith("sk-"):
                why = "is on a security key, which mlxops can use only through an agent"
                self._hints.append(shlex.join(["ssh-add", str(path)]))
            elif blob == public_keys.from_line(_first_line(path)):
                why = "is a public key, and no agent has its private one"
        self._unusable.add(path)
        self._notes.append(f"{path} {why}")
        return False

    # -- offer it

    def _offer(self, conversation: Conversation, offer: Offer, *, last: bool) -> list[str]:
        """Log in, or raise what paramiko raises. Return the methods that the host wants in addition.

        The agent signs only for keys that the host accepts: it may ask a person each time.
        """
        import paramiko

        conversation.begin()  # the host sends its signature algorithms
        algorithm = self._algorithm(conversation.transport, offer)
        public = packed(algorithm.encode()) + packed(offer.blob)
        if isinstance(offer.signer, bytes) and not last and not conversation.would_accept(public):
            raise paramiko.AuthenticationException("the host does not take this key")
        return conversation.log_in_with(public, lambda data: self._sign(offer, data, algorithm))

    def _sign(self, offer: Offer, data: bytes, algorithm: str) -> bytes:
        if isinstance(offer.signer, bytes):
            assert self._agent is not None
            return self._agent.sign(offer.signer, data, algorithm)
        return self._files[offer.signer].sign(data, algorithm)

    def _algorithm(self, transport: paramiko.Transport, offer: Offer) -> str:
        """Return the signature algorithm; for RSA the first that both sides accept. Raises `ValueError` if none."""
        accepted = self._destination.algorithms("PubkeyAcceptedAlgorithms")
        possible = [name for name in signatures(public_keys.kind(offer.blob)) if not accepted or name in accepted]
        theirs = _server_algorithms(transport)
        if len(signatures(public_keys.kind(offer.blob))) > 1 and theirs:
            possible = [name for name in possible if name.partition("-cert-")[0] in theirs]
        if not possible:
            raise ValueError("the host accepts no RSA signatures with SHA-2, and mlxops makes no others")
        return possible[0]

    # -- report a refusal

    def _note_refused(self, offer: Offer) -> None:
        if isinstance(offer.signer, Path) and self._files[offer.signer].blob != public_keys.plain(offer.blob):
            self._notes.append(f"{offer.signer} and {offer.signer}.pub are not of one pair")
        certificate = public_keys.certificate(offer.blob)
        if certificate is None:
            return
        if certificate.valid_before <= time.time():
            what = f"expired on {_date(certificate.valid_before)}"
        elif certificate.valid_after > time.time():
            what = f"is not valid before {_date(certificate.valid_after)}"
        else:
            what = f"is for {', '.join(certificate.principals) or 'all accounts'}"
        self._notes.append(f"the certificate for {public_keys.fingerprint(certificate.key)} {what}")

    def _refused(self, banner: str, allowed: Sequence[str], *, ended: bool) -> Unreachable:
        destination = self._destination
        if re.search(r"\block(ed)?\b", banner, re.IGNORECASE):
            return destination.unreachable(
                "host_locked",
                f"it says: {banner[:200]}",
                f"after a restart FileVault waits for a person: log in once with `{destination.command}` and the "
                "password, or at the screen",
            )
        if ended and not self._refusals:
            # If there were too many keys, sshd would have refused one before.
            return destination.unreachable(
                "host_down", "the connection ended during the login", "try again; then look at the log of its sshd"
            )
        tried = [f"user {destination.user}"]
        if ended:
            tried.append("the host ended the connection: too many keys?")
        if allowed:
            tried.append(f"it wants {' or '.join(allowed)}")
        hint = self._say_unsupported(allowed)
        refused = destination.unreachable(
            "authentication_failed", "; ".join([*tried, *dict.fromkeys(self._notes)])[:600], hint
        )
        if ended:
            refused.details["ended"] = True
        return refused

    def _say_unsupported(self, allowed: Sequence[str]) -> str:
        """Note what ssh could do here and mlxops cannot. Return what to do next."""
        destination = self._destination
        for method, option in _UNSUPPORTED.items():
            if method in allowed and destination.option(option):
                self._notes.append(
                    f"{describe_option(destination, option)} is used by ssh, and not supported by mlxops"
                )
        provider = destination.option("PKCS11Provider")
        if provider:
            self._notes.append(
                f"{describe_option(destination, 'PKCS11Provider')} is not supported by mlxops, except through an agent"
            )
            self._hints.append(shlex.join(["ssh-add", "-s", provider]))
        if self._hints and destination.option("UseKeychain"):
            place = describe_option(destination, "UseKeychain")
            self._notes.append(f"{place} lets ssh take the passphrase from the Keychain, which mlxops cannot")
            self._hints = ["ssh-add --apple-load-keychain"]
        if self._hints:
            return f"put the key into the agent that ssh uses: {'; '.join(dict.fromkeys(self._hints))}"
        shown = shlex.join(["ssh", "-v", "-o", "BatchMode=yes", *destination.typed, "true"])
        return f"`{shown}` shows which key ssh uses, if any: ssh-add that key, or add one to authorized_keys there"


class Conversation:
    """The authentication part of an SSH connection (RFC 4252).

    Paramiko's own code requests the service again for each key, never asks before it signs, and signs in the thread
    that reads, so an agent that refuses ends the connection.
    """

    def __init__(self, transport: paramiko.Transport, user: str) -> None:
        self.transport = transport
        self._user = user
        self._handler = _handler(transport)
        self._serviced = False

    @property
    def ended(self) -> bool:
        """The connection has ended. Paramiko's thread may notice it later than what was sent last."""
        return self._handler.broken or not self.transport.is_active()

    def begin(self) -> None:
        """Request the authentication service, once. Raises `SSHException`."""
        import paramiko

        if not self._serviced:
            with contextlib.suppress(paramiko.AuthenticationException):
                self._handler.send("", b"\x05" + packed(b"ssh-userauth"))
            self._serviced = self._handler.agrees
        if not self._serviced:
            raise paramiko.SSHException("the connection ended")

    def would_accept(self, public: bytes) -> bool:
        """Ask whether the host would accept a key, without a signature. Raises as `log_in_with`."""
        import paramiko

        try:
            self._ask("publickey", b"\0" + public)
        except paramiko.BadAuthenticationType:
            raise
        except paramiko.AuthenticationException:
            pass
        return self._handler.agrees

    def log_in_with(self, public: bytes, sign: Callable[[bytes], bytes]) -> list[str]:
        """Log in with a key. Return the methods that the host wants in addition; empty if this was enough.

        Raises `AuthenticationException` if the host refuses the key, its subclass `BadAuthenticationType` if it wants
        no key, another `SSHException` if the connection ends, and what `sign` raises.
        """
        session = self.transport.session_id or b""
        request = self._request("publickey", b"\1" + public)
        return self._ask("publickey", b"\1" + public + packed(sign(packed(session) + request)))

    def log_in_without(self) -> None:
        """Log in without a key. Raises as `log_in_with`."""
        self._ask("none", b"")

    def _request(self, method: str, rest: bytes) -> bytes:
        return b"\x32" + b"".join(packed(each.encode()) for each in (self._user, "ssh-connection", method)) + rest

    def _ask(self, method: str, rest: bytes) -> list[str]:
        import paramiko

        self.begin()
        if self.ended:
            raise paramiko.SSHException("the connection ended")
        return self._handler.send(method, self._request(method, rest))


class _Handler(Protocol):
    agrees: bool
    """The host accepted the last request that was not yet a login: for the service, or whether a key would do."""
    broken: bool
    """A request could not be sent."""

    def send(self, method: str, message: bytes) -> list[str]:
        """Returns and raises as `AuthHandler.wait_for_response`."""


def _handler(transport: paramiko.Transport) -> _Handler:
    import paramiko
    from paramiko.auth_handler import AuthHandler

    class Handler(AuthHandler):
        agrees = False
        broken = False

        def send(self, method: str, message: bytes) -> list[str]:
            self.agrees = False
            self.auth_method = method
            self.auth_event = Event()
            try:
                self.transport._send_message(paramiko.Message(message))  # type: ignore[attr-defined]
            except (EOFError, OSError) as error:
                self.broken = True
                raise paramiko.SSHException(error_text(error)) from error
            return self.wait_for_response(self.auth_event)

        def _parse_service_accept(self, message: paramiko.Message) -> None:
            self._agreed()

        def _parse_userauth_info_request(self, message: paramiko.Message) -> None:
            """Handle USERAUTH_PK_OK, which has this number after a question about a key."""
            self._agreed()

        def _agreed(self) -> None:
            self.agrees = True
            if self.auth_event is not None:
                self.auth_event.set()

    transport.auth_handler = handler = Handler(transport)
    return handler


def _server_algorithms(transport: paramiko.Transport) -> list[str]:
    """Return the signature algorithms that the host accepts (RFC 8308); empty if it does not say."""
    extensions: dict[str, bytes] = transport.server_extensions  # type: ignore[attr-defined]
    return list(filter(None, extensions.get("server-sig-algs", b"").decode(errors="replace").split(",")))


def _date(seconds: int) -> str:
    return datetime.fromtimestamp(min(seconds, _LAST_DAY), UTC).strftime("%Y-%m-%d %H:%M UTC")


def _named(offer: Offer) -> str:
    if isinstance(offer.signer, Path):
        return str(offer.signer)
    return f"the agent's {public_keys.kind(offer.blob)} {public_keys.fingerprint(offer.blob)}"


def _first_line(path: Path) -> list[bytes]:
    try:
        return read_start(path, 65536).partition(b"\n")[0].split()
    except OSError:
        return []


def _banner(transport: paramiko.Transport) -> str:
    banner = transport.get_banner()
    text = banner.decode("utf-8", "replace") if isinstance(banner, bytes) else ""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())
