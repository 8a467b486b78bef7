"""Who may ask `serve`: by address, Host, Origin, token and body."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mlxops.control.serve.access import MAX_BODY_BYTES, Access, access_to, read_token, refusal
from mlxops.core.commands.serve import Address, Serve
from mlxops.core.errors import UsageError

TOKEN = b"0123456789abcdef0123"
LOOPBACK = access_to(Address("127.0.0.1", 8190), None, ["Mini.lan"])
OPEN = access_to(Address("0.0.0.0", 8190), TOKEN, ["mini.lan"])
BEARER = {"authorization": f"Bearer {TOKEN.decode()}"}


def asked(access: Access, headers: dict[str, str] | list[tuple[str, str]]) -> int:
    """Return the status of a refusal; 200 if there is none."""
    pairs = headers.items() if isinstance(headers, dict) else headers
    refused = refusal(access, [(name.encode(), value.encode("latin-1")) for name, value in pairs])
    return refused.status if refused else 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8190", 200),
        ("127.0.0.1", 200),
        ("localhost:8190", 200),
        ("LOCALHOST:9999", 200),
        ("localhost.", 200),
        ("[::1]:8190", 200),
        ("[0:0:0:0:0:0:0:1]:8190", 200),
        ("mini.lan:8190", 200),
        ("evil.example", 403),
        ("evil.example:8190", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("evil.example#localhost", 403),
        ("user@localhost", 403),
        ("localhost:80:80", 403),
        ("localhost, evil.example", 403),
        ("192.168.1.5:8190", 403),
        ("[::1", 403),
        ("", 403),
        ("\xff", 403),
    ],
)
def test_only_names_of_this_machine_are_answered(host: str, status: int) -> None:
    assert asked(LOOPBACK, {"host": host}) == status


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([], 403),
        ([("host", "localhost"), ("host", "localhost")], 403),
        ([("host", "localhost"), ("origin", "http://localhost")], 200),
        ([("host", "localhost:8190"), ("origin", "http://localhost:8190")], 200),
        ([("host", "localhost:8190"), ("origin", "http://localhost:3000")], 403),
        ([("host", "localhost"), ("origin", "https://localhost")], 403),
        ([("host", "localhost"), ("origin", "http://evil.example")], 403),
        ([("host", "localhost"), ("origin", "null")], 403),
        ([("host", "localhost"), ("origin", "")], 403),
        ([("host", "localhost"), ("content-length", str(MAX_BODY_BYTES))], 200),
        ([("host", "localhost"), ("content-length", str(MAX_BODY_BYTES + 1))], 413),
        ([("host", "localhost"), ("transfer-encoding", "chunked")], 411),
    ],
)
def test_other_sites_and_large_bodies_are_refused(headers: list[tuple[str, str]], status: int) -> None:
    assert asked(LOOPBACK, headers) == status


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "192.168.1.5:8190", **BEARER}, 200),
        ({"host": "mini.lan:8190", **BEARER}, 200),
        ({"host": "[fe80::1]:8190", **BEARER}, 200),
        ({"host": "evil.example", **BEARER}, 403),
        ({"host": "192.168.1.5"}, 401),
        ({"host": "127.0.0.1"}, 401),
        ({"host": "192.168.1.5", "authorization": TOKEN.decode()}, 401),
        ({"host": "192.168.1.5", "authorization": f"Basic {TOKEN.decode()}"}, 401),
        ({"host": "192.168.1.5", "authorization": "Bearer"}, 401),
        ({"host": "192.168.1.5", "authorization": f"Bearer {TOKEN.decode()}x"}, 401),
        ({"host": "192.168.1.5", "authorization": f"bearer  {TOKEN.decode()}"}, 200),
    ],
)
def test_other_machines_need_the_token(headers: dict[str, str], status: int) -> None:
    assert asked(OPEN, headers) == status


def test_other_address_without_token_is_refused() -> None:
    with pytest.raises(UsageError) as caught:
        access_to(Address("0.0.0.0", 8190), None, ())
    assert caught.value.code == "token_needed"


@pytest.mark.parametrize(
    ("mode", "text", "why"),
    [
        (0o600, TOKEN + b"\n", None),
        (0o400, TOKEN, None),
        (0o640, TOKEN, "other users"),
        (0o602, TOKEN, "other users"),
        (0o600, b"", "a token is"),
        (0o600, b"short", "a token is"),
        (0o600, b"x" * 5000, "a token is"),
        (0o600, b"two words of a token", "a token is"),
        (0o600, b"\xff" * 20, "a token is"),
    ],
)
def test_token_file_is_for_this_user_only(tmp_path: Path, mode: int, text: bytes, why: str | None) -> None:
    path = tmp_path / "token"
    path.write_bytes(text)
    path.chmod(mode)
    if why is None:
        assert read_token(path) == TOKEN
        return
    with pytest.raises(UsageError) as caught:
        read_token(path)
    assert caught.value.code == "bad_token_file" and why in caught.value.why


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe"])
def test_token_file_is_a_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "token"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    with pytest.raises(UsageError) as caught:
        read_token(path)
    assert caught.value.code == "bad_token_file"


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:8190", Address("127.0.0.1", 8190)),
        ("[::1]:0", Address("::1", 0)),
        ("localhost:8190", None),
        ("127.0.0.1", None),
        ("127.0.0.1:65536", None),
        ("::1:8190", None),
        ("127.1:80", None),
        ("127.0.0.1:８１", None),
    ],
)
def test_address_is_an_ip_address_and_a_port(text: str, address: Address | None) -> None:
    from mlxops.core.command import options_of

    (parse,) = [option.parse for name, option, _ in options_of(Serve) if name == "address"]
    assert parse is not None
    if address is not None:
        assert parse(text) == address
        return
    with pytest.raises(UsageError) as caught:
        parse(text)
    assert caught.value.code == "bad_address"
