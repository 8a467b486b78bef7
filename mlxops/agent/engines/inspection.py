"""What an installed engine can do, found without starting a model: version, options, architectures."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from mlxops.agent.engines.base import Engine, EngineCommand, ServerSpec
from mlxops.agent.engines.installation import installation_folders, site_packages, version_in
from mlxops.agent.host import programs
from mlxops.agent.state.store import Store
from mlxops.core.errors import Refused
from mlxops.core.loadable import Abilities
from mlxops.core.redaction import command_line, redact

HELP_TIMEOUT_SECONDS = 120.0
"""An engine imports all its packages before it prints its help, which takes a while from a cold disk."""
OPTIONAL_HELP_SECONDS = 30.0


class HelpNotKnown(Exception):
    """The engine's help text is needed but not stored, and the engine must not be run now."""


def inspect_command(
    engine: Engine,
    command: EngineCommand,
    spec: ServerSpec,
    environ: Mapping[str, str] | None,
    store: Store,
    *,
    keep: bool,
) -> EngineCommand:
    """Return `command` with its version and, if the engine needs it, its help text.

    The help text is read once for each installation; with `keep` it is stored. `environ` is the environment in which
    the engine runs; None: do not run it. Raises `Refused` (engine_broken), `HelpNotKnown`.
    """
    site = site_packages(command.argv[:1], engine.distribution)
    command = replace(command, version=version_in(site, engine.distribution))
    argv = engine.help_argv(command, spec)
    if argv:
        command = replace(command, help=_help(engine, argv, environ, store, keep=keep))
    if site is None:
        # A launcher may update its environment before it runs the engine. So this version is only for information;
        # `help_argv` above did not see it.
        site = site_packages(command.argv, engine.distribution)
        command = replace(command, version=version_in(site, engine.distribution))
    return command


def optional_help(
    engine: Engine, command: EngineCommand, environ: Mapping[str, str], store: Store, *, keep: bool
) -> str | None:
    """Return the engine's help text; None if it cannot be had. For what a load can do without."""
    # Another program configured in `launch` may not have --help.
    if command.help is not None or site_packages(command.argv[:1], engine.distribution) is None:
        return command.help
    try:
        return _help(engine, (*command.argv, "--help"), environ, store, keep=keep, seconds=OPTIONAL_HELP_SECONDS)
    except Refused:
        return None


def _help(
    engine: Engine,
    argv: Sequence[str],
    environ: Mapping[str, str] | None,
    store: Store,
    *,
    keep: bool,
    seconds: float = HELP_TIMEOUT_SECONDS,
) -> str:
    """Return the stored help text, or run the engine for it. Raises `Refused` (engine_broken), `HelpNotKnown`."""
    key = _installation_key(argv)
    text = store.engine_help(key)
    if text is None:
        if environ is None:
            raise HelpNotKnown
        text = _read_help(engine, argv, environ, seconds)
        if keep:
            store.keep_engine_help(key, text)
    return text


def _read_help(engine: Engine, argv: Sequence[str], environ: Mapping[str, str], seconds: float) -> str:
    status, output = programs.run_program(argv, programs.environment(environ, engine.environment(), ""), seconds)
    if status == 0:
        return output
    last = next((line.strip() for line in reversed(output.splitlines()) if line.strip()), "no output")
    raise Refused(
        "engine_broken",
        f"the engine {engine.name} does not run: it could not print its options",
        why=f"{'it took too long' if status is None else f'status {status}'}: {redact(last)[:300]}",
        hint=f"repair its installation on the host; try there: {command_line(argv)}",
    )


def _installation_key(argv: Sequence[str]) -> str:
    """Return a key for a command line and its installation. A new installation changes the modification times in it."""
    marks = [list(argv)]
    for word in argv:
        if word.startswith("/"):
            path = Path(word)
            files = (path, Path(os.path.realpath(path)), path / "uv.lock", path / "pyproject.toml", path / ".venv")
            marks += [[str(file), str(stat.st_mtime_ns)] for file in files if (stat := _stat(file))]
            marks += [[str(info)] for folder in installation_folders(path) for info in _metadata_folders(folder)]
    return hashlib.sha256(json.dumps(marks).encode()).hexdigest()[:32]


def _metadata_folders(environment: Path) -> list[Path]:
    return sorted(environment.glob("lib/python3*/site-packages/*.dist-info"))


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None


def missing_architecture(
    command: EngineCommand, engine: Engine, model_type: str | None, library: str = "mlx_lm"
) -> str | None:
    """Return why the engine cannot load models of this `model_type` (config.json); None if it can or may.

    Each architecture is a module of the library (mlx_lm or mlx_vlm), or mapped to another module (MODEL_REMAPPING in
    the library's utils.py).
    """
    site = site_packages(command.argv, engine.distribution)
    models = site / library / "models" if site else None
    if models is None or not os.path.isdir(models):
        return None
    if model_type is None:
        return "its config.json names no model_type"
    if not re.fullmatch(r"[\w.-]+", model_type):
        return None
    remapping = _model_remapping(models.parent / "utils.py")
    if remapping is None:
        return None
    key = model_type.lower() if library == "mlx_vlm" else model_type
    name = remapping.get(key, key)
    if any(os.path.exists(models / file) for file in (f"{name}.py", name)):
        return None
    version = version_in(models.parent.parent, library)
    loader = f"{library.replace('_', '-')} {version or ''}"
    return f"its model_type is {model_type!r}, which {loader} beside {engine.name} does not have"


def quantization_abilities(command: EngineCommand, engine: Engine, model_type: str | None) -> Abilities | None:
    """Return the quantizations that the mlx-lm beside the engine can unpack; None if mlx-lm is not found."""
    site = site_packages(command.argv, engine.distribution)
    utils = _source(site / "mlx_lm" / "utils.py") if site else ""
    if site is None or not utils:
        return None
    name = (_model_remapping(site / "mlx_lm" / "utils.py") or {}).get(model_type or "", model_type or "")
    model = _source(site / "mlx_lm" / "models" / f"{name}.py") if re.fullmatch(r"[\w.-]+", name) else ""
    version = version_in(site, "mlx_lm") or ""
    return Abilities(version, utils, _source(site / "mlx" / "nn" / "layers" / "quantized.py"), model)


def lacks_tokenizer(command: EngineCommand, engine: Engine, tokenizer_class: str) -> bool:
    """Return whether the transformers package beside the engine lacks this class; False if that is unknown."""
    site = site_packages(command.argv, engine.distribution)
    source = _source(site / "transformers" / "models" / "auto" / "tokenization_auto.py") if site else ""
    names = (tokenizer_class, tokenizer_class.removesuffix("Fast"))
    return bool(source) and not any(f'"{name}"' in source for name in names)


def _source(path: Path) -> str:
    """Read a Python module without running it; empty if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""


def _model_remapping(utils: Path) -> dict[str, str] | None:
    """Return `MODEL_REMAPPING` of mlx_lm's utils.py, read without running it; None if it is not found."""
    try:
        tree = ast.parse(utils.read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError):
        return None
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(getattr(t, "id", "") == "MODEL_REMAPPING" for t in node.targets):
            try:
                value = ast.literal_eval(node.value)
            except ValueError:
                return None
            return {str(k): str(v) for k, v in value.items()} if isinstance(value, dict) else None
    return None
