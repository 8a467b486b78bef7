"""Find the line of a log that says why a server ended.

It is not always the last one. Warnings of the resource tracker, progress bars, the shell's message about the signal
and log lines of our own probes may follow the error (seen in issue threads of ml-explore/mlx, mlx-lm and
mlx-openai-server, and with both engines here).
"""

from __future__ import annotations

import re
from collections.abc import Iterator

MAX_LENGTH = 300
_MAX_LINES = 40
"""Limit for the lines of an error message, and for the lines after it."""

_WARNING = re.compile(r"^(?:\S.*?:\d+: )?\w*Warning: |\bwarnings\.warn\(")
_PROBE = re.compile(r'"?GET /(?:health|v1/models|v1/queue/stats)\b')
_BAR = re.compile(r"\d+%\|")
_SHELL = re.compile(r"^(?:zsh: abort|\[\d+\]|\S+: line \d+: +\d+ (?!Killed)|Abort trap|Terminated)")
"""A shell's message about a signal: the program's own last words come before it."""
_CHATTER = re.compile(
    r"^(?:\S+ \S+ +[|-] +)?(?:INFO|DEBUG|WARNING)\b|Application startup failed"
    r"|^libc\+\+abi: terminating .{1,60} of type [\w:]+$"
)
"""Lines that may follow an error and are not errors."""
_RECORD = re.compile(r"^(?:\d{4}-\d\d-\d\d[ T]|INFO\b|DEBUG\b|ERROR\b|CRITICAL\b|Traceback |--- mlxops )")
"""The first line of a log message."""
_IGNORED = re.compile(r"^Exception ignored (?:in|on|while)\b")
"""Python prints this while it exits. The traceback after it is not the cause."""
_GROUP = re.compile(r"^ *(?:[+|][ +-]*-[+-]*(?: \d+ -+)?$|[+|] )")
"""The frame that Python draws around the tracebacks of an exception group."""
_SERVED = re.compile(r'"POST \S+ HTTP/1\.[01]" ')
_ERROR = re.compile(
    r"^(?:\w+\.)*[A-Za-z_]\w*(?:Error|Exception|Interrupt|Refused|NotFound)(?::|$)"
    r"|\blibc\+\+abi: |^Fatal Python error: |^dyld\[|^dyld: |^zsh: killed|^Killed(?:: 9)?$|: line \d+: +\d+ Killed"
    r"|\[METAL\]|\[metal::|^(?:\S+ \S+ +[|-] +)?(?:ERROR|CRITICAL)\b|^\S+: error: |^Error: "
)


def last_line(text: str) -> str:
    """Return a log's last error if no request was served after it, else its last significant line; "" if none."""
    lines = list(_significant_lines(text))
    end = len(lines)
    while (
        end and len(lines) - end < _MAX_LINES and _CHATTER.search(lines[end - 1]) and not _SERVED.search(lines[end - 1])
    ):
        end -= 1
    for index in range(end - 1, max(0, end - _MAX_LINES) - 1, -1):
        if _ERROR.search(lines[index]) and not _SERVED.search(lines[index]):
            return " ".join(line.strip() for line in lines[index:end])[:MAX_LENGTH]
        if _RECORD.match(lines[index]) or _SERVED.search(lines[index]):
            break
    return lines[-1].strip()[:MAX_LENGTH] if lines else ""


def _significant_lines(text: str) -> Iterator[str]:
    """Yield the lines that are not warnings, probes or progress. Source code after a warning belongs to it."""
    after_warning = ignored = False
    for line in (_GROUP.sub("", each) for each in text.splitlines()):
        warning = _WARNING.search(line) is not None
        source = after_warning and line[:1] in (" ", "\t")
        after_warning = warning
        if ignored or _IGNORED.match(line):
            ignored = not _ERROR.search(line)
            continue
        if (
            line.strip()
            and not warning
            and not source
            and not any(noise.search(line) for noise in (_PROBE, _BAR, _SHELL))
        ):
            yield line
