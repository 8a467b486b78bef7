"""The line to a Hugging Face hub: huggingface_hub made quiet, watched byte by byte, and asked again where that helps.

huggingface_hub 2.4 reports a postponed request (429, 5xx) as a file that is missing from the cache, sleeps on a 429
for as long as the hub likes, notices a stall after about 65 seconds, draws on stderr, reads whatever a hub sends
without an end, and makes paths of what it says. Here its HTTP client gets hooks that leave postponed requests to us,
bound every answer, and refuse names that are none; and its progress bars are ours. It is imported only when a download
begins: the import takes half a second.
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
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast
from urllib.parse import urlsplit
from weakref import WeakSet

from mlxops.agent.hub.cache import is_commit
from mlxops.agent.hub.contents import printable
from mlxops.core.errors import DownloadFailed, MlxopsError, Refused
from mlxops.core.protocol import Event, Note, Progress
from mlxops.core.text import amount

if TYPE_CHECKING:
    import httpx2
    from huggingface_hub import HfApi

Emit = Callable[[Event], None]
T = TypeVar("T")

TRY_AGAIN = frozenset({408, 429, 500, 502, 503, 504})
"""HTTP statuses with which a hub does not refuse, only postpones."""
REPORT_EVERY = 0.2
"""Seconds between two reports of progress."""
RATE_OVER = 10.0
"""Seconds over which the rate is an average."""
MAX_ANSWER = 64 * 1024 * 1024
"""Bytes of an answer that is no file's content; a listing of 10,000 files has some three million."""
MAX_NAME = 255
"""Bytes of one part of a path, in every file system that holds a cache."""
_NO_TEXT = frozenset({"Cc", "Cs", "Zl", "Zp"})
"""Unicode's categories of control characters, lone surrogates, and what breaks a line. Not all that is unprintable to
Python: names of screenshots, which people do upload, have spaces of other kinds."""
_UNPACKED = frozenset({"gzip", "deflate", "br", "zstd"})
"""What httpx2 unpacks, without a bound."""
_QUIET = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_VERBOSITY": "critical"}
"""huggingface_hub reads its settings once, when it is imported."""


@dataclass(frozen=True)
class DownloadTimeouts:
    """How long a hub is waited for; in seconds, but for `tries`."""

    stall: float = 120.0
    """Without a single byte."""
    answer: float = 30.0
    """For the whole of an answer to a question about the repository."""
    tries: int = 4
    backoff: float = 2.0
    """Before the second try; doubled before each further one."""
    longest_wait: float = 60.0
    """However much later the hub says that we should come back."""


@dataclass(frozen=True)
class Asked:
    """What somebody wants: a repository, and a branch, tag or commit of it, if they said which."""

    repo_id: str
    revision: str | None

    @property
    def branch(self) -> str:
        """The revision that is meant; unsaid, it is the hub's default, main."""
        return self.revision or "main"

    def __str__(self) -> str:
        return self.repo_id if self.revision is None else f"{self.repo_id}@{self.revision}"


class _Stream(Protocol):
    """As much of a connection of httpcore2's as is used here."""

    def get_extra_info(self, info: str) -> Any: ...


@dataclass
class HubClient:
    """Whether anything still comes from the hub, and where it is."""

    patience: DownloadTimeouts
    endpoint: str | None
    given_up: Callable[[], bool] = lambda: False
    """Nobody wants the download any more. Its threads ask before each piece: they cannot be interrupted."""
    largest: int | None = None
    """Bytes of the largest file that the hub announced; None before it did."""
    _last: float = field(default_factory=time.monotonic)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _streams: WeakSet[_Stream] = field(default_factory=WeakSet)
    _due: dict[object, float] = field(default_factory=dict)
    """Until when the head of each answer that is waited for has to be there."""

    def api(self) -> HfApi:
        from huggingface_hub import HfApi

        return HfApi(endpoint=self.endpoint, library_name="mlxops")

    def heard(self) -> None:
        self._last = time.monotonic()

    @property
    def stalled(self) -> bool:
        return time.monotonic() - self._last > self.patience.stall

    def traced(self, event: str, info: Mapping[str, object], key: object, patience: float) -> None:
        """What httpcore2 tells of one request (its extension `trace`). Its timeouts are for a single read: a head that
        trickles would never be late."""
        if event.endswith(("connect_tcp.complete", "start_tls.complete")):
            with self._lock:
                self._streams.add(cast("_Stream", info["return_value"]))
        elif event.endswith("receive_response_headers.started"):
            self._due[key] = time.monotonic() + patience
        elif "receive_response_headers." in event:
            self._due.pop(key, None)

    def hang_up_if_late(self) -> None:
        """End every connection if the head of any answer is late: whoever reads from them then fails."""
        now = time.monotonic()
        if any(due < now for due in self._due.copy().values()):
            with self._lock:
                streams = list(self._streams)
            for stream in streams:
                with contextlib.suppress(OSError):  # it is closed already
                    stream.get_extra_info("socket").shutdown(socket.SHUT_RDWR)

    @property
    def host(self) -> str:
        return urlsplit(self.endpoint or "https://huggingface.co").hostname or "the hub"


class RetryAfter(Exception):
    """The hub postpones: an HTTP status of `TRY_AGAIN`, and after how many seconds, where it says so."""

    def __init__(self, status: int, after: float | None) -> None:
        super().__init__(f"HTTP {status}")
        self.status, self.after = status, after


class _Stalled(Exception):
    """Nothing has come for too long."""


class _Late(Exception):
    """An answer keeps coming, and does not end."""


class _GivenUp(Exception):
    """Nobody wants it any more."""


class NoHub(Exception):
    """What came is nothing that a hub sends; the text says what it was. Asked again, it would be the same."""


def plain_name(name: object) -> str:
    """The name of a file of a repository, which becomes a path of this host. Raises `NoHub` unless it is a relative
    POSIX path that leads nowhere but downwards."""
    if isinstance(name, str) and "\\" not in name and not any(unicodedata.category(char) in _NO_TEXT for char in name):
        parts = name.split("/")
        if all(part not in {"", ".", ".."} and len(part.encode()) <= MAX_NAME for part in parts):
            return name
    raise NoHub(f"it names a file {printable(str(name))!r}, which no file of a repository can be called")


def plain_etag(etag: object) -> str:
    """The name of a file's content, under which the cache keeps it. Raises `NoHub` for what could lead elsewhere."""
    if isinstance(etag, str) and re.fullmatch(r"[A-Za-z0-9]{1,128}", etag):
        return etag
    raise NoHub(f"it calls the content of a file {printable(str(etag))!r}")


@contextmanager
def as_of_a_hub(asked: Asked, line: HubClient) -> Iterator[None]:
    """What huggingface_hub raises for an answer of another form than it expects is of a dozen kinds.

    Raises `DownloadFailed` (hub_error) in their place."""
    try:
        yield
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        if isinstance(error, OSError):  # huggingface_hub's exception for a 400 is both
            raise
        why = f"its answer is not that of a Hugging Face hub: {_said(error)}"
        raise failure("hub_error", asked, why, line.host) from None


@contextmanager
def open_line(patience: DownloadTimeouts, given_up: Callable[[], bool] = lambda: False) -> Iterator[HubClient]:
    """huggingface_hub with a client that tells us of every byte, leaves postponed requests to us, and begins no
    request once nothing comes any more. Its own client is back in place afterwards."""
    import_quietly()
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    line = HubClient(patience, os.environ.get("HF_ENDPOINT") or None, given_up)
    set_client_factory(lambda: _hooked(default_client_factory(), line))
    try:
        with _watched(line):
            yield line
    finally:
        set_client_factory(default_client_factory)


def _hooked(client: httpx2.Client, line: HubClient) -> httpx2.Client:
    import httpx2

    api = str(httpx2.URL(f"{(line.endpoint or 'https://huggingface.co').rstrip('/')}/api/"))

    class Heard(httpx2.SyncByteStream):
        def __init__(self, stream: httpx2.SyncByteStream, most: int, until: float | None) -> None:
            self._stream, self._most, self._until = stream, most, until

        def __iter__(self) -> Iterator[bytes]:
            got = 0
            for chunk in self._stream:
                if line.given_up():
                    raise _GivenUp
                line.heard()
                got += len(chunk)
                if got > self._most:
                    raise NoHub(f"it sends more than {amount(self._most)} where there cannot be more")
                if self._until is not None and time.monotonic() > self._until:
                    raise _Late
                yield chunk

        def close(self) -> None:
            self._stream.close()

    def before(request: httpx2.Request) -> None:
        if line.given_up():
            raise _GivenUp
        if line.stalled:
            raise _Stalled
        # A redirected request inherits what the first one was: where it leads to tells nothing.
        question = request.extensions.setdefault(
            "mlxops.question", line.largest is None or str(request.url).startswith(api)
        )
        request.extensions.setdefault("mlxops.asked", time.monotonic())
        patience = line.patience.answer if question else line.patience.stall
        timeouts = request.extensions.get("timeout", {})
        timeouts["read"] = min(timeouts.get("read") or patience, patience)
        key = object()
        request.extensions["trace"] = lambda event, info: line.traced(event, info, key, patience)
        request.headers["Accept-Encoding"] = "identity"

    def after(response: httpx2.Response) -> None:
        if response.status_code in TRY_AGAIN:
            seconds = response.headers.get("Retry-After", "")
            raise RetryAfter(response.status_code, float(seconds) if re.fullmatch("[0-9]{1,9}", seconds) else None)
        extensions = response.request.extensions
        question = extensions["mlxops.question"]
        if isinstance(response.stream, httpx2.SyncByteStream):
            until = extensions["mlxops.asked"] + line.patience.answer if question else None
            content = not question and response.status_code in {200, 206}
            response.stream = Heard(response.stream, (line.largest or 0) if content else MAX_ANSWER, until)
        # Nobody asked for it, and a few bytes of it may unpack to more than a disk holds. As it is, it is no answer.
        if _UNPACKED & {word.strip() for word in response.headers.get("Content-Encoding", "").lower().split(",")}:
            del response.headers["Content-Encoding"]
        _check_names(response, question=question)

    client.event_hooks = {
        "request": [*client.event_hooks.get("request", []), before],
        "response": [*client.event_hooks.get("response", []), after],
    }
    return client


def _check_names(response: httpx2.Response, *, question: bool) -> None:
    """huggingface_hub makes paths of the names that it is told, and of few of them it looks at where they lead (2.4,
    `file_download.py`, `blob_path`). Raises `NoHub`."""
    commit = response.headers.get("X-Repo-Commit")
    if commit is not None and not is_commit(commit):
        raise NoHub(f"it names a commit {printable(commit)!r}")
    for header in ("X-Linked-Etag", "ETag", "X-Xet-Hash"):
        # As huggingface_hub strips them. Those of answers become no path, and may be anything.
        etag = response.headers.get(header, "").lstrip("W/").strip('"')
        if not question and ("/" in etag or etag in {".", ".."}):
            raise NoHub(f"it calls the content of a file {printable(etag)!r}")
    if question and response.status_code == 200 and response.request.method == "GET":
        # A listing, which huggingface_hub asks for by itself, is a list.
        try:
            answer = response.json() if response.read().lstrip().startswith(b"[") else []
        except (ValueError, RecursionError):
            return  # whoever asked will say so
        for entry in answer:
            if isinstance(entry, dict) and entry.get("type") == "file":
                plain_name(entry.get("path"))
                plain_etag(entry.get("oid"))
                if isinstance(lfs := entry.get("lfs"), dict):
                    plain_etag(lfs.get("oid"))


@contextmanager
def _watched(line: HubClient) -> Iterator[None]:
    """Xet transfers happen in a library of their own, past our client: one that stands still is ended from outside,
    the way huggingface_hub ends it on Ctrl-C. And so is an answer of which the head does not end."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(min(1.0, line.patience.stall, line.patience.answer)):
            line.hang_up_if_late()
            if line.stalled or line.given_up():
                try:
                    from huggingface_hub.utils._xet import abort_xet_session
                except ImportError:
                    continue  # no Xet, no need
                abort_xet_session()  # type: ignore[no-untyped-call]

    watcher = threading.Thread(target=watch, name="download-watch", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def import_quietly() -> None:
    before = {key: os.environ.get(key) for key in _QUIET}
    os.environ.update(_QUIET)
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


class Bytes:
    """The progress of one download in bytes, taken from the bars that huggingface_hub believes to draw.

    It makes a bar of the bytes that reach the disk, one of those that come over the network, and one that counts
    files, and moves them from several threads (2.4, `_snapshot_download.py`).
    """

    def __init__(self, emit: Emit, total: int, line: HubClient) -> None:
        self._emit, self._total, self._line = emit, total, line
        self._lock = threading.Lock()
        self._shown = -1
        self._next = 0.0
        self._lately: deque[tuple[float, int]] = deque()

    def bars(self, base: int) -> type[_Bar]:
        """The class of bars for one try that begins with `base` bytes already there."""
        bytes_ = self
        self._report(base)

        class Bar(_Bar):
            def moved(self) -> None:
                bytes_._line.heard()
                if self.counts_written:
                    bytes_._report(base + self.n)

        return Bar

    def finish(self) -> None:
        self._emit(Progress("download", self._total, self._total))

    def _report(self, done: int) -> None:
        """Never backwards, though a repeated try begins anew, and the total only once it is proven."""
        with self._lock:
            now = time.monotonic()
            if self._shown < done < self._total and now >= self._next:
                self._shown, self._next = done, now + REPORT_EVERY
                self._emit(Progress("download", done, self._total, self._rate(now, done)))

    def _rate(self, now: float, done: int) -> int:
        """Bytes a second over the last `RATE_OVER` seconds; 0 in the first one, when it would be a guess."""
        self._lately.append((now, done))
        while len(self._lately) > 2 and now - self._lately[0][0] > RATE_OVER:
            self._lately.popleft()
        since, before = self._lately[0]
        return int((done - before) / (now - since)) if now - since >= 1.0 else 0


class _Bar:
    """As much of tqdm as huggingface_hub calls."""

    def __init__(self, *_: object, total: float | None = None, desc: str = "", unit: str = "", **__: object) -> None:
        self.n = 0
        self.total = total
        self.format_dict: dict[str, float] = {}
        self.counts_bytes = unit == "B"
        self.counts_written = self.counts_bytes and not desc.startswith("Downloading")

    def moved(self) -> None:
        """Bytes came, or were rolled back."""

    def update(self, n: float | None = 1) -> None:
        self.n += int(n or 0)
        if self.counts_bytes and n:
            self.moved()

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


# --- when the hub says no -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HubError:
    """What an exception means: the error's code, why it came, and whether asking again may help."""

    code: str
    why: str
    again: bool = False
    after: float | None = None
    """Seconds that the hub asked us to wait."""


_WHAT = {
    "repo_not_found": "{asked}: the hub has no such repository",
    "revision_not_found": "{asked}: the repository has no such revision",
    "gated_repo": "{asked} is gated: its authors want to know who downloads it",
    "unauthorized": "{asked}: the hub refuses us",
    "rate_limited": "{asked}: the hub limits how much we may ask",
    "hub_unreachable": "{asked}: {host} cannot be reached",
    "hub_error": "{asked}: {host} does not work as a hub should",
    "download_stalled": "{asked}: the download stands still",
    "cache_not_writable": "{asked} cannot be written to the cache",
    "incomplete_download": "{asked}: the download is not complete",
    "wrong_content": "{asked}: files in the cache are not those of the hub",
}
_LOGIN = "on the host that downloads, as the user that runs mlxops: hf auth login"
_AGAIN = "try again: mlxctl pull --repo {asked} (what has arrived is kept)"
_HINT = {
    "repo_not_found": f"check the spelling; if it is private, log in {_LOGIN}",
    "revision_not_found": "see its branches, tags and commits: https://huggingface.co/{repo_id}/commits/main",
    "gated_repo": f"accept its terms at https://huggingface.co/{{repo_id}}, then log in {_LOGIN}",
    "unauthorized": f"log in with a token that may read it, {_LOGIN}",
    "rate_limited": f"wait some minutes, or log in for a higher limit, {_LOGIN}",
    "hub_unreachable": "check the network, HF_ENDPOINT and HF_HUB_OFFLINE on the host that downloads, then " + _AGAIN,
    "hub_error": f"see https://status.huggingface.co; later, {_AGAIN}",
    "download_stalled": f"check the host's network, then {_AGAIN}",
    "cache_not_writable": "check the owner and permissions of the cache folder",
    "incomplete_download": _AGAIN,
    "wrong_content": "download them anew: mlxctl pull --repo {asked}",
}


def failure(code: str, asked: Asked, why: str, host: str = "the hub") -> DownloadFailed:
    names = {"asked": str(asked), "repo_id": asked.repo_id, "host": host}
    return DownloadFailed(code, _WHAT[code].format(**names), why=why, hint=_HINT[code].format(**names))


def persistently(attempt: Callable[[], T], asked: Asked, emit: Emit, line: HubClient) -> T:
    """The attempt's result; repeated, with growing pauses, while the hub only postpones.

    Raises `DownloadFailed` or `Refused`; what no hub and no disk can have caused passes as it is.
    """
    pause = line.patience.backoff
    for left in reversed(range(line.patience.tries)):
        try:
            return attempt()
        except MlxopsError:
            raise
        except Exception as error:
            no = _meaning(error, line)
            if no is None:
                raise
            if no.code == "disk_full":
                raise _disk_full(asked, no) from None
            if not no.again or not left:
                # The exception is not chained: it may hold headers, and with them the token.
                raise failure(no.code, asked, no.why, line.host) from None
            wait = min(max(pause, no.after or 0.0), line.patience.longest_wait)
            pause *= 2
            emit(Note(f"{asked}: {no.why}; trying again in {wait:.0f} s", "warning"))
        time.sleep(wait)
        line.heard()  # it was we who paused
    raise AssertionError("the last try returns or raises")


def _disk_full(asked: Asked, no: HubError) -> Refused:
    hint = "make room: mlxctl list shows the sizes; then remove what you do not need"
    return Refused("disk_full", f"{asked}: the disk is full", why=no.why, hint=hint)


def _meaning(error: BaseException, line: HubClient) -> HubError | None:
    """What an exception of huggingface_hub's means; None if it is none of a download.

    It wraps what happened in a `LocalEntryNotFoundError`: the cause counts.
    """
    meanings = (_meaning_of_one(cause) for cause in _causes(error))
    no = next((no for no in meanings if no is not None), None)
    if line.stalled and (no is None or no.again):
        return HubError("download_stalled", f"nothing has come from {line.host} for {line.patience.stall:.0f} s")
    return no


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or cause.__context__


def _meaning_of_one(error: BaseException) -> HubError | None:
    import httpx2
    from huggingface_hub import errors

    match error:
        case RetryAfter(status=429):
            return HubError("rate_limited", "it answers 429 Too Many Requests", again=True, after=error.after)
        case RetryAfter():
            return HubError("hub_error", f"it answers {error.status}", again=True, after=error.after)
        case NoHub():
            return HubError("hub_error", str(error))
        case _Late():
            return HubError("hub_error", "its answer does not come to an end", again=True)
        case errors.HfHubHTTPError():
            return _meaning_of_answer(error)
        case errors.OfflineModeIsEnabled():
            return HubError("hub_unreachable", "HF_HUB_OFFLINE is set there")
        case httpx2.InvalidURL() | httpx2.TooManyRedirects() | httpx2.UnsupportedProtocol():
            return HubError("hub_error", _said(error))
        case httpx2.TransportError():
            return HubError("hub_unreachable", _said(error), again=True)
        case errors.FileMetadataError():
            return HubError("hub_error", _said(error))
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            return HubError("disk_full", _said(error))
        case OSError() if "Consistency check failed" in str(error):
            return HubError("hub_error", "a file arrived with another length than announced", again=True)
        case OSError() if error.errno is not None and not isinstance(error, BrokenPipeError):
            return HubError("cache_not_writable", _said(error))
    if type(error).__module__.partition(".")[0] == "hf_xet":
        return HubError("hub_error", _said(error), again=True)
    return None


def _meaning_of_answer(error: httpx2.HTTPError) -> HubError:
    """An answer that is final. A hub says 401 of gated, private and unknown repositories alike, and tells them apart
    by headers of its own (huggingface_hub, `hf_raise_for_status`)."""
    from huggingface_hub import errors

    assert isinstance(error, errors.HfHubHTTPError)
    status = error.response.status_code
    said = error.server_message or error.response.headers.get("X-Error-Message") or ""
    why = f"it answers {status}" + (f": {_without_token(said)}" if said else "")
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


def _said(error: BaseException) -> str:
    text = str(error).strip().partition("\n")[0]
    return _without_token(f"{type(error).__name__}: {text}" if text else type(error).__name__)


def _without_token(text: str) -> str:
    """Text of the hub's, for people: one bounded line, and should it echo the token, without it."""
    from huggingface_hub import get_token

    token = get_token()
    if token:
        text = text.replace(token, "***")
    return printable(re.sub(r"\bhf_[A-Za-z0-9]{8,}", "hf_***", text))
