"""Where studies live: a journal of this machine's own, or storage that several processes share."""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from filelock import FileLock, Timeout
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock, JournalRedisBackend
from sqlalchemy.exc import DBAPIError

#: seconds after which the lock of a journal counts as left by a killed process; writing takes milliseconds
_LOCK_S = 10


_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*")
_SCHEME_WITHOUT_COLON = re.compile(r"[A-Za-z][A-Za-z0-9+-]*//")
_FORMS = (
    "it must be a journal file's path, redis://..., or a database URL whose driver is installed, such as "
    "postgresql+psycopg://user@host/database with `pip install psycopg[binary]`"
)


class StorageFailed(OSError):
    """Studies cannot be kept where they should be; the message says where and why."""


@contextmanager
def private(directory: Path, name: str, resume: bool) -> Iterator[BaseStorage]:
    """The journal of one search on this machine, for one process at a time.

    Args:
        directory: where journals lie.
        name: of the search.
        resume: keep what an earlier, killed run of the same search left.

    Raises:
        StorageFailed: another process is at the same search.
    """
    directory.mkdir(parents=True, exist_ok=True)
    journal = directory / f"{name}.journal"
    lock = FileLock(directory / f"{name}.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise StorageFailed(
            f"another process is tuning this very problem ({journal} is in use); wait for it, or let both "
            "share the work: start each with the same --storage"
        ) from None
    except (OSError, NotImplementedError):
        pass  # a file system without locks
    try:
        if not resume:
            journal.unlink(missing_ok=True)
        yield _journal(journal)
    finally:
        lock.release()


def shared(url: str) -> BaseStorage:
    """Storage that several processes, on one machine or many, work from at once.

    Args:
        url: a path or ``journal://PATH``: a journal file, which may lie on a network file system;
            ``redis://...``: a journal in Redis; anything else with a scheme is a database as SQLAlchemy
            names it, such as ``postgresql+psycopg://user@host/database`` or ``sqlite:///studies.db``.

    Raises:
        StorageFailed: it cannot be opened; a database's driver may be missing.
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        _require_plain_path(url)
        scheme, rest = "journal", url
    elif not _SCHEME.fullmatch(scheme):
        raise StorageFailed(f"cannot open the storage: what stands before :// is no scheme; {_FORMS}")
    try:
        if scheme == "journal":
            path = Path(rest).expanduser().absolute()
            path.parent.mkdir(parents=True, exist_ok=True)
            return _journal(path)
        if scheme in ("redis", "rediss"):
            return JournalStorage(JournalRedisBackend(url))
        return _database(url)
    except Exception as error:  # each driver has its own
        first, *_ = str(error).splitlines() or [""]
        words = f"{type(error).__name__}: {first if scheme == 'journal' else without_secrets(first, url)}"
        # not chained: tracebacks print what the driver said, which may be the URL
        raise StorageFailed(f"cannot open the storage ({scheme}): {words}; {_FORMS}") from None


def _require_plain_path(text: str) -> None:
    """Refuse what is more likely a URL with a mistake, whose password would become part of a file's name."""
    if ":" in text or "@" in text or _SCHEME_WITHOUT_COLON.match(text):
        raise StorageFailed(
            "cannot open the storage: it has no :// and yet looks like a URL (not shown here, since it may "
            f"hold a password); {_FORMS}. A file with such a name is journal://PATH"
        )


def without_secrets(text: str, url: str) -> str:
    """``text`` without any part of a storage URL that may be a password, well-formed or not."""
    _, _, rest = url.partition("://")
    credentials, at, behind = rest.rpartition("@")
    _, _, query = behind.partition("?")
    secret = f"{credentials}&{query}" if at else rest
    parts = {part for piece in (secret, unquote(secret)) for part in re.split(r"[:/@?&=#\s]", piece)}
    for part in sorted({secret, unquote(secret), url, *parts}, key=len, reverse=True):
        if part:
            text = text.replace(part, "***")
    return text


def _database(url: str) -> BaseStorage:
    for patience in (1.0, 2.0, 0.0):
        try:
            # a connection that was idle while kernels were measured may have been closed by the server
            return RDBStorage(url, engine_kwargs={"pool_pre_ping": True})
        except DBAPIError:  # perhaps another process is just making the tables
            if not patience:
                raise
            time.sleep(patience * random.random())
    raise AssertionError("unreachable")


def _journal(path: Path) -> BaseStorage:
    # nobody else's to read; a journal that others share is made by hand, with the permissions that it needs
    path.touch(mode=0o600)
    return JournalStorage(_Journal(str(path), _RepairingLock(str(path), grace_period=_LOCK_S)))


class _Journal(JournalFileBackend):
    """A journal file whose errors name it."""

    def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
        line = log_number_from
        try:
            for log in super().read_logs(log_number_from):
                line += 1
                yield log
        except OSError as error:
            raise StorageFailed(f"the journal {self._file_path} cannot be read: {error}") from error
        except ValueError as error:
            raise StorageFailed(
                f"the journal {self._file_path} is damaged after line {line}: {error}; cut it there, or "
                "begin another one"
            ) from error

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        try:
            super().append_logs(logs)
        except OSError as error:
            raise StorageFailed(f"the journal {self._file_path} cannot be written: {error}") from error


class _RepairingLock(JournalFileSymlinkLock):
    """Before anything is appended, it drops a line that was cut short, by a kill or a full disk.

    What follows would be glued to it, and the journal be unreadable from there.
    """

    def acquire(self) -> bool:
        taken = super().acquire()
        try:
            _drop_torn_line(Path(self._lock_target_file))
        except BaseException:
            self.release()
            raise
        return taken


def _drop_torn_line(path: Path) -> None:
    with path.open("r+b") as stream:
        if stream.seek(0, os.SEEK_END) == 0:
            return
        stream.seek(-1, os.SEEK_END)
        if stream.read(1) != b"\n":
            stream.seek(0)
            stream.truncate(stream.read().rfind(b"\n") + 1)
