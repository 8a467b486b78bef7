"""Why a server did not start, as far as its last words tell: one table for all engines, and what helps.

The words are those of the programs underneath, which all engines share: MLX and Metal, mlx-lm 0.28-0.32
(`utils._get_classes`: "Model type X not supported."; `utils.load_model`: "No safetensors found in X";
`Module.load_weights`: "Missing N parameters"), Jinja 3 (`parser.py`: unknown tags, unexpected ends), transformers 4 and
5 (`tokenization_utils_base`: "tokenizer.chat_template is not set"), huggingface_hub 2 (`errors.GatedRepoError`), click
(choices of mlx-openai-server's parsers), asyncio and uvicorn (a taken port), Python itself.
"""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass


@dataclass(frozen=True)
class Cause:
    """A known reason. `code` is for programs; `help` names what to do, a command where one helps."""

    code: str
    reason: str
    help: str


@dataclass(frozen=True)
class About:
    """What the causes' texts speak of."""

    model: str
    repo_id: str
    port: int
    program: str
    """The engine's program, as it was started."""


@dataclass(frozen=True)
class _Known:
    code: str
    words: re.Pattern[str]
    reason: str
    """`{0}` is what the first group found."""
    help: str


def _known(code: str, words: str, reason: str, help: str) -> _Known:
    return _Known(code, re.compile(words, re.IGNORECASE), reason, help)


TABLE = (
    _known(
        "out_of_memory",
        r"kIOGPUCommandBufferCallbackErrorOutOfMemory|insufficient memory|out of memory|std::bad_alloc|\bMemoryError\b"
        r"|unable to allocate|attempting to allocate \d+ bytes",
        "the host's memory is not enough for it",
        "make room: mlxctl status shows what is served; unload one of them, or choose a smaller model",
    ),
    _known(
        "unknown_parser",
        r"Invalid value for '--(?:tool-call|reasoning)-parser': '?([^'\s]+)"
        r"|(?:unknown|invalid|unsupported) (?:tool.call |reasoning |tool )?parser:? '?([\w.-]+)",
        "this version of the engine has no parser {0!r}",
        "correct tool_call_parser or reasoning_parser in the registry entry {model!r}; the log lists those that it has",
    ),
    _known(
        "unknown_architecture",
        r"Model type (\S+) not supported|No module named 'mlx_lm\.models\.(\w+)'"
        r"|model type `?(\w+)`? but Transformers does not recognize",
        "the engine does not know the architecture {0!r}; it may be newer than the engine",
        "upgrade the engine behind {program}, then load it again; or give the entry another engine",
    ),
    _known(
        "gated_repository",
        r"GatedRepoError|Cannot access gated repo|Access to model .+ is restricted",
        "{repo_id} is gated: its owner has to admit this account first",
        "ask for access at https://huggingface.co/{repo_id}, log in on the host (hf auth login), then load it again",
    ),
    _known(
        "no_chat_template",
        r"chat_template is not set|does not have a chat template|jinja2?\.exceptions\.\w+"
        r"|Unexpected end of template|Encountered unknown tag '|expected token '[^']*', got '"
        r"|chat.template.{0,40}(?:not found|does not exist|no such file)",
        "its chat template is missing or cannot be used",
        "set chat_template in the registry entry {model!r} to a template file, or load an instruct model",
    ),
    _known(
        "port_taken",
        r"address already in use|Errno 48\b|Errno 98\b|answered by \S.{0,60} this load did not start",
        "something else listens on port {port}",
        "see who: mlxctl status; stop it, then load it again",
    ),
    _known(
        "missing_dependency",
        r"No module named '([\w.]+)'|ImportError: (?:cannot import name )?'?([\w.]+)"
        r"|requires the ([\w-]+) (?:library|package)",
        "the engine's installation lacks {0!r}, or has another version of it",
        "install it in the environment of {program}, or install the engine anew",
    ),
    _known(
        "files_do_not_fit",
        r"Missing \d+ parameters|Received \d+ parameters not in model|invalid safetensors|SafetensorError"
        r"|incomplete metadata|header too large",
        "its weight files do not belong to its configuration, or are damaged",
        "delete the folder of {repo_id} in the host's cache and load it again; or choose another conversion",
    ),
    _known(
        "files_missing",
        r"No safetensors found in|does not appear to have a file named (\S+)",
        "files of it that were there before the engine started are gone",
        "find out what deletes from the host's cache, then load {repo_id} again: what is missing is downloaded",
    ),
    _known(
        "option_refused",
        r"error: unrecognized arguments: (.+)|No such option: (\S+)",
        "this version of the engine does not know the option {0}",
        "take it out of args in the registry entry {model!r}, or upgrade the engine behind {program}",
    ),
    _known(
        "program_failed",
        r"mlxops: cannot run '?([^'\n]+)",
        "the engine's program {0} cannot be run",
        "install the engine, or correct launch in hosts.yaml",
    ),
)


def explain(words: str, log: str, status: int | None, about: About) -> Cause | None:
    """The cause that the last words tell of, else the rest of the log; None if none is known.

    `status` is how the process ended, negative for a signal; None if it did not.
    """
    for known, text in ((known, text) for text in (words, log) for known in TABLE):
        if found := known.words.search(text):
            what = next((group for group in found.groups() if group), "")
            return Cause(known.code, _filled(known.reason, what, about), _filled(known.help, what, about))
    if status == -signal.SIGKILL:
        reason = "the system killed it, most often because memory ran out"
        return Cause("killed_by_system", reason, TABLE[0].help)
    return None


def _filled(text: str, what: str, about: About) -> str:
    # Only our own texts are formats; what was found is a value in them.
    return text.format(what[:80], **vars(about))
