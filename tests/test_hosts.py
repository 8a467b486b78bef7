"""Several hosts, hosts with other settings or without an agent, and the two programs `inv` and `mlxctl`."""

from __future__ import annotations

import json
import os
import shutil
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import mlxops
from tests.lab.homelab import CHECKOUT, Completed, Homelab, run
from tests.steps import (
    OTHER,
    REPO,
    WAYS,
    Ask,
    assigned,
    error_of,
    install,
    listener,
    nothing_runs,
    quiet,
    register,
    tree,
    with_fake,
    words_of,
)
from tests.test_arrows import OVER_SSH, STATUS_ASKS, expected, imported_by, within_name

SEVEN = ("init", "list", "status", "load", "unload", "unload-all", "reconcile")


def hosts_yaml(lab: Homelab) -> Path:
    """Return the Mini's hosts.yaml. The studio has its own."""
    return lab.mini.home / ".config" / "mlxops" / "hosts.yaml"


class TestSeveralHosts:
    def test_status_and_list_show_an_unreachable_host_as_one_row(self, make_homelab: Callable[..., Homelab]) -> None:
        lab = with_fake(make_homelab(studios=3))
        ask = Ask(lab, "ssh")
        register(lab.studio, "mine")
        ask("load", "--model", "mine", "--port", ask.port).ok()
        lab.studios[1].sshd.stop()

        began = time.monotonic()
        answer = ask("status", "--json")
        assert time.monotonic() - began < 10
        assert answer.exit == 5, str(answer)
        rows = answer.json["hosts"]
        assert answer.json["ok"] is False
        assert [(row["host"], row["reachable"]) for row in rows] == [
            ("studio", True),
            ("studio2", False),
            ("studio3", True),
        ]
        assert rows[1]["error"]["exit"] == 5 and rows[1]["error"]["code"] == "connection_refused"
        assert "ports" not in rows[1] or not rows[1]["ports"]
        assert [row["state"] for row in rows[0]["ports"]] == ["ready", "idle", "idle", "idle"]
        assert [row["state"] for row in rows[2]["ports"]] == ["idle"] * 4
        assert rows[0]["error"] is None and rows[2]["error"] is None

        table = ask("status")
        assert table.exit == 5
        lines = table.stdout.splitlines()
        assert [sum(line.split()[:1] == [name] for line in lines) for name in ("studio", "studio2", "studio3")] == [
            4,
            1,
            4,
        ]
        assert "connection_refused" in next(line for line in lines if line.startswith("studio2 "))

        listing = ask("list", "--json")
        assert listing.exit == 5
        assert [len(row.get("models") or []) for row in listing.json["hosts"]] == [1, 0, 0]
        alone = ask("status", "--host", "studio3,studio", "--json").ok()
        assert [row["host"] for row in alone.json["hosts"]] == ["studio3", "studio"]

    def test_status_over_ssh_imports_only_what_it_needs(self, homelab: Homelab) -> None:
        script = Path(sysconfig.get_path("scripts")) / "inv"
        argv = [sys.executable, "-P", "-X", "importtime", str(script), "status"]
        done = run(argv, CHECKOUT, homelab.mini.env).ok()
        imported = imported_by(done.stderr)
        ours = {module for module in imported if within_name(module)}
        assert ours == expected(STATUS_ASKS) | expected(OVER_SSH)
        assert "fabric.connection" in imported, "the list is of the right process"
        assert not imported & {"rich", "huggingface_hub", "psutil"}

    def test_hosts_do_not_disturb_each_other(self, make_homelab: Callable[..., Homelab]) -> None:
        """Both hosts have the same ports and aliases."""
        lab = make_homelab(studios=2)
        first, second = lab.studios
        for studio in lab.studios:
            with_fake(lab, studio.name)
            register(studio, "mine")
            lab.mini.inv("load", "--model", "mine", "--port", str(first.ports[0]), "--host", studio.name).ok()
        assert words_of(first, first.ports[0], "jerry-xl") != words_of(second, first.ports[0], "jerry-xl")
        lab.mini.inv("unload", "--port", str(first.ports[0]), "--host", second.name).ok()
        assert assigned(first) == {"mine": first.ports[0]} and assigned(second) == {}
        assert listener(first, first.ports[0]) is not None
        nothing_runs(second)

    def test_hint_acts_on_the_host_it_is_about(self, make_homelab: Callable[..., Homelab]) -> None:
        """The hint is typed as shown. Without its options it would go to another host."""
        lab = make_homelab(studios=2)
        first, second = lab.studios
        port, free = second.ports[:2]
        for studio in lab.studios:
            with_fake(lab, studio.name)
            register(studio, "mine", port=port)
            register(studio, "other", repo=OTHER)
            mlxctl = lab.mini.mlxctl
            mlxctl("load", "other", str(free), "--host", studio.name).ok()

        def typed(hint: str, *more: str) -> Completed:
            program, *words = hint.split()
            assert program == "mlxctl", hint
            return mlxctl(*words, *more)

        def drift(*words: str) -> dict[str, str]:
            rows = mlxctl("status", "--json", *words).ok().json["hosts"]
            return {row["host"]: row["drift"][0]["hint"] for row in rows}

        hints = drift()
        assert hints["studio"] == f"mlxctl load mine {port}, or mlxctl reconcile"
        assert hints["studio2"] == f"mlxctl load --host studio2 mine {port}, or mlxctl reconcile --host studio2"
        typed(hints["studio2"].partition(",")[0]).ok()
        assert assigned(second) == {"mine": port, "other": free}
        assert listener(second, port) is not None and listener(first, port) is None

        refused = mlxctl("load", "other", str(port), "--host", "studio2", "--json")
        hint = error_of(refused)["hint"]
        assert hint.endswith(f"or first: mlxctl unload --host studio2 {port}"), hint
        typed(hint.partition("first: ")[2]).ok()
        assert assigned(second) == {"other": free} and listener(first, free) is not None

        # On the second studio: a bare --local means another host there.
        on_it = {"MLXOPS_HOST": "studio2"}
        local = ["status", "--json", "--local"]
        assert mlxctl(*local, env=on_it).ok().json["hosts"][0]["host"] == "studio2"
        refused = mlxctl("load", "mine", str(free), "--host", "studio2", "--local", "--json")
        assert f"mlxctl unload --host studio2 --local {free}" in error_of(refused)["hint"]
        refused = mlxctl("load", "mine", str(free), "--local", "--json", env=on_it)
        assert f"mlxctl unload --local {free}" in error_of(refused)["hint"]

        # Errors of the control node itself.
        lab.configure("studio2", ports=f"{port}-{second.ports[-1] + 1}")
        differ = mlxctl("reconcile", "--host", "studio2", "--json")
        assert error_of(differ)["hint"].endswith("mlxctl deploy --host studio2")
        lab.configure("studio2", python=["/nowhere/bin/python"])
        assert (
            error_of(mlxctl("init", "--host", "studio2", "--json"))["hint"]
            == "install it: mlxctl deploy --host studio2"
        )

    def test_change_of_a_port_or_model_takes_one_host(self, make_homelab: Callable[..., Homelab]) -> None:
        ask = Ask(make_homelab(studios=2), "ssh")
        for words in (
            ["load", "--model", "x", "--port", ask.port],
            ["unload", "--port", ask.port],
            ["rollback", "--port", ask.port],
            ["set", "--model", "x", "--set", "engine=mlx-lm"],
            ["remove", "--model", "x"],
            ["logs", "--port", ask.port],
        ):
            error = ask.error(2, *words, "--host", "studio,studio2")
            assert error["code"] == "one_host", words

    def test_other_changes_go_from_host_to_host(self, make_homelab: Callable[..., Homelab]) -> None:
        lab = make_homelab(studios=3)
        ask = Ask(lab, "ssh")
        both = ["--host", "studio2,studio"]
        for studio in lab.studios:
            with_fake(lab, studio.name)
            install(studio, REPO)
        printed = ask("init", *both).ok().stdout.splitlines()
        assert [line.partition(" ")[0] for line in printed] == ["studio2:"] * 2 + ["studio:"] * 2
        for words in (
            ["reconcile"],
            ["restore"],
            ["boot"],
            ["unload-all", "--yes"],
            ["pull", "--repo", REPO, "--dry-run"],
        ):
            answer = ask(*words, *both, "--json").ok()
            assert [(row["host"], "result" in row) for row in answer.json["hosts"]] == [
                ("studio2", True),
                ("studio", True),
            ]
        assert "studio2, studio" in ask.error(2, "unload-all", *both)["message"]

        for studio in lab.studios:
            ask("load", "--model", REPO, "--port", ask.port, "--host", studio.name).ok()
        lab.studios[1].sshd.stop()
        answer = ask("unload-all", "--yes", "--host", "studio,studio2,studio3", "--json")
        assert answer.exit == 5 and answer.json["ok"] is False
        assert [(row["error"] or {}).get("code") for row in answer.json["hosts"]] == [None, "connection_refused", None]
        assert [assigned(studio) for studio in lab.studios] == [{}, {REPO: ask.port}, {}]

    def test_ops_shows_the_default_host_unless_others_are_named(self, make_homelab: Callable[..., Homelab]) -> None:
        ask = Ask(make_homelab(studios=2), "ssh")
        assert [row["host"] for row in ask("ops", "--json").ok().json["hosts"]] == ["studio"]
        named = ask("ops", "--json", "--host", "studio2,studio").ok()
        assert [row["host"] for row in named.json["hosts"]] == ["studio2", "studio"]

    def test_change_reports_an_unreachable_host(self, remote: Ask) -> None:
        remote.studio.sshd.stop()
        assert remote.error(5, "load", "--model", "x", "--port", remote.port)["code"] == "connection_refused"


class TestHostsThatDiffer:
    def test_different_settings_are_refused_and_change_nothing(self, remote: Ask) -> None:
        studio = remote.studio
        register(studio, "mine")
        remote("load", "--model", "mine", "--port", remote.port).ok()
        path = hosts_yaml(remote.lab)
        original = path.read_text()
        document = yaml.safe_load(original)
        document["hosts"]["studio"]["slots"][studio.ports[1]] = "renamed"
        path.write_text(yaml.safe_dump(document))
        quiet_before = tree(studio.folder)
        pid = listener(studio, remote.port)
        for command in (
            ["load", "--model", "mine", "--port", studio.ports[1], "--force"],
            ["unload", "--port", remote.port],
            ["unload-all", "--yes"],
            ["init"],
            ["reconcile"],
        ):
            error = remote.error(3, *command)
            assert error["code"] == "settings_differ" and "deploy" in error["hint"]
            assert "jerry-l" in error["why"] and "renamed" in error["why"]
        status = remote("status", "--json")
        (host,) = status.json["hosts"]
        assert status.exit == 3 and host["error"]["code"] == "settings_differ"
        assert "deploy" in host["error"]["hint"] and "jerry-l" in host["error"]["why"]
        assert [row["code"] for row in host["drift"]] == ["settings_differ"]
        rows = {row["port"]: row for row in host["ports"]}
        assert rows[remote.port]["state"] == "ready" and rows[studio.ports[1]]["alias"] == "jerry-l", (
            "as the host has it"
        )
        for read in (["list"], ["ops"], ["logs", "--port", remote.port]):
            assert "hosts.yaml differs from the settings" in remote(*read).ok().stderr
        assert remote.error(3, "unload", "--port", remote.port, "--dry-run")["code"] == "settings_differ"
        assert tree(studio.folder) == quiet_before and listener(studio, remote.port) == pid
        studio.mlxctl("status").ok()
        path.write_text(original)
        remote("unload", "--port", remote.port).ok()

    @pytest.mark.parametrize("change", ["registry", "hub", "ports", "bind"])
    def test_each_agreed_setting_is_compared(self, remote: Ask, change: str) -> None:
        studio = remote.studio
        remote("reconcile").ok()
        values = {
            "registry": str(studio.hub / "other.json"),
            "hub": str(studio.home / "hub"),
            "ports": f"{studio.ports[0]}-{studio.ports[3] + 1}",
            "bind": "127.0.0.1",
        }
        path = hosts_yaml(remote.lab)
        document = yaml.safe_load(path.read_text())
        document["hosts"]["studio"][change] = values[change]
        path.write_text(yaml.safe_dump(document))
        error = remote.error(3, "reconcile")
        assert error["code"] == "settings_differ" and f"{change}: " in error["why"]

    def test_missing_agent_error_says_how_to_install_one(self, remote: Ask) -> None:
        remote.lab.configure(python=["/nowhere/bin/python"])
        before = tree(remote.studio.folder)
        for command in (["status"], ["load", "--model", "x", "--port", remote.port]):
            error = remote.error(6, *command)
            assert error["code"] == "agent_missing" and error["hint"] == "install it: mlxctl deploy"
            assert "/nowhere/bin/python" in error["why"]
        assert tree(remote.studio.folder) == before

    def test_python_without_mlxops_is_no_agent(self, remote: Ask) -> None:
        remote.lab.configure(python=["/usr/bin/env", "python3", "-S", "-I"])
        assert remote.error(6, "status")["code"] == "agent_missing"

    def test_load_warns_if_the_gateway_cannot_reach_the_server(self, remote: Ask) -> None:
        register(remote.studio, "mine")
        remote.lab.configure(address="127.0.0.1")
        answer = remote("load", "--model", "mine", "--port", remote.port).ok()
        assert f"warning: 127.0.0.1:{remote.port} cannot be reached" in answer.stderr
        remote.lab.configure(address=remote.studio.address)
        assert "warning" not in remote("load", "--model", "mine", "--port", remote.port).ok().stderr


class TestInvoke:
    def test_list_and_help_describe_every_command(self, remote: Ask) -> None:
        for text in (remote.lab.mini.inv("--list").ok().stdout, remote.lab.mini.mlxctl("--list").ok().stdout):
            rows = {line.split()[0]: line.split(None, 1)[1] for line in text.splitlines() if line.startswith("  ")}
            assert set(SEVEN) <= rows.keys()
            assert all(rows[name][0].isupper() and rows[name].endswith(".") for name in SEVEN)
        for command in SEVEN:
            shown = remote.lab.mini.inv(command, "--help").ok().stdout
            flags = {"--json", "--local", "--host"}
            if command == "load":
                flags |= {"--model", "--port", "--repo", "--timeout", "--force", "--dry-run", "--overcommit"}
            assert flags <= set(shown.replace("=", " ").split()) and "Docstring:" in shown
        assert remote.lab.mini.mlxctl("load", "--help").ok().stdout.count("--model") == 1

    AMBIENT: tuple[tuple[list[str], dict[str, str]], ...] = (
        ([], {"INVOKE_RUN_ECHO": "1"}),
        ([], {"INVOKE_RUN_DRY": "1"}),
        ([], {"INVOKE_RUN_PTY": "1", "INVOKE_RUN_WARN": "1", "INVOKE_RUN_HIDE": "both"}),
        (["-e", "-p", "-w"], {}),
        (["-R"], {}),
    )

    def test_run_settings_of_invoke_change_no_outcome(self, remote: Ask) -> None:
        inv = remote.lab.mini.inv
        (remote.lab.mini.home / ".invoke.yaml").write_text(
            "run: {echo: true, dry: true, pty: true, warn: true, hide: both, shell: /bin/false}\n"
        )
        expected = inv("status", "--json").ok()
        for flags, env in self.AMBIENT:
            answer = inv(*flags, "status", "--json", env=env)
            assert (answer.exit, answer.stdout, answer.stderr) == (0, expected.stdout, expected.stderr), str(answer)
        register(remote.studio, "mine")
        inv("-e", "-p", "-w", "-R", "load", "--model", "mine", "--port", str(remote.port)).ok()
        assert words_of(remote.studio, remote.port, "jerry-xl")
        wrong = inv("-w", "unload", "--port", str(remote.studio.ports[3] + 1), "--json")
        assert (wrong.exit, error_of(wrong)["code"]) == (2, "bad_port")
        inv("-R", "unload", "--port", str(remote.port), env={"INVOKE_RUN_DRY": "1"}).ok()
        nothing_runs(remote.studio)


class TestMlxctl:
    def test_positional_commands_work_over_ssh_and_locally(self, homelab: Homelab) -> None:
        for way in WAYS:
            ask = Ask(with_fake(homelab), way)
            mlxctl = homelab.mini.mlxctl if way == "ssh" else ask.studio.mlxctl
            install(ask.studio, REPO, OTHER)
            first, second = map(str, ask.studio.ports[:2])
            mlxctl("init").ok()
            assert REPO in mlxctl("list").ok().stdout
            mlxctl("load", REPO, first).ok()
            mlxctl("load", OTHER, second).ok()
            assert mlxctl("status").ok().stdout.count("ready") == 2
            assert words_of(ask.studio, int(first), "jerry-xl")
            mlxctl("reconcile").ok()
            mlxctl("unload", first).ok()
            assert assigned(ask.studio) == {OTHER: int(second)}
            mlxctl("unload-all", "--yes").ok()
            nothing_runs(ask.studio)

    def test_flags_may_stand_anywhere_around_the_positions(self, homelab: Homelab) -> None:
        studio = with_fake(homelab).studio
        register(studio, "mine")
        port = str(studio.ports[0])
        for words in (
            ["load", "--json", "mine", port],
            ["load", "mine", "--json", port],
            ["load", "--timeout", "20", "mine", "--port", port, "--json"],
            ["load", "--host", "studio", "mine", port, "--json", "--force"],
            ["load", "mine", port, "--timeout=20", "--json"],
            ["unload", port, "--json"],
            ["unload", "--json", port],
            ["unload", "--drain", "1", "--json", port],
        ):
            result = studio.mlxctl(*words).ok().json["hosts"][0]["result"]
            assert result["port"] == studio.ports[0]

    @pytest.mark.parametrize(
        "words",
        [
            ["load", "--bogus"],
            ["load", "x", "{port}", "--bogus"],
            ["load", "x", "{port}", "surplus"],
            ["unload", "{port}", "surplus"],
            ["status", "surplus"],
            ["bogus"],
            ["load"],
            ["unload"],
            ["unload", "{port}", "--model", "x"],
            ["load", "x", "{port}", "--timeout"],
        ],
        ids=" ".join,
    )
    def test_wrong_command_line_is_a_usage_error(self, remote: Ask, words: list[str]) -> None:
        mlxctl = remote.lab.mini.mlxctl
        answer = mlxctl(*(word.format(port=remote.port) for word in words), "--json")
        assert answer.exit == 2, str(answer)
        error_of(answer)
        assert "Traceback" not in answer.stderr
        plain = mlxctl(*(word.format(port=remote.port) for word in words))
        assert (plain.exit, plain.stdout) == (2, ""), str(plain)
        assert plain.stderr.startswith("error: ") and "\n  next: " in plain.stderr

    def test_mlxctl_works_through_a_link_and_from_any_folder(self, remote: Ask) -> None:
        mini = remote.lab.mini
        link = mini.folder / "bin" / "mlxctl"
        link.parent.mkdir()
        link.symlink_to(Path(sysconfig.get_path("scripts")) / "mlxctl")
        answer = mini.run(str(link), "status", "--json").ok()
        assert len(answer.json["hosts"][0]["ports"]) == 4
        (mini.elsewhere / "tasks.py").write_text("raise SystemExit('another program')\n")
        (mini.elsewhere / "invoke.yaml").write_text("run: {dry: true}\n")
        (mini.elsewhere / "json.py").write_text("raise SystemExit('another program')\n")
        assert mini.run(str(link), "status", "--json").ok().json == answer.json

    def test_closed_pipe_leaves_no_traceback(self, remote: Ask) -> None:
        script = f"{sysconfig.get_path('scripts')}/mlxctl status | true; exit ${{PIPESTATUS[0]}}"
        answer = remote.lab.mini.run("/bin/bash", "-c", script)
        assert "Traceback" not in answer.stderr and answer.exit in (0, 141), str(answer)

    def test_missing_hosts_file_is_reported(self, remote: Ask) -> None:
        env = {"MLXOPS_HOSTS_FILE": str(remote.lab.mini.home / "none.yaml")}
        answer = remote.lab.mini.mlxctl("status", "--json", env=env)
        assert answer.exit == 2 and error_of(answer)["code"] == "bad_hosts_file"
        assert "MLXOPS_HOSTS_FILE" in answer.stderr

    def test_broken_hosts_yaml_is_reported_with_its_line(self, ask: Ask) -> None:
        path = (ask.lab.mini.home if ask.way == "ssh" else ask.studio.home) / ".config" / "mlxops" / "hosts.yaml"
        path.write_text("default: studio\nhosts:\n  studio:\n    hubb: /x\n")
        error = ask.error(2, "status")
        assert error["code"] == "bad_hosts_file" and "hubb" in json.dumps(error)
        assert "hosts.yaml:4: hosts.studio.hubb" in error["message"]

    def test_local_command_needs_no_hosts_yaml(self, homelab: Homelab) -> None:
        """mlxops is installed without a checkout, so no hosts.yaml is found: paths and ports have their defaults."""
        studio = homelab.studio
        (studio.home / ".config" / "mlxops" / "hosts.yaml").unlink()
        packages = studio.folder / "packages"
        shutil.copytree(Path(mlxops.__file__).parent, packages / "mlxops")
        env = {**studio.env, "HF_HUB_CACHE": str(studio.hub), "PYTHONPATH": str(packages), "PATH": os.defpath}

        def mlxctl(*words: str) -> Completed:
            argv = [sys.executable, "-c", "from mlxops.mlxctl import main; main()", *words, "--json"]
            return run(argv, studio.home, env)

        install(studio)
        assert mlxctl("init", "--local").ok().json["hosts"][0]["result"]["added"] == [REPO]
        rows = mlxctl("status", "--local").ok().json["hosts"][0]["ports"]
        assert [row["port"] for row in rows] == list(range(8100, 8110))
        answer = mlxctl("status")
        assert answer.exit == 2 and error_of(answer)["code"] == "no_hosts_file"
        quiet(studio)
