"""The last words in a server's log, and known causes.

The logs are shortened ones from issue threads (mlx, mlx-lm, mlx-openai-server), or from runs of both engines.
"""

from __future__ import annotations

import pytest

from mlxops.agent.serving.diagnosis import About, explain
from mlxops.agent.serving.last_words import last_line

ABOUT = About("jerry-xl", "org/model", 8100, "/opt/engine/bin/mlx_lm.server", "a" * 40)
PYTHON = "/opt/homebrew/Cellar/python@3.12/3.12.12_1/Frameworks/Python.framework/Versions/3.12/lib/python3.12"
TRACKER = (
    f"{PYTHON}/multiprocessing/resource_tracker.py:279: UserWarning: resource_tracker: There appear to be 1 leaked "
    "semaphore objects to clean up at shutdown\n  warnings.warn('resource_tracker: There appear to be %d '\n"
)
TRACKER_313 = (
    "/Users/os/.local/share/uv/python/cpython-3.13.12-macos-aarch64-none/lib/python3.13/multiprocessing/"
    "resource_tracker.py:400: UserWarning: resource_tracker: There appear to be 1 leaked semaphore objects to clean up "
    "at shutdown: {'/mp-fjl0z2pk'}\n  warnings.warn(\n"
)
FRAMES = 'Traceback (most recent call last):\n  File "/opt/mlx_lm/utils.py", line 345, in load_model\n    raise x\n'
ABI = "libc++abi: terminating due to uncaught exception of type std::runtime_error: [METAL] Command buffer execution "

LOGS: dict[str, tuple[str, str, str | None]] = {
    "a warning of the resource tracker after a ValueError": (
        f"{FRAMES}ValueError: Expected shape (4096, 512) but received shape (4096, 1024) for parameter "
        f"model.layers.0.self_attn.k_proj.weight\n{TRACKER}",
        "ValueError: Expected shape (4096, 512) but received shape (4096, 1024) for parameter "
        "model.layers.0.self_attn.k_proj.weight",
        "files_do_not_fit",
    ),
    "an exception that Python ignored while it ended": (
        f"{FRAMES}RuntimeError: it broke\nException ignored in: <function ResourceTracker.__del__ at 0x1>\n"
        f'{FRAMES.splitlines()[0]}\n  File "{PYTHON}/multiprocessing/resource_tracker.py", line 77, in __del__\n'
        "ChildProcessError: [Errno 10] No child processes\n",
        "RuntimeError: it broke",
        None,
    ),
    "the same of Python 3.13": (f"{FRAMES}RuntimeError: it broke\n{TRACKER_313}", "RuntimeError: it broke", None),
    "mlx-openai-server #169: abort, the shell's word, the tracker": (
        "2026-01-28 11:44:35 | INFO     | app.utils.debug_logging:callback:143 | Processed   2048/3704 tokens\n\n"
        f"{ABI}failed: Discarded (victim of GPU error/recovery) "
        "(00000005:kIOGPUCommandBufferCallbackErrorInnocentVictim)\n"
        "./start_minimax.sh: line 1: 19516 Abort trap: 6           mlx-openai-server launch --model-path x\n" + TRACKER,
        f"{ABI}failed: Discarded (victim of GPU error/recovery) "
        "(00000005:kIOGPUCommandBufferCallbackErrorInnocentVictim)",
        "gpu_victim",
    ),
    "omlx #1387: interactivity": (
        f"{ABI}failed: Impacting Interactivity (0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity)\n",
        f"{ABI}failed: Impacting Interactivity (0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity)",
        "gpu_busy_with_display",
    ),
    "a GPU timeout": (
        f"{ABI}failed: Caused GPU Timeout Error (00000002:kIOGPUCommandBufferCallbackErrorTimeout)\n",
        f"{ABI}failed: Caused GPU Timeout Error (00000002:kIOGPUCommandBufferCallbackErrorTimeout)",
        "gpu_timeout",
    ),
    "mlx #479: out of memory": (
        f"{ABI}failed: Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)\nzsh: abort      x\n",
        f"{ABI}failed: Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)",
        "out_of_memory",
    ),
    "mlx-vlm #270: invalid resource": (
        f"{ABI}failed: Invalid Resource (00000009:kIOGPUCommandBufferCallbackErrorInvalidResource)\n",
        f"{ABI}failed: Invalid Resource (00000009:kIOGPUCommandBufferCallbackErrorInvalidResource)",
        "gpu_error",
    ),
    "too many buffers": (
        f"{FRAMES}RuntimeError: [metal::malloc] Resource limit (499000) exceeded.\n",
        "RuntimeError: [metal::malloc] Resource limit (499000) exceeded.",
        "out_of_memory",
    ),
    "mlx-openai-server #132: an architecture, a traceback, and the end of the start-up": (
        "2026-01-02 22:24:04 | INFO     | app.server:lifespan:149 | Initializing MLX handler\n"
        "ERROR:root:Model type iquestcoder not supported.\n"
        "2026-01-02 22:24:05 | ERROR    | app.server:lifespan:220 | Failed to initialize MLX handler: Error loading "
        f"model: Model type iquestcoder not supported.\n\nERROR:    {FRAMES}"
        "ValueError: Error loading model: Model type iquestcoder not supported.\n\n"
        "ERROR:    Application startup failed. Exiting.\n",
        "ValueError: Error loading model: Model type iquestcoder not supported.",
        "unknown_architecture",
    ),
    "mlx-lm: parameters in many lines": (
        f"{FRAMES}ValueError: Missing 2 parameters: \nmodel.layers.1.input_layernorm.weight,\nmodel.norm.weight.\n",
        "ValueError: Missing 2 parameters: model.layers.1.input_layernorm.weight, model.norm.weight.",
        "files_do_not_fit",
    ),
    "mlx-examples #652: an older mlx does not count them": (
        f"Fetching 18 files: 100%|####| 18/18 [00:00<00:00, 134576.60it/s]\n{FRAMES}"
        "ValueError: Received parameters not in model: model.layers.9.self_attn.q_norm.weight.\n",
        "ValueError: Received parameters not in model: model.layers.9.self_attn.q_norm.weight.",
        "files_do_not_fit",
    ),
    "killed by macOS, reported by zsh": (
        f"Fetching 15 files: 100%|####| 15/15\nzsh: killed     mlx_lm.server --model x\n{TRACKER}",
        "zsh: killed     mlx_lm.server --model x",
        "killed_by_system",
    ),
    "killed in a start script": (
        "INFO:     Started server process [91783]\n/opt/mlx-launch/bin/start.sh: line 7: 19516 Killed: 9    uv run x\n",
        "/opt/mlx-launch/bin/start.sh: line 7: 19516 Killed: 9    uv run x",
        "killed_by_system",
    ),
    "a warning of deprecation after the error": (
        f"{FRAMES}OSError: [Errno 28] No space left on device\n"
        "/opt/x/jinja2/runtime.py:12: DeprecationWarning: it goes away\n  from old import thing\n",
        "OSError: [Errno 28] No space left on device",
        "disk_full",
    ),
    "probes of ours after the error": (
        f"{FRAMES}KeyError: 'model_type'\nINFO:     127.0.0.1:53412 - \"GET /health HTTP/1.1\" 503\n"
        '127.0.0.1 - - [26/Nov/2026 13:00:00] "GET /v1/models HTTP/1.1" 200 -\n',
        "KeyError: 'model_type'",
        "config_unusable",
    ),
    "the lines that uvicorn ends with": (
        f"{FRAMES}PermissionError: [Errno 13] Permission denied: '/Volumes/x/model.safetensors'\n"
        "INFO:     Shutting down\nINFO:     Waiting for application shutdown.\nINFO:     Finished server process [1]\n",
        "PermissionError: [Errno 13] Permission denied: '/Volumes/x/model.safetensors'",
        "not_permitted",
    ),
    "an error of long ago, after which it served": (
        f'{FRAMES}ValueError: a bad request\nINFO:     10.0.0.2:1 - "POST /v1/chat/completions HTTP/1.1" 200 OK\n'
        "INFO:     Shutting down\n",
        "INFO:     Shutting down",
        None,
    ),
    "an unknown tokenizer": (
        f"{FRAMES}Exception: data did not match any variant of untagged enum ModelWrapper at line 757443 column 3\n",
        "Exception: data did not match any variant of untagged enum ModelWrapper at line 757443 column 3",
        "tokenizer_unusable",
    ),
    "a repository that needs its code": (
        f"{FRAMES}ValueError: The repository /x contains custom code which must be executed to correctly load it.\n",
        "ValueError: The repository /x contains custom code which must be executed to correctly load it.",
        "code_needed",
    ),
    "a library for another processor": (
        "ImportError: dlopen(/x/mlx/core.so, 0x0002): tried: '/x/mlx/core.so' (mach-o file, but is an incompatible "
        "architecture (have 'arm64', need 'x86_64'))\n",
        "ImportError: dlopen(/x/mlx/core.so, 0x0002): tried: '/x/mlx/core.so' (mach-o file, but is an incompatible "
        "architecture (have 'arm64', need 'x86_64'))",
        "broken_installation",
    ),
    "a quantization of another world": (
        f"{FRAMES}ValueError: Unsupported modelopt quant_algo: FP8\n",
        "ValueError: Unsupported modelopt quant_algo: FP8",
        "unknown_quantization",
    ),
    "a hub that is not asked": (
        f"{FRAMES}huggingface_hub.errors.LocalEntryNotFoundError: Cannot find the requested files in the cache and "
        "outgoing traffic has been disabled.\n",
        "huggingface_hub.errors.LocalEntryNotFoundError: Cannot find the requested files in the cache and "
        "outgoing traffic has been disabled.",
        "hub_needed",
    ),
    "only lines of information": ("INFO: one\nINFO: two\n", "INFO: two", None),
    "only progress": ("Fetching 15 files:  40%|##  | 6/15\n", "", None),
    "a message that is none of a Python": ("cannot find it\n", "cannot find it", None),
    "nothing": ("\n \n", "", None),
    "a child that Python misses after the error": (
        f"{FRAMES}ValueError: Model type glm5 not supported.\n"
        "Exception ignored in: <function ResourceTracker.__del__ at 0x1043>\nTraceback (most recent call last):\n"
        f'  File "{PYTHON}/multiprocessing/resource_tracker.py", line 77, in __del__\n'
        "ChildProcessError: [Errno 10] No child processes\n",
        "ValueError: Model type glm5 not supported.",
        "unknown_architecture",
    ),
    "the error within an exception group": (
        "  + Exception Group Traceback (most recent call last):\n"
        "  | ExceptionGroup: unhandled errors in a TaskGroup (1 sub-exception)\n"
        "  +-+---------------- 1 ----------------\n    | Traceback (most recent call last):\n"
        "    | ValueError: Model type glm5 not supported.\n    +------------------------------------\n",
        "ValueError: Model type glm5 not supported.",
        "unknown_architecture",
    ),
    "an abort that says no more than its type": (
        "[METAL] Command buffer execution failed: Caused GPU Timeout Error "
        "(00000002:kIOGPUCommandBufferCallbackErrorTimeout).\n"
        "libc++abi: terminating due to uncaught exception of type std::runtime_error\nAbort trap: 6\n",
        "[METAL] Command buffer execution failed: Caused GPU Timeout Error "
        "(00000002:kIOGPUCommandBufferCallbackErrorTimeout).",
        "gpu_timeout",
    ),
    "a config.json whose bits were edited": (
        f"{FRAMES}ValueError: [quantized_matmul] The shapes of the weight and scales are incompatible based on bits "
        "and group_size. w.shape() == (2048,512)\n",
        "ValueError: [quantized_matmul] The shapes of the weight and scales are incompatible based on bits and "
        "group_size. w.shape() == (2048,512)",
        "files_do_not_fit",
    ),
}


@pytest.mark.parametrize("log", LOGS)
def test_last_line_is_the_error_of_the_log(log: str) -> None:
    text, words, code = LOGS[log]
    assert last_line(text) == words
    cause = explain(words, text, 1, ABOUT)
    assert (cause.code if cause else None) == code


def test_every_pattern_fills_its_placeholders() -> None:
    for text, words, code in LOGS.values():
        if code:
            cause = explain(words, text, 1, ABOUT)
            assert cause is not None and "{" not in cause.reason + cause.help and "PORT" not in cause.help
