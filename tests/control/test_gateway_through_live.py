"""Probes through the real LiteLLM harm no server: a real mlx-lm keeps its weights with any entries.

The tests move its weights away once it serves: it continues from memory until it must load again. The gateway has
a cache, a fallback and a cool-down, entries under other names, a pattern, a synonym, and a wrong name in an entry.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.control.test_gateway_live import _hosts
from tests.control.test_gateway_probe import COMPLETION
from tests.lab import leaks, models
from tests.lab.homelab import Homelab, LabUnavailable
from tests.lab.litellm import LiteLLM
from tests.lab.sshd import missing

pytestmark = pytest.mark.timeout(600)

QWEN = "tiny-org/tiny-qwen3"
ENTRIES = """\
model_list:
  - model_name: qwen-coder
    litellm_params: {{model: openai/jerry-xl, api_base: "http://{address}:{port}", api_key: none}}
  - model_name: the-loaded-one
    litellm_params: {{model: openai/default_model, api_base: "http://{address}:{port}/v1/", api_key: none}}
  - model_name: wrong
    litellm_params: {{model: openai/other-name, api_base: "http://{address}:{port}/v1", api_key: none}}
  - model_name: "jerry-*"
    litellm_params: {{model: "openai/jerry-*", api_base: "http://{address}:{port}/v1", api_key: none}}
  # LiteLLM lists this as hundreds of names, one for each of OpenAI's models that it knows.
  - model_name: "studio/*"
    litellm_params: {{model: "openai/*", api_base: "http://{address}:{port}/v1", api_key: none}}
  - model_name: spare
    litellm_params: {{model: openai/spare, api_base: "http://127.0.0.1:{spare}/v1", api_key: none}}
litellm_settings: {{cache: true, cache_params: {{type: local}}}}
router_settings:
  model_group_alias: {{nick: qwen-coder}}
  fallbacks: [{{qwen-coder: [spare]}}]
  num_retries: 0
  allowed_fails: 0
  cooldown_time: 4
"""


class Place:
    def __init__(self, lab: Homelab, gateway: LiteLLM) -> None:
        self.lab, self.gateway = lab, gateway
        self.studio, self.port = lab.studio, lab.studio.ports[0]

    def load(self) -> Any:
        done = self.lab.mini.inv("load", "--model", QWEN, "--port", str(self.port), "--json").ok()
        return done.json["hosts"][0]["result"]

    def through(self) -> tuple[int, Any]:
        """Return the exit status, and the row of the port with all findings."""
        done = self.lab.mini.inv("gateway", "--through", "--json")
        assert done.exit in {0, 3}, str(done)
        (host,) = done.json["hosts"]
        row = next(row for row in host["aliases"] if row["port"] == self.port)
        return done.exit, {**row, "findings": host["findings"]}

    def completions(self) -> int:
        """Return how many completion requests the server has had."""
        return (self.studio.state / "logs" / f"{self.port}.log").read_text().count("chat/completions HTTP")

    def completion(self) -> Any:
        return self.studio.completion(self.port, "jerry-xl")["choices"][0]["message"]


class _Spare(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(COMPLETION)

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""


@pytest.fixture(scope="module")
def place(
    litellm: Path, engine: Path, tiny_models: Path, watch: leaks.Watch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("asking")
    try:
        lab = Homelab(folder / "lab")
    except LabUnavailable as error:
        missing(str(error))
    spare = ThreadingHTTPServer(("127.0.0.1", 0), _Spare)
    thread = threading.Thread(target=spare.serve_forever, args=(0.05,))
    with watch.spare(folder), lab:
        thread.start()
        try:
            lab.studio.install(QWEN, models.QWEN)
            where = {"address": lab.studio.address, "port": lab.studio.ports[0], "spare": spare.server_address[1]}
            with LiteLLM(folder / "litellm", ENTRIES.format(**where)) as gateway:
                (gateway.folder / "local.env").write_text(f"LITELLM_MASTER_KEY={gateway.key}\n", encoding="utf-8")
                lab.configure_gateway(
                    config=str(gateway.config),
                    env=str(gateway.folder / "local.env"),
                    url=gateway.url,
                    key_env="LITELLM_MASTER_KEY",
                )
                lab.studio.mlxctl("init").ok()
                yield Place(lab, gateway)
        finally:
            spare.shutdown()
            spare.server_close()
            thread.join()


@pytest.fixture(scope="module")
def served(place: Place) -> Iterator[Place]:
    """Load the model, without the gateway in hosts.yaml: the wrong entry would refuse the load."""
    hosts = place.lab.mini.home / ".config" / "mlxops" / "hosts.yaml"
    original = hosts.read_text(encoding="utf-8")
    hosts.write_text(original.partition("gateway:")[0], encoding="utf-8")
    try:
        place.load()
    finally:
        hosts.write_text(original, encoding="utf-8")
    yield place
    place.lab.mini.inv("unload-all", "--yes").ok()


def test_probes_leave_the_server_its_weights(served: Place) -> None:
    lab, (weights,) = served.lab, _weights(served)
    weights.rename(served.studio.folder / "weights")
    try:
        before = served.completions()
        exit, row = served.through()
        assert exit == 3 and "wrong_name" in row["verdict"]
        names = {"qwen-coder", "the-loaded-one", "nick", "jerry-xl", "studio/jerry-xl"}
        assert {each["alias"] for each in row["passages"]} == names
        assert all(each["ok"] for each in row["passages"]), row
        assert set(row["skipped"]) == {"wrong"}
        assert not [each for each in row["findings"] if each["code"].startswith("through")]

        again = served.load()
        assert again["changed"] is False
        assert all(each["ok"] for each in again["gateway"]["aliases"]), again
        assert "'other-name'" in again["gateway"]["skipped"]["wrong"]
        # No answer came from the cache: each probe was a completion of the server.
        asked = len(row["passages"]) + len(again["gateway"]["aliases"])
        assert served.completions() == before + asked

        # After an edit without a restart, the running gateway's entries count.
        wrong = served.gateway.config
        other = wrong.with_name("corrected.yaml")
        other.write_text(wrong.read_text().replace("openai/other-name", "openai/jerry-xl"))
        with _hosts(lab, str(wrong), str(other)):
            _, row = served.through()
        (stale,) = [each for each in row["findings"] if each["code"] == "through_not_asked"]
        assert (stale["alias"], stale["severity"]) == ("wrong", "fault")
        assert stale["hint"].startswith("restart the gateway, once")

        # Without its files, the running gateway reports its entries.
        with _hosts(lab, f"  config: {wrong}\n", ""):
            _, row = served.through()
        assert "qwen-coder" in row["names"] and set(row["skipped"]) == {"wrong"}
        assert served.completion(), "it still has its weights"
    finally:
        (served.studio.folder / "weights").rename(weights)


def test_receipt_waits_for_the_alias_while_a_fallback_answers(served: Place) -> None:
    lab, port = served.lab, str(served.port)
    lab.mini.inv("unload", "--port", port).ok()
    for _ in range(2):
        assert served.gateway.ask("qwen-coder").text == "hi", "clients get the fallback's answer at first"
    config = served.gateway.config
    right = config.with_name("right.yaml")
    right.write_text("\n".join(config.read_text().splitlines()[:3]))  # the first entry alone: it does not refuse a load
    with _hosts(lab, str(config), str(right)):
        loaded = served.load()
    receipt = {each["alias"]: each for each in loaded["gateway"]["aliases"]}
    assert receipt["qwen-coder"]["ok"], loaded["gateway"]
    assert served.studio.address in receipt["qwen-coder"]["api_base"]


def _weights(place: Place) -> list[Path]:
    entry = place.studio.registry()["models"][QWEN]
    return list(Path(entry["cache_path"]).glob("*.safetensors"))
