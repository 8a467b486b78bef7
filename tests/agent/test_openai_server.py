"""mlx-openai-server in its real versions: the options of each, and serving under the alias."""

from __future__ import annotations

import http.client
import json
import socket
from pathlib import Path
from typing import Any

import pytest

from mlxops.agent.engines.base import EngineCommand, ServerSpec
from mlxops.agent.engines.mlx_openai_server import MlxOpenAIServer, known_options
from mlxops.core.errors import Refused
from mlxops.core.model_options import Option, Origin
from mlxops.core.registry import Model
from tests.lab import cache, models
from tests.lab.homelab import Homelab, Studio
from tests.lab.world import wait_until

NAME = "tiny-org/tiny-qwen3"
ENGINE = MlxOpenAIServer()

VERSIONS = [
    pytest.param(
        (version, ""), id=version, marks=[pytest.mark.all_engines] if version != cache.OPENAI_SERVERS[0] else []
    )
    for version in cache.OPENAI_SERVERS
]


def office(lab: Homelab, program: Path) -> Studio:
    """Return the lab's studio with mlx-openai-server as its engine."""
    launch = {**lab.studio.settings["launch"], "mlx-openai-server": [str(program), "launch"]}  # type: ignore[dict-item]
    lab.configure(engine="mlx-openai-server", launch=launch)
    return lab.studio


def nothing_left(studio: Studio, port: int) -> None:
    """Check that no server is left, and after a moment no process of the command."""
    assert not studio.listening(port)
    assert not [each for each in studio.processes() if "mlxops.agent" not in each.command]
    wait_until(lambda: not studio.processes(), 30, "the end of the command's processes")


class Stream:
    """A completion that streams until it is stopped."""

    def __init__(self, studio: Studio, port: int, max_tokens: int) -> None:
        self.connection = http.client.HTTPConnection(studio.address, port, timeout=60)
        body = {
            "model": studio.slots.get(port),
            "messages": [{"role": "user", "content": "say hello"}],
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
        }
        self.connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        self.socket = self.connection.sock
        self.response = self.connection.getresponse()
        line = b"-"
        while line and not line.startswith(b"data:"):  # before it, comments and empty lines
            line = self.response.readline()
        assert line, "it streams"

    def rest(self) -> bytes:
        """Return the data until the stream ends or breaks."""
        try:
            return self.response.read()
        except (OSError, http.client.HTTPException) as error:
            return getattr(error, "partial", b"")

    def hang_up(self) -> None:
        """Close the connection at once, also for a thread that waits for a token. A model may generate only tokens that
        are not sent, so the wait may be long."""
        self.socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.response.close()
        self.connection.close()


@pytest.mark.parametrize("server", VERSIONS)
@pytest.mark.timeout(600)
def test_server_has_the_alias_and_stops_with_open_streams(
    homelab: Homelab, openai_server: Path, server: tuple[str, str]
) -> None:
    version = server[0]
    studio, port = office(homelab, openai_server), homelab.studio.ports[0]
    studio.install(NAME, models.QWEN)
    studio.mlxctl("init").ok()

    loaded = studio.mlxctl("load", NAME, str(port), "--json", timeout=300).ok().json["hosts"][0]["result"]

    assert (loaded["state"], loaded["alias"]) == ("ready", "jerry-xl")
    assert studio.completion(port, "jerry-xl")["choices"][0]["message"]
    argv = " ".join(json.loads((studio.state / "run" / f"{port}.json").read_text())["argv"])
    assert ("--served-model-name jerry-xl" in argv) == (version not in {"1.4.2", "1.5.1"})
    assert "--tool-call-parser qwen3 --reasoning-parser qwen3 --enable-auto-tool-choice" in argv
    assert studio.registry()["models"][NAME].keys() == {"repo_id", "model_id", "cache_path", "format", "port"}
    row = studio.mlxctl("status", "--json").ok().json["hosts"][0]["ports"][0]
    assert (row["state"], row["engine"], row["engine_version"]) == ("ready", "mlx-openai-server", version)

    stream = Stream(studio, port, 1_000_000)
    try:
        unloaded = studio.mlxctl("unload", str(port), "--drain", "1").ok()
    finally:
        stream.close()
    assert "open requests did not end within 1 s and are cut off" in unloaded.stderr
    assert "killed" not in unloaded.stderr
    nothing_left(studio, port)


@pytest.mark.parametrize("server", VERSIONS)
@pytest.mark.timeout(600)
def test_failed_load_is_never_ready_and_leaves_no_process(
    homelab: Homelab, openai_server: Path, server: tuple[str, str]
) -> None:
    studio, port = office(homelab, openai_server), homelab.studio.ports[0]
    studio.install("tiny-org/broken", models.BROKEN)
    studio.mlxctl("init").ok()

    failed = studio.mlxctl("load", "tiny-org/broken", str(port), timeout=300)

    assert failed.exit == 4 and "Missing 1 parameters" in failed.stderr
    nothing_left(studio, port)
    assert studio.registry()["models"]["tiny-org/broken"]["port"] is None


@pytest.mark.all_engines
@pytest.mark.parametrize("server", [("1.4.2", "transformers>=5")], ids=["1.4.2 with transformers 5"])
@pytest.mark.timeout(600)
def test_healthy_server_without_completions_is_never_ready(
    homelab: Homelab, openai_server: Path, server: tuple[str, str]
) -> None:
    """It lists its model and answers /health with 200, but each completion is a 500. An old version called it ready."""
    studio, port = office(homelab, openai_server), homelab.studio.ports[0]
    studio.install(NAME, models.QWEN)
    studio.mlxctl("init").ok()

    failed = studio.mlxctl("load", NAME, str(port), timeout=300)

    assert failed.exit == 4 and "it answered 500" in failed.stderr
    nothing_left(studio, port)
    assert studio.registry()["models"][NAME]["port"] is None


@pytest.mark.timeout(120)
def test_unknown_parser_is_refused_before_a_server_stops(homelab: Homelab, openai_server: Path) -> None:
    studio, port = office(homelab, openai_server), homelab.studio.ports[0]
    studio.install(NAME, models.QWEN)
    studio.install("tiny-org/tiny-llama", models.LLAMA)
    studio.mlxctl("init").ok()
    studio.mlxctl("set", "--model", "tiny-org/tiny-llama", "--set", "engine=mlx-lm").ok()
    studio.mlxctl("load", "tiny-org/tiny-llama", str(port)).ok()
    refused_set = studio.mlxctl("set", "--model", NAME, "--set", "tool_call_parser=nonsense")
    _by_hand(studio, NAME, tool_call_parser="nonsense")
    before = studio.mlxctl("status", "--json").ok().json["hosts"][0]["ports"][0]

    refused = studio.mlxctl("load", NAME, str(port), "--force")

    for each in (refused_set, refused):
        assert each.exit == 3 and "has no tool_call_parser 'nonsense'" in each.stderr and "qwen3_moe" in each.stderr
    after = studio.mlxctl("status", "--json").ok().json["hosts"][0]["ports"][0]
    assert (after["pid"], after["state"]) == (before["pid"], "ready")
    assert len(list((studio.state / "engines").iterdir())) == 2, "each engine is asked once, and remembered"
    studio.mlxctl("unload", str(port)).ok()


def _by_hand(studio: Studio, name: str, **fields: object) -> None:
    document = studio.registry()
    document["models"][name].update(fields)
    studio.registry_path.write_text(json.dumps(document), encoding="utf-8")


# -- options ---------------------------------------------------------------------------------------------------------

HELP_1_4 = """\
  --model-path TEXT               Path to the model (required for lm,
                                  multimodal model types).
  --tool-call-parser [qwen3|glm4_moe|harmony]
                                  Specify tool call parser, see
                                  --served-model-name elsewhere
  --reasoning-parser [qwen3|harmony]
  --max-tokens INTEGER            Default maximum number of tokens.
  --help                          Show this message and exit.
"""


def serving(tmp_path: Path, *options: Option, **fields: Any) -> ServerSpec:
    return ServerSpec(Model("m", "org/m", **fields), "jerry-xl", tmp_path, "127.0.0.1", 8100, tmp_path, options)


def registered(key: str, value: str) -> Option:
    return Option(key, value, Origin.REGISTRY)


def argv(command: EngineCommand, served: ServerSpec) -> str:
    return " ".join(ENGINE.argv(command, served))


def test_options_and_values_are_read_from_the_help() -> None:
    known = known_options(HELP_1_4)
    assert known["--tool-call-parser"] == ("qwen3", "glm4_moe", "harmony")
    assert known["--model-path"] == () and "--served-model-name" not in known


@pytest.mark.parametrize(("version", "named"), [("1.4.2", False), ("1.6.3", False), ("1.7.0", True), ("1.10.1", True)])
def test_served_name_is_passed_to_versions_that_have_it(tmp_path: Path, version: str, named: bool) -> None:
    assert ("--served-model-name" in argv(EngineCommand(("x", "launch"), "PATH", version), serving(tmp_path))) is named


def test_help_decides_if_the_version_is_unknown(tmp_path: Path) -> None:
    behind_uv = EngineCommand(("uv", "run", "x", "launch"), "uv run")
    assert ENGINE.help_argv(behind_uv, serving(tmp_path)) == ("uv", "run", "x", "launch", "--help")
    known = EngineCommand(behind_uv.argv, behind_uv.source, None, HELP_1_4)
    assert "--served-model-name" not in argv(known, serving(tmp_path))


def test_help_is_not_read_without_need(tmp_path: Path) -> None:
    plain = EngineCommand(("x", "launch"), "PATH", "1.8.1")
    assert ENGINE.help_argv(plain, serving(tmp_path)) == ()
    assert ENGINE.help_argv(plain, serving(tmp_path, registered("reasoning_parser", "qwen3"))) != ()


def test_model_options_become_flags(tmp_path: Path) -> None:
    options = (
        registered("tool_call_parser", "qwen3"),
        registered("chat_template", "/t.jinja"),
        registered("model_type", "multimodal"),
        Option("reasoning_parser", None, Origin.REGISTRY),
    )
    served = serving(tmp_path, *options, context_length=4096, trust_remote_code=True, args=("--max-tokens", "9"))
    assert argv(EngineCommand(("x", "launch"), "PATH", "1.8.1", HELP_1_4.replace("glm4", "x")), served).endswith(
        "--no-log-file --model-type multimodal --chat-template-file /t.jinja --tool-call-parser qwen3 "
        "--enable-auto-tool-choice --context-length 4096 --trust-remote-code --max-tokens 9"
    )


def test_models_own_args_replace_family_defaults(tmp_path: Path) -> None:
    family = Option("reasoning_parser", "qwen3", Origin.FAMILY)
    words = argv(
        EngineCommand(("x",), "PATH", "1.8.1"), serving(tmp_path, family, args=("--reasoning-parser=harmony",))
    )
    assert "--reasoning-parser qwen3" not in words and words.endswith("--reasoning-parser=harmony")


@pytest.mark.parametrize(
    "word",
    [
        *(
            "--port",
            "--port=9",
            "--po",
            "--host",
            "--model-path=/x",
            "--model-p",
            "--served-model-name",
            "--config=a.yaml",
        ),
        *("--log-file", "--log-f=x", "--no-log-file", "--trust-remote-code", "--trust"),
    ],
)
def test_reserved_flags_are_refused_in_every_form(tmp_path: Path, word: str) -> None:
    with pytest.raises(Refused, match="args contain"):
        ENGINE.argv(EngineCommand(("x",), "PATH", "1.8.1"), serving(tmp_path, args=(word, "1")))


def test_process_that_prints_help_is_not_a_server() -> None:
    assert ENGINE.recognise(["python", "/x/mlx-openai-server", "launch", "--model-path", "/m", "--port", "8100"])
    assert ENGINE.recognise(["python", "/x/mlx-openai-server", "launch", "--help"]) is None


def test_other_flags_are_passed_on(tmp_path: Path) -> None:
    assert "--max-tokens=5 --seed 1" in argv(
        EngineCommand(("x",), "PATH", "1.8.1"), serving(tmp_path, args=("--max-tokens=5", "--seed", "1"))
    )


def test_server_is_stopped_with_its_child_processes(homelab: Homelab, openai_server: Path) -> None:
    """Cancelled while it loads: it ignores SIGTERM, and its child holds the memory."""
    studio, port = office(homelab, openai_server), homelab.studio.ports[0]
    studio.install(NAME, models.QWEN)
    studio.mlxctl("init").ok()
    failed = studio.mlxctl("load", NAME, str(port), "--timeout", "4")
    assert failed.exit == 4 and "did not answer within 4 s" in failed.stderr
    nothing_left(studio, port)
