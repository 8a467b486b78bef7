"""`mlxctl serve` with a real host: what it sees, a host that is away, hosts.yaml, and its end."""

from __future__ import annotations

import re
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

from tests.control.test_watch import Reader, gone, one_agent
from tests.lab.run import running, script
from tests.lab.wired import wired
from tests.lab.world import wait_until
from tests.steps import Ask, register

SOON = 20.0
"""Seconds that an expected change may take on a busy machine."""
ENDS_WITHIN = 2.0


class Serve:
    """A running `mlxctl serve` on the Mini."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        self.process = process
        self.reader = Reader(process.stderr.fileno())
        self.reader.until("^metrics: http")
        (self.url,) = re.findall(r"^metrics: (\S+)", self.reader.text, re.MULTILINE)

    def scrape(self) -> dict[str, float]:
        with urllib.request.urlopen(self.url, timeout=5) as answer:
            lines = answer.read().decode().splitlines()
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}

    def shows(self, series: str, value: float) -> None:
        wait_until(lambda: self.scrape().get(series) == value, SOON, f"{series} {value}")

    def ends(self, number: signal.Signals) -> int:
        """Send a signal and return the exit status. It must end in time."""
        began = time.monotonic()
        self.process.send_signal(number)
        status = self.process.wait(SOON)
        assert time.monotonic() - began < ENDS_WITHIN
        assert "Traceback" not in self.reader.read()
        return status


@contextmanager
def serving(ask: Ask, *flags: str) -> Iterator[Serve]:
    argv = [script("mlxctl"), "serve", "--address", "127.0.0.1:0", *flags]
    with running(argv, ask.lab.mini.elsewhere, ask.lab.mini.env) as process:
        yield Serve(process)


def test_changes_of_a_host_are_counted(remote: Ask) -> None:
    register(remote.studio, "mine")
    port = f'host="studio",port="{remote.port}"'
    with serving(remote, "--interval", "1") as serve:
        serve.shows(f'mlxops_port_state{{{port},state="idle"}}', 1)
        remote("load", "--model", "mine", "--port", remote.port).ok()
        serve.shows(f'mlxops_port_state{{{port},state="ready"}}', 1)
        found = serve.scrape()
        assert found[f"mlxops_loads_total{{{port}}}"] == 1 and found[f"mlxops_swaps_total{{{port}}}"] == 0
        assert found['mlxops_operations_total{host="studio",outcome="done"}'] == 1
        assert found[f"mlxops_port_memory_bytes{{{port}}}"] > 0
        assert [each for each in found if each.startswith("mlxops_port_info") and 'model="mine"' in each]
        remote("unload", "--port", remote.port).ok()
        serve.shows(f"mlxops_unloads_total{{{port}}}", 1)
        assert serve.ends(signal.SIGTERM) == 0
    gone(remote.studio)


def test_scrape_touches_no_host(remote: Ask) -> None:
    with wired(remote.lab) as wire, serving(remote, "--interval", "600") as serve:
        serve.shows('mlxops_host_up{host="studio"}', 1)
        agent, passed = one_agent(remote.studio), wire.passed
        for _ in range(20):
            assert serve.scrape()['mlxops_looks_total{host="studio"}'] == 1
        assert (wire.passed, wire.accepted) == (passed, 1) and one_agent(remote.studio) == agent
        assert serve.ends(signal.SIGINT) == 0
    gone(remote.studio)


def test_host_that_is_away_is_looked_for_again(remote: Ask) -> None:
    with serving(remote, "--interval", "1") as serve:
        serve.shows('mlxops_host_up{host="studio"}', 1)
        remote.studio.sshd.stop()
        serve.shows('mlxops_host_up{host="studio"}', 0)
        serve.shows('mlxops_host_error_info{code="connection_refused",host="studio"}', 1)
        away = serve.scrape()
        assert not [each for each in away if each.startswith("mlxops_port_")]
        assert 'mlxops_host_last_contact_timestamp_seconds{host="studio"}' in away
        remote.studio.sshd.start()
        serve.shows('mlxops_host_up{host="studio"}', 1)
        remote.studio.sshd.stop()
        serve.shows('mlxops_host_up{host="studio"}', 0)
        assert serve.ends(signal.SIGTERM) == 0
        assert re.search(r"Z studio away: connection_\w+: .*\n(.*\n)*\S+Z studio up\n", serve.reader.text)
    gone(remote.studio)


def test_edited_hosts_file_is_read_again(remote: Ask) -> None:
    path = remote.lab.mini.home / ".config" / "mlxops" / "hosts.yaml"
    before = path.read_text(encoding="utf-8")
    with serving(remote, "--interval", "1") as serve:
        serve.shows('mlxops_host_up{host="studio"}', 1)
        path.write_text("hosts: {studio: {nonsense: 1}}\n", encoding="utf-8")
        serve.shows("mlxops_hosts_file_valid", 0)
        assert serve.scrape()['mlxops_host_up{host="studio"}'] == 1, "the hosts stay as they were"
        path.write_text(before + "\n", encoding="utf-8")
        serve.shows("mlxops_hosts_file_valid", 1)
        path.write_text(before.replace("studio:", "renamed:").replace("default: studio", "default: renamed"))
        wait_until(lambda: 'mlxops_looks_total{host="renamed"}' in serve.scrape(), SOON, "the new host")
        assert 'mlxops_host_up{host="studio"}' not in serve.scrape()
        assert serve.ends(signal.SIGTERM) == 0
    gone(remote.studio)
