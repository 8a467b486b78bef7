"""Find the model names that a request to the live server on a port may use.

mlxops sends no other name: a request with an unknown name makes mlx-lm drop its model.
"""

from __future__ import annotations

from dataclasses import replace

from mlxops.agent.engines import ENGINES
from mlxops.agent.engines.base import ServedNames
from mlxops.agent.engines.installation import installed_version
from mlxops.core.frozen import dataclass
from mlxops.core.ports import Owner, PortView
from mlxops.core.records import Run, Server


def names_of(view: PortView) -> ServedNames:
    """Return the names that follow from the server's command. For our own servers, the proven alias comes first."""
    if view.owner is None:
        return ServedNames()
    run, served = _own_run(view), _served(view)
    engine = ENGINES.get(served.engine) if served else None
    if served is None or engine is None:
        return ServedNames(not_asked="its name is not known: its program is not one that mlxops knows")
    recorded = run.engine_version if run else None
    names = engine.accepted_names(served.argv, recorded or installed_version(served.argv, engine.distribution))
    if run is None or not run.alias:
        return names
    further = tuple(name for name in names.known if name != run.alias)
    return replace(names, known=(run.alias, *further), sure=True, not_asked="")


def paths_of(view: PortView) -> list[str]:
    """Return the paths at which the server gives completions; empty if not known."""
    served = _served(view)
    engine = ENGINES.get(served.engine) if served and view.owner else None
    return sorted(engine.completion_paths) if engine else []


def _served(view: PortView) -> Run | Server | None:
    return _own_run(view) or view.server


def _own_run(view: PortView) -> Run | None:
    """The run record, if the live server is ours."""
    return view.run if view.owner is Owner.MLXOPS else None


@dataclass(frozen=True)
class NameFields:
    """The fields of results that say which names a server knows.

    `answers_to`: the only name that the server accepts; None: any, or not known. `also_answers_to`: further names for
    the same model. `answers_to_any`: it accepts any name. `drops_for_others`: it drops its model for an unknown one.
    `not_asked`: why it must not be asked; None if it may be.
    """

    answers_to: str | None
    also_answers_to: tuple[str, ...]
    answers_to_any: bool
    drops_for_others: bool
    not_asked: str | None


def name_fields(names: ServedNames) -> NameFields:
    only = tuple(names.known) if names.sure and not names.any else ()
    return NameFields(
        answers_to=only[0] if only else None,
        also_answers_to=only[1:],
        answers_to_any=names.any,
        drops_for_others=names.drops,
        not_asked=names.not_asked or None,
    )
