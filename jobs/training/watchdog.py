"""Ends a worker that hangs in work of its own, so that Ray Train starts all of them again from the last checkpoint.

A read from a mount whose server is gone never returns. The process lives and answers Ray's health checks, and the other
ranks wait for it in the exchange of gradients, for --collective-seconds.

Limited is what waits for nothing but this worker's own disk, processor and decoder: opening the shard set, and getting
each batch's images. Not limited are the forward and backward pass, since whoever waits there may wait for another rank;
staging, which tries again by itself; and reading and writing checkpoints.
"""

from __future__ import annotations

import contextlib
import faulthandler
from collections.abc import Iterator
from typing import TypeVar

Item = TypeVar("Item")


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """If the block takes longer, prints what each thread of this process is at and ends it with status 1.

    The thread that does so needs no interpreter's lock.
    """
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def each_limited(items: Iterator[Item], seconds: float) -> Iterator[Item]:
    """The same items, where getting each may take so many seconds."""
    while True:
        with limited(seconds):
            item = next(items, None)
        if item is None:
            return
        yield item
