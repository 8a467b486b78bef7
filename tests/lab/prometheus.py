"""Prometheus and its promtool, from Debian's package. It is unpacked, not installed: no service starts."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.lab.cache import BuildFailed, built, run
from tests.lab.run import running
from tests.lab.world import wait_until

START = 30.0
"""Seconds; on a quiet machine it takes one."""


def program(name: str) -> str | None:
    """Return `prometheus` or `promtool`: the one on the PATH, else that of the package; None if there is neither."""
    found = shutil.which(name)
    if found or not shutil.which("apt-get"):
        return found
    try:
        return str(built("prometheus", "debian", _unpack) / "usr" / "bin" / name)
    except BuildFailed:
        return None


def _unpack(folder: Path) -> None:
    folder.mkdir()
    steps = 'cd "$0" && apt-get -q download prometheus && dpkg-deb -x prometheus_*.deb . && rm -- *.deb'
    run(["sh", "-c", steps, str(folder)])


def promtool(tool: str, *words: str, stdin: bytes = b"") -> str:
    """Run promtool, which must succeed, and return what it says."""
    done = subprocess.run([tool, *words], input=stdin, capture_output=True, timeout=60, check=False)
    said = (done.stdout + done.stderr).decode()
    assert done.returncode == 0, said
    return said


class Prometheus:
    def __init__(self, url: str) -> None:
        self._url = url

    def api(self, path: str, **query: str) -> Any:
        url = f"{self._url}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)["data"]

    def value(self, expression: str) -> float | None:
        """Return the value of an expression; None if it has no series."""
        found = self.api("query", query=expression)["result"]
        return float(found[0]["value"][1]) if found else None


@contextmanager
def prometheus(binary: str, folder: Path, scrape: dict[str, object], rules: Path) -> Iterator[Prometheus]:
    """Run Prometheus with one job and a file of rules, on a port that the system chose. JSON is YAML, too."""
    config = {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(rules)],
        "scrape_configs": [scrape],
    }
    (folder / "prometheus.yml").write_text(json.dumps(config), encoding="utf-8")
    log = folder / "prometheus.log"
    argv = [binary, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    with (
        log.open("w") as out,
        running(
            [*argv, "--web.listen-address=127.0.0.1:0"],
            folder,
            {"HOME": str(folder)},
            stdout=out.fileno(),
            stderr=out.fileno(),
        ),
    ):
        (port, *_) = wait_until(
            lambda: re.findall(r"Listening on.*address=127\.0\.0\.1:([0-9]+)", log.read_text()), START, "its port"
        )
        yield Prometheus(f"http://127.0.0.1:{port}")
