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
    revision: str = ""
    """The commit that was served."""


@dataclass(frozen=True)
class _Known:
    code: str
    words: re.Pattern[str]
    reason: str
    """`{0}` is what the first group found."""
    help: str


def _known(code: str, words: str, reason: str, help: str) -> _Known:
    return _Known(code, re.compile(words, re.IGNORECASE | re.MULTILINE), reason, help)


_COMPARE = "compare its files with the hub's: mlxctl pull --repo {repo_id}@{revision} --verify"

_SMALLER_STEPS = "mlxctl set --model {model} --set 'args=--prefill-step-size 512'; then load it again"

TABLE = (
    _known(
        "out_of_memory",
        r"kIOGPUCommandBufferCallbackErrorOutOfMemory|insufficient memory|out of memory|std::bad_alloc|\bMemoryError\b"
        r"|unable to allocate|attempting to allocate \d+ bytes|Resource limit \(\d+\) exceeded|Cannot allocate memory",
        "the host's memory is not enough for it",
        "make room: mlxctl status shows what is served; unload one of them, or choose a smaller model",
    ),
    _known(
        "gpu_busy_with_display",
        r"kIOGPUCommandBufferCallbackErrorImpactingInteractivity|Impacting Interactivity",
        "macOS stopped its work on the GPU, because it delayed the display",
        "log out of the desktop, or give it less at once (mlx-lm): " + _SMALLER_STEPS,
    ),
    _known(
        "gpu_timeout",
        r"kIOGPUCommandBufferCallbackError(?:Timeout|Hang)|Caused GPU (?:Timeout|Hang) Error",
        "one GPU command took too long, and macOS ended it",
        "stop other work on the GPU, or give it less at once (mlx-lm): " + _SMALLER_STEPS,
    ),
    _known(
        "gpu_victim",
        r"kIOGPUCommandBufferCallbackErrorInnocentVictim|victim of GPU error",
        "the GPU was reset because of an error of another process",
        "load it again; see what else failed: mlxctl status",
    ),
    _known(
        "no_gpu",
        r"No Metal device|Failed to (?:load|create) (?:the )?(?:default )?(?:metallib|metal library|device)"
        r"|metal(?:lib| library).{0,40}(?:not found|cannot be loaded)",
        "MLX found no GPU, or did not find its Metal library",
        "reinstall mlx in the environment of {program}; in a virtual machine it does not work",
    ),
    _known(
        "gpu_error",
        r"\[METAL\] Command buffer execution failed: ([^(\n]+)|kIOGPUCommandBufferCallbackError(\w+)",
        "the GPU's driver gave up: {0}",
        "load it again; if that repeats, upgrade the engine behind {program}, and macOS",
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
        r"Model type (\S+) not supported|No module named 'mlx_(?:lm|vlm)\.models\.(\w+)'"
        r"|model type `?(\w+)`? but Transformers does not recognize|Unsupported model type:? '?([\w.-]+)",
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
        "code_needed",
        r"contains custom code which must be executed|requires importing and running a custom module"
        r"|requires you to execute the .{1,40} file in that repo|pass trust_remote_code=True",
        "it needs code of its repository, which runs only where that is trusted",
        "read that code; then: mlxctl set --model {model} --set trust_remote_code=true --set revision={revision}",
    ),
    _known(
        "port_taken",
        r"address already in use|Errno 48\b|Errno 98\b|answered by \S.{0,60} this load did not start",
        "something else listens on port {port}",
        "see who: mlxctl status; stop it, then load it again",
    ),
    _known(
        "disk_full",
        r"No space left on device|Errno 28\b|Disk quota exceeded",
        "a disk of the host is full",
        "make room on the host, for example with mlxctl remove (sizes: mlxctl list), then load it again",
    ),
    _known(
        "not_permitted",
        r"PermissionError: .{0,40}?'([^'\n]+)'|Permission denied: '?([^'\n]+)|Operation not permitted: '?([^'\n]+)",
        "the engine may not use {0}",
        "give the user of the agent the right to it; on macOS, files of other disks may need Full Disk Access",
    ),
    _known(
        "too_many_open_files",
        r"Too many open files|Errno 24\b",
        "the engine may not open as many files as it wants to",
        "raise the limit of open files (ulimit -n, launchctl limit maxfiles) on the host, then load it again",
    ),
    _known(
        "tokenizer_unusable",
        r"Couldn't instantiate the backend tokenizer|did not match any variant of untagged enum"
        r"|Tokenizer class (\S+) does not exist|Can't load tokenizer|Failed to parse tokenizer\.json",
        "its tokenizer cannot be loaded: a file of it is missing or damaged, or newer than the engine",
        _COMPARE + "; if they are the hub's, upgrade the engine behind {program}",
    ),
    _known(
        "config_unusable",
        r"JSONDecodeError|Unexpected UTF-8 BOM|UnicodeDecodeError|KeyError: 'model_type'|Unrecognized model in"
        r"|ModelArgs\.__init__\(\) missing \d+ required",
        "a configuration file of it does not say what the engine needs to know",
        "undo what was edited there, or " + _COMPARE,
    ),
    _known(
        "unknown_quantization",
        r"unsupported compressed-tensors format|Unsupported modelopt|is supported for AutoAWQ/GPTQ|non-contiguous group"
        r"|KeyError: '(?:group_size|bits|quant_method|quant_algo)'|Invalid quantization mode|Unknown quantization"
        r"|requested (?:number of bits|group size) .{0,60}not supported|Cannot infer the quantization mode",
        "it is quantized in a way that this version of the engine does not know",
        "upgrade the engine behind {program}, or choose a conversion for MLX, for example of mlx-community",
    ),
    _known(
        "broken_installation",
        r"incompatible architecture|Bad CPU type|mach-o file, but|Library not loaded: (\S+)|Symbol not found: (\S+)",
        "the engine's installation is not made for this host, or damaged",
        "reinstall the engine behind {program}, with a Python for this processor",
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
        r"Missing (?:\d+ )?parameters|Received (?:\d+ )?parameters not in model|Expected shape .{1,80}received shape"
        r"|shapes of the weight and scales are incompatible|invalid safetensors|SafetensorError|incomplete metadata"
        r"|header too large|\[load_safetensors\]",
        "its weight files do not belong to its configuration, or are damaged",
        "undo what was edited in its config.json, or " + _COMPARE + "; or choose another conversion",
    ),
    _known(
        "files_missing",
        r"No safetensors found in|does not appear to have a file named (\S+)",
        "the engine finds no weights or no configuration where it looks for them",
        _COMPARE + "; engines for language models load model*.safetensors alone",
    ),
    _known(
        "hub_needed",
        r"LocalEntryNotFoundError|OfflineModeIsEnabled|outgoing traffic has been disabled|in offline mode"
        r"|CERTIFICATE_VERIFY_FAILED|We couldn't connect to 'https?://",
        "the engine wants something of the hub that is not in the cache; servers are started without the hub",
        "download it first: mlxctl pull --repo {repo_id}; and likewise any other repository that its args name",
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
    _known(
        "killed_by_system",
        r"^zsh: killed|^Killed(?:: 9)?$|: line \d+: +\d+ Killed",
        "the system killed it, most often because memory ran out",
        "make room: mlxctl status shows what is served; unload one of them, or choose a smaller model",
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
