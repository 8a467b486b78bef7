"""`inv lost` with short starts: no client of the gateway loses a request while models change."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks import lost

pytestmark = pytest.mark.timeout(400)

SECONDS = 1.0
HOLD = 15


def test_no_request_is_lost_and_no_generation_is_run_twice(litellm: Path, engine: Path, tmp_path: Path) -> None:
    changes = lost.changes_of("fake")
    measured = list(lost.rows(tmp_path, "fake", SECONDS, HOLD, changes))
    assert [(row.change, row.lost, row.twice) for row in measured] == [(each, 0, 0) for each in changes], measured
    for row in measured:
        assert row.requests >= lost.CLIENTS and row.longest < HOLD, row
