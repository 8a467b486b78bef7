"""The line of a log that says why a server ended: not always the last one.

After the error come warnings of the resource tracker, progress bars, the shell's word on the signal, and answers to
our own probes (seen in ml-explore/mlx, mlx-lm and mlx-openai-server issue threads, and with both engines here).
"""

from __future__ import annotations

import re
from collections.abc import Iterator

LONGEST = 300
_FAR = 40
"""Lines of an error's message, and of what is told after it."""

_WARNING = re.compile(r"^(?:\S.*?:\d+: )?\w*Warning: |\bwarnings\.warn\(")
_PROBE = re.compile(r'"?GET /(?:health|v1/models|v1/queue/stats)\b')
_BAR = re.compile(r"\d+%\|")
_SHELL = re.compile(r"^(?:zsh: abort|\[\d+\]|\S+: line \d+: +\d+ (?!Killed)|Abort trap|Terminated)")
"""The shell's word on a signal: what the program itself said came before."""
_CHATTER = re.compile(r"^(?:\S+ \S+ +[|-] +)?(?:INFO|DEBUG|WARNING)\b|Application startup failed")
"""What is told after an error, and is none."""
_EXIT = re.compile(r"^Exception ignored (?:in|on|while)\b")
"""What Python says while it ends, with a traceback: the error came before."""
_RECORD = re.compile(r"^(?:\d{4}-\d\d-\d\d[ T]|INFO\b|DEBUG\b|ERROR\b|CRITICAL\b|Traceback |--- mlxops )")
"""Where a message of a log begins."""
_SERVED = re.compile(r'"POST \S+ HTTP/1\.[01]" ')
_ERROR = re.compile(
    r"^(?:\w+\.)*[A-Za-z_]\w*(?:Error|Exception|Interrupt|Refused|NotFound)(?::|$)"
    r"|\blibc\+\+abi: |^Fatal Python error: |^dyld\[|^dyld: |^zsh: killed|^Killed(?:: 9)?$|: line \d+: +\d+ Killed"
    r"|\[METAL\]|\[metal::|^(?:\S+ \S+ +[|-] +)?(?:ERROR|CRITICAL)\b|^\S+: error: |^Error: "
)


def last_line(text: str) -> str:
    """What a log says of its end, in one line: the last error if nothing was served after it, else the last line that
    says anything; empty if none does."""
    lines = list(_telling(text))
    end = len(lines)
    while end and len(lines) - end < _FAR and _CHATTER.search(lines[end - 1]) and not _SERVED.search(lines[end - 1]):
        end -= 1
    for index in range(end - 1, max(0, end - _FAR) - 1, -1):
        if _ERROR.search(lines[index]) and not _SERVED.search(lines[index]):
            return " ".join(line.strip() for line in lines[index:end])[:LONGEST]
        if _RECORD.match(lines[index]) or _SERVED.search(lines[index]):
            break
    return lines[-1].strip()[:LONGEST] if lines else ""


def _telling(text: str) -> Iterator[str]:
    """The lines without warnings, probes, progress and what Python ignored; a warning has the line of source that it
    came from, and what was ignored its traceback."""
    after_warning = ignored = False
    for line in text.splitlines():
        if ignored or _EXIT.match(line):
            ignored = not _ERROR.match(line)
            continue
        warning = _WARNING.search(line) is not None
        source = after_warning and line[:1] in (" ", "\t")
        after_warning = warning
        if (
            line.strip()
            and not warning
            and not source
            and not any(noise.search(line) for noise in (_PROBE, _BAR, _SHELL))
        ):
            yield line
