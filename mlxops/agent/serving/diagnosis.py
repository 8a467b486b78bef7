"""Known reasons why a server did not start: one table for all engines, from log patterns to a cause and a remedy.

The patterns match messages of the libraries that all engines share: MLX and Metal, mlx-lm 0.28-0.32
(`utils._get_classes`: "Model type X not supported."; `utils.load_model`: "No safetensors found in X";
`Module.load_weights`: "Missing N parameters"), Jinja 3 (`parser.py`: unknown tags, unexpected ends), transformers 4 and
5 (`tokenization_utils_base`: "tokenizer.chat_template is not set"), huggingface_hub 2 (`errors.GatedRepoError`), click
(choices of mlx-openai-server's parsers), asyncio and uvicorn (a taken port), Python itself.
"""

from __future__ import annotations

import re
import signal

from mlxops.core.frozen import dataclass


@dataclass(frozen=True)
class Cause:
    """A known reason. `code` is for programs; `help` says what to do, with a command where one helps."""

    code: str
    reason: str
    help: str


@dataclass(frozen=True)
class About:
    """The values for the placeholders in the causes' texts."""

    model: str
    repo_id: str
    port: int
    program: str
    """The engine's program as it was started."""
    revision: str = ""
    """The commit that was served."""


@dataclass(frozen=True)
class Pattern:
    code: str
    regex: re.Pattern[str]
    reason: str
    """`{0}` stands for the first group that matched."""
    remedy: str


def _pattern(code: str, regex: str, reason: str, remedy: str) -> Pattern:
    return Pattern(code, re.compile(regex, re.IGNORECASE | re.MULTILINE), reason, remedy)


_COMPARE = "compare its files with the hub's: `mlxctl pull --repo {repo_id}@{revision} --verify`"

_SMALLER_STEPS = "`mlxctl set --model {model} --set 'args=--prefill-step-size 512'`; then load it again"

PATTERNS = (
    _pattern(
        "out_of_memory",
        r"kIOGPUCommandBufferCallbackErrorOutOfMemory|insufficient memory|out of memory|std::bad_alloc|\bMemoryError\b"
        r"|unable to allocate|attempting to allocate \d+ bytes|Resource limit \(\d+\) exceeded|Cannot allocate memory",
        "the host's memory is not enough for it",
        "make room: `mlxctl status` lists the servers; unload one of them, or choose a smaller model",
    ),
    _pattern(
        "gpu_busy_with_display",
        r"kIOGPUCommandBufferCallbackErrorImpactingInteractivity|Impacting Interactivity",
        "macOS stopped its work on the GPU, because it delayed the display",
        "log out of the desktop, or use smaller prefill steps (mlx-lm): " + _SMALLER_STEPS,
    ),
    _pattern(
        "gpu_timeout",
        r"kIOGPUCommandBufferCallbackError(?:Timeout|Hang)|Caused GPU (?:Timeout|Hang) Error",
        "one GPU command took too long, and macOS ended it",
        "stop other work on the GPU, or use smaller prefill steps (mlx-lm): " + _SMALLER_STEPS,
    ),
    _pattern(
        "gpu_victim",
        r"kIOGPUCommandBufferCallbackErrorInnocentVictim|victim of GPU error",
        "the GPU was reset because of an error of another process",
        "load it again; see what else failed: `mlxctl status`",
    ),
    _pattern(
        "no_gpu",
        r"No Metal device|Failed to (?:load|create) (?:the )?(?:default )?(?:metallib|metal library|device)"
        r"|metal(?:lib| library).{0,40}(?:not found|cannot be loaded)",
        "MLX found no GPU, or did not find its Metal library",
        "reinstall mlx in the environment of {program}; in a virtual machine it does not work",
    ),
    _pattern(
        "gpu_error",
        r"\[METAL\] Command buffer execution failed: ([^(\n]+)|kIOGPUCommandBufferCallbackError(\w+)",
        "the GPU's driver reported an error: {0}",
        "load it again; if it happens again, upgrade the engine behind {program}, and macOS",
    ),
    _pattern(
        "unknown_parser",
        r"Invalid value for '--(?:tool-call|reasoning)-parser': '?([^'\s]+)"
        r"|(?:unknown|invalid|unsupported) (?:tool.call |reasoning |tool )?parser:? '?([\w.-]+)",
        "this version of the engine has no parser {0!r}",
        "correct tool_call_parser or reasoning_parser in the registry entry {model!r}; the log lists the parsers",
    ),
    _pattern(
        "unknown_architecture",
        r"Model type (\S+) not supported|No module named 'mlx_(?:lm|vlm)\.models\.(\w+)'"
        r"|model type `?(\w+)`? but Transformers does not recognize|Unsupported model type:? '?([\w.-]+)",
        "the engine does not know the architecture {0!r}; it may be newer than the engine",
        "upgrade the engine behind {program}, then load it again; or give the entry another engine",
    ),
    _pattern(
        "gated_repository",
        r"GatedRepoError|Cannot access gated repo|Access to model .+ is restricted",
        "{repo_id} is gated: its owner has to admit this account first",
        "ask for access at https://huggingface.co/{repo_id}, log in on the host (hf auth login), then load it again",
    ),
    _pattern(
        "no_chat_template",
        r"chat_template is not set|does not have a chat template|jinja2?\.exceptions\.\w+"
        r"|Unexpected end of template|Encountered unknown tag '|expected token '[^']*', got '"
        r"|chat.template.{0,40}(?:not found|does not exist|no such file)",
        "its chat template is missing or cannot be used",
        "set chat_template in the registry entry {model!r} to a template file, or load an instruct model",
    ),
    _pattern(
        "code_needed",
        r"contains custom code which must be executed|requires importing and running a custom module"
        r"|requires you to execute the .{1,40} file in that repo|pass trust_remote_code=True",
        "it needs code from its repository, which runs only if the registry entry trusts it",
        "read that code; then: `mlxctl set --model {model} --set trust_remote_code=true --set revision={revision}`",
    ),
    _pattern(
        "port_taken",
        r"address already in use|Errno 48\b|Errno 98\b|answered by \S.{0,60} this load did not start",
        "something else listens on port {port}",
        "see what: `mlxctl status`; stop it, then load it again",
    ),
    _pattern(
        "disk_full",
        r"No space left on device|Errno 28\b|Disk quota exceeded",
        "a disk of the host is full",
        "make room on the host, for example with `mlxctl remove` (sizes: `mlxctl list`), then load it again",
    ),
    _pattern(
        "not_permitted",
        r"PermissionError: .{0,40}?'([^'\n]+)'|Permission denied: '?([^'\n]+)|Operation not permitted: '?([^'\n]+)",
        "the engine may not use {0}",
        "give the agent's user access to it; on macOS, files on other disks may need Full Disk Access",
    ),
    _pattern(
        "too_many_open_files",
        r"Too many open files|Errno 24\b",
        "the engine has reached the limit of open files",
        "raise the limit of open files (ulimit -n, launchctl limit maxfiles) on the host, then load it again",
    ),
    _pattern(
        "tokenizer_unusable",
        r"Couldn't instantiate the backend tokenizer|did not match any variant of untagged enum"
        r"|Tokenizer class (\S+) does not exist|Can't load tokenizer|Failed to parse tokenizer\.json",
        "its tokenizer cannot be loaded: a file is missing, damaged, or newer than the engine",
        _COMPARE + "; if they are the same, upgrade the engine behind {program}",
    ),
    _pattern(
        "config_unusable",
        r"JSONDecodeError|Unexpected UTF-8 BOM|UnicodeDecodeError|KeyError: 'model_type'|Unrecognized model in"
        r"|ModelArgs\.__init__\(\) missing \d+ required",
        "one of its configuration files is invalid or lacks a value that the engine needs",
        "undo edits in these files, or " + _COMPARE,
    ),
    _pattern(
        "unknown_quantization",
        r"unsupported compressed-tensors format|Unsupported modelopt|is supported for AutoAWQ/GPTQ|non-contiguous group"
        r"|KeyError: '(?:group_size|bits|quant_method|quant_algo)'|Invalid quantization mode|Unknown quantization"
        r"|requested (?:number of bits|group size) .{0,60}not supported|Cannot infer the quantization mode",
        "this version of the engine does not support its quantization",
        "upgrade the engine behind {program}, or choose a conversion for MLX, for example from mlx-community",
    ),
    _pattern(
        "broken_installation",
        r"incompatible architecture|Bad CPU type|mach-o file, but|Library not loaded: (\S+)|Symbol not found: (\S+)",
        "the engine's installation is for another platform, or damaged",
        "reinstall the engine behind {program}, with a Python for this processor",
    ),
    _pattern(
        "missing_dependency",
        r"No module named '([\w.]+)'|ImportError: (?:cannot import name )?'?([\w.]+)"
        r"|requires the ([\w-]+) (?:library|package)",
        "the engine's installation lacks {0!r}, or has another version of it",
        "install it in the environment of {program}, or reinstall the engine",
    ),
    _pattern(
        "files_do_not_fit",
        r"Missing (?:\d+ )?parameters|Received (?:\d+ )?parameters not in model|Expected shape .{1,80}received shape"
        r"|shapes of the weight and scales are incompatible|invalid safetensors|SafetensorError|incomplete metadata"
        r"|header too large|\[load_safetensors\]",
        "its weight files do not match its configuration, or are damaged",
        "undo edits in its config.json, or " + _COMPARE + "; or choose another conversion",
    ),
    _pattern(
        "files_missing",
        r"No safetensors found in|does not appear to have a file named (\S+)",
        "the engine found no weights or no configuration in the model's folder",
        _COMPARE + "; engines for language models load only model*.safetensors",
    ),
    _pattern(
        "hub_needed",
        r"LocalEntryNotFoundError|OfflineModeIsEnabled|outgoing traffic has been disabled|in offline mode"
        r"|CERTIFICATE_VERIFY_FAILED|We couldn't connect to 'https?://",
        "the engine needs a file from the hub that is not in the cache; servers run without access to the hub",
        "download it first: `mlxctl pull --repo {repo_id}`; also pull other repositories that its args name",
    ),
    _pattern(
        "option_refused",
        r"error: unrecognized arguments: (.+)|No such option: (\S+)",
        "this version of the engine does not know the option {0}",
        "remove it from args in the registry entry {model!r}, or upgrade the engine behind {program}",
    ),
    _pattern(
        "program_failed",
        r"mlxops: cannot run '?([^'\n]+)",
        "the engine's program {0} cannot be run",
        "install the engine, or correct launch in hosts.yaml",
    ),
    _pattern(
        "killed_by_system",
        r"^zsh: killed|^Killed(?:: 9)?$|: line \d+: +\d+ Killed",
        "the system killed it, most often because memory ran out",
        "make room: `mlxctl status` lists the servers; unload one of them, or choose a smaller model",
    ),
)


def explain(last_words: str, log: str, status: int | None, about: About) -> Cause | None:
    """Return the cause that matches the last words, else one that matches the log; None if none is known.

    `status`: how the process ended, negative for a signal; None if it is running.
    """
    for pattern, text in ((pattern, text) for text in (last_words, log) for pattern in PATTERNS):
        if match := pattern.regex.search(text):
            group = next((group for group in match.groups() if group), "")
            return Cause(pattern.code, _fill(pattern.reason, group, about), _fill(pattern.remedy, group, about))
    if status == -signal.SIGKILL:
        reason = "the system killed it, most often because memory ran out"
        return Cause("killed_by_system", reason, PATTERNS[0].remedy)
    return None


def _fill(text: str, group: str, about: About) -> str:
    # Only our own texts are format strings. Text from a log is only a value.
    return text.format(group[:80], **vars(about))
