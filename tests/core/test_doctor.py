"""The table of findings, and the judgements of what was observed."""

from __future__ import annotations

import re
import string
from collections.abc import Iterable
from dataclasses import replace

import pytest

from mlxops.core.commands.doctor import DoctorResult, FindingRow, show
from mlxops.core.doctor import host
from mlxops.core.doctor.assumptions import Assumption, Trial, report_text
from mlxops.core.doctor.engines import engine_findings, parse_version
from mlxops.core.doctor.findings import Finding, FindingCode, Level, worst_first
from mlxops.core.doctor.gateway import health_check_findings
from mlxops.core.doctor.host import Disk, Memory, disk_findings, memory_findings, power_findings
from mlxops.core.doctor.incidents import incident
from mlxops.core.replies import HostReply
from tests.lab import macos

GB = 1_000_000_000


def codes(findings: Iterable[Finding]) -> list[str]:
    return [f"{each.code} {each.level}" for each in findings]


@pytest.mark.parametrize("code", FindingCode)
def test_finding_has_a_meaning_and_a_remedy(code: FindingCode) -> None:
    assert re.fullmatch(r"(?:[A-Z]|`|ssh |hosts.yaml )[^\n]{15,160}\.", code.meaning), code.meaning
    fields = {name for _, name, _, _ in string.Formatter().parse(code.remedy) if name}
    finding = Finding.of(code, "message", port=8100, level=None, **dict.fromkeys(fields - {"port"}, "{x}"))
    assert finding.hint == code.remedy.format_map(dict.fromkeys(fields, "{x}") | {"port": 8100})
    assert finding.hint and (finding.level, finding.port) == (code.level, 8100)


@pytest.mark.parametrize("member", [*Level, *Assumption], ids=str)
def test_level_and_assumption_have_a_one_sentence_meaning(member: Level | Assumption) -> None:
    assert re.fullmatch(r"[A-Za-z`][^\n]{15,110}\.", member.meaning), member.meaning


def test_findings_come_worst_first_and_once() -> None:
    info, error = Finding.of(FindingCode.BUDGET_HIGH, "b"), Finding.of(FindingCode.SSH_MISSING, "a")
    unknown = Finding.of(FindingCode.NOT_CHECKED, "c")
    assert worst_first([info, unknown, error, info]) == (error, unknown, info)


# -- disks and memory ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("free", "inodes", "found"),
    [
        (100 * GB, 10_000_000, []),
        (100 * GB, None, []),
        (4 * GB, None, ["disk_low warning"]),
        (GB // 4, None, ["disk_full error"]),
        (100 * GB, 9, ["inodes_low warning"]),
    ],
)
def test_disk_without_room_is_named(free: int, inodes: int | None, found: list[str]) -> None:
    assert codes(disk_findings(Disk("the models", "/models", free, inodes))) == found


CALM = Memory(total=512 * GB, pressure=Level.INFO, swapped=0)


@pytest.mark.parametrize(
    ("memory", "budget", "configured", "found"),
    [
        (CALM, 380 * GB, False, []),
        (Memory(), 380 * GB, True, []),
        (CALM, 600 * GB, True, ["budget_high info"]),
        (CALM, 600 * GB, False, []),
        (replace(CALM, pressure=Level.WARNING), GB, False, ["memory_pressure warning"]),
        (replace(CALM, pressure=Level.ERROR), GB, False, ["memory_pressure error"]),
        (replace(CALM, swapped=60 * GB), GB, False, ["swap_used warning"]),
    ],
)
def test_memory_that_is_short_is_named(memory: Memory, budget: int, configured: bool, found: list[str]) -> None:
    assert codes(memory_findings(memory, budget, configured=configured)) == found


@pytest.mark.parametrize(
    ("macos", "stalled", "level"),
    [
        ("normal", None, Level.INFO),
        ("warning", None, Level.WARNING),
        ("critical", None, Level.ERROR),
        (None, 0.5, Level.INFO),
        (None, 90.0, Level.WARNING),
        (None, None, None),
    ],
)
def test_pressure_has_a_level(macos: str | None, stalled: float | None, level: Level | None) -> None:
    assert host.pressure_level(macos, stalled) is level


@pytest.mark.parametrize(
    ("pmset", "filevault", "unattended", "found"),
    [
        ("", "", True, []),
        (macos.PMSET_SERVER, macos.FILEVAULT_OFF, True, []),
        (macos.PMSET, macos.FILEVAULT_OFF, True, ["no_restart warning", "sleeps warning"]),
        (macos.PMSET_SERVER, macos.FILEVAULT_ON, True, ["filevault warning"]),
        (macos.PMSET_SERVER, macos.FILEVAULT_ON, False, ["filevault info"]),
    ],
)
def test_power_settings_are_read(pmset: str, filevault: str, unattended: bool, found: list[str]) -> None:
    assert codes(power_findings(pmset, filevault, unattended=unattended)) == found


# -- panics and jetsam --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        (macos.panic_report(), FindingCode.PANICKED, "while python3.13 ran"),
        (macos.panic_report("Panicked task: pid 7: python3.13"), FindingCode.PANICKED, "python3.13"),
        (macos.panic_report(macos.WATCHDOG), None, ""),
        (macos.jetsam_report(), FindingCode.KILLED_FOR_MEMORY, "python3.12 (pid 9021)"),
        (macos.jetsam_report("mlx_lm.server"), FindingCode.KILLED_FOR_MEMORY, "mlx_lm.server"),
        (macos.jetsam_report("Photos"), None, ""),
        ('{"bug_type": "309"}\n{"procName": "python3.12"}', None, ""),
    ],
)
def test_report_that_names_a_server_is_a_finding(text: str, code: FindingCode | None, words: str) -> None:
    found = incident("report", text)
    assert (found and found.code) == code and words in (found.message if found else "")


@pytest.mark.parametrize("text", ["", "not a report", "[]\n{}", '{"bug_type": "298"}\nnot', '{"bug_type": "210"}'])
def test_file_that_is_no_report_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        incident("report", text)


# -- engines ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engine", "versions", "found"),
    [
        ("mlx-lm", {"mlx_lm": "0.32.2"}, []),
        ("mlx-lm", {}, []),
        ("mlx-lm", {"mlx_lm": "0.31.3"}, ["engine_runs_code info", "engine_drops_layers info"]),
        ("mlx-lm", {"mlx_lm": "0.30.5"}, []),
        (
            "mlx-openai-server",
            {"mlx_openai_server": "1.8.1", "mlx_lm": "0.31.3", "transformers": "5.2"},
            ["engine_runs_code info", "engine_drops_layers info"],
        ),
        ("mlx-openai-server", {"mlx_openai_server": "1.4.2", "transformers": "5.0.0"}, ["engine_fails error"]),
        ("mlx-openai-server", {"mlx_openai_server": "1.4.2", "transformers": "4.57"}, []),
    ],
)
def test_known_faults_of_a_version_are_named(engine: str, versions: dict[str, str], found: list[str]) -> None:
    assert codes(engine_findings(engine, versions)) == found


@pytest.mark.parametrize(("text", "numbers"), [("0.32.2", (0, 32, 2)), ("1.8.1rc1", (1, 8, 1)), ("x", ())])
def test_version_is_its_numbers(text: str, numbers: tuple[int, ...]) -> None:
    assert parse_version(text) == numbers


# -- the gateway --------------------------------------------------------------------------------------------------


def test_health_checks_that_reach_servers_are_named() -> None:
    assert not list(health_check_findings([], "router.yaml"))
    (found,) = health_check_findings(["b", "a"], "router.yaml")
    assert "of a, b" in found.message and "background_health_checks: false" in found.hint


# -- texts --------------------------------------------------------------------------------------------------------


def test_findings_are_shown_with_their_fix_and_counted() -> None:
    rows = [Finding.of(FindingCode.SLEEPS, "it\nsleeps"), Finding.of(FindingCode.EXPOSED, "open", port=8100)]
    result = DoctorResult(tuple(map(FindingRow.of, rows)), ("power", "exposure"), {"python": "3.12"})
    assert show([HostReply("studio", result)]).split("\n") == [
        "studio: python 3.12",
        "warning: sleeps: it sleeps",
        "  fix: sudo pmset -a sleep 0",
        "warning: exposed: 8100: open",
        f"  fix: {FindingRow.of(rows[1]).hint}",
        "2 checks: 2 warnings",
    ]
    assert show([HostReply("studio", DoctorResult((), ("power",)))]) == "studio\n1 checks: nothing found"


def test_report_has_each_assumption_once() -> None:
    text = report_text({"system": "macOS 26.4"}, [Trial("boot.id", "PASS", "36 characters")], ["info not_agreed"])
    rows = [line.split()[:2] for line in text.splitlines() if re.match(r"PASS|FAIL|UNTRIED", line)]
    assert [row[1] for row in rows] == [each.value for each in Assumption]
    assert ["PASS", "boot.id"] in rows and ["UNTRIED", "demo"] in rows
    assert text.startswith("mlxops doctor --report\n") and text.endswith("findings:\ninfo not_agreed\n")
