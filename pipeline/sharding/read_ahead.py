"""The bytes of a shard's images in order, fetched some images ahead: each waits on a network, or on a disk as NFS."""

from __future__ import annotations

import collections
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from pipeline.sources.listing import Entry

THREADS = 16  # Images requested at a time, so that a network's delay is waited for once for all of them.
# Images that a thread reads before it hands them over. Each handing over makes two threads wait for the interpreter's
# lock in turn: one by one, that is 6 % of a shard's time from a local disk.
TOGETHER = 16

Read = Callable[[Entry], bytes]
Get = Callable[[], bytes]


def readings(entries: Iterable[Entry], read: Read) -> Iterator[tuple[Entry, Get]]:
    """Each entry with a function that gives what `read` gives for it, or raises what that raises."""
    left = iter(entries)
    waiting: collections.deque[Future[list[tuple[Entry, Get]]]] = collections.deque()
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            for number in itertools.count():
                # One by one at first, so that the first image does not wait for others.
                some = list(itertools.islice(left, min(1 + number // THREADS, TOGETHER)))
                if some:
                    waiting.append(pool.submit(_read_each, some, read))
                elif not waiting:
                    return
                if len(waiting) == THREADS or not some:
                    yield from waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _read_each(entries: list[Entry], read: Read) -> list[tuple[Entry, Get]]:
    return [(entry, _attempt(read, entry)) for entry in entries]


def _attempt(read: Read, entry: Entry) -> Get:
    try:
        data = read(entry)
    # For whoever asks for this image.
    except Exception as error:
        return functools.partial(_raise, error)
    return lambda: data


def _raise(error: Exception) -> bytes:
    raise error
