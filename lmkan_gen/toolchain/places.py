"""Where the store of compiled kernels is. Compiled code is executed, so it is this user's alone."""

from __future__ import annotations

import atexit
import errno
import fcntl
import grp
import os
import pwd
import shutil
import stat
import tempfile
import warnings
from contextlib import suppress
from functools import cache
from pathlib import Path

from platformdirs import user_cache_dir

OVERRIDE = "LMKAN_GEN_CACHE"

_PLACES = ("entries", "bundles", "failed", "staging", "locks", "runs", "tuner")
_OTHERS_WRITE = 0o022
_PROBE_BYTES = 1 << 16
#: who owns files of users that a container does not know
_NOBODY = 65534
_IN_USE = "in-use"

#: roots that failed in use, and how
_abandoned: dict[str, str] = {}


def root() -> Path:
    """``$LMKAN_GEN_CACHE``, else the platform's cache directory; created if need be, for this user only.

    When it cannot be used (read-only, full, somebody else's, no home directory), a directory of this
    user's under the temporary directory, with one warning; the last process that uses it removes it.
    """
    return _root(_wanted())


def place(name: str) -> Path:
    """A directory of the store, made if need be, for this user only."""
    path = root() / name
    path.mkdir(mode=0o700, exist_ok=True)
    return path


def _wanted() -> str:
    if override := os.environ.get(OVERRIDE):
        return override
    with suppress(RuntimeError):  # there is no home directory, which shows when this is expanded
        return user_cache_dir("lmkan_gen")
    return "~/.cache/lmkan_gen"


def abandon(error: OSError) -> bool:
    """Go on in the temporary directory after the store failed in use, because its disk is full, say.

    Returns whether that is a change; the caller then tries again.
    """
    wanted = _wanted()
    if wanted in _abandoned:
        return False
    _abandoned[wanted] = error.strerror or str(error)
    _root.cache_clear()
    return True


@cache
def _root(wanted: str) -> Path:
    reason = _abandoned.get(wanted)
    if reason is None:
        try:
            path = _writable(Path(wanted).expanduser().absolute())
        except (OSError, RuntimeError) as error:  # RuntimeError: there is no home directory
            reason = getattr(error, "strerror", None) or str(error)
        else:
            for words in exposed(path):
                warnings.warn(f"kernel cache {path}: {words}", stacklevel=3)
            return path
    fallback = _temporary()
    warnings.warn(
        f"kernel cache {wanted} cannot be used ({reason}); using {fallback} instead, until this process "
        f"ends. Set {OVERRIDE} to a directory of yours that can be written to keep compiled kernels.",
        stacklevel=3,
    )
    return fallback


def exposed(path: Path) -> list[str]:
    """Which parents of ``path`` let others put another directory in its place, and how to close them."""
    found = []
    for parent in path.resolve().parents:
        status = parent.stat()
        if status.st_uid not in (0, os.getuid(), _NOBODY):
            found.append(f"{parent} belongs to another user, who may replace it; keep the cache elsewhere")
        elif _is_open(status) and not status.st_mode & stat.S_ISVTX:
            found.append(f"others may change {parent}, and so replace it; close it: chmod go-w {parent}")
    return found


def _is_open(status: os.stat_result) -> bool:
    """Whether anybody but the owner may write; a group that is the user's alone does not count."""
    if status.st_mode & stat.S_IWOTH:
        return True
    if not status.st_mode & stat.S_IWGRP:
        return False
    try:
        return grp.getgrgid(status.st_gid).gr_name != pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return True


def _writable(path: Path) -> Path:
    nearest = next(p for p in (path, *path.parents) if p.exists())
    if os.geteuid() == 0 and nearest.stat().st_uid != 0:  # what root leaves there, its owner could not change
        raise PermissionError(
            errno.EPERM, f"{nearest} belongs to another user; sudo -H gives root a cache of its own"
        )
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    for place in (path, *(path / name for name in _PLACES if (path / name).exists())):
        status = place.stat()
        if status.st_uid != os.getuid():
            raise PermissionError(errno.EPERM, "it belongs to another user, and compiled code is executed")
        if status.st_mode & _OTHERS_WRITE:
            place.chmod(stat.S_IMODE(status.st_mode) & ~_OTHERS_WRITE)
    with tempfile.TemporaryFile(dir=path) as probe:  # a full disk still takes empty files
        probe.write(bytes(_PROBE_BYTES))
    return path


def _temporary() -> Path:
    """This user's directory under the temporary one, which the last process to use it removes."""
    path = Path(tempfile.gettempdir()) / f"lmkan_gen-{os.getuid()}"
    with suppress(OSError):
        while True:
            path.mkdir(mode=0o700, exist_ok=True)
            status = path.lstat()
            # anybody may create that name in /tmp, or have put things there while it was open to all
            if not stat.S_ISDIR(status.st_mode) or status.st_mode & _OTHERS_WRITE:
                break
            if _hold(_writable(path)):
                return path
    path = Path(tempfile.mkdtemp(prefix="lmkan_gen-"))
    _hold(path)
    return path


def _hold(path: Path) -> bool:
    """Say until the end of this process that ``path`` is in use, then remove it unless others say so too.

    False: somebody removed it just now.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        descriptor = os.open(path / _IN_USE, flags, 0o600)
    except FileNotFoundError:
        return False
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    if os.fstat(descriptor).st_nlink == 0:
        os.close(descriptor)
        return False
    owner = os.getpid()

    def let_go() -> None:
        with suppress(OSError):
            if os.getpid() == owner:  # no process that was forked off
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)

    atexit.register(let_go)
    return True
