"""Finds a worker that hangs in work of its own, within a stated time, and ends it, so that the run goes on without it.

A read from a mount whose server is gone never returns. The process lives and answers Ray's health checks, and the other
ranks wait for it in the exchange of gradients, for torch's half hour. A thread beside the training thread ends such a
process; Ray Train sees a dead worker and starts all of them again from the last checkpoint.

Watched is what waits for nothing but this worker's own disk, processor and decoder: opening the shard set, and getting
each step's or each validation batch's images. Not watched are the forward and backward pass, since whoever waits there
may wait for another rank; staging, which tries again by itself; and reading and writing checkpoints.

What stops all threads of a process cannot be seen by one of them: SIGSTOP, or a hang while the training thread holds
the interpreter's lock (DALI's run and reads of files do not; a page fault of a memory map in Python code does). Ray's
health check finds these, after the same time, and also a process that the kernel cannot end.
"""

from __future__ import annotations

import faulthandler
import itertools
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import FrameType
from typing import TypeVar

from model.metrics import LabelledImages
from model.training import TrainingData

LOOKS = 20  # Within the limit; a hang is found at most one look after it.
PACKAGES = ("jobs", "model", "pipeline")
# By name alone: to ask the file system where a file lies could hang as well.
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
STDERR = 2

Item = TypeVar("Item")


def end_process(line: str) -> None:
    """Says why, shows what each thread of the process is at, and ends it without waiting for any of them."""
    print(line, flush=True)
    faulthandler.dump_traceback(STDERR, all_threads=True)
    os._exit(1)


class Watch:
    """While it is entered, a thread looks whether the thread that entered it is held up in one piece of its own work.

    It counts its looks, not seconds: a machine that slept, or a process that was stopped and goes on, has not hung.

    Args:
        rank: whose worker this is, for the message.
        seconds: how long one piece of work may take.
        leave: given one line; ends the process. A parameter for tests.
    """

    def __init__(self, rank: int, seconds: float, leave: Callable[[str], None] = end_process) -> None:
        self._rank = rank
        self._seconds = seconds
        self._leave = leave
        # A list, since each is an object of its own, by which one piece of work is told from the next like it.
        self._work: list[str] | None = None
        self._seen: list[str] | None = None
        self._looks = 0
        self._watched = 0
        self._over = threading.Event()

    def __enter__(self) -> Watch:
        self._watched = threading.get_ident()
        threading.Thread(target=self._run, name="hang-watch", daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()

    def begin(self, doing: str) -> None:
        """A new piece of own work begins, and the one before, if any, has ended."""
        self._work = [doing]

    def end(self) -> None:
        """What comes now may wait for other workers."""
        self._work = None

    def each(self, items: Iterator[Item], doing: Iterable[str]) -> Iterator[Item]:
        """The same items, where getting each is a piece of own work, and what is done with it is none.

        Args:
            doing: what getting each is called.
        """
        for name in doing:
            self.begin(name)
            try:
                item = next(items)
            except StopIteration:
                return
            finally:
                self.end()
            yield item

    def look(self) -> bool:
        """Looks once; whether the worker hangs, after which it has been told to leave."""
        work = self._work
        self._looks = self._looks + 1 if work is self._seen else 0
        self._seen = work
        if work is None or self._looks < LOOKS:
            return False
        line = (
            f"rank {self._rank} on {socket.gethostname()} (pid {os.getpid()}) hangs: it has been {work[0]} for "
            f"{self._seconds:g} s, at {innermost(sys._current_frames().get(self._watched))}; ending its process "
            f"(--hang-seconds {self._seconds:g})"
        )
        if self._work is not work:
            return False
        self._leave(line)
        return True

    def _run(self) -> None:
        while not self._over.wait(self._seconds / LOOKS):
            if self.look():
                return


def innermost(frame: FrameType | None) -> str:
    """Where in this project's own code a thread is, as "pipeline/shard_file.py:66 in _read"."""
    while frame is not None:
        path = os.path.relpath(os.path.abspath(frame.f_code.co_filename), ROOT)
        if path.split(os.sep)[0] in PACKAGES:
            return f"{path}:{frame.f_lineno} in {frame.f_code.co_name}"
        frame = frame.f_back
    return "an unknown place"


class WatchedData:
    """A worker's data (`model.training.TrainingData`), the wait for which is watched."""

    def __init__(self, data: TrainingData, watch: Watch) -> None:
        self._data = data
        self._watch = watch

    @property
    def steps(self) -> int:
        return self._data.steps

    def training(self, epoch: int, first_step: int) -> Iterator[Sequence[LabelledImages]]:
        doing = (f"getting its images of epoch {epoch + 1}, step {step}" for step in itertools.count(first_step + 1))
        return self._watch.each(self._data.training(epoch, first_step), doing)

    def validation(self) -> Iterator[LabelledImages]:
        return self._watch.each(self._data.validation(), itertools.repeat("getting its validation images"))
