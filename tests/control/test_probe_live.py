"""`probe` on the real engines: over SSH, locally, and through a real LiteLLM.

    pytest tests/control/test_probe_live.py -s     also prints the tables

The models are tiny and random, so they follow no system prompt and call no tools. What a server does is real.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lab import cache, leaks, models
from tests.lab.homelab import Completed, Homelab, LabUnavailable
from tests.lab.litellm import LiteLLM
from tests.lab.quick import install_engine
from tests.lab.sshd import missing
from tests.steps import register

pytestmark = pytest.mark.timeout(600)

OF_THE_SERVER = ("tokens", "stream", "cancel")
"""Checks that a server passes whatever its model says. A random model may even say markup."""
SHARED = """\
- model_name: shared
  litellm_params: {{model: openai/default_model, api_base: "http://{address}:{port}/v1", api_key: none}}
"""
QWEN, LLAMA = f"tiny-org/{models.QWEN}", f"tiny-org/{models.LLAMA}"


@pytest.fixture(scope="module")
def lab(
    litellm: Path, engine: Path, tiny_models: Path, watch: leaks.Watch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Homelab]:
    """A studio that serves with mlx-lm, with mlx-openai-server if this Python has it, and with the fake engine, each on
    a port of its own, and the gateway in front of them."""
    folder = tmp_path_factory.mktemp("probe")
    try:
        made = Homelab(folder / "lab")
    except LabUnavailable as error:
        missing(str(error))
    with watch.spare(folder), made:
        lm, *others = made.studio.ports
        launch = {"mlx-lm": [str(engine / "bin" / "mlx_lm.server")]}
        if cache.has_openai_server():
            launch["mlx-openai-server"] = [str(cache.openai_server_venv() / "bin" / "mlx-openai-server"), "launch"]
        made.configure(launch=launch)
        register(made.studio, "small", repo=QWEN, checks=[])
        load(made, "small", lm)
        if cache.has_openai_server():
            register(made.studio, "big", repo=LLAMA, engine="mlx-openai-server")
            load(made, "big", others[0])
        made.configure(launch={"mlx-lm": [str(install_engine(made.studio.folder / "bin"))]})
        register(made.studio, "good")
        load(made, "good", others[1])
        entries = made.mini.inv("gateway", "--print").ok().stdout
        both = "".join(SHARED.format(address=made.studio.address, port=port) for port in (lm, others[1]))
        with LiteLLM(folder / "litellm", entries.replace("model_list:\n", f"model_list:\n{both}")) as gateway:
            (gateway.folder / "local.env").write_text(f"LITELLM_MASTER_KEY={gateway.key}\n", encoding="utf-8")
            made.configure_gateway(
                config=str(gateway.config),
                env=str(gateway.folder / "local.env"),
                url=gateway.url,
                key_env="LITELLM_MASTER_KEY",
            )
            yield made
            made.mini.inv("unload-all", "--yes").ok()


def load(lab: Homelab, model: str, port: int) -> None:
    lab.mini.inv("load", "--model", model, "--port", str(port), timeout=300).ok()


@pytest.mark.parametrize("way", ["ssh", "local", "through"])
def test_real_engines_have_their_verdicts(lab: Homelab, way: str) -> None:
    if way == "local":
        done = lab.studio.mlxctl("probe", timeout=500)
        last = lab.studio.mlxctl("probe", "--last", "--json")
    else:
        flags = ("--through",) if way == "through" else ()
        done = lab.mini.inv("probe", *flags, timeout=500)
        last = lab.mini.inv("probe", "--json", *(flags or ("--last",)), timeout=500)
    sys.stdout.write(f"\n{way}:\n{done.stdout}{done.stderr}")
    ports = by_port(last)
    assert len(ports) == (3 if cache.has_openai_server() else 2), str(done)
    for port, verdicts in ports.items():
        assert {check: verdicts[check] for check in OF_THE_SERVER} == dict.fromkeys(OF_THE_SERVER, "pass"), port
        # A tiny model's stream may end too early to tell; on a busy machine, before the second request is answered.
        assert verdicts["parallel"] in {"pass", "skip", "warn"}, port
        assert {check for check, verdict in verdicts.items() if verdict == "fail"} <= {"markup"}
    good = ports[lab.studio.ports[2]]
    assert {verdict for check, verdict in good.items() if check not in ("json", "parallel")} == {"pass"}, good
    assert ports[lab.studio.ports[0]]["length"] == "pass", "mlx-lm says when an answer is cut"


def test_name_of_several_servers_is_not_asked_for(lab: Homelab) -> None:
    rows = through(lab).json["hosts"][0]["ports"]
    (shared,) = (row for row in rows if row["name"] == "shared")
    assert "several servers" in shared["not_asked"] and not shared["verdicts"]


def test_key_that_the_gateway_refuses_is_not_shown(lab: Homelab) -> None:
    done = through(lab, LITELLM_MASTER_KEY="sk-wrong-4f1c77")
    # Without a database LiteLLM says that it cannot look the key up.
    assert done.exit == 3 and "it answered 400" in done.stdout and "No connected db" in done.stdout
    assert "4f1c77" not in done.stdout + done.stderr


def through(lab: Homelab, **env: str) -> Completed:
    """Check one port through the gateway."""
    return lab.mini.inv("probe", "--through", "--json", "--port", str(lab.studio.ports[2]), env=env, timeout=500)


def by_port(done: Completed) -> dict[int, dict[str, Any]]:
    rows = done.json["hosts"][0]["ports"]
    return {
        row["port"]: {each["check"]: each["verdict"] for each in row["verdicts"]} for row in rows if row["verdicts"]
    }
