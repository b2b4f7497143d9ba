"""The bytes of a shard's images in order, fetched some images ahead: each waits on a network, or on a disk as NFS."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from pipeline.sources.listing import Entry

AHEAD = 16  # Images requested at a time, so that a network's delay is waited for once for all of them.

Read = Callable[[Entry], bytes]


def readings(entries: Iterable[Entry], read: Read) -> Iterator[tuple[Entry, Callable[[], bytes]]]:
    """Each entry with a function that gives what `read` gives for it, or raises what that raises."""
    with ThreadPoolExecutor(AHEAD) as pool:
        waiting: collections.deque[tuple[Entry, Future[bytes]]] = collections.deque()
        try:
            for entry in entries:
                waiting.append((entry, pool.submit(read, entry)))
                if len(waiting) == AHEAD:
                    first, future = waiting.popleft()
                    yield first, future.result
            for first, future in waiting:
                yield first, future.result
        finally:
            for _, future in waiting:
                future.cancel()
