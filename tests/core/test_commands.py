"""Results as text: what each command shows."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxops.core.command import command_module, request_type
from mlxops.core.commands import list as list_command
from mlxops.core.commands import status
from mlxops.core.commands.list import EstimateRow, HostRow, ListResult, MemoryRow, ModelRow, OptionRow
from mlxops.core.commands.load import PortResult
from mlxops.core.commands.status import StatusResult
from mlxops.core.commands.unload import Unload
from mlxops.core.errors import Unreachable, UsageError
from mlxops.core.replies import HostReply
from mlxops.core.wire import DecodeError, decode
from tests.lab.envelopes import smallest
from tests.properties import PROPERTY, hostile_texts, json_values

DOWN = Unreachable("host_down", "attic does not answer", why="no route", hint="is it on?")
ROW: dict[str, object] = {
    "port": 8100,
    "alias": "jerry-xl",
    "state": "ready",
    "owner": "mlxops",
    "model": "qwen",
    "memory_bytes": 190_000_000_000,
    "detail": "",
}


def result_of(command: str, parts: Mapping[str, object]) -> object:
    """Return a command's result, with `parts` and the smallest value of each other field."""
    kind = request_type(command).result
    return decode(kind, {**smallest(kind), **parts})


def shown(command: str, parts: Mapping[str, object], host: str = "studio") -> str:
    return str(command_module(command).show([HostReply(host, result_of(command, parts))]))


def status_of(*ports: object, drift: Sequence[object] = ()) -> StatusResult:
    return decode(StatusResult, smallest(StatusResult) | {"ports": list(ports), "drift": list(drift)})


def test_status_shows_every_port_and_all_drift() -> None:
    idle = {"port": 8101, "alias": None, "state": "idle"}
    drift = {"code": "stale", "port": None, "model": None, "message": "qwen is assigned\nto 8101", "hint": "reconcile"}
    assert status.show([HostReply("studio", status_of(ROW, idle, drift=[drift]))]).split("\n") == [
        "PORT  ALIAS     STATE  OWNER   MODEL  MEMORY    DETAIL",
        "8100  jerry-xl  ready  mlxops  qwen   190.0 GB  -",
        "8101  -         idle   -       -      -         -",
        "drift: qwen is assigned to 8101; reconcile",
    ]


def test_status_of_several_hosts_names_each_even_if_unreachable() -> None:
    lines = status.show([HostReply("studio", status_of(ROW)), HostReply("attic", error=DOWN)]).split("\n")
    assert [line.split()[0] for line in lines] == ["HOST", "studio", "attic"]
    assert "host_down" in lines[2] and "attic does not answer" in lines[2]


def test_list_shows_models_with_short_revisions_and_problems() -> None:
    model = smallest(ModelRow) | {
        "name": "qwen",
        "repo_id": "org/qwen",
        "revision": "0123456789abcdef",
        "size_bytes": 1_500_000,
        "format": "mlx",
        "port": 8100,
        "flags": [{"key": "engine", "value": "mlx-lm", "origin": "registry"}],
        "problems": ["no cache", "claimed twice"],
    }
    assert shown("list", {"models": [model]}).split("\n") == [
        "NAME  REPO      REVISION      SIZE    FORMAT  PORT  FLAGS                     PROBLEMS",
        "qwen  org/qwen  0123456789ab  1.5 MB  mlx     8100  engine=mlx-lm (registry)  no cache; claimed twice",
    ]


def test_options_share_their_origin_and_limits_are_short() -> None:
    limits = {"decode_concurrency": 4, "prompt_cache_bytes": 2_147_483_648}
    options = [OptionRow("engine", "mlx-lm", "registry"), *(OptionRow(*each, "budget") for each in limits.items())]
    text = "engine=mlx-lm (registry), decode_concurrency=4, prompt_cache_bytes=2.1GB (budget)"
    assert list_command.shown_options([*options, OptionRow("model_type", "lm", "settings")]) == text


LOADED = {
    "model": "qwen",
    "port": 8100,
    "alias": "jerry-xl",
    "url": "http://studio:8100/v1",
    "state": "ready",
    "changed": True,
    "seconds": 4.2,
    "downtime_seconds": None,
}


@pytest.mark.parametrize(
    ("command", "result", "line"),
    [
        ("load", LOADED, "qwen is ready on 8100 as jerry-xl (4.2 s): http://studio:8100/v1"),
        ("load", {**LOADED, "changed": False}, "qwen was ready already on 8100 as jerry-xl"),
        ("load", {**LOADED, "downtime_seconds": 3.14}, "(4.2 s, 3.1 s of downtime)"),
        ("load", {**LOADED, "state": "wedged"}, "qwen is wedged on 8100"),
        (
            "unload",
            {"model": "qwen", "port": 8100, "state": "idle", "changed": True, "seconds": 1},
            "port 8100 is idle; qwen is unloaded",
        ),
        ("unload", {"model": None, "port": 8100, "changed": False}, "port 8100 had nothing to unload"),
        ("unload-all", {"ports": []}, "nothing to unload"),
        ("reconcile", {"cleared": [], "stopped": [], "kept": []}, "nothing to reconcile"),
        ("reconcile", {"cleared": [{"model": "a", "port": 8101}]}, "a: assignment to 8101 cleared"),
        ("reconcile", {"cleared": [{"model": "a", "port": 8101}], "dry_run": True}, "8101 would be cleared"),
        ("reconcile", {"kept": ["8102: foreign"]}, "left alone: 8102: foreign"),
        (
            "init",
            {"added": ["org/a"], "existing": [], "skipped": [{"repo_id": "org/b", "path": "/b", "why": "w"}]},
            "skipped org/b: w",
        ),
        ("init", {"added": ["org/a"], "dry_run": True}, "would add org/a"),
    ],
)
def test_result_of_a_change_is_a_sentence(command: str, result: dict[str, object], line: str) -> None:
    assert line in shown(command, result)


def test_dry_run_shows_the_command_quoted_for_a_shell() -> None:
    plan = {
        "outcome": "start",
        "download": None,
        "stops": ["old on 8100, pid 7"],
        "clears": ["old"],
        "argv": ["/x", "a b", "$(id)"],
    }
    text = shown("load", {**LOADED, "dry_run": True, "plan": plan})
    assert text.split("\n") == [
        "qwen on 8100: start (dry run, nothing changed)",
        "  stop: old on 8100, pid 7",
        "  clear: old",
        "  run: /x 'a b' '$(id)'",
    ]


@given(
    st.sampled_from(["init", "load", "unload", "unload-all", "reconcile", "deploy"]),
    st.dictionaries(
        st.sampled_from(
            ["model", "port", "alias", "url", "state", "seconds", "notes", "ports", "added", "plan", "kept"]
        ),
        json_values | hostile_texts | st.lists(hostile_texts),
    ),
)
@PROPERTY
def test_text_of_a_host_cannot_steer_the_terminal(command: str, parts: dict[str, object]) -> None:
    keys = {each.name for each in fields(request_type(command).result)}
    for key, value in parts.items():
        try:
            text = shown(command, {key: value} if key in keys else {})
        except DecodeError:
            continue
        assert not [c for c in text if unicodedata.category(c) == "Cc" and c != "\n"]


@pytest.mark.parametrize(
    ("result", "line"),
    [
        ({"port": 8102, "model": None, "state": "idle"}, "port 8102 has nothing to unload (dry run, nothing changed)"),
        ({"port": None, "model": "m", "state": "idle"}, "m has nothing to unload (dry run, nothing changed)"),
        ({"port": 8102, "model": "m", "state": "loading"}, "m on 8102: unload (dry run, nothing changed)"),
    ],
)
def test_dry_run_of_an_unload_says_what_it_would_do(result: dict[str, object], line: str) -> None:
    plan: dict[str, list[str]] = {"stops": [], "clears": []}
    assert shown("unload", {**result, "dry_run": True, "plan": plan}) == line


PARENT = "its parent, pid 7: python panel.py, is left alone, and may start it again"
STOPPING = {"port": 8102, "model": "m", "changed": True, "seconds": 1, "notes": [PARENT]}
AT_BOOT = {"port": 8100, "model": None, "changed": False, "state": "ready", "notes": ["8100 is left alone: boot job"]}


@pytest.mark.parametrize(
    ("result", "lines"),
    [
        (STOPPING | {"state": "idle"}, ["port 8102 is idle; m is unloaded (1.0 s)", PARENT]),
        (STOPPING | {"state": "ready"}, [PARENT]),
        (AT_BOOT, ["8100 is left alone: boot job"]),
        (
            STOPPING | {"dry_run": True, "plan": {"stops": ["m on 8102, pid 8"], "clears": []}},
            ["m on 8102: unload (dry run, nothing changed)", "  stop: m on 8102, pid 8", f"  note: {PARENT}"],
        ),
        (
            AT_BOOT | {"dry_run": True, "plan": {"stops": [], "clears": []}},
            ["8100 is left alone: boot job (dry run, nothing changed)"],
        ),
    ],
)
def test_unload_shows_its_notes(result: dict[str, object], lines: list[str]) -> None:
    port = smallest(PortResult) | result
    assert shown("unload", port).splitlines() == lines
    assert shown("unload-all", {"ports": [port]}).splitlines() == lines


@pytest.mark.parametrize("name", ["jerry-xl", "org/name"])
def test_unload_of_a_name_suggests_the_model(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        Unload(port=name).checked()
    assert (caught.value.code, caught.value.commands) == ("bad_port", (("mlxctl", "unload", "--model", name),))


def test_dry_run_of_an_unload_names_the_stale_assignment() -> None:
    result = {"port": 8102, "model": "m", "state": "idle", "dry_run": True, "plan": {"stops": [], "clears": ["m"]}}
    assert shown("unload", result).splitlines() == ["m on 8102: unload (dry run, nothing changed)", "  clear: m"]


def test_upper_estimate_is_marked() -> None:
    need = smallest(EstimateRow) | {"weight_bytes": 10**9, "context_bytes": 5 * 10**8, "context_tokens": 32768}
    models = [
        smallest(ModelRow) | {"name": name, "memory": need | {"total_bytes": 2 * 10**9, "upper_estimate": upper}}
        for name, upper in (("known", False), ("unknown", True))
    ]
    memory = smallest(MemoryRow) | {"budget_bytes": 10**10, "left_bytes": 10**10, "budget_source": "test"}
    result = decode(ListResult, smallest(ListResult) | {"models": models, "memory": memory})
    *_, known, unknown = list_command.show_memory([HostReply("studio", result)]).splitlines()
    assert known.split() == ["known", "-", "1.0", "GB", "500.0", "MB", "32768", "2.0", "GB", "yes"]
    assert unknown.split() == ["unknown", "-", "1.0", "GB", "up", "to", "500.0", "MB", "32768", "2.0", "GB", "yes"]


def test_memory_shows_the_budget_in_parts_and_the_default_of_a_set_limit() -> None:
    gb = 10**9
    limit = {"gpu_limit_bytes": 230 * gb, "gpu_limit_set": True, "gpu_limit_default_bytes": 192 * gb}
    memory = smallest(MemoryRow) | {"budget_bytes": 230 * gb, "budget_source": "test", "used_bytes": 100 * gb}
    memory |= {"held_bytes": 60 * gb, "reserved_bytes": 40 * gb, "left_bytes": 130 * gb}
    memory |= {"host": smallest(HostRow) | {"total_bytes": 256 * gb} | limit}
    result = decode(ListResult, smallest(ListResult) | {"memory": memory})
    budget, host, *_ = list_command.show_memory([HostReply("studio", result)]).splitlines()
    assert budget == "budget 230.0 GB (test), counted 100.0 GB, held 60.0 GB, reserved 40.0 GB, free 130.0 GB"
    assert "GPU limit 230.0 GB (set; the default is 192.0 GB)" in host


@pytest.mark.parametrize(
    ("replies", "commands"),
    [
        ([HostReply("a", result_of("list", {}))], ["`mlxctl init`", "`mlxctl load ORG/NAME PORT`"]),
        ([HostReply("b", result_of("list", {}), flags=" --host b")], ["`mlxctl init --host b`", "PORT --host b`"]),
    ],
)
def test_empty_list_suggests_commands_for_its_host(replies: list[HostReply[ListResult]], commands: list[str]) -> None:
    assert all(command in list_command.show(replies) for command in commands)
