"""The names by which the live server on a port may be asked. No request is sent to it under another one: mlx-lm drops
the model that it holds for a name that it does not know."""

from __future__ import annotations

from dataclasses import replace

from mlxops.agent.engine import Names, installed_version
from mlxops.agent.engines import ENGINES
from mlxops.core.world import Owner, PortView


def names_of(view: PortView) -> Names:
    """What the server's command tells; for one of ours also the alias, under which it was proven."""
    run = view.run if view.owner is Owner.MLXOPS else None
    served = run or view.server
    engine = ENGINES.get(served.engine) if served else None
    if view.owner is None:
        return Names()
    if served is None or engine is None:
        return Names(not_asked="its name is not known: its program is not one that mlxops knows")
    recorded = run.engine_version if run else None
    names = engine.names(served.argv, recorded or installed_version(served.argv, engine.distribution))
    if run is None or not run.alias:
        return names
    further = tuple(name for name in names.known if name != run.alias)
    return replace(names, known=(run.alias, *further), sure=True, not_asked="")


def told(names: Names) -> dict[str, object]:
    """For the control node: `answers_to`, the only name that the server answers to, None: any name, or not known;
    `also_answers_to`, further ones for the same model; `answers_to_any`; `drops_for_others`; `not_asked`, why it must
    not be asked, None if it may be."""
    only = names.known if names.sure and not names.any else ()
    return {
        "answers_to": only[0] if only else None,
        "also_answers_to": list(only[1:]),
        "answers_to_any": names.any,
        "drops_for_others": names.drops,
        "not_asked": names.not_asked or None,
    }
