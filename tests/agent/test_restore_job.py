"""The job that restores servers at boot: its files, checked by the systems' own parsers, and how it is installed."""

from __future__ import annotations

import os
import plistlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from mlxops.agent.service import restore_job
from mlxops.agent.service.restore_job import Launchd, RestoreJob, Systemd
from mlxops.core.errors import Refused
from tests.lab.homelab import Homelab
from tests.lab.sshd import missing

USER = "thestudio"
HOSTILE = ' a "b" %h $HOME \\n ;&'


@pytest.fixture
def job(tmp_path: Path) -> RestoreJob:
    state = tmp_path / f"state{HOSTILE}"
    (state / "logs").mkdir(parents=True)
    argv = (sys.executable, "-P", "-m", "mlxops.agent", "--restore", str(state))
    environ = {"HF_HOME": f"/disk/hf{HOSTILE}", "MLX_LAUNCH_CMD": "~/bin/serve --x"}
    return RestoreJob(argv, state / "logs" / "restore.log", tmp_path / "home", USER, 5, environ)


@pytest.fixture
def keeper(job: RestoreJob) -> RestoreJob:
    """The same job with a keeper instead of the timer."""
    return replace(job, argv=(*job.argv[:4], "--keeper", job.argv[-1]), every=None, keep=True)


def recorder(folder: Path, name: str, script: str = "exit 0") -> Path:
    """Create a stand-in for a program, which appends its arguments to `calls`."""
    folder.mkdir(exist_ok=True)
    program = folder / name
    program.write_text(f"#!/bin/sh\nprintf '%s ' {name} \"$@\" >>'{folder}/calls'; echo >>'{folder}/calls'\n{script}\n")
    program.chmod(0o755)
    return program


def calls(folder: Path) -> list[str]:
    return [line.strip() for line in (folder / "calls").read_text().splitlines()]


class TestPropertyList:
    def test_agents_property_list_runs_restore_and_keeps_the_servers(self, job: RestoreJob) -> None:
        keys = plistlib.loads(restore_job.launch_agent(job))
        assert keys["ProgramArguments"] == list(job.argv)
        assert (keys["Label"], keys["RunAtLoad"], keys["AbandonProcessGroup"]) == ("org.mlxops.restore", True, True)
        assert keys["StartInterval"] == 300
        assert keys["EnvironmentVariables"] == dict(job.environ)
        assert keys["ProcessType"] == "Interactive", "otherwise the servers are throttled"
        assert "KeepAlive" not in keys and "UserName" not in keys

    def test_daemons_property_list_runs_restore_as_the_user(self, job: RestoreJob) -> None:
        keys = plistlib.loads(restore_job.launch_daemon(job))
        assert (keys["UserName"], keys["EnvironmentVariables"]["HOME"]) == (job.user, str(job.home))
        assert keys["EnvironmentVariables"].items() >= job.environ.items()
        assert keys["Label"] != plistlib.loads(restore_job.launch_agent(job))["Label"]
        assert keys["AbandonProcessGroup"] is True

    def test_keeper_is_started_again_whenever_it_ends(self, keeper: RestoreJob) -> None:
        for plist in (restore_job.launch_agent(keeper), restore_job.launch_daemon(keeper)):
            keys = plistlib.loads(plist)
            assert (keys["KeepAlive"], keys["RunAtLoad"], keys["AbandonProcessGroup"]) == (True, True, True)
            assert keys["ProgramArguments"] == list(keeper.argv) and "StartInterval" not in keys


class TestUnit:
    def test_keepers_unit_runs_all_the_time_and_keeps_the_servers(self, keeper: RestoreJob) -> None:
        unit = restore_job.service(keeper)
        assert "\nType=exec\nRestart=always\n" in unit and "\nKillMode=process\n" in unit and "oneshot" not in unit

    @pytest.mark.parametrize("kept", [False, True])
    def test_unit_passes_systemd_analyze(self, job: RestoreJob, keeper: RestoreJob, tmp_path: Path, kept: bool) -> None:
        if shutil.which("systemd-analyze") is None:
            missing("systemd-analyze (Debian and Ubuntu: apt-get install systemd)")
        (tmp_path / "mlxops-restore.service").write_text(restore_job.service(keeper if kept else job))
        (tmp_path / "mlxops-restore.timer").write_text(restore_job.timer(job))
        for unit in ("mlxops-restore.service", "mlxops-restore.timer"):
            done = subprocess.run(
                ["systemd-analyze", "--user", "verify", "--man=no", str(tmp_path / unit)],
                env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)},
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0 and "mlxops" not in done.stderr, done.stderr

    def test_unit_keeps_the_servers(self, job: RestoreJob) -> None:
        assert "\nKillMode=process\n" in restore_job.service(job)

    def test_unit_quotes_specifiers_and_variables(self, job: RestoreJob) -> None:
        (line,) = [line for line in restore_job.service(job).splitlines() if line.startswith("ExecStart=")]
        assert '%%h $$HOME \\\\n ;&"' in line and 'a \\"b\\"' in line

    def test_unit_has_the_environment(self, job: RestoreJob) -> None:
        """A `$` is not expanded there: systemd.exec(5). The test with a real systemd reads it back."""
        lines = [line for line in restore_job.service(job).splitlines() if line.startswith("Environment=")]
        assert lines == [
            'Environment="HF_HOME=/disk/hf a \\"b\\" %%h $HOME \\\\n ;&"',
            'Environment="MLX_LAUNCH_CMD=~/bin/serve --x"',
        ]


def test_job_has_only_variables_that_mlxops_reads_and_no_secret() -> None:
    environ = {
        "HF_HOME": "/disk/hf",
        "HF_HUB_CACHE": "/disk/hub",
        "PATH": "/usr/bin",
        "MLX_LAUNCH_CMD": "serve",
        "HF_TOKEN": "hf_secret",
        "SHELL": "/bin/sh",
        "XDG_CACHE_HOME": "two\nlines",
    }
    variables = restore_job.job_environment(environ)
    assert variables == {key: environ[key] for key in ("PATH", "MLX_LAUNCH_CMD", "HF_HOME", "HF_HUB_CACHE")}
    assert restore_job.job_environment({"HF_ENDPOINT": "https://hub.example"}) == {"HF_ENDPOINT": "https://hub.example"}
    assert restore_job.job_environment({"HF_ENDPOINT": "https://me:secret@hub.example"}) == {}
    assert restore_job.make_job(Path("/s"), {"HOME": "/h", **environ}, None).environ == variables


class TestSystemd:
    def test_units_are_installed_and_removed(self, job: RestoreJob, tmp_path: Path) -> None:
        bin = tmp_path / "bin"
        recorder(bin, "systemctl", 'case "$*" in *is-enabled*) echo enabled;; esac')
        manager = Systemd({"PATH": str(bin)})
        manager.install(job)
        units = tmp_path / "home" / ".config" / "systemd" / "user"
        assert sorted(path.name for path in units.iterdir()) == ["mlxops-restore.service", "mlxops-restore.timer"]
        assert manager.state() == "enabled"
        assert manager.remove(job) == (True, [])
        assert list(units.iterdir()) == []
        assert manager.remove(job) == (False, [])
        assert calls(bin) == [
            "systemctl --user daemon-reload",
            "systemctl --user enable mlxops-restore.service",
            "systemctl --user enable --now mlxops-restore.timer",
            "systemctl --user is-enabled mlxops-restore.service",
            "systemctl --user disable mlxops-restore.service",
            "systemctl --user disable --now mlxops-restore.timer",
            "systemctl --user daemon-reload",
        ]

    def test_missing_interval_removes_the_timer(self, job: RestoreJob, tmp_path: Path) -> None:
        bin = tmp_path / "bin"
        recorder(bin, "systemctl")
        manager = Systemd({"PATH": str(bin)})
        manager.install(job)
        manager.install(replace(job, every=None))
        assert [path.name for path in manager.job_paths(job) if path.exists()] == ["mlxops-restore.service"]

    def test_keeper_replaces_the_timer_and_is_replaced_by_it(
        self, job: RestoreJob, keeper: RestoreJob, tmp_path: Path
    ) -> None:
        bin = tmp_path / "bin"
        recorder(bin, "systemctl")
        manager = Systemd({"PATH": str(bin)})
        kinds = []
        for each in (job, keeper, job, keeper):
            manager.install(each)
            kinds.append(restore_job.kind_of(manager.job_paths(each)))
        manager.install(replace(job, every=None))
        assert [*kinds, restore_job.kind_of(manager.job_paths(job))] == ["timer", "keeper", "timer", "keeper", "boot"]
        manager.install(keeper)
        manager.remove(keeper)
        assert restore_job.kind_of(manager.job_paths(job)) is None
        reload, enable = "daemon-reload", "enable mlxops-restore.service"
        timer, untimed = "enable --now mlxops-restore.timer", "disable --now mlxops-restore.timer"
        start, stop = "restart mlxops-restore.service", "stop mlxops-restore.service"
        assert [line.removeprefix("systemctl --user ") for line in calls(bin)] == [
            *(reload, enable, timer),
            *(reload, enable, untimed, reload, start),
            *(reload, enable, timer, stop),
            *(reload, enable, untimed, reload, start),
            *(reload, enable, stop),
            *(reload, enable, start),
            *("disable --now mlxops-restore.service", reload),
        ]

    def test_failure_of_systemctl_is_quoted(self, job: RestoreJob, tmp_path: Path) -> None:
        recorder(tmp_path / "bin", "systemctl", "echo Failed to connect to bus: No medium found >&2; exit 1")
        with pytest.raises(Refused) as caught:
            Systemd({"PATH": str(tmp_path / "bin")}).install(job)
        assert "Failed to connect to bus" in caught.value.why and caught.value.hint

    @pytest.mark.parametrize("failing", ["daemon-reload", "enable mlxops-restore.service", "enable --now"])
    def test_failed_install_restores_the_files(self, job: RestoreJob, tmp_path: Path, failing: str) -> None:
        recorder(tmp_path / "bin", "systemctl", f'case "$*" in *"{failing}"*) exit 1;; esac')
        manager = Systemd({"PATH": str(tmp_path / "bin")})
        with pytest.raises(Refused):
            manager.install(job)
        assert [path for path in manager.job_paths(job) if path.exists()] == []
        older = dict.fromkeys(manager.job_paths(job), b"older")
        for path, text in older.items():
            path.write_bytes(text)
        with pytest.raises(Refused):
            manager.install(job)
        assert {path: path.read_bytes() for path in manager.job_paths(job)} == older
        folder = manager.job_paths(job)[0].parent
        assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in older)

    def test_files_are_removed_even_if_systemctl_fails(self, job: RestoreJob, tmp_path: Path) -> None:
        bin = tmp_path / "bin"
        recorder(bin, "systemctl")
        manager = Systemd({"PATH": str(bin)})
        manager.install(job)
        for path in manager.job_paths(job):
            wants = path.parent / ("timers" if path.suffix == ".timer" else "default")
            wants = wants.with_suffix(".target.wants")
            wants.mkdir()
            (wants / path.name).symlink_to(path)
        recorder(bin, "systemctl", "echo Failed to connect to bus: No medium found >&2; exit 1")
        removed, notes = manager.remove(job)
        assert removed and "Failed to connect to bus" in notes[0] and len(notes) == 1
        folder = manager.job_paths(job)[0].parent
        assert [path for path in folder.rglob("*") if not path.is_dir()] == []
        assert manager.remove(job) == (False, [])

    def test_state_is_unknown_if_systemctl_fails(self, tmp_path: Path) -> None:
        recorder(tmp_path / "bin", "systemctl", "echo Failed to connect to bus: No medium found >&2; exit 1")
        state = Systemd({"PATH": str(tmp_path / "bin")}).state()
        assert state.startswith("unknown: systemctl failed (Failed to connect")


@pytest.fixture
def mac(tmp_path: Path) -> Launchd:
    (tmp_path / "daemons").mkdir()
    return Launchd({"PATH": str(tmp_path / "bin")}, daemons=tmp_path / "daemons", pause=lambda: None, tries=5)


class TestLaunchd:
    """With a stand-in for launchctl that expects what launchctl(1) documents."""

    DOMAIN = f"gui/{os.getuid()}"
    ABSENT = 'case "$1" in print) exit 113;; bootout) exit 3;; esac'

    def test_job_is_installed_and_removed_and_root_commands_printed(
        self, job: RestoreJob, mac: Launchd, tmp_path: Path
    ) -> None:
        bin = tmp_path / "bin"
        recorder(bin, "launchctl", self.ABSENT)
        recorder(bin, "sudo")
        notes = mac.install(job)
        plist = tmp_path / "home" / "Library" / "LaunchAgents" / "org.mlxops.restore.plist"
        assert plistlib.loads(plist.read_bytes())["Label"] == "org.mlxops.restore"
        assert plist.stat().st_mode & 0o022 == 0
        printed = [line.strip() for line in notes if "sudo" in line]
        assert [line.split()[:3] for line in printed] == [["sudo", "install", "-o"], ["sudo", "launchctl", "bootstrap"]]
        ours = job.log.parent.parent / "org.mlxops.restore.daemon.plist"
        assert plistlib.loads(ours.read_bytes())["UserName"]
        assert mac.remove(job) == (True, [])
        assert not plist.exists() and not ours.exists()
        assert mac.remove(job) == (False, [])
        assert calls(bin)[:4] == [
            f"launchctl bootout {self.DOMAIN}/org.mlxops.restore",
            f"launchctl print {self.DOMAIN}/org.mlxops.restore",
            f"launchctl bootstrap {self.DOMAIN} {plist}",
            f"launchctl bootout {self.DOMAIN}/org.mlxops.restore",
        ]

    def test_install_waits_until_an_older_job_has_ended(self, job: RestoreJob, mac: Launchd, tmp_path: Path) -> None:
        """bootout returns at once, the job exists for a while, and bootstrap fails with 5 for another while."""
        count = f'PATH=/usr/bin:/bin; echo x >>"{tmp_path}/$1"; n=$(wc -l <"{tmp_path}/$1")'
        recorder(
            tmp_path / "bin",
            "launchctl",
            f'{count}; case "$1" in print) [ $n -le 2 ] || exit 113;; bootstrap) [ $n -gt 2 ] || exit 5;; esac',
        )
        notes = mac.install(job)
        assert [line.split()[1] for line in calls(tmp_path / "bin")] == ["bootout", *["print"] * 3, *["bootstrap"] * 3]
        assert "at the next login" not in notes[0]

    def test_install_waits_for_a_limited_number_of_tries(self, job: RestoreJob, mac: Launchd, tmp_path: Path) -> None:
        recorder(tmp_path / "bin", "launchctl", 'case "$1" in bootstrap) echo "5: I/O error" >&2; exit 5;; esac')
        assert "at the next login; now it reports: 5: I/O error" in mac.install(job)[0]
        assert len(calls(tmp_path / "bin")) == 1 + 5 + 5

    def test_install_without_a_login_reports_when_the_job_is_loaded(
        self, job: RestoreJob, mac: Launchd, tmp_path: Path
    ) -> None:
        recorder(
            tmp_path / "bin", "launchctl", "echo 'Bootstrap failed: 125: Domain does not support it' >&2; exit 125"
        )
        notes = mac.install(job)
        assert "at the next login" in notes[0] and "125" in notes[0]

    def test_missing_launchctl_leaves_no_files(self, job: RestoreJob, mac: Launchd) -> None:
        with pytest.raises(Refused):
            mac.install(job)
        assert [path for path in mac.files(job) if path.exists()] == []

    def test_installed_daemon_is_reported(self, job: RestoreJob, mac: Launchd, tmp_path: Path) -> None:
        recorder(tmp_path / "bin", "launchctl", self.ABSENT)
        mac.install(job)
        installed = tmp_path / "daemons" / "org.mlxops.restore.daemon.plist"
        assert mac.daemon_notes(job) == []
        installed.write_bytes((job.log.parent.parent / installed.name).read_bytes())
        assert mac.install(job) == mac.daemon_notes(job)
        assert len(mac.daemon_notes(job)) == 1 and "up to date" in mac.daemon_notes(job)[0]
        notes = mac.install(replace(job, every=7))
        assert "out of date" in notes[0]
        assert [line.split()[1:3] for line in notes[1:]] == [
            ["launchctl", "bootout"],
            ["install", "-o"],
            ["launchctl", "bootstrap"],
        ]
        removed, notes = mac.remove(job)
        assert removed and "at each boot" in notes[0]
        assert [line.strip() for line in notes[1:]] == [
            "sudo launchctl bootout system/org.mlxops.restore.daemon",
            f"sudo rm {installed}",
        ]
        assert mac.remove(job) == (False, notes), "the note is repeated while the daemon is installed"

    @pytest.mark.parametrize(
        ("script", "state"),
        [("exit 0", "loaded"), ("exit 113", "not loaded"), ("echo no >&2; exit 64", "unknown: launchctl failed")],
    )
    def test_state_is_read_from_launchctl(self, mac: Launchd, tmp_path: Path, script: str, state: str) -> None:
        recorder(tmp_path / "bin", "launchctl", script)
        assert mac.state().startswith(state) and (state.startswith("unknown") or mac.state() == state)


def test_boot_command_installs_shows_and_removes_the_job(make_homelab: Callable[..., Homelab], tmp_path: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("the stand-in is systemctl's")
    lab = make_homelab()
    bin = tmp_path / "bin"
    recorder(bin, "systemctl", 'case "$*" in *is-enabled*) echo enabled;; esac')
    lab.studio.env["PATH"] = f"{bin}:/usr/bin:/bin"

    def run(*arguments: str) -> dict[str, object]:
        result: dict[str, object] = lab.studio.mlxctl("boot", *arguments, "--json").ok().json["hosts"][0]["result"]
        return result

    lab.configure(boot={"port": lab.studio.ports[0], "label": "com.example.mlx"})
    before = run("--show")
    assert isinstance(before["boot_job"], dict)
    assert (before["boot_job"]["there"], before["boot_job"]["standing"]) == (False, "not installed")
    assert (before["state"], before["changed"]) == ("not installed", False)
    assert not lab.studio.state.exists(), "--show creates nothing"
    assert run("--every", "5")["changed"] is True
    result = run()
    assert result["state"] == "enabled" and isinstance(result["files"], dict) and all(result["files"].values())
    assert run("--every", "5")["changed"] is False and run()["installed"] == "timer"
    kept = run("--keep")
    assert (kept["changed"], kept["installed"], kept["keeper"]) == (True, "keeper", None)
    assert "restore at boot: enabled, a keeper\nkeeper: not running\n" in lab.studio.mlxctl("boot").ok().stdout
    assert run("--remove")["changed"] is True
    assert run("--show")["state"] == "not installed"
    refused = lab.studio.mlxctl("boot", "--install", "--remove", "--json")
    assert (refused.exit, refused.json["error"]["code"]) == (2, "one_action")
    assert lab.studio.mlxctl("boot", "--every", "soon").exit == 2
