"""The checks of a load before it stops anything."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from mlxops.agent.context import Context, busy, memory_lock
from mlxops.agent.engines import ENGINES, engine_named
from mlxops.agent.engines.base import Engine, EngineCommand, ServerSpec, template_text
from mlxops.agent.engines.inspection import (
    inspect_command,
    lacks_tokenizer,
    missing_architecture,
    quantization_abilities,
)
from mlxops.agent.engines.installation import installed_version
from mlxops.agent.host.system import free_on_disk
from mlxops.agent.hub.contents import printable
from mlxops.agent.hub.snapshot import ModelFacts, correction_hint, edit_notice, edited, shape
from mlxops.agent.hub.weights import language_weights
from mlxops.agent.operations.model_files import ModelFiles
from mlxops.agent.state.store import Lock
from mlxops.core import memory, planner
from mlxops.core.budget import LimitOptions
from mlxops.core.commands.list import OptionRow
from mlxops.core.commands.load import Load
from mlxops.core.errors import Refused
from mlxops.core.frozen import dataclass
from mlxops.core.loadable import no_tokenizer, unknown_quantization
from mlxops.core.model_options import Option, options_of, size_warning
from mlxops.core.names import shown
from mlxops.core.planner import LoadPlan, ModelRef, Wanted
from mlxops.core.protocol import Phase
from mlxops.core.records import Operation
from mlxops.core.registry import Model, Registry
from mlxops.core.settings import Settings
from mlxops.core.text import amount

MEMORY_CHECK_SECONDS = 20.0
"""Limit of the wait for another load's memory check. That check is bounded, even if a server hangs."""
STATE_DISK_BYTES = 8 * 1024**2
"""Least free space on the state folder's disk, for a server's records and the start of its log."""


_OTHER_WEIGHTS = "it has no model*.safetensors, and an engine for language models loads no other weights"


@dataclass(frozen=True)
class Prepared:
    """Everything that is needed to start a server."""

    engine: Engine
    command: EngineCommand
    serving: ServerSpec
    files: ModelFiles
    wanted: Wanted
    budget: tuple[str, ...] = ()
    """The limits that `preflight` chose, as the last words of the argv."""
    estimate: memory.Estimate | None = None
    """The memory that the server may take with these limits, if `preflight` has estimated it."""

    @property
    def argv(self) -> tuple[str, ...]:
        return (*self.wanted.argv, *self.budget)

    @property
    def limit_options(self) -> LimitOptions:
        """The options that a load may add to its argv."""
        return self.engine.limit_options(self.serving, self.wanted.argv)

    @property
    def context_length(self) -> int | None:
        """The context length that its argv sets, else that of its entry; None if nothing sets it."""
        return self.engine.context_length(self.wanted.argv) or self.serving.model.context_length


def prepare(ctx: Context, target: ModelRef, port: int, files: ModelFiles, *, ask: bool = True) -> Prepared:
    """Find the engine for a target, and its argv.

    `ask`: run the engine to learn its options if they are not known, which takes seconds. Without `ask`, raise
    `HelpNotKnown` instead. Raises `Refused` if the engine is missing or does not run, or does not support an option.
    """
    settings = ctx.paths.settings
    entry = target.entry or Model(target.name, target.repo_id)
    engine, command = ctx.engine(target)
    serving = ServerSpec(
        model=entry,
        alias=settings.alias(port, target.name),
        path=files.path,
        bind=settings.bind,
        port=port,
        folder=ctx.store.run_folder(port),
        options=_with_template(entry, options(entry, settings.engine, files.path), files.path),
    )
    inquire = ctx.engine_environ if ask else None
    command = inspect_command(engine, command, serving, inquire, ctx.store, keep=not ctx.request.dry_run)
    argv = engine.argv(command, serving)
    real = os.path.realpath(files.path)
    limits = engine.limit_options(serving, argv).all
    wanted = Wanted(target.repo_id, files.revision, engine.name, argv, real, limits)
    return Prepared(engine, command, serving, files, wanted)


def options(entry: Model, default_engine: str, path: Path) -> tuple[Option, ...]:
    """Return the options of an entry whose files are at `path`. Raises `Refused` (unknown_engine)."""
    engine = engine_named(entry.engine or default_engine)
    return options_of(entry, default_engine, shape(path).model_type, _file_names(path), needed=engine.needs)


def option_rows(ctx: Context, entry: Model, path: Path | None = None) -> tuple[OptionRow, ...]:
    """Return the options of an entry as `list` shows them. `path`: its files, if they are here."""
    try:
        rows = options(entry, ctx.paths.settings.engine, path or Path(entry.cache_path or os.devnull))
    except Refused:  # an unknown engine, which a load would report
        rows = options_of(entry, ctx.paths.settings.engine, None, (), needed=())
    return tuple(OptionRow(each.key, each.value, each.origin.value) for each in rows)


def _file_names(path: Path) -> frozenset[str]:
    try:
        return frozenset(os.listdir(path))
    except OSError:
        return frozenset()


def _with_template(entry: Model, options: tuple[Option, ...], path: Path) -> tuple[Option, ...]:
    """Make the chat template's path absolute. A relative one names a file of the model's repository."""
    return tuple(
        replace(each, value=str(_template_file(entry, path, each.value)))
        if each.key == "chat_template" and isinstance(each.value, str)
        else each
        for each in options
    )


def _template_file(entry: Model, path: Path, name: str) -> Path:
    file = path / name  # an absolute name stays as it is
    try:
        template_text(file)
    except (OSError, ValueError) as error:
        raise Refused(
            "bad_chat_template",
            f"the chat template {name!r} of {entry.name} cannot be used",
            why=f"{file}: {getattr(error, 'strerror', None) or error}",
            hint="repair the file; or take it out of the entry: "
            f"`mlxctl set --model {entry.name} --set chat_template=`",
        ) from None
    return file


def preflight(
    ctx: Context, request: Load, held: ExitStack, registry: Registry, plan: LoadPlan, prepared: Prepared
) -> tuple[Prepared, tuple[str, ...]]:
    """Check the new server before an old one is stopped. Emit warnings; return them, and the server with its limits.

    Reserve the server's memory until `held` ends. Raises `Refused`: not_servable, code_would_run,
    unknown_architecture, does_not_fit.
    """
    from mlxops.agent.hub.snapshot import inspect

    ctx.emit(Phase("check", f"{plan.target.repo_id} at {prepared.files.revision[:12]}"))
    facts = inspect(prepared.files.path)
    check(plan, prepared, facts)
    prepared, memory_warnings = _reserve_memory(ctx, request, held, registry, plan, prepared, facts)
    _check_disk(ctx, plan)
    if facts.auto_map and not prepared.serving.model.trust_remote_code:
        ctx.note(f"the repository's code is not run: {' and '.join(facts.auto_map)} name it (auto_map)")
    warnings = (*_warnings(ctx, request, plan, prepared, facts), *memory_warnings)
    for warning in warnings:
        ctx.note(warning, "warning")
    return prepared, warnings


def check(plan: LoadPlan, prepared: Prepared, facts: ModelFacts) -> None:
    """Check that the installed engine can load these files.

    Raises `Refused`: not_servable, code_would_run, unknown_architecture.
    """
    _check_files(plan, prepared, facts)
    _check_code(plan, prepared, facts)
    repo_id, command, engine = plan.target.repo_id, prepared.command, prepared.engine
    _refuse_architecture(repo_id, command, engine, facts.config, _model_type_of(prepared))
    if _is_language_model(prepared):
        _refuse_quantization(repo_id, command, engine, facts.config, packed=facts.packed)


def _check_files(plan: LoadPlan, prepared: Prepared, facts: ModelFacts) -> None:
    """Raises `Refused` (not_servable) for files that the engine cannot load."""
    repo, revision = plan.target.repo_id, prepared.files.revision
    hint = f"compare its files with the hub's: `mlxctl pull --repo {repo}@{revision} --verify`"
    if facts.broken:
        hint = correction_hint(prepared.files.path / facts.broken[0], repo, revision)
    if facts.problems:
        raise Refused("not_servable", f"{repo} cannot be served", why="; ".join(facts.problems)[:400], hint=hint)
    if _is_language_model(prepared) and not facts.language_weights:
        raise _not_servable(repo, _OTHER_WEIGHTS)


def _is_language_model(prepared: Prepared) -> bool:
    """Return whether the engine loads the model through mlx-lm."""
    return _model_type_of(prepared) == "lm"


def _model_type_of(prepared: Prepared) -> str:
    """Return the model type that the argv sets. The entry's own args may set it, too."""
    return prepared.engine.model_type(prepared.wanted.argv)


def _check_code(plan: LoadPlan, prepared: Prepared, facts: ModelFacts) -> None:
    """Raises `Refused` (code_would_run) unless code is trusted at exactly this commit: a branch can move."""
    entry, revision = prepared.serving.model, prepared.files.revision
    trusted = entry.trust_remote_code and entry.revision == revision
    model_file = facts.model_file if _is_language_model(prepared) else None
    tokenizer = facts.tokenizer_class
    own_tokenizer = tokenizer is not None and lacks_tokenizer(prepared.command, prepared.engine, tokenizer)
    if (model_file or own_tokenizer or entry.trust_remote_code) and not trusted:
        pinned = f"its entry trusts it without naming the commit {revision}" if entry.trust_remote_code else ""
        code = [f"config.json names model_file {model_file}"] if model_file else []
        if own_tokenizer:
            code.append(f"its tokenizer {printable(str(tokenizer))} is code of the repository (tokenizer_config.json)")
        code += [f"{name} has an auto_map" for name in facts.auto_map] if entry.trust_remote_code else []
        raise Refused(
            "code_would_run",
            f"loading {plan.target.repo_id} would run code of that repository",
            why="; ".join(filter(None, [pinned, *code]))[:400],
            hint=f"read that code; then: `mlxctl set --model {plan.target.name} --set trust_remote_code=true "
            f"--set revision={prepared.files.revision}`",
        )


def expected_type(settings: Settings, entry: Model) -> str:
    """Return the model type as which an entry would be served. Use this while there is no argv."""
    engine = ENGINES.get(entry.engine or settings.engine)
    return engine.model_type(_expected_words(settings, entry)) if engine else "lm"


def expected_context(settings: Settings, entry: Model) -> int | None:
    """Return the context length with which an entry would be served; None if nothing sets it."""
    engine = ENGINES.get(entry.engine or settings.engine)
    words = _expected_words(settings, entry)
    return (engine.context_length(words) if engine else None) or entry.context_length


def _expected_words(settings: Settings, entry: Model) -> tuple[str, ...]:
    """Return the options of a command: those of `launch` in hosts.yaml, then those of the entry, which hold."""
    kind = entry.options.get("model_type", "lm")
    return (
        *settings.launch.get(entry.engine or settings.engine, ()),
        *(("--model-type", kind) if kind else ()),
        *(("--context-length", str(entry.context_length)) if entry.context_length else ()),
        *entry.args,
    )


def check_before_download(ctx: Context, target: ModelRef) -> Callable[[Collection[str], Mapping[str, object]], None]:
    """Return a check of the hub's file list and config.json against the installed engine.

    Raises `Refused` (engine_not_found). The check raises `Refused`: not_servable, unknown_architecture.
    """
    entry = target.entry or Model(target.name, target.repo_id)
    engine, command = ctx.engine(target)
    kind = expected_type(ctx.paths.settings, entry)

    def check(names: Collection[str], config: Mapping[str, object]) -> None:
        why = None if language_weights(names) else _OTHER_WEIGHTS
        if kind == "lm" and (why := why or no_tokenizer(names)):
            raise _not_servable(target.repo_id, why)
        if config:
            _refuse_architecture(target.repo_id, command, engine, config, kind)
        if config and kind == "lm":
            _refuse_quantization(target.repo_id, command, engine, config, packed=True)

    return check


_LIBRARIES = {"lm": "mlx_lm", "multimodal": "mlx_vlm"}
"""The library that loads models of each type. The architectures of other types are not checked."""


def _refuse_architecture(
    repo_id: str, command: EngineCommand, engine: Engine, config: Mapping[str, object], kind: str
) -> None:
    """Raises `Refused` (unknown_architecture) if the installed engine does not know the architecture."""
    library = _LIBRARIES.get(kind)
    if library and (why := missing_architecture(command, engine, _model_type(config), library)):
        raise Refused(
            "unknown_architecture",
            f"{repo_id} has an architecture that the installed engine cannot load",
            why=why,
            hint="upgrade the engine on the host, or choose another model",
        )


def _model_type(config: Mapping[str, object]) -> str | None:
    value = config.get("model_type")
    return value if isinstance(value, str) else None


def _refuse_quantization(
    repo_id: str, command: EngineCommand, engine: Engine, config: Mapping[str, object], *, packed: bool
) -> None:
    """Raises `Refused` (not_servable) if the installed engine cannot unpack the weights."""
    known = quantization_abilities(command, engine, _model_type(config))
    if known is not None and (why := unknown_quantization(config, known, packed=packed)):
        raise _not_servable(repo_id, f"{why} (mlx-lm {known.version})")


def _not_servable(repo_id: str, why: str) -> Refused:
    return Refused(
        "not_servable",
        f"{repo_id} cannot be served",
        why=why,
        hint="choose a conversion for MLX, for example of https://huggingface.co/mlx-community, or upgrade the engine",
    )


def _reserve_memory(
    ctx: Context,
    request: Load,
    held: ExitStack,
    registry: Registry,
    plan: LoadPlan,
    prepared: Prepared,
    facts: ModelFacts,
) -> tuple[Prepared, list[str]]:
    """Check that the model fits into memory with one context, and reserve that memory until its server uses it.

    Return the server with limits chosen from what is left, and warnings. Without the reservation, two loads that begin
    at once could both pass the check although only one fits.
    """
    from mlxops.agent.operations import limits
    from mlxops.agent.serving.memory import budget, check_fits, in_use

    cache = facts.shape.cache_of(_model_type_of(prepared))
    need = memory.estimate(facts.weight_bytes, cache, facts.shape.context_length, prepared.context_length)
    options, size = limits.installed_options(ctx, prepared), budget(ctx.paths)
    with _memory_check_lock(ctx):
        uses = in_use(ctx.observe(registry), ctx.system, ctx.reserved())
        leaving = {view.port for view in plan.stops}
        if not request.overcommit:
            check_fits(plan.target.name, need, size, uses, leaving, list(ctx.paths.settings.ports))
        if not ctx.request.dry_run:
            holder = replace(ctx.holder(plan.port), reserves=need.total)
            held.callback(_take_lock(ctx, memory_lock(plan.port), holder).release)
    staying = [use for use in uses if use.port not in leaving]
    return limits.give(ctx, registry, plan, prepared, options, need, staying, size.size)


@contextmanager
def _memory_check_lock(ctx: Context) -> Iterator[None]:
    """Allow one memory check with its reservation at a time."""
    if ctx.request.dry_run:
        yield
        return
    lock = _take_lock(ctx, "memory", ctx.holder())
    try:
        yield
    finally:
        lock.release()


def _take_lock(ctx: Context, name: str, holder: Operation) -> Lock:
    """Wait for a lock that other operations hold only briefly. Raises `Busy`."""
    deadline = time.monotonic() + MEMORY_CHECK_SECONDS
    while isinstance(lock := ctx.store.lock(name, holder), Operation):
        if time.monotonic() > deadline:
            raise busy(name, lock)
        time.sleep(0.02)
    return lock


def _check_disk(ctx: Context, plan: LoadPlan) -> None:
    """Check the state folder's disk now. If it were full after the old server stopped, that could not restart either.

    Raises `Refused` (does_not_fit).
    """
    free = free_on_disk(ctx.store.state)
    if free < STATE_DISK_BYTES:
        raise Refused(
            "does_not_fit",
            f"{plan.target.name} cannot be started: the disk of {ctx.store.state} is full",
            why=f"{amount(free)} are free; the records and the log of a server need {amount(STATE_DISK_BYTES)}",
            hint="free disk space on the host, then try again",
            details={"needed_bytes": STATE_DISK_BYTES, "free_bytes": free},
        )


def _warnings(ctx: Context, request: Load, plan: LoadPlan, prepared: Prepared, facts: ModelFacts) -> list[str]:
    files = prepared.files
    warnings = [
        f"{each}: {edit_notice(files.path / each.name, plan.target.repo_id, files.revision)}"
        for each in edited(files.path)
    ]
    warnings += facts.oddities
    size = size_warning(plan.alias, facts.weight_bytes)
    if size:
        warnings.append(size)
    name = name_warning(request, plan.alias, plan.port)
    if name:
        warnings.append(name)
    configured = prepared.context_length
    longest = facts.shape.context_length
    promised = context_warning(request, plan.port, configured or longest)
    if promised:
        warnings.append(promised)
    if configured and longest and configured > longest:
        warnings.append(f"context_length {configured} is more than the model supports: {longest}")
    if not facts.has_chat_template and prepared.serving.text("chat_template") is None:
        warnings.append(f"{plan.target.repo_id} has no chat template: the engine may refuse chat completions")
    return warnings


def entry_fields(target: ModelRef, files: ModelFiles) -> dict[str, object]:
    """Return the fields of the target's registry entry once it serves, without `port`."""
    fields = planner.entry_fields(target.repo_id, str(files.path))
    del fields["port"]
    if target.revision:
        return fields | {"revision": files.revision}
    # A revision in the entry belongs to the repository that the entry had before.
    return fields | ({"revision": None} if target.entry and target.entry.revision else {})


def commit(registry: Registry, plan: LoadPlan, files: ModelFiles) -> Registry:
    """Return the registry after a load: with the model's files, and with the port taken from its previous model."""
    entry = registry.models.get(plan.target.name)
    changed = entry is None or plan.target.repoint or entry.cache_path != str(files.path)
    if changed:
        registry = registry.set_fields(plan.target.name, entry_fields(plan.target, files))
    return registry.assign(plan.target.name, plan.port)


# If the control node can read the gateway's configuration, it sends the entries' names and context lengths for each
# port: in the request's `sent`, as {"8100": ["jerry-xl"]}, and in `promised`, as {"8100": 131072}.


def check_name(ctx: Context, request: Load, target: ModelRef, port: int) -> None:
    """Check that the engine will accept the names that the gateway sends. Call this before a download or a stop.

    Raises `Refused` (gateway_name, engine_not_found).
    """
    names = request.sent.get(str(port), ())
    if not names:
        return
    engine, command = ctx.engine(target)
    version = installed_version(command.argv, engine.distribution)
    if not engine.accepts_any_name(version):
        also = engine.further_names(version)
        planner.check_sent_names(port, ctx.paths.settings.alias(port, target.name), names, also)


def name_warning(request: Load, alias: str, port: int) -> str | None:
    """Return a warning if the gateway sends another name than the alias. Other engines may not accept that name."""
    other = [name for name in request.sent.get(str(port), ()) if name != alias]
    if not other:
        return None
    return f"the gateway sends the name {shown(other[0])} to port {port}; another engine there would only know {alias}"


def context_warning(request: Load, port: int, context_length: int | None) -> str | None:
    """Return a warning if the gateway promises more input tokens than the model accepts."""
    promised = request.promised.get(str(port))
    if promised is None or context_length is None or promised <= context_length:
        return None
    return f"the gateway promises {promised} input tokens on port {port}; this model takes {context_length}"
