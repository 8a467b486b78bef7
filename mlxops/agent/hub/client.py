"""An instrumented huggingface_hub: quiet, with time and size limits, retries and its errors mapped to ours.

By itself, huggingface_hub 2.4 reports a temporary refusal (429, 5xx) as a file that is missing from the cache, sleeps
on a 429 for as long as the hub says, detects a stall only after about 65 seconds, draws on stderr, reads answers of any
length, and makes paths of the names in them. Here, hooks in its HTTP client leave retries to us, limit every answer and
refuse invalid names. Its progress bars are replaced. It is imported only for a download, because that takes half a
second.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import threading
import time
import unicodedata
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast
from urllib.parse import urlsplit
from weakref import WeakSet

from mlxops.agent.hub.cache import is_commit
from mlxops.agent.hub.contents import printable
from mlxops.core.errors import DownloadFailed, MlxopsError, Refused
from mlxops.core.frozen import dataclass
from mlxops.core.protocol import Event, Note, Progress
from mlxops.core.text import amount

if TYPE_CHECKING:
    import httpx2
    from huggingface_hub import HfApi

Emit = Callable[[Event], None]
T = TypeVar("T")

RETRYABLE_STATUSES = frozenset({408, 429, 500, 502, 503, 504})
"""HTTP statuses of temporary failures."""
REPORT_INTERVAL_SECONDS = 0.2
"""The shortest time between two progress events."""
RATE_WINDOW_SECONDS = 10.0
"""The reported rate is the average over this time."""
MAX_ANSWER_BYTES = 64 * 1024 * 1024
"""For answers other than file contents. A listing of 10,000 files has about three million bytes."""
MAX_NAME_BYTES = 255
"""For one part of a path, in every file system that may hold a cache."""
_FORBIDDEN_CATEGORIES = frozenset({"Cc", "Cs", "Zl", "Zp"})
"""Unicode categories that a file name must not contain: control characters, lone surrogates, line breaks.

Other characters that Python calls unprintable are allowed: the names of macOS screenshots contain special spaces."""
_DECODED_ENCODINGS = frozenset({"gzip", "deflate", "br", "zstd"})
"""Encodings that httpx2 decodes without a limit."""
_QUIET_SETTINGS = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_VERBOSITY": "critical"}
"""Environment variables for its import. huggingface_hub reads its settings once."""


@dataclass(frozen=True)
class DownloadTimeouts:
    """Time limits of a download, in seconds, and its number of tries."""

    stall: float = 120.0
    """For the time without a single byte."""
    answer: float = 30.0
    """For a complete answer about the repository. File contents have no such limit."""
    tries: int = 4
    backoff: float = 2.0
    """The pause before the second try. It doubles before each further try."""
    longest_wait: float = 60.0
    """The longest pause, even if the hub asks for a longer one."""


@dataclass(frozen=True)
class RepoRevision:
    """A repository with the requested branch, tag or commit; None for the default branch."""

    repo_id: str
    revision: str | None

    @property
    def branch(self) -> str:
        """The requested revision, or the hub's default branch, main."""
        return self.revision or "main"

    def __str__(self) -> str:
        return self.repo_id if self.revision is None else f"{self.repo_id}@{self.revision}"


class _Stream(Protocol):
    """The part of an httpcore2 connection that is used here."""

    def get_extra_info(self, info: str) -> Any: ...


@dataclass
class HubClient:
    """The connection to a hub: its address, its limits, and when it last sent data."""

    timeouts: DownloadTimeouts
    endpoint: str | None
    is_cancelled: Callable[[], bool] = lambda: False
    """Returns whether the download is cancelled. The download threads call it for each piece, because a thread cannot
    be interrupted."""
    largest: int | None = None
    """Bytes of the largest file in the hub's listing; None before the listing is known."""
    _last: float = field(default_factory=time.monotonic)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _streams: WeakSet[_Stream] = field(default_factory=WeakSet)
    _due: dict[object, float] = field(default_factory=dict)
    """The deadline for the headers of each pending answer."""

    def api(self) -> HfApi:
        from huggingface_hub import HfApi

        return HfApi(endpoint=self.endpoint, library_name="mlxops")

    def note_activity(self) -> None:
        self._last = time.monotonic()

    @property
    def stalled(self) -> bool:
        return time.monotonic() - self._last > self.timeouts.stall

    def handle_trace(self, event: str, info: Mapping[str, object], key: object, timeout: float) -> None:
        """Handle a trace event of httpcore2 for one request (its extension `trace`): keep a deadline for the headers.

        httpcore2's own timeouts limit a single read, so headers that trickle would never time out."""
        if event.endswith(("connect_tcp.complete", "start_tls.complete")):
            with self._lock:
                self._streams.add(cast("_Stream", info["return_value"]))
        elif event.endswith("receive_response_headers.started"):
            self._due[key] = time.monotonic() + timeout
        elif "receive_response_headers." in event:
            self._due.pop(key, None)

    def close_if_late(self) -> None:
        """Shut down all connections if the headers of any answer are late. Reads from them then fail."""
        now = time.monotonic()
        if any(due < now for due in self._due.copy().values()):
            with self._lock:
                streams = list(self._streams)
            for stream in streams:
                with contextlib.suppress(OSError):  # already closed
                    stream.get_extra_info("socket").shutdown(socket.SHUT_RDWR)

    @property
    def host(self) -> str:
        return urlsplit(self.endpoint or "https://huggingface.co").hostname or "the hub"


class RetryAfter(Exception):
    """The hub sent a status of `RETRYABLE_STATUSES`. `after`: the seconds of its Retry-After header, if any."""

    def __init__(self, status: int, after: float | None) -> None:
        super().__init__(f"HTTP {status}")
        self.status, self.after = status, after


class _Stalled(Exception):
    """The hub has sent no data for too long."""


class _AnswerTooSlow(Exception):
    """An answer did not end before its deadline."""


class _Cancelled(Exception):
    """The download was cancelled."""


class InvalidAnswer(Exception):
    """The answer is not valid for a hub. The message describes it. A retry would not help."""


def check_name(name: object) -> str:
    """Return a repository's file name, from which a path on this host is made.

    Raises `InvalidAnswer` unless it is a relative POSIX path without `.` and `..`.
    """
    if (
        isinstance(name, str)
        and "\\" not in name
        and not any(unicodedata.category(char) in _FORBIDDEN_CATEGORIES for char in name)
    ):
        parts = name.split("/")
        if all(part not in {"", ".", ".."} and len(part.encode()) <= MAX_NAME_BYTES for part in parts):
            return name
    raise InvalidAnswer(f"it names a file {printable(str(name))!r}, which is not a valid name")


def check_etag(etag: object) -> str:
    """Return the hash that names a file's content in the cache. Raises `InvalidAnswer` if it could be a path."""
    if isinstance(etag, str) and re.fullmatch(r"[A-Za-z0-9]{1,128}", etag):
        return etag
    raise InvalidAnswer(f"it calls the content of a file {printable(str(etag))!r}")


@contextmanager
def report_invalid_answers(repo: RepoRevision, client: HubClient) -> Iterator[None]:
    """Raise `DownloadFailed` (hub_error) for an answer of an unexpected form.

    huggingface_hub raises a dozen kinds of exceptions for such answers."""
    try:
        yield
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        if isinstance(error, OSError):  # huggingface_hub's exception for status 400 is also a ValueError
            raise
        why = f"its answer is not that of a Hugging Face hub: {_describe(error)}"
        raise failure("hub_error", repo, why, client.host) from None


@contextmanager
def open_client(timeouts: DownloadTimeouts, is_cancelled: Callable[[], bool] = lambda: False) -> Iterator[HubClient]:
    """Give huggingface_hub an HTTP client with our hooks; restore its own client afterwards.

    The hooks note every received byte, leave retries to us, and send no request after a stall."""
    import_quietly()
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    client = HubClient(timeouts, os.environ.get("HF_ENDPOINT") or None, is_cancelled)
    set_client_factory(lambda: _add_hooks(default_client_factory(), client))
    try:
        with _watch_stalls(client):
            yield client
    finally:
        set_client_factory(default_client_factory)


def _add_hooks(client: httpx2.Client, hub: HubClient) -> httpx2.Client:
    """Add hooks to an HTTP client that apply the limits of `hub`.

    Answers about the repository (metadata) have a total time limit and a fixed maximum size. File contents are limited
    by stalls and by the size of the largest listed file.
    """
    import httpx2

    api = str(httpx2.URL(f"{(hub.endpoint or 'https://huggingface.co').rstrip('/')}/api/"))

    class LimitedStream(httpx2.SyncByteStream):
        def __init__(self, stream: httpx2.SyncByteStream, limit: int, deadline: float | None) -> None:
            self._stream, self._limit, self._deadline = stream, limit, deadline

        def __iter__(self) -> Iterator[bytes]:
            received = 0
            for chunk in self._stream:
                if hub.is_cancelled():
                    raise _Cancelled
                hub.note_activity()
                received += len(chunk)
                if received > self._limit:
                    raise InvalidAnswer(f"it sends more than {amount(self._limit)}, the limit for this answer")
                if self._deadline is not None and time.monotonic() > self._deadline:
                    raise _AnswerTooSlow
                yield chunk

        def close(self) -> None:
            self._stream.close()

    def prepare_request(request: httpx2.Request) -> None:
        if hub.is_cancelled():
            raise _Cancelled
        if hub.stalled:
            raise _Stalled
        # A redirected request keeps the kind of the first request: its own address does not show the kind.
        is_metadata = request.extensions.setdefault(
            "mlxops.metadata", hub.largest is None or str(request.url).startswith(api)
        )
        request.extensions.setdefault("mlxops.sent_at", time.monotonic())
        timeout = hub.timeouts.answer if is_metadata else hub.timeouts.stall
        timeouts = request.extensions.get("timeout", {})
        timeouts["read"] = min(timeouts.get("read") or timeout, timeout)
        key = object()
        request.extensions["trace"] = lambda event, info: hub.handle_trace(event, info, key, timeout)
        request.headers["Accept-Encoding"] = "identity"

    def check_response(response: httpx2.Response) -> None:
        if response.status_code in RETRYABLE_STATUSES:
            seconds = response.headers.get("Retry-After", "")
            raise RetryAfter(response.status_code, float(seconds) if re.fullmatch("[0-9]{1,9}", seconds) else None)
        extensions = response.request.extensions
        is_metadata = extensions["mlxops.metadata"]
        if isinstance(response.stream, httpx2.SyncByteStream):
            deadline = extensions["mlxops.sent_at"] + hub.timeouts.answer if is_metadata else None
            content = not is_metadata and response.status_code in {200, 206}
            response.stream = LimitedStream(
                response.stream, (hub.largest or 0) if content else MAX_ANSWER_BYTES, deadline
            )
        # We asked for no compression, and a few compressed bytes may decode to more than a disk holds. Without
        # decoding, the answer is invalid.
        if _DECODED_ENCODINGS & {
            word.strip() for word in response.headers.get("Content-Encoding", "").lower().split(",")
        }:
            del response.headers["Content-Encoding"]
        _check_names(response, is_metadata=is_metadata)

    client.event_hooks = {
        "request": [*client.event_hooks.get("request", []), prepare_request],
        "response": [*client.event_hooks.get("response", []), check_response],
    }
    return client


def _check_names(response: httpx2.Response, *, is_metadata: bool) -> None:
    """Check every name in an answer from which huggingface_hub makes a path. Raises `InvalidAnswer`.

    huggingface_hub itself checks few of them (2.4, `file_download.py`, `blob_path`)."""
    commit = response.headers.get("X-Repo-Commit")
    if commit is not None and not is_commit(commit):
        raise InvalidAnswer(f"it names a commit {printable(commit)!r}")
    for header in ("X-Linked-Etag", "ETag", "X-Xet-Hash"):
        # Stripped as in huggingface_hub. Those of answers about the repository never become a path.
        etag = response.headers.get(header, "").lstrip("W/").strip('"')
        if not is_metadata and ("/" in etag or etag in {".", ".."}):
            raise InvalidAnswer(f"it calls the content of a file {printable(etag)!r}")
    if is_metadata and response.status_code == 200 and response.request.method == "GET":
        # huggingface_hub requests listings by itself. A listing is a JSON list.
        try:
            answer = response.json() if response.read().lstrip().startswith(b"[") else []
        except (ValueError, RecursionError):
            return  # the caller reports it
        for entry in answer:
            if isinstance(entry, dict) and entry.get("type") == "file":
                check_name(entry.get("path"))
                check_etag(entry.get("oid"))
                if isinstance(lfs := entry.get("lfs"), dict):
                    check_etag(lfs.get("oid"))


@contextmanager
def _watch_stalls(client: HubClient) -> Iterator[None]:
    """End stalled transfers from a thread of our own, and connections whose headers are late.

    Xet transfers use their own library, not our HTTP client. They are aborted as huggingface_hub does on Ctrl-C."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(min(1.0, client.timeouts.stall, client.timeouts.answer)):
            client.close_if_late()
            if client.stalled or client.is_cancelled():
                try:
                    from huggingface_hub.utils._xet import abort_xet_session
                except ImportError:
                    continue  # Xet is not installed
                abort_xet_session()  # type: ignore[no-untyped-call]

    watcher = threading.Thread(target=watch, name="download-watch", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def import_quietly() -> None:
    before = {key: os.environ.get(key) for key in _QUIET_SETTINGS}
    os.environ.update(_QUIET_SETTINGS)
    try:
        import huggingface_hub.constants
        import huggingface_hub.utils.logging  # noqa: F401
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value


# --- progress -----------------------------------------------------------------------------------------------------


class DownloadProgress:
    """The progress of one download in bytes, read from the progress bars of huggingface_hub.

    The library has a bar for bytes written to disk, one for bytes received and one for files. Several threads update
    them (2.4, `_snapshot_download.py`).
    """

    def __init__(self, emit: Emit, total: int, client: HubClient) -> None:
        self._emit, self._total, self._client = emit, total, client
        self._lock = threading.Lock()
        self._shown = -1
        self._next = 0.0
        self._samples: deque[tuple[float, int]] = deque()

    def bars(self, base: int) -> type[_Bar]:
        """Return the class of bars for one try, at whose start `base` bytes are already on disk."""
        bytes_ = self
        self._report(base)

        class Bar(_Bar):
            def on_change(self) -> None:
                bytes_._client.note_activity()
                if self.counts_written:
                    bytes_._report(base + self.n)

        return Bar

    def finish(self) -> None:
        self._emit(Progress("download", self._total, self._total))

    def _report(self, done: int) -> None:
        """Emit the progress if it has grown: a retry starts over. Only `finish` reports the end."""
        with self._lock:
            now = time.monotonic()
            if self._shown < done < self._total and now >= self._next:
                self._shown, self._next = done, now + REPORT_INTERVAL_SECONDS
                self._emit(Progress("download", done, self._total, self._rate(now, done)))

    def _rate(self, now: float, done: int) -> int:
        """Return bytes per second over the rate window; 0 in the first second, which is too short to measure."""
        self._samples.append((now, done))
        while len(self._samples) > 2 and now - self._samples[0][0] > RATE_WINDOW_SECONDS:
            self._samples.popleft()
        since, before = self._samples[0]
        return int((done - before) / (now - since)) if now - since >= 1.0 else 0


class _Bar:
    """The part of tqdm that huggingface_hub uses."""

    def __init__(self, *_: object, total: float | None = None, desc: str = "", unit: str = "", **__: object) -> None:
        self.n = 0
        self.total = total
        self.format_dict: dict[str, float] = {}
        self.counts_bytes = unit == "B"
        self.counts_written = self.counts_bytes and not desc.startswith("Downloading")

    def on_change(self) -> None:
        """Called when the number of bytes changes."""

    def update(self, n: float | None = 1) -> None:
        self.n += int(n or 0)
        if self.counts_bytes and n:
            self.on_change()

    def refresh(self, *_: object, **__: object) -> None: ...
    def close(self) -> None: ...
    def set_description(self, *_: object, **__: object) -> None: ...
    def set_description_str(self, *_: object, **__: object) -> None: ...
    def set_postfix_str(self, *_: object, **__: object) -> None: ...

    def __enter__(self) -> _Bar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


# --- errors -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HubError:
    """The meaning of an exception: our error code, the reason, and whether a retry may help."""

    code: str
    why: str
    again: bool = False
    after: float | None = None
    """Seconds to wait, as requested by the hub."""


_MESSAGES = {
    "repo_not_found": "{repo}: the hub has no such repository",
    "revision_not_found": "{repo}: the repository has no such revision",
    "gated_repo": "{repo} is gated: only accounts that have access may download it",
    "unauthorized": "{repo}: the hub refuses access",
    "rate_limited": "{repo}: the hub's rate limit is reached",
    "hub_unreachable": "{repo}: {host} cannot be reached",
    "hub_error": "{repo}: {host} does not answer as a hub should",
    "download_stalled": "{repo}: the download has stalled",
    "cache_not_writable": "{repo} cannot be written to the cache",
    "incomplete_download": "{repo}: the download is not complete",
    "wrong_content": "{repo}: files in the cache differ from the hub's",
}
_LOGIN_HINT = "on the host that downloads, as the user that runs mlxops: hf auth login"
_RETRY_HINT = "try again: `mlxctl pull --repo {repo}` (complete files are kept)"
_HINTS = {
    "repo_not_found": f"check the spelling; if it is private, log in {_LOGIN_HINT}",
    "revision_not_found": "see its branches, tags and commits: https://huggingface.co/{repo_id}/commits/main",
    "gated_repo": f"accept its terms at https://huggingface.co/{{repo_id}}, then log in {_LOGIN_HINT}",
    "unauthorized": f"log in with a token that may read it, {_LOGIN_HINT}",
    "rate_limited": f"wait some minutes, or log in for a higher limit, {_LOGIN_HINT}",
    "hub_unreachable": "check the network, HF_ENDPOINT and HF_HUB_OFFLINE on the host that downloads; then "
    + _RETRY_HINT,
    "hub_error": f"see https://status.huggingface.co; later {_RETRY_HINT}",
    "download_stalled": f"check the host's network; then {_RETRY_HINT}",
    "cache_not_writable": "check the owner and permissions of the cache folder",
    "incomplete_download": _RETRY_HINT,
    "wrong_content": "download them again: `mlxctl pull --repo {repo}`",
}


def failure(code: str, repo: RepoRevision, why: str, host: str = "the hub") -> DownloadFailed:
    names = {"repo": str(repo), "repo_id": repo.repo_id, "host": host}
    return DownloadFailed(code, _MESSAGES[code].format(**names), why=why, hint=_HINTS[code].format(**names))


def with_retries(attempt: Callable[[], T], repo: RepoRevision, emit: Emit, client: HubClient) -> T:
    """Return the result of `attempt`; retry with growing pauses after temporary failures.

    Raises `DownloadFailed` or `Refused`. Exceptions that neither hub nor disk can cause pass unchanged.
    """
    pause = client.timeouts.backoff
    for tries_left in reversed(range(client.timeouts.tries)):
        try:
            return attempt()
        except MlxopsError:
            raise
        except Exception as error:
            problem = _classify(error, client)
            if problem is None:
                raise
            if problem.code == "disk_full":
                raise _disk_full(repo, problem) from None
            if not problem.again or not tries_left:
                # Not chained: the exception may hold request headers, and so the token.
                raise failure(problem.code, repo, problem.why, client.host) from None
            wait = min(max(pause, problem.after or 0.0), client.timeouts.longest_wait)
            pause *= 2
            emit(Note.of(f"{repo}: {problem.why}; trying again in {wait:.0f} s", "warning"))
        time.sleep(wait)
        client.note_activity()  # our own pause is not a stall
    raise AssertionError("the last try returns or raises")


def _disk_full(repo: RepoRevision, problem: HubError) -> Refused:
    hint = "free disk space: `mlxctl list` shows the sizes; then delete models that you do not need"
    return Refused("disk_full", f"{repo}: the disk is full", why=problem.why, hint=hint)


def _classify(error: BaseException, client: HubClient) -> HubError | None:
    """Return the meaning of an exception of huggingface_hub; None if it does not come from a download.

    huggingface_hub wraps the real exception in a `LocalEntryNotFoundError`, so its causes are examined too.
    """
    meanings = (_classify_one(cause) for cause in _causes(error))
    problem = next((meaning for meaning in meanings if meaning is not None), None)
    if client.stalled and (problem is None or problem.again):
        return HubError("download_stalled", f"{client.host} has sent nothing for {client.timeouts.stall:.0f} s")
    return problem


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or cause.__context__


def _classify_one(error: BaseException) -> HubError | None:
    import httpx2
    from huggingface_hub import errors

    match error:
        case RetryAfter(status=429):
            return HubError("rate_limited", "it answers 429 Too Many Requests", again=True, after=error.after)
        case RetryAfter():
            return HubError("hub_error", f"it answers {error.status}", again=True, after=error.after)
        case InvalidAnswer():
            return HubError("hub_error", str(error))
        case _AnswerTooSlow():
            return HubError("hub_error", "its answer took too long", again=True)
        case errors.HfHubHTTPError():
            return _classify_status(error)
        case errors.OfflineModeIsEnabled():
            return HubError("hub_unreachable", "HF_HUB_OFFLINE is set there")
        case httpx2.InvalidURL() | httpx2.TooManyRedirects() | httpx2.UnsupportedProtocol():
            return HubError("hub_error", _describe(error))
        case httpx2.TransportError():
            return HubError("hub_unreachable", _describe(error), again=True)
        case errors.FileMetadataError():
            return HubError("hub_error", _describe(error))
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            return HubError("disk_full", _describe(error))
        case OSError() if "Consistency check failed" in str(error):
            return HubError("hub_error", "a file arrived with another length than announced", again=True)
        case OSError() if error.errno is not None and not isinstance(error, BrokenPipeError):
            return HubError("cache_not_writable", _describe(error))
    if type(error).__module__.partition(".")[0] == "hf_xet":
        return HubError("hub_error", _describe(error), again=True)
    return None


def _classify_status(error: httpx2.HTTPError) -> HubError:
    """Return the meaning of a final HTTP error.

    A hub sends 401 for gated, private and unknown repositories. Its own headers distinguish them (huggingface_hub,
    `hf_raise_for_status`)."""
    from huggingface_hub import errors

    assert isinstance(error, errors.HfHubHTTPError)
    status = error.response.status_code
    detail = error.server_message or error.response.headers.get("X-Error-Message") or ""
    why = f"it answers {status}" + (f": {_without_token(detail)}" if detail else "")
    if isinstance(error, errors.GatedRepoError):
        return HubError("gated_repo", why)
    if isinstance(error, errors.RevisionNotFoundError):
        return HubError("revision_not_found", why)
    if isinstance(error, errors.RepositoryNotFoundError):
        return HubError("repo_not_found", why)
    if status in (401, 403):
        return HubError("unauthorized", why)
    if status == 404 and not isinstance(error, errors.EntryNotFoundError):
        return HubError("repo_not_found", why)
    return HubError("hub_error", why)


def _describe(error: BaseException) -> str:
    text = str(error).strip().partition("\n")[0]
    return _without_token(f"{type(error).__name__}: {text}" if text else type(error).__name__)


def _without_token(text: str) -> str:
    """Return text of the hub as one short line, without the token, which a hub may echo."""
    from huggingface_hub import get_token

    token = get_token()
    if token:
        text = text.replace(token, "***")
    return printable(re.sub(r"\bhf_[A-Za-z0-9]{8,}", "hf_***", text))
