"""The lab: its parts are real, and leaks of tests are found."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import urllib.error
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.lab import cache, leaks, models, world
from tests.lab.demo import QUESTION
from tests.lab.homelab import Homelab, Studio, TimedOut, run
from tests.lab.hub import Hub


@pytest.fixture(scope="module")
def shared() -> None:
    """A fixture that only one worker may set up."""


def test_tests_that_share_a_fixture_run_in_one_worker(shared: None, request: pytest.FixtureRequest) -> None:
    """pytest-xdist groups tests by the end of their ids, and sets it in a field that pytest 9.2 does not have."""
    if not getattr(request.config.option, "loadgroup", False):
        pytest.skip("not run by a worker of `--dist loadgroup`")
    assert request.node.nodeid.endswith("@tests/lab/test_lab.py"), "pip install -e '.[dev]'"


@contextmanager
def serving(studio: Studio, snapshot: Path, alias: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run the bare engine on the studio's first port. It serves a snapshot under an alias."""
    folder = studio.folder / f"serving-{alias}"
    folder.mkdir()
    (folder / alias).symlink_to(snapshot)
    program = cache.engine_venv("mlx-lm") / "bin" / "mlx_lm.server"
    arguments = ["--model", alias, "--host", studio.address, "--port", str(studio.ports[0])]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [program, *arguments],
            cwd=folder,
            env={
                "HOME": str(studio.home),
                "HF_HUB_OFFLINE": "1",
                "HF_HUB_CACHE": str(studio.hub),
                "PATH": os.defpath,
            },
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        world.wait_until(lambda: studio.listening(studio.ports[0]), 60, "the engine's port")
        yield process
    finally:
        process.kill()
        process.wait()


class TestModels:
    @pytest.mark.parametrize("name", [models.QWEN, models.QWEN_B, models.LLAMA])
    @pytest.mark.parametrize("layout", [{}, {"trees": True, "xet": True}], ids=["plain", "xet"])
    def test_real_engine_serves_a_tiny_model_under_an_alias(
        self, homelab: Homelab, name: str, layout: dict[str, bool]
    ) -> None:
        studio = homelab.studio
        snapshot = studio.install(f"tiny-org/{name}", name, **layout)
        with serving(studio, snapshot, "jerry-xl"):
            answer = studio.completion(studio.ports[0], "jerry-xl")
            assert answer["model"] == "jerry-xl"
            assert answer["choices"][0]["message"]["content"]
            assert answer["usage"]["completion_tokens"] == 4

    def test_talking_model_answers_a_question(self, homelab: Homelab, talking_model: Path) -> None:
        studio = homelab.studio
        snapshot = models.install_snapshot(studio.hub, "tiny-org/talks", talking_model)
        with serving(studio, snapshot, "jerry-xl"):
            answer = studio.completion(studio.ports[0], "jerry-xl", prompt=QUESTION, max_tokens=12)
            assert "Paris" in answer["choices"][0]["message"]["content"]
            assert answer["choices"][0]["finish_reason"] == "stop"

    def test_broken_model_is_complete_on_disk_but_never_answers(self, homelab: Homelab) -> None:
        studio = homelab.studio
        snapshot = studio.install("tiny-org/broken", models.BROKEN)
        weights = (snapshot / "model.safetensors").read_bytes()
        length = int.from_bytes(weights[:8], "little")
        header = json.loads(weights[8 : 8 + length])
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        assert len(weights) == 8 + length + max(ends)
        with serving(studio, snapshot, "jerry-xl") as process:
            with pytest.raises(urllib.error.HTTPError, match="404"):
                studio.completion(studio.ports[0], "jerry-xl")
            assert process.poll() is None
            log = (studio.folder / "serving-jerry-xl" / "log").read_text()
            assert "Missing 1 parameters" in log

    def test_cache_equals_that_of_huggingface_hub(self, hub: Hub, tiny_models: Path, tmp_path: Path) -> None:
        downloaded = tmp_path / "downloaded"
        _download(downloaded, hub, "tiny-org/tiny-llama")
        installed = tmp_path / "installed"
        sha = hub.sha("tiny-org/tiny-llama")
        models.install_snapshot(installed, "tiny-org/tiny-llama", tiny_models / models.LLAMA, sha=sha, trees=True)
        assert _layout(installed) == _layout(downloaded)


class TestHub:
    def test_branch_and_a_commit_can_be_downloaded(self, hub: Hub, tiny_models: Path, tmp_path: Path) -> None:
        first = hub.add("tiny-org/moving", tiny_models / models.QWEN)
        second = hub.update("tiny-org/moving", tiny_models / models.QWEN_B)
        assert hub.sha("tiny-org/moving") == second != first
        newest = _download(tmp_path / "a", hub, "tiny-org/moving")
        oldest = _download(tmp_path / "b", hub, "tiny-org/moving", first)
        assert (newest.name, oldest.name) == (second, first)
        for snapshot, name in ((newest, models.QWEN_B), (oldest, models.QWEN)):
            for file in models.files_of(tiny_models / name):
                assert (snapshot / file.name).read_bytes() == file.path.read_bytes()

    def test_same_contents_give_the_same_commits(self, tiny_models: Path, tmp_path: Path) -> None:
        def history(folder: Path) -> list[str]:
            hub = Hub(folder)
            return [
                hub.add("tiny-org/x", tiny_models / models.QWEN),
                hub.update("tiny-org/x", tiny_models / models.QWEN_B),
            ]

        assert history(tmp_path / "one") == history(tmp_path / "two")

    def test_hub_knows_every_files_size(self, hub: Hub, tiny_models: Path) -> None:
        from huggingface_hub import HfApi, RepoFile

        tree = HfApi(endpoint=hub.url).list_repo_tree("tiny-org/tiny-llama", recursive=True)
        sizes = {entry.path: entry.size for entry in tree if isinstance(entry, RepoFile)}
        assert sizes == {file.name: file.size for file in models.files_of(tiny_models / models.LLAMA)}


class TestHomelab:
    def test_studios_are_reached_by_plain_ssh_in_their_own_homes(self, make_homelab: Callable[..., Homelab]) -> None:
        lab = make_homelab(studios=2, hub_url="http://127.0.0.1:9/hub")
        for studio in lab.studios:
            done = lab.mini.run("ssh", studio.name, "echo $HOME; echo $HF_ENDPOINT").ok()
            assert done.stdout.splitlines() == [str(studio.home), "http://127.0.0.1:9/hub"]
        assert lab.studios[0].ports == lab.studios[1].ports
        assert lab.studios[0].address != lab.studios[1].address

    def test_hosts_file_is_valid(self, make_homelab: Callable[..., Homelab]) -> None:
        from mlxops.control import inventory

        lab = make_homelab(studios=2)
        lab.configure("studio2", memory="8GB", launch=None)
        path = inventory.hosts_file(lab.mini.env, None)
        assert path is not None
        found = inventory.load(path)
        assert list(found.hosts) == ["studio", "studio2"]
        assert found.hosts["studio"].settings.bind == lab.studio.address
        assert found.hosts["studio2"].settings.memory == 8_000_000_000
        assert not found.hosts["studio2"].settings.launch

    def test_stray_process_on_a_studio_is_named_and_killed(self, make_homelab: Callable[..., Homelab]) -> None:
        lab = make_homelab()
        lab.mini.run("ssh", "studio", "cd ~ && exec >/dev/null 2>&1 && (sleep 1000 &)").ok()
        # The shell's child is a shell until it becomes sleep.
        studio = lab.studio
        world.wait_until(lambda: {each.command for each in studio.processes()} == {"sleep 1000"}, 30, "sleep to run")
        with pytest.raises(AssertionError, match=r"left behind on studio: .*sleep 1000"):
            lab.studio.stop(patience=0.1)
        assert not lab.studio.processes()

    def test_command_that_does_not_end_is_killed(self, tmp_path: Path) -> None:
        with pytest.raises(TimedOut, match="started"):
            run(["sh", "-c", "echo started; sleep 1000"], tmp_path, {"PATH": os.defpath}, timeout=0.5)


class TestLeaks:
    """The leak check, which runs after every test."""

    @pytest.fixture
    def own(self, tmp_path: Path) -> leaks.Watch:
        return leaks.Watch((tmp_path / "watched",), lab=tmp_path)

    def test_no_leak_is_reported_if_there_is_none(self, own: leaks.Watch) -> None:
        assert own.leaks(own.process_table()) == []

    def test_child_is_seen(self, own: leaks.Watch, tmp_path: Path) -> None:
        before = own.process_table()
        with subprocess.Popen(["sleep", "1000"], cwd=tmp_path) as child:
            found = own.leaks(before, patience=0)
            child.kill()
        assert found == [f"a process: {child.pid} (sleep 1000)"]
        assert own.leaks(before) == []

    def test_orphan_in_a_session_of_its_own_is_seen(self, own: leaks.Watch, tmp_path: Path) -> None:
        before = own.process_table()
        script = (
            "import subprocess; from subprocess import DEVNULL as no; "
            "print(subprocess.Popen(['sleep', '1000'], start_new_session=True, stdout=no, stderr=no).pid)"
        )
        pid = subprocess.run(
            [sys.executable, "-c", script], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout.strip()
        assert own.leaks(before, patience=0) == [f"a process: {pid} (sleep 1000)"]
        world.end(own.process_table().processes - before.processes)
        assert own.leaks(before) == []

    def test_orphan_that_has_ended_is_no_leak_and_no_zombie(self, own: leaks.Watch, tmp_path: Path) -> None:
        before = own.process_table()
        command = ["sh", "-c", "sleep 0.05 & echo $!"]
        pid = int(subprocess.run(command, cwd=tmp_path, check=True, stdout=subprocess.PIPE).stdout)
        assert own.leaks(before) == []
        # It may have ended between the two halves of a look. The next look collects it.
        world.wait_until(lambda: own.leaks(before) == [] and not psutil.pid_exists(pid), 30, "its collection")

    def test_status_of_an_own_child_is_not_collected(self, own: leaks.Watch) -> None:
        child = subprocess.Popen(["sh", "-c", "exit 7"])
        world.wait_until(lambda: psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE, 30, "its end")
        own.process_table()
        assert child.wait() == 7

    def test_listener_is_seen(self, own: leaks.Watch) -> None:
        before = own.process_table()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            assert own.leaks(before, patience=0) == [f"a listener: 127.0.0.1:{listener.getsockname()[1]}"]
        assert own.leaks(before) == []

    def test_thread_is_seen(self, own: leaks.Watch) -> None:
        before = own.process_table()
        leave = threading.Event()
        thread = threading.Thread(target=leave.wait, name="forgotten")
        thread.start()
        assert own.leaks(before, patience=0) == ["a thread: forgotten"]
        leave.set()
        assert own.leaks(before) == []
        thread.join()

    def test_file_is_seen(self, own: leaks.Watch, tmp_path: Path) -> None:
        before = own.process_table()
        left = tmp_path / "watched" / "deep" / "left"
        left.parent.mkdir(parents=True)
        left.touch()
        assert own.leaks(before, patience=0) == [f"a file: {left.parent}", f"a file: {left}"]

    def test_process_that_ends_in_time_is_no_leak(self, own: leaks.Watch, tmp_path: Path) -> None:
        before = own.process_table()
        with subprocess.Popen(["sleep", "0.2"], cwd=tmp_path):
            assert own.leaks(before) == []

    def test_shared_lab_may_keep_its_processes(self, own: leaks.Watch, tmp_path: Path) -> None:
        before = own.process_table()
        with subprocess.Popen(["sleep", "1000"], cwd=tmp_path) as child:
            with own.spare(tmp_path):
                assert own.leaks(before, patience=0) == []
            assert own.leaks(before, patience=0) != []
            child.kill()

    def test_leaking_test_fails(self, tmp_path: Path) -> None:
        """Run pytest with a test that leaves a process, and with a clean test after it."""
        probe = tmp_path / "test_probe.py"
        probe.write_text(
            "import subprocess\ndef test_leaks(): subprocess.Popen(['sleep', '1000'])\ndef test_is_clean(): pass\n",
            encoding="utf-8",
        )
        command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "--leak-patience=0.1", str(probe)]
        root = Path(__file__).resolve().parents[2]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
        assert done.returncode == 1, done.stdout + done.stderr
        assert "the test left behind a process: " in done.stdout
        assert "2 passed, 1 error" in done.stdout


class TestCache:
    def test_interrupted_build_is_repeated(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cache, "cache_folder", lambda: tmp_path)

        def interrupted(folder: Path) -> None:
            folder.mkdir()
            (folder / "half").touch()
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            cache.built("part", "1", interrupted)
        folder = cache.built("part", "1", Path.mkdir)
        assert not (folder / "half").exists()

    def test_build_is_made_once_for_each_stamp(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cache, "cache_folder", lambda: tmp_path)
        made: list[Path] = []

        def build(folder: Path) -> None:
            made.append(folder)
            folder.mkdir()

        for stamp in ("1", "1", "2"):
            cache.built("part", stamp, build)
        assert len(made) == 2

    def test_failed_step_prints_its_last_output(self) -> None:
        with pytest.raises(cache.BuildFailed, match="exit status 3\nno room"):
            cache.run(["sh", "-c", "echo no room; exit 3"])

    @pytest.mark.parametrize(
        ("environ", "folder"),
        [
            ({"MLXOPS_TEST_CACHE": "/big/disk", "HOME": "/home/a"}, "/big/disk"),
            ({"MLXOPS_TEST_CACHE": "", "HOME": "/home/a", "XDG_CACHE_HOME": "/xdg"}, "/xdg/mlxops-test"),
            ({"HOME": "/home/a", "XDG_CACHE_HOME": "relative"}, "/home/a/.cache/mlxops-test"),
            ({"HOME": "/home/a"}, "/home/a/.cache/mlxops-test"),
        ],
    )
    @pytest.mark.skipif(sys.platform == "darwin", reason="the XDG directories are not macOS's")
    def test_cache_folder_follows_the_environment(self, environ: dict[str, str], folder: str) -> None:
        assert cache.cache_folder(environ) == Path(folder)


def test_real_home_directory_is_out_of_reach() -> None:
    from huggingface_hub import constants

    home = Path(os.environ["HOME"])
    assert Path.home() == home
    assert home != Path(os.environ[cache.REAL_HOME])
    assert Path(constants.HF_HUB_CACHE).is_relative_to(home)


def _download(hub_cache: Path, hub: Hub, repo_id: str, revision: str | None = None) -> Path:
    """Download with the real client, in its own process, because it keeps listings across cache folders."""
    script = "import sys, huggingface_hub as h; print(h.snapshot_download(sys.argv[1], revision=sys.argv[2] or None))"
    environment = {
        "HOME": str(hub_cache.parent),
        "HF_ENDPOINT": hub.url,
        "HF_HUB_CACHE": str(hub_cache),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "PATH": os.defpath,
    }
    done = run([sys.executable, "-c", script, repo_id, revision or ""], hub_cache.parent, environment).ok()
    return Path(done.stdout.strip())


def _layout(hub_cache: Path) -> dict[str, object]:
    """Return every file of a cache with its content or link target, without the locks and the folder's tag."""
    return {
        str(path.relative_to(hub_cache)): path.readlink() if path.is_symlink() else path.read_bytes()
        for path in leaks.walk(hub_cache)
        if not path.is_dir() and ".locks" not in path.parts and path.name != "CACHEDIR.TAG"
    }
