"""What is known of an installed engine without starting a model: version, options, architectures."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from mlxops.agent.engines.base import Command, Engine, Serving, installation_folders, site_packages, version_in
from mlxops.agent.host import programs
from mlxops.agent.state.store import Store
from mlxops.core.errors import Refused
from mlxops.core.loadable import Abilities

HELP_SECONDS = 120.0
"""An engine imports everything that it has before it prints its options; from a cold disk that takes a while."""


class NotAsked(Exception):
    """What is to be known has not been asked for yet, and must not be asked now."""


def described(
    engine: Engine, command: Command, serving: Serving, environ: Mapping[str, str] | None, store: Store, *, keep: bool
) -> Command:
    """`command` with its version and, if the engine wants to know, with its own help.

    That is asked once for each installation, and with `keep` remembered. `environ` is what it then runs with; None: it
    must not be run. Raises `Refused` (engine_broken), `NotAsked`.
    """
    site = site_packages(command.argv[:1], engine.distribution)
    command = replace(command, version=version_in(site, engine.distribution))
    inquiry = engine.inquiry(command, serving)
    if inquiry:
        key = _key(inquiry)
        text = store.engine_help(key)
        if text is None:
            if environ is None:
                raise NotAsked
            text = _ask(engine, inquiry, environ)
            if keep:
                store.keep_engine_help(key, text)
        command = replace(command, help=text)
    if site is None:  # not for decisions: a launcher may bring its environment up to date first
        there = site_packages(command.argv, engine.distribution)
        command = replace(command, version=version_in(there, engine.distribution))
    return command


def _ask(engine: Engine, inquiry: Sequence[str], environ: Mapping[str, str]) -> str:
    status, said = programs.ask(inquiry, programs.environment(environ, engine.environment(), ""), HELP_SECONDS)
    if status == 0:
        return said
    last = next((line.strip() for line in reversed(said.splitlines()) if line.strip()), "it said nothing")
    raise Refused(
        "engine_broken",
        f"the engine {engine.name} does not run: it did not even print its options",
        why=f"{'it took too long' if status is None else f'status {status}'}: {last[:300]}",
        hint=f"mend its installation on the host; try there: {' '.join(inquiry)}",
    )


def _key(argv: Sequence[str]) -> str:
    """What an installation is remembered by: its command line, and marks that move when it is installed anew."""
    marks = [list(argv)]
    for word in argv:
        if word.startswith("/"):
            path = Path(word)
            seen = (path, Path(os.path.realpath(path)), path / "uv.lock", path / "pyproject.toml", path / ".venv")
            marks += [[str(each), str(stat.st_mtime_ns)] for each in seen if (stat := _stat(each))]
            marks += [[str(info)] for top in installation_folders(path) for info in _metadata(top)]
    return hashlib.sha256(json.dumps(marks).encode()).hexdigest()[:32]


def _metadata(top: Path) -> list[Path]:
    return sorted(top.glob("lib/python3*/site-packages/mlx*.dist-info"))


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None


def lacks_architecture(command: Command, engine: Engine, model_type: str | None, library: str = "mlx_lm") -> str | None:
    """Why the engine cannot load models of this `model_type` (config.json); None if it can, or if that is not known.

    Every architecture is a module of the library, mlx_lm or mlx_vlm, but for those that it maps to another one (its
    utils.py, MODEL_REMAPPING).
    """
    site = site_packages(command.argv, engine.distribution)
    models = site / library / "models" if site else None
    if models is None or not os.path.isdir(models):
        return None
    if model_type is None:
        return "its config.json names no model_type"
    if not re.fullmatch(r"[\w.-]+", model_type):
        return None
    mapped = _remapped(models.parent / "utils.py")
    if mapped is None:
        return None
    asked = model_type.lower() if library == "mlx_vlm" else model_type
    name = mapped.get(asked, asked)
    if any(os.path.exists(models / each) for each in (f"{name}.py", name)):
        return None
    version = version_in(models.parent.parent, library)
    loader = f"{library.replace('_', '-')} {version or ''}"
    return f"its model_type is {model_type!r}, which {loader} beside {engine.name} does not have"


def abilities(command: Command, engine: Engine, model_type: str | None) -> Abilities | None:
    """Return what the mlx-lm beside the engine can unpack; None if it is not found."""
    site = site_packages(command.argv, engine.distribution)
    utils = _source(site / "mlx_lm" / "utils.py") if site else ""
    if site is None or not utils:
        return None
    name = (_remapped(site / "mlx_lm" / "utils.py") or {}).get(model_type or "", model_type or "")
    model = _source(site / "mlx_lm" / "models" / f"{name}.py") if re.fullmatch(r"[\w.-]+", name) else ""
    version = version_in(site, "mlx_lm") or ""
    return Abilities(version, utils, _source(site / "mlx" / "nn" / "layers" / "quantized.py"), model)


def lacks_tokenizer(command: Command, engine: Engine, tokenizer_class: str) -> bool:
    """Whether the transformers package beside the engine lacks such a class; False if that is not known."""
    site = site_packages(command.argv, engine.distribution)
    known = _source(site / "transformers" / "models" / "auto" / "tokenization_auto.py") if site else ""
    names = (tokenizer_class, tokenizer_class.removesuffix("Fast"))
    return bool(known) and not any(f'"{name}"' in known for name in names)


def _source(path: Path) -> str:
    """Read a module of an installation without running it; empty if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""


def _remapped(utils: Path) -> dict[str, str] | None:
    """`MODEL_REMAPPING` of mlx_lm's utils.py, read without running it; None if it is not to be found."""
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
