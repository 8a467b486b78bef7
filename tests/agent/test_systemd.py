"""The unit under a real systemd: a manager of its own, in namespaces of its own, where this user may make them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.lab import cache, models
from tests.lab.homelab import script
from tests.lab.ports import free_port
from tests.lab.sshd import missing

SYSTEMD = Path("/lib/systemd/systemd")
NAMESPACES = ("unshare", "--mount", "--cgroup", "--pid", "--fork", "--mount-proc", "--kill-child")
BODY = """
set -u
mount -t tmpfs run /run && mkdir -p /run/systemd/system  # what systemd takes for a booted system
mount -t cgroup2 cgroup /sys/fs/cgroup
GROUP=/sys/fs/cgroup/mlxops-test-$1; mkdir "$GROUP" && echo $$ >"$GROUP/cgroup.procs"
"$SYSTEMD" --user </dev/null >"$HOME/systemd.log" 2>&1 &
MANAGER=$!
for try in $(seq 100); do systemctl --user is-system-running >/dev/null 2>&1 && break; sleep 0.1; done
pid() { sed -n 's/.*"pid": \\([0-9]*\\),.*/\\1/p' "$HOME/.mlxops/run/$PORT.json"; }
"$MLXCTL" load org/model "$PORT" --local >&2 && FIRST=$(pid)
"$MLXCTL" boot --every 5 --local >&2
echo "timer $(systemctl --user is-active mlxops-restore.timer)"
kill -9 "$FIRST"
systemctl --user start mlxops-restore.service && echo "service $(systemctl --user is-active mlxops-restore.service)"
kill -0 "$(pid)" && [ "$(pid)" != "$FIRST" ] && echo "another server"
"$MLXCTL" status --local | sed -n 's/^[0-9]* *jerry *\\([a-z]*\\).*/status \\1/p'
"$MLXCTL" boot --remove --local >&2
systemctl --user list-unit-files | grep -c mlxops
kill $MANAGER; wait $MANAGER
"$MLXCTL" unload "$PORT" --local >&2 && echo unloaded
echo $$ >/sys/fs/cgroup/cgroup.procs; find "$GROUP" -depth -type d -exec rmdir {} +
"""


def may_make_namespaces() -> bool:
    mounts = "mount -t tmpfs run /run && mount -t cgroup2 cgroup /sys/fs/cgroup"
    tried = f"{mounts} && mkdir /sys/fs/cgroup/mlxops-test-$1 && rmdir /sys/fs/cgroup/mlxops-test-$1"
    argv = [*NAMESPACES, "sh", "-c", tried, "sh", str(os.getpid())]
    return subprocess.run(argv, capture_output=True, check=False).returncode == 0


def test_restores_a_server_that_outlives_the_service(tmp_path: Path, tiny_models: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("systemd is Linux's")
    if not SYSTEMD.exists():
        missing("systemd (Debian and Ubuntu: apt-get install systemd)")
    if shutil.which("unshare") is None or not may_make_namespaces():
        pytest.skip("this user may not make mount and cgroup namespaces")
    home, port = tmp_path / "home", free_port()
    models.install_snapshot(home / "hub", "org/model", tiny_models / models.QWEN)
    hosts = home / ".config" / "mlxops" / "hosts.yaml"
    hosts.parent.mkdir(parents=True)
    studio = {
        "ssh": "studio",
        "hub": str(home / "hub"),
        "engine": "mlx-lm",
        "launch": {"mlx-lm": [str(cache.engine_venv("mlx-lm") / "bin" / "mlx_lm.server")]},
        "ports": f"{port}-{port}",
        "slots": {port: "jerry"},
    }
    hosts.write_text(yaml.safe_dump({"default": "studio", "hosts": {"studio": studio}}))
    (home / "run").mkdir(mode=0o700)
    done = subprocess.run(
        [*NAMESPACES, "sh", "-c", BODY, "sh", str(os.getpid())],
        env={
            "PATH": "/usr/bin:/bin:/usr/sbin:/sbin",
            "HOME": str(home),
            "XDG_RUNTIME_DIR": str(home / "run"),
            "SYSTEMD": str(SYSTEMD),
            "MLXCTL": script("mlxctl"),
            "PORT": str(port),
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout.splitlines() == [
        "timer active",
        "service inactive",
        "another server",
        "status ready",
        "0",
        "unloaded",
    ], done.stdout + done.stderr + (home / "systemd.log").read_text()
