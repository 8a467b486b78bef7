"""The manual travels with the wheel and with `deploy --mlxctl`."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

from mlxops.agent import install
from mlxops.cli import manual
from mlxops.control import deploy

PAGES = {f"mlxops/docs/{topic}.md" for topic in manual.topics()}


def test_archive_holds_every_page() -> None:
    with tarfile.open(fileobj=io.BytesIO(deploy.archive())) as tar:
        assert set(tar.getnames()) >= PAGES


def test_pages_are_unpacked_only_with_mlxctl(tmp_path: Path) -> None:
    for full in (True, False):
        folder = tmp_path / str(full)
        install.unpack(deploy.archive(), folder, tmp_path / "wheels", full=full)
        pages = {path.relative_to(folder).as_posix() for path in folder.rglob("*.md")}
        assert pages == (PAGES if full else set())
