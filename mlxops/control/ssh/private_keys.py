"""Read private keys from files in every format that OpenSSH reads: its own, PEM and PKCS#8.

Paramiko does not read PKCS#8, and refuses a key if the certificate beside it is for another one.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import TYPE_CHECKING

from mlxops.common.files import read_start
from mlxops.control.ssh.public_keys import kind, packed
from mlxops.core.frozen import dataclass

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

_MAX_BYTES = 64 * 1024


class Encrypted(ValueError):
    """The key needs a passphrase."""


@dataclass(frozen=True)
class PrivateKey:
    blob: bytes
    """Its public key."""
    _key: RSAPrivateKey | EllipticCurvePrivateKey | Ed25519PrivateKey

    def sign(self, data: bytes, algorithm: str) -> bytes:
        """Return a signature in wire format (RFC 4253, 5656, 8332, 8709). `algorithm` matters only for RSA."""
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa, utils

        if isinstance(self._key, rsa.RSAPrivateKey):
            name = algorithm.partition("-cert-")[0]
            digest = hashes.SHA256() if name == "rsa-sha2-256" else hashes.SHA512()
            return packed(name.encode()) + packed(self._key.sign(data, padding.PKCS1v15(), digest))
        name = kind(self.blob)
        if isinstance(self._key, ec.EllipticCurvePrivateKey):
            sizes = {256: hashes.SHA256(), 384: hashes.SHA384(), 521: hashes.SHA512()}
            r, s = utils.decode_dss_signature(self._key.sign(data, ec.ECDSA(sizes[self._key.curve.key_size])))
            return packed(name.encode()) + packed(_mpint(r) + _mpint(s))
        return packed(name.encode()) + packed(self._key.sign(data))


def read(path: Path) -> PrivateKey:
    """Read a private key. Raises `Encrypted`, `ValueError` for other content or an unsupported type, and `OSError`."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    text = read_start(path, _MAX_BYTES)
    own = b"BEGIN OPENSSH PRIVATE KEY" in text
    load = serialization.load_ssh_private_key if own else serialization.load_pem_private_key
    try:
        key = load(text, password=None)
    except TypeError:
        raise Encrypted("it is encrypted") from None
    except UnsupportedAlgorithm as error:
        raise ValueError(str(error)) from None
    except ValueError as error:
        if "password" in str(error).lower():
            raise Encrypted("it is encrypted") from None
        raise
    if not isinstance(key, rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey):
        raise ValueError("its type is not supported")
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return PrivateKey(base64.b64decode(public.split()[1]), key)


def _mpint(number: int) -> bytes:
    return packed(number.to_bytes(number.bit_length() // 8 + 1, "big"))
