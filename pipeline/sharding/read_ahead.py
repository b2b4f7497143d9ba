"""The bytes of a shard's images in order, fetched some images ahead: each waits on a network, or on a disk as NFS."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from pipeline.sources.listing import Entry

THREADS = 16  # That read at a time, so that a network's delay is waited for once for all of them.
# What a thread reads before it hands it over: ten of ImageNet's images. Each handing over has two threads wait for the
# interpreter's lock in turn: one by one, that is 5 % of a shard's time from a local disk.
PART_BYTES = 2**20

Read = Callable[[Entry], bytes]
Get = Callable[[], bytes]


def readings(entries: Iterable[Entry], read: Read) -> Iterator[tuple[Entry, Get]]:
    """Each entry with a function that gives what `read` gives for it, or raises what that raises."""
    waiting: collections.deque[Future[list[tuple[Entry, Get]]]] = collections.deque()
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            for part in _parts(entries):
                waiting.append(pool.submit(_read_each, part, read))
                if len(waiting) == THREADS:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _parts(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    part: list[Entry] = []
    bytes_in_part = parts = 0
    for entry in entries:
        # One by one at first: the first image is not to wait for others.
        if part and (parts < THREADS or bytes_in_part + entry.size > PART_BYTES):
            yield part
            part, bytes_in_part, parts = [], 0, parts + 1
        part.append(entry)
        bytes_in_part += entry.size
    if part:
        yield part


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
