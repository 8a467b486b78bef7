"""The main promise, with real programs: models change behind the ports, and the gateway never notices.

One LiteLLM, started once with what `inv gateway --print` gave, for every test here.

    pytest tests/control/test_gateway_live.py -s     also prints what a swap costs a client of the gateway
"""

from __future__ import annotations

import itertools
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.agent.test_openai_server import Stream
from tests.lab import leaks, models
from tests.lab.homelab import Completed, Homelab, LabUnavailable
from tests.lab.litellm import LiteLLM, Traffic, ask
from tests.lab.quick import install_engine, with_fake
from tests.lab.sshd import missing
from tests.lab.world import wait_until
from tests.steps import servers

pytestmark = pytest.mark.timeout(600)

ALIAS = "jerry-xl"
QWEN, OTHER, LLAMA, BROKEN = (f"tiny-org/{name}" for name in (models.QWEN, models.QWEN_B, models.LLAMA, models.BROKEN))


@dataclass(frozen=True)
class Place:
    lab: Homelab
    gateway: LiteLLM

    @property
    def port(self) -> int:
        return self.lab.studio.ports[0]

    def directly(self) -> str:
        """Return the server's own answer to the request of the traffic."""
        reply = ask(f"http://{self.lab.studio.address}:{self.port}/v1", ALIAS)
        assert reply.status == 200, reply
        return reply.text


@pytest.fixture(scope="module")
def place(
    litellm: Path, engine: Path, tiny_models: Path, watch: leaks.Watch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("gateway")
    try:
        lab = Homelab(folder / "lab")
    except LabUnavailable as error:
        missing(str(error))
    with watch.spare(folder), lab:
        for repo in (QWEN, OTHER, LLAMA, BROKEN):
            lab.studio.install(repo, repo.removeprefix("tiny-org/"))
        entries = lab.mini.inv("gateway", "--print").ok().stdout
        with LiteLLM(folder / "litellm", entries) as gateway:
            (gateway.folder / "local.env").write_text(f"LITELLM_MASTER_KEY={gateway.key}\n", encoding="utf-8")
            lab.configure_gateway(
                config=str(gateway.config),
                env=str(gateway.folder / "local.env"),
                url=gateway.url,
                key_env="LITELLM_MASTER_KEY",
            )
            yield Place(lab, gateway)


@pytest.fixture
def empty(place: Place, engine: Path, openai_server: Path) -> Iterator[Place]:
    """With the real engines and nothing loaded, before and after."""
    lm = engine / "bin" / "mlx_lm.server"
    place.lab.configure(launch={"mlx-lm": [str(lm)], "mlx-openai-server": [str(openai_server), "launch"]})
    yield place
    place.lab.mini.inv("unload-all", "--yes").ok()


@pytest.fixture
def quick(place: Place) -> Iterator[Place]:
    """The same with the fake engine, where it does not matter what the model says."""
    with_fake(place.lab)
    yield place
    place.lab.mini.inv("unload-all", "--yes").ok()


Drive = Callable[..., Completed]


@dataclass(frozen=True)
class Step:
    """A command, and the answers of the models before and after it."""

    name: str
    began: float
    ended: float
    before: str | None
    after: str | None


@dataclass
class Story:
    """Commands one after the other, and the port's answer after each."""

    place: Place
    traffic: Traffic
    steps: list[Step] = field(default_factory=list)

    def step(self, name: str, command: Callable[[], Completed], *, serves: str | None, exit: int = 0) -> Completed:
        """Run a command and check the port. `serves`: the repository that must serve afterwards."""
        before = self.steps[-1].after if self.steps else None
        began = time.monotonic()
        done = command()
        ended = time.monotonic()
        assert done.exit == exit, str(done)
        assert self._on_port() == serves, str(done)
        self.steps.append(Step(name, began, ended, before, self.place.directly() if serves else None))
        # Wait for a request that began after the command.
        wait_until(lambda: any(s.began > ended for s in self.traffic.sent[-2:]), 60, f"traffic after {name}")
        return done

    def _on_port(self) -> str | None:
        rows = self.place.lab.mini.inv("status", "--json").ok().json["hosts"][0]["ports"]
        row = next(row for row in rows if row["port"] == self.place.port)
        return str(row["repo_id"]) if row["state"] == "ready" else None

    def check(self) -> None:
        """Check that the right model gave each answer, and that no request failed between the commands."""
        assert self.traffic.sent
        for sent in self.traffic.sent:
            during = [step for step in self.steps if step.began <= sent.ended and sent.began <= step.ended]
            last = [step for step in self.steps if step.ended < sent.began]
            allowed = {text for step in during for text in (step.before, step.after)}
            allowed |= {last[-1].after if last else None} if not during else set()
            text = sent.reply.text if sent.reply.status == 200 else None
            moment = during[0].name if during else f"after {last[-1].name}" if last else "before"
            assert text in allowed or (during and text is None), f"{moment}: {sent.reply} is not in {allowed}"

    def cost(self, name: str) -> str:
        """Return what a step cost the client: failed requests, and the longest time without an answer."""
        step = next(step for step in self.steps if step.name == name)
        near = [s for s in self.traffic.sent if s.ended >= step.began - 1 and s.began <= step.ended + 1]
        failed = sum(s.reply.status != 200 for s in near)
        answered = itertools.pairwise(s.ended for s in self.traffic.sent if s.reply.status == 200)
        gaps = [later - sooner for sooner, later in answered if sooner <= step.ended and later >= step.began]
        gap = max(gaps, default=0.0)
        return f"{name}: {failed} of {len(near)} requests failed, longest time without an answer {gap:.2f} s"


@pytest.mark.parametrize("driver", ["over ssh", pytest.param("local", marks=pytest.mark.long)])
def test_gateway_keeps_running_while_models_change(empty: Place, driver: str) -> None:
    lab, gateway, port = empty.lab, empty.gateway, str(empty.port)
    run: Drive = lab.mini.inv if driver == "over ssh" else lab.studio.mlxctl
    run("init").ok()
    run("set", "--model", OTHER, "--set", "engine=mlx-openai-server").ok()
    identity = gateway.identity()
    with Traffic(gateway, ALIAS) as traffic:
        story = Story(empty, traffic)

        def load(repo: str, *flags: str) -> Callable[[], Completed]:
            return lambda: run("load", "--model", repo, "--port", port, "--json", *flags)

        first = story.step("load", load(QWEN), serves=QWEN)
        swap = story.step("swap", load(LLAMA, "--force"), serves=LLAMA)
        failed = story.step("failed swap", load(BROKEN, "--force"), serves=LLAMA, exit=4)
        other = story.step("engine swap", load(OTHER, "--force"), serves=OTHER)
        with _reading(Stream(lab.studio, empty.port, 2000)) as streamed:
            back = story.step("rollback", lambda: run("rollback", "--port", port), serves=LLAMA)
        story.step("unload", lambda: run("unload", "--port", port), serves=None)
        story.step("load again", load(QWEN), serves=QWEN)
    story.check()
    answers = {step.name: step.after for step in story.steps}
    assert answers["load"] == answers["load again"] != answers["swap"] == answers["failed swap"] == answers["rollback"]
    assert answers["engine swap"] not in {answers["load"], answers["swap"]}
    for done in (first, swap, other):
        assert _receipt(done)["aliases"][0]["ok"], str(done)
        assert _receipt(done)["aliases"][0]["api_base"] == f"http://{lab.studio.address}:{port}/v1"
    assert "serves port" in failed.json["hosts"][0]["error"]["why"]
    assert b"[DONE]" in streamed[0] and "was killed" not in back.stderr, "an open stream is answered to its end"
    assert gateway.identity() == identity
    for name in ("swap", "failed swap", "engine swap", "rollback"):
        sys.stdout.write(f"\n{driver}: {story.cost(name)}")
    sys.stdout.write(f"\n{driver}: the agent measured {_result(swap)['downtime_seconds']} s for the swap\n")


@contextmanager
def _reading(stream: Stream) -> Iterator[list[bytes]]:
    """Read a stream to its end in another thread. The list has its bytes afterwards."""
    came: list[bytes] = []
    reader = threading.Thread(target=lambda: came.append(stream.rest()))
    reader.start()
    try:
        yield came
    finally:
        reader.join()
        stream.close()


def test_served_alias_has_no_fault(empty: Place) -> None:
    empty.lab.mini.inv("load", "--model", QWEN, "--port", str(empty.port)).ok()
    done = empty.lab.mini.inv("gateway", "--through", "--json").ok()
    (host,) = done.json["hosts"]
    row = next(row for row in host["aliases"] if row["alias"] == ALIAS)
    assert row["verdict"] == "ok"
    assert row["through"]["ok"]
    assert (row["sends"], row["answers_to"], row["context_length"]) == (ALIAS, ALIAS, 2048)
    assert {finding["severity"] for finding in host["findings"]} == {"warning"}
    assert empty.gateway.key not in done.stdout + done.stderr


def test_alias_without_an_answer_is_a_fault(quick: Place) -> None:
    lab = quick.lab
    lab.mini.inv("load", "--model", QWEN, "--port", str(quick.port)).ok()
    done = lab.mini.inv("gateway", "--through", "--json", env={"LITELLM_MASTER_KEY": "sk-not-the-key"})
    assert done.exit == 3, str(done)
    (finding,) = [f for f in done.json["hosts"][0]["findings"] if f["severity"] == "fault"]
    assert finding["code"] == "through_no_completion"
    assert finding["alias"] == ALIAS
    assert "sk-not-the-key" not in done.stdout + done.stderr


def test_aliases_are_probed_without_the_gateways_files(quick: Place) -> None:
    lab = quick.lab
    lab.mini.inv("load", "--model", QWEN, "--port", str(quick.port)).ok()
    with _hosts(lab, f"  config: {quick.gateway.config}\n", ""):
        done = lab.mini.inv("gateway", "--through", "--json").ok()
        refused = lab.mini.inv("gateway")
    (host,) = done.json["hosts"]
    assert [row["through"]["ok"] for row in host["aliases"] if row["through"]] == [True]
    assert host["findings"] == [] and refused.exit == 2, str(refused)


def test_load_under_a_name_unlike_the_gateways_is_refused(quick: Place, tmp_path: Path) -> None:
    lab, port = quick.lab, str(quick.port)
    lab.mini.inv("load", "--model", QWEN, "--port", port).ok()
    before = servers(lab.studio)
    with _edited_config(quick, tmp_path, f"openai/{ALIAS}", "openai/other-name") as wrong:
        done = lab.mini.inv("load", "--model", LLAMA, "--port", port, "--force", "--json")
        dry = lab.mini.inv("load", "--model", LLAMA, "--port", port, "--force", "--dry-run", "--json")
        again = lab.mini.inv("load", "--model", QWEN, "--port", port, "--json")
    assert (done.exit, dry.exit) == (3, 3), f"{done}\n{dry}"
    error = done.json["hosts"][0]["error"]
    assert error["code"] == "gateway_name"
    assert error["hint"] == f"in {wrong}:2: model: openai/{ALIAS}; then restart the gateway, once"
    assert servers(lab.studio) == before
    # The model that serves already is not refused.
    assert (again.exit, _result(again)["changed"]) == (0, False), str(again)


def test_pattern_does_not_refuse_a_load(quick: Place, tmp_path: Path) -> None:
    lab, port = quick.lab, str(quick.port)
    with _edited_config(quick, tmp_path, ALIAS, "jerry-*"):
        done = lab.mini.inv("load", "--model", QWEN, "--port", port, "--json").ok()
        checked = lab.mini.inv("gateway", "--json").ok()
    assert _receipt(done)["aliases"][0]["alias"] == ALIAS
    codes = [f["code"] for f in checked.json["hosts"][0]["findings"] if f["port"] == quick.port]
    assert codes == ["pattern"], str(checked)


def test_default_model_is_refused_for_engines_without_it(quick: Place, openai_server: Path, tmp_path: Path) -> None:
    lab, port = quick.lab, str(quick.port)
    fake = install_engine(lab.studio.folder / "bin")
    lab.configure(launch={"mlx-lm": [str(fake)], "mlx-openai-server": [str(openai_server), "launch"]})
    lab.mini.inv("init").ok()
    lab.mini.inv("set", "--model", OTHER, "--set", "engine=mlx-openai-server").ok()
    with _edited_config(quick, tmp_path, f"openai/{ALIAS}", "openai/default_model"):
        done = lab.mini.inv("load", "--model", QWEN, "--port", port).ok()
        checked = lab.mini.inv("gateway", "--json").ok()
        other = lab.mini.inv("load", "--model", OTHER, "--port", port, "--force", "--dry-run", "--json")
    assert "warning: the gateway sends the name 'default_model'" in done.stderr
    codes = [f["code"] for f in checked.json["hosts"][0]["findings"] if f["port"] == quick.port]
    assert codes == ["engine_name"], str(checked)
    assert (other.exit, other.json["hosts"][0]["error"]["code"]) == (3, "gateway_name"), str(other)


@pytest.mark.parametrize("text", ["include: 5\n", "", "- a\n", "model_list: [7]\ncredential_list: 7\n", "a: [\n"])
def test_unreadable_configuration_is_a_warning_at_the_load(quick: Place, tmp_path: Path, text: str) -> None:
    other = tmp_path / "router.yaml"
    other.write_text(text, encoding="utf-8")
    with _hosts(quick.lab, str(quick.gateway.config), str(other)):
        done = quick.lab.mini.inv("load", "--model", QWEN, "--port", str(quick.port), "--dry-run").ok()
    assert f"warning: {other}" in done.stderr and "names are not checked" in done.stderr


def test_overstated_context_is_a_warning_at_the_load(quick: Place, tmp_path: Path) -> None:
    with _edited_config(quick, tmp_path, "mode: chat\n", "mode: chat\n    max_input_tokens: 4096\n"):
        done = quick.lab.mini.inv("load", "--model", QWEN, "--port", str(quick.port)).ok()
    warning = f"warning: the gateway promises 4096 input tokens on port {quick.port}; this model takes 2048"
    assert warning in done.stderr


def test_failed_receipt_is_a_warning_with_details(quick: Place) -> None:
    lab, port = quick.lab, str(quick.port)
    done = lab.mini.inv(
        *("load", "--model", QWEN, "--port", port, "--json"), env={"LITELLM_MASTER_KEY": "sk-not-the-key"}
    ).ok()
    (result,) = _receipt(done)["aliases"]
    assert not result["ok"]
    assert result["detail"]
    assert f"warning: no answer for {ALIAS} through" in done.stderr
    assert "sk-not-the-key" not in done.stdout + done.stderr


@contextmanager
def _edited_config(place: Place, folder: Path, old: str, new: str) -> Iterator[Path]:
    """Let the Mini read an edited copy of the gateway's configuration."""
    other = folder / "router.yaml"
    other.write_text(place.gateway.config.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    with _hosts(place.lab, str(place.gateway.config), str(other)):
        yield other


@contextmanager
def _hosts(lab: Homelab, old: str, new: str) -> Iterator[None]:
    """Edit the Mini's hosts.yaml for a while."""
    hosts = lab.mini.home / ".config" / "mlxops" / "hosts.yaml"
    right = hosts.read_text(encoding="utf-8")
    hosts.write_text(right.replace(old, new), encoding="utf-8")
    try:
        yield
    finally:
        hosts.write_text(right, encoding="utf-8")


def _result(done: Completed) -> Any:
    return done.json["hosts"][0]["result"]


def _receipt(done: Completed) -> Any:
    return _result(done)["gateway"]


@pytest.mark.parametrize("engine_name", ["mlx-lm", pytest.param("mlx-openai-server", marks=pytest.mark.long)])
def test_speed_through_the_gateway_is_compared_with_that_of_the_server(empty: Place, engine_name: str) -> None:
    lab, port = empty.lab, str(empty.port)
    lab.mini.inv("init").ok()
    lab.mini.inv("set", "--model", QWEN, "--set", f"engine={engine_name}").ok()
    try:
        lab.mini.inv("load", "--model", QWEN, "--port", port, timeout=300).ok()
        done = lab.mini.inv("measure", "--through", "--rounds", "1", "--streams", "1", "--json", timeout=300).ok()
    finally:
        lab.mini.inv("set", "--model", QWEN, "--set", "engine=").ok()
    direct, through = done.json["hosts"][0]["ports"]
    assert (direct["through"], through["through"]) == (None, empty.gateway.url)
    assert direct["engine"] == through["engine"] == engine_name
    assert direct["not_measured"] is through["not_measured"] is None and not through["missing"]
    before = {(each["prompt"], each["cache"], each["metric"]): each for each in direct["figures"]}
    for figure in through["figures"]:
        same = before.get((figure["prompt"], figure["cache"], figure["metric"]))
        assert figure["before"] == (same and same["median"])
        assert same is None or figure["prompt_tokens"] == pytest.approx(same["prompt_tokens"], rel=0.1)
    answer = f"measure: {ALIAS} through {empty.gateway.url}, round 1 of 1"
    assert answer in done.stderr
    runs = [json.loads(line) for line in (lab.studio.state / "measure.jsonl").read_text().splitlines()]
    recorded = [each for each in runs if each["engine"] == engine_name]
    assert len(recorded) == 1, "only the server itself is recorded"


def test_key_that_the_gateway_refuses_is_not_shown_by_a_measure(quick: Place) -> None:
    with_fake(quick.lab, "studio", "--fake-rate", "400")
    quick.lab.mini.inv("init").ok()
    quick.lab.mini.inv("load", "--model", QWEN, "--port", str(quick.port)).ok()
    words = ("measure", "--through", "--rounds", "1", "--streams", "1")
    for key, why in (("sk-wrong-4f1c77", "it answered 4"), ("sk-wrong-4f1c77\u2713", "no HTTP header can hold")):
        done = quick.lab.mini.inv(*words, env={"LITELLM_MASTER_KEY": key}).ok()
        assert why in done.stdout
        assert "4f1c77" not in done.stdout + done.stderr
