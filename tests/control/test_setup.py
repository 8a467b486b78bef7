"""`setup`: a host's entry for hosts.yaml, from what is there."""

from __future__ import annotations

import plistlib
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from mlxops.control import inventory, setup
from mlxops.control.setup import LOOK, as_yaml
from mlxops.core import host_entry
from mlxops.core.host_entry import BootFile, HostFacts
from tests.lab import models
from tests.lab.homelab import Homelab
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


def test_script_has_no_value_in_it() -> None:
    assert "{" not in LOOK.replace("${hub%/*}", "").replace("say() {", "").replace("one_line() {", "")
