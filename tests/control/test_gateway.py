"""Reading the gateway's files, whatever is in them; asking through it, whatever answers."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock

import pytest
import yaml

from mlxops.control import output
from mlxops.control.client import HostReply, HostTarget
from mlxops.control.gateway import check, probe
from mlxops.control.gateway import config as gatewayfiles
from mlxops.control.inventory import Gateway
from mlxops.core.errors import Refused, Unreachable
from mlxops.core.gateway import Severity
from mlxops.core.settings import PortRange, Settings
from tests.lab.ports import free_port

ENTRY = """\
model_list:
  - model_name: jerry-xl
    litellm_params:
      model: openai/jerry-xl
      api_base: http://127.0.0.1:8100/v1
      api_key: none
"""


def read(folder: Path, text: str | bytes, env: str | None = None) -> gatewayfiles.GatewayConfig:
    config = folder / "router.yaml"
    config.write_bytes(text if isinstance(text, bytes) else text.encode())
    if env is not None:
        (folder / "local.env").write_text(env, encoding="utf-8")
    named = str(folder / "local.env") if env is not None else None
    return gatewayfiles.read(Gateway(str(config), named, None, "KEY"))


class TestConfiguration:
    def test_an_entry_and_where_it_stands(self, tmp_path: Path) -> None:
        told = read(tmp_path, "# a comment\n" + ENTRY)
        (entry,) = told.entries
        assert (entry.alias, entry.sends, entry.address) == ("jerry-xl", "jerry-xl", ("127.0.0.1", 8100))
        assert entry.where == f"{tmp_path}/router.yaml:3"

    def test_anchors_and_merge_keys_are_read_as_litellm_reads_them(self, tmp_path: Path) -> None:
        text = """\
x-common: &common {api_key: none, api_base: "http://127.0.0.1:8100/v1"}
model_list:
- model_name: jerry-xl
  litellm_params: {<<: *common, model: openai/jerry-xl}
"""
        (entry,) = read(tmp_path, text).entries
        assert (entry.sends, entry.has_key) == ("jerry-xl", True)

    def test_included_files_count(self, tmp_path: Path) -> None:
        (tmp_path / "more").mkdir()
        (tmp_path / "more" / "models.yaml").write_text(ENTRY + "include: [../router.yaml]\n")
        told = read(tmp_path, "include: [more/models.yaml]\n")
        assert [entry.alias for entry in told.entries] == ["jerry-xl"]
        assert told.entries[0].where.endswith("more/models.yaml:2")

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("model_list:\n\t- model_name: x\n", ":2 "),
            ("model_list: [\n", "router.yaml:2 "),
            ("model_list: {a: b}\n", "its model_list is not a list"),
            ("- a\n- b\n", "not a mapping"),
            ("", "it is empty"),
            ("!!python/object/apply:os.system ['touch canary']\n", "router.yaml:1 "),
            ("a: \x07\n", "U+0007"),
            (b"a: \xff\n", "not UTF-8"),
            ("a: 2026-99-99\n", "cannot be read as YAML"),
            (f"a: {'[' * 5000}\n", "nested too deeply"),
            ("a: &a {<<: *a}\n", "cannot be read as YAML"),
            ("x" * 600_000, "too large"),
        ],
    )
    def test_what_litellm_could_not_read_is_said_with_its_line(
        self, tmp_path: Path, text: str | bytes, said: str
    ) -> None:
        with pytest.raises(Refused) as refused:
            read(tmp_path, text)
        assert refused.value.code == "bad_gateway_config"
        assert said in f"{refused.value.message}: {refused.value.why}"
        assert not Path("canary").exists()

    @pytest.mark.parametrize(
        "bomb",
        [
            "\n".join(
                ["k0: &k0 {a: 1, b: 2}"]
                + [f"k{i}: &k{i} {{<<: [{', '.join([f'*k{i - 1}'] * 40)}], x{i}: 1}}" for i in range(1, 7)]
            ),
            "\n".join(["k0: &k0 [x]"] + [f"k{i}: &k{i} [{', '.join([f'*k{i - 1}'] * 40)}]" for i in range(1, 9)]),
        ],
        ids=["merge keys", "aliases"],
    )
    def test_what_unfolds_does_not_cost_more_than_it_says(self, tmp_path: Path, bomb: str) -> None:
        began = time.process_time()
        try:
            told = read(tmp_path, ENTRY + bomb + "\n")
        except Refused as error:
            assert error.code == "bad_gateway_config"
        else:
            assert [entry.alias for entry in told.entries] == ["jerry-xl"]
        assert time.process_time() - began < 20

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("x: 1\ninclude: models.yaml\n", ":2 cannot be included: 'include' must be a list of file paths"),
            ("include: [5]\n", ":1 cannot be included: 'include' must be a list of file paths"),
            ("include: [not-there.yaml]\n", "not-there.yaml is not there"),
            ("\ufeffa: 1".encode("utf-16"), "is UTF-16"),
        ],
    )
    def test_what_keeps_litellm_from_starting_is_named(self, tmp_path: Path, text: str | bytes, said: str) -> None:
        with pytest.raises(Refused) as refused:
            read(tmp_path, text)
        assert refused.value.code == "bad_gateway_config"
        assert said in f"{refused.value.message}: {refused.value.why}"

    def test_the_line_is_that_of_the_entry_in_force(self, tmp_path: Path) -> None:
        told = read(tmp_path, ENTRY.replace("jerry-xl", "old") + "other: 1\n" + ENTRY)
        assert [(entry.alias, entry.where) for entry in told.entries] == [("jerry-xl", f"{tmp_path}/router.yaml:9")]
        (finding,) = told.findings
        assert (finding.code, finding.severity) == ("repeated_key", Severity.WARNING)
        assert "router.yaml:1: this model_list is not seen by LiteLLM: the one in line 8" in finding.message

    def test_a_key_that_replaces_a_merged_one_is_not_given_twice(self, tmp_path: Path) -> None:
        text = "x: &e {model: openai/a, api_key: none}\nmodel_list:\n- model_name: b\n  litellm_params:\n    <<: *e\n"
        told = read(tmp_path, text + "    model: openai/b\n")
        assert ([entry.sends for entry in told.entries], told.findings) == (["b"], ())

    def test_a_pipe_is_not_waited_for(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "router.yaml")
        with pytest.raises(Refused, match="is not a file"):
            gatewayfiles.read(Gateway(str(tmp_path / "router.yaml"), None, None, None))

    def test_nothing_is_written(self, tmp_path: Path) -> None:
        read(tmp_path, ENTRY, "A=1\n")
        before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.iterdir()}
        gatewayfiles.read(Gateway(str(tmp_path / "router.yaml"), str(tmp_path / "local.env"), None, None))
        assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.iterdir()} == before


class TestEnvFile:
    @pytest.mark.parametrize("line", ["SECRET-IN-A-BAD-LINE", 'B="SECRET', "if true; then SECRET"])
    def test_a_line_that_is_not_understood_is_named_and_not_shown_and_the_others_count(
        self, tmp_path: Path, line: str
    ) -> None:
        text = ENTRY.replace("openai/jerry-xl", "os.environ/XL").replace("key: none", "key: os.environ/XL_KEY")
        told = read(tmp_path, text, f"XL=openai/jerry-xl\n{line}\nXL_KEY=none\n")
        (finding,) = told.findings
        assert (finding.code, finding.severity) == ("env_line", Severity.WARNING)
        assert finding.message.startswith(f"{tmp_path}/local.env:2: ")
        assert "SECRET" not in str(finding.to_wire())
        assert [(entry.sends, entry.has_key) for entry in told.entries] == [("jerry-xl", True)]

    def test_it_is_where_the_configurations_variables_come_from(self, tmp_path: Path) -> None:
        text = ENTRY.replace("openai/jerry-xl", "os.environ/XL").replace("key: none", "key: os.environ/XL_KEY")
        told = read(tmp_path, text, "XL=openai/jerry-xl\nXL_KEY=sk-canary\n")
        assert [(entry.sends, entry.has_key) for entry in told.entries] == [("jerry-xl", True)]
        assert "sk-canary" not in repr(told.entries)

    def test_the_key_is_the_environments_before_the_files(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        described = Gateway(None, None, None, "KEY")
        assert gatewayfiles.key_of(described, {"KEY": "of the file"}) == "of the file"
        monkeypatch.setenv("KEY", "of the environment")
        assert gatewayfiles.key_of(described, {"KEY": "of the file"}) == "of the environment"
        assert gatewayfiles.key_of(Gateway(None, None, None, None), {"KEY": "x"}) is None


def target(name: str = "studio", address: str = "127.0.0.1") -> HostTarget:
    settings = Settings(address=address, ports=PortRange(8100, 8101), slots={8100: "jerry-xl"})
    return HostTarget(name, None, ("python",), settings)


def row(**changes: object) -> dict[str, object]:
    right = {"port": 8100, "state": "ready", "owner": "mlxops", "model": "tiny", "answers_to": "jerry-xl"}
    return {**right, "context_length": 2048, "assigned": True, "detail": "", **changes}


class TestCheck:
    def test_a_host_without_faults_is_answered(self, tmp_path: Path) -> None:
        told = read(tmp_path, ENTRY)
        (answer,) = check.check(told, [target()], [HostReply("studio", {"ports": [row()]})])
        assert answer.error is None
        assert answer.result is not None
        aliases = answer.result["aliases"]
        assert isinstance(aliases, list)
        assert [(a["alias"], a["sends"], a["verdict"]) for a in aliases] == [("jerry-xl", "jerry-xl", "ok")]

    def test_localhost_is_the_address_that_it_resolves_to(self, tmp_path: Path) -> None:
        told = read(tmp_path, ENTRY.replace("127.0.0.1", "localhost"))
        (answer,) = check.check(told, [target()], [HostReply("studio", {"ports": [row()]})])
        assert answer.error is None, answer.result

    @pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "[::ffff:127.0.0.1]", "LOCALHOST"])
    def test_this_machine_has_more_addresses_than_one(self, tmp_path: Path, host: str) -> None:
        told = read(tmp_path, ENTRY.replace("127.0.0.1", host))
        (answer,) = check.check(told, [target()], [HostReply("studio", {"ports": [row()]})])
        assert (answer.error, answer.result and answer.result["findings"]) == (None, [])

    def test_a_number_that_is_none_is_nobodys_promise(self, tmp_path: Path) -> None:
        told = read(tmp_path, ENTRY + f"    model_info: {{max_input_tokens: 0x{'f' * 5000}}}\n")
        (answer,) = check.check(told, [target()], [HostReply("studio", {"ports": [row()]})])
        assert answer.error is None, answer.result

    def test_a_host_that_is_not_reached_keeps_its_error_and_what_the_files_tell(self, tmp_path: Path) -> None:
        told = read(tmp_path, ENTRY.replace("openai/jerry-xl", "openai/other"))
        down = Unreachable("host_down", "studio is down")
        (answer,) = check.check(told, [target()], [HostReply("studio", error=down)])
        assert answer.error is down
        assert answer.result is not None
        assert [f["code"] for f in answer.result["findings"]] == ["wrong_name"]  # type: ignore[attr-defined]

    def test_what_an_agent_of_another_version_says_does_not_break_it(self, tmp_path: Path) -> None:
        told = read(tmp_path, ENTRY)
        for odd in ({}, {"ports": 7}, {"ports": [7, {}, {"port": "8100"}]}, {"ports": [row(state="new", owner=[])]}):
            (answer,) = check.check(told, [target()], [HostReply("studio", odd)])
            assert answer.result is not None

    def test_a_finding_is_mended_on_the_host_that_it_is_about(self, tmp_path: Path) -> None:
        told = read(tmp_path, ENTRY)
        other = replace(target(), flags=" --host studio")
        (answer,) = check.check(told, [other], [HostReply("studio", {"ports": [row(state="idle", owner=None)]})])
        assert answer.result is not None
        hints = [finding["hint"] for finding in answer.result["findings"]]  # type: ignore[attr-defined]
        assert hints[0].startswith("mlxctl load --host studio MODEL 8100;")

    def test_what_is_printed_is_yaml_of_a_model_list_alone(self) -> None:
        for env in (False, True):
            text = check.as_yaml(*check.printed([target()], env=env))
            assert list(yaml.safe_load(text)) == ["model_list"]

    def test_without_a_slot_there_is_nothing_to_print(self) -> None:
        with pytest.raises(Refused, match="nothing to print"):
            check.printed([HostTarget("studio", None, (), Settings())], env=False)


Answers = Callable[[int], tuple[int, dict[str, str], bytes]]
COMPLETION = json.dumps({"choices": [{"message": {"role": "assistant", "content": "hi"}}]}).encode()


class _Proxy:
    """A gateway that answers its n-th completion request as a test wants. It notes what it was asked."""

    def __init__(self, answers: Answers) -> None:
        self.paths: list[str] = []
        self.bodies: list[dict[str, object]] = []
        self.info = b""
        """What it says that it does with each name; empty: nothing."""
        self.by_id: dict[str, bytes] = {}
        """What it says of one deployment."""
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                proxy.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                proxy.paths.append(self.path)
                status, headers, body = answers(len(proxy.paths))
                self._answer(status, headers, body)

            def do_GET(self) -> None:
                proxy.paths.append(self.path)
                path, _, one = self.path.partition("?litellm_model_id=")
                info = proxy.info if path.endswith("/model/info") else None
                info = proxy.by_id.get(one, b"") if one else info
                self._answer(404 if info == b"" else 200, {}, b'"I\'m alive!"' if info is None else info)

            def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
                self.send_response(status)
                for key, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(key, value)
                try:
                    self.end_headers()
                    self.wfile.write(body)
                except BrokenPipeError:
                    pass  # nobody waited for it

            def log_message(self, format: str, *args: object) -> None:
                """Says nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"


@pytest.fixture
def proxy() -> Iterator[Callable[[Answers], _Proxy]]:
    running: list[tuple[_Proxy, threading.Thread]] = []

    def start(answers: Answers) -> _Proxy:
        made = _Proxy(answers)
        thread = threading.Thread(target=made.server.serve_forever, args=(0.01,))
        thread.start()
        running.append((made, thread))
        return made

    yield start
    for made, thread in running:
        made.server.shutdown()
        made.server.server_close()
        thread.join()


class TestThrough:
    def ask(self, url: str, key: str | None = "sk-canary", seconds: float = 60.0) -> probe.ProbeResult:
        expected = "http://studio:8100/v1"
        return probe.ask(url, key, "jerry-xl", expected=expected, seconds=seconds, pause=lambda _: None)

    def test_a_completion_is_the_proof(self, proxy: Callable[[Answers], _Proxy]) -> None:
        at = proxy(lambda _: (200, {"x-litellm-model-api-base": "http://studio:8100/v1/"}, COMPLETION))
        passage = self.ask(at.url)
        assert (passage.ok, passage.attempts, passage.status) == (True, 1, 200)
        assert at.paths == ["/v1/chat/completions"]

    def test_a_cool_down_is_waited_for(self, proxy: Callable[[Answers], _Proxy]) -> None:
        at = proxy(lambda n: (429 if n == 1 else 500 if n == 2 else 200, {}, COMPLETION))
        assert (self.ask(at.url).ok, len(at.paths)) == (True, 3)

    @pytest.mark.parametrize("status", [302, 307, 308, 400, 401, 403, 404])
    def test_what_will_not_change_is_asked_once(self, proxy: Callable[[Answers], _Proxy], status: int) -> None:
        at = proxy(lambda _: (status, {}, b'{"error": {"message": "Invalid model name"}}'))
        passage = self.ask(at.url)
        assert (passage.code, passage.attempts) == ("no_completion", 1)
        assert passage.detail == f"it answered {status}: Invalid model name"

    def test_it_is_not_asked_for_ever(self, proxy: Callable[[Answers], _Proxy]) -> None:
        moments = iter(range(0, 1000, 10))
        at = proxy(lambda _: (503, {}, b"busy"))
        passage = probe.ask(
            at.url, None, "jerry-xl", seconds=60, clock=lambda: float(next(moments)), pause=lambda _: None
        )
        assert (passage.code, passage.status) == ("no_completion", 503)
        assert len(at.paths) < 6

    @pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"choices": []}', b"<html>", b"[" * 100_000])
    def test_an_answer_without_a_completion_is_none(self, proxy: Callable[[Answers], _Proxy], body: bytes) -> None:
        at = proxy(lambda _: (200, {}, body))
        assert self.ask(at.url, seconds=1.5).code == "no_completion"

    def test_an_answer_from_elsewhere_shows_that_the_gateway_has_other_files(
        self, proxy: Callable[[Answers], _Proxy]
    ) -> None:
        at = proxy(lambda _: (200, {"x-litellm-model-api-base": "http://old:8100/v1"}, COMPLETION))
        passage = self.ask(at.url)
        assert (passage.code, passage.api_base, passage.attempts) == ("other_server", "http://old:8100/v1", 1)

    @pytest.mark.parametrize(
        "base", ["http://127.0.0.1:8100/v1", "http://LocalHost:8100", "http://localhost.:8100/v1/"]
    )
    def test_the_same_address_is_the_right_one_however_it_is_written(
        self, proxy: Callable[[Answers], _Proxy], base: str
    ) -> None:
        at = proxy(lambda _: (200, {"x-litellm-model-api-base": base}, COMPLETION))
        expected = "http://localhost:8100/v1"
        assert probe.ask(at.url, None, "a", expected=expected, same_host=check.same_host).ok

    def test_a_fallbacks_answer_is_none_of_the_alias(self, proxy: Callable[[Answers], _Proxy]) -> None:
        spare = {"x-litellm-model-api-base": "http://spare:8101/v1", "x-litellm-attempted-fallbacks": "1"}
        own = {"x-litellm-model-api-base": "http://studio:8100/v1", "x-litellm-attempted-fallbacks": "0"}
        at = proxy(lambda n: (200, spare if n < 3 else own, COMPLETION))
        passage = self.ask(at.url)
        assert (passage.ok, passage.attempts) == (True, 3)
        at = proxy(lambda _: (200, spare, COMPLETION))
        passage = self.ask(at.url, seconds=1.5)
        assert (passage.code, passage.attempts > 1) == ("fallback", True)
        assert "fallback at http://spare:8101/v1" in passage.detail

    def test_a_deployment_of_the_same_name_elsewhere_is_asked_past(self, proxy: Callable[[Answers], _Proxy]) -> None:
        bases = ["http://other:8100/v1", "http://studio:8100/v1"]
        at = proxy(lambda n: (200, {"x-litellm-model-api-base": bases[n > 2]}, COMPLETION))

        def ask(seconds: float) -> probe.ProbeResult:
            known = {"expected": bases[1], "others": [bases[0]], "seconds": seconds, "pause": lambda _: None}
            return probe.ask(at.url, None, "jerry-xl", **known)  # type: ignore[arg-type]

        assert (ask(60).ok, len(at.paths)) == (True, 3)
        at = proxy(lambda _: (200, {"x-litellm-model-api-base": bases[0]}, COMPLETION))
        assert ask(1.5).code == "other_deployment"

    def test_every_question_is_new_and_keeps_caches_and_fallbacks_out(self, proxy: Callable[[Answers], _Proxy]) -> None:
        at = proxy(lambda n: (500 if n == 1 else 200, {}, COMPLETION))
        self.ask(at.url)
        first, second = at.bodies
        assert first["messages"] != second["messages"]
        assert (first["cache"], first["disable_fallbacks"]) == ({"no-cache": True, "no-store": True}, True)

    @pytest.mark.parametrize(
        ("status", "words"),
        [
            (403, "Not allowed to set no-cache as a cache control. Contact admin to change permissions."),
            (400, "Unrecognized request argument supplied: disable_fallbacks"),
            (422, "Extra inputs are not permitted"),
        ],
    )
    def test_a_gateway_that_does_not_take_these_fields_is_asked_without_them(
        self, proxy: Callable[[Answers], _Proxy], status: int, words: str
    ) -> None:
        refusal = json.dumps({"error": {"message": words}}).encode()
        at = proxy(lambda n: (status, {}, refusal) if n == 1 else (200, {}, COMPLETION))
        assert (self.ask(at.url).ok, "cache" in at.bodies[1]) == (True, False)

    @pytest.mark.parametrize(
        ("status", "words"),
        [
            (429, "No deployments available for selected model, Try again in 5 seconds."),
            (500, "All deployments for selected model are in cooldown"),
            (400, "No deployments available for selected model"),
            (408, "litellm.Timeout: APITimeoutError"),
        ],
    )
    def test_a_cool_down_does_not_hide_the_error_before_it(
        self, proxy: Callable[[Answers], _Proxy], status: int, words: str
    ) -> None:
        errors = [(500, "the server fell over"), (status, words)]

        def answer(number: int) -> tuple[int, dict[str, str], bytes]:
            code, said = errors[number > 1]
            return code, {}, json.dumps({"error": {"message": said}}).encode()

        at = proxy(answer)
        passage = self.ask(at.url, seconds=1.5)
        assert (passage.status, passage.attempts > 1) == (500, True)
        assert passage.detail == "it answered 500: the server fell over"

    def test_a_gateway_that_only_says_that_it_waited_is_told_as_that(self, proxy: Callable[[Answers], _Proxy]) -> None:
        over = threading.Event()

        def answer(number: int) -> tuple[int, dict[str, str], bytes]:
            if number > 1:
                over.wait(30)
            return 408, {}, json.dumps({"error": {"message": "litellm.Timeout: 1 ms"}}).encode()

        at = proxy(answer)
        try:
            passage = self.ask(at.url, seconds=2.0)
        finally:
            over.set()
        assert (passage.status, passage.detail) == (408, "it answered 408: litellm.Timeout: 1 ms")

    def test_a_key_that_the_gateway_does_not_have_is_not_waited_for(self, proxy: Callable[[Answers], _Proxy]) -> None:
        words = "litellm.InternalServerError: OpenAIException - Missing credentials. Please pass an `api_key`"
        at = proxy(lambda _: (500, {}, json.dumps({"error": {"message": words}}).encode()))
        passage = self.ask(at.url)
        assert (passage.status, passage.attempts, passage.without_key) == (500, 1, True)

    def test_a_url_may_end_as_a_clients_does(self, proxy: Callable[[Answers], _Proxy]) -> None:
        at = proxy(lambda _: (200, {}, COMPLETION))
        assert self.ask(f"{at.url}/v1/").ok and self.ask(f"{at.url}/litellm").ok
        assert at.paths == ["/v1/chat/completions", "/litellm/v1/chat/completions"]

    @pytest.mark.parametrize("nothing", [b"<html>404 Not Found</html>", b'{"detail": "Not Found"}'])
    def test_a_gateway_may_have_no_v1(self, proxy: Callable[[Answers], _Proxy], nothing: bytes) -> None:
        at = proxy(lambda n: (404, {}, nothing) if n == 1 else (200, {}, COMPLETION))
        assert self.ask(at.url).ok
        assert at.paths == ["/v1/chat/completions", "/chat/completions"]

    def test_no_gateway_is_told_from_an_alias_that_fails(self) -> None:
        assert self.ask(f"http://127.0.0.1:{free_port()}").code == "gateway_down"

    def test_a_gateway_that_lives_and_does_not_answer_is_not_down(self, proxy: Callable[[Answers], _Proxy]) -> None:
        release = threading.Event()

        def late(_: int) -> tuple[int, dict[str, str], bytes]:
            release.wait(30)
            return 200, {}, COMPLETION

        at = proxy(late)
        try:
            passage = self.ask(at.url, seconds=1.0)
        finally:
            release.set()
        assert passage.code == "no_completion"
        assert "lives" in passage.detail

    @pytest.mark.parametrize("head", [b"\r\n", b"X: "], ids=["a body", "a header"])
    def test_an_answer_that_trickles_ends_in_time(self, head: bytes) -> None:
        over = threading.Event()

        def trickle(connection: socket.socket) -> None:
            with connection, contextlib.suppress(OSError):  # it is hung up on
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 200 OK\r\n" + head)
                while not over.wait(0.05):
                    connection.sendall(b" ")

        with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(3) as server:
            listener.settimeout(10)

            def serve() -> None:
                for _ in range(2):  # the completion, and whether it lives
                    server.submit(trickle, listener.accept()[0])

            server.submit(serve)
            began = time.monotonic()
            with mock.patch.object(probe, "LIVELINESS_SECONDS", 0.5):
                passage = self.ask(f"http://127.0.0.1:{listener.getsockname()[1]}", seconds=0.5)
            took = time.monotonic() - began
            over.set()
        assert not passage.ok
        assert took < 10

    def test_health_is_never_asked(self, proxy: Callable[[Answers], _Proxy]) -> None:
        """LiteLLM's `/health` sends a request to every model."""
        at = proxy(lambda _: (503, {}, b""))
        self.ask(at.url, seconds=1.5)
        assert not {"/health", "/health/"} & set(at.paths)

    def test_the_key_is_never_shown(self, proxy: Callable[[Answers], _Proxy]) -> None:
        at = proxy(lambda _: (401, {}, b'{"error": {"message": "key sk-canary is not known"}}'))
        for passage in (self.ask(at.url), self.ask(at.url, key="sk-canary\n"), self.ask(at.url, key="sk-canary\u2028")):
            assert not passage.ok
            assert "canary" not in str(passage.to_wire())


def info(*rows: tuple[str, str, str | None]) -> bytes:
    """What LiteLLM answers to GET /v1/model/info: (model_name, model, api_base)."""
    data = [
        {"model_name": name, "litellm_params": {"model": model, "api_base": base}, "model_info": {"id": name}}
        for name, model, base in rows
    ]
    return json.dumps({"data": data}).encode()


BASE = "http://127.0.0.1:8100/v1"


class TestWhatTheRunningGatewayDoes:
    def test_is_asked_of_it(self, proxy: Callable[[Answers], _Proxy]) -> None:
        at = proxy(lambda _: (200, {}, COMPLETION))
        at.info = info(("jerry-xl", "openai/jerry-xl", BASE), ("cloud", "anthropic/x", None))
        found = probe.deployments(at.url, "sk-canary")
        assert found is not None
        assert [(each.alias, each.model, each.api_base) for each in found] == [
            ("jerry-xl", "openai/jerry-xl", BASE),
            ("cloud", "anthropic/x", None),
        ]

    def test_the_many_names_of_one_pattern_are_that_pattern(self, proxy: Callable[[Answers], _Proxy]) -> None:
        def row(name: str, model: str, id: str) -> dict[str, object]:
            return {
                "model_name": name,
                "litellm_params": {"model": model, "api_base": BASE},
                "model_info": {"id": id},
            }

        at = proxy(lambda _: (200, {}, COMPLETION))
        # As LiteLLM 1.109 tells of `*`, of an entry, and of the same by model_group_alias.
        rows = [row(name, f"openai/{name}", "p/1") for name in ("gpt-4o", "o3", "ft:babbage-002")]
        rows += [row("a", "openai/jerry-xl", "2"), row("b", "openai/jerry-xl", "2")]
        at.info = json.dumps({"data": rows}).encode()
        at.by_id["p/1"] = json.dumps({"data": [row("*", "openai/*", "p/1")]}).encode()
        found = probe.deployments(at.url, None) or ()
        assert [(each.alias, each.model) for each in found] == [
            ("a", "openai/jerry-xl"),
            ("b", "openai/jerry-xl"),
            ("*", "openai/*"),
        ]
        # Where it does not tell, nothing is made of the names.
        at.by_id.clear()
        assert [each.alias for each in probe.deployments(at.url, None) or ()] == ["a", "b"]

    @pytest.mark.parametrize(
        "body",
        [b"", b"<html>", b"[]", b'{"data": 7}', b'{"data": {"a": 1}}', b"[" * 100_000],
        ids=["404", "html", "list", "number", "mapping", "deep"],
    )
    def test_is_not_known_where_it_does_not_tell(self, proxy: Callable[[Answers], _Proxy], body: bytes) -> None:
        at = proxy(lambda _: (200, {}, COMPLETION))
        at.info = body
        assert probe.deployments(at.url, None) is None

    def test_is_read_as_far_as_it_can_be(self, proxy: Callable[[Answers], _Proxy]) -> None:
        at = proxy(lambda _: (200, {}, COMPLETION))
        good = {"model_name": "a", "litellm_params": {"model": "openai/a", "base_url": BASE}}
        of_a_team = {**good, "model_info": {"team_id": "t", "team_public_model_name": "b"}}
        at.info = json.dumps({"data": [7, {}, {"model_name": "x"}, of_a_team, good]}).encode()
        (found,) = probe.deployments(at.url, None) or ()
        assert (found.alias, found.api_base) == ("a", BASE)


class TestPassingThrough:
    """`gateway --through`, with a gateway that answers as a test wants, and an agent's answer."""

    def passed(self, told: gatewayfiles.GatewayConfig, at: _Proxy, **changes: object) -> HostReply:
        described = Gateway("router.yaml", None, at.url, None)
        (answer,) = check.check(told, [target()], [HostReply("studio", {"ports": [row(**changes)]})])
        with mock.patch.object(probe, "SECONDS", 1.2):
            (passed,) = check.pass_through(described, told, [answer])
        return passed

    def findings(self, answer: HostReply) -> list[tuple[str, str]]:
        assert answer.result is not None
        return [(f["code"], f["hint"]) for f in answer.result["findings"] if f["severity"] == "fault"]  # type: ignore[attr-defined]

    def alias(self, answer: HostReply) -> dict[str, object]:
        rows = (answer.result or {})["aliases"]
        assert isinstance(rows, list) and len(rows) == 1
        return dict(rows[0])

    def test_names_of_clients_are_asked_and_shown(self, proxy: Callable[[Answers], _Proxy], tmp_path: Path) -> None:
        at = proxy(lambda _: (200, {"x-litellm-model-api-base": "http://LocalHost:8100"}, COMPLETION))
        told = read(tmp_path, ENTRY.replace("model_name: jerry-xl", "model_name: qwen-coder"))
        passed = self.passed(told, at)
        assert passed.error is None, passed.result
        assert [body["model"] for body in at.bodies] == ["qwen-coder"]
        assert self.alias(passed)["alias"] == "qwen-coder"
        assert "\nqwen-coder " in output.gateway_table([passed])

    def test_a_wrong_name_is_not_sent(self, proxy: Callable[[Answers], _Proxy], tmp_path: Path) -> None:
        at = proxy(lambda _: (200, {}, COMPLETION))
        passed = self.passed(read(tmp_path, ENTRY.replace("openai/jerry-xl", "openai/other-name")), at)
        assert at.bodies == [] and self.alias(passed)["through"] is None
        assert [code for code, _ in self.findings(passed)] == ["wrong_name"]

    def test_the_alias_is_not_sent_to_a_server_that_has_another_name(
        self, proxy: Callable[[Answers], _Proxy], tmp_path: Path
    ) -> None:
        at = proxy(lambda _: (200, {}, COMPLETION))
        passed = self.passed(read(tmp_path, ENTRY), at, owner="hand", answers_to="/models/qwen")
        assert at.bodies == [] and [code for code, _ in self.findings(passed)] == ["server_name"]

    def test_a_server_whose_name_is_not_known_is_not_asked(
        self, proxy: Callable[[Answers], _Proxy], tmp_path: Path
    ) -> None:
        at = proxy(lambda _: (200, {}, COMPLETION))
        passed = self.passed(read(tmp_path, ENTRY), at, owner="hand", answers_to=None, not_asked="no --model")
        assert at.bodies == [] and self.findings(passed) == []
        assert "through_not_asked" in str(self.alias(passed)["verdict"])

    def test_what_it_runs_with_counts_more_than_its_files(
        self, proxy: Callable[[Answers], _Proxy], tmp_path: Path
    ) -> None:
        at = proxy(lambda _: (200, {}, COMPLETION))
        at.info = info(("jerry-xl", "openai/before", BASE))
        passed = self.passed(read(tmp_path, ENTRY), at)
        assert at.bodies == []
        ((code, hint),) = self.findings(passed)
        assert code == "through_not_asked" and hint.startswith("restart the gateway, once")

    @pytest.mark.parametrize("default", ["model: openai/other", "api_base: 'http://127.0.0.1:8101/v1'"])
    def test_what_its_settings_change_at_each_request_counts_though_it_does_not_show_it(
        self, proxy: Callable[[Answers], _Proxy], tmp_path: Path, default: str
    ) -> None:
        at = proxy(lambda _: (200, {}, COMPLETION))
        at.info = info(("jerry-xl", "openai/jerry-xl", BASE))
        settings = f"router_settings: {{default_litellm_params: {{{default}}}}}\n"
        self.passed(read(tmp_path, ENTRY + settings), at)
        assert at.bodies == []

    def test_an_address_that_it_does_not_show_is_that_of_its_files(
        self, proxy: Callable[[Answers], _Proxy], tmp_path: Path
    ) -> None:
        at = proxy(lambda _: (200, {}, COMPLETION))
        at.info = info(("jerry-xl", "openai/jerry-xl", None))
        passed = self.passed(read(tmp_path, ENTRY), at)
        assert len(at.bodies) == 1 and passed.error is None

    @pytest.mark.parametrize(
        ("status", "message", "help"),
        [
            (401, "Authentication Error, Invalid proxy server token passed", "the gateway does not accept"),
            (403, "key not allowed to access model. This key can only access models=['x']", "does not accept"),
            (401, "litellm.AuthenticationError: OpenAIException - no", "refuses the api_key of the entry"),
            (429, "Budget has been exceeded! Current cost: 0.18, Max budget: 0.14", "the gateway limits it"),
            (400, "ExceededBudget: Team over budget", "the gateway limits it"),
            (400, "No connected db.", "the gateway does not accept"),
            (500, "OpenAIException - Connection error", "mlxctl status --probe"),
        ],
    )
    def test_a_failure_is_told_with_what_helps(
        self, proxy: Callable[[Answers], _Proxy], tmp_path: Path, status: int, message: str, help: str
    ) -> None:
        at = proxy(lambda _: (status, {}, json.dumps({"error": {"message": message}}).encode()))
        ((code, hint),) = self.findings(self.passed(read(tmp_path, ENTRY), at))
        assert code == "through_no_completion" and help in hint and "restart" not in hint


def test_a_receipt_says_that_an_address_is_not_known_here(tmp_path: Path) -> None:
    described = Gateway("router.yaml", None, "http://127.0.0.1:4000", None)
    told = read(tmp_path, ENTRY.replace("127.0.0.1", "mlx-studio"))
    running = check._Running(described, None, told.entries, None, ())
    assert "'http://mlx-studio:8100/v1', where jerry-xl is sent," in running.nowhere("jerry-xl", 8100)
    assert running.nowhere("jerry-xl", 8101) == "the gateway has no entry that leads to port 8101"
