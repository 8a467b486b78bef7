"""Make a new server process wait until it has been recorded; then it becomes the engine.

Run as `python -I -S gate.py FD ARGV...`, where FD is a socket. A path with a NUL means that the record of this
process is on disk: exec ARGV in that folder. End of file means that the parent is gone: exit, so that nothing
unrecorded runs. Import little: every load runs this.
"""

import _signal  # type: ignore[import-not-found]  # the C part of `signal`: the rest takes 3 ms to import
import os
import sys


def main() -> None:
    gate = int(sys.argv[1])
    folder = b""
    while not folder.endswith(b"\0"):
        more = os.read(gate, 4096)
        if not more:
            raise SystemExit(0)
        folder += more
    os.close(gate)
    os.chdir(folder[:-1])
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
