"""Probes through a gateway: single aliases, its deployments, and `gateway --through`."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock

import pytest

from mlxops.control.gateway import probe, table
from mlxops.control.gateway.check import check
from mlxops.control.gateway.config import GatewayConfig
from mlxops.control.gateway.ports import same_host
from mlxops.control.gateway.probe import ProbeResult, Question
from mlxops.control.gateway.result import GatewayResult, ProbedAliasRow
from mlxops.control.gateway.through import RunningGateway, pass_through
from mlxops.control.inventory import Gateway
from mlxops.core import wire
from mlxops.core.gateway import Impact
from mlxops.core.replies import HostReply
from tests.control.gatewayfiles import ENTRY, read_config, served, target
from tests.lab.ports import free_port

Answers = Callable[[int], tuple[int, dict[str, str], bytes]]
COMPLETION = json.dumps({"choices": [{"message": {"role": "assistant", "content": "hi"}}]}).encode()


class Proxy:
    """A gateway that answers its n-th completion request as a test wants, and records the requests."""

    def __init__(self, answers: Answers) -> None:
        self.paths: list[str] = []
        self.bodies: list[dict[str, object]] = []
        self.info = b""
        """Its reply with all deployments; empty: 404."""
        self.by_id: dict[str, bytes] = {}
        """Its replies with one deployment."""
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
                    pass  # the client is gone

            def log_message(self, format: str, *args: object) -> None:
                """Log nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"


@pytest.fixture
def proxy() -> Iterator[Callable[[Answers], Proxy]]:
    running: list[tuple[Proxy, threading.Thread]] = []

    def start(answers: Answers) -> Proxy:
        made = Proxy(answers)
        thread = threading.Thread(target=made.server.serve_forever, args=(0.01,))
        thread.start()
        running.append((made, thread))
        return made

    yield start
    for made, thread in running:
        made.server.shutdown()
        made.server.server_close()
        thread.join()


class TestProbe:
    def ask(self, url: str, key: str | None = "sk-canary", seconds: float = 60.0) -> ProbeResult:
        question = Question("jerry-xl", ("http://studio:8100/v1",))
        return probe.probe_alias(url, key, question, seconds=seconds, pause=lambda _: None)

    def test_completion_proves_the_alias(self, proxy: Callable[[Answers], Proxy]) -> None:
        at = proxy(lambda _: (200, {"x-litellm-model-api-base": "http://studio:8100/v1/"}, COMPLETION))
        result = self.ask(at.url)
        assert (result.ok, result.attempts, result.status) == (True, 1, 200)
        assert at.paths == ["/v1/chat/completions"]

    def test_probe_waits_for_the_cool_down(self, proxy: Callable[[Answers], Proxy]) -> None:
        at = proxy(lambda n: (429 if n == 1 else 500 if n == 2 else 200, {}, COMPLETION))
        assert (self.ask(at.url).ok, len(at.paths)) == (True, 3)

    @pytest.mark.parametrize("status", [302, 307, 308, 400, 401, 403, 404])
    def test_final_status_ends_the_probe(self, proxy: Callable[[Answers], Proxy], status: int) -> None:
        at = proxy(lambda _: (status, {}, b'{"error": {"message": "Invalid model name"}}'))
        result = self.ask(at.url)
        assert (result.code, result.attempts) == ("no_completion", 1)
        assert result.detail == f"it answered {status}: Invalid model name"

    def test_probe_ends_at_its_deadline(self, proxy: Callable[[Answers], Proxy]) -> None:
        moments = iter(range(0, 1000, 10))
        at = proxy(lambda _: (503, {}, b"busy"))
        question = Question("jerry-xl")
        result = probe.probe_alias(
            at.url, None, question, seconds=60, clock=lambda: float(next(moments)), pause=lambda _: None
        )
        assert (result.code, result.status) == ("no_completion", 503)
        assert len(at.paths) < 6

    @pytest.mark.parametrize(
        "body",
        [
            *(b"", b"\xff", b"null", b"[]", b"{}", b'{"choices": []}', b'{"choices": [{}]}', b"<html>", b"[" * 100_000),
            b'{"choices": [{"message": {"content": ""}}], "usage": {"completion_tokens": 0}}',
        ],
        ids=lambda body: body[:40].decode(errors="replace"),
    )
    def test_body_without_a_completion_proves_nothing(self, proxy: Callable[[Answers], Proxy], body: bytes) -> None:
        at = proxy(lambda _: (200, {}, body))
        assert self.ask(at.url, seconds=0.5).code == "no_completion"

    def test_tokens_without_text_are_an_answer(self, proxy: Callable[[Answers], Proxy]) -> None:
        body = b'{"choices": [{"message": {"content": ""}}], "usage": {"completion_tokens": 4}}'
        assert self.ask(proxy(lambda _: (200, {}, body)).url).ok

    def test_answer_of_a_wrong_server_is_reported_at_once(self, proxy: Callable[[Answers], Proxy]) -> None:
        at = proxy(lambda _: (200, {"x-litellm-model-api-base": "http://old:8100/v1"}, COMPLETION))
        result = self.ask(at.url)
        assert (result.code, result.api_base, result.attempts) == ("other_server", "http://old:8100/v1", 1)

    @pytest.mark.parametrize(
        "base", ["http://127.0.0.1:8100/v1", "http://LocalHost:8100", "http://localhost.:8100/v1/"]
    )
    def test_spelling_of_the_address_does_not_matter(self, proxy: Callable[[Answers], Proxy], base: str) -> None:
        at = proxy(lambda _: (200, {"x-litellm-model-api-base": base}, COMPLETION))
        question = Question("a", ("http://localhost:8100/v1",))
        assert probe.probe_alias(at.url, None, question, same_host=same_host).ok

    def test_answer_of_a_fallback_proves_nothing(self, proxy: Callable[[Answers], Proxy]) -> None:
        spare = {"x-litellm-model-api-base": "http://spare:8101/v1", "x-litellm-attempted-fallbacks": "1"}
        own = {"x-litellm-model-api-base": "http://studio:8100/v1", "x-litellm-attempted-fallbacks": "0"}
        at = proxy(lambda n: (200, spare if n < 3 else own, COMPLETION))
        result = self.ask(at.url)
        assert (result.ok, result.attempts) == (True, 3)
        at = proxy(lambda _: (200, spare, COMPLETION))
        result = self.ask(at.url, seconds=1.5)
        assert (result.code, result.attempts > 1) == ("fallback", True)
        assert "fallback at http://spare:8101/v1" in result.detail

    def test_probe_repeats_past_another_deployment_of_the_name(self, proxy: Callable[[Answers], Proxy]) -> None:
        bases = ["http://other:8100/v1", "http://studio:8100/v1"]
        at = proxy(lambda n: (200, {"x-litellm-model-api-base": bases[n > 2]}, COMPLETION))

        def ask(seconds: float) -> ProbeResult:
            question = Question("jerry-xl", (bases[1],), (bases[0],))
            return probe.probe_alias(at.url, None, question, seconds=seconds, pause=lambda _: None)

        assert (ask(60).ok, len(at.paths)) == (True, 3)
        at = proxy(lambda _: (200, {"x-litellm-model-api-base": bases[0]}, COMPLETION))
        assert ask(1.5).code == "other_deployment"

    def test_request_is_new_and_excludes_caches_and_fallbacks(self, proxy: Callable[[Answers], Proxy]) -> None:
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
    def test_refused_litellm_fields_are_left_out(
        self, proxy: Callable[[Answers], Proxy], status: int, words: str
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
    def test_cool_down_does_not_hide_an_earlier_error(
        self, proxy: Callable[[Answers], Proxy], status: int, words: str
    ) -> None:
        errors = [(500, "the server fell over"), (status, words)]

        def answer(number: int) -> tuple[int, dict[str, str], bytes]:
            code, expected = errors[number > 1]
            return code, {}, json.dumps({"error": {"message": expected}}).encode()

        at = proxy(answer)
        result = self.ask(at.url, seconds=1.5)
        assert (result.status, result.attempts > 1) == (500, True)
        assert result.detail == "it answered 500: the server fell over"

    def test_timeout_reported_by_the_gateway_is_kept(self, proxy: Callable[[Answers], Proxy]) -> None:
        over = threading.Event()

        def answer(number: int) -> tuple[int, dict[str, str], bytes]:
            if number > 1:
                over.wait(30)
            return 408, {}, json.dumps({"error": {"message": "litellm.Timeout: 1 ms"}}).encode()

        at = proxy(answer)
        try:
            result = self.ask(at.url, seconds=2.0)
        finally:
            over.set()
        assert (result.status, result.detail) == (408, "it answered 408: litellm.Timeout: 1 ms")

    def test_missing_credentials_end_the_probe(self, proxy: Callable[[Answers], Proxy]) -> None:
        words = "litellm.InternalServerError: OpenAIException - Missing credentials. Please pass an `api_key`"
        at = proxy(lambda _: (500, {}, json.dumps({"error": {"message": words}}).encode()))
        result = self.ask(at.url)
        assert (result.status, result.attempts, result.without_key) == (500, 1, True)

    def test_url_may_end_in_v1(self, proxy: Callable[[Answers], Proxy]) -> None:
        at = proxy(lambda _: (200, {}, COMPLETION))
        assert self.ask(f"{at.url}/v1/").ok and self.ask(f"{at.url}/litellm").ok
        assert at.paths == ["/v1/chat/completions", "/litellm/v1/chat/completions"]

    @pytest.mark.parametrize("nothing", [b"<html>404 Not Found</html>", b'{"detail": "Not Found"}'])
    def test_gateway_without_v1_is_probed(self, proxy: Callable[[Answers], Proxy], nothing: bytes) -> None:
        at = proxy(lambda n: (404, {}, nothing) if n == 1 else (200, {}, COMPLETION))
        assert self.ask(at.url).ok
        assert at.paths == ["/v1/chat/completions", "/chat/completions"]

    def test_missing_gateway_is_down(self) -> None:
        assert self.ask(f"http://127.0.0.1:{free_port()}").code == "gateway_down"

    def test_slow_gateway_is_not_down(self, proxy: Callable[[Answers], Proxy]) -> None:
        release = threading.Event()

        def late(_: int) -> tuple[int, dict[str, str], bytes]:
            release.wait(30)
            return 200, {}, COMPLETION

        at = proxy(late)
        try:
            result = self.ask(at.url, seconds=1.0)
        finally:
            release.set()
        assert result.code == "no_completion"
        assert "is up" in result.detail

    @pytest.mark.parametrize("head", [b"\r\n", b"X: "], ids=["a body", "a header"])
    def test_trickling_response_is_cut_off(self, head: bytes) -> None:
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
                result = self.ask(f"http://127.0.0.1:{listener.getsockname()[1]}", seconds=0.5)
            took = time.monotonic() - began
            over.set()
        assert not result.ok
        assert took < 10

    def test_health_is_never_requested(self, proxy: Callable[[Answers], Proxy]) -> None:
        """LiteLLM's `/health` sends a request to every model."""
        at = proxy(lambda _: (503, {}, b""))
        self.ask(at.url, seconds=1.5)
        assert not {"/health", "/health/"} & set(at.paths)

    def test_key_is_never_shown(self, proxy: Callable[[Answers], Proxy]) -> None:
        at = proxy(lambda _: (401, {}, b'{"error": {"message": "key sk-canary is not known"}}'))
        for result in (self.ask(at.url), self.ask(at.url, key="sk-canary\n"), self.ask(at.url, key="sk-canary\u2028")):
            assert not result.ok
            assert "canary" not in str(result.to_wire())


def info(*rows: tuple[str, str, str | None]) -> bytes:
    """Return LiteLLM's reply to GET /v1/model/info. A row: (model_name, model, api_base)."""
    data = [
        {"model_name": name, "litellm_params": {"model": model, "api_base": base}, "model_info": {"id": name}}
        for name, model, base in rows
    ]
    return json.dumps({"data": data}).encode()


BASE = "http://127.0.0.1:8100/v1"


class TestDeployments:
    def test_deployments_are_listed(self, proxy: Callable[[Answers], Proxy]) -> None:
        at = proxy(lambda _: (200, {}, COMPLETION))
        at.info = info(("jerry-xl", "openai/jerry-xl", BASE), ("cloud", "anthropic/x", None))
        found = probe.deployments(at.url, "sk-canary")
        assert found is not None
        assert [(deployment.alias, deployment.model, deployment.api_base) for deployment in found] == [
            ("jerry-xl", "openai/jerry-xl", BASE),
            ("cloud", "anthropic/x", None),
        ]

    def test_rows_of_one_pattern_become_the_pattern(self, proxy: Callable[[Answers], Proxy]) -> None:
        def row(name: str, model: str, id: str) -> dict[str, object]:
            return {
                "model_name": name,
                "litellm_params": {"model": model, "api_base": BASE},
                "model_info": {"id": id},
            }

        at = proxy(lambda _: (200, {}, COMPLETION))
        # As LiteLLM 1.109 lists `*`, an entry, and the same by model_group_alias.
        rows = [row(name, f"openai/{name}", "p/1") for name in ("gpt-4o", "o3", "ft:babbage-002")]
        rows += [row("a", "openai/jerry-xl", "2"), row("b", "openai/jerry-xl", "2")]
        at.info = json.dumps({"data": rows}).encode()
        at.by_id["p/1"] = json.dumps({"data": [row("*", "openai/*", "p/1")]}).encode()
        found = probe.deployments(at.url, None) or ()
        assert [(deployment.alias, deployment.model) for deployment in found] == [
            ("a", "openai/jerry-xl"),
            ("b", "openai/jerry-xl"),
            ("*", "openai/*"),
        ]
        # Without its reply for the id, the names are left out.
        at.by_id.clear()
        assert [deployment.alias for deployment in probe.deployments(at.url, None) or ()] == ["a", "b"]

    @pytest.mark.parametrize(
        "body",
        [b"", b"<html>", b"[]", b'{"data": 7}', b'{"data": {"a": 1}}', b"[" * 100_000],
        ids=["404", "html", "list", "number", "mapping", "deep"],
    )
    def test_unusable_list_is_none(self, proxy: Callable[[Answers], Proxy], body: bytes) -> None:
        at = proxy(lambda _: (200, {}, COMPLETION))
        at.info = body
        assert probe.deployments(at.url, None) is None

    def test_unusable_rows_are_skipped(self, proxy: Callable[[Answers], Proxy]) -> None:
        at = proxy(lambda _: (200, {}, COMPLETION))
        good = {"model_name": "a", "litellm_params": {"model": "openai/a", "base_url": BASE}}
        of_a_team = {**good, "model_info": {"team_id": "t", "team_public_model_name": "b"}}
        at.info = json.dumps({"data": [7, {}, {"model_name": "x"}, of_a_team, good]}).encode()
        (found,) = probe.deployments(at.url, None) or ()
        assert (found.alias, found.api_base) == ("a", BASE)


class TestThrough:
    """`gateway --through` with a gateway that answers as a test wants."""

    def passed(self, config: GatewayConfig, at: Proxy, **changes: object) -> HostReply[GatewayResult]:
        gateway = Gateway("router.yaml", None, at.url, None)
        (reply,) = check(config, [target()], [served(**changes)])
        with mock.patch.object(probe, "ALIAS_SECONDS", 1.2):
            (passed,) = pass_through(gateway, config, [reply])
        return passed

    def faults(self, reply: HostReply[GatewayResult]) -> list[tuple[str, str]]:
        assert reply.result is not None
        return [(f.code, f.hint) for f in reply.result.findings if f.severity is Impact.FAULT]

    def row(self, reply: HostReply[GatewayResult]) -> ProbedAliasRow:
        assert reply.result is not None
        (row,) = reply.result.aliases
        assert isinstance(row, ProbedAliasRow)
        return row

    def test_client_names_are_probed_and_shown(self, proxy: Callable[[Answers], Proxy], tmp_path: Path) -> None:
        at = proxy(lambda _: (200, {"x-litellm-model-api-base": "http://LocalHost:8100"}, COMPLETION))
        config = read_config(tmp_path, ENTRY.replace("model_name: jerry-xl", "model_name: qwen-coder"))
        passed = self.passed(config, at)
        assert passed.error is None, passed.result
        assert [body["model"] for body in at.bodies] == ["qwen-coder"]
        assert self.row(passed).alias == "qwen-coder"
        assert "\nqwen-coder " in table.show([passed])

    def test_json_keys_of_a_row_are_kept(self, proxy: Callable[[Answers], Proxy], tmp_path: Path) -> None:
        at = proxy(lambda _: (200, {}, COMPLETION))
        config = read_config(tmp_path, ENTRY)
        (checked,) = check(config, [target()], [served()])
        (plain,) = wire.encode(checked.result)["aliases"]
        (probed,) = wire.encode(self.passed(config, at).result)["aliases"]
        assert list(plain) == [
            *("alias", "names", "slot", "port", "url", "sends", "state", "owner", "model", "answers_to"),
            *("also_answers_to", "answers_to_any", "drops_for_others", "not_asked", "context_length", "verdict"),
        ]
        assert list(probed) == [*plain, "through", "passages", "skipped"]
        assert probed["through"]["ok"] is True and probed["names"] == ["jerry-xl"] and probed["skipped"] == {}

    def test_wrong_name_is_not_probed(self, proxy: Callable[[Answers], Proxy], tmp_path: Path) -> None:
        at = proxy(lambda _: (200, {}, COMPLETION))
        passed = self.passed(read_config(tmp_path, ENTRY.replace("openai/jerry-xl", "openai/other-name")), at)
        assert at.bodies == [] and self.row(passed).through is None
        assert [code for code, _ in self.faults(passed)] == ["wrong_name"]

    def test_server_with_another_name_is_not_probed(self, proxy: Callable[[Answers], Proxy], tmp_path: Path) -> None:
        at = proxy(lambda _: (200, {}, COMPLETION))
        passed = self.passed(read_config(tmp_path, ENTRY), at, owner="hand", answers_to="/models/qwen")
        assert at.bodies == [] and [code for code, _ in self.faults(passed)] == ["server_name"]

    def test_server_with_an_unknown_name_is_not_probed(self, proxy: Callable[[Answers], Proxy], tmp_path: Path) -> None:
        at = proxy(lambda _: (200, {}, COMPLETION))
        passed = self.passed(read_config(tmp_path, ENTRY), at, owner="hand", answers_to=None, not_asked="no --model")
        assert at.bodies == [] and self.faults(passed) == []
        assert "through_not_asked" in self.row(passed).verdict

    def test_reported_entries_precede_the_files(self, proxy: Callable[[Answers], Proxy], tmp_path: Path) -> None:
        at = proxy(lambda _: (200, {}, COMPLETION))
        at.info = info(("jerry-xl", "openai/before", BASE))
        passed = self.passed(read_config(tmp_path, ENTRY), at)
        assert at.bodies == []
        ((code, hint),) = self.faults(passed)
        assert code == "through_not_asked" and hint.startswith("restart the gateway, once")

    @pytest.mark.parametrize("default", ["model: openai/other", "api_base: 'http://127.0.0.1:8101/v1'"])
    def test_unreported_default_parameters_count(
        self, proxy: Callable[[Answers], Proxy], tmp_path: Path, default: str
    ) -> None:
        at = proxy(lambda _: (200, {}, COMPLETION))
        at.info = info(("jerry-xl", "openai/jerry-xl", BASE))
        settings = f"router_settings: {{default_litellm_params: {{{default}}}}}\n"
        self.passed(read_config(tmp_path, ENTRY + settings), at)
        assert at.bodies == []

    def test_unreported_address_comes_from_the_files(self, proxy: Callable[[Answers], Proxy], tmp_path: Path) -> None:
        at = proxy(lambda _: (200, {}, COMPLETION))
        at.info = info(("jerry-xl", "openai/jerry-xl", None))
        passed = self.passed(read_config(tmp_path, ENTRY), at)
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
    def test_failure_comes_with_advice(
        self, proxy: Callable[[Answers], Proxy], tmp_path: Path, status: int, message: str, help: str
    ) -> None:
        at = proxy(lambda _: (status, {}, json.dumps({"error": {"message": message}}).encode()))
        ((code, hint),) = self.faults(self.passed(read_config(tmp_path, ENTRY), at))
        assert code == "through_no_completion" and help in hint and "restart" not in hint


def test_reason_says_that_an_address_is_not_known_here(tmp_path: Path) -> None:
    gateway = Gateway("router.yaml", None, "http://127.0.0.1:4000", None)
    config = read_config(tmp_path, ENTRY.replace("127.0.0.1", "mlx-studio"))
    running = RunningGateway(gateway, None, config.entries, None, ())
    assert "the gateway sends jerry-xl to 'http://mlx-studio:8100/v1'; " in running.why_no_name("jerry-xl", 8100)
    assert running.why_no_name("jerry-xl", 8101) == "the gateway has no entry that leads to port 8101"
