"""`inv lost`: what counts as lost, and with short starts, that no client of the gateway loses a request while models
change."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.benchmarks import lost
from tests.benchmarks.lost import Outcome, outcome_of
from tests.lab.ports import free_port, listening
from tests.lab.quick import install_engine
from tests.lab.world import wait_until

pytestmark = pytest.mark.timeout(400)

SECONDS = 1.0
HOLD = 15


def chunk(delta: str, finish: str = "null") -> str:
    return f'data: {{"choices":[{{"index":0,"delta":{{{delta}}},"finish_reason":{finish}}}]}}\n\n'


WORD, NOTHING, END, DONE = chunk('"content":"a"'), chunk('"content":""'), chunk("", '"stop"'), "data: [DONE]\n\n"
ERROR = 'data: {"error": {"message": "Connection error."}}\n\n'
STREAMS = {
    "whole": (WORD + END + DONE, Outcome.ANSWERED),
    "whole, with thoughts only": (chunk('"reasoning_content":"hm"') + END + DONE, Outcome.ANSWERED),
    "whole, with a tool call only": (chunk('"tool_calls":[{"index":0}]') + END + DONE, Outcome.ANSWERED),
    "error after a token": (WORD + ERROR + DONE, Outcome.CUT),
    "no end": (WORD, Outcome.CUT),
    "half a line": (WORD + WORD[:30], Outcome.CUT),
    "connection lost after a token": (WORD + "ConnectionResetError(104)", Outcome.CUT),
    "error after an empty token": (NOTHING + ERROR + DONE, Outcome.LOST),
    "empty, as LiteLLM ends a stream that was cut before its first token": (END + DONE, Outcome.LOST),
    "role only": (chunk('"role":"assistant"') + ERROR + DONE, Outcome.LOST),
    "error at once": ('500 {"error": {"message": "\\"content\\": \\"a\\""}}', Outcome.LOST),
    "signs of life only": (": keepalive 1/9\n\n", Outcome.LOST),
    "nothing": ("TimeoutError()", Outcome.LOST),
}
BODIES = {
    "whole": ('{"choices":[{"message":{"content":"a"}}]}', Outcome.ANSWERED),
    "empty": ('{"choices":[{"message":{"content":""}}]}', Outcome.LOST),
    "half": ('{"choices":[{"message":{"conte', Outcome.LOST),
    "error": ('500 {"error": {"message": "no"}}', Outcome.LOST),
}


@pytest.mark.parametrize(("text", "outcome"), STREAMS.values(), ids=STREAMS)
def test_stream_is_cut_only_after_its_first_token(text: str, outcome: Outcome) -> None:
    assert outcome_of(text, streamed=True) is outcome


@pytest.mark.parametrize(("text", "outcome"), BODIES.values(), ids=BODIES)
def test_answer_that_is_not_streamed_is_whole_or_lost(text: str, outcome: Outcome) -> None:
    assert outcome_of(text, streamed=False) is outcome


FLAWS = {"": Outcome.ANSWERED, "cut": Outcome.CUT, "error": Outcome.CUT, "no-done": Outcome.CUT, "empty": Outcome.LOST}


@pytest.mark.parametrize(("flaw", "outcome"), FLAWS.items())
def test_client_counts_what_a_server_does(tmp_path: Path, flaw: str, outcome: Outcome) -> None:
    port = free_port()
    program = str(install_engine(tmp_path))
    with subprocess.Popen([program, "--port", str(port), "--fake-flaw", flaw], cwd=tmp_path) as server:
        try:
            wait_until(lambda: listening("127.0.0.1", port), 20, "the server")
            sent = lost.ask(f"http://127.0.0.1:{port}", "none", "hello", streamed=True)
        finally:
            server.kill()
    assert sent.outcome is outcome and bool(sent.detail) == (outcome is not Outcome.ANSWERED), sent


def test_no_request_is_lost_and_no_generation_is_run_twice(litellm: Path, engine: Path, tmp_path: Path) -> None:
    changes = lost.changes_of("fake")
    measured = list(lost.rows(tmp_path, "fake", SECONDS, HOLD, changes))
    assert [(row.change, row.lost, row.twice) for row in measured] == [(each, 0, 0) for each in changes], measured
    for row in measured:
        assert row.requests >= lost.CLIENTS and row.longest < HOLD, row
