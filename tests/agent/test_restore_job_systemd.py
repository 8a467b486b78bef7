"""The unit under a real systemd: a private user manager in private namespaces, if this user may create them."""

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
MANAGER = """
set -u
mount -t tmpfs run /run && mkdir -p /run/systemd/system  # systemd takes this for a booted system
mount -t cgroup2 cgroup /sys/fs/cgroup
GROUP=/sys/fs/cgroup/mlxops-test-$1; mkdir "$GROUP" && echo $$ >"$GROUP/cgroup.procs"
"$SYSTEMD" --user </dev/null >"$HOME/systemd.log" 2>&1 &
MANAGER=$!
for try in $(seq 100); do systemctl --user is-system-running >/dev/null 2>&1 && break; sleep 0.1; done
"""
RESTORE = """
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
"$MLXCTL" unload "$PORT" --local >&2 && echo unloaded
"""
KEEP = """
pid() { sed -n 's/.*"pid": \\([0-9]*\\),.*/\\1/p' "$HOME/.mlxops/run/$PORT.json"; }
main() { systemctl --user show -p MainPID --value mlxops-restore.service; }
"$MLXCTL" load org/model "$PORT" --local >&2 && FIRST=$(pid)
"$MLXCTL" boot --every 5 --local >&2 && "$MLXCTL" boot --install --keep --local >&2
echo "timer $(systemctl --user is-active mlxops-restore.timer), service $(systemctl --user is-active mlxops-restore)"
KEEPER=$(main); kill -9 "$FIRST"
for try in $(seq 300); do "$MLXCTL" status --local | grep -q "ready" && break; sleep 0.2; done
SECOND=$(pid); [ "$SECOND" != "$FIRST" ] && kill -0 "$SECOND" && echo "another server"
systemctl --user restart mlxops-restore.service
[ "$(main)" != "$KEEPER" ] && kill -0 "$SECOND" && echo "another keeper"
"$MLXCTL" boot --remove --local >&2
kill -0 "$SECOND" && echo "the same server, service $(systemctl --user is-active mlxops-restore.service)"
"$MLXCTL" unload "$PORT" --local >&2 && echo unloaded
"""
END = """
kill $MANAGER; wait $MANAGER
echo $$ >/sys/fs/cgroup/cgroup.procs; find "$GROUP" -depth -type d -exec rmdir {} +
"""


def may_create_namespaces() -> bool:
    mounts = "mount -t tmpfs run /run && mount -t cgroup2 cgroup /sys/fs/cgroup"
    steps = f"{mounts} && mkdir /sys/fs/cgroup/mlxops-test-$1 && rmdir /sys/fs/cgroup/mlxops-test-$1"
    argv = [*NAMESPACES, "sh", "-c", steps, "sh", str(os.getpid())]
    return subprocess.run(argv, capture_output=True, check=False).returncode == 0


BOOT_JOB = """
owner() { "$MLXCTL" status --local --json | sed -n 's/.*"owner": "\\([a-z]*\\)".*/\\1/p' | head -1; }
drift() { "$MLXCTL" status --local --json | grep -o 'boot_job_[a-z]*' | head -1; }
serving() { for try in $(seq 300); do curl -sf "http://127.0.0.1:$PORT/health" >/dev/null && return; sleep 0.1; done; }
hint() { "$MLXCTL" "$@" --local 2>&1 >/dev/null | sed -n 's/^  next: //p'; }
echo "before: $(drift)"
systemctl --user daemon-reload; systemctl --user start mlx-launch@"$PORT"; serving
PID=$(systemctl --user show -p MainPID --value mlx-launch@"$PORT")
echo "$(owner), $(tr '\\0' ' ' </proc/"$PID"/cmdline | grep -c start.sh) words of the script"
hint unload "$PORT" --force
hint load org/model "$PORT" --force
"$MLXCTL" unload-all --yes --local >&2
[ "$(systemctl --user show -p MainPID --value mlx-launch@"$PORT")" = "$PID" ] && echo "still it"
$(hint unload "$PORT" --force | sed 's/.*host: //; s/; then.*//') && echo "stopped"
"$ENGINE" --model "$MODEL" --port "$PORT" >/dev/null 2>&1 & HAND=$!
serving; echo "by hand: $(owner)"; kill $HAND; wait $HAND
systemctl --user mask --runtime mlx-launch@"$PORT" 2>/dev/null; echo "masked: $(drift)"
"""


def test_boot_jobs_server_is_recognised_by_its_unit(tmp_path: Path, tiny_models: Path) -> None:
    """An instance of a template whose script ends in exec: the server's command does not name the script."""
    home, port = set_up_host(tmp_path, tiny_models)
    hosts = home / ".config" / "mlxops" / "hosts.yaml"
    document = yaml.safe_load(hosts.read_text())
    document["hosts"]["studio"]["boot"] = {"port": port, "label": f"mlx-launch@{port}"}
    hosts.write_text(yaml.safe_dump(document))
    engine = cache.engine_venv("mlx-lm") / "bin" / "mlx_lm.server"
    snapshot = next((home / "hub").glob("models--org--model/snapshots/*"))
    start = home / "start.sh"
    start.write_text(f'#!/bin/bash\nexec {engine} --model {snapshot} --port "$1"\n')
    start.chmod(0o755)
    unit = home / ".config" / "systemd" / "user" / "mlx-launch@.service"
    unit.parent.mkdir(parents=True)
    service = f"[Service]\nExecStart=/usr/bin/env bash -c 'exec {start} %i'\nRestart=always\n"
    unit.write_text(f"{service}[Install]\nWantedBy=default.target\n")
    lines = run_in_manager(home, port, BOOT_JOB, ENGINE=str(engine), MODEL=str(snapshot))
    stop = f"as the operator of the host: systemctl --user stop mlx-launch@{port}.service; then try again"
    assert lines == [
        "before: boot_job_disabled",
        "boot, 0 words of the script",
        stop,
        f"have the boot job start it under the name jerry; or, {stop}",
        "still it",
        "stopped",
        "by hand: hand",
        "masked: boot_job_disabled",
    ]


def test_restored_server_outlives_the_service(tmp_path: Path, tiny_models: Path) -> None:
    home, port = set_up_host(tmp_path, tiny_models)
    assert run_in_manager(home, port, RESTORE) == [
        "timer active",
        "service inactive",
        "another server",
        "status ready",
        "0",
        "unloaded",
    ]


def test_keeper_replaces_the_timer_and_leaves_the_servers(tmp_path: Path, tiny_models: Path) -> None:
    home, port = set_up_host(tmp_path, tiny_models)
    assert run_in_manager(home, port, KEEP) == [
        "timer inactive, service active",
        "another server",
        "another keeper",
        "the same server, service inactive",
        "unloaded",
    ]


def set_up_host(tmp_path: Path, tiny_models: Path) -> tuple[Path, int]:
    """Create a home directory with a model and a hosts.yaml; return it and the port."""
    if sys.platform != "linux":
        pytest.skip("systemd is Linux's")
    if not SYSTEMD.exists():
        missing("systemd (Debian and Ubuntu: apt-get install systemd)")
    if shutil.which("unshare") is None or not may_create_namespaces():
        pytest.skip("this user may not create mount and cgroup namespaces")
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
    return home, port


def run_in_manager(home: Path, port: int, body: str, **environ: str) -> list[str]:
    """Run a shell script with a private systemd user manager; return the lines that it prints."""
    done = subprocess.run(
        [*NAMESPACES, "sh", "-c", MANAGER + body + END, "sh", str(os.getpid())],
        env={
            "PATH": "/usr/bin:/bin:/usr/sbin:/sbin",
            "HOME": str(home),
            "XDG_RUNTIME_DIR": str(home / "run"),
            "SYSTEMD": str(SYSTEMD),
            "MLXCTL": script("mlxctl"),
            "PORT": str(port),
            **environ,
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr + (home / "systemd.log").read_text()
    return done.stdout.splitlines()
