"""Files that are about to be written: whether that will work, found out before the work that fills them."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def require_writable(path: Path, *, directory: bool = False) -> None:
    """Raise unless a file, or files in a directory, can be written there. Nothing is left behind.

    Args:
        path: need not exist, nor need the directories above it.
        directory: ``path`` is to be a directory.

    Raises:
        OSError: names the path and what stands in the way.
    """
    if not directory and path.exists():
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a directory; name a file in it")
        if not os.access(path, os.W_OK):
            raise PermissionError(f"{path} may not be written to; allow it, or choose another file")
    place = path if directory else path.parent
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise NotADirectoryError(f"{path} cannot be made, since {place} is not a directory")
    try:
        with tempfile.NamedTemporaryFile(dir=place, prefix=".lmkan-gen-"):
            pass
    except OSError as error:
        raise OSError(
            error.errno, f"{path} cannot be written: {error.strerror} in {place}; choose another place"
        ) from None
