"""Weight files form a set by their numbers. An index or the hub's list counts only if it names these files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlxops.agent.hub.cache import Snapshot, find
from mlxops.agent.hub.snapshot import inspect
from mlxops.agent.hub.weights import language_weights, missing, weights
from tests.agent.test_cache import model, safetensors
from tests.lab.models import install_snapshot

INDEX = "model.safetensors.index.json"


def shards(*numbers: int, of: int, form: str = "model-{:05d}-of-{:05d}.safetensors") -> list[str]:
    return [form.format(number, of) for number in numbers]


@pytest.mark.parametrize(
    ("present", "listed", "lacking"),
    [
        (["model.safetensors"], [], None),
        (shards(1, 2, of=2), [], None),
        (shards(1, of=2), [], shards(2, of=2)[0]),
        (shards(1, 3, of=3), [], shards(2, of=3)[0]),
        # names of other forms
        (shards(1, 2, of=2, form="model-{}-of-{}.safetensors"), [], None),
        (shards(1, of=2, form="model-{}-of-{}.safetensors"), [], "model-2-of-2.safetensors"),
        (shards(1, of=163, form="model-{:05d}-of-{:06d}.safetensors"), [], "model-00002-of-000163.safetensors"),
        (
            shards(1, of=2, form="model.safetensors-{:05d}-of-{:05d}.safetensors"),
            [],
            "model.safetensors-00002-of-00002.safetensors",
        ),
        (shards(0, 1, of=2), [], None),
        (shards(0, of=2), [], shards(1, of=2)[0]),
        # a list of these files
        (shards(1, of=2), shards(1, 2, of=2), shards(2, of=2)[0]),
        ([*shards(1, 2, of=2)], [*shards(1, 2, of=2), "model-mtp.safetensors"], "model-mtp.safetensors"),
        (
            ["model-text.safetensors"],
            ["model-text.safetensors", "model-vision.safetensors"],
            "model-vision.safetensors",
        ),
        # a list of another conversion's files
        (shards(1, 2, of=2), shards(*range(1, 11), of=10), None),
        (["model.safetensors"], shards(1, 2, of=2), None),
        (shards(1, of=2), shards(*range(1, 11), of=10), shards(2, of=2)[0]),
        (["model-mine.safetensors"], shards(1, 2, of=2), None),
        # files of another conversion beside a complete set
        (["model.safetensors", *shards(3, of=10)], [], None),
        ([*shards(1, 2, of=2), *shards(3, of=10)], shards(1, 2, of=2), None),
        ([*shards(1, of=2), *shards(3, of=10)], [], shards(2, of=2)[0]),
    ],
)
def test_numbers_in_names_show_missing_weights(present: list[str], listed: list[str], lacking: str | None) -> None:
    assert missing(present, listed) == lacking


def test_engines_load_files_that_match_their_pattern() -> None:
    names = ["model.safetensors", "adapters.safetensors", "._model.safetensors", "a/model.safetensors", "model.bin"]
    assert language_weights(names) == weights(names) == ["model.safetensors"]
    assert language_weights(names[1:]) == [] and weights(names[1:]) == ["adapters.safetensors"]


@pytest.mark.parametrize("trees", [False, True])
@pytest.mark.parametrize("index", [shards(*range(1, 11), of=10), shards(1, of=1), []], ids=["more", "fewer", "none"])
def test_stale_index_is_a_warning_and_not_a_problem(tmp_path: Path, index: list[str], trees: bool) -> None:
    source = model(tmp_path / "source")
    (source / "model.safetensors").unlink()
    for name in shards(1, 2, of=2):
        (source / name).write_bytes(safetensors())
    path = install_snapshot(tmp_path / "hub", "org/stale", source, trees=trees)
    (path / INDEX).write_text(json.dumps({"metadata": {"total_size": 7}, "weight_map": dict(enumerate(index))}))
    assert isinstance(find(tmp_path / "hub", "org/stale"), Snapshot)
    facts = inspect(path)
    assert facts.problems == () and any(INDEX in each for each in facts.oddities) == bool(index)
