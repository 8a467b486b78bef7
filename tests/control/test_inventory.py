"""hosts.yaml: correct files are read; wrong ones are refused with line and key."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxops.agent.paths import host_paths, settings_differences
from mlxops.control.inventory import Inventory, hosts_file, load
from mlxops.core.errors import Exit, UsageError
from mlxops.core.settings import NO_LIMIT, BootJob, PortRange, settings_keys

EXAMPLE = Path(__file__).parents[2] / "hosts.yaml"


def read(folder: Path, text: str | bytes) -> Inventory:
    path = folder / "hosts.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load(path)


def refusal(folder: Path, text: str | bytes) -> UsageError:
    with pytest.raises(UsageError) as caught:
        read(folder, text)
    error = caught.value
    assert (error.code, error.exit) == ("bad_hosts_file", Exit.USAGE)
    assert error.why and error.hint
    assert error.message.startswith("hosts.yaml")
    assert all("\n" not in part and part.isprintable() for part in (error.message, error.why, error.hint))
    return error


def one(setting: str) -> str:
    """A file with one host and one setting, in line 3."""
    return f"hosts:\n  studio:\n    {setting}\n"


def test_example_describes_the_homelab() -> None:
    inventory = load(EXAMPLE)
    studio = inventory.host("studio")
    assert inventory.default == "studio"
    assert studio.ssh == "studio" and studio.python is None
    assert studio.settings.ports == PortRange(8100, 8109)
    assert studio.settings.slots[8100] == "jerry-xl" and len(studio.settings.slots) == 10
    assert studio.settings.boot == ()
    assert (studio.settings.bind, studio.settings.address) == ("127.0.0.1", None)
    assert inventory.gateway is not None and inventory.gateway.key_env == "LITELLM_MASTER_KEY"


def test_address_of_the_example_is_commented_out_and_correct(tmp_path: Path) -> None:
    """If it were active, the servers of users who copy the example would answer every machine."""
    shown = EXAMPLE.read_text().replace("    # bind: 192.", "    bind: 192.").replace("    # address:", "    address:")
    settings = read(tmp_path, shown.replace("    # exposure:", "    exposure:")).host("studio").settings
    assert (settings.bind, settings.address, settings.exposure) == ("192.168.1.20", "studio.local", "accepted")


def test_boot_job_of_the_example_is_commented_out_and_correct(tmp_path: Path) -> None:
    """If it were active, it would block its port on every host of users who copy the example."""
    shown = EXAMPLE.read_text()
    assert load(EXAMPLE).host("studio").settings.boot == ()
    explicit = read(tmp_path, shown.replace("    # boot: {", "    boot: {"))
    job = BootJob(8100, "/opt/mlx-launch/bin/start.sh", "com.bebop.mlx-launch")
    assert explicit.host("studio").settings.boot == (job,)


@pytest.mark.parametrize(
    ("text", "jobs"),
    [
        ("{port: 8100, label: org.mlx.xl}", (BootJob(8100, "", "org.mlx.xl"),)),
        ("{port: 8100, script: ~/bin/start all.sh}", (BootJob(8100, "~/bin/start all.sh"),)),
        (
            "[{port: 8100, label: org.mlx.xl}, {port: 8101, label: mlx@8101.service}]",
            (BootJob(8100, "", "org.mlx.xl"), BootJob(8101, "", "mlx@8101.service")),
        ),
    ],
    ids=["a label alone", "a script alone", "two jobs"],
)
def test_boot_jobs_are_named_by_label_script_or_both(tmp_path: Path, text: str, jobs: tuple[BootJob, ...]) -> None:
    assert read(tmp_path, one(f"boot: {text}")).host("studio").settings.boot == jobs


def test_commented_defaults_of_the_example_are_true(tmp_path: Path) -> None:
    plain = load(EXAMPLE)
    shown = EXAMPLE.read_text()
    for key in ("state:", "python:", "engine:", "memory:"):
        assert f"    # {key}" in shown
        shown = shown.replace(f"    # {key}", f"    {key}")
    explicit = read(tmp_path, shown)
    assert explicit.host("studio").settings == plain.host("studio").settings
    assert explicit.host("studio").python == plain.host("studio").interpreter()


@pytest.mark.parametrize("key", ["ssh", "python", *settings_keys()])
def test_every_setting_is_in_the_example(key: str) -> None:
    assert re.search(rf"^    (# )?{key}:( |$)", EXAMPLE.read_text(), re.MULTILINE)


def test_every_host_key_is_named_when_a_key_is_unknown(tmp_path: Path) -> None:
    known = ["ssh", "python", *settings_keys()]
    assert refusal(tmp_path, one("unheard_of: 1")).why == f"known here: {', '.join(known)}"


def test_several_hosts_need_a_default_for_a_single_host_command(tmp_path: Path) -> None:
    inventory = read(tmp_path, "hosts: {a: {}, b: {}}")
    assert [host.name for host in inventory.select(None, all_by_default=True)] == ["a", "b"]
    with pytest.raises(UsageError, match="needs one host") as caught:
        inventory.select(None, all_by_default=False)
    assert caught.value.code == "no_default_host" and "a, b" in caught.value.why


def test_host_without_settings_has_the_documented_defaults(tmp_path: Path) -> None:
    inventory = read(tmp_path, "hosts: {studio: {}}")
    host = inventory.host(inventory.default or "")
    assert host.ssh == "studio"
    assert host.settings.address is None and host.settings.bind == "127.0.0.1"
    assert host.interpreter() == ("~/.mlxops/venv/bin/python",)


def test_every_setting_is_read(tmp_path: Path) -> None:
    host = read(
        tmp_path,
        """
default: b
hosts:
  a: {}
  b:
    ssh: me@b.example
    bind: "::"
    address: b.example
    state: /srv/mlxops
    python: [/usr/bin/python3, -I]
    engine: mlx-lm
    launch: [/opt/x/mlx_lm.server, --trust]
    env: {A_1: "1", EMPTY: ""}
    ports: 9000-9000
    slots: {"9000": b-xl}
    memory: 1.5GiB
""",
    ).host("b")
    assert host.ssh == "me@b.example"
    assert host.interpreter() == ("/usr/bin/python3", "-I")
    assert host.settings.launch == {"mlx-lm": ("/opt/x/mlx_lm.server", "--trust")}
    assert host.settings.env == {"A_1": "1", "EMPTY": ""}
    assert list(host.settings.ports) == [9000] and host.settings.slots == {9000: "b-xl"}
    assert host.settings.memory == 1_610_612_736


@pytest.mark.parametrize(("text", "limit"), [("none", NO_LIMIT), ("64GB", 64 * 10**9), ("100000000", 10**8)])
def test_kill_limit_is_none_or_a_size(tmp_path: Path, text: str, limit: int) -> None:
    assert read(tmp_path, one(f"kill_limit: {text}")).host("studio").settings.kill_limit == limit


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("auto", None),
        ("200GB", 200 * 10**9),
        ("186GiB", 186 * 2**30),
        ("1 TB", 10**12),
        ("241644000000", 241644000000),
    ],
)
def test_memory_is_auto_or_a_size(tmp_path: Path, text: str, size: int | None) -> None:
    assert read(tmp_path, one(f"memory: {text}")).host("studio").settings.memory == size


def test_slot_is_an_alias_or_a_mapping_with_one(tmp_path: Path) -> None:
    text = "slots: {8100: {alias: a, hold: 60}, 8101: b, 8102: {alias: c, hold: 0}, 8103: {alias: d, keep: off}}"
    settings = read(tmp_path, one(text)).host("studio").settings
    assert settings.slots == {8100: "a", 8101: "b", 8102: "c", 8103: "d"}
    assert [settings.hold(port) for port in range(8100, 8105)] == [60, None, 0, None, None]
    assert [settings.keep(port) for port in (8102, 8103)] == ["notice", "off"]


def test_hold_is_not_agreed_on(tmp_path: Path) -> None:
    paths = [
        host_paths(read(tmp_path, one(f"slots: {{8100: {slot}}}")).host("studio").settings, {"HOME": str(tmp_path)})
        for slot in ("a", "{alias: a, hold: 60}", "{alias: b}")
    ]
    assert settings_differences(paths[0], paths[1]) == {}
    assert list(settings_differences(paths[0], paths[2])) == ["slots"]


def test_launch_can_be_set_for_each_engine(tmp_path: Path) -> None:
    host = read(tmp_path, one("launch: {mlx-lm: [mlx_lm.server], mlx-openai-server: []}")).host("studio")
    assert host.settings.launch == {"mlx-lm": ("mlx_lm.server",)}


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("prots: 8100-8109", "hosts.yaml:3: hosts.studio.prots: unknown key"),
        ("ports: 8100", "hosts.yaml:3: hosts.studio.ports: is not a range of ports"),
        ("ports: 0-10", "is not a range"),
        ("ports: 8109-8100", "is not a range"),
        ("ports: 65530-65536", "is not a range"),
        ("ports: 8100-8200", "101 ports"),
        ("ports: [8100, 8109]", "is not a range"),
        ("slots: {8110: x}", "hosts.studio.slots.8110: is outside the host's ports"),
        ("slots: {8100: a, 8101: a}", "the alias a appears twice"),
        ("slots: {8100: a, 8100: b}", "hosts.studio.slots.8100: appears twice"),
        ("slots: {8100: a b}", "is not an alias"),
        ("slots: {8100: -a}", "is not an alias"),
        ("slots: {8100: off}", "YAML reads off as true or false"),
        ("slots: {8100: 123}", "hosts.studio.slots.8100: '123' is a number"),
        ("slots: {08100: a}", "is not a port"),
        ("slots: [a]", "hosts.studio.slots: is a list"),
        ("slots: {8100: {hold: 60}}", "hosts.studio.slots.8100: alias is missing"),
        ("slots: {8100: {alias: a b}}", "is not an alias"),
        ("slots: {8100: {alias: a, keep: yes}}", "hosts.studio.slots.8100.keep: 'yes' is no way to keep a server"),
        ("slots: {8100: {alias: a, keep: [off]}}", "hosts.studio.slots.8100.keep"),
        ("slots: {8100: {alias: a}, 8101: a}", "the alias a appears twice"),
        ("slots: {8100: {alias: a, holt: 60}}", "hosts.yaml:3: hosts.studio.slots.8100.holt: unknown key"),
        ("slots: {8100: {alias: a, hold: 60 s}}", "hosts.studio.slots.8100.hold: '60 s' is text"),
        ("slots: {8100: {alias: a, hold: true}}", "hosts.studio.slots.8100.hold"),
        ("slots: {8100: {alias: a, hold: 1.5}}", "hosts.studio.slots.8100.hold"),
        ("slots: {8100: {alias: a, hold: -1}}", "-1 is not a plain decimal number"),
        ("slots: {8100: {alias: a, hold: 3601}}", "3601 seconds are too long"),
        ("slots: {8100: {alias: a, hold: }}", "hosts.studio.slots.8100.hold: has no value"),
        ("slots:", "hosts.studio.slots: has no value"),
        ("bind: studio.local", "is not an IP address"),
        ("bind: 0", "'0' is a number"),
        ("address: studio.local", "studio.local cannot be reached while the servers listen on 127.0.0.1"),
        ("address: 192.168.1.2", "192.168.1.2 cannot be reached"),
        ("address: http://studio", "is not an address"),
        ("address: studio:8100", "is not an address"),
        ("ssh: -oProxyCommand=touch", "is not a destination"),
        ("ssh: studio rm", "is not a destination"),
        ('ssh: "studio\\nrm"', "has a character that cannot be shown"),
        ('hub: "/x\\0y"', "has a character that cannot be shown"),
        ('hub: "/x\\u202Ey"', "has a character that cannot be shown"),
        ('state: ""', "is empty"),
        ("state: ~", "has no value"),
        ("state: .mlxops", "is a relative path"),
        ("state: ~root/x", "is a relative path"),
        ("hub: models/hub", "hosts.yaml:3: hosts.studio.hub: 'models/hub' is a relative path"),
        ("python: [python3]", "hosts.studio.python[0]: 'python3' is a relative path"),
        ("python: []", "hosts.studio.python: is empty"),
        ("python: /usr/bin/python3", "is text"),
        ("engine: vllm", "'vllm' is not an engine"),
        ("launch: [bin/engine]", "is a relative path"),
        ("launch: {vllm: [x]}", "'vllm' is not an engine"),
        ("launch: [engine, 8]", "hosts.studio.launch[1]: '8' is a number"),
        ("env: {A: 1}", "hosts.studio.env.A: '1' is a number"),
        ("env: {A: yes}", "YAML reads yes as true or false"),
        ("env: {on: x}", "YAML reads the key on as true or false"),
        ("env: {A B: x}", "is not a variable's name"),
        ("env: {HF_TOKEN: hf_x}", "does not belong here"),
        ('env: {A: "x\\ny"}', "has a character that cannot be shown"),
        ("memory: lots", "is not a size"),
        ("kill_limit: auto", "is not a size"),
        ("memory: 200", "200 bytes are too few for a model"),
        ("memory: 1e9", "is not a size"),
        ("memory: 3:20", "is not a plain decimal number"),
        ("boot: {port: 8110, script: /x}", "hosts.studio.boot.port: 8110 is outside"),
        ("boot: {port: 8100}", "hosts.studio.boot: script and label are missing"),
        ("boot: [{port: 8100, label: a}, {port: 8100, label: b}]", "hosts.studio.boot: port 8100 appears twice"),
        ("boot: {script: /x}", "hosts.studio.boot: port is missing"),
        ('boot: {port: "8100", script: /x}', "is text"),
        ("boot: {port: 8100, script: /x, lable: y}", "hosts.studio.boot.lable: unknown key"),
        ("ssh: [a]", "hosts.studio.ssh: is a list"),
        ("ssh: {a: b}", "hosts.studio.ssh: is a mapping"),
        ("ssh: 2024-01-01", "is a date"),
        ("ssh: !!python/object/apply:os.system [x]", "hosts.studio.ssh: is a list"),
        ("? [a]\n    : b", "is not a key"),
        ("<<: {ssh: a}", "is not a key"),
        ("ssh: &x a", "anchors and aliases are not used here"),
        ("ssh: *x", "anchors and aliases are not used here"),
        ("ssh: 'a", "hosts.yaml:"),
    ],
)
def test_wrong_setting_is_refused_with_its_place(tmp_path: Path, setting: str, expected: str) -> None:
    error = refusal(tmp_path, one(setting))
    assert expected in error.message
    if setting.split(":")[0] in ("ports", "bind", "address", "hub", "memory", "engine"):
        assert error.message.startswith(f"hosts.yaml:3: hosts.studio.{setting.split(':')[0]}: ")


@pytest.mark.parametrize(
    ("setting", "hint"),
    [
        ("env: {A: yes}", 'it must be text; quote it: "yes"'),
        ("slots: {8100: {alias: a, hold: on}}", "make it a whole number"),
    ],
)
def test_word_for_true_or_false_is_quoted_only_where_text_belongs(tmp_path: Path, setting: str, hint: str) -> None:
    assert refusal(tmp_path, one(setting)).hint.startswith(hint)


@pytest.mark.parametrize(
    "setting",
    [
        "env: KEY=sk1",
        "env: sk1",
        'env: {A: "sk1\\t"}',
        "env: {A: !x sk1}",
        'hub: "http://me:sk1@x\\t"',
        "python: --api-key sk1",
    ],
)
def test_value_that_may_be_a_secret_is_not_shown(tmp_path: Path, setting: str) -> None:
    assert "sk1" not in str(refusal(tmp_path, one(setting)).to_wire())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "is empty"),
        ("# only a comment\n", "is empty"),
        ("[]", "is a list"),
        ("default: studio\n", "no hosts"),
        ("hosts: {}\n", "no hosts"),
        ("hosts:\n", "hosts.yaml:1: hosts: has no value"),
        ("host: {a: {}}\n", "hosts.yaml:1: host: unknown key"),
        ("default: c\nhosts: {a: {}, b: {}}\n", "hosts.yaml:1: default: 'c' is not a host"),
        ("hosts:\n  a: {}\n  a: {}\n", "hosts.yaml:3: hosts.a: appears twice"),
        ("hosts: {a,b: {}}\n", "hosts.yaml:1: hosts.a: has no value"),
        ("hosts: {'a,b': {}}\n", "is not a host name"),
        ("hosts: {'-a': {}}\n", "is not a host name"),
        ("hosts: {no: {}}\n", "YAML reads the key no as true or false"),
        ("hosts:\n\ta: {}\n", "hosts.yaml:2: a tab, where YAML allows only spaces"),
        (b"hosts:\n  a: {ssh: \xff}\n", "hosts.yaml:2: is not UTF-8"),
        ("hosts:\n  a: {ssh: a}\n".encode("utf-16"), "hosts.yaml: is UTF-16"),
        (b"\0" * 64, "hosts.yaml: holds nothing but zero bytes"),
        (b"hosts:\n  a: {ssh: x\0y}\n", "hosts.yaml:2: the character U+0000"),
        ("hosts: {a: {}}\n---\nhosts: {b: {}}\n", "hosts.yaml:2: "),
        ("hosts: " + "[" * 5000, "nested too deeply"),
        ("hosts: {a: {}}\n" + "#" * 1024 * 1024, "is too large: more than 1024 kB"),
        ("hosts: {a: {}}\ngateway: {url: ftp://x}\n", "hosts.yaml:2: gateway.url: 'ftp://x' is not a URL"),
        ("hosts: {a: {}}\ngateway: {url: 'http://u:p@x'}\n", "gateway.url"),
        ("hosts: {a: {}}\ngateway: {key_env: sk-1234}\n", "gateway.key_env"),
        ("hosts: {a: {}}\ngateway: {config: router.yaml}\n", "gateway.config: 'router.yaml' is a relative path"),
    ],
)
def test_file_that_is_not_a_hosts_file_is_refused(tmp_path: Path, text: str | bytes, expected: str) -> None:
    assert expected in refusal(tmp_path, text).message


def test_misspelt_key_gets_a_suggestion(tmp_path: Path) -> None:
    assert refusal(tmp_path, one("regsitry: /x")).hint == "did you mean registry?"


def test_address_that_bind_allows_is_accepted(tmp_path: Path) -> None:
    for setting in (
        "bind: 0.0.0.0\n    address: studio.local",
        "address: localhost",
        "address: 127.0.0.2",
        "address: '::1'",
    ):
        assert read(tmp_path, one(setting)).host("studio").settings.address is not None


def test_unreadable_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        load(tmp_path)


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    folder = tmp_path_factory.getbasetemp()
    try:
        read(folder, b"hosts:\n  a:\n    env: {A: x}\n" + data)
    except UsageError as error:
        assert error.code == "bad_hosts_file"


def test_hosts_are_selected_by_name_once_each(tmp_path: Path) -> None:
    inventory = read(tmp_path, "default: b\nhosts: {a: {}, b: {}, c: {}}")

    def names(text: str | None, every: bool) -> list[str]:
        return [host.name for host in inventory.select(text, all_by_default=every)]

    assert names("c, a,c", False) == ["c", "a"]
    assert names(None, True) == ["a", "b", "c"]
    assert names(None, False) == ["b"]
    for text in ("d", "", "a,,b"):
        with pytest.raises(UsageError) as caught:
            names(text, True)
        assert caught.value.code == "unknown_host" and "a, b, c" in caught.value.why


def test_named_file_wins_over_user_and_repository_files(tmp_path: Path) -> None:
    home, beside = tmp_path / "home", tmp_path / "repo"
    users = home / ".config" / "mlxops" / "hosts.yaml"
    users.parent.mkdir(parents=True)
    beside.mkdir()
    named = tmp_path / "other.yaml"
    environ = {"HOME": str(home)}
    assert hosts_file(environ, beside) is None
    (beside / "hosts.yaml").touch()
    assert hosts_file(environ, beside) == beside / "hosts.yaml"
    assert hosts_file(environ, None) is None
    users.touch()
    assert hosts_file(environ, beside) == users
    with pytest.raises(UsageError, match="is not a file"):
        hosts_file(environ | {"MLXOPS_HOSTS_FILE": str(named)}, beside)
    named.touch()
    assert hosts_file(environ | {"MLXOPS_HOSTS_FILE": str(named)}, beside) == named


@pytest.mark.parametrize("how", ["dangling", "loop", "folder away", "closed folder", "pipe", "folder"])
def test_unreadable_user_file_is_not_replaced_by_another(tmp_path: Path, how: str) -> None:
    """The other file describes other machines."""
    beside = tmp_path / "checkout"
    beside.mkdir()
    (beside / "hosts.yaml").write_text("hosts: {other: {}}\n")
    users = tmp_path / ".config" / "mlxops" / "hosts.yaml"
    users.parent.mkdir(parents=True)
    match how:
        case "dangling":
            users.symlink_to(tmp_path / "away")
        case "loop":
            users.symlink_to(users)
        case "folder away":
            users.parent.rmdir()
            users.parent.symlink_to(tmp_path / "away")
        case "closed folder":
            if os.geteuid() == 0:
                pytest.skip("nothing is closed to root")
            users.parent.chmod(0)
        case "pipe":
            os.mkfifo(users)
        case "folder":
            users.mkdir()
    found = hosts_file({"HOME": str(tmp_path)}, beside)
    assert found == users
    with pytest.raises(UsageError, match="cannot be read") as caught:
        load(found)
    assert caught.value.code == "bad_hosts_file"
    if how == "closed folder":
        users.parent.chmod(0o700)


def test_named_pipe_is_refused_and_process_substitution_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="is not a file"):
        load(tmp_path / "pipe")
    code = (
        "import sys, pathlib; from mlxops.control.inventory import load; print(*load(pathlib.Path(sys.argv[1])).hosts)"
    )
    read, write = os.pipe()
    os.write(write, b"hosts: {studio: {}}\n")
    os.close(write)
    try:
        argv = [sys.executable, "-c", code, f"/dev/fd/{read}"]
        done = subprocess.run(argv, pass_fds=[read], capture_output=True, text=True, timeout=60, check=True)
    finally:
        os.close(read)
    assert done.stdout == "studio\n"
