"""Connections to real OpenSSH servers: resolution, trust, login, commands, broken connections."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from mlxops.control.channel import NOISE_BYTES, ConnectionLost, Ended, ReadLimits, Session, Transport, events
from mlxops.control.ssh import known_hosts
from mlxops.control.ssh.connection import command_line, open_local, open_ssh
from mlxops.core.errors import Exit, MlxopsError
from mlxops.core.protocol import Hello, Note, encode_event
from tests.lab import world
from tests.lab.sshd import SshAgent, SshClient, Sshd, keygen, program, public
from tests.lab.wire import Wire
from tests.lab.world import descendants, wait_until

pytestmark = pytest.mark.lab

PYTHON = sys.executable
HOSTILE = [
    *("a b", "", "'", '"', "*", "~", "~root", "-n", "--", "\\", "a\\\\b'\\", "$HOME", "!!", "#x", "{a,b}", "\t"),
    *("$(touch canary)", "`touch canary`", "; touch canary;", "&& touch canary", "| cat", "> canary"),
    *("ü\u202e", "\x1b[31m"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    folder = tmp_path_factory.mktemp("server")
    (folder / "home").mkdir()
    with Sshd(folder / "sshd", env={"HOME": str(folder / "home")}) as sshd:
        yield sshd


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SshClient:
    client = SshClient(tmp_path / "client")
    monkeypatch.setenv("PATH", client.path)
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    return client


@pytest.fixture
def studio(server: Sshd, client: SshClient) -> Iterator[Transport]:
    client.host("studio", server)
    with closing(open_ssh("studio")) as opened:
        yield opened


@pytest.fixture(params=["ssh", "local"])
def either(request: pytest.FixtureRequest, server: Sshd) -> Iterator[Transport]:
    """Run a test over SSH and on this machine: both follow the same rules."""
    if request.param == "ssh":
        yield request.getfixturevalue("studio")
    else:
        with closing(open_local()) as opened:
            yield opened


def run(on: Transport, *argv: str, data: bytes = b"", silence: float = 20.0) -> tuple[list[str], Ended]:
    session = on.start(argv, data)
    try:
        return list(session.lines(ReadLimits(silence))), session.wait(20)
    finally:
        session.close()


def python(code: str, *arguments: str) -> list[str]:
    return [PYTHON, "-c", "; ".join(code.strip().splitlines()), *arguments]


def refusal(name: str, *, connect_timeout: float = 10.0) -> MlxopsError:
    with pytest.raises(MlxopsError) as caught:
        open_ssh(name, connect_timeout=connect_timeout).close()
    error = caught.value
    assert error.why and error.hint
    assert all("\n" not in part for part in (error.message, error.why, error.hint))
    return error


def reaches(name: str) -> bool:
    with closing(open_ssh(name)) as opened:
        return run(opened, "echo", "here")[0] == ["here"]


def test_ctrl_c_while_paramiko_holds_a_lock_ends_the_connection(server: Sshd, client: SshClient) -> None:
    client.host("studio", server)
    before = set(threading.enumerate())
    opened = open_ssh("studio")
    session = opened.start(["true"], b"")
    lock = session._channel.lock  # type: ignore[attr-defined]

    def interrupted() -> None:
        with suppress(KeyboardInterrupt), closing(opened), closing(session):
            lock.acquire()
            raise KeyboardInterrupt

    thread = threading.Thread(target=interrupted, daemon=True)
    thread.start()
    thread.join(10)
    hangs = thread.is_alive()
    lock.release()
    for each in set(threading.enumerate()) - before:
        each.join(10)
    assert not hangs


# -- who is reached -----------------------------------------------------------------------------------------------


def test_alias_is_reached(studio: Transport) -> None:
    assert run(studio, "echo", "hello") == (["hello"], Ended(0, ""))


def test_alias_in_an_included_file_is_reached(server: Sshd, client: SshClient) -> None:
    client.host("inner", server)
    included = client.config.rename(client.config.with_name("included"))
    client.config.write_text(f"Include {included}\nMatch host unused\n  Port 1\n")
    assert reaches("inner")


def test_user_of_user_at_name_wins(server: Sshd, client: SshClient) -> None:
    client.config.write_text("Host *\n  User missing-account\n")
    client.host("studio", server)
    assert refusal("studio").code == "authentication_failed"
    client.config.write_text("")
    client.host("studio", server)
    assert reaches(f"{server.user}@studio")


def test_jump_host_is_used_and_both_keys_are_checked(server: Sshd, client: SshClient, tmp_path: Path) -> None:
    with Sshd(tmp_path / "jump", address="127.0.0.2") as jump:
        client.host("jump", jump)
        client.host("studio", server, "ProxyJump jump")
        assert reaches("studio")
        assert "direct-tcpip" in jump.log.read_text() or "Accepted publickey" in jump.log.read_text()
        client.known_hosts.write_text(server.known_hosts + "\n")
        error = refusal("studio")
        assert error.code == "host_key_unknown" and "jump" in error.message
        client.known_hosts.write_text(jump.known_hosts + "\n")
        error = refusal("studio")
        assert error.code == "host_key_unknown" and error.message.startswith("studio")


def test_chain_of_jump_hosts_is_followed(server: Sshd, client: SshClient, tmp_path: Path) -> None:
    with Sshd(tmp_path / "one") as one, Sshd(tmp_path / "two") as two:
        client.host("one", one)
        client.host("two", two)
        client.host("studio", server, f"ProxyJump one,{two.user}@two:{two.port}")
        assert reaches("studio")
        assert "Accepted publickey" in one.log.read_text() and "Accepted publickey" in two.log.read_text()


def test_jump_host_that_cannot_reach_the_target_is_named(server: Sshd, client: SshClient) -> None:
    client.host("jump", server)
    client.host("studio", server, "ProxyJump jump", f"Port {unused_port()}")
    error = refusal("studio")
    assert error.code == "host_down" and "jump host" in error.why


def test_jump_host_that_is_its_own_jump_host_is_an_error(server: Sshd, client: SshClient) -> None:
    client.host("*", server, "ProxyJump jump")
    assert "own jump host" in refusal("studio").why


def test_jump_hosts_that_lead_in_a_circle_are_named(server: Sshd, client: SshClient) -> None:
    for name, jump in (("one", "two"), ("two", "three"), ("three", "one")):
        client.host(name, server, f"ProxyJump {jump}")
    error = refusal("one")
    assert error.code == "host_down" and "one -> two -> three -> one" in error.why


def test_process_left_by_a_match_exec_does_not_block(server: Sshd, client: SshClient) -> None:
    client.host("studio", server)
    client.config.write_text('Match exec "sleep 600 & true"\n' + client.config.read_text())
    started = time.monotonic()
    try:
        assert reaches("studio") and time.monotonic() - started < 60
    finally:
        world.end(_sleepers())


def test_proxy_command_with_endless_errors_ends_at_the_deadline(server: Sshd, client: SshClient) -> None:
    script = shlex.quote("import os, time; os.ftruncate(2, 10**11); time.sleep(600)")
    client.host("studio", server, f"ProxyCommand {PYTHON} -c {script}")
    started = time.monotonic()
    assert refusal("studio", connect_timeout=1.5).code == "connection_timeout"
    assert time.monotonic() - started < 10


def test_proxy_command_is_used(server: Sshd, client: SshClient) -> None:
    client.host("jump", server)
    client.host("studio", server, f"ProxyCommand {client.bin}/ssh -W %h:%p jump")
    assert reaches("studio")


def test_failed_proxy_command_is_quoted(server: Sshd, client: SshClient) -> None:
    client.host("studio", server, "ProxyCommand sh -c 'echo no such tunnel >&2; exit 1'")
    error = refusal("studio")
    assert error.code == "connection_refused" and "no such tunnel" in error.why


def test_name_is_never_an_option_or_a_shell_command(client: SshClient, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    client.config.write_text("Host *\n  ProxyCommand nc %h %p %n\n")
    for name in (f"-oProxyCommand=touch {canary}", f"x;touch${{IFS}}{canary}", f"$(touch {canary})", "a\nb", ""):
        refusal(name)
    assert not canary.exists()


def test_invalid_configuration_is_reported_with_the_message_of_ssh(client: SshClient) -> None:
    client.config.write_text("Hots studio\n")
    error = refusal("studio")
    assert (error.code, error.exit) == ("bad_ssh_config", Exit.USAGE)
    assert "Hots" in error.why or "bad configuration" in error.why


def test_missing_ssh_program_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert refusal("studio").code == "no_ssh"


# -- who is trusted -----------------------------------------------------------------------------------------------


def fingerprint(sshd: Sshd) -> str:
    listed = subprocess.run([program("ssh-keygen"), "-lf", f"{sshd.key_file}.pub"], check=True, capture_output=True)
    return listed.stdout.decode().split()[1]


def test_unknown_host_key_is_refused_with_fingerprint_and_remedy(server: Sshd, client: SshClient) -> None:
    client.host("studio", server, known=False)
    error = refusal("studio")
    assert (error.code, error.exit) == ("host_key_unknown", Exit.UNREACHABLE)
    assert fingerprint(server) in error.why
    assert "ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub" in error.hint and "`ssh studio`" in error.hint
    assert error.details["fingerprint"] == fingerprint(server)
    assert client.known_hosts.read_text() == ""


def test_strict_host_key_checking_no_does_not_switch_the_check_off(server: Sshd, client: SshClient) -> None:
    for value in ("no", "accept-new", "off"):
        client.config.write_text("")
        client.host("studio", server, f"StrictHostKeyChecking {value}", known=False)
        assert refusal("studio").code == "host_key_unknown"
    assert client.known_hosts.read_text() == ""


def test_changed_host_key_is_refused_with_both_fingerprints_and_remedy(client: SshClient, tmp_path: Path) -> None:
    with Sshd(tmp_path / "server") as sshd:
        client.host("studio", sshd)
        assert reaches("studio")
        before = fingerprint(sshd)
        sshd.rekey()
        error = refusal("studio")
        assert (error.code, error.exit) == ("host_key_changed", Exit.UNREACHABLE)
        assert before in error.why and fingerprint(sshd) in error.why and f"{client.known_hosts}:1" in error.why
        start = error.hint.index("ssh-keygen -R")
        remedy = shlex.split(error.hint[start : error.hint.index(", then")])
        subprocess.run([program(remedy[0]), *remedy[1:]], check=True, capture_output=True)
        assert refusal("studio").code == "host_key_unknown"


def test_hashed_names_are_recognised(server: Sshd, client: SshClient) -> None:
    client.host("studio", server)
    subprocess.run([program("ssh-keygen"), "-H", "-f", str(client.known_hosts)], check=True, capture_output=True)
    assert client.known_hosts.read_text().startswith("|1|")
    assert reaches("studio")


def test_host_key_alias_is_looked_up(server: Sshd, client: SshClient) -> None:
    client.host("studio", server, "HostKeyAlias the-studio")
    assert refusal("studio").code == "host_key_unknown"
    client.know(f"the-studio {server.host_key}")
    assert reaches("studio")


def test_revoked_key_is_refused_even_if_known(server: Sshd, client: SshClient) -> None:
    client.host("studio", server)
    client.know(f"@revoked * {server.host_key}")
    error = refusal("studio")
    assert error.code == "host_key_changed" and "@revoked" in error.why


@pytest.mark.parametrize("known", ["", "[{}]:{}"])
@pytest.mark.parametrize("revoked", ["", "[{}]:{}", "*"])
def test_key_revoked_for_the_machine_is_refused_on_every_port(
    server: Sshd, client: SshClient, known: str, revoked: str
) -> None:
    """Stricter than OpenSSH, which accepts a key that is known for the port and revoked only for the plain name.

    OpenSSH looks up the plain name only if the port has no key. But a stolen key is stolen on all ports.
    """
    client.host("studio", server, known=False)
    names = [(text.format(server.address, server.port) or server.address) for text in (known, revoked)]
    client.know(f"{names[0]} {server.host_key}")
    assert reaches("studio")
    client.know(f"@revoked [{server.address}]:1 {server.host_key}")
    assert reaches("studio")
    client.know(f"@revoked {names[1]} {server.host_key}")
    error = refusal("studio")
    assert error.code == "host_key_changed" and "@revoked" in error.why


def test_pattern_with_many_stars_is_matched_quickly(tmp_path: Path) -> None:
    key = "ssh-ed25519 AAAA"
    patterns = {
        "*" * 40 + "a": False,
        "*a" * 30 + "*b": False,
        "*?" * 30 + "x": False,
        "h*h": True,
        "h" * 200: True,
        "*": True,
        "h?" * 100: True,
        "**h**h**": True,
        "h": False,
        "*,!h*": False,
        "H*": True,
        "h*x*": False,
        "?" * 201: False,
        "": False,
    }
    for pattern, matches in patterns.items():
        (tmp_path / "known_hosts").write_text(f"{pattern} {key}\n")
        known = known_hosts.lookup([tmp_path / "known_hosts"], "h" * 200, 22, None)
        assert bool(known.keys) is matches, pattern


def test_named_pipe_in_place_of_a_file_does_not_block(server: Sshd, client: SshClient, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    identity = f"IdentityFile {tmp_path}/pipe"
    client.host("studio", server, identity, f"CertificateFile {tmp_path}/pipe")
    started = time.monotonic()
    assert reaches("studio")
    client.config.write_text("")
    client.host("studio", server, f"UserKnownHostsFile {tmp_path}/pipe", known=False)
    assert refusal("studio").code == "host_key_unknown"
    assert time.monotonic() - started < 60


def test_key_of_port_22_is_accepted_on_another_port(server: Sshd, client: SshClient) -> None:
    client.host("studio", server, known=False)
    client.know(f"{server.address} {server.host_key}")
    assert reaches("studio")
    client.known_hosts.write_text(f"{server.address} {public(keygen(client.bin / 'other'))}\n")
    assert refusal("studio").code == "host_key_unknown"


def test_one_of_several_known_keys_is_enough(server: Sshd, client: SshClient) -> None:
    client.host("studio", server, known=False)
    client.know(f"[{server.address}]:{server.port} {public(keygen(client.bin / 'other'))}")
    client.know("some nonsense")
    client.know("@cert-authority * ssh-ed25519 AAAA")
    client.know(f"unrelated,[127.0.0.?]:{server.port} {server.host_key} comment")
    assert reaches("studio")


def test_negated_pattern_wins(server: Sshd, client: SshClient) -> None:
    client.host("studio", server, known=False)
    client.know(f"*,!*{server.address}* {server.host_key}")
    assert refusal("studio").code == "host_key_unknown"


@pytest.mark.parametrize("kind", ["rsa", "ecdsa"])
def test_known_kind_of_key_is_requested(client: SshClient, tmp_path: Path, kind: str) -> None:
    key = keygen(tmp_path / "other_key", kind)
    with Sshd(tmp_path / "server", extra=f"HostKey {key}") as sshd:
        client.host("studio", sshd, known=False)
        client.know(f"[{sshd.address}]:{sshd.port} {public(key)}")
        assert reaches("studio")


# -- who may log in -----------------------------------------------------------------------------------------------


def with_key(client: SshClient, server: Sshd, key: Path, *lines: str) -> None:
    client.host("studio", server, f"IdentityFile {key}", *lines)
    text = client.config.read_text().replace(f"  IdentityFile {server.client_key}\n", "")
    client.config.write_text(text)


def test_unauthorized_key_is_refused(server: Sshd, client: SshClient, tmp_path: Path) -> None:
    with_key(client, server, keygen(tmp_path / "stranger"))
    error = refusal("studio")
    assert (error.code, error.exit) == ("authentication_failed", Exit.UNREACHABLE)
    assert f"user {server.user}" in error.why and "publickey" in error.why


def test_encrypted_key_without_an_agent_is_refused_without_a_prompt(client: SshClient, tmp_path: Path) -> None:
    key = keygen(tmp_path / "locked", passphrase="secret")
    with Sshd(tmp_path / "server", client_key=key) as sshd:
        client.host("studio", sshd)
        error = refusal("studio")
        assert error.code == "authentication_failed"
        assert f"{key} is encrypted, and no agent has it" in error.why and "ssh-add" in error.hint


@pytest.fixture
def agent() -> Iterator[SshAgent]:
    with SshAgent() as running:
        yield running


@pytest.mark.parametrize("identities_only", ["yes", "no"])
def test_agent_can_hold_an_encrypted_key(
    client: SshClient, tmp_path: Path, agent: SshAgent, monkeypatch: pytest.MonkeyPatch, identities_only: str
) -> None:
    key = keygen(tmp_path / "open")
    agent.add(key)
    subprocess.run([program("ssh-keygen"), "-q", "-p", "-P", "", "-N", "x", "-f", str(key)], check=True)
    with Sshd(tmp_path / "server", client_key=key) as sshd:
        client.host("by-config", sshd, f"IdentityAgent {agent.path}", f"IdentitiesOnly {identities_only}")
        assert reaches("by-config")
        client.host("by-environment", sshd, "IdentityAgent SSH_AUTH_SOCK")
        assert refusal("by-environment").code == "authentication_failed"
        monkeypatch.setenv("SSH_AUTH_SOCK", str(agent.path))
        assert reaches("by-environment")


def test_agent_key_not_in_the_configuration_is_not_offered(
    client: SshClient, server: Sshd, tmp_path: Path, agent: SshAgent
) -> None:
    agent.add(server.client_key)
    with_key(client, server, tmp_path / "absent", f"IdentityAgent {agent.path}")
    assert refusal("studio").code == "authentication_failed"
    client.config.write_text(client.config.read_text().replace("IdentitiesOnly yes", "IdentitiesOnly no"))
    assert reaches("studio")


def test_certificate_beside_the_key_is_used(client: SshClient, tmp_path: Path) -> None:
    authority, key = keygen(tmp_path / "ca"), keygen(tmp_path / "id")
    keygen_program = program("ssh-keygen")
    with Sshd(tmp_path / "server", extra=f"TrustedUserCAKeys {authority}.pub") as sshd:
        with_key(client, sshd, key)
        assert refusal("studio").code == "authentication_failed"
        subprocess.run(
            [keygen_program, "-q", "-s", str(authority), "-I", "lab", "-n", sshd.user, f"{key}.pub"],
            check=True,
            capture_output=True,
        )
        assert reaches("studio")


def test_mac_that_waits_for_filevault_is_distinguished_from_a_wrong_key(client: SshClient, tmp_path: Path) -> None:
    banner = tmp_path / "banner"
    banner.write_text("This system is locked. To unlock it, use a local account name and password.\n")
    with Sshd(tmp_path / "server", extra=f"Banner {banner}\nPubkeyAuthentication no") as sshd:
        client.host("studio", sshd)
        error = refusal("studio")
        assert error.code == "host_locked" and "This system is locked" in error.why and "FileVault" in error.hint


# -- who does not answer ------------------------------------------------------------------------------------------


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_closed_port_is_a_refused_connection(server: Sshd, client: SshClient) -> None:
    client.host("studio", server, f"Port {unused_port()}")
    assert refusal("studio").code == "connection_refused"


def test_name_without_an_address_is_an_unreachable_host(server: Sshd, client: SshClient) -> None:
    client.host("studio", server, "HostName no-such-host.invalid")
    error = refusal("studio")
    assert error.code == "host_down" and "no address" in error.why


def test_silent_host_ends_at_the_deadline(server: Sshd, client: SshClient) -> None:
    with Wire(None) as wire:
        client.host("studio", server, f"Port {wire.port}")
        started = time.monotonic()
        assert refusal("studio", connect_timeout=1.0).code == "connection_timeout"
        assert 0.9 < time.monotonic() - started < 10


def test_host_that_stalls_after_its_banner_ends_at_the_deadline(server: Sshd, client: SshClient) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    with listener:
        client.host("studio", server, f"Port {listener.getsockname()[1]}")
        accepted: list[socket.socket] = []

        def greet() -> None:
            connection, _ = listener.accept()
            connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
            accepted.append(connection)

        greeter = threading.Thread(target=greet)
        greeter.start()
        started = time.monotonic()
        assert refusal("studio", connect_timeout=1.0).code == "connection_timeout"
        assert 0.9 < time.monotonic() - started < 10
        greeter.join()
        accepted[0].close()


def test_slow_host_has_one_deadline_for_all_steps(server: Sshd, client: SshClient) -> None:
    with Wire((server.address, server.port), delay=0.4) as wire:
        client.host("studio", server, f"Port {wire.port}", known=False)
        client.know(f"[127.0.0.1]:{wire.port} {server.host_key}")
        started = time.monotonic()
        assert refusal("studio", connect_timeout=1.5).code == "connection_timeout"
        assert time.monotonic() - started < 5.0


def test_server_that_is_not_ssh_is_reported(server: Sshd, client: SshClient) -> None:
    with Wire(("127.0.0.1", unused_port())) as wire:  # accepts and closes
        client.host("studio", server, f"Port {wire.port}")
        error = refusal("studio")
        assert error.code == "connection_refused" and "during the handshake" in error.why


@pytest.mark.parametrize("resets", [True, False])
def test_connection_cut_during_the_login_is_not_a_refused_login(server: Sshd, client: SshClient, resets: bool) -> None:
    refused: list[int] = []
    with Wire((server.address, server.port)) as wire:
        wire.resets = resets
        client.host("studio", server, f"Port {wire.port}", known=False)
        client.know(f"[127.0.0.1]:{wire.port} {server.host_key}")
        for size in range(100, 4000, 50):
            wire.passed, wire.cut_after = 0, size
            try:
                open_ssh("studio").close()
            except MlxopsError as error:
                assert error.code in {"host_down", "connection_refused"}, (size, str(error))
                refused.append(size)
            wire.cut_after = None
    assert len(refused) > 3, "the cuts came after the login"


def test_failures_print_nothing(
    server: Sshd, client: SshClient, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with_key(client, server, keygen(tmp_path / "stranger"))
    refusal("studio")
    with Wire(("127.0.0.1", unused_port())) as wire:
        client.host("cut", server, f"Port {wire.port}")
        refusal("cut")
    assert capfd.readouterr() == ("", "")


# -- commands -----------------------------------------------------------------------------------------------------


def test_arguments_arrive_unchanged(either: Transport, tmp_path: Path) -> None:
    canary = Path(os.environ["HOME"]) / "canary"
    lines, ended = run(either, *python("import sys, json\nprint(json.dumps(sys.argv[1:]))", *HOSTILE))
    assert ended == Ended(0, "")
    assert json.loads(lines[0]) == HOSTILE
    assert not canary.exists()


@pytest.mark.parametrize("shell", ["sh", "dash", "bash", "zsh", "fish", "csh", "tcsh", "nu"])
def test_every_login_shell_understands_the_command_line(shell: str, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    line = command_line(python("import sys, json\nprint(json.dumps(sys.argv[1:]))", "~/x y", *HOSTILE))
    answer = subprocess.run(
        [shell, "-c", line], env={**os.environ, "HOME": "/h h"}, cwd=tmp_path, capture_output=True, check=True
    )
    assert json.loads(answer.stdout) == ["/h h/x y", *HOSTILE]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("argument", ["a\nb", "a\rb", "a\0b"])
def test_argument_with_line_end_or_nul_is_refused(studio: Transport, argument: str) -> None:
    with pytest.raises(ValueError, match="line end"):
        studio.start(["echo", argument], b"")


def test_tilde_is_the_home_directory_of_the_host(studio: Transport, server: Sshd) -> None:
    assert run(studio, "echo", "~/a b", "x~/y")[0] == [f"{server.env['HOME']}/a b x~/y"]
    script = Path(server.env["HOME"]) / "say it"
    script.write_text("#!/bin/sh\necho from home\n")
    script.chmod(0o755)
    assert run(studio, "~/say it")[0] == ["from home"]


def test_tilde_of_a_local_command_is_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run(open_local(), "echo", "~/a b")[0] == [f"{tmp_path}/a b"]


def test_status_and_standard_error_are_returned(either: Transport) -> None:
    lines, ended = run(either, "sh", "-c", "echo out; echo err >&2; exit 7")
    assert (lines, ended) == (["out"], Ended(7, "err\n"))


def test_missing_program_has_status_127(either: Transport) -> None:
    lines, ended = run(either, "/no/such/program")
    assert lines == [] and ended.status == 127 and "/no/such/program" in ended.stderr


def test_command_ended_by_a_signal_is_not_a_broken_connection(either: Transport) -> None:
    lines, ended = run(either, "sh", "-c", "echo before; kill -9 $$")
    assert lines == ["before"] and ended.status < 0


def test_lines_are_decoded_and_cut(either: Transport) -> None:
    code = r"import sys; sys.stdout.buffer.write(b'a\xc3\xa4\r\n\n\xff\nlast')"
    assert run(either, PYTHON, "-c", code)[0] == ["aä", "", "\ufffd", "last"]


def test_too_long_line_is_dropped_and_the_next_one_is_read(either: Transport, monkeypatch: pytest.MonkeyPatch) -> None:
    longest = 4 * 1024 * 1024
    monkeypatch.setattr("mlxops.control.channel.MAX_LINE", longest)
    code = f"print('a'); print('x' * {longest + 1}); print('y' * {longest}); print('b')"
    lines, _ = run(either, PYTHON, "-c", code)
    assert [line[:2] for line in lines] == ["a", "yy", "b"]


def test_megabyte_goes_both_ways_at_once(either: Transport) -> None:
    sent = b"0123456789abcde\n" * 65536 * 4
    lines, ended = run(either, "cat", data=sent)
    assert ended.status == 0 and "\n".join(lines) + "\n" == sent.decode()


def test_command_that_does_not_read_does_not_block(either: Transport) -> None:
    assert run(either, "sh", "-c", "exec <&-; echo done", data=b"x" * 8_000_000)[0] == ["done"]


def test_much_standard_error_does_not_stop_the_command(either: Transport) -> None:
    code = "import sys; sys.stderr.write('e' * 6_000_000 + 'end'); print('done')"
    lines, ended = run(either, PYTHON, "-c", code)
    assert lines == ["done"] and ended.stderr.endswith("eeend") and len(ended.stderr) <= 8192


def test_lines_arrive_while_the_command_runs(either: Transport) -> None:
    session = either.start(["sh", "-c", "echo first; sleep 600"], b"")
    try:
        assert next(session.lines(ReadLimits(20))) == "first"
        with pytest.raises(ConnectionLost):
            session.wait(0.1)
    finally:
        end(session)


def test_silence_ends_at_the_limit(either: Transport) -> None:
    session = either.start(["sh", "-c", "echo first; sleep 600"], b"")
    started = time.monotonic()
    try:
        with pytest.raises(ConnectionLost, match="silent"):
            list(session.lines(ReadLimits(0.5)))
        assert 0.4 < time.monotonic() - started < 20
    finally:
        end(session)


HELLO = encode_event(Hello("0", "b"))
TALKERS = {
    "fast": "yes",
    "without lines": "cat /dev/zero",
    "slowly": "while printf x; do sleep 0.05; done",
    "errors": "yes >&2",
    "errors slowly": "while printf x >&2; do sleep 0.05; done",
    "another's events": 'while echo \'{"event":"note"}\'; do sleep 0.05; done',
}


@pytest.mark.parametrize("greets", [False, True])
@pytest.mark.parametrize("how", TALKERS)
def test_endless_output_without_an_agent_ends_at_the_limit(either: Transport, how: str, greets: bool) -> None:
    session = either.start(["sh", "-c", f"{f'echo {shlex.quote(HELLO)};' if greets else ''} {TALKERS[how]}"], b"")
    started = time.monotonic()
    try:
        with pytest.raises(ConnectionLost, match="silent" if how.startswith("errors") else "nothing from an agent"):
            list(events(session, ReadLimits(1.5, NOISE_BYTES)))
        assert time.monotonic() - started < 20
    finally:
        session.close()


def test_empty_lines_before_the_hello_are_no_sign_of_life(either: Transport) -> None:
    session = either.start(["sh", "-c", "while echo; do sleep 0.05; done"], b"")
    with closing(session), pytest.raises(ConnectionLost):
        list(events(session, ReadLimits(1.0, NOISE_BYTES)))


def test_agent_behind_a_long_greeting_is_read_while_it_sends(either: Transport) -> None:
    """Some kB of login text; then, for longer than the limit, signs of life and pieces of one long event."""
    note = encode_event(Note("x" * 40))
    code = """
import sys, time
hello, note = sys.argv[1:]
for text in ["welcome\\n" * 2000, hello + "\\n", *"\\n" * 10, *note, "\\n"]:
    sys.stdout.write(text)
    sys.stdout.flush()
    time.sleep(0.2 if text in ("\\n", "x") else 0)
"""
    note = encode_event(Note("x" * 10))
    session = either.start(
        [PYTHON, "-c", "import sys; exec(bytes.fromhex(sys.argv.pop(1)))", code.encode().hex(), HELLO, note], b""
    )
    try:
        heard = list(events(session, ReadLimits(1.0, NOISE_BYTES)))
    finally:
        session.close()
    assert heard == [Hello("0", "b"), *[None] * 10, Note("x" * 10)]


def test_time_of_the_reader_does_not_count_as_silence(either: Transport) -> None:
    code = f"import time; print({HELLO!r}, flush=True); time.sleep(0.5); print('noise', flush=True); time.sleep(0.5)"
    session = either.start([PYTHON, "-c", f"{code}; print({HELLO!r})"], b"")
    try:
        for _ in events(session, ReadLimits(0.9, NOISE_BYTES)):
            time.sleep(1.0)  # a terminal that is stopped
    finally:
        session.close()


def test_end_of_a_command_is_seen_while_its_child_writes_errors(either: Transport) -> None:
    session = either.start(["sh", "-c", "yes >&2 & echo last; exec >&-"], b"")
    started = time.monotonic()
    try:
        assert next(session.lines(ReadLimits(20))) == "last"
        session.wait(5)
        assert time.monotonic() - started < 4
    except ConnectionLost:
        assert time.monotonic() - started < 8  # sshd waits for the child, too
    finally:
        session.close()


def end(session: Session) -> None:
    """Close a session, and end its `sleep 600`, which `close` leaves running."""
    started = time.monotonic()
    session.close()
    assert time.monotonic() - started < 5
    world.end(_sleepers())


def _sleepers() -> list[world.Process]:
    return [process for process in descendants() if process.command.endswith("sleep 600")]


def test_standard_input_of_the_caller_is_not_read(server: Sshd, client: SshClient, tmp_path: Path) -> None:
    client.host("studio", server)
    code = """
import sys
from mlxops.control.channel import ReadLimits
from mlxops.control.ssh.connection import open_local, open_ssh
for transport in (open_ssh("studio"), open_local()):
    session = transport.start(["cat"], b"ours\\n")
    print(list(session.lines(ReadLimits(20))), session.wait(20).status)
    session.close()
    transport.close()
print(sys.stdin.read())
"""
    answer = subprocess.run([PYTHON, "-c", code], input="theirs", capture_output=True, text=True, check=True)
    assert answer.stdout.splitlines() == ["['ours'] 0", "['ours'] 0", "theirs"]
    assert answer.stderr == ""


def test_ambient_settings_of_invoke_and_fabric_change_nothing(
    server: Sshd, client: SshClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.host("studio", server)
    home = Path(os.environ["HOME"])
    files = [home / ".fabric.yaml", home / ".invoke.yaml"]
    for file in files:
        file.write_text(
            "user: daemon\nport: 1\nrun: {dry: true, echo: true, pty: true}\nconnect_kwargs: {password: x}\n"
        )
    for prefix in ("INVOKE", "FABRIC"):
        for name, value in (("RUN_DRY", "1"), ("RUN_ECHO", "1"), ("RUN_PTY", "1"), ("USER", "daemon"), ("PORT", "1")):
            monkeypatch.setenv(f"{prefix}_{name}", value)
    try:
        with closing(open_ssh("studio")) as opened:
            assert run(opened, "sh", "-c", "test -t 0 || echo no terminal")[0] == ["no terminal"]
    finally:
        for file in files:
            file.unlink()


def test_many_hosts_are_reached_in_parallel(server: Sshd, client: SshClient) -> None:
    client.host("studio", server)
    answers: dict[int, list[str]] = {}

    def ask(number: int) -> None:
        with closing(open_ssh("studio", connect_timeout=60)) as opened:
            answers[number] = run(opened, "echo", str(number))[0]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {number: [str(number)] for number in range(8)}


# -- what breaks --------------------------------------------------------------------------------------------------


@pytest.fixture
def wire(server: Sshd, client: SshClient) -> Iterator[Wire]:
    with Wire((server.address, server.port)) as wire:
        client.host("studio", server, f"Port {wire.port}", known=False)
        client.know(f"[127.0.0.1]:{wire.port} {server.host_key}")
        yield wire


CHATTY = ["sh", "-c", "while echo tick; do sleep 0.01; done"]


@pytest.mark.parametrize("how", ["cut", "stall", "server killed"])
def test_connection_that_breaks_during_a_command_is_lost(wire: Wire, server: Sshd, how: str) -> None:
    with closing(open_ssh("studio")) as opened:
        session = opened.start(CHATTY, b"")
        lines = session.lines(ReadLimits(1.0))
        assert next(lines) == "tick"
        if how == "cut":
            wire.cut()
        elif how == "stall":
            wire.stalled = True
        else:
            server.kill_sessions()
        with pytest.raises(ConnectionLost):
            for _ in lines:
                pass
        started = time.monotonic()
        session.close()
        opened.close()
        assert time.monotonic() - started < 5
        wire.stalled = False
    server.kill_sessions()


def test_connection_that_breaks_before_the_status_is_lost(wire: Wire, server: Sshd) -> None:
    with closing(open_ssh("studio")) as opened:
        session = opened.start(["sh", "-c", "echo last; exec >&- 2>&-; sleep 600"], b"")
        assert list(session.lines(ReadLimits(20))) == ["last"]
        wire.cut()
        with pytest.raises(ConnectionLost):
            session.wait(20)
        session.close()
    # Its parent, sshd, ends too. While it does, a walk through the processes may miss the shell or its child.
    wait_until(lambda: any(each.command == "sleep 600" for each in _sleepers()), 30, "the command that sshd leaves")
    world.end(_sleepers())


def test_connection_that_breaks_during_the_login_is_no_refusal(
    server: Sshd, client: SshClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sending fails before Paramiko's thread notices that the connection has ended."""
    import paramiko

    def send(transport: paramiko.Transport, message: paramiko.Message) -> None:
        raise EOFError

    handshake = paramiko.Transport.start_client

    def start_client(transport: paramiko.Transport, *arguments: object, **named: object) -> None:
        handshake(transport, *arguments, **named)  # type: ignore[arg-type]
        monkeypatch.setattr(paramiko.Transport, "_send_message", send)

    monkeypatch.setattr(paramiko.Transport, "start_client", start_client)
    client.host("studio", server)
    assert refusal("studio").code == "host_down"


def test_broken_connection_starts_no_more_commands(wire: Wire) -> None:
    with closing(open_ssh("studio")) as opened:
        assert run(opened, "echo", "x")[0] == ["x"]
        wire.cut()
        with pytest.raises(ConnectionLost):
            run(opened, "sleep", "600")


def test_connected_slow_host_has_more_time_than_connecting(wire: Wire) -> None:
    with closing(open_ssh("studio", connect_timeout=1.5)) as opened:
        wire.stalled = True
        moving = threading.Timer(3.0, setattr, (wire, "stalled", False))
        moving.start()
        assert run(opened, "echo", "here")[0] == ["here"]
        moving.join()


def test_half_a_request_on_a_stalled_connection_does_not_block_closing(wire: Wire) -> None:
    with closing(open_ssh("studio")) as opened:
        session = opened.start(["sh", "-c", "read line; echo $line; sleep 600"], b"go\n" + b"x" * 30_000_000)
        lines = session.lines(ReadLimits(3.0))
        assert next(lines) == "go"
        wire.stalled = True
        with pytest.raises(ConnectionLost, match="silent"):
            next(lines)
        end(session)
        started = time.monotonic()
        opened.close()
        assert time.monotonic() - started < 5
        wire.stalled = False


def test_closing_a_local_session_leaves_the_command_alone_and_no_zombie(tmp_path: Path) -> None:
    done = tmp_path / "done"
    session = open_local().start(["sh", "-c", f"echo $$; sleep 0.3; touch {done}"], b"")
    pid = int(next(session.lines(ReadLimits(20))))
    session.close()
    wait_until(lambda: not _exists(pid), 20, "the command's end")
    assert done.exists()


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_terminal_interrupt_does_not_reach_a_local_command() -> None:
    lines, _ = run(open_local(), *python("import os\nprint(os.getpgrp() == os.getpid())"))
    assert lines == ["True"]
