"""What a server process is before it becomes the engine: it waits until it has been recorded.

Run as `python -I -S gate.py <fd> ARGV...`. A byte on the pipe `fd` says that the record of this very process
is on disk; only then does it become ARGV. An end of file says that whoever started it is gone: it ends, and
nothing unrecorded ever ran. Standard library's fastest parts only: this is on the way of every load.
"""

import _signal  # type: ignore[import-not-found]  # of `signal` what is in C: the rest takes 3 ms to import
import os
import sys


def main() -> None:
    pipe = int(sys.argv[1])
    if os.read(pipe, 1) != b"\n":
        raise SystemExit(0)
    os.close(pipe)
    # Python ignores them for its own sake, and what is ignored stays so across exec(2).
    for number in (_signal.SIGPIPE, _signal.SIGXFSZ):
        _signal.signal(number, _signal.SIG_DFL)
    argv = sys.argv[2:]
    try:
        os.execve(argv[0], argv, os.environ)
    except OSError as error:
        sys.stderr.write(f"mlxops: cannot run {argv[0]!r}: {error.strerror}\n")
        raise SystemExit(127) from None


main()
