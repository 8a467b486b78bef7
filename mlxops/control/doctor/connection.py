"""Find options of the ssh configuration that mlxops does not follow."""

from __future__ import annotations

from mlxops.control.ssh.config import Destination, describe_option, resolve
from mlxops.core.doctor.findings import Finding, FindingCode

IGNORED = {
    "GSSAPIAuthentication": ("yes", "log in with a key"),
    "HostbasedAuthentication": ("yes", "log in with a key"),
    "VerifyHostKeyDNS": ("yes ask", "accept the host's key once with ssh"),
    "StrictHostKeyChecking": (
        "no off false accept-new",
        "mlxops always checks the host's key: accept it once with ssh",
    ),
    "PKCS11Provider": ("*", "put the key into an agent: ssh-add -s PROVIDER"),
    "RemoteCommand": ("*", "mlxops runs its agent instead"),
    "ForwardAgent": ("yes", "the host does not get your agent"),
    "LocalForward": ("*", "mlxops forwards no ports"),
    "RemoteForward": ("*", "mlxops forwards no ports"),
    "DynamicForward": ("*", "mlxops forwards no ports"),
    "SendEnv": ("*", "set variables of the servers in `env` in hosts.yaml"),
    "SetEnv": ("*", "set variables of the servers in `env` in hosts.yaml"),
    "Tunnel": ("yes true point-to-point ethernet", "mlxops opens no tunnel"),
}
"""Option -> the values (`*`: any) that mlxops does not follow, and what to do instead."""
_HARMLESS = {"sendenv": ("LANG", "LC_", "COLORTERM", "NO_COLOR")}
"""Values that users set for their own shells."""
SYSTEM_FILES = "(/etc/ssh/"
"""Systems set such options for all users. Debian sets GSSAPIAuthentication."""
RESOLVE_SECONDS = 10.0


def option_findings(ssh_name: str) -> list[Finding]:
    """Return a finding for each such option of a host. None if ssh cannot resolve it: the connection reports that."""
    from mlxops.core.errors import MlxopsError

    try:
        destination = resolve(ssh_name, RESOLVE_SECONDS)
    except MlxopsError:
        return []
    places = {
        describe_option(destination, option): instead
        for option, (values, instead) in IGNORED.items()
        if _is_set(destination, option, values)
    }
    return [
        Finding.of(FindingCode.SSH_OPTION_IGNORED, f"{place} is set", instead=instead)
        for place, instead in places.items()
        if SYSTEM_FILES not in place
    ]


def _is_set(destination: Destination, option: str, values: str) -> bool:
    found = destination.options.get(option.lower(), ())
    harmless = _HARMLESS.get(option.lower(), ())
    meant = [
        value for value in found if value and value.lower() != "none" and not value.startswith(harmless or ("\0",))
    ]
    return any(values == "*" or value.lower() in values.split() for value in meant)
