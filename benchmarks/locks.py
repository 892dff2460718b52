"""Files that a living program holds: what tells its unfinished work from that of a dead one."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import IO

if sys.platform == "win32":

    def lock(file: IO[bytes], wait: bool) -> None:
        """Windows does not let a file be removed that is open: that is the lock."""

    def held(path: Path) -> bool | None:
        """Whether a living program writes to the file."""
        try:
            path.rename(path)
        except FileNotFoundError:
            return False
        except PermissionError:
            return True
        return False

    def sync(folder: Path) -> None:
        """Windows has no such thing."""

else:
    import fcntl

    def lock(file: IO[bytes], wait: bool) -> None:
        """Held until the file is closed, if only by the death of the program; nothing where there are no locks."""
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)

    def held(path: Path) -> bool | None:
        """Whether a living program writes to the file; None where the file system has no locks."""
        try:
            with path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        except OSError:
            return None
        return False

    def sync(folder: Path) -> None:
        """A new name is on disk when its folder is."""
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
