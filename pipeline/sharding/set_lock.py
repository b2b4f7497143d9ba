"""One job at a time on a shard set: a lock that ends with the processes that hold it, however they end.

A file in the set's folder has two bytes to lock. The first is held by the job. The second is shared by its workers: a
worker outlives a killed job by seconds, and one on a lost node by minutes, and would go on writing, so the next job
waits for it. These are POSIX record locks, which NFS (version 4, or 3 with lockd) carries from node to node.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

from pipeline.dataset.annotation import ShardError
from pipeline.storage.locations import Location, is_url, join

LOCK_FILE = ".job.lock"
WORKERS_END_S = 60.0
_JOB, _WORKERS = 0, 1  # The bytes.
_EXCLUSIVE, _SHARED = fcntl.LOCK_EX | fcntl.LOCK_NB, fcntl.LOCK_SH | fcntl.LOCK_NB
_POLL_S = 0.1
_HELD = frozenset((errno.EAGAIN, errno.EACCES))
_NO_LOCKS = frozenset((errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP))


class LockedError(ShardError):
    """A set that another job is at work on."""


class JobLock:
    """Makes the calling process the only job at work on the set in ROOT, while the lock is entered.

    Where the disk knows no locks that is reported, and nothing keeps a second job away.

    Raises:
        LockedError: if another job is at work there, or workers of one that was killed do not end.
        OSError: if ROOT cannot be written.
    """

    def __init__(self, root: Path, report: Callable[[str], None], patience_s: float = WORKERS_END_S) -> None:
        """
        Args:
            root: a folder that is there.
            report: told in plain words what is waited for.
            patience_s: how long to wait for workers.
        """
        self._root = root
        self._path = root / LOCK_FILE
        self._report = report
        self._patience_s = patience_s

    def __enter__(self) -> JobLock:
        self._file = self._lock()
        try:
            self.shut_out_workers()
            _set(self._file, _WORKERS, fcntl.LOCK_UN)
        except BaseException:
            os.close(self._file)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Where workers are still at work, as after an error, the next job must find their lock.
        if _set(self._file, _WORKERS, _EXCLUSIVE):
            self._path.unlink(missing_ok=True)
        os.close(self._file)

    def shut_out_workers(self) -> None:
        """Waits until no worker of this job or an earlier one is at work, and lets none begin."""
        deadline = time.monotonic() + self._patience_s
        told = False
        while not _set(self._file, _WORKERS, _EXCLUSIVE):
            if time.monotonic() > deadline:
                raise LockedError(
                    f"workers of a killed job or a lost node still write into {self._root}: "
                    "end them, and run the same command again to continue"
                )
            if not told:
                self._report(f"waiting for workers of a killed job or a lost node to leave {self._root}")
                told = True
            time.sleep(_POLL_S)

    def _lock(self) -> int:
        while True:
            file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                if not _set(file, _JOB, _EXCLUSIVE, self._report):
                    holder = os.pread(file, 200, 0).decode("utf-8", "replace") or "just begun"
                    raise LockedError(
                        f"another job is at work on {self._root} ({holder}): wait for it to end, or give another "
                        "--output"
                    )
                # A job that ends removes the file, maybe between our opening and our locking it.
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(os.stat(self._path), os.fstat(file)):
                        os.ftruncate(file, 0)
                        os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
                        return file
            except BaseException:
                os.close(file)
                raise
            os.close(file)


@contextlib.contextmanager
def at_work(root: Location) -> Iterator[None]:
    """Says that this process, which must not be the job's, writes into the set in ROOT for a job; nothing at a URL.

    Raises:
        LockedError: if the job has ended.
    """
    if is_url(root):
        yield
        return
    try:
        file = os.open(join(root, LOCK_FILE), os.O_RDWR)
    except FileNotFoundError as error:
        raise LockedError(
            f"a worker on {socket.gethostname()} found no job at work on {root}: on a cluster, --output must be a URL "
            "or lie on a disk that all nodes share; run the same command again once it does"
        ) from error
    try:
        if not _set(file, _WORKERS, _SHARED):
            raise LockedError(f"a worker found another job at work on {root}: run the same command again")
        yield
    finally:
        os.close(file)


def _set(file: int, byte: int, kind: int, report: Callable[[str], None] | None = None) -> bool:
    """Locks a byte, at once or not at all, or unlocks it; whether that was done, or the disk knows no locks."""
    try:
        fcntl.lockf(file, kind, 1, byte)
    except OSError as error:
        if error.errno in _HELD:
            return False
        if error.errno not in _NO_LOCKS:
            raise
        if report is not None:
            report(f"the disk of --output has no locks ({error.strerror}): see that no other job writes there")
    return True
