"""Make a new server process wait until it has been recorded; then it becomes the engine.

Run as `python -I -S gate.py <fd> ARGV...`. A newline on the pipe `fd` means that the record of this process is on
disk: exec ARGV. End of file means that the parent is gone: exit, so that nothing unrecorded runs. Import little: every
load runs this.
"""

import _signal  # type: ignore[import-not-found]  # the C part of `signal`: the rest takes 3 ms to import
import os
import sys


def main() -> None:
    pipe = int(sys.argv[1])
    if os.read(pipe, 1) != b"\n":
        raise SystemExit(0)
    os.close(pipe)
    # Python ignores these signals, and exec(2) keeps ignored signals ignored.
    for number in (_signal.SIGPIPE, _signal.SIGXFSZ):
        _signal.signal(number, _signal.SIG_DFL)
    argv = sys.argv[2:]
    try:
        os.execve(argv[0], argv, os.environ)
    except OSError as error:
        sys.stderr.write(f"mlxops: cannot run {argv[0]!r}: {error.strerror}\n")
        raise SystemExit(127) from None


main()
