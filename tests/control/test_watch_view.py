"""The forms of `status --watch` for a pipe (lines) and for a program (documents)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

from hypothesis import given

from mlxops.control.watch.link import Observation
from mlxops.control.watch.view import Documents, LineView, Watched
from mlxops.core import wire
from mlxops.core.commands.status import DriftRow, PortRow, RunningRow, StatusResult
from mlxops.core.errors import Refused, Unreachable
from mlxops.core.protocol import Progress
from mlxops.core.replies import HostReply
from tests.properties import PROPERTY, hostile_texts

NOON = 1_800_000_000.0
DOWN = Unreachable("host_down", "studio2 does not answer", why="no route", hint="is it on?")
IDLE = PortRow(8101, None, "idle")
LOADING = PortRow(
    port=8100,
    alias="jerry-xl",
    state="loading",
    owner="mlxops",
    model="mlx-community/Qwen3-235B-A22B-Instruct-2507-6bit",
    memory_bytes=190_000_000_000,
    detail="download 12.3 GB of 190 GB, 6%, 110 MB/s, 27 min left; load jerry-xl, started by me@mini (x)",
)


def observed(
    host: str,
    *ports: PortRow,
    at: float = NOON,
    drift: Sequence[DriftRow] = (),
    operations: Sequence[RunningRow] = (),
) -> Observation[StatusResult]:
    status = StatusResult(tuple(operations), ports, tuple(drift), "/registry.json")
    return Observation(HostReply(host, status), at)


def failed(host: str, at: float = NOON) -> Observation[StatusResult]:
    return Observation(HostReply(host, error=DOWN), at)


class TestLines:
    def test_table_is_followed_by_a_line_for_each_change(self) -> None:
        form = LineView(Watched(["studio", "studio2"]))
        assert form.lines(observed("studio", IDLE)) == []
        (table,) = form.lines(observed("studio2", LOADING))
        assert [line.split()[0] for line in table.splitlines()] == ["HOST", "studio", "studio2"]
        assert form.lines(observed("studio", IDLE)) == []
        assert form.lines(observed("studio", replace(IDLE, state="foreign", detail="pid 7"), at=NOON + 2)) == [
            "2027-01-15T08:00:02Z studio 8101 idle -> foreign: pid 7"
        ]

    def test_host_that_goes_away_and_returns_has_one_line_each(self) -> None:
        form = LineView(Watched(["studio2"]))
        form.lines(observed("studio2", IDLE, at=NOON))
        assert form.lines(failed("studio2", NOON + 30)) == [
            "2027-01-15T08:00:30Z studio2 - away since 2027-01-15T08:00:00Z: host_down: studio2 does not answer"
        ]
        assert form.lines(failed("studio2", NOON + 40)) == []
        assert form.lines(observed("studio2", replace(IDLE, state="ready", model="m"), at=NOON + 60)) == [
            "2027-01-15T08:01:00Z studio2 - back, was away since 2027-01-15T08:00:00Z",
            "2027-01-15T08:01:00Z studio2 8101 idle -> ready m",
        ]

    def test_table_shows_a_host_that_is_away_from_the_start(self) -> None:
        (table,) = LineView(Watched(["studio2"])).lines(failed("studio2"))
        assert "host_down" in table and "does not answer" in table

    def test_refusal_of_a_reachable_host_is_not_called_away(self) -> None:
        form = LineView(Watched(["studio"]))
        form.lines(observed("studio", IDLE))
        refusal = Refused("settings_differ", "they differ")
        (line,) = form.lines(Observation(HostReply("studio", error=refusal), NOON + 2))
        assert line.endswith("studio - no status since 2027-01-15T08:00:00Z: settings_differ: they differ")

    @given(hostile_texts)
    @PROPERTY
    def test_hostile_text_stays_on_one_line(self, text: str) -> None:
        form = LineView(Watched(["studio"]))
        form.lines(observed("studio", IDLE))
        for line in form.lines(observed("studio", replace(IDLE, state="ready", model=text, detail=text))):
            assert len(line.splitlines()) == 1 and "\x1b" not in line


class TestDocuments:
    def test_document_has_one_host_and_comes_when_more_than_memory_changes(self) -> None:
        form = Documents(Watched(["studio", "studio2"]))
        (first,) = form.lines(observed("studio", LOADING))
        document = json.loads(first)
        assert (document["schema"], document["command"], document["ok"]) == (1, "status", True)
        assert document["hosts"][0]["ports"] == [wire.encode(LOADING)] and document["hosts"][0]["changes"] == []
        assert form.lines(observed("studio", LOADING)) == []
        assert form.lines(observed("studio", replace(LOADING, memory_bytes=7))) == []
        (second,) = form.lines(observed("studio", replace(LOADING, state="ready"), at=NOON + 2))
        (host,) = json.loads(second)["hosts"]
        assert host["at"] == "2027-01-15T08:00:02Z" and host["away_since"] is None
        assert [change["port"] for change in host["changes"]] == [8100]

    def test_every_byte_of_a_download_brings_a_document(self) -> None:
        form = Documents(Watched(["studio"]))

        def progress(done: int) -> Observation[StatusResult]:
            return observed("studio", replace(LOADING, progress=Progress("download", done, 100, 0)))

        form.lines(progress(1))
        assert len(form.lines(progress(2))) == 1

    def test_document_says_since_when_a_host_is_away(self) -> None:
        form = Documents(Watched(["studio2"]))
        form.lines(observed("studio2", IDLE))
        (line,) = form.lines(failed("studio2", NOON + 30))
        document = json.loads(line)
        assert document["ok"] is False
        (host,) = document["hosts"]
        assert (host["reachable"], host["error"]["code"]) == (False, "host_down")
        assert host["away_since"] == "2027-01-15T08:00:00Z" and "ports" not in host
        assert form.lines(failed("studio2", NOON + 40)) == []
