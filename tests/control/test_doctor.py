"""`doctor` on a healthy lab and on a broken one: real hosts, files and processes."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlxops.common.build import build_id
from mlxops.control.client import HostTarget
from mlxops.control.doctor import command, connection, node
from mlxops.control.doctor.command import Answer
from mlxops.control.output import Console
from mlxops.core.commands.doctor import CONTROL_NODE, Doctor, DoctorResult
from mlxops.core.doctor.findings import Finding, FindingCode, Level
from mlxops.core.errors import AgentProblem, Bug, MlxopsError, Refused, Unreachable
from mlxops.core.replies import HostReply
from mlxops.core.settings import Settings
from tests.lab import macos, models
from tests.lab.homelab import Completed, Homelab, Studio
from tests.lab.run import running
from tests.lab.world import free_port, wait_until
from tests.steps import REPO, Ask, register, tree

SECRET = "sk-not-to-be-shown"
ROUTER = """\
model_list:
  - model_name: jerry-xl
    litellm_params: {{model: openai/jerry-xl, api_base: "http://{address}:{port}/v1", api_key: os.environ/KEY}}
  - model_name: jerry-l
    litellm_params: {{model: openai/other, api_base: "http://{address}:{next}/v1", api_key: os.environ/KEY}}
general_settings: {{background_health_checks: true, master_key: os.environ/KEY}}
"""
HEALTHY = """\
model_list:
  - model_name: jerry-xl
    litellm_params: {{model: openai/jerry-xl, api_base: "http://{address}:{port}/v1", api_key: os.environ/KEY}}
router_settings: {{num_retries: 60, retry_after: 1, disable_cooldowns: true}}
"""

pytestmark = pytest.mark.xdist_group("doctor")  # both modules count the servers of the whole machine


def found(answer: Completed) -> dict[str, list[Any]]:
    """The findings of each host of a JSON document."""
    return {host["host"]: host.get("findings", []) for host in answer.json["hosts"]}


def codes(rows: list[Any]) -> set[str]:
    return {row["code"] for row in rows}


def own(rows: list[Any]) -> list[Any]:
    """The findings without those that servers of other tests cause, which run at the same time."""
    return [row for row in rows if row["code"] not in {"unbounded_servers", "limits_over_budget"}]


def test_healthy_lab_has_nothing_above_info_and_is_left_as_it_was(homelab: Homelab) -> None:
    homelab.studio.install(REPO, models.QWEN)
    ask = Ask(homelab, "ssh")
    ask("load", "--model", REPO, "--port", ask.port).ok()
    folder = homelab.mini.home
    (folder / "router.yaml").write_text(HEALTHY.format(address=homelab.studio.address, port=ask.port))
    (folder / "env").write_text(f"KEY={SECRET}\n")
    homelab.configure_gateway(config=str(folder / "router.yaml"), env=str(folder / "env"), key_env="KEY")
    before = tree(homelab.studio.folder)
    answer = homelab.mini.mlxctl("doctor", "--strict", "--json").ok()
    assert tree(homelab.studio.folder) == before
    findings = found(answer)
    assert list(findings) == [CONTROL_NODE, "studio"]
    assert {row["severity"] for rows in findings.values() for row in own(rows)} <= {"info"}, findings
    (_, studio) = answer.json["hosts"]
    assert studio["reachable"] and studio["error"] is None and studio["facts"]["mlx-lm"].startswith("0.")
    assert "gateway" in answer.json["hosts"][0]["checks"] and SECRET not in answer.stdout + answer.stderr
    assert {"engines", "ports", "memory", "boot", "power", "panics and jetsam", "ssh options"} <= set(studio["checks"])
    assert homelab.studio.mlxctl("doctor", "--strict").ok().stdout.startswith("control node: mlxops ")
    assert "0 errors" not in homelab.mini.inv("doctor", "--host", "studio").ok().stdout


# -- twenty faults at once ----------------------------------------------------------------------------------------

WRAPPER = """\
import runpy, sys, time
real = time.time
time.time = lambda: real() - 3600
sys.argv = ["mlxops.agent"]
runpy.run_module("mlxops.agent", run_name="__main__", alter_sys=True)
"""
EXPOSED = """\
import http.server, sys
class Models(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(b'{"data": []}')
    def log_message(self, *words): pass
http.server.HTTPServer(("0.0.0.0", int(sys.argv[1])), Models).serve_forever()
"""


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def break_the_host(studio: Studio) -> dict[str, object]:
    """Break everything that the agent can see. Return the changes of its entry in hosts.yaml."""
    programs = studio.folder / "programs"
    script(programs / "pmset", f"#!/bin/sh\ncat <<'END'\n{macos.PMSET}END\n")
    script(programs / "fdesetup", f"#!/bin/sh\necho '{macos.FILEVAULT_ON.strip()}'\n")
    script(programs / "systemctl", "#!/bin/sh\necho disabled\nexit 1\n")
    register(studio, "other", engine="mlx-openai-server", port=studio.ports[2])
    blobs = studio.hub / "models--tiny-org--half" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "abc.0123abcd.incomplete").write_bytes(b"half")
    for path in (blobs / "abc.0123abcd.incomplete", blobs):
        os.utime(path, macos.long_ago())
    reports = studio.home / "Library" / "Logs" / "DiagnosticReports"
    reports.mkdir(parents=True)
    (reports / "panic-full-2026-11-25-094312.0002.panic").write_text(macos.panic_report())
    (reports / "JetsamEvent-2026-11-25-220357.ips").write_text(macos.jetsam_report())
    (reports / "JetsamEvent-2026-11-25-230000.ips").write_text("cut off")
    unit = studio.home / ".config" / "systemd" / "user" / "mlxops-restore.service"
    unit.parent.mkdir(parents=True)
    unit.write_text('[Service]\nExecStart="/gone/venv/bin/python" "-P" "-m" "mlxops.agent"\n')
    studio.state.chmod(0o755)
    engine = studio.folder / "engine"
    script(engine / "bin" / "mlx_lm.server", "#!/bin/sh\n")
    (engine / "lib" / "python3.11" / "site-packages" / "mlx_lm-0.31.3.dist-info").mkdir(parents=True)
    wrapper = studio.folder / "wrapper.py"
    wrapper.write_text(WRAPPER)
    return {
        "python": [str(script(studio.folder / "late", f'#!/bin/sh\nexec {sys.executable} -P {wrapper} "$@"\n'))],
        "launch": {"mlx-lm": [str(engine / "bin" / "mlx_lm.server")]},
        "env": {"MLX_METAL_FAST_SYNCH": "1"},
        "slots": {studio.ports[0]: "jerry-xl", studio.ports[1]: "jerry-l"},
    }


def break_the_gateway(lab: Homelab) -> None:
    studio, folder = lab.studio, lab.mini.home
    text = ROUTER.format(address=studio.address, port=studio.ports[0], next=studio.ports[1])
    (folder / "router.yaml").write_text(text)
    (folder / "env").write_text(f"KEY={SECRET}\n")
    lab.configure_gateway(
        config=str(folder / "router.yaml"),
        env=str(folder / "env"),
        url=f"http://127.0.0.1:{free_port('127.0.0.1')}",
        key_env="NO_SUCH_KEY",
    )


@contextmanager
def exposed_server(studio: Studio, port: int) -> Iterator[None]:
    with running([sys.executable, "-I", "-c", EXPOSED, str(port)], studio.home, studio.environment):
        wait_until(lambda: studio.listening(port), 10, "the exposed server")
        yield


@pytest.fixture
def broken_lab(make_homelab: Callable[..., Homelab]) -> Iterator[Homelab]:
    lab: Homelab = make_homelab(studios=3)
    lab.studio.sshd.env["PATH"] = f"{lab.studio.folder}/programs:{os.defpath}"
    lab.studio.sshd.stop()
    lab.studio.sshd.start()
    lab.mini.mlxctl("init").ok()  # agrees on the settings
    lab.configure("studio", **break_the_host(lab.studio))
    break_the_gateway(lab)
    lab.studios[1].sshd.stop()
    lab.studios[2].sshd.rekey()
    config = lab.mini.ssh.config
    config.write_text(config.read_text().replace("Host studio\n", "Host studio\n  StrictHostKeyChecking accept-new\n"))
    (lab.mini.home / ".config" / "mlxops" / "hosts.yaml").chmod(0o666)
    with exposed_server(lab.studio, lab.studio.ports[3]):
        yield lab


WRONG = {
    CONTROL_NODE: {
        "hosts_file_writable": "chmod go-w ",
        "gateway_down": "start it",
        "gateway_key_missing": "set NO_SUCH_KEY",
        "gateway_fault": "model: openai/jerry-l",
        "gateway_doubt": "inv gateway --host studio2 --print",
        "gateway_health_checks": "background_health_checks: false",
        "gateway_retries": "InternalServerErrorRetries: 11",
    },
    "studio": {
        "settings_differ": "mlxctl deploy",
        "engine_missing": "install it there",
        "engine_runs_code": "update it",
        "engine_drops_layers": "mlx-lm 0.32.2",
        "metal_fast_synch": "take it out",
        "state_open": "chmod 700 ",
        "cache_litter": "mlxctl pull --repo tiny-org/half",
        "cache_incomplete": "rm -r ",
        "budget_high": "leave `memory` out",
        "panicked": "update macOS",
        "killed_for_memory": "mlxctl list --memory",
        "not_checked": "if its time is that of a crash",
        "restore_job_broken": "mlxctl boot --install",
        "restore_job_off": "mlxctl boot --install",
        "no_lingering": "sudo loginctl enable-linger ",
        "filevault": "sudo fdesetup authrestart",
        "no_restart": "sudo pmset -a autorestart 1",
        "sleeps": "sudo pmset -a sleep 0",
        "drift": "mlxctl ",
        "exposed": "exposure: accepted",
        "clock_differs": "timedatectl set-ntp true",
        "ssh_option_ignored": "accept it once with ssh",
    },
    "studio2": {"host_unreachable": "sshd"},
    "studio3": {"host_key_changed": "ssh-keygen"},
}
"""Host -> finding -> what its fix says."""


def test_broken_lab_has_each_fault_named_with_its_fix(broken_lab: Homelab) -> None:
    before = tree(broken_lab.studio.folder)
    answer = broken_lab.mini.mlxctl("doctor", "--json")
    assert answer.exit == 5, str(answer)  # two hosts cannot be reached
    assert tree(broken_lab.studio.folder) == before
    findings = found(answer)
    assert {host: codes(own(rows)) for host, rows in findings.items()} == {
        host: set(wrong) for host, wrong in WRONG.items()
    }
    for host, wrong in WRONG.items():
        for code, fix in wrong.items():
            hints = [row["hint"] for row in findings[host] if row["code"] == code]
            assert any(fix in hint for hint in hints), (host, code, hints)
    commands = [word for row in findings["studio"] for word in row.get("commands", [])]
    assert ["mlxctl", "boot", "--install"] in commands
    assert SECRET not in answer.stdout + answer.stderr
    text = broken_lab.mini.mlxctl("doctor")
    assert SECRET not in text.stdout + text.stderr
    assert f"error: host_key_changed: studio3 ({broken_lab.studios[2].address}" in text.stdout
    strict = broken_lab.mini.mlxctl("doctor", "--strict", "--host", "studio", "--json")
    assert strict.exit == 3 and strict.json["hosts"][1]["error"]["code"] == "doctor_errors"
    broken_lab.configure(exposure="accepted")
    assert "exposed" not in codes(found(broken_lab.mini.mlxctl("doctor", "--host", "studio", "--json"))["studio"])


def test_unusable_hosts_file_is_a_finding(homelab: Homelab) -> None:
    path = homelab.mini.home / ".config" / "mlxops" / "hosts.yaml"
    path.write_text("hosts: {studio: {slotz: {}}}\n")
    answer = homelab.mini.mlxctl("doctor", "--json").ok()
    (row,) = [row for row in found(answer)[CONTROL_NODE] if row["severity"] == "error"]
    assert row["code"] == "hosts_file_bad" and "hosts.yaml:1" in row["message"]
    assert homelab.mini.mlxctl("doctor", "--strict").exit == 3
    report = homelab.mini.mlxctl("doctor", "--report", str(homelab.mini.home / "report"))
    assert report.exit == 3 and "hosts_file_bad" in report.stdout and "was not written" in report.stderr


def test_gateway_on_another_machine_is_no_fault(homelab: Homelab) -> None:
    url = f"http://127.0.0.1:{free_port('127.0.0.1')}"
    homelab.configure_gateway(config="/no/such/router.yaml", url=url)
    (row,) = found(homelab.mini.mlxctl("doctor", "--json").ok())[CONTROL_NODE]
    assert (row["code"], row["severity"]) == ("gateway_absent", "info")
    homelab.configure_gateway(url=url)
    (row,) = found(homelab.mini.mlxctl("doctor", "--json").ok())[CONTROL_NODE]
    assert (row["code"], row["severity"]) == ("gateway_down", "error")


def test_host_without_agent_is_a_finding(homelab: Homelab) -> None:
    homelab.configure(python=["/no/such/python"])
    answer = homelab.mini.mlxctl("doctor", "--json").ok()
    (row,) = found(answer)["studio"]
    assert (row["code"], row["severity"], row["hint"]) == ("agent_missing", "error", "install it: mlxctl deploy")


# -- both sides compared ------------------------------------------------------------------------------------------

TARGET = HostTarget("studio", None, (), Settings(), flags=" --host studio")
RESULT = DoctorResult((), ("ports",), {}, build_id(), 1000.0)


def judged(
    result: DoctorResult | None = RESULT, error: MlxopsError | None = None, asked: float = 999.0
) -> HostReply[DoctorResult]:
    answer = Answer(HostReply("studio", result, error), asked, asked + 2)
    return command._host_reply(TARGET, answer, [])


@pytest.mark.parametrize(
    ("reply", "code", "exits"),
    [
        (judged(replace(RESULT, build="0.1.0+old")), FindingCode.AGENT_DIFFERS, None),
        (judged(replace(RESULT, clock=1100.0)), FindingCode.CLOCK_DIFFERS, None),
        (judged(replace(RESULT, clock=900.0)), FindingCode.CLOCK_DIFFERS, None),
        (judged(None, Bug("unknown_command", "no command 'doctor'")), FindingCode.AGENT_DIFFERS, None),
        (judged(None, AgentProblem("protocol_mismatch", "not understood")), FindingCode.AGENT_FAILED, None),
        (judged(None, Refused("no_home", "HOME is not set")), FindingCode.AGENT_FAILED, None),
        (judged(None, Unreachable("host_locked", "locked")), FindingCode.HOST_LOCKED, 5),
        (judged(None, Unreachable("authentication_failed", "refused")), FindingCode.LOGIN_REFUSED, 5),
        (judged(None, Bug("bug", "mlxops failed")), FindingCode.AGENT_FAILED, 1),
    ],
)
def test_what_the_control_node_sees_is_a_finding(
    reply: HostReply[DoctorResult], code: FindingCode, exits: int | None
) -> None:
    assert reply.result is not None
    assert [row.code for row in reply.result.findings] == [code.value]
    assert all("--host" in command for row in reply.result.findings for command in row.commands)
    assert (reply.error and int(reply.error.exit)) == exits


def test_host_that_does_not_answer_has_no_build_and_no_clock() -> None:
    for reply in (judged(None, Unreachable("host_unreachable", "away")), command._host_reply(TARGET, OSError(), [])):
        assert reply.result and (reply.result.build, reply.result.clock) == ("", None)


def test_agreeing_clocks_and_builds_are_no_finding() -> None:
    assert judged().result == replace(RESULT, checks=("connection", "ports"))


def test_check_that_fails_is_unknown_with_its_reason() -> None:
    ours = Finding.of(FindingCode.SSH_OPTION_IGNORED, "Tunnel is set", instead="mlxops opens no tunnel")
    reply = command._host_reply(TARGET, TimeoutError("it took longer than 60 s"), [ours])
    assert reply.result is not None and reply.error is None
    row, other = reply.result.findings
    assert (row.code, row.severity) == ("not_checked", Level.UNKNOWN) and "longer than 60 s" in row.message
    assert other.code == "ssh_option_ignored"
    own = command._own_reply(TimeoutError("it took longer than 60 s"))
    assert own.result is not None and [row.code for row in own.result.findings] == ["not_checked"]


def test_host_that_takes_long_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "LONG_SECONDS", 0.01)
    stream = io.StringIO()
    other = replace(TARGET, name="studio2")
    with command._naming_late(Console(many=True, stream=stream), [TARGET, other], 60) as answered:
        answered("studio")
        wait_until(stream.getvalue, 10, "the note")
    assert stream.getvalue() == "waiting for studio2, at most 60 s\n"


@pytest.mark.parametrize(
    ("requirement", "installed", "problem"),
    [
        ("fabric>=3.2.3,<4", "3.2.3", ""),
        ("fabric>=3.2.3,<4", "3.2.2", "fabric is 3.2.2, and mlxops needs >=3.2.3,<4"),
        ("fabric>=3.2.3,<4", "4.0", "fabric is 4.0, and mlxops needs >=3.2.3,<4"),
        ("rich", None, "rich is not installed"),
        ("rich", "15.0.0", ""),
    ],
)
def test_library_of_another_version_is_named(requirement: str, installed: str | None, problem: str) -> None:
    assert node.library_problem(requirement, lambda name: installed) == problem


@pytest.mark.parametrize(
    ("requirement", "needed"),
    [
        ("rich", True),
        (f"psutil>=6; sys_platform == '{sys.platform}'", True),
        ("psutil>=6; sys_platform == 'another'", False),
        ('pytest; extra == "dev"', False),
    ],
)
def test_library_of_another_system_is_not_needed(requirement: str, needed: bool) -> None:
    assert node._is_for_this_system(requirement) is needed


def test_options_that_ssh_itself_sets_are_not_named(homelab: Homelab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", homelab.mini.env["PATH"])
    assert connection.option_findings("studio") == []


def test_request_travels_without_its_local_options() -> None:
    assert json.loads(json.dumps(Doctor(strict=True, report="file").checked().trials)) is False
