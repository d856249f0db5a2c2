"""Run a command in a slot that all builds of a machine share: ``slot.py PATH COUNT LOG COMMAND ...``.

A slot is a locked file, ``PATH0`` to ``PATH(COUNT-1)``. The lock passes on to the command, and goes when that
ends, however it ends. Without a free slot after five minutes, or on a file system without locks, the command
runs all the same. Its output goes to ``LOG``, which is made when it starts. A script of its own that imports
nothing of this package, so that it starts fast.
"""

import fcntl
import os
import sys
import time

_SECONDS = 300.0
_PAUSE_S = 0.02


def main(path: str, count: int, log: str, command: list[str]) -> None:
    """Become the command, as soon as there is a slot."""
    _take(path, count)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.exit(f"fatal error: {command[0]} cannot be run: {error}")


def _take(path: str, count: int) -> None:
    try:
        files = [os.open(f"{path}{i}", os.O_RDWR | os.O_CREAT, 0o600) for i in range(count)]
        deadline = time.monotonic() + _SECONDS
        while time.monotonic() < deadline:
            for file in files:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                os.set_inheritable(file, True)
                return
            time.sleep(_PAUSE_S)
    except OSError:
        return


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4:])
