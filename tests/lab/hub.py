"""A Hugging Face hub on loopback: olah, offline, serves git repositories that are made here from model directories.

The client's side is the real huggingface_hub, pointed here by `HF_ENDPOINT`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from tests.lab import cache, models
from tests.lab.service import Service
from tests.lab.world import end, free_port, processes_below, wait_until

_START = 60.0
"""Seconds; it takes about two."""
_TRIES = 5
_PORT_TAKEN = "address already in use"


class HubFailed(Exception):
    """The hub did not start; the message has the end of its log."""


class Hub(Service):
    """A hub whose repositories live in `folder`; usable while it is entered or between `start` and `stop`.

    Repositories can be added and updated at any time.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "hub.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._port = 0
        (folder / "repos" / "models").mkdir(parents=True)

    @property
    def url(self) -> str:
        """What `HF_ENDPOINT` is to be."""
        return f"http://127.0.0.1:{self._port}"

    def add(self, repo_id: str, model_dir: Path) -> str:
        """Make the repository with one commit on `main`; returns the commit's name."""
        repo = self._repo(repo_id)
        repo.mkdir(parents=True)
        _git(repo, "init", "--quiet", "--initial-branch=main")
        return self.update(repo_id, model_dir)

    def update(self, repo_id: str, model_dir: Path) -> str:
        """One more commit on `main`, after which the repository holds what `model_dir` holds; returns its name.

        The same history of contents gives the same commits, on every machine.
        """
        repo = self._repo(repo_id)
        for old in repo.iterdir():
            if old.name != ".git":
                shutil.rmtree(old) if old.is_dir() else old.unlink()
        for file in models.files_of(model_dir):
            target = repo / file.name
            target.parent.mkdir(parents=True, exist_ok=True)
            if file.sha256:
                target.write_bytes(models.lfs_pointer(file.sha256, file.size))
                content = repo / ".git" / "lfs" / "objects" / file.sha256[:2] / file.sha256[2:4] / file.sha256
                content.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file.path, content)
            else:
                shutil.copyfile(file.path, target)
        number = int(_git(repo, "rev-list", "--count", "--all"))
        _git(repo, "add", "--all", "--force")
        day = f"2026-01-{number % 28 + 1:02}T00:00:00+00:00"
        _git(
            repo,
            "commit",
            "--quiet",
            "--allow-empty",
            f"--message=Upload {number + 1}",
            env={"GIT_AUTHOR_DATE": day, "GIT_COMMITTER_DATE": day},
        )
        return self.sha(repo_id)

    def sha(self, repo_id: str) -> str:
        """The commit that `main` points to."""
        return _git(self._repo(repo_id), "rev-parse", "main")

    def remove(self, repo_id: str) -> None:
        shutil.rmtree(self._repo(repo_id))

    def start(self) -> None:
        """Raises `HubFailed`, `cache.BuildFailed`."""
        program = cache.hub_venv() / "bin" / "olah-cli"
        for _ in range(_TRIES):
            self._launch(program)
            if self._answers():
                return
            self.stop()
            if _PORT_TAKEN not in self.log.read_text(encoding="utf-8", errors="replace"):
                break
        raise HubFailed(f"the hub did not start:\n{self._last_words()}")

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            # Nothing of it is worth a graceful end, which would wait for open connections.
            process.kill()
            process.wait()
            end(processes_below(self.folder))  # its gits, which have sessions of their own

    def _repo(self, repo_id: str) -> Path:
        return self.folder / "repos" / "models" / repo_id

    def _launch(self, program: Path) -> None:
        self._port = free_port()
        settings = self.folder / "olah.toml"
        settings.write_text(
            f"""\
[basic]
host = "127.0.0.1"
port = {self._port}
repos-path = "{self.folder / "cache"}"
mirrors-path = ["{self.folder / "repos"}"]
metadata-cache-ttl = 0

[accessibility]
offline = true
""",
            encoding="utf-8",
        )
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [program, "--config", settings, "--log-path", self.folder / "logs"],
                cwd=self.folder,
                env={"HOME": str(self.folder), "PATH": os.defpath, "LC_ALL": "C.UTF-8", "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _answers(self) -> bool:
        """Wait until it answers, or has ended."""
        process = self._process
        assert process is not None

        def settled() -> bool:
            return process.poll() is not None or self._up()

        try:
            wait_until(settled, _START, "the hub's first answer")
        except TimeoutError:
            return False
        return process.poll() is None

    def _up(self) -> bool:
        # "INFO: Uvicorn running on ..." is said by our process; another one's listener would not be ours.
        if not re.search(rf"running on http://127\.0\.0\.1:{self._port}\b", self.log.read_text(errors="replace")):
            return False
        try:
            with urllib.request.urlopen(f"{self.url}/api/models/no/such", timeout=5):
                return True
        except urllib.error.HTTPError:
            return True
        except OSError:
            return False

    def _last_words(self) -> str:
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:])


def _git(repo: Path, *arguments: str, env: Mapping[str, str] | None = None) -> str:
    """Run git without anyone's configuration; returns what it prints. Raises `CalledProcessError`."""
    author = {f"GIT_{who}_{what}": value for who in ("AUTHOR", "COMMITTER") for what, value in _AUTHOR.items()}
    done = subprocess.run(
        ["git", *arguments],
        cwd=repo,
        env={
            "PATH": os.environ.get("PATH", os.defpath),
            "HOME": str(repo),
            "GIT_CONFIG_GLOBAL": os.devnull,
            "GIT_CONFIG_NOSYSTEM": "1",
            "GIT_CONFIG_COUNT": "1",
            # The work tree holds the pointers themselves, byte for byte.
            "GIT_CONFIG_KEY_0": "core.autocrlf",
            "GIT_CONFIG_VALUE_0": "false",
            **author,
            **(env or {}),
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


_AUTHOR = {"NAME": "Tiny Org", "EMAIL": "tiny@example.org"}
