"""Gateway files and agents' results for the tests of mlxops.control.gateway."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from mlxops.control.client import HostTarget
from mlxops.control.gateway.config import GatewayConfig
from mlxops.control.gateway.config import read as read_files
from mlxops.control.inventory import Gateway
from mlxops.core.commands.gateway import ServedPort, ServedPorts
from mlxops.core.replies import HostReply
from mlxops.core.settings import PortRange, Settings, SlotOptions

ENTRY = """\
model_list:
  - model_name: jerry-xl
    litellm_params:
      model: openai/jerry-xl
      api_base: http://127.0.0.1:8100/v1
      api_key: none
"""
SERVED = ServedPort(
    port=8100,
    alias="jerry-xl",
    state="ready",
    owner="mlxops",
    model="tiny",
    answers_to="jerry-xl",
    also_answers_to=(),
    answers_to_any=False,
    drops_for_others=True,
    not_asked=None,
    paths=(),
    context_length=2048,
    assigned=True,
    detail="",
)


def read_config(folder: Path, text: str | bytes, env: str | None = None) -> GatewayConfig:
    """Write the files of a gateway, and read them."""
    config = folder / "router.yaml"
    config.write_bytes(text if isinstance(text, bytes) else text.encode())
    if env is not None:
        (folder / "local.env").write_text(env, encoding="utf-8")
    return read_files(Gateway(str(config), str(folder / "local.env") if env is not None else None, None, "KEY"))


def target() -> HostTarget:
    settings = Settings(
        address="127.0.0.1",
        ports=PortRange(8100, 8101),
        slots={8100: "jerry-xl"},
        slot_options={8100: SlotOptions(hold=0)},
    )
    return HostTarget("studio", None, ("python",), settings)


def served(**changes: Any) -> HostReply[ServedPorts]:
    """Return the agent's reply for a port that is as it should be, unless changed."""
    return HostReply("studio", ServedPorts((replace(SERVED, **changes),), None))
