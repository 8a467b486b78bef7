"""The metrics, the alert rules and the dashboard, by the programs of Prometheus."""

from __future__ import annotations

import json
import re
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mlxops.control.serve.command import packaged
from mlxops.core.commands.serve import FILES
from mlxops.core.metrics import FAMILIES
from tests.lab.prometheus import program, prometheus, promtool
from tests.lab.run import run, running, script
from tests.lab.world import wait_until

RULE_TESTS = Path(__file__).with_name("alerts_test.yml")
OURS = {family.name for family in FAMILIES} | {"up"}
TOKEN = "0123456789abcdef0123456789abcdef"


def needed(name: str) -> str:
    found = program(name)
    if found is None:
        pytest.skip(f"there is no {name}, and Debian's package prometheus could not be downloaded")
    return found


@contextmanager
def serving(folder: Path, *flags: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Run `mlxctl serve` for this machine, without models. Yield the URL of its metrics."""
    (folder / "hub").mkdir()
    (folder / "hub" / "registry.json").write_text('{"version": 1, "models": {}}', encoding="utf-8")
    entry = f"{{hub: {folder}/hub, state: {folder}/state}}"
    (folder / "hosts.yaml").write_text(f"hosts: {{here: {entry}}}\n", encoding="utf-8")
    env = {"HOME": str(folder), "PATH": "/usr/bin:/bin", "MLXOPS_HOSTS_FILE": str(folder / "hosts.yaml")}
    argv = [script("mlxctl"), "serve", "--local", "--interval", "1", "--address", "127.0.0.1:0", *flags]
    with running(argv, folder, env) as process:
        assert process.stderr is not None
        yield process.stderr.readline().split()[1], process


def test_packaged_files_are_printed(tmp_path: Path) -> None:
    with serving(tmp_path) as (url, _):
        for name in FILES:
            assert asked(tmp_path, "--print", name) == (0, packaged(name), "")
        status, _, error = asked(tmp_path, "--address", url.split("/")[2])
    assert status == 3 and "cannot be listened on" in error and "Traceback" not in error


def asked(folder: Path, *flags: str) -> tuple[int, str, str]:
    """Run `mlxctl serve` with flags with which it ends."""
    env = {"HOME": str(folder), "PATH": "/usr/bin:/bin", "MLXOPS_HOSTS_FILE": str(folder / "hosts.yaml")}
    done = run([script("mlxctl"), "serve", "--local", *flags], folder, env)
    return done.exit, done.stdout, done.stderr


def test_metrics_are_clean(tmp_path: Path) -> None:
    tool = needed("promtool")
    with serving(tmp_path) as (url, process):
        assert process.stderr is not None and process.stderr.readline().endswith("here up\n")
        with urllib.request.urlopen(url, timeout=10) as answer:
            page = answer.read()
    assert b'mlxops_host_up{host="here"} 1.0' in page
    assert promtool(tool, "check", "metrics", stdin=page) == ""


def test_prometheus_scrapes_with_the_token_and_takes_the_rules(tmp_path: Path) -> None:
    binary = needed("prometheus")
    token = tmp_path / "token"
    token.touch(0o600)
    token.write_text(TOKEN, encoding="utf-8")
    rules = tmp_path / "alerts.yml"
    rules.write_text(packaged("alerts"), encoding="utf-8")
    with serving(tmp_path, "--token-file", str(token)) as (url, _):
        address = url.split("/")[2]
        job: dict[str, object] = {
            "job_name": "mlxops",
            "authorization": {"credentials_file": str(token)},
            "static_configs": [{"targets": [address]}],
        }
        with prometheus(binary, tmp_path, job, rules) as server:
            wait_until(lambda: server.value('mlxops_host_up{host="here"}') == 1, 30.0, "a scrape")
            assert server.value("up") == 1
            assert server.value("count(mlxops_port_state == 1)") == 10
            assert server.value('ALERTS{alertstate="firing"}') is None
            (group,) = server.api("rules")["groups"]
    assert {rule["health"] for rule in group["rules"]} <= {"ok", "unknown"}


def test_alert_rules_hold(tmp_path: Path) -> None:
    tool = needed("promtool")
    (tmp_path / "alerts.yml").write_text(packaged("alerts"), encoding="utf-8")
    (tmp_path / "alerts_test.yml").write_bytes(RULE_TESTS.read_bytes())
    assert "SUCCESS" in promtool(tool, "check", "rules", str(tmp_path / "alerts.yml"))
    assert "SUCCESS" in promtool(tool, "test", "rules", str(tmp_path / "alerts_test.yml"))


def test_each_alert_has_a_case() -> None:
    alerts = set(re.findall(r"alert: (\w+)", packaged("alerts")))
    assert alerts and alerts == set(re.findall(r"alertname: (\w+)", RULE_TESTS.read_text(encoding="utf-8")))


@pytest.mark.parametrize("name", ["alerts", "dashboard"])
def test_packaged_file_names_only_metrics_that_exist(name: str) -> None:
    named = set(re.findall(r"\bmlxops_[a-z_]+", packaged(name)))
    assert named and named <= OURS


def test_dashboard_is_complete() -> None:
    dashboard = json.loads(packaged("dashboard"))
    panels: list[Any] = dashboard["panels"]
    assert dashboard["uid"] and len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["title"] and panel["targets"], panel
        assert all(target["expr"] and target["refId"] for target in panel["targets"])
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
