"""The end of the input path, on the device where a batch lies: uint8 windows -> what the network sees.

In torch, not in DALI: on a CPU, `crop_mirror_normalize` takes twice as long for the same.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

PIECE = 8  # Images that a thread of a CPU finishes at a time.
SPARE = 3  # Batches' memory that waits for use: a loop holds one batch while it asks for another.


def _copy(window: Tensor, mirrored: bool, image: Tensor) -> None:
    """Converts a window to what `image` holds, mirrored left to right or not."""
    # One at a time: torch's operations on some images of a uint8 batch take ten times as long on a CPU.
    image.copy_(window.flip(1) if mirrored else window)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Keeps torch from sharing out an image among threads, whose meetings then wait for DALI's on the same cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Finisher:
    """Makes the batches of one device, each in memory that is its own for as long as any tensor of it lives.

    Args:
        device: where the windows lie and the batches go.
        threads: how many a CPU finishes images with.
    """

    def __init__(self, device: torch.device, threads: int) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._spare: list[NDArray[np.float32]] = []
        self._pool = ThreadPoolExecutor(threads)
        # At once, not when Python next looks: whoever drops a loader counts on its threads' end.
        weakref.finalize(self, self._pool.shutdown)

    def finish(self, windows: Sequence[Tensor], flips: NDArray[np.bool_], means: NDArray[np.float32]) -> Tensor:
        """A batch's images, float32 [n, 3, h, w] in channels_last memory.

        Args:
            windows: n of uint8 [h, w, 3], on the device; free for others when this returns.
            flips: [n]: which of them are mirrored left to right.
            means: [n, 3]: what is subtracted from r, g, b.
        """
        shape = (len(windows), *windows[0].shape)
        if self._stream is None:
            output = self._take(shape)
            images, shifts, mirrored = output.unbind(), _by_row(torch.from_numpy(means), shape), flips.tolist()

            def finish_piece(start: int) -> None:
                for i in range(start, min(start + PIECE, len(images))):
                    _copy(windows[i], mirrored[i], images[i])
                    # At once, while the image is in the processor's cache.
                    images[i].flatten(1).sub_(shifts[i])

            # The pool's threads take torch's number of threads from here when they first need it, and keep it.
            with one_thread():
                list(self._pool.map(finish_piece, range(0, len(windows), PIECE)))
        else:
            # On a stream of its own, since waiting on the current one would wait for the training step that runs there;
            # and waited for, since DALI would take its buffer back while queued kernels still read it.
            with torch.cuda.stream(self._stream):
                output = torch.empty(shape, device=self._device)
                for window, mirrored_one, image in zip(windows, flips.tolist(), output, strict=True):
                    _copy(window, mirrored_one, image)
                output.flatten(2).sub_(_by_row(torch.from_numpy(means).to(self._device), shape)[:, None])
            self._stream.synchronize()
            output.record_stream(torch.cuda.current_stream(self._device))
        # HWC seen so is torch's channels_last, so no transposition is ever done.
        return output.permute(0, 3, 1, 2)

    def labels(self, labels: NDArray[np.int32]) -> Tensor:
        """A batch's labels, int64 [n], on the device."""
        tensor = torch.from_numpy(labels.astype(np.int64))
        if self._stream is None:
            return tensor
        # A copy from memory that is not pinned waits for its stream, so not on the one of the training step either.
        with torch.cuda.stream(self._stream):
            there = tensor.to(self._device)
        there.record_stream(torch.cuda.current_stream(self._device))
        return there

    def _take(self, shape: tuple[int, ...]) -> Tensor:
        """Memory of an earlier batch whose last tensor is gone: new pages would cost more than what is done here."""
        size = math.prod(shape)
        memory = self._spare.pop() if self._spare else np.empty(size, np.float32)
        if memory.size < size:
            memory = np.empty(size, np.float32)
        lent = memory[:size].reshape(shape)
        # The tensor's storage, which all its views share, keeps this array and nothing else does.
        weakref.finalize(lent, _give_back, self._spare, memory).atexit = False
        return torch.from_numpy(lent)


def _by_row(means: Tensor, shape: Sequence[int]) -> Tensor:
    """[n, 3] for whole rows of pixels, [n, 3 * width]: a CPU takes a last dimension of 3 a value at a time."""
    return means.repeat(1, shape[2])


def _give_back(spare: list[NDArray[np.float32]], memory: NDArray[np.float32]) -> None:
    if len(spare) < SPARE:
        spare.append(memory)
