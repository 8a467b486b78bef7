"""A Mini that reaches its Studio over a wire that can be cut, and commands of it that can be interrupted."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from tests.lab.homelab import Homelab
from tests.lab.run import running, script
from tests.lab.wire import Wire


@contextmanager
def wired(lab: Homelab) -> Iterator[Wire]:
    """From now on every connection of the Mini to the Studio goes over the wire."""
    sshd = lab.studio.sshd
    with Wire((sshd.address, sshd.port)) as wire:
        lab.mini.ssh.host("wired", sshd, f"HostName {wire.address}", f"Port {wire.port}")
        lab.mini.ssh.know(f"[{wire.address}]:{wire.port} {sshd.host_key}")
        lab.configure(ssh="wired")
        yield wire


@contextmanager
def client(lab: Homelab, *words: str, both: bool = False) -> Iterator[subprocess.Popen[str]]:
    """Run `mlxctl` on the Mini, and wait for its end if the block succeeds. `both`: its messages go to standard output,
    too."""
    stderr = subprocess.STDOUT if both else subprocess.PIPE
    with running([script("mlxctl"), *words], lab.mini.elsewhere, lab.mini.env, stderr=stderr) as process:
        yield process
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()  # it must not wait for a reader
        process.wait()
