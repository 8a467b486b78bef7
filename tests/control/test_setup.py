"""`setup`: a host's entry for hosts.yaml, from what is there."""

from __future__ import annotations

import os
import plistlib
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from mlxops.control import inventory, setup
from mlxops.control.channel import Session, Transport
from mlxops.control.local import LocalTransport
from mlxops.control.setup import as_yaml
from mlxops.core import host_entry
from mlxops.core.host_entry import BootFile, HostFacts
from tests.lab import models
from tests.lab.homelab import Homelab
from tests.lab.sshd import missing
from tests.steps import REPO, tree

GB = 1_000_000_000
PLIST = """\
<?xml version="1.0" encoding="UTF-8"?>
<!DOCTYPE plist PUBLIC "-//Apple//DTD PLIST 1.0//EN" "http://www.apple.com/DTDs/PropertyList-1.0.dtd">
<plist version="1.0"><dict><key>Label</key><string>com.example.mlx</string>
<key>ProgramArguments</key><array><string>/bin/bash</string><string>{script}</string></array></dict></plist>
"""
MAC = HostFacts(
    home="/Users/thestudio",
    system="macOS arm64",
    address="192.168.1.20",
    python="/opt/homebrew/bin/python3.12",
    programs=("/opt/homebrew/bin/mlx-openai-server",),
    hubs={"/Users/thestudio/models/hf/hub": 12, "/Users/thestudio/.cache/huggingface/hub": 1},
    registries=("/Users/thestudio/models/hf/registry.json",),
    servers=("/opt/x/bin/python mlx-openai-server launch --model-path /m --port 8100 --host 0.0.0.0 --api-key sk-1",),
    boot_files=(BootFile("/Library/LaunchDaemons/a.plist", "com.bebop.mlx", "/opt/start.sh", "exec x --port 8100"),),
    memory=512 * GB,
    wired_limit_mb=0,
)


def loaded(path: Path, text: str) -> inventory.Host:
    """The host of a printed hosts.yaml, as mlxops itself reads it."""
    path.write_text(text)
    (host,) = inventory.load(path).hosts.values()
    return host


def entry(ssh: str, facts: HostFacts, tmp_path: Path) -> tuple[inventory.Host, str]:
    text = as_yaml(host_entry.entry_name(ssh), host_entry.parts(ssh, facts))
    return loaded(tmp_path / "hosts.yaml", text), text


def test_entry_of_a_mac_has_what_was_found(tmp_path: Path) -> None:
    host, text = entry("me@studio.local", MAC, tmp_path)
    settings = host.settings
    assert (host.name, host.ssh) == ("studio", "me@studio.local")
    assert (settings.address, settings.bind) == ("192.168.1.20", "192.168.1.20")
    assert (settings.hub, settings.registry) == ("~/models/hf/hub", "~/models/hf/registry.json")
    assert (settings.engine, settings.launch) == ("mlx-openai-server", {})
    assert [(job.port, job.label, job.script) for job in settings.boot] == [(8100, "com.bebop.mlx", "/opt/start.sh")]
    assert "sk-1" not in text and "--model-path /m --port 8100" in text
    assert "deploy would use /opt/homebrew/bin/python3.12" in text


def test_password_in_the_address_of_a_model_is_not_printed(tmp_path: Path) -> None:
    _, text = entry(
        "studio", replace(MAC, servers=("mlx_lm.server --model http://me:sk-2@host/m --port 8100",)), tmp_path
    )
    assert "sk-2" not in text and "--model http://...@host/m --port 8100" in text


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (HostFacts(), ["# bind: ADDRESS", "No models were found", "no uv", "No engine was found", "memory: unknown"]),
        (HostFacts(agent=True), ["An agent is installed already"]),
        (HostFacts(project=True), ["the project /opt/mlx-launch"]),
        (HostFacts(programs=("/x/.venv/bin/mlx_lm.server",)), ["engine: mlx-lm", "launch: {mlx-lm: [/x/.venv/bin/"]),
        (HostFacts(programs=("/x/bin/mlx-openai-server",)), ["[/x/bin/mlx-openai-server, launch]"]),
        (HostFacts(servers=("mlx_lm.server --port 9000", "mlx_lm.server --port 20000")), ["ports: 9000-9009"]),
        (
            HostFacts(boot_files=(BootFile("/a.plist", "a"),)),
            ["# /a.plist may start", "# boot: {port: PORT, label: a}"],
        ),
        (HostFacts(address="::1"), ["bind: ::1"]),
        (HostFacts(address="fe80::1%en0"), ["fe80::1%en0, which is valid", "# bind: ADDRESS"]),
        (
            HostFacts(hubs={"/a": 2, "/b: #c": 1}, boot_files=(BootFile("/x.plist", "a", "/opt/my, s"),)),
            ['# hub: "/b: #c"   # 1 model', '# boot: {port: PORT, label: a, script: "/opt/my, s"}'],
        ),
        (
            HostFacts(servers=("/odd/bin/python -m mlx_lm.server --model=/m --port 8100",)),
            ["engine: mlx-lm", "launch: {mlx-lm: [/odd/bin/python, -m, mlx_lm.server]}", "server --model /m --port"],
        ),
        (
            HostFacts(programs=("/o/mlx-openai-server", "/x/mlx_lm.server"), servers=("/x/py /x/mlx_lm.server -p",)),
            ["engine: mlx-lm", "[/x/mlx_lm.server]", "# Found, too: /o/mlx-openai-server"],
        ),
        (HostFacts(hubs={"/Volumes/a: b #c": 1}), ["hub: '/Volumes/a: b #c'"]),
    ],
)
def test_unknown_things_are_comments_and_the_entry_loads(facts: HostFacts, words: list[str], tmp_path: Path) -> None:
    _, text = entry("studio", facts, tmp_path)
    assert all(word in text for word in words), text


@pytest.mark.parametrize(
    ("ssh", "name"),
    [("studio", "studio"), ("me@studio.local", "studio"), ("10.0.0.5", "10.0.0.5"), ("fe80::1", "studio")],
)
def test_entry_is_named_after_its_host(ssh: str, name: str) -> None:
    assert host_entry.entry_name(ssh) == name


def plist(*arguments: str) -> str:
    return plistlib.dumps({"Label": "com.example.mlx", "ProgramArguments": list(arguments)}).decode()


@pytest.mark.parametrize(
    ("path", "text", "script"),
    [
        ("/a/x.plist", plist("/bin/bash", "/opt/start.sh"), "/opt/start.sh"),
        ("/a/x.plist", plist("/bin/sh", "-c", "/opt/start.sh --api-key sk-1 --port 8100"), "/opt/start.sh"),
        ("/a/x.plist", plist("/bin/sh", "-c", "exec /opt/start.sh 'unclosed"), ""),
        ("/a/x.plist", plist("/bin/bash", "/opt/start.sh")[:300], ""),
        ("/a/x.plist", plist("/bin/bash", "/opt/start.sh").replace("<array>", "<date>x</date><array>"), ""),
        ("/a/x.plist", "bplist00\x00\x01", ""),
        ("/a/mlx.service", "[Service] ExecStart=-/opt/start.sh --api-key sk-1 Restart=always", "/opt/start.sh"),
        (
            "/a/mlx.service",
            "[Service] ExecStart=/bin/bash -c '/opt/start.sh --api-key sk-1' [Install]",
            "/opt/start.sh",
        ),
        ("/a/mlx.service", "[Service] ExecStart=/bin/bash Environment=X=/opt/other", ""),
        ("/a/mlx.service", "[Service] ExecStart=", ""),
        ("/a/mlx.service", "[Service] ExecStart=/usr/bin/python3 -m mlx_lm.server --model /srv/m --api-key /sk", ""),
        ("/a/mlx.service", "[Service] ExecStart=/opt/start.sh --model /srv/m", "/opt/start.sh"),
        ("/a/x.plist", plist("/usr/bin/env", "python3", "--api-key", "/sk"), ""),
    ],
)
def test_script_of_a_boot_job_is_a_path_without_arguments(path: str, text: str, script: str) -> None:
    assert setup._boot_file(path, text).script == script


def test_setup_of_the_labs_studio_prints_an_entry_that_works(homelab: Homelab, tmp_path: Path) -> None:
    studio = homelab.studio
    studio.install(REPO, models.QWEN)
    # The usual place of a cache, and a boot job whose script has the port.
    cache = studio.home / ".cache" / "huggingface"
    cache.mkdir(parents=True)
    studio.hub.rename(cache / "hub")
    script = studio.home / "start.sh"
    script.write_text("exec mlx_lm.server --port 8105\n")
    agents = studio.home / "Library" / "LaunchAgents"
    agents.mkdir(parents=True)
    (agents / "com.example.mlx.plist").write_text(PLIST.format(script=script))
    before = tree(studio.folder)
    answer = homelab.mini.mlxctl("setup", "studio").ok()
    assert tree(studio.folder) == before
    host = loaded(tmp_path / "hosts.yaml", answer.stdout)
    assert (host.name, host.ssh, host.settings.bind) == ("studio", "studio", studio.address)
    assert host.settings.hub == "~/.cache/huggingface/hub"
    document = yaml.safe_load(answer.stdout)
    # Servers of other tests run on this machine, too; the entry works with the lab's own engine and ports.
    lab_entry = document["hosts"]["studio"] | {key: studio.settings[key] for key in ("engine", "launch", "ports")}
    if host.settings.ports.first == 8100:
        assert [(job.port, job.label, job.script) for job in host.settings.boot] == [
            (8105, "com.example.mlx", str(script))
        ]
    lab_entry |= {"python": [sys.executable], "boot": []}
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"hosts": {"studio": lab_entry}}))
    listed = homelab.mini.mlxctl("init", "--json", env={"MLXOPS_HOSTS_FILE": str(path)}).ok().json["hosts"][0]
    assert listed["result"]["added"] == [REPO]


def test_setup_of_a_host_with_nothing_says_so(homelab: Homelab) -> None:
    answer = homelab.mini.inv("setup", "--ssh", "studio", "--json").ok()
    (host,) = answer.json["hosts"]
    assert host["entry"]["ssh"] == "studio" and yaml.safe_load(host["yaml"])["hosts"]["studio"] == host["entry"]
    assert any("No models were found" in note for note in host["notes"])


@pytest.mark.parametrize(("words", "status"), [(("nobody.invalid",), 5), ((), 2), (("--ssh", "-oProxyCommand=x"), 2)])
def test_setup_without_a_host_fails_with_a_reason(homelab: Homelab, words: tuple[str, ...], status: int) -> None:
    answer = homelab.mini.mlxctl("setup", *words)
    assert answer.exit == status and "error: " in answer.stderr and "Traceback" not in answer.stderr


# -- what does not answer ---------------------------------------------------------------------------------------------


class Slow(LocalTransport):
    """This machine, on which looking at some paths takes a minute, as on a network volume that is gone."""

    def __init__(self, *paths: Path) -> None:
        delay = ["strace", "-f", "-qq", "-e", "inject=all:delay_enter=60s", "-o", "/dev/null"]
        self._before = [*delay, *(word for path in paths for word in ("-P", str(path)))] if paths else []
        self.sessions: list[Session] = []

    def start(self, argv: Sequence[str], data: bytes) -> Session:
        self.sessions.append(super().start([*self._before, *argv], data))
        return self.sessions[-1]

    def end(self) -> None:
        """Kill what hangs, with its children."""
        for session in self.sessions:
            with suppress(ProcessLookupError):
                os.killpg(session._process.pid, signal.SIGKILL)  # type: ignore[attr-defined]
        for thread in threading.enumerate():
            if thread.name == "reap":
                thread.join(10)


@pytest.fixture
def slow() -> Iterator[Callable[..., Slow]]:
    with ExitStack() as stack:

        def make(*paths: Path) -> Slow:
            transport = Slow(*paths)
            stack.callback(transport.end)
            return transport

        yield make


@pytest.fixture
def places(tmp_path: Path) -> list[Path]:
    if shutil.which("strace") is None:
        missing("strace")
    found = [tmp_path / name for name in ("one", "two $(touch canary) ' *", "three", "four")]
    for place in found:
        (place / "x" / "hub" / "models--org--m").mkdir(parents=True)
    return found


def look_in(transport: Transport, places: Sequence[Path]) -> tuple[list[str], list[str]]:
    rows, left = setup.look_in_places(transport, [str(place) for place in places])
    return [value for key, value in rows if key == "hub"], left


def test_folders_that_answer_are_all_looked_at(places: list[Path], tmp_path: Path) -> None:
    assert look_in(LocalTransport(), places) == ([f"1 {place}/x/hub" for place in places], [])
    assert not [*tmp_path.rglob("canary")] and not Path("canary").exists()


def test_many_folders_are_all_looked_at(places: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "MOST_AT_ONCE", 3)
    (tmp_path / "file").touch()
    before = [tmp_path / "file", *(tmp_path / str(number) for number in range(7))]
    assert look_in(LocalTransport(), [*before, *places]) == ([f"1 {place}/x/hub" for place in places], [])


def test_name_with_a_line_break_is_no_other_fact(tmp_path: Path) -> None:
    (tmp_path / "x\nmlxops-setup\thub\t9 " / "evil" / "hub" / "models--org--m").mkdir(parents=True)
    assert look_in(LocalTransport(), [tmp_path]) == ([], [])


def test_folder_that_does_not_answer_is_named_and_the_others_are_looked_at(
    places: list[Path], slow: Callable[..., Slow], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "LOOK_SECONDS", 3.0)
    started = time.monotonic()
    hubs, left = look_in(slow(places[1]), places)
    assert (hubs, left) == ([f"1 {place}/x/hub" for place in places if place != places[1]], [str(places[1])])
    assert time.monotonic() - started < 30


def test_many_folders_that_do_not_answer_end_the_look(
    places: list[Path], slow: Callable[..., Slow], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "LOOK_SECONDS", 2.0)
    monkeypatch.setattr(setup, "MAX_SLOW", 2)
    hubs, left = look_in(slow(*places[:3]), places)
    assert (hubs, left) == ([], [str(place) for place in places])


def test_what_was_not_looked_at_is_in_the_entry(tmp_path: Path) -> None:
    _, text = entry("studio", replace(MAC, missing=("/Volumes/nas", *["/x"] * 10)), tmp_path)
    assert "#   /Volumes/nas\n" in text and "#   and 1 more\n" in text


def test_program_that_hangs_does_not_hide_what_was_found(
    homelab: Homelab, slow: Callable[..., Slow], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`ps` hangs. What is looked for after it is named."""
    program = homelab.studio.folder / "programs" / "ps"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setenv("HOME", str(homelab.studio.home))
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(setup, "LOOK_SECONDS", 5.0)
    facts = setup._everything(slow())
    assert facts.missing == ("the running servers and what is looked for after that",)
    assert facts.memory and facts.python
