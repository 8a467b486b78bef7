"""The form of `status --watch` for a terminal: what each size of a terminal shows."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console
from rich.segment import Segment

from mlxops.control.watch.link import Observation
from mlxops.control.watch.terminal import StatusView
from mlxops.control.watch.view import Watched
from mlxops.core.commands.status import DriftRow, PortRow, RunningRow, StatusResult
from mlxops.core.tables import harmless
from tests.control.test_watch_view import IDLE, LOADING, NOON, failed, observed
from tests.properties import PROPERTY, hostile_texts

MANY = [replace(LOADING, port=port, detail="") for port in range(8100, 8110)]


def drawn(
    *observations: Observation[StatusResult], width: int, height: int, hosts: tuple[str, ...] = ("studio",)
) -> list[str]:
    """Return the lines of the view, without the spaces at their ends."""
    watched = Watched(hosts)
    for observation in observations:
        watched.update(observation)
    console = Console(width=width, height=height, force_terminal=True, color_system=None, _environ={})
    segments = console.render(StatusView(watched, 2.0), console.options)
    lines = [[segment.text for segment in line] for line in Segment.split_lines(segments)]
    return ["".join(line).rstrip(" ") for line in lines]


def test_narrow_terminal_shows_details_below_the_model() -> None:
    message = "qwen is assigned to 8101, but nothing serves it"
    drift = (DriftRow("not_serving", 8101, "qwen", message, "mlxctl load qwen 8101"),)
    assert drawn(observed("studio", LOADING, IDLE, drift=drift), width=60, height=24) == [
        "mlxops status  08:00:00Z  every 2 s",
        "",
        "PORT  ALIAS     STATE    MODEL",
        "8100  jerry-xl  loading  mlx-community/Qwen3-235B-A22B-Inst…",
        "                         download 12.3 GB of 190 GB, 6%, 110",
        "                         MB/s, 27 min left; load jerry-xl,",
        "                         started by me@mini (x)",
        "8101  -         idle     -",
        "drift: qwen is assigned to 8101, but nothing serves it;",
        "       mlxctl load qwen 8101",
    ]


def test_wide_terminal_has_the_columns_of_status() -> None:
    lines = drawn(observed("studio", replace(LOADING, detail="busy")), width=120, height=24)
    assert lines[2].split() == ["PORT", "ALIAS", "STATE", "OWNER", "MODEL", "MEMORY"]
    assert lines[3].endswith("190.0 GB  busy")


def test_hosts_are_named_even_if_away_or_connecting() -> None:
    hosts = ("studio", "studio2", "studio3")
    lines = drawn(observed("studio", IDLE), failed("studio2"), hosts=hosts, width=100, height=24)
    assert "studio" in lines and "studio3: connecting" in lines
    assert "studio2: away since 2027-01-15T08:00:00Z: host_down: studio2 does not answer" in lines
    assert "next:    is it on?" in lines


def test_status_from_before_a_host_went_away_is_hidden() -> None:
    lines = drawn(observed("studio", LOADING), failed("studio"), width=80, height=24)
    assert not [line for line in lines if "8100" in line]


def test_download_without_a_port_is_shown() -> None:
    running = RunningRow("x1", "pull", "5 GB of 9 GB")
    lines = drawn(observed("studio", IDLE, operations=(running,)), width=80, height=24)
    assert lines[-1] == "running: pull x1: 5 GB of 9 GB"


def test_view_ends_with_the_latest_changes() -> None:
    lines = drawn(observed("studio", IDLE), observed("studio", LOADING, at=NOON + 2), width=60, height=24)
    assert lines[-3:-1] == ["", "08:00:02Z studio 8100 loading mlx-community/Qwen3-235B-A22B…"]
    assert lines[-1] == "08:00:02Z studio 8101 no longer in the host's range"


def test_idle_ports_share_a_line_on_a_low_terminal() -> None:
    idle = [replace(IDLE, port=port) for port in (8101, 8102, 8103, 8105)]
    assert drawn(observed("studio", replace(LOADING, detail=""), *idle), width=60, height=6)[-1] == (
        "4 idle: 8101-8103, 8105"
    )


def test_last_line_counts_the_lines_that_do_not_fit() -> None:
    lines = drawn(observed("studio", *MANY), width=60, height=6)
    assert len(lines) == 6 and lines[-1] == "... 8 lines more; a taller window or --host shows them"


def test_long_detail_is_cut() -> None:
    lines = drawn(observed("studio", replace(LOADING, detail="word " * 10_000)), width=100, height=24)
    assert len(lines) < 24 and any(line.endswith("…") for line in lines)


@given(
    st.lists(st.tuples(hostile_texts, hostile_texts, st.sampled_from(["idle", "ready"])), max_size=6),
    hostile_texts,
    st.integers(1, 130),
    st.integers(1, 30),
)
@PROPERTY
def test_hostile_text_fits_and_cannot_steer_the_terminal(
    texts: list[tuple[str, str, str]], message: str, width: int, height: int
) -> None:
    ports = [
        PortRow(8100 + number, model, state, model=model, detail=detail)
        for number, (model, detail, state) in enumerate(texts)
    ]
    drift = (DriftRow("orphan", None, None, message, message),)
    lines = drawn(observed("studio"), observed("studio", *ports, drift=drift), width=width, height=height)
    assert len(lines) <= height
    assert all(cell_len(line) <= width and line == harmless(line) for line in lines), lines
