"""The table of known faults of engine versions. Pure. To add one, add a row to `FAULTS`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from mlxops.core.doctor.findings import Finding, FindingCode
from mlxops.core.frozen import dataclass

Version = tuple[int, ...]


@dataclass(frozen=True)
class Fault:
    """A fault of the versions from `since` until, and without, `before`."""

    code: FindingCode
    package: str
    since: Version
    before: Version
    what: str
    with_package: tuple[str, Version] | None = None
    """The fault appears only together with this package, from this version on."""


FAULTS = (
    Fault(
        FindingCode.ENGINE_RUNS_CODE,
        "mlx_lm",
        (0, 30, 6),
        (0, 32),
        "can run code of a model's repository (CVE-2026-5843)",
    ),
    Fault(
        FindingCode.ENGINE_DROPS_LAYERS,
        "mlx_lm",
        (0, 30, 6),
        (0, 32, 2),
        "can lose layers of a model that is split over several hosts",
    ),
    Fault(
        FindingCode.ENGINE_FAILS,
        "mlx_openai_server",
        (0,),
        (1, 5),
        "fails every completion with transformers 5",
        ("transformers", (5,)),
    ),
)
PACKAGES = tuple(dict.fromkeys(name for each in FAULTS for name in (each.package, *(each.with_package or ())[:1])))
"""The packages whose versions decide."""


def parse_version(text: str) -> Version:
    """Return the numbers that a version begins with: (0, 32, 2) for `0.32.2rc1`."""
    found = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(map(int, found[0].split("."))) if found else ()


def engine_findings(engine: str, versions: Mapping[str, str]) -> Iterator[Finding]:
    """Yield the known faults of an installed engine. `versions`: package -> version, of the packages beside it."""
    parsed = {package: parse_version(text) for package, text in versions.items()}
    for fault in FAULTS:
        other, least = fault.with_package or ("", ())
        if fault.since <= parsed.get(fault.package, ()) < fault.before and parsed.get(other, ()) >= least:
            carrier = fault.package.replace("_", "-")
            beside = f", which {engine} uses," if carrier != engine else ""
            yield Finding.of(fault.code, f"{carrier} {versions[fault.package]}{beside} {fault.what}")
