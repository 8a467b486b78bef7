"""What a watch shows: frames that fit, lines for what changes, documents for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxops.control.client import HostReply
from mlxops.control.render import harmless
from mlxops.control.watch.link import Observation
from mlxops.control.watch.view import Documents, LineView, Watched, cell_width, clip, frame
from mlxops.core.errors import Refused, Unreachable
from tests.properties import PROPERTY, hostile_texts

NOON = 1_800_000_000.0
DOWN = Unreachable("host_down", "studio2 does not answer", why="no route", hint="is it on?")
IDLE: dict[str, object] = {"port": 8101, "alias": None, "state": "idle", "model": None, "owner": None, "detail": ""}
LOADING: dict[str, object] = {
    "port": 8100,
    "alias": "jerry-xl",
    "state": "loading",
    "owner": "mlxops",
    "model": "mlx-community/Qwen3-235B-A22B-Instruct-2507-6bit",
    "memory_bytes": 190_000_000_000,
    "detail": "download 12.3 GB of 190 GB, 6%, 110 MB/s, 27 min left; load jerry-xl, started by me@mini (x)",
}


def status(*rows: object, drift: object = ()) -> dict[str, object]:
    return {"ports": list(rows), "drift": list(drift) if isinstance(drift, tuple) else drift, "operations": []}


def seen(host: str, *rows: object, at: float = NOON, drift: object = ()) -> Observation:
    return Observation(HostReply(host, status(*rows, drift=drift)), at)


def away(host: str, at: float = NOON) -> Observation:
    return Observation(HostReply(host, error=DOWN), at)


class TestLines:
    def test_begin_with_the_whole_once_every_host_was_heard_and_go_on_with_a_line_for_each_change(self) -> None:
        form = LineView(Watched(["studio", "studio2"]))
        assert form.lines(seen("studio", IDLE)) == []
        (whole,) = form.lines(seen("studio2", LOADING))
        assert [line.split()[0] for line in whole.splitlines()] == ["HOST", "studio", "studio2"]
        assert form.lines(seen("studio", IDLE)) == []
        assert form.lines(seen("studio", IDLE | {"state": "foreign", "detail": "pid 7"}, at=NOON + 2)) == [
            "2027-01-15T08:00:02Z studio 8101 idle -> foreign: pid 7"
        ]

    def test_tell_once_that_a_host_is_away_since_it_was_last_seen_and_what_changed_meanwhile(self) -> None:
        form = LineView(Watched(["studio2"]))
        form.lines(seen("studio2", IDLE, at=NOON))
        assert form.lines(away("studio2", NOON + 30)) == [
            "2027-01-15T08:00:30Z studio2 - away since 2027-01-15T08:00:00Z: host_down: studio2 does not answer"
        ]
        assert form.lines(away("studio2", NOON + 40)) == []
        assert form.lines(seen("studio2", IDLE | {"state": "ready", "model": "m"}, at=NOON + 60)) == [
            "2027-01-15T08:01:00Z studio2 - back, was away since 2027-01-15T08:00:00Z",
            "2027-01-15T08:01:00Z studio2 8101 idle -> ready m",
        ]

    def test_show_a_host_that_is_away_from_the_start_in_the_whole(self) -> None:
        (whole,) = LineView(Watched(["studio2"])).lines(away("studio2"))
        assert "host_down" in whole and "does not answer" in whole

    def test_tell_of_a_host_that_is_there_and_says_no_that_it_is_there(self) -> None:
        form = LineView(Watched(["studio"]))
        form.lines(seen("studio", IDLE))
        refusal = Refused("settings_differ", "they differ")
        (line,) = form.lines(Observation(HostReply("studio", error=refusal), NOON + 2))
        assert line.endswith("studio - not telling since 2027-01-15T08:00:00Z: settings_differ: they differ")

    @given(hostile_texts)
    @PROPERTY
    def test_are_one_line_each_whatever_a_host_says(self, text: str) -> None:
        form = LineView(Watched(["studio"]))
        form.lines(seen("studio", IDLE))
        for line in form.lines(seen("studio", IDLE | {"state": "ready", "model": text, "detail": text})):
            assert len(line.splitlines()) == 1 and "\x1b" not in line


class TestDocuments:
    def test_have_one_host_and_one_line_each_and_come_when_anything_but_memory_changes(self) -> None:
        form = Documents(Watched(["studio", "studio2"]))
        (first,) = form.lines(seen("studio", LOADING))
        document = json.loads(first)
        assert (document["schema"], document["command"], document["ok"]) == (1, "status", True)
        assert document["hosts"][0]["ports"] == [LOADING] and document["hosts"][0]["changes"] == []
        assert form.lines(seen("studio", LOADING)) == []
        assert form.lines(seen("studio", LOADING | {"memory_bytes": 7})) == []
        (second,) = form.lines(seen("studio", LOADING | {"state": "ready"}, at=NOON + 2))
        (host,) = json.loads(second)["hosts"]
        assert host["at"] == "2027-01-15T08:00:02Z" and host["away_since"] is None
        assert [change["port"] for change in host["changes"]] == [8100]

    def test_follow_every_byte_of_a_download(self) -> None:
        form = Documents(Watched(["studio"]))

        def progress(done: int) -> Observation:
            return seen("studio", LOADING | {"progress": {"name": "download", "done": done, "total": 100, "rate": 0}})

        form.lines(progress(1))
        assert len(form.lines(progress(2))) == 1

    def test_tell_that_a_host_is_away_and_since_when(self) -> None:
        form = Documents(Watched(["studio2"]))
        form.lines(seen("studio2", IDLE))
        (line,) = form.lines(away("studio2", NOON + 30))
        document = json.loads(line)
        assert document["ok"] is False
        (host,) = document["hosts"]
        assert (host["reachable"], host["error"]["code"]) == (False, "host_down")
        assert host["away_since"] == "2027-01-15T08:00:00Z" and "ports" not in host
        assert form.lines(away("studio2", NOON + 40)) == []


def drawn(*sightings: Observation, width: int, height: int, hosts: tuple[str, ...] = ("studio",)) -> list[str]:
    watched = Watched(hosts)
    for sighting in sightings:
        watched.take(sighting)
    return frame(watched, "title", width, height)


class TestFrame:
    def test_at_60_columns_keeps_port_state_and_model_in_a_row_and_puts_the_words_below(self) -> None:
        drift = ({"message": "qwen is assigned to 8101, but nothing serves it", "hint": "mlxctl load qwen 8101"},)
        assert drawn(seen("studio", LOADING, IDLE, drift=drift), width=60, height=24) == [
            "title",
            "",
            "PORT  ALIAS     STATE    MODEL",
            "8100  jerry-xl  loading  mlx-community/Qwen3-235B-A22B-In...",
            "      download 12.3 GB of 190 GB, 6%, 110 MB/s, 27 min left;",
            "      load jerry-xl, started by me@mini (x)",
            "8101  -         idle     -",
            "drift: qwen is assigned to 8101, but nothing serves it;",
            "  mlxctl load qwen 8101",
        ]

    def test_with_room_has_the_columns_of_status(self) -> None:
        lines = drawn(seen("studio", LOADING | {"detail": "busy"}), width=120, height=24)
        assert lines[2].split() == ["PORT", "ALIAS", "STATE", "OWNER", "MODEL", "MEMORY"]
        assert lines[3].endswith("190.0 GB  busy")

    def test_names_hosts_where_there_are_several_and_says_who_is_away_or_not_heard_yet(self) -> None:
        hosts = ("studio", "studio2", "studio3")
        lines = drawn(seen("studio", IDLE), away("studio2"), hosts=hosts, width=100, height=24)
        assert "studio" in lines and "studio3: connecting" in lines
        assert "studio2: away since 2027-01-15T08:00:00Z: host_down: studio2 does not answer" in lines
        assert "  next: is it on?" in lines

    def test_does_not_show_what_a_host_that_is_away_said_before(self) -> None:
        assert not [
            line for line in drawn(seen("studio", LOADING), away("studio"), width=80, height=24) if "8100" in line
        ]

    def test_ends_with_the_latest_changes(self) -> None:
        lines = drawn(seen("studio", IDLE), seen("studio", LOADING, at=NOON + 2), width=60, height=24)
        assert lines[-3:-1] == ["", "08:00:02Z studio 8100 loading mlx-community/Qwen3-235B-A2..."]
        assert lines[-1] == "08:00:02Z studio 8101 no longer in the host's range"

    def test_puts_idle_ports_into_one_line_where_there_is_no_room(self) -> None:
        many = [IDLE | {"port": port} for port in (8101, 8102, 8103, 8105)]
        assert drawn(seen("studio", LOADING | {"detail": ""}, *many), width=60, height=6)[-1] == (
            "4 idle: 8101-8103, 8105"
        )

    def test_counts_what_does_not_fit_at_all(self) -> None:
        many = [LOADING | {"port": port, "detail": ""} for port in range(8100, 8110)]
        lines = drawn(seen("studio", *many), width=60, height=6)
        assert len(lines) == 6 and lines[-1].startswith("... 8 lines more")

    @given(
        st.lists(st.tuples(hostile_texts, hostile_texts, st.sampled_from(["idle", "ready"])), max_size=6),
        hostile_texts,
        st.integers(1, 130),
        st.integers(1, 30),
    )
    @PROPERTY
    def test_fits_whatever_a_host_says_and_steers_no_terminal(
        self, texts: list[tuple[str, str, str]], message: str, width: int, height: int
    ) -> None:
        ports: list[Mapping[str, object]] = [
            {"port": 8100 + number, "state": state, "model": model, "detail": detail, "alias": model}
            for number, (model, detail, state) in enumerate(texts)
        ]
        drift = ({"message": message, "hint": message},)
        lines = drawn(seen("studio"), seen("studio", *ports, drift=drift), width=width, height=height)
        assert len(lines) <= height
        assert all(cell_width(line) <= width and line == harmless(line) for line in lines), lines


@pytest.mark.parametrize(
    ("text", "width", "shown"),
    [
        ("abc", 3, "abc"),
        ("abcd", 3, "..."),
        ("abcdef", 5, "ab..."),
        ("模型模型", 8, "模型模型"),
        ("模型模型", 7, "模型..."),
        ("模型模型", 6, "模..."),
        ("e\u0301" * 4, 4, "e\u0301" * 4),
        ("abc", 2, "ab"),
        ("模型", 1, ""),
        ("abc", 0, ""),
    ],
)
def test_a_text_is_cut_by_the_columns_that_it_takes(text: str, width: int, shown: str) -> None:
    assert clip(text, width) == shown
