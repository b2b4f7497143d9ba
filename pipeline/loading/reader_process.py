"""Reads a loader's batches in a process of its own, into memory that it shares with the loader.

Not in a thread: between two images a reader asks for the interpreter's lock, and so does the thread that trains between
two operators. On a GPU, where a step is hundreds of them, the two then wait for each other at every image. Measured
beside a loop of small operators, batches of 128: 26 us an image of that loop's time, and 8 with processes.
"""

from __future__ import annotations

import dataclasses
import mmap
import os
import pickle
import subprocess
import sys
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.dataset.split_reader import Allocate
from pipeline.loading.plan import LAST, PlannedBatch

NUMBERS = 6  # Of a sample, as `pipeline.loading.graph.define` takes them.


class ReaderProcessError(RuntimeError):
    """A process that reads images ended by itself, as where memory is short."""


class Reader(Protocol):
    """Where a loader's images come from (`pipeline.dataset.split_reader.SplitReader`).

    Pickled, it is the same in a process that inherits its descriptors.
    """

    pixels: bool

    @property
    def labels(self) -> NDArray[np.int32]: ...

    @property
    def row_bytes(self) -> int: ...

    @property
    def descriptors(self) -> list[int]: ...

    def read(self, samples: NDArray[np.int64], allocate: Allocate) -> NDArray[np.uint8]: ...

    def describe(self, sample: int, what: str) -> str: ...


@dataclasses.dataclass(frozen=True)
class Slot:
    """The arrays of one batch, in shared memory; a batch of fewer images fills the first of each."""

    numbers: NDArray[np.float32]
    """[n, NUMBERS]"""
    labels: NDArray[np.int64]
    """[n]"""
    images: NDArray[np.uint8]
    """[n * row_bytes]"""


class SharedMemory:
    """Room for some batches, seen by this process and those that read. Nobody else can open it, and it has no name.

    Args:
        slots: how many batches.
        batch_size: the most images of one.
        row_bytes: the most bytes of an image.
        descriptor: in a reader process, the loader's.
    """

    def __init__(self, slots: int, batch_size: int, row_bytes: int, descriptor: int | None = None) -> None:
        self.shape: tuple[int, int, int] = slots, batch_size, row_bytes
        labels_at = batch_size * NUMBERS * np.dtype(np.float32).itemsize
        images_at = labels_at + batch_size * np.dtype(np.int64).itemsize
        slot_bytes = -(-(images_at + batch_size * row_bytes) // mmap.PAGESIZE) * mmap.PAGESIZE
        if descriptor is None:
            descriptor = os.memfd_create("batches")
            # A file with holes: only what is written takes memory.
            os.ftruncate(descriptor, slots * slot_bytes)
        self.descriptor = descriptor
        memory = mmap.mmap(descriptor, slots * slot_bytes)
        self.slots = [
            Slot(
                numbers=np.ndarray((batch_size, NUMBERS), np.float32, memory, start),
                labels=np.ndarray(batch_size, np.int64, memory, start + labels_at),
                images=np.ndarray(batch_size * row_bytes, np.uint8, memory, start + images_at),
            )
            for start in range(0, slots * slot_bytes, slot_bytes)
        ]
        self.extent = self.slots[0].numbers.ctypes.data, len(memory)
        """Address and bytes of the whole."""

    def close(self) -> None:
        """Closes the file; the memory stays until the last array in it is dropped."""
        os.close(self.descriptor)


class ReaderProcess:
    """A process that reads planned batches, in the order in which they are asked for.

    Args:
        reader: the split's images.
        mean: float64 [3]: the training set's mean of r, g, b in gray levels.
        memory: where the batches go.
    """

    def __init__(self, reader: Reader, mean: NDArray[np.float64], memory: SharedMemory) -> None:
        path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from pipeline.loading.reader_process import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=(memory.descriptor, *reader.descriptors),
            env={**os.environ, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"},
            # Ctrl-C is for the process that trains; this one ends when that one's pipe does.
            start_new_session=True,
        )
        self._draw: object = None
        self._send((memory.descriptor, memory.shape, mean, pickle.dumps(reader)))

    def submit(self, slot: int, planned: PlannedBatch) -> None:
        """Asks for a batch."""
        # An epoch's batches share the function that draws, which is sent once: a third of a request's cost.
        self._send((slot, planned.samples, None if planned.draw is self._draw else planned.draw))
        self._draw = planned.draw

    def result(self) -> tuple[int, ...]:
        """The shape of the images of the batch that was asked for first; waits until it is read.

        Raises:
            DatasetError: as `pipeline.dataset.split_reader.SplitReader.read`.
            ReaderProcessError: if the process is gone.
        """
        assert self._process.stdout is not None
        try:
            answer = pickle.load(self._process.stdout)
        except (EOFError, pickle.UnpicklingError):
            raise self._gone() from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        """Ends the process, in whatever it is about."""
        self._process.kill()
        self._process.communicate()

    def _send(self, message: object) -> None:
        assert self._process.stdin is not None
        try:
            pickle.dump(message, self._process.stdin, pickle.HIGHEST_PROTOCOL)
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._gone() from None

    def _gone(self) -> ReaderProcessError:
        status = self._process.wait()
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        return ReaderProcessError(f"the process that reads images {how}: see that there is memory for it")


def serve() -> None:
    """The process: reads until nobody asks any more."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    # Whatever prints shall not print into the answers.
    os.dup2(2, 1)
    shape: tuple[int, int, int]
    descriptor, shape, mean, pickled = pickle.load(requests)
    slots = SharedMemory(*shape, descriptor).slots
    reader: Reader | None = None
    draw: Any = None
    while True:
        try:
            number, samples, changed = pickle.load(requests)
        except EOFError:
            return
        draw = changed or draw
        try:
            reader = reader or pickle.loads(pickled)
            answer: tuple[int, ...] | Exception = read_into(slots[number], reader, mean, PlannedBatch(samples, draw))
        # The loader's to raise, whatever it is.
        except Exception as error:
            answer = error
        try:
            pickle.dump(answer, answers)
            answers.flush()
        except BrokenPipeError:
            return


def read_into(slot: Slot, reader: Reader, mean: NDArray[np.float64], planned: PlannedBatch) -> tuple[int, ...]:
    """Draws a batch's numbers and reads its images: all of its work that is not DALI's. Returns the images' shape."""

    def allocate(shape: tuple[int, int]) -> NDArray[np.uint8]:
        return slot.images[: shape[0] * shape[1]].reshape(shape)

    n, drawn = len(planned), planned.draw(planned.samples)
    # DALI's anchor is round(position * (256 - 227)), which is each offset exactly.
    slot.numbers[:n, 1], slot.numbers[:n, 0] = drawn.crops.T / LAST
    slot.numbers[:n, 2] = drawn.flips
    slot.numbers[:n, 3:] = mean - drawn.shifts
    slot.labels[:n] = reader.labels[planned.samples]
    return reader.read(planned.samples, allocate).shape
