"""The main job, shown: real, small MLX models, a real engine, a throwaway host on this machine.

What is printed after a `$` is run just so, as a program of its own.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import sysconfig
import tempfile
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.lab import cache, models
from tests.lab.ports import free_ports

CHECKOUT = Path(__file__).resolve().parent.parent.parent
QUESTION, ANSWER = "What is the capital of France?", "Paris"


class DemoFailed(RuntimeError):
    """A step did not do what the demo shows."""


def run() -> None:
    """Raises `DemoFailed`, `cache.BuildFailed`. Leaves no process and no file, but for the engine in its cache."""
    engine = cache.engine_venv("mlx-lm") / "bin" / "mlx_lm.server"
    first, second = models.tiny_models() / models.QWEN, _talker()
    with (
        tempfile.TemporaryDirectory(prefix="mlxops-demo-") as name,
        _host(Path(name), engine, (first, second)) as (env, port),
    ):
        _story(env, port, first.name, second.name)


def _talker() -> Path:
    """The directory of a model that talks; of one with random weights if the package index does not have it."""
    try:
        return models.talking_model() / models.TALKING
    except cache.BuildFailed as failure:
        sys.stdout.write(f"{failure}\nThere is no model that talks. One with random weights takes its place.\n\n")
        return models.tiny_models() / models.LLAMA


def _story(env: dict[str, str], port: int, first: str, second: str) -> None:
    _inv(env, "init", "--local")
    _inv(env, "list", "--local")
    _inv(env, "load", "--local", "--model", f"mlx-community/{first}", "--port", str(port))
    _inv(env, "status", "--local")
    _ask(port, "demo-s")
    _inv(env, "load", "--local", "--model", f"mlx-community/{second}", "--port", str(port), "--force")
    _ask(port, "demo-s", ANSWER if second == models.TALKING else "")
    _inv(env, "unload", "--local", "--port", str(port))
    _inv(env, "status", "--local")


@contextmanager
def _host(folder: Path, engine: Path, directories: Iterable[Path]) -> Iterator[tuple[dict[str, str], int]]:
    """A host with models in its cache, known by a hosts.yaml of its own; emptied at the end, come what may."""
    ports = free_ports(["127.0.0.1"], 2)
    hub = folder / "hub"
    for model in directories:
        models.install_snapshot(hub, f"mlx-community/{model.name}", model)
    entry = {
        "hub": str(hub),
        "state": str(folder / "state"),
        "engine": "mlx-lm",
        "launch": {"mlx-lm": [str(engine)]},
        "ports": f"{ports[0]}-{ports[-1]}",
        "slots": {ports[0]: "demo-s"},
    }
    hosts = folder / "hosts.yaml"
    # JSON is YAML, but for the keys of slots, which are numbers there.
    hosts.write_text(json.dumps({"hosts": {"demo": entry}}).replace(f'"{ports[0]}": "demo-s"', f'{ports[0]}: "demo-s"'))
    env = {**os.environ, "MLXOPS_HOSTS_FILE": str(hosts)}
    try:
        yield env, ports[0]
    finally:
        subprocess.run(
            [*_INV, "unload-all", "--local", "--yes"], cwd=CHECKOUT, env=env, capture_output=True, check=False
        )


_INV = (str(Path(sysconfig.get_path("scripts")) / "inv"),)


def _inv(env: dict[str, str], *words: str) -> None:
    sys.stdout.write(f"$ inv {shlex.join(words)}\n")
    sys.stdout.flush()
    done = subprocess.run([*_INV, *words], cwd=CHECKOUT, env=env, stderr=sys.stdout, check=False)
    if done.returncode != 0:
        raise DemoFailed(f"inv {shlex.join(words)} ended with {done.returncode}")
    sys.stdout.write("\n")


def _ask(port: int, alias: str, word: str = "") -> None:
    """A client's view: the port and the alias stay, what answers changes. The answer must have this word.

    Raises `DemoFailed`.
    """
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    messages = [{"role": "user", "content": QUESTION}]
    body = {"model": alias, "messages": messages, "max_tokens": 12, "temperature": 0}
    sys.stdout.write(f"$ curl -s {url} -H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body))}\n")
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        answer = json.load(response)
    sys.stdout.write(json.dumps({key: answer[key] for key in ("model", "choices")}) + "\n\n")
    content = answer["choices"][0]["message"]["content"] or ""
    if word not in content:
        raise DemoFailed(f"the model that talks did not say {word}: {content!r}")
