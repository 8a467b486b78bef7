"""What every test runs in: a throwaway home directory, and a look at what it leaves behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path

import pytest

from tests import properties as properties  # hypothesis keeps its notes outside the checkout
from tests.lab import cache, leaks, models, world
from tests.lab.homelab import CHECKOUT, Homelab, LabUnavailable
from tests.lab.hub import Hub
from tests.lab.quick import with_fake
from tests.lab.sshd import missing
from tests.lab.wire import Wire
from tests.lab.wired import wired as over_a_wire
from tests.steps import WAYS, Ask

_FOREIGN = ("HF_", "HUGGING", "XDG_", "MLXOPS_", "MLX_", "INVOKE_", "FABRIC_", "SSH_", "GIT_", "LITELLM_")
"""Variables with which the user's shell could change the outcome of a test."""


def _move_out() -> Path:
    """Give this process a home and a temporary directory of its own; returns the folder that holds them.

    While this module is imported, and not later, because libraries compute their paths when they are imported.
    """
    real_home = os.environ.get(cache.REAL_HOME) or str(Path.home())
    kept = str(cache.cache_folder())
    # pytest's own folders stay where they always are, so that they can be looked at after a failure.
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
    folder = Path(tempfile.mkdtemp(prefix="mlxops-tests-"))
    for name in list(os.environ):
        if name.startswith(_FOREIGN):
            del os.environ[name]
    for name, part in (("HOME", "home"), ("TMPDIR", "tmp")):
        (folder / part).mkdir(mode=0o700)
        os.environ[name] = str(folder / part)
    tempfile.tempdir = None  # forget what it was computed from
    # For pytest-xdist's workers, which start from this environment.
    os.environ["MLXOPS_TEST_CACHE"] = kept
    os.environ[cache.REAL_HOME] = real_home
    return folder


# A background job of a shell ignores these signals, and so would every program that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)
_THROWAWAY = _move_out()
leaks.become_subreaper()


LAB_FIXTURES = {"engine", "openai_server", "tiny_models", "talking_model", "hub", "litellm", "make_homelab"}
"""The fixtures of this file that build or start a part of the lab."""
OPTIONAL_MARKS = {"all_engines": "--all-engines", "long": "--long"}
"""Marks of tests that run only with an option."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--leak-patience", type=float, default=20.0, help="seconds that a test's processes and threads have to end"
    )
    parser.addoption("--all-engines", action="store_true", help="test every supported version of mlx-openai-server")
    parser.addoption("--long", action="store_true", help="also run the tests that are marked `long`")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the optional tests, mark the tests that need the lab, and group the tests for pytest-xdist.

    This runs before other plugins, because `-m` and pytest-xdist read the marks that are set here.
    """
    left_out = [mark for mark, option in OPTIONAL_MARKS.items() if not config.getoption(option)]
    deselected = [item for item in items if any(map(item.get_closest_marker, left_out))]
    config.hook.pytest_deselected(items=deselected)
    items[:] = [item for item in items if item not in deselected]
    for item in items:
        if _lab_fixtures(item):
            item.add_marker(pytest.mark.lab)
    if hasattr(config, "workerinput"):
        for item in items:
            shared = any(definition.scope in ("module", "class") for definition in _fixtures(item).values())
            if shared and item.get_closest_marker("xdist_group") is None:  # two names would make a third group
                # One worker runs them all. A second worker would set up the shared fixture again.
                item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))
        # Start the long tests first, so that the workers finish at about the same time.
        items.sort(key=lambda item: item.get_closest_marker("lab") is None)


def _fixtures(item: pytest.Item) -> dict[str, pytest.FixtureDef[object]]:
    """Return the fixtures that a test uses. If a name is defined more than once, the last definition is the one."""
    info = getattr(item, "_fixtureinfo", None)
    return {name: definitions[-1] for name, definitions in info.name2fixturedefs.items()} if info else {}


def _lab_fixtures(item: pytest.Item) -> set[str]:
    """Return the fixtures of the lab that a test uses. Test files may use the same names for fixtures of their own."""
    fixtures = _fixtures(item)
    return {name for name in LAB_FIXTURES & fixtures.keys() if fixtures[name].func.__module__ == __name__}


def pytest_unconfigure() -> None:
    shutil.rmtree(_THROWAWAY, ignore_errors=True)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Build what the collected tests need, before the first one: no test's time limit covers a download."""
    builders: dict[str, Callable[[], object]] = {
        "engine": lambda: cache.engine_venv("mlx-lm"),
        "tiny_models": models.tiny_models,
        "hub": cache.hub_venv,
        "litellm": cache.gateway_venv,
    }
    needed = {name for item in session.items for name in _lab_fixtures(item)}
    if cache.has_openai_server():
        for item in session.items:
            chosen = getattr(item, "callspec", None)
            if chosen and "server" in chosen.params and "openai_server" in item.fixturenames:  # type: ignore[attr-defined]
                version, transformers = chosen.params["server"]
                builders[item.nodeid] = partial(cache.openai_server_venv, version, transformers=transformers)
                needed.add(item.nodeid)
    if session.config.option.collectonly or not needed & builders.keys():
        return
    capture = session.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled() if capture else nullcontext():
        for name in builders.keys() & needed:
            try:
                builders[name]()
            except cache.BuildFailed as error:
                pytest.exit(f"{name} could not be built: {error}", returncode=pytest.ExitCode.INTERNAL_ERROR)


# -- nothing is left behind ---------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def watch(tmp_path_factory: pytest.TempPathFactory) -> leaks.Watch:
    """What looks for leaks; `watch.spare(folder)` is for a lab that several tests share."""
    return leaks.Watch((_THROWAWAY / "home", _THROWAWAY / "tmp"), lab=tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session", autouse=True)
def _nothing_left_by_the_run(watch: leaks.Watch, pytestconfig: pytest.Config) -> Iterator[None]:
    checkout = _untracked()
    yield from _checked(watch, "the run", pytestconfig)
    assert _untracked() == checkout, "the run left files in the checkout"


@pytest.fixture(autouse=True)
def _nothing_left_by_the_test(watch: leaks.Watch, pytestconfig: pytest.Config) -> Iterator[None]:
    """Set up first and torn down last of all function-scoped fixtures; servers of wider ones are there before."""
    yield from _checked(watch, "the test", pytestconfig)


def _checked(watch: leaks.Watch, who: str, config: pytest.Config) -> Generator[None]:
    before = watch.process_table()
    yield
    # A command that runs inside this process ignores SIGINT at its end. The next test's programs would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if found := watch.leaks(before, config.getoption("--leak-patience")):
        # One failure, not one for each test that follows.
        world.end(watch.process_table().processes - before.processes)
        pytest.fail(f"{who} left behind {'; '.join(found)}", pytrace=False)


def _untracked() -> str:
    """What git does not know in the checkout. Asked for in CI only: elsewhere people edit while tests run."""
    if os.environ.get("CI") != "true" or not (CHECKOUT / ".git").exists():
        return ""
    command = ["git", "-c", f"safe.directory={CHECKOUT}", "status", "--porcelain"]
    return subprocess.run(command, cwd=CHECKOUT, check=True, capture_output=True, text=True).stdout


# -- the lab ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def engine() -> Path:
    """The virtual environment of the real mlx-lm."""
    return cache.engine_venv("mlx-lm")


@pytest.fixture
def server() -> tuple[str, str]:
    """The version of mlx-openai-server, and what is asked of its transformers; tests parametrize it."""
    return cache.OPENAI_SERVERS[0], ""


@pytest.fixture
def openai_server(server: tuple[str, str]) -> Path:
    """The program of a real mlx-openai-server."""
    if not cache.has_openai_server():
        pytest.skip(f"mlx-openai-server runs on Python 3.11 and 3.12, not on {cache.PYTHON}")
    version, transformers = server
    return cache.openai_server_venv(version, transformers=transformers) / "bin" / "mlx-openai-server"


@pytest.fixture(scope="session")
def tiny_models() -> Path:
    """The folder of the tiny models' directories."""
    return models.tiny_models()


@pytest.fixture(scope="session")
def talking_model() -> Path:
    """The directory of a model that talks."""
    try:
        return models.talking_model() / models.TALKING
    except cache.BuildFailed as error:
        missing(str(error))


@pytest.fixture(scope="session")
def litellm() -> Path:
    """The virtual environment of the real LiteLLM."""
    return cache.gateway_venv()


@pytest.fixture(scope="session")
def hub(tiny_models: Path, watch: leaks.Watch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A running hub that has every tiny model as `tiny-org/<name>`. Tests that change a repository add their own."""
    if shutil.which("git") is None:
        missing("git (Debian and Ubuntu: apt-get install git)")
    folder = tmp_path_factory.mktemp("hub")
    with watch.spare(folder), Hub(folder) as running:
        for name in (models.QWEN, models.QWEN_B, models.LLAMA, models.BROKEN):
            running.add(f"tiny-org/{name}", tiny_models / name)
        yield running


@pytest.fixture
def make_homelab(tiny_models: Path, tmp_path: Path) -> Iterator[Callable[..., Homelab]]:
    """Starts homelabs, with the arguments of `Homelab` after the folder; all are stopped after the test."""
    with ExitStack() as stack:
        count = 0

        def make(**how: object) -> Homelab:
            nonlocal count
            count += 1
            try:
                lab = Homelab(tmp_path / f"lab{count}", **how)  # type: ignore[arg-type]  # passed on as they are
            except LabUnavailable as error:
                missing(str(error))
            return stack.enter_context(lab)

        yield make


@pytest.fixture
def homelab(make_homelab: Callable[..., Homelab]) -> Homelab:
    """A Mini and one Studio, without a hub: downloads fail at once."""
    return make_homelab()


@pytest.fixture
def quick_engine(homelab: Homelab) -> None:
    """Give the homelab's Studio the fake engine, for a test that starts servers and does not depend on the engine."""
    with_fake(homelab)


@pytest.fixture(params=WAYS)
def ask(request: pytest.FixtureRequest, homelab: Homelab) -> Ask:
    """Asks a Studio with the fake engine: over SSH, and locally."""
    return Ask(with_fake(homelab), request.param)


@pytest.fixture
def remote(homelab: Homelab) -> Ask:
    """Asks a Studio with the fake engine over SSH."""
    return Ask(with_fake(homelab), "ssh")


@pytest.fixture
def online_homelab(make_homelab: Callable[..., Homelab], hub: Hub) -> Homelab:
    """A Mini and one Studio that downloads from the hub."""
    return make_homelab(hub_url=hub.url)


@pytest.fixture
def slow_hub(hub: Hub) -> Iterator[Wire]:
    """A connection to the hub that is slow enough for a download to be observed. It can also be stalled."""
    with Wire(("127.0.0.1", int(hub.url.rpartition(":")[2])), delay=0.15) as wire:
        yield wire


@pytest.fixture
def wired(make_homelab: Callable[..., Homelab], slow_hub: Wire) -> Iterator[tuple[Homelab, Wire]]:
    """A homelab with the fake engine that downloads from the slow hub, and the connection from its Mini to its Studio,
    which can be cut."""
    lab = with_fake(make_homelab(hub_url=f"http://127.0.0.1:{slow_hub.port}"))
    with over_a_wire(lab) as wire:
        yield lab, wire
