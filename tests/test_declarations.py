"""Every command and every engine is complete. A new one is checked here without a change of this file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mlxops.agent.engines import ENGINES
from mlxops.agent.engines.base import Engine, EngineCommand, ServerSpec
from mlxops.agent.operations import operation
from mlxops.core.command import Group, Hosts, command_module, request_type
from mlxops.core.errors import Refused
from mlxops.core.model_options import Option, Origin
from mlxops.core.registry import Model
from mlxops.tasks import BODIES, command_names

NOT_TYPED = {"agree", "cancel", "follow", "observe"}
"""Commands that mlxops itself asks for. The agent's main module carries them out, or an operation."""
TYPED = sorted({*command_names()} - NOT_TYPED)
ON_A_HOST = [name for name in TYPED if request_type(name).hosts is not Hosts.NONE and name not in {"deploy", "serve"}]
"""Commands with an operation. `deploy` installs the agent, so it cannot need one. `serve` asks for `observe`."""


@pytest.mark.parametrize("name", TYPED)
def test_command_is_in_the_help(name: str) -> None:
    kind = request_type(name)
    assert kind.group is not Group.HIDDEN, f"{kind.__name__} needs group=Group.LOOK, or another group"
    assert (kind.__doc__ or "").rstrip().endswith("."), f"the docstring of {kind.__name__} is its help: a sentence"


@pytest.mark.parametrize("name", TYPED)
def test_command_has_a_result_and_shows_it(name: str) -> None:
    kind = request_type(name)
    assert kind.result is not object, f"{kind.__name__} names its result: Request[{kind.__name__}Result]"
    shown = name in BODIES or hasattr(command_module(name), "show")
    assert shown, f"mlxops/core/commands/{name}.py needs a function `show`"


@pytest.mark.parametrize("name", ON_A_HOST)
def test_operation_takes_the_request_and_returns_the_result(name: str) -> None:
    kind = request_type(name)
    expected = {"ctx": "Context", "request": kind.__name__, "return": kind.result.__name__}
    assert operation(name).__annotations__ == expected


# -- engines --------------------------------------------------------------------------------------------------------

engines = pytest.mark.parametrize("engine", ENGINES.values(), ids=list(ENGINES))


def serving(**options: str) -> ServerSpec:
    values = tuple(Option(key, value, Origin.REGISTRY) for key, value in options.items())
    model = Model("jerry", "org/jerry", options=options)
    return ServerSpec(model, "jerry-xl", Path("/hub/sha"), "127.0.0.1", 8100, Path("/run/8100"), values)


@pytest.fixture
def command(engine: Engine, tmp_path: Path) -> EngineCommand:
    """The engine, found on the PATH."""
    program = tmp_path / engine.program
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    return engine.find_command((), {"PATH": str(tmp_path)})


@pytest.mark.parametrize("name", ENGINES)
def test_engine_has_the_name_of_its_file(name: str) -> None:
    assert ENGINES[name].name == name


@engines
def test_started_server_is_recognised_as_its_own_engine_only(engine: Engine, command: EngineCommand) -> None:
    argv = engine.argv(command, serving())
    found = {each.name: each.recognise(argv) for each in ENGINES.values()}
    assert [name for name, server in found.items() if server] == [engine.name]
    server = found[engine.name]
    assert server is not None and (server.port, server.host) == (8100, "127.0.0.1")


@engines
def test_program_that_prints_its_help_is_no_server(engine: Engine, command: EngineCommand) -> None:
    assert engine.recognise((*engine.argv(command, serving()), "--help")) is None


@engines
def test_started_server_is_asked_by_its_alias(engine: Engine, command: EngineCommand) -> None:
    argv = engine.argv(command, serving())
    assert engine.served_name(argv) == "jerry-xl"
    assert engine.accepted_names(argv, None).known[0] == "jerry-xl"


@engines
@pytest.mark.parametrize("key", ["chat_template", "tool_call_parser", "reasoning_parser"])
def test_option_is_used_or_refused(engine: Engine, command: EngineCommand, key: str, tmp_path: Path) -> None:
    value = tmp_path / "value"
    value.write_text("text of a template")
    try:
        argv = engine.argv(command, serving(**{key: str(value)}))
    except Refused as refused:
        assert refused.code == "unsupported_option"
    else:
        assert {str(value), "text of a template"} & set(argv)


@engines
@pytest.mark.parametrize("word", ["--host", "--port=1", "--trust-remote-code", "--trust-r"])
def test_argument_that_mlxops_sets_is_reserved(engine: Engine, command: EngineCommand, word: str) -> None:
    spec = serving()
    with pytest.raises(Refused) as caught:
        engine.argv(command, replace(spec, model=replace(spec.model, args=(word,))))
    assert caught.value.code == "reserved_argument"
