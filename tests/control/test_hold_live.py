"""`hold` with a real LiteLLM: how long a request waits, and what is not retried.

One LiteLLM, started with what `gateway --print --env` prints. Each case has an alias and a server of its own, and all
requests are sent at the same time: most of them wait. A hold of 7 s is the shortest that LiteLLM can keep.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from mlxops.control.client import HostTarget
from mlxops.control.gateway.entries import as_yaml, entries_to_paste
from mlxops.core.hold import read_retries, retries_for, seconds_until_error, seconds_until_last
from mlxops.core.litellm import LiteLLMConfig
from mlxops.core.settings import PortRange, Settings, SlotOptions
from tests.lab.litellm import LiteLLM
from tests.lab.ports import free_ports
from tests.lab.quick import install_engine

pytestmark = pytest.mark.timeout(300)

HOLD = 7
RETRIES = retries_for(HOLD)
DEFAULTS = {400: 1, 401: 1, 403: 3, 404: 1, 408: 3, 409: 3, 422: 1, 429: 3, 500: 3, 502: 3, 503: 3, 504: 3}
"""Status of a server -> how often LiteLLM asks it for one request without any settings."""
WITH_HOLD = DEFAULTS | {500: RETRIES + 1, 404: RETRIES + 1}
"""500 is what a refused connection is for LiteLLM, 404 what mlx-lm answers when it could not load its model."""
BACK = 6.0
"""Seconds until the servers are back that are back."""
SPREAD = 0.1
"""Seconds between two requests: more than forty at once would wait for the processor."""
SLOW = 12.0
"""Seconds of a generation: longer than the hold."""
FALLBACKS = [{"with-fallback": ["held-ok"]}]
SYNONYMS = {"named-down": "held-down"}
ORDERED = {"ordered-one-down": ("held-down", "held-ok"), "ordered-both-down": ("held-down", "plain-down")}
"""Alias -> the aliases whose servers are its first and its second: two hosts in an order."""
STATUSES = [f"{kind}-{status}" for kind in ("held", "plain") for status in DEFAULTS]
ALIASES = [
    *("held-down", "held-down-streamed", "held-back", "held-back-streamed", "held-slow", "held-lost"),
    *("held-cut-streamed", "held-ok", "plain-down", "with-fallback", *STATUSES),
]


@dataclass(frozen=True)
class Outcome:
    status: int
    body: str
    seconds: float


class Engine:
    """The fake engine on a port, as often as it is started."""

    def __init__(self, program: Path, folder: Path, port: int) -> None:
        self.names = folder / f"{port}.names"
        self._argv = [str(program), "--port", str(port), "--fake-names", str(self.names), "--fake-parts", "5"]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def asked(self) -> int:
        return len(self.names.read_text().splitlines()) if self.names.exists() else 0

    def start(self, *options: str) -> None:
        self._process = subprocess.Popen([*self._argv, *options], stdout=subprocess.DEVNULL)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


@dataclass(frozen=True)
class Measured:
    outcomes: dict[str, Outcome]
    asked: dict[str, int]
    """Alias -> how many requests its server got."""

    @property
    def slack(self) -> float:
        """Seconds that a request may take besides LiteLLM's pauses: a few times what one takes that does not wait."""
        return 2 + 4 * self.outcomes["held-ok"].seconds


def ask(gateway: LiteLLM, alias: str, *, streamed: bool = False) -> Outcome:
    message = {"role": "user", "content": f"{alias} {time.time()}"}
    body = json.dumps({"model": alias, "messages": [message], "stream": streamed}).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {gateway.key}"}
    request = urllib.request.Request(f"{gateway.url}/v1/chat/completions", body, headers)
    began = time.monotonic()
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            text, status = answer.read().decode(), answer.status
    except urllib.error.HTTPError as error:
        with error:
            text, status = error.read().decode(), error.code
    return Outcome(status, text, time.monotonic() - began)


def printed(ports: dict[str, int]) -> tuple[str, dict[str, str]]:
    """Return what `gateway --print --env` prints, what a user has beside it, and the variables.

    An alias that begins with `plain` has no hold.
    """
    holds = {port: SlotOptions(hold=HOLD) for alias, port in ports.items() if not alias.startswith("plain")}
    numbers = sorted(ports.values())
    slots = {port: alias for alias, port in ports.items()}
    settings = Settings(address="127.0.0.1", ports=PortRange(numbers[0], numbers[-1]), slots=slots, slot_options=holds)
    own = {"fallbacks": FALLBACKS}
    today = LiteLLMConfig(synonyms=SYNONYMS, retry=read_retries({"litellm_settings": own}))
    entries = entries_to_paste([HostTarget("studio", None, (), settings)], [], today, env=True)
    document = yaml.safe_load(as_yaml(entries))
    bases = {alias: {"api_base": f"http://127.0.0.1:{port}/v1", "api_key": "none"} for alias, port in ports.items()}
    document["model_list"] += [
        {"model_name": alias, "litellm_params": {"model": "openai/x", "order": order + 1, **bases[server]}}
        for alias, servers in ORDERED.items()
        for order, server in enumerate(servers)
    ]
    document["router_settings"]["model_group_alias"] = SYNONYMS
    return yaml.safe_dump({**document, "litellm_settings": own}), dict(entries.environ)


@pytest.fixture(scope="module")
def measured(litellm: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Measured]:
    folder = tmp_path_factory.mktemp("hold")
    program = install_engine(folder / "bin")
    ports = dict(zip(ALIASES, free_ports(["127.0.0.1"], len(ALIASES)), strict=True))
    engines = {alias: Engine(program, folder, port) for alias, port in ports.items()}
    text, environ = printed(ports)
    with ExitStack() as running:
        for engine in engines.values():
            running.callback(engine.stop)
        for alias in STATUSES:
            engines[alias].start("--fake-status", alias.rpartition("-")[2])
        engines["held-slow"].start("--fake-slow", str(SLOW))
        engines["held-lost"].start("--fake-slow", "60")
        engines["held-cut-streamed"].start("--fake-parts", "1000")
        engines["held-ok"].start()
        gateway = running.enter_context(LiteLLM(folder / "litellm", text, environ))
        ask(gateway, "held-ok")  # the first one takes seconds
        names = [*ALIASES, *ORDERED, *SYNONYMS]
        pool = running.enter_context(ThreadPoolExecutor(len(names)))
        asked = {}
        for alias in names:
            asked[alias] = pool.submit(ask, gateway, alias, streamed=alias.endswith("-streamed"))
            time.sleep(SPREAD)
        time.sleep(BACK - SPREAD * len(names))
        for alias in ("held-back", "held-back-streamed", "held-lost", "held-cut-streamed"):
            engines[alias].stop()
            engines[alias].start()
        outcomes = {alias: each.result() for alias, each in asked.items()}
        yield Measured(outcomes, {alias: engine.asked for alias, engine in engines.items()})


@pytest.mark.parametrize("alias", ["held-down", "held-down-streamed", *SYNONYMS])
def test_request_waits_for_its_hold_and_not_much_longer(measured: Measured, alias: str) -> None:
    outcome = measured.outcomes[alias]
    sys.stderr.write(f"{alias}: hold {HOLD} s, {RETRIES} retries, error after {outcome.seconds:.1f} s\n")
    assert outcome.status == 500 and "Connection error" in outcome.body
    assert seconds_until_last(RETRIES + 1) <= outcome.seconds <= seconds_until_error(RETRIES) + measured.slack


@pytest.mark.parametrize("alias", ["held-back", "held-back-streamed"])
def test_request_is_answered_when_its_server_is_back(measured: Measured, alias: str) -> None:
    outcome = measured.outcomes[alias]
    assert outcome.status == 200, outcome
    assert BACK - 1 <= outcome.seconds < seconds_until_last(RETRIES) + 0.75 * RETRIES + measured.slack
    assert measured.asked[alias] == 1


def test_connection_lost_before_the_first_byte_is_retried(measured: Measured) -> None:
    assert measured.outcomes["held-lost"].status == 200 and measured.asked["held-lost"] == 2


def test_begun_stream_is_not_repeated(measured: Measured) -> None:
    """LiteLLM ends a stream that was cut with status 200, and an error in it."""
    outcome = measured.outcomes["held-cut-streamed"]
    assert outcome.status == 200 and '"content":"0 "' in outcome.body and '"error"' in outcome.body
    assert measured.asked["held-cut-streamed"] == 1


def test_slow_generation_is_not_run_twice(measured: Measured) -> None:
    outcome = measured.outcomes["held-slow"]
    assert outcome.status == 200 and outcome.seconds >= SLOW and measured.asked["held-slow"] == 1


@pytest.mark.parametrize("status", DEFAULTS)
def test_server_that_answers_errors_is_not_asked_more_than_by_default(measured: Measured, status: int) -> None:
    """Two statuses look like a swap to LiteLLM, and are excepted. Once they do not, hold becomes the default."""
    assert measured.asked[f"plain-{status}"] == DEFAULTS[status]
    assert measured.asked[f"held-{status}"] == WITH_HOLD[status]


def test_other_aliases_fail_as_fast_as_before(measured: Measured) -> None:
    outcome = measured.outcomes["plain-down"]
    assert outcome.status == 500 and seconds_until_last(3) <= outcome.seconds <= seconds_until_error(2) + measured.slack


def test_fallback_answers_as_fast_as_before(measured: Measured) -> None:
    outcome = measured.outcomes["with-fallback"]
    assert outcome.status == 200 and outcome.seconds <= seconds_until_error(2) + measured.slack


def test_second_of_two_hosts_answers_at_once_and_nothing_waits_for_both(measured: Measured) -> None:
    one_down, both_down = (measured.outcomes[alias] for alias in ORDERED)
    assert one_down.status == 200 and one_down.seconds < measured.slack
    assert both_down.status == 500 and both_down.seconds < measured.slack
