"""A Mini that reaches its Studio over a wire that can be cut, and commands of it that can be interrupted."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from tests.lab.homelab import Homelab, script
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
    """`mlxctl` on the Mini, while it runs. `both`: what it says comes with its data, on standard output."""
    with subprocess.Popen(
        [script("mlxctl"), *words],
        cwd=lab.mini.elsewhere,
        env=lab.mini.env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if both else subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
        except BaseException:
            process.kill()  # or its end would be waited for
            raise
