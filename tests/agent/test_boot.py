"""What the system is given to run at boot, checked by the systems' own parsers; and the commands that give it."""

from __future__ import annotations

import getpass
import os
import plistlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mlxops.agent import boot
from mlxops.agent.boot import Job, Launchd, Systemd
from mlxops.core.settings import BootJob
from tests.lab.homelab import Homelab
from tests.lab.sshd import missing

HOSTILE = ' a "b" %h $HOME \\n ;&'


@pytest.fixture
def job(tmp_path: Path) -> Job:
    state = tmp_path / f"state{HOSTILE}"
    (state / "logs").mkdir(parents=True)
    argv = (sys.executable, "-P", "-m", "mlxops.agent", "--restore", str(state))
    return Job(argv, state / "logs" / "restore.log", tmp_path / "home", getpass.getuser(), every=5)


def recorder(folder: Path, name: str, script: str = "exit 0") -> Path:
    """A stand-in that writes down how it was called, an argument a line."""
    folder.mkdir(exist_ok=True)
    program = folder / name
    program.write_text(f"#!/bin/sh\nprintf '%s ' {name} \"$@\" >>'{folder}/calls'; echo >>'{folder}/calls'\n{script}\n")
    program.chmod(0o755)
    return program


def calls(folder: Path) -> list[str]:
    return [line.strip() for line in (folder / "calls").read_text().splitlines()]


class TestThePropertyList:
    def test_of_the_agent_runs_restore_and_lets_the_servers_live(self, job: Job) -> None:
        keys = plistlib.loads(boot.launch_agent(job))
        assert keys["ProgramArguments"] == list(job.argv)
        assert (keys["Label"], keys["RunAtLoad"], keys["AbandonProcessGroup"]) == ("org.mlxops.restore", True, True)
        assert keys["StartInterval"] == 300
        assert "KeepAlive" not in keys and "UserName" not in keys

    def test_of_the_daemon_runs_it_as_the_user(self, job: Job) -> None:
        keys = plistlib.loads(boot.launch_daemon(job))
        assert (keys["UserName"], keys["EnvironmentVariables"]["HOME"]) == (job.user, str(job.home))
        assert keys["Label"] != plistlib.loads(boot.launch_agent(job))["Label"]
        assert keys["AbandonProcessGroup"] is True


class TestTheUnit:
    def test_is_what_systemd_understands(self, job: Job, tmp_path: Path) -> None:
        if shutil.which("systemd-analyze") is None:
            missing("systemd-analyze (Debian and Ubuntu: apt-get install systemd)")
        (tmp_path / "mlxops-restore.service").write_text(boot.service(job))
        (tmp_path / "mlxops-restore.timer").write_text(boot.timer(job))
        for unit in ("mlxops-restore.service", "mlxops-restore.timer"):
            done = subprocess.run(
                ["systemd-analyze", "--user", "verify", "--man=no", str(tmp_path / unit)],
                env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)},
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0 and "mlxops" not in done.stderr, done.stderr

    def test_says_that_the_servers_live_on(self, job: Job) -> None:
        assert "\nKillMode=process\n" in boot.service(job)

    def test_quotes_what_systemd_would_expand(self, job: Job) -> None:
        (line,) = [line for line in boot.service(job).splitlines() if line.startswith("ExecStart=")]
        assert '%%h $$HOME \\\\n ;&"' in line and 'a \\"b\\"' in line


class TestSystemd:
    def test_is_told_and_untold(self, job: Job, tmp_path: Path) -> None:
        bin = tmp_path / "bin"
        recorder(bin, "systemctl", 'case "$*" in *is-enabled*) echo enabled;; esac')
        manager = Systemd({"PATH": str(bin)})
        manager.install(job)
        units = tmp_path / "home" / ".config" / "systemd" / "user"
        assert sorted(path.name for path in units.iterdir()) == ["mlxops-restore.service", "mlxops-restore.timer"]
        assert manager.state() == "enabled"
        assert manager.remove(job) is True
        assert list(units.iterdir()) == []
        assert manager.remove(job) is False
        assert calls(bin) == [
            "systemctl --user daemon-reload",
            "systemctl --user enable mlxops-restore.service",
            "systemctl --user enable --now mlxops-restore.timer",
            "systemctl --user is-enabled mlxops-restore.service",
            "systemctl --user disable mlxops-restore.service",
            "systemctl --user disable --now mlxops-restore.timer",
            "systemctl --user daemon-reload",
        ]

    def test_without_an_interval_takes_the_timer_away(self, job: Job, tmp_path: Path) -> None:
        from dataclasses import replace

        bin = tmp_path / "bin"
        recorder(bin, "systemctl")
        manager = Systemd({"PATH": str(bin)})
        manager.install(job)
        manager.install(replace(job, every=None))
        assert [path.name for path in manager.places(job) if path.exists()] == ["mlxops-restore.service"]

    def test_that_fails_is_quoted(self, job: Job, tmp_path: Path) -> None:
        from mlxops.core.errors import Refused

        recorder(tmp_path / "bin", "systemctl", "echo Failed to connect to bus: No medium found >&2; exit 1")
        with pytest.raises(Refused) as caught:
            Systemd({"PATH": str(tmp_path / "bin")}).install(job)
        assert "Failed to connect to bus" in caught.value.why and caught.value.hint


class TestLaunchd:
    """With a stand-in for launchctl: what it is told is what launchctl(1) documents."""

    def test_is_told_and_untold_and_root_only_printed(self, job: Job, tmp_path: Path) -> None:
        bin = tmp_path / "bin"
        recorder(bin, "launchctl", 'case "$1" in bootout) exit 3;; esac')
        recorder(bin, "sudo")
        manager = Launchd({"PATH": str(bin)})
        told = manager.install(job)
        plist = tmp_path / "home" / "Library" / "LaunchAgents" / "org.mlxops.restore.plist"
        assert plistlib.loads(plist.read_bytes())["Label"] == "org.mlxops.restore"
        assert plist.stat().st_mode & 0o022 == 0
        printed = [line.strip() for line in told if "sudo" in line]
        assert len(printed) == 2 and printed[1].startswith("sudo launchctl bootstrap system /Library/LaunchDaemons/")
        assert plistlib.loads((job.log.parent.parent / "org.mlxops.restore.daemon.plist").read_bytes())["UserName"]
        assert manager.remove(job) is True and not plist.exists()
        domain = f"gui/{os.getuid()}"
        assert calls(bin) == [
            f"launchctl bootout {domain}/org.mlxops.restore",
            f"launchctl bootstrap {domain} {plist}",
            f"launchctl bootout {domain}/org.mlxops.restore",
        ]

    def test_without_a_login_at_the_screen_says_when_it_will_be_loaded(self, job: Job, tmp_path: Path) -> None:
        recorder(
            tmp_path / "bin", "launchctl", "echo 'Bootstrap failed: 125: Domain does not support it' >&2; exit 125"
        )
        told = Launchd({"PATH": str(tmp_path / "bin")}).install(job)
        assert "at the next login" in told[0] and "125" in told[0]

    @pytest.mark.parametrize(("script", "there"), [("exit 0", True), ("exit 113", False)])
    def test_knows_whether_the_hosts_own_boot_job_is_there(self, tmp_path: Path, script: str, there: bool) -> None:
        recorder(tmp_path / "bin", "launchctl", script)
        own = BootJob(8100, "/opt/mlx-launch/bin/start.sh", "com.bebop.mlx-launch")
        assert boot.job_is_there(own, {"PATH": str(tmp_path / "bin")}) is there
        assert calls(tmp_path / "bin") == ["launchctl print system/com.bebop.mlx-launch"]


def test_the_command_installs_shows_and_removes(make_homelab: Callable[..., Homelab], tmp_path: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("the stand-in is systemctl's")
    lab = make_homelab()
    bin = tmp_path / "bin"
    recorder(bin, "systemctl", 'case "$*" in *is-enabled*) echo enabled;; esac')
    lab.studio.env["PATH"] = f"{bin}:/usr/bin:/bin"

    def run(*words: str) -> dict[str, object]:
        result: dict[str, object] = lab.studio.mlxctl("boot", *words, "--json").ok().json["hosts"][0]["result"]
        return result

    before = run("--show")
    assert (before["state"], before["changed"]) == ("not installed", False)
    assert not lab.studio.state.exists(), "looking makes nothing"
    assert run("--every", "5")["changed"] is True
    shown = run()
    assert shown["state"] == "enabled" and isinstance(shown["files"], dict) and all(shown["files"].values())
    assert run("--every", "5")["changed"] is False
    assert run("--remove")["changed"] is True
    assert run("--show")["state"] == "not installed"
    refused = lab.studio.mlxctl("boot", "--install", "--remove", "--json")
    assert (refused.exit, refused.json["error"]["code"]) == (2, "one_action")
    assert lab.studio.mlxctl("boot", "--every", "soon").exit == 2
