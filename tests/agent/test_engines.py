"""The engines: finding them, their command lines, recognising their processes, and probes."""

from __future__ import annotations

import itertools
import os
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from mlxops.agent.engines import ENGINES, engine_named, mlx_openai_server, recognise
from mlxops.agent.engines.argv import long_options
from mlxops.agent.engines.base import DetectedServer, Engine, EngineCommand, ServedNames, ServerSpec
from mlxops.agent.engines.inspection import inspect_command
from mlxops.agent.engines.installation import find_program
from mlxops.agent.engines.mlx_lm import MlxLm
from mlxops.agent.engines.mlx_openai_server import MlxOpenAIServer
from mlxops.agent.state.store import Store
from mlxops.common.http import NoCompletion, get_status, request_completion
from mlxops.core.completion import Completion
from mlxops.core.errors import Refused
from mlxops.core.model_options import options_of
from mlxops.core.registry import Model

OPENAI, LM = MlxOpenAIServer(), MlxLm()


@pytest.fixture(autouse=True)
def _no_engine_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide engines that are installed on this machine."""
    monkeypatch.setattr("mlxops.agent.engines.installation.USUAL_FOLDERS", ())
    monkeypatch.setattr(mlx_openai_server, "UV_PROJECT", str(tmp_path / "opt" / "mlx-launch"))
    monkeypatch.setattr(mlx_openai_server, "HOMEBREW_UV", str(tmp_path / "homebrew" / "uv"))


def program(path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return str(path)


def serving(**fields: object) -> ServerSpec:
    model = Model("jerry", "org/jerry", **fields)  # type: ignore[arg-type]  # as each test says
    options = options_of(model, "mlx-openai-server", None, (), needed=())
    return ServerSpec(model, "jerry-xl", Path("/hub/a b/sha"), "127.0.0.1", 8100, Path("/state/run/8100"), options)


# -- finding an engine ---------------------------------------------------------------------------------------------


@pytest.fixture
def all_installed(tmp_path: Path) -> dict[str, str]:
    """Install the engine in each place where it is searched for. Return the host's environment."""
    program(tmp_path / "path" / "mlx-openai-server")
    program(tmp_path / "path" / "uv")
    program(tmp_path / "homebrew" / "uv")
    program(tmp_path / "mine" / "engine")
    (tmp_path / "opt" / "mlx-launch").mkdir(parents=True)
    return {
        "PATH": str(tmp_path / "path"),
        "HOME": str(tmp_path / "home"),
        "MLX_LAUNCH_CMD": f"'{tmp_path}/mine/engine' launch --log-level 'a b'",
    }


def test_command_is_searched_in_a_fixed_order(tmp_path: Path, all_installed: dict[str, str]) -> None:
    uv_run = ("run", "--project", str(tmp_path / "opt" / "mlx-launch"), "mlx-openai-server", "launch")
    configured = program(tmp_path / "configured")
    assert OPENAI.find_command([configured, "go"], all_installed) == EngineCommand(
        (configured, "go"), "`launch` in hosts.yaml"
    )
    mine = (f"{tmp_path}/mine/engine", "launch", "--log-level", "a b")
    assert OPENAI.find_command([], all_installed) == EngineCommand(mine, "MLX_LAUNCH_CMD")
    del all_installed["MLX_LAUNCH_CMD"]
    assert OPENAI.find_command([], all_installed) == EngineCommand(
        (f"{tmp_path}/path/mlx-openai-server", "launch"), "PATH"
    )
    (tmp_path / "path" / "mlx-openai-server").unlink()
    assert OPENAI.find_command([], all_installed).argv == (f"{tmp_path}/path/uv", *uv_run)
    (tmp_path / "path" / "uv").unlink()
    assert OPENAI.find_command([], all_installed).argv == (f"{tmp_path}/homebrew/uv", *uv_run)
    (tmp_path / "homebrew" / "uv").unlink()
    with pytest.raises(Refused) as caught:
        OPENAI.find_command([], all_installed)
    assert caught.value.code == "engine_not_found"
    assert "MLX_LAUNCH_CMD" in caught.value.why and "MLX_LAUNCH_CMD" in caught.value.hint


def test_uv_without_its_project_is_not_an_engine(tmp_path: Path, all_installed: dict[str, str]) -> None:
    del all_installed["MLX_LAUNCH_CMD"]
    (tmp_path / "path" / "mlx-openai-server").unlink()
    (tmp_path / "opt" / "mlx-launch").rmdir()
    with pytest.raises(Refused):
        OPENAI.find_command([], all_installed)


@pytest.mark.parametrize("folder", [".local/bin", "bin"])
def test_folders_of_the_user_are_searched(tmp_path: Path, folder: str) -> None:
    found = program(tmp_path / "home" / folder / "mlx-openai-server")
    assert OPENAI.find_command([], {"HOME": str(tmp_path / "home"), "PATH": "/nowhere"}).argv == (found, "launch")


def test_usual_folders_are_searched_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = program(tmp_path / "usual" / "mlx_lm.server")
    monkeypatch.setattr("mlxops.agent.engines.installation.USUAL_FOLDERS", (str(tmp_path / "usual"),))
    assert find_program("mlx_lm.server", {}) == usual
    nearer = program(tmp_path / "path" / "mlx_lm.server")
    assert LM.find_command([], {"PATH": str(tmp_path / "path")}) == EngineCommand((nearer,), "PATH")


@pytest.mark.parametrize("text", ["", "   ", "'open", '"', "# comment only'"])
def test_invalid_launch_command_is_refused(all_installed: dict[str, str], text: str) -> None:
    with pytest.raises(Refused) as caught:
        OPENAI.find_command([], {**all_installed, "MLX_LAUNCH_CMD": text})
    assert (
        caught.value.code in {"bad_launch_command", "engine_not_found"}
        and "MLX_LAUNCH_CMD" in str(caught.value.hint) + caught.value.why
    )


def test_launch_command_is_split_without_running_a_shell(tmp_path: Path, all_installed: dict[str, str]) -> None:
    text = f"{tmp_path}/mine/engine 'a b' \"c d\" e\\ f $(touch {tmp_path}/canary) ; rm"
    command = OPENAI.find_command([], {**all_installed, "MLX_LAUNCH_CMD": text})
    assert command.argv[1:4] == ("a b", "c d", "e f")
    assert command.argv[4:] == ("$(touch", f"{tmp_path}/canary)", ";", "rm")
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("engine", [OPENAI, LM], ids=lambda engine: engine.name)
def test_missing_configured_program_is_refused(tmp_path: Path, engine: Engine) -> None:
    plain = tmp_path / "not-executable"
    plain.write_text("")
    for path in (str(tmp_path / "missing"), str(tmp_path), str(plain), "no-such-program"):
        with pytest.raises(Refused) as caught:
            engine.find_command([path, "launch"], {"PATH": "/nowhere"})
        assert caught.value.code == "engine_not_found" and "hosts.yaml" in caught.value.why


def test_configured_command_may_use_home_and_path(tmp_path: Path) -> None:
    environ = {"HOME": str(tmp_path), "PATH": str(tmp_path / "path")}
    at_home = program(tmp_path / "venv" / "bin" / "python")
    assert LM.find_command(["~/venv/bin/python", "~/x"], environ).argv == (at_home, f"{tmp_path}/x")
    on_path = program(tmp_path / "path" / "uv")
    assert LM.find_command(["uv", "run"], environ).argv == (on_path, "run")


def test_missing_mlx_lm_hint_says_how_to_install_it() -> None:
    with pytest.raises(Refused) as caught:
        LM.find_command([], {"PATH": "/nowhere"})
    assert caught.value.code == "engine_not_found" and "uv tool install mlx-lm" in caught.value.hint


def test_unknown_engine_is_refused_with_the_known_ones() -> None:
    with pytest.raises(Refused) as caught:
        engine_named("vllm")
    assert caught.value.code == "unknown_engine" and "mlx-lm" in caught.value.why
    assert engine_named("mlx-lm").name == "mlx-lm"


class MinimalEngine(Engine):
    """All that a new engine has to define."""

    name = "third-one"
    program = "third-one"
    reserved = frozenset({"--port"})

    def argv(self, command: EngineCommand, spec: ServerSpec) -> tuple[str, ...]:
        return (*command.argv, "--port", str(spec.port))

    def recognise(self, argv: Sequence[str]) -> DetectedServer | None:
        return None

    def served_name(self, argv: Sequence[str]) -> str | None:
        return long_options(argv).get("--model")


def test_new_engine_defines_six_members(tmp_path: Path) -> None:
    engine = MinimalEngine()
    path = program(tmp_path / "path" / "third-one")
    assert engine.find_command([], {"PATH": str(tmp_path / "path")}) == EngineCommand((path,), "PATH")
    with pytest.raises(Refused) as caught:
        engine.find_command([], {"PATH": "/nowhere"})
    assert "uv tool install third-one" in caught.value.hint
    assert engine.distribution == "third_one" and not engine.finishes_requests([path]) and engine.needs == frozenset()
    assert engine.environment() == {"HF_HUB_OFFLINE": "1"} and engine.fatal_error("ValueError: x") is None
    assert engine.help_argv(EngineCommand(("x",), "PATH", "1.0"), serving(args=("--a",))) == ("x", "--help")
    assert engine.accepted_names(["x", "--model", "jerry"], None) == ServedNames(("jerry",))
    assert engine.accepted_names(["x"], None).not_asked


def test_help_of_an_engine_is_read_again_after_an_upgrade(tmp_path: Path) -> None:
    path = tmp_path / "bin" / "third-one"
    program(path)
    path.write_text('#!/bin/sh\nls "$(dirname "$0")/../lib/python3.12/site-packages"\n')
    site = tmp_path / "lib" / "python3.12" / "site-packages"
    (site / "third_one-1.0.dist-info").mkdir(parents=True)
    (tmp_path / "state").mkdir()
    store = Store(tmp_path / "state", tmp_path / "registry.json")

    def inspected() -> EngineCommand:
        command, spec = EngineCommand((str(path),), "PATH"), serving(args=("--a",))
        return inspect_command(MinimalEngine(), command, spec, os.environ, store, keep=True)

    assert (inspected().version, inspected().help) == ("1.0", "third_one-1.0.dist-info\n")
    (site / "third_one-1.0.dist-info").rename(site / "third_one-2.0.dist-info")
    assert (inspected().version, inspected().help) == ("2.0", "third_one-2.0.dist-info\n")


# -- the argv -------------------------------------------------------------------------------------------------------


def test_mlx_lm_serves_the_alias() -> None:
    assert LM.argv(EngineCommand(("/bin/mlx_lm.server",), ""), serving(args=("--temp", "0"))) == (
        *("/bin/mlx_lm.server", "--model", "jerry-xl", "--host", "127.0.0.1", "--port", "8100"),
        *("--temp", "0"),
    )


def test_alias_link_points_to_the_current_snapshot(tmp_path: Path) -> None:
    for number in (1, 2):
        snapshot = tmp_path / f"snapshot{number}"
        snapshot.mkdir()
        for alias in ("jerry-xl", "org/name"):
            LM.prepare_folder(ServerSpec(Model("m"), alias, snapshot, "127.0.0.1", 8100, tmp_path / "run"))
            assert os.readlink(tmp_path / "run" / alias) == str(snapshot)


def test_mlx_lm_refuses_options_that_it_does_not_have(tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{{ m }}")
    argv = LM.argv(
        EngineCommand(("x",), ""),
        serving(options={"chat_template": str(template), "reasoning_parser": None}, trust_remote_code=True),
    )
    assert argv[-3:] == ("--chat-template", "{{ m }}", "--trust-remote-code")
    with pytest.raises(Refused) as caught:
        LM.argv(EngineCommand(("x",), ""), serving(options={"tool_call_parser": "qwen3"}))
    assert caught.value.code == "unsupported_option" and "tool_call_parser" in caught.value.message


def test_mlx_openai_server_gets_path_alias_and_options() -> None:
    argv = OPENAI.argv(
        EngineCommand(("/bin/uv", "run", "mlx-openai-server", "launch"), ""),
        serving(
            options={"tool_call_parser": "qwen3_moe", "reasoning_parser": "qwen3", "chat_template": "/t.jinja"},
            context_length=4096,
            trust_remote_code=True,
            args=("--queue-size", "9"),
        ),
    )
    assert argv[:4] == ("/bin/uv", "run", "mlx-openai-server", "launch")
    assert argv[-2:] == ("--queue-size", "9") and "--trust-remote-code" in argv and "--no-log-file" in argv
    given, bare = long_options(argv), {"--trust-remote-code", "--no-log-file", "--enable-auto-tool-choice"}
    assert bare <= set(argv)
    assert {key: given[key] for key in given if key not in bare} == {
        "--model-path": "/hub/a b/sha",
        "--served-model-name": "jerry-xl",
        "--host": "127.0.0.1",
        "--port": "8100",
        "--model-type": "lm",
        "--chat-template-file": "/t.jinja",
        "--tool-call-parser": "qwen3_moe",
        "--reasoning-parser": "qwen3",
        "--context-length": "4096",
        "--queue-size": "9",
    }


def test_option_replaces_a_default_flag() -> None:
    bare = EngineCommand(("x",), "")
    assert long_options(OPENAI.argv(bare, serving()))["--model-type"] == "lm"
    assert (
        long_options(OPENAI.argv(bare, serving(options={"model_type": "multimodal"})))["--model-type"] == "multimodal"
    )
    assert "--model-type" not in OPENAI.argv(bare, serving(options={"model_type": None}))


@pytest.mark.parametrize("engine", [OPENAI, LM], ids=lambda engine: engine.name)
def test_unknown_argument_is_refused_with_a_suggestion(
    engine: Engine,
) -> None:
    command = EngineCommand(("x",), "", "1", "usage: x [--max-tokens N]\n  --max-tokens N  at most\n")
    for fine in (("--max-tokens", "-1"), ("--max-tok=7",), ("free", "-q")):
        assert engine.argv(command, serving(args=fine))[-len(fine) :] == fine
    with pytest.raises(Refused) as caught:
        engine.argv(command, serving(args=("--max-token", "7", "--mox-tokens", "7")))
    assert caught.value.code == "unknown_argument" and caught.value.hint.endswith("(did you mean --max-tokens?)")


@pytest.mark.parametrize("engine", [OPENAI, LM], ids=lambda engine: engine.name)
def test_remote_code_is_not_trusted_by_default(engine: Engine) -> None:
    assert "--trust-remote-code" not in engine.argv(EngineCommand(("x",), ""), serving())


@pytest.mark.parametrize("engine", [OPENAI, LM], ids=lambda engine: engine.name)
@pytest.mark.parametrize(
    "word",
    ["--port", "--port=1", "--por", "--po=1", "--host", "--hos=0.0.0.0", "--trust-remote-code", "--trust", "--trust-r"],
)
def test_reserved_argument_is_refused(engine: Engine, word: str) -> None:
    with pytest.raises(Refused) as caught:
        engine.argv(EngineCommand(("x",), ""), serving(args=("--fine", word)))
    assert caught.value.code == "reserved_argument"


@pytest.mark.parametrize(
    ("engine", "word"),
    [
        *((LM, word) for word in ("--model", "--mode=x", "--adapter-path", "--adapter")),
        *(
            (OPENAI, word)
            for word in ("--model-path=/x", "--served-model-name", "--config", "--log-file", "--no-log-file")
        ),
    ],
    ids=lambda each: each if isinstance(each, str) else each.name,
)
def test_reserved_argument_of_the_engine_is_refused(engine: Engine, word: str) -> None:
    with pytest.raises(Refused):
        engine.argv(EngineCommand(("x",), ""), serving(args=(word,)))


@pytest.mark.parametrize("word", ["--temp", "--max-tokens=9", "-x", "--log-level", "port", "--ports-of-call", "8100"])
def test_other_arguments_are_passed_on(word: str) -> None:
    assert LM.argv(EngineCommand(("x",), ""), serving(args=(word,)))[-1] == word


@pytest.mark.parametrize("engine", [OPENAI, LM], ids=lambda engine: engine.name)
def test_engines_run_offline(engine: Engine) -> None:
    assert engine.environment()["HF_HUB_OFFLINE"] == "1"


# -- recognising a server process ----------------------------------------------------------------------------------

LM_OPTIONS = ("--model", "jerry", "--host", "0.0.0.0", "--port", "8101")
OPENAI_OPTIONS = ("--model-path", "/hub/x", "--host", "0.0.0.0", "--port", "8101")


APP = "/Library/Frameworks/Python.framework/Versions/3.12/Resources/Python.app/Contents/MacOS/Python"


@pytest.mark.parametrize(
    "start",
    [
        ("mlx_lm.server",),
        ("/opt/homebrew/bin/mlx_lm.server",),
        ("/venv/bin/python3.12", "/venv/bin/mlx_lm.server"),
        ("/venv/bin/python3.13t", "-IS", "/venv/bin/mlx_lm.server"),
        ("python", "-m", "mlx_lm.server"),
        ("python", "-um", "mlx_lm.server"),
        ("python", "-mmlx_lm.server"),
        ("python", "-u", "-m", "mlx_lm", "server"),
        ("python", "-X", "dev", "-Wignore", "-W", "error", "-m", "mlx_lm", "server"),
        ("python", "--check-hash-based-pycs", "never", "/venv/bin/mlx_lm", "server"),
        (APP, "/venv/bin/mlx_lm.server"),
        ("mlx_lm", "server"),
        ("python3", "/src/mlx-lm/mlx_lm/server.py"),
    ],
    ids=" ".join,
)
def test_mlx_lm_is_recognised_by_the_program_that_runs(start: tuple[str, ...]) -> None:
    assert recognise((*start, *LM_OPTIONS)) == ("mlx-lm", DetectedServer(8101, "jerry", "0.0.0.0"))


@pytest.mark.parametrize(
    "start",
    [
        ("mlx-openai-server", "launch"),
        ("/venv/bin/python", "/venv/bin/mlx-openai-server", "launch"),
        (APP, "-u", "/venv/bin/mlx-openai-server", "launch"),
        ("python", "-m", "app.main", "launch"),
        ("python", "-m", "app.main"),
    ],
    ids=" ".join,
)
def test_mlx_openai_server_is_recognised_by_the_program_that_runs(start: tuple[str, ...]) -> None:
    assert recognise((*start, *OPENAI_OPTIONS)) == ("mlx-openai-server", DetectedServer(8101, "/hub/x", "0.0.0.0"))


SERVER = ("mlx_lm.server", *LM_OPTIONS)


@pytest.mark.parametrize(
    "argv",
    [
        ("tmux", "-L", "x", "new-session", "-d", "-s", "mlx", *SERVER),
        ("SCREEN", "-dmS", "mlx", *SERVER),
        ("ssh", "studio2", *SERVER),
        ("ssh", "studio2", " ".join(SERVER)),
        ("mosh-client", "studio2", *SERVER),
        ("docker", "exec", "box", *SERVER),
        ("podman", "run", "--rm", "box", *SERVER),
        ("kubectl", "exec", "-it", "pod", "--", *SERVER),
        ("watch", "pgrep", "-fl", "mlx_lm.server", "--port=8101"),
        ("pgrep", "-f", *SERVER),
        ("pkill", "-f", " ".join(SERVER)),
        ("tail", "-f", "mlx_lm.server"),
        ("grep", *SERVER),
        ("vim", "/opt/bin/mlx_lm.server"),
        ("emacs", "mlx_lm.server"),
        ("less", "+F", "mlx_lm.server"),
        ("sudo", "-u", "mlx", *SERVER),
        ("script", "-q", "log", *SERVER),
        ("entr", "-r", *SERVER),
        ("nodemon", "--exec", *SERVER),
        ("systemd-run", "--user", "--pty", *SERVER),
        ("gdb", "--args", "python", "-m", *SERVER),
        ("strace", "-f", *SERVER),
        ("sh", "-c", " ".join(SERVER)),
        ("sh", "-c", 'exec "$@"', "x", *SERVER),
        ("bash", "/home/me/bin/mlx_lm.server", *LM_OPTIONS),
        ("uv", "run", "--project", "/opt/x", *SERVER),
        ("nohup", "caffeinate", "-i", "python", "-m", *SERVER),
        ("python", "-c", "import time", *SERVER),
        ("python", "-Ic", "import time", *SERVER),
        ("python", "panel.py", *SERVER),
        ("python", "-m", "honcho", "start", *SERVER),
        ("python", "-m", "pytest", "mlx_lm/server.py"),
        ("python", "-m", "ipykernel_launcher", "-f", "/x/mlx_lm.server"),
        ("python", "-X"),
        ("python", "-m"),
        ("/bin/sh", "/usr/local/bin/mlx-openai-server", "launch", *OPENAI_OPTIONS),
        ("uv", "run", "--project", "/opt/mlx-launch", "mlx-openai-server", "launch", *OPENAI_OPTIONS),
        ("ssh", "studio2", "mlx-openai-server", "launch", *OPENAI_OPTIONS),
        ("python", "-m", "app.main"),
        ("python", "-m", "app.main", "--port", "8101"),
        ("mlx_lm.server", "--help"),
    ],
    ids=" ".join,
)
def test_other_program_with_a_servers_words_is_not_recognised(argv: tuple[str, ...]) -> None:
    assert recognise(argv) is None


def test_default_ports_and_abbreviations_are_recognised() -> None:
    assert recognise(["mlx_lm.server"]) == ("mlx-lm", DetectedServer(8080, "", "127.0.0.1"))
    assert recognise(["mlx-openai-server", "launch"]) == ("mlx-openai-server", DetectedServer(8000, "", "0.0.0.0"))
    # The --config file sets the port; --port is ignored.
    assert recognise(["mlx-openai-server", "launch", "--config", "x.yaml", "--port", "1"]) == (
        "mlx-openai-server", DetectedServer(None, "", None),
    )  # fmt: skip
    assert recognise(["mlx_lm.server", "--port=8102", "--model=a"]) == (
        "mlx-lm",
        DetectedServer(8102, "a", "127.0.0.1"),
    )
    assert recognise(["mlx_lm.server", "--mod=a", "--por", "9", "--hos", "::1"]) == (
        "mlx-lm",
        DetectedServer(9, "a", "::1"),
    )
    assert recognise(["mlx_lm.server", "--port", "1", "--port", "2"]) == ("mlx-lm", DetectedServer(2, "", "127.0.0.1"))


@pytest.mark.parametrize(
    "argv",
    [
        (),
        ("",),
        ("python",),
        ("vim", "notes", "about", "servers"),
        ("grep", "-r", "mlx_lm"),
        ("mlx_lm.generate", "--model", "x", "--port", "8101"),
        ("mlx_lm", "generate", "--port", "8101"),
        ("mlx-openai-server",),
        ("mlx-openai-server", "--help"),
        ("mlx_lm.server", "--port", "abc"),
        ("mlx_lm.server", "--port", "-1"),
        ("mlx-openai-server", "launch", "--port", "9" * 5000),
        ("mlx_lm.server", "--port", "9" * 5000),
        ("/opt/mlx_lm.server/python", "x.py"),
        ("sleep", *("1",) * 20, "mlx_lm.server", *LM_OPTIONS),
    ],
)
def test_other_programs_are_not_recognised(argv: tuple[str, ...]) -> None:
    assert recognise(argv) is None


# -- fatal errors in a log -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", [OPENAI, LM], ids=lambda engine: engine.name)
@pytest.mark.parametrize("log", ["", "INFO starting\nINFO ready\n", "ValueError: in a request\n"])
def test_log_without_failed_start_has_no_fatal_error(engine: Engine, log: str) -> None:
    assert engine.fatal_error(log) is None


def test_fatal_error_is_found_in_the_log() -> None:
    log = "Exception in thread Thread-1:\nTraceback (most recent call last):\n  File x\nValueError: no weights\n"
    assert LM.fatal_error(log) == "ValueError: no weights"
    output = OPENAI.fatal_error("INFO x\nERROR: Application startup failed. Exiting.\n")
    assert output is not None and "startup failed" in output


# -- the cheap probe ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", 200),
        (b"HTTP/1.0 503 Service Unavailable\r\n\r\n", 503),
        (b"HTTP/1.1 404 Not Found\r\n", 404),
        (b"HTTP/1.1 2000 OK\r\n\r\n", None),
        (b"SSH-2.0-OpenSSH_9.2\r\n", None),
        (b"\xff\x00" * 10, None),
        (b"", None),
    ],
)
@pytest.mark.parametrize("closes", [True, False], ids=["closes", "keeps it open"])
def test_status_is_read_only_from_http(answer: bytes, status: int | None, closes: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as server:

        def serve() -> bytes:
            connection, _ = listener.accept()
            with connection:
                asked: bytes = connection.recv(65536)
                connection.sendall(answer)
                if not closes:
                    connection.recv(1)
                return asked

        serving = server.submit(serve)
        host, port = listener.getsockname()
        assert get_status(host, port, "/health", 0.3) == status
        lines = serving.result(10).split(b"\r\n")
    assert lines == [b"GET /health HTTP/1.1", f"Host: {host}:{port}".encode(), b"Connection: close", b"", b""]


def test_closed_port_has_no_status() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        host, port = unused.getsockname()
        assert get_status(host, port, "/health", 0.3) is None


# -- endless answers -----------------------------------------------------------------------------------------------


@contextmanager
def answering(pieces: Iterable[bytes], pause: float = 0.0) -> Iterator[tuple[str, int]]:
    """A server that answers one request with these pieces, until its client hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as server:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                try:
                    for piece in pieces:
                        connection.sendall(piece)
                        time.sleep(pause)
                    connection.shutdown(socket.SHUT_WR)
                    while connection.recv(65536):  # closing with unread bytes would reset the connection
                        pass
                except OSError:
                    pass  # the client closed the connection, as expected

        serving = server.submit(serve)
        yield listener.getsockname()
        serving.result(10)


HEAD = b"HTTP/1.1 200 OK\r\n"
WITHOUT_END = [
    pytest.param([HEAD, b"\r\n"], b" ", id="a body"),
    pytest.param([HEAD, b"Transfer-Encoding: chunked\r\n\r\n"], b"1\r\n \r\n", id="chunks"),
    pytest.param([HEAD, b"X: "], b"a", id="a header"),
    pytest.param([], b"HTTP/1.1 100 Continue\r\n\r\n", id="statuses"),
]


@pytest.mark.parametrize(("first", "then"), WITHOUT_END)
def test_completion_has_a_time_limit_as_a_whole(first: list[bytes], then: bytes) -> None:
    with answering(itertools.chain(first, itertools.repeat(then, 400)), 0.05) as (host, port):
        began = time.monotonic()
        with pytest.raises((OSError, NoCompletion)):
            request_completion(host, port, "jerry", 0.5)
        assert time.monotonic() - began < 5


@pytest.mark.parametrize(("first", "then"), WITHOUT_END)
def test_probe_has_a_time_limit_as_a_whole(first: list[bytes], then: bytes) -> None:
    with answering(itertools.chain(first, itertools.repeat(then, 400)), 0.05) as (host, port):
        began = time.monotonic()
        get_status(host, port, "/health", 0.5)
        assert time.monotonic() - began < 5


COMPLETION = (
    b'{"choices": [{"message": {"content": "hi"}, "finish_reason": "stop"}], "usage": {"completion_tokens": 1}}'
)


@pytest.mark.parametrize("length", [b"Content-Length: %d\r\n" % len(COMPLETION), b"Connection: close\r\n"])
def test_completion_may_arrive_in_pieces(length: bytes) -> None:
    pieces = [HEAD, length, b"\r\n", *(COMPLETION[at : at + 1] for at in range(len(COMPLETION)))]
    with answering(pieces, 0.01) as (host, port):
        assert request_completion(host, port, "jerry", 30) == Completion("hi", finish_reason="stop", tokens=1)


@pytest.mark.parametrize("body", [b"[" * 200_000, b"9" * 10_000, b"\xff", b'{"choices": []}', b"{}"])
def test_other_answer_than_a_completion_is_an_error(body: bytes) -> None:
    pieces = [HEAD, b"Content-Length: %d\r\n\r\n" % len(body), body]
    with answering(pieces) as (host, port), pytest.raises(NoCompletion):
        request_completion(host, port, "jerry", 10)


@pytest.mark.parametrize(
    ("engine", "argv", "kind", "context"),
    [
        ("mlx-lm", "mlx_lm.server --model m --model-type whisper --context-length 10", "lm", None),
        ("mlx-openai-server", "mlx-openai-server launch --model-path m", "lm", None),
        ("mlx-openai-server", "x launch --model-path m --model-type whisper --context-length 10", "whisper", 10),
        ("mlx-openai-server", "x launch --model-path m --context-length=²", "lm", None),
    ],
)
def test_engine_says_what_its_command_serves(engine: str, argv: str, kind: str, context: int | None) -> None:
    words = argv.split()
    assert (ENGINES[engine].model_type(words), ENGINES[engine].context_length(words)) == (kind, context)
