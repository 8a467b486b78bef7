"""`inv lost`: what clients of the gateway lose while models change.

A real LiteLLM with the settings that `gateway --print` prints for a hold, and four clients, two of which stream. They
ask one alias without a pause, through each of the changes in `CHANGES`. A server takes some seconds longer to start:
that stands for the load of a large model.

Needs no pytest.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import yaml

from mlxops.control import output
from mlxops.core.tables import table
from tests.lab import cache, models
from tests.lab.homelab import ALIASES, Completed, Homelab
from tests.lab.litellm import LiteLLM
from tests.lab.quick import install_engine, snapshot
from tests.lab.service import Service
from tests.lab.world import wait_until

ALIAS = ALIASES[0]
FIRST, SECOND, BROKEN = "lost/first", "lost/second", "lost/broken"
ENGINES = ("fake", "mlx-lm")
CLIENTS, STREAMING = 4, 2
TOKENS = 900
"""A generation takes one or two seconds, so that every change meets some."""
PATIENCE = 200.0
"""Seconds that a client waits for an answer."""
LONG_REPETITIONS = {"REPEATED_STREAMING_CHUNK_LIMIT": "100000"}
"""LiteLLM ends a stream that repeats itself, which random models do."""
WARM = 1.0
"""Seconds of traffic before a change."""


class Outcome(StrEnum):
    ANSWERED = "answered"
    CUT = "cut"
    """A stream that ended early, after its first token."""
    LOST = "lost"
    """An error, or an answer without a token: LiteLLM ends a stream that was cut before its first token as if the model
    had nothing to say."""


@dataclass(frozen=True)
class Sent:
    prompt: str
    outcome: Outcome
    began: float
    seconds: float
    detail: str = ""


class Clients(Service):
    """Clients that ask one after the other, while they are entered. Every prompt is another one."""

    def __init__(self, gateway: LiteLLM, name: str) -> None:
        self._gateway = gateway
        self._name = name
        self._stop = threading.Event()
        self._sent: list[list[Sent]] = [[] for _ in range(CLIENTS)]
        self._threads = [threading.Thread(target=self._ask_on, args=(each,)) for each in range(CLIENTS)]

    @property
    def sent(self) -> list[Sent]:
        return [sent for each in self._sent for sent in each]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def answered_since(self, moment: float) -> bool:
        """Return whether each client has finished a request that it began after this moment."""
        return all(each and each[-1].began > moment for each in list(self._sent))

    def _ask_on(self, number: int) -> None:
        while not self._stop.is_set():
            prompt = f"{self._name}-{number}-{len(self._sent[number])}"
            self._sent[number].append(ask(self._gateway.url, self._gateway.key, prompt, streamed=number < STREAMING))
            self._stop.wait(0.05)


def ask(url: str, key: str, prompt: str, *, streamed: bool) -> Sent:
    messages = [{"role": "user", "content": prompt}]
    asked = {"model": ALIAS, "messages": messages, "max_tokens": TOKENS, "stream": streamed}
    body = json.dumps(asked | ({"stream_options": {"include_usage": True}} if streamed else {})).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    request = urllib.request.Request(f"{url}/v1/chat/completions", body, headers)
    began = time.monotonic()
    text = ""
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            for line in answer:
                text += line.decode()
    except urllib.error.HTTPError as error:
        with error:
            text = f"{error.code} {error.read().decode(errors='replace')}"
    except (OSError, ValueError, http.client.HTTPException) as error:
        text = f"{text}{error!r}"
    outcome = outcome_of(text, streamed=streamed)
    return Sent(prompt, outcome, began, time.monotonic() - began, "" if outcome is Outcome.ANSWERED else _message(text))


def outcome_of(text: str, *, streamed: bool) -> Outcome:
    """Judge what a client received: the lines of a stream, else the body, and the error that ended it."""
    lines = text.splitlines() if streamed else [text]
    parts = [part for line in lines if (part := _json_object(line.removeprefix("data: ")))]
    if not any(map(_has_token, parts)):
        return Outcome.LOST
    ended = not streamed or any(line == "data: [DONE]" for line in lines)
    return Outcome.ANSWERED if ended and not any("error" in part for part in parts) else Outcome.CUT


def _json_object(text: str) -> dict[str, Any]:
    try:
        read = json.loads(text)
    except ValueError:
        return {}
    return read if isinstance(read, dict) else {}


def _has_token(part: dict[str, Any]) -> bool:
    said = [choice.get("delta") or choice.get("message") or {} for choice in part.get("choices") or ()]
    return any(each.get(key) for each in said for key in ("content", "reasoning_content", "reasoning", "tool_calls"))


def _message(text: str) -> str:
    """Return the message of the error in an answer; else the end of the answer."""
    found = re.search(r'"error": ?{"message": ?"([^"]{1,200})', text)
    return found[1] if found else text[-200:]


# -- the lab ------------------------------------------------------------------------------------------------------


@dataclass
class Place:
    """A homelab whose servers take `seconds` longer to start, and its gateway."""

    lab: Homelab
    gateway: LiteLLM
    engine: str
    seconds: float
    answers: Path
    """The prompts that servers answered, a line each."""
    rows: list[Row] = field(default_factory=list)

    @property
    def port(self) -> str:
        return str(self.lab.studio.ports[0])

    def load(self, repo: str, *flags: str) -> Completed:
        return self.lab.mini.inv("load", "--model", repo, "--port", self.port, *flags)

    def last_downtime(self) -> float:
        """Return the seconds for which the port had no server in the last swap."""
        lines = (self.lab.studio.state / "history.jsonl").read_text(encoding="utf-8").splitlines()
        loads = [seconds for line in lines if (seconds := json.loads(line).get("downtime_seconds")) is not None]
        return float(loads[-1])


@contextmanager
def open_place(folder: Path, engine: str, seconds: float, hold: int) -> Iterator[Place]:
    with Homelab(folder / "lab") as lab:
        port, answers = lab.studio.ports[0], folder / "answers"
        answers.touch()
        lab.configure(slots={**lab.studio.slots, port: {"alias": ALIAS, "hold": hold}})
        launch, variables = _engine(lab, engine, seconds, answers)
        lab.configure(launch=launch, env=variables)
        lab.mini.inv("init").ok()
        entries = lab.mini.inv("gateway", "--print").ok().stdout
        with LiteLLM(folder / "litellm", entries, LONG_REPETITIONS) as gateway:
            yield Place(lab, gateway, engine, seconds, answers)
            lab.mini.inv("unload-all", "--yes").ok()


def _engine(lab: Homelab, engine: str, seconds: float, answers: Path) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Install the models and the engine. Return `launch` and `env` for hosts.yaml."""
    if engine == "fake":
        for repo in (FIRST, SECOND, BROKEN):
            snapshot(lab.studio.hub, repo)
        options = ["--fake-late", str(seconds), "--fake-answers", str(answers)]
        options += ["--fake-slow", "0.5", "--fake-parts", "20"]  # a stream takes one second more
        return {"mlx-lm": [str(install_engine(lab.studio.folder / "bin")), *options]}, {}
    for repo, model in ((FIRST, models.QWEN), (SECOND, models.LLAMA), (BROKEN, models.BROKEN)):
        lab.studio.install(repo, model)
    installed, folder = cache.engine_venv("mlx-lm"), lab.studio.folder / "engine"
    program = folder / "bin" / "mlx_lm.server"
    program.parent.mkdir(parents=True)
    (folder / "lib").symlink_to(installed / "lib")  # its version is found there
    source = Path(__file__).parents[1] / "lab" / "slowengine.py"
    program.write_text(f"#!{installed / 'bin' / 'python'}\n{source.read_text(encoding='utf-8')}")
    program.chmod(0o755)
    other = [str(cache.openai_server_venv() / "bin" / "mlx-openai-server"), "launch"]
    variables = {"SLOW_ENGINE_SECONDS": str(seconds), "SLOW_ENGINE_ANSWERS": str(answers)}
    return {"mlx-lm": [str(program)], "mlx-openai-server": other}, variables


# -- the changes --------------------------------------------------------------------------------------------------

Change = Callable[[Place], None]


def _swap(place: Place) -> None:
    place.load(SECOND, "--force").ok()


def _failed_swap(place: Place) -> None:
    """With the fake engine, the model's files are whole, so its program has to fail."""
    if place.engine == "fake":
        launch = yaml.safe_load((place.lab.mini.home / ".config/mlxops/hosts.yaml").read_text())["hosts"]["studio"][
            "launch"
        ]
        place.lab.configure(launch={"mlx-lm": [*launch["mlx-lm"], "--fake-exit", "1"]})
        done = place.load(BROKEN, "--force")
        place.lab.configure(launch=launch)
    else:
        done = place.load(BROKEN, "--force")
    assert done.exit == 4 and "again" in done.stderr, str(done)


def _rollback(place: Place) -> None:
    place.lab.mini.inv("rollback", "--port", place.port).ok()


def _engine_change(place: Place) -> None:
    place.lab.mini.inv("set", "--model", SECOND, "--set", "engine=mlx-openai-server").ok()
    place.load(SECOND, "--force").ok()


def _unload_and_load(place: Place) -> None:
    place.lab.mini.inv("unload", "--port", place.port).ok()
    place.load(FIRST).ok()


def _crash_and_restore(place: Place) -> None:
    row = _port_row(place)
    os.killpg(os.getpgid(int(row["pid"])), signal.SIGKILL)
    wait_until(lambda: _port_row(place)["state"] != "ready", 20, "the crash")
    place.lab.mini.inv("restore").ok()
    wait_until(lambda: _port_row(place)["state"] == "ready", 120 + place.seconds, "the restored server")


def _port_row(place: Place) -> Any:
    rows = place.lab.mini.inv("status", "--json").ok().json["hosts"][0]["ports"]
    return next(row for row in rows if row["port"] == int(place.port))


CHANGES: dict[str, Change] = {
    "swap": _swap,
    "failed swap": _failed_swap,
    "rollback": _rollback,
    "engine change": _engine_change,
    "unload and load": _unload_and_load,
    "crash and restore": _crash_and_restore,
}
"""In this order: each begins with a model that serves."""


# -- the rows -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    change: str
    requests: int
    lost: int
    cut: int
    longest: float
    """Seconds that a client waited for an answer."""
    twice: int
    """Generations that servers finished more than once."""
    away: float
    """Seconds of the change."""
    details: tuple[str, ...] = ()
    """What the lost and cut requests got."""


def measure(place: Place, change: str) -> Row:
    """Make a change while the clients ask. Return what it cost them."""
    # A second measurement of the same change needs other prompts: answers are counted by prompt.
    with Clients(place.gateway, f"{change.replace(' ', '-')}-{time.monotonic_ns()}") as clients:
        time.sleep(WARM)
        began = time.monotonic()
        CHANGES[change](place)
        ended = time.monotonic()
        wait_until(lambda: clients.answered_since(ended), PATIENCE, "an answer for each client")
    sent = clients.sent
    outcomes = Counter(each.outcome for each in sent)
    answers = Counter(place.answers.read_text(encoding="utf-8").splitlines())
    details = dict.fromkeys(each.detail for each in sent if each.detail)
    return Row(
        change,
        len(sent),
        outcomes[Outcome.LOST],
        outcomes[Outcome.CUT],
        max(each.seconds for each in sent),
        sum(answers[each.prompt] > 1 for each in sent),
        ended - began,
        tuple(details),
    )


def changes_of(engine: str) -> list[str]:
    """Return the changes that an engine can show: the fake one has no other engine to change to."""
    return [change for change in CHANGES if engine != "fake" or change != "engine change"]


def rows(folder: Path, engine: str, seconds: float, hold: int, changes: Sequence[str]) -> Iterator[Row]:
    with open_place(folder, engine, seconds, hold) as place:
        place.load(FIRST).ok()
        for change in changes:
            yield measure(place, change)


COLUMNS = ["CHANGE", "REQUESTS", "LOST", "CUT STREAMS", "RUN TWICE", "LONGEST WAIT", "CHANGE TOOK"]


def shown(measured: Sequence[Row]) -> str:
    cells = [
        [each.change, each.requests, each.lost, each.cut, each.twice, f"{each.longest:.1f} s", f"{each.away:.1f} s"]
        for each in measured
    ]
    return table(COLUMNS, cells)


def run(engine: str, seconds: float, hold: int) -> bool:
    """Measure and print the table. Return whether no request was lost, and no generation was run twice."""
    console = output.Console(many=False)
    measured = []
    with tempfile.TemporaryDirectory(prefix="mlxops-lost-") as folder:
        for row in rows(Path(folder), engine, seconds, hold, changes_of(engine)):
            measured.append(row)
            console.note("; ".join([shown([row]).splitlines()[-1], *row.details]))
    output.say(f"{engine}, {seconds:g} s more for each start, hold: {hold}\n\n{shown(measured)}")
    return not any(row.lost or row.twice for row in measured)
