"""Servers that the system starts at boot: which job they belong to, and whether the job is installed."""

from __future__ import annotations

import os
import plistlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest

from mlxops.agent.host.system import LinuxSystem, Process, ProcessTable, units_in
from mlxops.agent.service import managers
from mlxops.agent.service.boot_jobs import BootJobs, Roots
from mlxops.core.ports import Standing
from mlxops.core.settings import BootJob
from tests.agent.test_restore_job import calls, recorder
from tests.lab.homelab import Homelab
from tests.lab.quick import MODELS, QuickHost
from tests.lab.world import wait_until

WAIT = 60.0
LABEL = "com.example.mlx"
LAUNCHD_PRINT = """\
gui/501/com.example.mlx = {
	active count = 1
	path = /Users/me/Library/LaunchAgents/com.example.mlx.plist
	type = LaunchAgent
	state = running

	program = /bin/bash
	arguments = {
		/bin/bash
		-lc
		/opt/mlx/start.sh
	}

	environment = {
		pid = 99
		XPC_SERVICE_NAME => com.example.mlx
	}

	domain = gui/501 [100005]
	minimum runtime = 10
	runs = 1
	pid = PID
	immediate reason = speculative
	last exit code = (never exited)
}
"""
"""Output of `launchctl print` for a job, in the order of macOS 14."""


@dataclass
class Seen(LinuxSystem):
    """A system with scripted processes. Everything else is from this system."""

    environs: dict[int, dict[str, str]] = field(default_factory=dict)
    cgroups: dict[int, str] = field(default_factory=dict)
    folders: dict[int, str] = field(default_factory=dict)

    def variables(self, pid: int) -> Mapping[str, str]:
        return self.environs.get(pid, {})

    def units(self, pid: int) -> tuple[str, ...]:
        return units_in(self.cgroups.get(pid, ""))

    def folder(self, pid: int) -> str | None:
        return self.folders.get(pid)


def process(pid: int, ppid: int, *argv: str) -> Process:
    return Process(pid, ppid, pid, os.getuid(), "1", False, argv)


SERVER, PARENT = 900001, 900000
ENGINE = ("/venv/bin/python", "/venv/bin/mlx_lm.server", "--model", "org/a", "--port", "8100")


@dataclass
class Box:
    """A host with its own files, and a server that is the child of `parent`."""

    root: Path

    def __post_init__(self) -> None:
        (self.root / "bin").mkdir()
        self.script = self.write("opt/mlx/start.sh", "#!/bin/sh\nexec mlx_lm.server\n")
        self.environ = {"HOME": str(self.root / "home"), "PATH": str(self.root / "bin")}

    def write(self, path: str, text: str | bytes) -> Path:
        made = self.root / path
        made.parent.mkdir(parents=True, exist_ok=True)
        made.write_bytes(text if isinstance(text, bytes) else text.encode())
        return made

    def jobs(self, system: Seen, **job: str) -> BootJobs:
        given = BootJob(8100, **(job or {"script": str(self.script), "label": LABEL}))
        return BootJobs((given,), system, self.environ, Roots(self.root))

    def claim(self, system: Seen, *parent: str, port: int = 8100, **job: str) -> Any:
        table = ProcessTable({PARENT: process(PARENT, 1, *parent), SERVER: process(SERVER, PARENT, *ENGINE)})
        return self.jobs(system, **job).claim(table, port, [SERVER])

    def state(self, *others: Process, **job: str) -> Any:
        jobs = self.jobs(Seen(), **job)
        return jobs.state(ProcessTable({each.pid: each for each in others}), jobs.jobs[0])

    def launchctl(self, script: str) -> None:
        recorder(self.root / "bin", "launchctl", script)

    def systemctl(self, script: str) -> None:
        recorder(self.root / "bin", "systemctl", script)

    def plist(self, folder: str, name: str, **keys: object) -> Path:
        return self.write(f"{folder}/{name}.plist", plistlib.dumps({"Label": name, **keys}))


@pytest.fixture
def box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Box:
    monkeypatch.setattr(managers, "FOLDERS", str(tmp_path / "bin"))
    return Box(tmp_path)


CGROUPS: dict[str, tuple[str, str, str]] = {
    "a system unit": ("0::/system.slice/mlx.service", "mlx", "sudo systemctl stop mlx.service"),
    "version 1": (
        "3:cpu:/\n1:name=systemd:/system.slice/mlx.service",
        "mlx.service",
        "sudo systemctl stop mlx.service",
    ),
    "a user unit": (
        "0::/user.slice/user-1000.slice/user@1000.service/app.slice/mlx.service",
        "mlx.service",
        "systemctl --user stop mlx.service",
    ),
    "an instance": (
        "0::/system.slice/system-mlx.slice/mlx@8100.service",
        "mlx@8100",
        "sudo systemctl stop mlx@8100.service",
    ),
    "any instance of a template": (
        "0::/system.slice/mlx@8101.service",
        "mlx@.service",
        "sudo systemctl stop mlx@8101.service",
    ),
    "an escaped name": (
        "0::/system.slice/mlx@qwen3\\x2d8b.service",
        "mlx@qwen3-8b",
        "sudo systemctl stop 'mlx@qwen3\\x2d8b.service'",
    ),
    "a name that the kernel has too": (
        "0::/system.slice/_memory.service",
        "memory",
        "sudo systemctl stop memory.service",
    ),
    "a group below the unit": ("0::/system.slice/mlx.service/workers", "mlx", "sudo systemctl stop mlx.service"),
    "another case": ("0::/system.slice/MLX.service", "mlx", "sudo systemctl stop MLX.service"),
    "the unit of a timer": ("0::/system.slice/mlx.service", "mlx.timer", "sudo systemctl stop mlx.service"),
    "a scope": ("0::/user.slice/mlx.scope", "mlx.scope", "sudo systemctl stop mlx.scope"),
}


class TestServerOfTheJob:
    @pytest.mark.parametrize("case", CGROUPS)
    def test_server_in_the_units_control_group_is_claimed(self, box: Box, case: str) -> None:
        cgroup, label, stop = CGROUPS[case]
        claim = box.claim(Seen(cgroups={SERVER: cgroup}), "/sbin/init", label=label)
        assert claim.stop == stop and "systemd" in claim.how

    def test_server_with_a_starter_in_the_units_group_is_claimed(self, box: Box) -> None:
        """`systemd-run --scope` in a start script gives the server a group of its own."""
        groups = {SERVER: "0::/system.slice/run-r1.scope", PARENT: "0::/system.slice/mlx.service"}
        assert (
            box.claim(Seen(cgroups=groups), "/bin/bash", "/srv/x.sh", label="mlx").stop
            == "sudo systemctl stop mlx.service"
        )

    @pytest.mark.parametrize("label", [LABEL, "COM.Example.MLX"])
    def test_launchd_variable_identifies_the_server(self, box: Box, label: str) -> None:
        claim = box.claim(Seen(environs={SERVER: {"XPC_SERVICE_NAME": LABEL}}), "/sbin/launchd", label=label)
        assert "launchd" in claim.how

    @pytest.mark.parametrize("pid", [SERVER, PARENT], ids=["the server itself", "the script above it"])
    @pytest.mark.parametrize(
        ("domain", "stop"),
        [
            ("system", f"sudo launchctl bootout system/{LABEL}"),
            (f"gui/{os.getuid()}", f"launchctl bootout gui/{os.getuid()}/{LABEL}"),
            (f"user/{os.getuid()}", f"launchctl bootout user/{os.getuid()}/{LABEL}"),
        ],
    )
    def test_pid_from_launchctl_identifies_the_server(self, box: Box, pid: int, domain: str, stop: str) -> None:
        shown = box.write("shown", LAUNCHD_PRINT.replace("PID", str(pid)))
        box.launchctl(f'[ "$2" = {domain}/{LABEL} ] && exec /bin/cat {shown}; exit 113')
        assert box.claim(Seen(), "/bin/bash", "/srv/other.sh", label=LABEL).stop == stop

    def test_main_pid_of_the_unit_identifies_the_server(self, box: Box) -> None:
        """A script that ends in `exec systemd-run --scope ...`."""
        box.systemctl(f"echo Id=mlx.service; echo LoadState=loaded; echo ActiveState=active; echo MainPID={SERVER}")
        seen = Seen(cgroups={SERVER: "0::/system.slice/run-r1.scope"})
        assert box.claim(seen, "/sbin/init", label="mlx").stop == "sudo systemctl stop mlx.service"

    @pytest.mark.parametrize("label", ["", "com.example.wrong"], ids=["no label", "a wrong label"])
    def test_managers_file_that_runs_the_script_identifies_the_server(self, box: Box, label: str) -> None:
        """The script ends in exec, so nothing above the server names it."""
        box.plist("Library/LaunchDaemons", "org.job", ProgramArguments=["/bin/bash", "-lc", str(box.script)])
        box.plist("Library/LaunchDaemons", "org.job2", ProgramArguments=[str(box.script), "8101"])
        for name in ("org.job", "org.job2"):
            seen = Seen(environs={SERVER: {"XPC_SERVICE_NAME": name}})
            claim = box.claim(seen, "/sbin/launchd", script=str(box.script), label=label)
            assert claim.stop == f"sudo launchctl bootout system/{name}"
        box.write("etc/systemd/system/any.service", f"[Service]\nExecStart=/usr/bin/env bash {box.script}\n")
        seen = Seen(cgroups={SERVER: "0::/system.slice/any.service"})
        claim = box.claim(seen, "/sbin/init", script=str(box.script), label=label)
        assert claim.stop == "sudo systemctl stop any.service"

    def test_unit_around_the_script_is_not_suggested_for_stopping(self, box: Box) -> None:
        """Stopping the unit of a login, a terminal or a container would stop everything else in it."""
        seen = Seen(cgroups={PARENT: "0::/system.slice/docker.service", SERVER: "0::/system.slice/docker.service"})
        claim = box.claim(seen, "/bin/bash", str(box.script), script=str(box.script))
        assert claim.stop == f"stop what runs {box.script}"

    def test_supervisord_and_pm2_variables_identify_the_server(self, box: Box) -> None:
        of_supervisord = Seen(environs={SERVER: {"SUPERVISOR_PROCESS_NAME": "mlx"}})
        assert box.claim(of_supervisord, "/usr/bin/supervisord", label="mlx").stop == "supervisorctl stop mlx"
        of_pm2 = Seen(environs={SERVER: {"pm_exec_path": str(box.script), "name": "mlx"}})
        assert box.claim(of_pm2, "PM2 v5.3.0: God Daemon", script=str(box.script)).stop == "pm2 stop mlx"

    def test_invocation_id_identifies_the_server_without_control_groups(self, box: Box) -> None:
        box.systemctl(
            'case "$*" in *--user*) exit 1;; esac; echo Id=mlx.service; echo LoadState=loaded; echo InvocationID=abc'
        )
        seen = Seen(environs={SERVER: {"INVOCATION_ID": "abc"}}, cgroups={SERVER: "0::/"})
        assert box.claim(seen, "/sbin/init", label="mlx").stop == "sudo systemctl stop mlx.service"
        assert box.claim(Seen(environs={SERVER: {"INVOCATION_ID": "other"}}), "/sbin/init", label="mlx") is None

    @pytest.mark.parametrize(
        "argv",
        [
            ("SCRIPT",),
            ("/bin/bash", "SCRIPT"),
            ("/bin/bash", "-e", "SCRIPT", "8100"),
            ("-zsh", "SCRIPT"),
            ("/bin/bash", "-lc", "source ~/.zprofile; exec SCRIPT"),
            ("/bin/sh", "-c", "cd /opt/mlx && ./start.sh"),
            ("/bin/sh", "-c", "SCRIPT>>/var/log/mlx.log 2>&1"),
            ("/usr/bin/env", "bash", "SCRIPT"),
            ("/usr/bin/caffeinate", "-is", "SCRIPT"),
            ("/usr/bin/python3", "/opt/keeper.py", "--run", "SCRIPT"),
            ("/bin/bash", "start.sh"),
            ("/bin/bash", "../mlx/./start.sh"),
            ("/bin/bash", "LINK"),
        ],
        ids=" ".join,
    )
    def test_script_above_the_server_is_recognised_in_any_spelling(self, box: Box, argv: tuple[str, ...]) -> None:
        (box.root / "usr").mkdir()
        link = box.root / "usr" / "begin"
        link.symlink_to(box.script)
        words = tuple(word.replace("SCRIPT", str(box.script)).replace("LINK", str(link)) for word in argv)
        seen = Seen(folders={PARENT: str(box.script.parent)})
        assert box.claim(seen, *words, script=str(box.script)) is not None

    @pytest.mark.parametrize("configured", ["link", "a link, and the file is gone", "trailing slash", "home", "spaces"])
    def test_script_may_be_spelt_differently_in_hosts_yaml(self, box: Box, configured: str) -> None:
        script = box.write("home/bin/start all.sh", "#!/bin/sh\n") if configured in {"home", "spaces"} else box.script
        (box.root / "usr").symlink_to(box.root / "opt")
        if "gone" in configured:
            script.unlink()
        path = {
            "link": str(box.root / "usr/mlx/start.sh"),
            "a link, and the file is gone": str(box.root / "usr/mlx/start.sh"),
            "trailing slash": f"{script}/",
            "home": "~/bin/start all.sh",
            "spaces": str(script),
        }[configured]
        assert box.claim(Seen(), "/bin/bash", str(script), script=path) is not None

    def test_relative_script_is_recognised_after_a_change_of_folder(self, box: Box) -> None:
        seen = Seen(folders={PARENT: "/"}, environs={PARENT: {"PWD": str(box.script.parent)}})
        assert box.claim(seen, "/bin/bash", "start.sh", script=str(box.script)) is not None

    def test_supervisor_with_the_script_in_its_environment_is_recognised(self, box: Box) -> None:
        seen = Seen(environs={PARENT: {"JOB": f"/bin/bash {box.script}"}})
        assert box.claim(seen, "/usr/bin/python3", "keeper.py", script=str(box.script)) is not None

    @pytest.mark.parametrize("port", [8100, 8105])
    def test_server_is_claimed_on_any_port(self, box: Box, port: int) -> None:
        assert box.claim(Seen(), "/bin/bash", str(box.script), port=port, script=str(box.script)).job.port == 8100


class TestOtherServer:
    @pytest.mark.parametrize(
        ("environ", "cgroup", "parent"),
        [
            ({}, "0::/user.slice/user-1000.slice/session-3.scope", ("-zsh",)),
            ({"XPC_SERVICE_NAME": "0"}, "", ("/bin/zsh",)),
            ({"XPC_SERVICE_NAME": "com.example.mlx2"}, "", ("/sbin/launchd",)),
            ({"XPC_SERVICE_NAME": "application.com.apple.Terminal.1"}, "", ("/bin/zsh",)),
            ({}, "0::/system.slice/com.example.mlx-other.service", ("/sbin/init",)),
            ({"INVOCATION_ID": "abc"}, "0::/system.slice/other.service", ("/sbin/init",)),
            ({}, "", ("/usr/bin/vim", "SCRIPT")),
            ({}, "", ("tmux", "new-session", "-d", "SCRIPT")),
            ({}, "", ("ssh", "studio", "SCRIPT")),
            ({}, "", ("/bin/bash", "OTHER")),
            ({"JOB": "SCRIPT"}, "", ("/bin/bash",)),
        ],
    )
    def test_server_of_a_person_or_another_job_is_not_claimed(
        self, box: Box, environ: dict[str, str], cgroup: str, parent: tuple[str, ...]
    ) -> None:
        box.launchctl("exit 113")
        other = box.write("opt/mlx/start.sh.old", "#!/bin/sh\n")
        environ = {key: value.replace("SCRIPT", str(box.script)) for key, value in environ.items()}
        seen = Seen(environs=dict.fromkeys((SERVER, PARENT), environ), cgroups={SERVER: cgroup})
        argv = [word.replace("SCRIPT", str(box.script)).replace("OTHER", str(other)) for word in parent]
        assert box.claim(seen, *argv) is None

    def test_variables_inherited_by_this_command_prove_nothing(self, box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
        """Variables that every process started here inherits prove nothing."""
        here = process(os.getpid(), 1, "/usr/bin/python3", "harness.py")
        seen = Seen(environs={here.pid: {"JOB": str(box.script)}})
        table = ProcessTable({here.pid: here, SERVER: process(SERVER, here.pid, *ENGINE)})
        assert box.jobs(seen, script=str(box.script)).claim(table, 8100, [SERVER]) is None


UNIT_STATES: dict[str, tuple[dict[str, str], Standing]] = {
    "running": ({"LoadState": "loaded", "ActiveState": "active", "SubState": "running"}, Standing.ACTIVE),
    "between two starts": (
        {"LoadState": "loaded", "ActiveState": "activating", "SubState": "auto-restart"},
        Standing.ACTIVE,
    ),
    "enabled, failed": (
        {"LoadState": "loaded", "ActiveState": "failed", "UnitFileState": "enabled", "WantedBy": "multi-user.target"},
        Standing.LOADED,
    ),
    "done once": (
        {"LoadState": "loaded", "ActiveState": "active", "SubState": "exited", "UnitFileState": "enabled"},
        Standing.LOADED,
    ),
    "disabled": ({"LoadState": "loaded", "ActiveState": "inactive", "UnitFileState": "disabled"}, Standing.DISABLED),
    "disabled, with a timer": (
        {"LoadState": "loaded", "ActiveState": "inactive", "UnitFileState": "disabled", "TriggeredBy": "mlx.timer"},
        Standing.LOADED,
    ),
    "masked": ({"LoadState": "masked", "ActiveState": "inactive", "UnitFileState": "masked"}, Standing.DISABLED),
    "unknown to it": ({"LoadState": "not-found", "ActiveState": "inactive"}, Standing.MISSING),
}


class TestJobState:
    @pytest.mark.parametrize("case", UNIT_STATES)
    def test_state_is_read_from_systemctl(self, box: Box, case: str) -> None:
        shown, standing = UNIT_STATES[case]
        lines = "; ".join(f"echo {key}={value}" for key, value in {"Id": "mlx.service", **shown}.items())
        box.systemctl(f'case "$*" in *--user*) echo LoadState=not-found;; *) {lines};; esac')
        found = box.state(label="mlx")
        assert found.standing is standing, found
        if standing is Standing.DISABLED:
            assert found.enable.startswith("sudo systemctl ") and found.enable.endswith(" mlx.service")

    def test_user_unit_is_found(self, box: Box) -> None:
        shown = "echo Id=mlx.service; echo LoadState=loaded; echo ActiveState=active; echo SubState=running"
        box.systemctl(f'case "$*" in *--user*) {shown};; *) echo LoadState=not-found;; esac')
        assert box.state(label="mlx").stop == "systemctl --user stop mlx.service"

    @pytest.mark.parametrize(
        ("state", "standing"),
        [("state = running\n\tpid = 7", Standing.ACTIVE), ("state = spawn scheduled", Standing.ACTIVE),
         ("state = not running", Standing.LOADED), ("", Standing.LOADED)],
    )  # fmt: skip
    def test_state_is_read_from_launchctl(self, box: Box, state: str, standing: Standing) -> None:
        shown = box.write("shown", f"system/{LABEL} = {{\n\tactive count = 1\n\t{state}\n}}\n")
        box.launchctl(f'[ "$2" = system/{LABEL} ] && exec /bin/cat {shown}; exit 113')
        assert box.state(label=LABEL).standing is standing

    DISABLED: ClassVar[dict[str, Standing]] = {
        "echo '	\"com.example.mlx\" => disabled'": Standing.DISABLED,
        "echo '	\"com.example.mlx\" => true'": Standing.DISABLED,
        "echo '	\"com.example.mlx\" => enabled'": Standing.INSTALLED,
        "exit 1": Standing.INSTALLED,
    }

    @pytest.mark.parametrize("said", DISABLED)
    @pytest.mark.parametrize("folder", ["Library/LaunchDaemons", "Library/LaunchAgents", "home/Library/LaunchAgents"])
    def test_property_list_alone_means_installed_or_disabled(self, box: Box, folder: str, said: str) -> None:
        path = box.plist(folder, LABEL)
        box.launchctl(f'case "$1" in print-disabled) {said};; *) exit 113;; esac')
        found = box.state(label=LABEL.upper())
        domain = "system" if "Daemons" in folder else f"gui/{os.getuid()}"
        assert found.standing is self.DISABLED[said] and str(path) in found.detail
        if found.standing is Standing.DISABLED:
            assert found.enable == f"{'sudo ' if domain == 'system' else ''}launchctl enable {domain}/{LABEL}"
        else:
            assert found.stop.endswith(f"launchctl bootout {domain}/{LABEL}")

    def test_property_list_is_found_by_its_script(self, box: Box) -> None:
        box.launchctl("exit 113")
        box.plist("Library/LaunchDaemons", "other", ProgramArguments=["/bin/sleep", "1"])
        box.plist("Library/LaunchDaemons", LABEL, ProgramArguments=["/bin/bash", "-lc", f"exec {box.script}"])
        found = box.state(script=str(box.script))
        assert (found.standing, found.stop) == (Standing.INSTALLED, f"sudo launchctl bootout system/{LABEL}")

    def test_unit_is_found_by_its_script(self, box: Box) -> None:
        box.write("etc/systemd/system/mlx.service", f"[Service]\nExecStart=/usr/bin/env bash -c 'exec {box.script}'\n")
        found = box.state(script=str(box.script))
        assert found.standing is Standing.INSTALLED and found.stop == "sudo systemctl stop mlx.service"

    @pytest.mark.parametrize(
        "path", ["etc/crontab", "etc/cron.d/mlx", "etc/rc.local", "etc/supervisor/conf.d/mlx.conf"]
    )
    def test_script_in_another_startup_file_means_installed(self, box: Box, path: str) -> None:
        box.write(path, f"# {box.script}\n")
        assert box.state().standing is Standing.MISSING, "a comment runs nothing"
        box.write(path, f"@reboot me {box.script} >/dev/null\n")
        found = box.state()
        assert found.standing is Standing.INSTALLED and str(box.root / path) in found.detail

    def test_script_in_the_users_crontab_means_installed(self, box: Box) -> None:
        recorder(box.root / "bin", "crontab", f"echo @reboot {box.script}")
        assert box.state().standing is Standing.INSTALLED

    def test_running_supervisor_of_the_script_means_active(self, box: Box) -> None:
        keeper = process(PARENT, 1, "/usr/bin/python3", "keeper.py", str(box.script))
        assert box.state(keeper).standing is Standing.ACTIVE

    def test_unknown_label_and_unused_script_mean_missing(self, box: Box) -> None:
        box.launchctl("exit 113")
        found = box.state()
        assert found.standing is Standing.MISSING
        assert found.detail == f"launchd knows no {LABEL}; nothing runs {box.script}"
        box.script.unlink()
        assert box.state().detail.endswith(f"{box.script} is not there")
        assert box.state(script=str(box.script)).standing is Standing.MISSING

    def test_missing_launchd_domain_means_missing(self, box: Box) -> None:
        box.launchctl('case "$2" in system/*) exit 113;; *) exit 112;; esac')
        assert box.state().standing is Standing.MISSING
        assert [line.split()[2] for line in calls(box.root / "bin")] == [
            f"{domain}/{LABEL}" for domain in ("system", f"gui/{os.getuid()}", f"user/{os.getuid()}")
        ]

    @pytest.mark.parametrize("script", ["exit 64", "exec /bin/sleep 60"], ids=["fails", "hangs"])
    def test_failing_launchctl_means_unknown(self, box: Box, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
        monkeypatch.setattr(managers, "STATUS_TIMEOUT_SECONDS", 0.2)
        box.launchctl(script)
        assert box.state().standing is Standing.UNKNOWN

    @pytest.mark.parametrize("private", ["run/systemd/private", "run/user/systemd/private"])
    def test_unresponsive_systemd_means_unknown(self, box: Box, private: str) -> None:
        box.environ["XDG_RUNTIME_DIR"] = str(box.root / "run/user")
        box.systemctl("echo Failed to connect to bus >&2; exit 1")
        assert box.state(label="mlx").standing is Standing.MISSING, "none runs"
        box.write(f"{private}/x", "")
        assert box.state(label="mlx").standing is Standing.UNKNOWN

    def test_running_script_of_a_disabled_unit_means_active(self, box: Box) -> None:
        box.systemctl("echo LoadState=loaded; echo ActiveState=inactive; echo UnitFileState=disabled")
        assert box.state().standing is Standing.DISABLED
        assert box.state(process(PARENT, 1, "/bin/bash", str(box.script))).standing is Standing.ACTIVE

    def test_unreadable_crontab_means_unknown(self, box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
        (box.root / "var/spool/cron/crontabs").mkdir(parents=True)
        monkeypatch.setattr(os, "access", lambda path, mode: False)
        found = box.state(script=str(box.script))
        assert found.standing is Standing.UNKNOWN and "has no label for it" in found.detail
        assert box.state().standing is Standing.MISSING, "a label is what a service manager knows"


KEEPER = """
import os, subprocess, time
while True:
    subprocess.run(os.environ["JOB"].split(), start_new_session=True, cwd=os.environ["JOB_FOLDER"])
    time.sleep(0.3)
"""
"""A stand-in for launchd's KeepAlive: starts the job in its own session, and restarts it when it ends."""


class TestKeptServer:
    """Runs as this user, as with launchd's UserName. The script ends in `exec` of the server."""

    @pytest.fixture
    def host(self, make_homelab: Callable[..., Homelab]) -> Iterator[QuickHost]:
        quick = QuickHost(make_homelab())
        quick.mlxctl("init").ok()
        self.script = quick.studio.folder / "opt" / "start.sh"
        self.script.parent.mkdir()
        self.script.write_text(f"#!/bin/sh\nexec {quick.by_hand(MODELS[0], quick.ports[0])[:-2]}\n")
        self.script.chmod(0o755)
        quick.lab.configure(boot={"port": quick.ports[0], "script": str(self.script), "label": LABEL})
        yield quick
        quick.studio.sweep()

    @contextmanager
    def kept(self, host: QuickHost, **marks: str) -> Iterator[int]:
        """Start the job under its keeper; return the server's pid."""
        environ = {"JOB": f"/bin/sh {self.script}", "JOB_FOLDER": str(self.script.parent), **marks}
        words = [f"{key}={value}" for key, value in environ.items()]
        with host.running("env", *words, sys.executable, "-c", KEEPER):
            try:
                wait_until(lambda: host.studio.listening(host.ports[0]), WAIT, "the boot job's server")
                yield self.pid(host)
            finally:
                end_keeper(host)

    def pid(self, host: QuickHost) -> int:
        seen = host.process(f"--port {host.ports[0]}")
        assert seen is not None
        return seen.pid

    @pytest.mark.parametrize(
        "marks", [{"XPC_SERVICE_NAME": LABEL}, {"JOB": "bash ./start.sh"}, {}], ids=["marked", "relative", "plain"]
    )
    def test_kept_server_is_the_boot_jobs_and_nothing_stops_it(self, host: QuickHost, marks: dict[str, str]) -> None:
        port = host.ports[0]
        with self.kept(host, **marks) as pid:
            row = host.status()["ports"][0]
            assert (row["owner"], row["state"], row["model"]) == ("boot", "ready", MODELS[0])
            assert host.status()["drift"] == []
            left = host.mlxctl("unload-all", "--yes", "--json").ok().json["hosts"][0]["result"]
            assert not left["changed"] and "left alone" in left["ports"][0]["notes"][0]
            for words in (
                ["unload", str(port), "--force"],
                ["load", MODELS[1], str(port), "--force"],
            ):
                refused = host.mlxctl(*words, "--json")
                error = refused.json["hosts"][0]["error"]
                assert (refused.exit, error["code"]) == (3, "boot_port")
                assert f"launchctl bootout system/{LABEL}" in error["hint"]
            assert self.pid(host) == pid

    def test_kept_server_is_recognised_by_launchds_pid_alone(self, host: QuickHost) -> None:
        port, shown = host.ports[0], host.studio.folder / "pid"
        recorder(
            host.studio.folder / "bin",
            "launchctl",
            f'[ "$2" = gui/{os.getuid()}/{LABEL} ] && exec cat {shown}; exit 113',
        )
        host.studio.env["PATH"] = f"{host.studio.folder / 'bin'}:{os.defpath}"
        host.lab.configure(boot={"port": port, "label": LABEL})
        with self.kept(host) as pid:
            shown.write_text(LAUNCHD_PRINT.replace("PID", str(pid)))
            error = host.mlxctl("unload", str(port), "--force", "--json").json["hosts"][0]["error"]
            assert (
                error["hint"]
                == f"as the operator of the host: launchctl bootout gui/{os.getuid()}/{LABEL}; then try again"
            )
            shown.write_text(LAUNCHD_PRINT.replace("PID", str(PARENT)))
            assert host.status()["ports"][0]["owner"] == "hand", "the job is another process"

    def test_kept_server_keeps_its_port_while_it_is_down(self, host: QuickHost) -> None:
        """Otherwise `load` and `restore` would take the port between two starts, and the job would keep failing."""
        host.edit(MODELS[0], port=host.ports[0])
        with host.running("env", f"JOB={self.script}", sys.executable, "-c", "import time; time.sleep(300)"):
            wait_until(lambda: host.process(f"JOB={self.script}") is None, WAIT, "the keeper")
            row = host.status()["ports"][0]
            assert (row["owner"], row["state"]) == ("boot", "loading")
            restored = host.mlxctl("restore").ok()
            assert restored.stdout.startswith("started nothing; left: ") and str(self.script) in restored.stderr
            refused = host.mlxctl("load", MODELS[0], str(host.ports[0]), "--json")
            assert refused.json["hosts"][0]["error"]["code"] == "boot_port"

    def test_job_that_is_not_installed_reserves_no_port(self, host: QuickHost) -> None:
        host.edit(MODELS[0], port=host.ports[0])
        drift = {each["code"]: each for each in host.status()["drift"]}
        missing = drift["boot_job_missing"]
        assert missing["port"] == host.ports[0] and LABEL in missing["message"] and "hosts.yaml" in missing["hint"]
        done = host.mlxctl("restore").ok()
        assert done.stdout == f"started {MODELS[0]} on {host.ports[0]}\n"
        assert f"the boot job {LABEL} of port {host.ports[0]} is not installed" in done.stderr
        row = host.status()["ports"][0]
        assert (row["owner"], row["state"]) == ("mlxops", "ready")
        host.mlxctl("load", MODELS[1], str(host.ports[0]), "--force").ok()
        host.lab.configure(boot=[])
        assert host.status()["drift"] == []

    def test_hand_started_server_on_its_port_is_not_the_jobs(self, host: QuickHost) -> None:
        with host.running("/bin/sh", "-c", host.by_hand(MODELS[0], host.ports[0])[:-2]):
            wait_until(lambda: host.studio.listening(host.ports[0]), WAIT, "the server")
            assert host.status()["ports"][0]["owner"] == "hand"
            host.mlxctl("unload", str(host.ports[0]), "--force").ok()

    def test_every_server_of_the_jobs_script_belongs_to_the_job(self, host: QuickHost) -> None:
        first, second = host.ports[:2]
        lines = [host.by_hand(MODELS[0], first), host.by_hand(MODELS[1], second), "wait"]
        self.script.write_text("#!/bin/sh\n" + "\n".join(lines) + "\n")
        with host.running("/bin/sh", str(self.script)):
            wait_until(lambda: host.studio.listening(first) and host.studio.listening(second), WAIT, "both servers")
            assert [row["owner"] for row in host.status()["ports"][:2]] == ["boot", "boot"]
            error = host.mlxctl("unload", str(second), "--force", "--json").json["hosts"][0]["error"]
            assert error["message"].endswith(f"which hosts.yaml gives port {first}")
            host.mlxctl("unload-all", "--yes").ok()
            assert host.studio.listening(first) and host.studio.listening(second)


def end_keeper(host: QuickHost) -> None:
    """Kill the keeper first: it would restart the server, which has its own session."""
    while (keeper := host.process("start_new_session")) is not None:
        keeper.kill()
        keeper.wait(WAIT)
    while (server := host.process(f"--port {host.ports[0]}")) is not None:
        server.kill()
        server.wait(WAIT)
