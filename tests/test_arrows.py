"""Who may import whom: `tasks -> control -> core <- agent`, and what is too slow to be imported by chance."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from mlxops.common.build import build_id
from mlxops.core.settings import Settings
from tests.lab.envelopes import envelope

CHECKOUT = Path(__file__).parents[1]
PACKAGE = CHECKOUT / "mlxops"

PURE = {
    "__future__",
    "collections",
    "dataclasses",
    "difflib",
    "enum",
    "functools",
    "ipaddress",
    "itertools",
    "json",
    "math",
    "re",
    "shlex",
    "string",
    "textwrap",
    "types",
    "typing",
    "unicodedata",
}
"""The standard library's modules that compute and do nothing else."""
PURE_PARTS = ("urllib.parse", "importlib.import_module")
"""Those of packages that otherwise do more."""

SERVE_ONLY = {"starlette", "uvicorn", "prometheus_client", "h11"}
"""The packages of the extra `serve`. Everything else works without them."""
HEAVY = {"huggingface_hub", "fabric", "paramiko", "yaml", "rich", "psutil", *SERVE_ONLY}
CONTROL_ONLY = {"fabric", "paramiko", "invoke", "yaml", "rich", *SERVE_ONLY}


@dataclass(frozen=True)
class Import:
    """An import of `module` by `path`. `late`: inside a function, or only for type checkers."""

    path: Path
    line: int
    module: str
    late: bool

    def __str__(self) -> str:
        return f"{self.path.relative_to(CHECKOUT)}:{self.line} imports {self.module}"

    @property
    def top(self) -> str:
        return self.module.split(".")[0]


def imports(path: Path) -> list[Import]:
    tree = ast.parse(path.read_text(), str(path))
    return [
        Import(path, node.lineno, module, late)
        for node, late in _import_nodes(tree, False)
        for module in _modules(node)
    ]


def _import_nodes(node: ast.AST, late: bool) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, late
        inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        checked = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
        yield from _import_nodes(child, late or inside or checked)


def _modules(node: ast.Import | ast.ImportFrom) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    assert node.level == 0, "imports are absolute: a relative one would hide where it goes"
    # `from mlxops.control import client` imports a module too.
    return [f"{node.module}.{alias.name}" for alias in node.names]


def everything_below(name: str) -> list[Import]:
    found = [each for path in sorted((PACKAGE / name).rglob("*.py")) for each in imports(path)]
    assert found, f"mlxops/{name} imports nothing: is it still there?"
    return found


def within(each: Import, *packages: str) -> bool:
    return any(each.module == package or each.module.startswith(package + ".") for package in packages)


def listed(found: list[Import]) -> str:
    return "\n".join(map(str, found))


def test_core_imports_itself_and_what_only_computes() -> None:
    allowed = ("mlxops.core", *PURE_PARTS)
    found = [each for each in everything_below("core") if each.top not in PURE]
    wrong = [each for each in found if not any(within(each, part) for part in allowed)]
    assert not wrong, listed(wrong)


def test_core_opens_no_file_and_prints_nothing() -> None:
    forbidden = {"open", "print", "input", "exec", "eval", "__import__", "breakpoint"}
    used = [
        f"{path}:{node.lineno} {node.func.id}"
        for path in (PACKAGE / "core").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in forbidden
    ]
    compiled = {f"{PACKAGE}/core/frozen.py"}  # it compiles `__init__`, as the standard library's dataclasses do
    assert not [each for each in used if not (each.partition(":")[0] in compiled and each.endswith(" exec"))]


SIDES = {
    "core": {"core"},
    "common": {"common", "core"},
    "agent": {"agent", "common", "core"},
    "control": {"control", "common", "core"},
    "cli": {"cli", "control", "common", "core", "tasks"},
    "tasks": {"tasks", "devtasks", "cli", "control", "common", "core"},
}
"""What each part of the package may import of the package. Control node and agent never import each other."""

ROOMS = {
    "paths": set[str](),
    "host": set(),
    "state": {"paths", "host"},
    "hub": {"paths", "host", "state"},
    "service": {"paths", "host", "state"},
    "engines": {"paths", "host", "state"},
    "serving": {"paths", "host", "state", "hub", "service", "engines"},
    "agreement": {"paths", "state"},
    "context": {"paths", "host", "state", "engines", "serving"},
    "operations": {"paths", "host", "state", "hub", "service", "engines", "serving", "context"},
    "worker": {"paths", "host", "state", "serving", "agreement", "context", "operations"},
    "boot_restore": {"paths", "host", "state", "context", "operations", "worker"},
    "rounds": {"host"},
    "keeper": {"paths", "host", "state", "rounds"},
    "keeper_pass": {"paths", "host", "state", "serving", "context", "operations", "boot_restore"},
    "install": set(),
    "__main__": {
        *("paths", "host", "state", "agreement", "context", "operations", "worker", "boot_restore"),
        *("keeper", "keeper_pass"),
    },
}
"""What each room of the agent may import of the agent. A room only names rooms above it, so there is no circle."""


@pytest.mark.parametrize("part", SIDES)
def test_part_of_the_package_imports_only_allowed_parts(part: str) -> None:
    paths = [PACKAGE / f"{part}.py"] if (PACKAGE / f"{part}.py").exists() else sorted((PACKAGE / part).rglob("*.py"))
    found = [each for path in paths for each in imports(path) if each.top == "mlxops"]
    allowed = [f"mlxops.{name}" for name in (*SIDES[part], "__version__")]
    wrong = [each for each in found if not within(each, *allowed)]
    assert found and not wrong, listed(wrong)


def test_rooms_of_the_agent_import_only_rooms_above_them() -> None:
    known: set[str] = set()
    for room, allowed in ROOMS.items():
        assert allowed <= known, f"{room} names a room below it"
        known.add(room)
    parts = {path.name.removesuffix(".py") for path in (PACKAGE / "agent").iterdir()} - {"__init__", "__pycache__"}
    assert parts == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_room_of_the_agent_imports_only_allowed_rooms(room: str) -> None:
    single = PACKAGE / "agent" / f"{room}.py"
    paths = [single] if single.exists() else sorted((PACKAGE / "agent" / room).rglob("*.py"))
    found = [each for path in paths for each in imports(path) if within(each, "mlxops.agent")]
    allowed = [f"mlxops.agent.{name}" for name in (room, *ROOMS[room])]
    wrong = [each for each in found if not within(each, *allowed)]
    assert not wrong, listed(wrong)


def test_agent_imports_no_package_of_the_control_node() -> None:
    wrong = [each for each in everything_below("agent") if each.top in CONTROL_ONLY]
    assert not wrong, listed(wrong)


def test_packages_of_serve_are_imported_there_only() -> None:
    serve = PACKAGE / "control" / "serve"
    found = [each for path in PACKAGE.rglob("*.py") for each in imports(path) if each.top in SERVE_ONLY]
    wrong = [each for each in found if serve not in each.path.parents]
    assert {each.top for each in found} == SERVE_ONLY and not wrong, listed(wrong)


def test_agent_needs_three_packages_beyond_the_standard_library() -> None:
    others = {
        each.top
        for each in everything_below("agent")
        if each.top not in sys.stdlib_module_names and each.top != "mlxops"
    }
    assert others <= {"huggingface_hub", "httpx2", "psutil"}, others


@pytest.mark.parametrize("package", ["agent", "cli", "common", "core", "tasks.py", "mlxctl.py"])
def test_slow_package_is_imported_where_it_is_used(package: str) -> None:
    paths = [PACKAGE / package] if package.endswith(".py") else sorted((PACKAGE / package).rglob("*.py"))
    wrong = [each for path in paths for each in imports(path) if each.top in HEAVY and not each.late]
    assert not wrong, listed(wrong)


def test_tasks_file_of_the_repository_only_imports_the_namespace() -> None:
    text = (CHECKOUT / "tasks.py").read_text()
    assert len(text.splitlines()) <= 6
    assert {each.module for each in imports(CHECKOUT / "tasks.py")} == {"mlxops.cli.startup", "mlxops.tasks.namespace"}


def test_package_imports_no_test() -> None:
    wrong = [each for path in PACKAGE.rglob("*.py") for each in imports(path) if each.top == "tests" and not each.late]
    assert not wrong, listed(wrong)


STATUS_ON_A_HOST = """
mlxops
mlxops.agent: agreement context paths worker
mlxops.agent.engines: argv base installation
mlxops.agent.host: programs sockets system
mlxops.agent.operations: drift
mlxops.agent.serving: logs observe processes servers
mlxops.agent.state: durable_files locks operation_log recovery registry_file store
mlxops.common: build files http
mlxops.core: budget command dangers described drift errors frozen hints model_options names port_drift ports protocol
mlxops.core: records registry replies settings tables text wire
"""
"""What the agent imports of mlxops for a `status` of a host where nothing runs. Python does not list the modules that
`import_module` names: the engines, the command and its operation."""
STATUS_ASKS = """
mlxops: tasks
mlxops.cli: options runner startup targets
mlxops.common: build files
mlxops.control: channel client hints inventory local output yaml_file
mlxops.control.ssh: config
mlxops.core: command commands described errors frozen hints names protocol replies settings tables
mlxops.core: text wire
"""
"""What the control node imports for it, with `--local`."""
OVER_SSH = """
mlxops.control.ssh: agent auth config connection host_keys identities known_hosts negotiation private_keys public_keys
"""
"""What it imports beside that, over SSH."""


def expected(modules: str) -> set[str]:
    """Return the modules of lines such as `mlxops.core: errors names`; a line without a colon is a module itself."""
    found = set()
    for line in modules.split("\n"):
        package, _, names = line.partition(":")
        found |= {f"{package}.{name}" for name in names.split()} | ({package} if package else set())
    return found


def imported_by(stderr: str) -> set[str]:
    """Return the modules that `python -X importtime` lists."""
    return {line.rsplit("|", 1)[1].strip() for line in stderr.splitlines() if "import time:" in line}


def test_status_on_a_host_imports_only_what_it_needs(tmp_path: Path) -> None:
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "registry.json").write_text('{"version": 1, "models": {}}')
    settings = Settings(hub=str(tmp_path / "hub"), state=str(tmp_path / "state"))
    done = subprocess.run(
        [sys.executable, "-P", "-X", "importtime", "-m", "mlxops.agent"],
        input=envelope("status", {}, settings, build_id()).encode(),
        capture_output=True,
        timeout=60,
        check=True,
        env={"HOME": str(tmp_path), "PATH": os.environ["PATH"]},
    )
    assert json.loads(done.stdout.splitlines()[-1])["event"] == "done"
    imported = imported_by(done.stderr.decode())
    ours = {module for module in imported if within_name(module)}
    assert ours == expected(STATUS_ON_A_HOST)
    slow = {
        *("huggingface_hub", "httpx", "requests", "psutil", "yaml", "rich", "invoke", "fabric", "paramiko"),
        *("asyncio", "http.server", "unittest", "multiprocessing", "concurrent.futures", "logging", "urllib.request"),
        *("ctypes", "sqlite3", "xml", "pydoc", "http.client", "ssl", "email", "secrets", "random", "tempfile"),
        *("traceback", "platform", "glob", "zipfile", "importlib.metadata"),
    }
    if sys.version_info >= (3, 13):
        slow -= {"glob"}  # pathlib itself imports it
    assert not imported & slow


def within_name(module: str) -> bool:
    return module.partition(".")[0] == "mlxops"


def test_local_status_imports_only_what_it_needs(tmp_path: Path) -> None:
    (tmp_path / "hosts.yaml").write_text("hosts: {here: {}}\n", encoding="utf-8")
    environ = {"HOME": str(tmp_path), "PATH": os.environ["PATH"], "MLXOPS_HOSTS_FILE": str(tmp_path / "hosts.yaml")}
    script = Path(sysconfig.get_path("scripts")) / "inv"
    done = subprocess.run(
        [sys.executable, "-P", "-X", "importtime", str(script), "status", "--local"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env=environ,
        cwd=CHECKOUT,
    )
    assert "8100" in done.stdout
    imported = imported_by(done.stderr)
    ours = {module for module in imported if within_name(module)}
    assert ours == expected(STATUS_ASKS)
    assert not imported & {"fabric", "paramiko", "rich", "huggingface_hub", "psutil", "cryptography"}


@pytest.mark.parametrize(("settings", "written"), [({}, True), ({"PYTHONDONTWRITEBYTECODE": "1"}, False)])
def test_inv_writes_bytecode_unless_python_must_not(tmp_path: Path, settings: dict[str, str], written: bool) -> None:
    """Invoke switches bytecode off. Modules without bytecode would be compiled at every command."""
    (tmp_path / "hosts.yaml").write_text("hosts: {here: {}}\n", encoding="utf-8")
    environ = {"HOME": str(tmp_path), "PATH": os.environ["PATH"], "MLXOPS_HOSTS_FILE": str(tmp_path / "hosts.yaml")}
    environ |= {"PYTHONPYCACHEPREFIX": str(tmp_path / "bytecode"), **settings}
    script = Path(sysconfig.get_path("scripts")) / "inv"
    argv = [sys.executable, str(script), "list", "--local"]
    subprocess.run(argv, env=environ, cwd=CHECKOUT, capture_output=True, timeout=60, check=True)
    found = {path.name.partition(".")[0] for path in (tmp_path / "bytecode").rglob("mlxops/**/*.pyc")}
    # The agent is another process. Only `inv` imports the module inventory.
    assert ("inventory" in found) == written


def test_tasks_import_no_slow_package() -> None:
    program = "import sys, mlxops.tasks; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True, timeout=60)
    # Some builds of Invoke import yaml themselves.
    assert not set(done.stdout.split()) & (HEAVY - {"yaml"})
