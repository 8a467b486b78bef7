"""Check the identity of a host by its key or certificate. No option switches this off."""

from __future__ import annotations

import base64
import shlex
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mlxops.common.files import read_start
from mlxops.control.ssh import known_hosts, public_keys
from mlxops.control.ssh.config import Destination, ask_program, describe_option, error_text
from mlxops.control.ssh.known_hosts import HostKeys
from mlxops.core.errors import Unreachable

if TYPE_CHECKING:
    import paramiko

COMMAND = "KnownHostsCommand"
_MAX_BYTES = 1024 * 1024
_REVOCATION_LIST = b"SSHKRL\n\0"


def known_keys(destination: Destination, deadline: float) -> HostKeys:
    """Return what is known about the host before it shows its key. Raises `Unreachable`."""
    known = known_hosts.lookup(
        destination.known_hosts, destination.hostname, destination.port, destination.host_key_alias
    )
    return known + _from_command(destination, known.name, deadline, "ORDER", None)


def preferred(known: HostKeys, allowed: Sequence[str], offered: Sequence[str]) -> tuple[str, ...]:
    """Return the algorithms to ask for: those of HostKeyAlgorithms (`allowed`) that Paramiko has (`offered`).

    Certificates come first if an authority is known, then known kinds, so that a host with several keys shows one that
    can be checked. A certificate of an unknown authority still contains the host's key. If anything is revoked, ask for
    the certificate of a known key before the key: only the certificate shows that its authority is revoked.
    """
    usable = [name for name in allowed if public_keys.plain_kind(name) in offered]
    if not allowed:
        usable = [*offered, *(f"{name}{public_keys.CERTIFICATE}" for name in offered)]
    certified = [name for name in usable if name.endswith(public_keys.CERTIFICATE)]
    plain = [name for name in usable if name not in certified]
    first = [name for kind in known.kinds() for name in _algorithms(kind) if name in plain]
    of_known = [name for name in certified if known.revoked and name.removesuffix(public_keys.CERTIFICATE) in first]
    ordered = (certified, first, plain) if known.authorities else (of_known, first, plain, certified)
    return tuple(dict.fromkeys(name for group in ordered for name in group))


def _algorithms(kind: str) -> tuple[str, ...]:
    return ("rsa-sha2-512", "rsa-sha2-256") if kind == "ssh-rsa" else (kind,)


def policy(destination: Destination, known: HostKeys, deadline: float) -> paramiko.MissingHostKeyPolicy:
    """Return the policy that checks the host's key. Paramiko's own table of keys stays empty, so it always decides."""
    import paramiko

    class Policy(paramiko.MissingHostKeyPolicy):
        def missing_host_key(self, client: paramiko.SSHClient, hostname: str, key: paramiko.PKey) -> None:
            certificate = key.public_blob.key_blob if key.public_blob else None
            check(destination, known, key.asbytes(), certificate, deadline)

    return Policy()


def check(destination: Destination, known: HostKeys, blob: bytes, certificate: bytes | None, deadline: float) -> None:
    """Raises `Unreachable` host_key_unknown or host_key_changed unless the key, or its certificate, proves the host."""
    shown = certificate or blob
    known += _from_command(destination, known.name, deadline, "HOSTNAME", shown)
    parsed = public_keys.certificate(shown)
    authority = parsed.authority if parsed else None
    _refuse_revoked(destination, known, blob, certificate, authority)
    fault = ""
    if certificate is not None:
        fault = _fault(destination, known, certificate)
        if not fault:
            return
    if not known.accepts(blob):
        raise _bad_host_key(destination, known, blob, fault)


def _fault(destination: Destination, known: HostKeys, blob: bytes) -> str:
    """Return why a certificate does not prove the host; "" if it does."""
    certificate = public_keys.certificate(blob)
    if certificate is None:
        return "its certificate cannot be read"
    fault = known.fault_of(certificate, time.time(), destination.algorithms("CASignatureAlgorithms"))
    if fault is None and not public_keys.signature_is_good(blob):
        authority = public_keys.kind(certificate.authority)
        fault = f"the signature of its authority ({authority}) is wrong"
        if authority.startswith("sk-"):
            fault = f"its authority is a security key ({authority}), whose signatures mlxops cannot check"
    return f"its certificate proves nothing: {fault}" if fault else ""


# -- other sources ------------------------------------------------------------------------------------------------


def _from_command(destination: Destination, name: str, deadline: float, what: str, shown: bytes | None) -> HostKeys:
    """Return the keys that KnownHostsCommand prints, if one is set. Raises `Unreachable` if it fails, as ssh does."""
    nothing = HostKeys(name, (), (), frozenset())
    if destination.known_hosts_command is None:
        return nothing
    tokens = {
        "H": name,
        "I": what,
        "t": public_keys.kind(shown) if shown else "NONE",
        "f": public_keys.fingerprint(shown) if shown else "NONE",
        "K": base64.b64encode(shown).decode() if shown else "NONE",
    }
    try:
        program, *arguments = shlex.split(destination.known_hosts_command)
        argv = [program, *(destination.replaced(argument, tokens) for argument in arguments)]
        status, output, _ = ask_program(argv, max(0.001, deadline - time.monotonic()), _MAX_BYTES)
        if status:
            raise OSError(f"it ended with status {status}")
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise destination.unreachable(
            "host_key_unknown",
            f"its keys are not known, as {describe_option(destination, COMMAND)} failed: {error_text(error)}",
            f"run it: {destination.known_hosts_command}",
        ) from None
    text = output.decode("utf-8", "replace")
    return known_hosts.lookup_in(text, COMMAND, destination.hostname, destination.port, destination.host_key_alias)


def _refuse_revoked(
    destination: Destination, known: HostKeys, blob: bytes, certificate: bytes | None, authority: bytes | None
) -> None:
    if blob in known.revoked or authority in known.revoked:
        raise _revoked(destination, known, blob, "a @revoked line of known_hosts")
    for file in destination.revoked_host_keys:
        try:
            revoked = _is_revoked(file, blob, certificate, authority)
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            raise destination.unreachable(
                "host_key_unknown",
                f"its key cannot be checked for revocation: {file}: {error_text(error)}",
                f"repair the file, or correct {describe_option(destination, 'RevokedHostKeys')}",
            ) from None
        if revoked:
            raise _revoked(destination, known, blob, f"RevokedHostKeys {file}")


def _is_revoked(file: Path, blob: bytes, certificate: bytes | None, authority: bytes | None) -> bool:
    """Return whether a file revokes the key. Raises `OSError` if it cannot be read or has no valid list."""
    content = read_start(file, known_hosts.MAX_BYTES)
    if content.startswith(_REVOCATION_LIST):
        return _in_revocation_list(file, certificate or blob)
    keys = (public_keys.from_line(line.split()) for line in content.splitlines())
    return any(public_keys.plain(key) in (blob, authority) for key in keys if key)


def _in_revocation_list(file: Path, shown: bytes) -> bool:
    import tempfile

    with tempfile.NamedTemporaryFile(suffix=".pub") as key:
        key.write(f"{public_keys.kind(shown)} ".encode() + base64.b64encode(shown) + b"\n")
        key.flush()
        argv = ["ssh-keygen", "-Q", "-f", str(file), key.name]
        status, output, errors = ask_program(argv, 10.0, _MAX_BYTES)
    if status and b"REVOKED" not in output:
        raise OSError(errors.decode(errors="replace").strip() or f"ssh-keygen ended with {status}")
    return bool(status)


# -- refusals -----------------------------------------------------------------------------------------------------


def _compare(kind: str) -> str:
    file = {"ssh-rsa": "rsa", "ssh-ed25519": "ed25519"}.get(kind, "ecdsa")
    return f"`ssh-keygen -lf /etc/ssh/ssh_host_{file}_key.pub` on that machine"


def _details(known: HostKeys, blob: bytes) -> dict[str, object]:
    return {"kind": public_keys.kind(blob), "fingerprint": public_keys.fingerprint(blob), "name": known.name}


def _revoked(destination: Destination, known: HostKeys, blob: bytes, by: str) -> Unreachable:
    kind, shown = public_keys.kind(blob), public_keys.fingerprint(blob)
    error = destination.unreachable(
        "host_key_changed",
        f"it showed {kind} {shown}, which {by} forbids",
        f"do not connect; compare with {_compare(kind)}, and give the machine a new host key",
    )
    error.details.update(_details(known, blob))
    return error


def _bad_host_key(destination: Destination, known: HostKeys, blob: bytes, fault: str) -> Unreachable:
    kind, shown = public_keys.kind(blob), public_keys.fingerprint(blob)
    compare = _compare(kind)
    details = _details(known, blob)
    notes = f"; {fault}" if fault else ""
    if known.keys:
        first = known.keys[0]
        expected = next((key for key in known.keys if key.kind == kind), first)
        details["expected"] = public_keys.fingerprint(expected.blob)
        forget = shlex.join(["ssh-keygen", "-R", known.name, "-f", str(expected.file)])
        if str(expected.file) == COMMAND:
            forget = f"correct what {COMMAND} prints"
        error = destination.unreachable(
            "host_key_changed",
            f"it showed {kind} {shown}, but {expected.file}:{expected.line} has "
            f"{expected.kind} {details['expected']}: a reinstalled machine, or an attack{notes}",
            f"compare with {compare}; only if that is {shown}: {forget}, then `{_accepting(destination)}`",
        )
    else:
        error = destination.unreachable(
            "host_key_unknown",
            f"it showed {kind} {shown}, and no known_hosts file has a key for {known.name}{notes}"
            f"{_why_ssh_accepts(destination)}",
            f"compare with {compare}; if they are equal, {_how_to_accept(destination)}",
        )
    error.details.update(details)
    return error


_CARELESS = {
    "StrictHostKeyChecking": "makes ssh accept a key that is not known",
    "NoHostAuthenticationForLocalhost": "makes ssh accept every key of this machine",
    "VerifyHostKeyDNS": "makes ssh ask the DNS",
}


def _why_ssh_accepts(destination: Destination) -> str:
    """Name the settings because of which ssh may connect although mlxops refuses."""
    return "".join(
        f"; {describe_option(destination, option)} {effect}, and mlxops checks against known_hosts only"
        for option, effect in _CARELESS.items()
        if _is_careless(destination, option)
    )


def _is_careless(destination: Destination, option: str) -> bool:
    value = destination.options.get(option.lower(), ("",))[0]
    if option == "StrictHostKeyChecking":
        return value in ("no", "off", "false", "accept-new")
    return value in ("yes", "true", "ask")


def _how_to_accept(destination: Destination) -> str:
    if not any(_keeps(file) for file in destination.known_hosts):
        option = describe_option(destination, "UserKnownHostsFile")
        return f"name a file in {option}, where keys are kept, then run `{_accepting(destination)}` once and accept it"
    return f"run `{_accepting(destination)}` once and accept it"


def _keeps(file: Path) -> bool:
    return str(file) != "/dev/null"


def _accepting(destination: Destination) -> str:
    """Return the command with which ssh asks whether to accept the key, and then stores it."""
    wanted = []
    if destination.options.get("stricthostkeychecking", ("ask",))[0] in ("yes", "true"):
        wanted.append("StrictHostKeyChecking=ask")
    if destination.option("BatchMode"):
        wanted.append("BatchMode=no")
    wanted += [f"{option}=no" for option in list(_CARELESS)[1:] if _is_careless(destination, option)]
    return shlex.join(["ssh", *(word for option_text in wanted for word in ("-o", option_text)), *destination.typed])
