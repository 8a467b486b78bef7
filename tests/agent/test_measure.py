"""`measure`, of servers whose speed is known; other clients, swaps, and the end of its time."""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import pytest

from tests.lab.quick import MODELS, QuickHost, install_engine
from tests.lab.run import running, script
from tests.lab.world import wait_until

WAIT = 60.0
RATE = 400
FIGURES = [
    ("short", "cold", 1, "first_token"),
    ("short", "cold", 1, "decode"),
    ("short", "warm", 1, "first_token"),
    ("long", "cold", 1, "first_token"),
    ("long", "cold", 1, "prefill"),
    ("long", "cold", 1, "decode"),
    ("long", "warm", 1, "first_token"),
]


@pytest.fixture
def port(host: QuickHost) -> int:
    """The first port, with a server that generates `RATE` tokens a second."""
    host.engine("--fake-rate", str(RATE))
    host.mlxctl("load", MODELS[0], str(host.ports[0])).ok()
    return host.ports[0]


RUNS = "measure.jsonl"


def measured(host: QuickHost, *words: object) -> Any:
    """Return the ports' rows."""
    return host.mlxctl("measure", *map(str, words), "--json").ok().json["hosts"][0]["ports"]


def recorded(host: QuickHost) -> list[Any]:
    """Return the recorded runs."""
    runs = host.studio.state / RUNS
    return [json.loads(line) for line in runs.read_text(encoding="utf-8").splitlines()] if runs.exists() else []


@contextmanager
def open_request(host: QuickHost, port: int) -> Iterator[None]:
    """Ask for a stream that does not end while the block runs."""
    body = json.dumps({"model": MODELS[0], "messages": [], "max_tokens": 1_000_000, "stream": True}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with socket.create_connection((host.studio.address, port), timeout=WAIT) as connection:
        connection.sendall(head + body)
        assert connection.recv(1)
        yield


def test_figures_are_of_the_tokens_that_the_server_counts(host: QuickHost, port: int) -> None:
    (row,) = measured(host, port, "--rounds", "2", "--streams", "2")
    figures = {(each["prompt"], each["cache"], each["streams"], each["metric"]): each for each in row["figures"]}
    assert list(figures) == [*FIGURES, *((prompt, cache, 2, metric) for prompt, cache, _, metric in FIGURES)]
    for (prompt, cache, _, _), figure in figures.items():
        assert figure["rounds"] == 2 and 0 < figure["low"] <= figure["median"] <= figure["high"]
        assert figure["completion_tokens"] == (64 if cache == "cold" else 2)
        assert (figure["prompt_tokens"] > 500) == (prompt == "long")
        assert figure["cached_tokens"] == (0 if cache == "cold" else figure["prompt_tokens"] - 1)
    # The server sleeps at least as long as its rate says. How much longer depends on the machine.
    assert figures["short", "cold", 1, "decode"]["high"] <= RATE
    assert figures["short", "cold", 2, "decode"]["high"] <= 2 * RATE
    assert figures["long", "cold", 1, "prefill"]["high"] <= 100 * RATE
    assert row["not_measured"] is None and row["missing"] == [] and row["shared"] is False


def test_run_is_recorded_and_compared_with_the_next_one(host: QuickHost, port: int) -> None:
    (first,) = measured(host, port, "--rounds", "3", "--streams", "1")
    assert first["compared_with"] is None and {each["before"] for each in first["figures"]} == {None}
    (line,) = recorded(host)
    for key in ("port", "alias", "model", "repo_id", "revision", "engine", "engine_version", "settings", "shared"):
        assert line[key] == first[key]

    (second,) = measured(host, port, "--rounds", "3", "--streams", "1")
    assert second["compared_with"] == line["at"]
    assert [each["before"] for each in second["figures"]] == [each["median"] for each in first["figures"]]
    assert {each["verdict"] for each in second["figures"]} <= {"same", "slower", "faster"}


def test_slower_server_is_a_warning(host: QuickHost, port: int) -> None:
    measured(host, port, "--rounds", "3", "--streams", "1")
    (line,) = recorded(host)
    for row in line["rows"]:  # as if it had been ten times as fast
        faster = 0.1 if row["metric"] == "first_token" else 10
        row |= {key: row[key] * faster for key in ("median", "low", "high")}
    line["engine_version"] = "0.1"
    (host.studio.state / RUNS).unlink()
    with open(host.studio.state / "history.jsonl", "a", encoding="utf-8") as history:  # as an older build did
        history.write(json.dumps(line) + "\n")
    done = host.mlxctl("measure", str(port), "--rounds", "3", "--streams", "1").ok()
    assert f"before: {line['at']}, with mlx-lm 0.1" in done.stdout
    assert "WARN slower" in done.stdout and f"WARN: {port}: " in done.stdout
    assert "figures are slower than before" in done.stdout


@pytest.mark.parametrize("change", [{"revision": "0" * 40}, {"settings": "0"}, {"method": 0}, {"shared": True}])
def test_other_run_is_not_compared(host: QuickHost, port: int, change: dict[str, object]) -> None:
    measured(host, port, "--rounds", "1", "--streams", "1")
    (line,) = recorded(host)
    (host.studio.state / RUNS).write_text(json.dumps(line | change) + "\n", encoding="utf-8")
    assert measured(host, port, "--rounds", "1", "--streams", "1")[0]["compared_with"] is None


def test_engine_in_another_place_is_compared(host: QuickHost, port: int) -> None:
    measured(host, port, "--rounds", "1", "--streams", "1")
    program = install_engine(host.studio.folder / "elsewhere")
    host.lab.configure("studio", launch={"mlx-lm": [str(program), "--fake-rate", str(RATE)]})
    host.mlxctl("load", MODELS[0], str(port), "--force").ok()
    assert measured(host, port, "--rounds", "1", "--streams", "1")[0]["compared_with"]


def test_ports_that_are_ready_are_measured_one_after_the_other(host: QuickHost, port: int) -> None:
    host.mlxctl("load", MODELS[1], str(host.ports[1])).ok()
    done = host.mlxctl("measure", "--rounds", "1", "--streams", "1").ok()
    said = [line for line in done.stderr.splitlines() if line.startswith("measure: ")]
    assert said == [f"measure: port {each}, round 1 of 1" for each in host.ports[:2]]


def test_port_without_a_server_is_refused(host: QuickHost) -> None:
    for words in ((), (str(host.ports[0]),)):
        done = host.mlxctl("measure", *words, "--json")
        assert done.exit == 3 and done.json["hosts"][0]["error"]["code"] == "not_ready"


def test_port_with_an_open_request_is_refused_unless_forced(host: QuickHost, port: int) -> None:
    with open_request(host, port):
        done = host.mlxctl("measure", str(port), "--json")
        assert done.exit == 75 and done.json["hosts"][0]["error"]["code"] == "open_requests"
        assert recorded(host) == []
        (row,) = measured(host, port, "--rounds", "3", "--streams", "1", "--force")
        assert row["shared"] is True
    (row,) = measured(host, port, "--rounds", "3", "--streams", "1")
    assert row["shared"] is False and row["compared_with"] is None


def test_client_that_comes_later_is_noticed(host: QuickHost, port: int) -> None:
    argv = [script("mlxctl"), "measure", str(port), "--rounds", "100", "--seconds", "8", "--local", "--json"]
    with running(argv, host.studio.home, host.studio.environment) as process:
        wait_until(lambda: clients(host, port), WAIT, "its requests")
        with open_request(host, port):
            stdout, _ = process.communicate(timeout=WAIT)
    (row,) = json.loads(stdout)["hosts"][0]["ports"]
    assert row["figures"] and row["shared"] is True


def test_port_in_use_does_not_hold_up_the_others(host: QuickHost, port: int) -> None:
    host.mlxctl("load", MODELS[1], str(host.ports[1])).ok()
    with open_request(host, port):
        used, free = measured(host, "--rounds", "1", "--streams", "1")
    assert "open requests: 1" in used["not_measured"] and used["figures"] == []
    assert free["not_measured"] is None and free["figures"]


def test_swap_voids_the_run(host: QuickHost, port: int) -> None:
    argv = [script("mlxctl"), "measure", str(port), "--rounds", "100", "--seconds", "600", "--local", "--json"]
    with running(argv, host.studio.home, host.studio.environment) as process:
        wait_until(lambda: clients(host, port), WAIT, "its requests")
        host.mlxctl("load", MODELS[1], str(port), "--force", "--drain", "0").ok()
        stdout, _ = process.communicate(timeout=WAIT)
    assert process.returncode == 75
    assert json.loads(stdout)["hosts"][0]["error"]["code"] == "changed_meanwhile"
    assert recorded(host) == []


def test_end_of_its_time_ends_the_run(host: QuickHost, port: int) -> None:
    done = host.mlxctl("measure", str(port), "--rounds", "100", "--streams", "1", "--seconds", "2.5", "--json").ok()
    assert "the 2.5 s of --seconds are over" in done.stderr
    (row,) = done.json["hosts"][0]["ports"]
    assert row["figures"] and max(each["rounds"] for each in row["figures"]) < 100


def test_server_that_counts_no_tokens_is_refused(host: QuickHost) -> None:
    """Without --fake-rate the server streams without an end, and without usage."""
    host.mlxctl("load", MODELS[0], str(host.ports[0])).ok()
    done = host.mlxctl("measure", str(host.ports[0]), "--seconds", "1", "--json")
    assert done.exit == 3 and done.json["hosts"][0]["error"]["code"] == "no_answer"


@pytest.mark.parametrize("way", ["local", "ssh"])
def test_ctrl_c_ends_the_requests(host: QuickHost, way: str) -> None:
    port = host.ports[0]
    host.engine("--fake-rate", "0.5")  # an answer takes two minutes
    host.mlxctl("load", MODELS[0], str(port)).ok()
    words = ["measure", str(port), "--seconds", "600"]
    if way == "local":
        argv, folder, env = [script("mlxctl"), *words, "--local"], host.studio.home, host.studio.environment
    else:
        argv, folder, env = [script("mlxctl"), *words], host.lab.mini.home, host.lab.mini.env
    with running(argv, folder, env) as process:
        assert process.stderr and next(line for line in process.stderr if "round 1" in line)
        wait_until(lambda: clients(host, port), WAIT, "its requests")
        process.send_signal(signal.SIGINT)
        assert process.wait(WAIT) == 130
    wait_until(lambda: not clients(host, port), WAIT, "the end of its requests")
    assert recorded(host) == []


def clients(host: QuickHost, port: int) -> bool:
    """Return whether a client is connected to the server."""
    for seen in host.studio.processes():
        try:
            for each in psutil.Process(seen.pid).net_connections(kind="tcp"):
                if each.laddr.port == port and each.status == psutil.CONN_ESTABLISHED:
                    return True
        except psutil.NoSuchProcess:
            continue
    return False


def test_through_needs_a_gateway(host: QuickHost) -> None:
    done = host.mlxctl("measure", "--through", "--json")
    assert done.exit == 2 and done.json["error"]["code"] == "no_gateway"
