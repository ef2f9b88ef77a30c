"""One writer at a time for a file."""

from __future__ import annotations

import os
import sys
from typing import IO

FAR = 0x7FFFFFF0
"""Windows locks bytes and keeps others from reading them, so it is one where no records are: just below 2 GiB."""


def lock(file: IO[bytes]) -> bool:
    """Claims an open file; False where another process has it.

    The system holds the claim until the file is closed or the process is gone, however it went, so none is left behind.
    Raises OSError where the file system knows no locks.
    """
    if sys.platform == "win32":
        import msvcrt

        os.lseek(file.fileno(), FAR, os.SEEK_SET)
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except PermissionError:
            return False
    else:
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True
