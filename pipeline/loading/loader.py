"""Executes a plan with DALI: bytes and the plan's numbers in, batches on the device out (`pipeline.loading.graph`).

Reader processes prepare images ahead: they draw the plan's numbers, read the images into shared memory and check them.
The thread that trains hands DALI two arrays a group of batches and takes the result; it touches no image.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import math
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali.tensors import TensorListCPU
from torch import Tensor

from pipeline.dataset.info import DatasetError
from pipeline.images.decode import ImageError, decode_stored
from pipeline.images.rgb_stats import MAX_LEVEL, RgbStatistics
from pipeline.loading.graph import PREFETCH, GpuDecoder, define
from pipeline.loading.plan import TEN_CROPS, PlannedBatch, merged
from pipeline.loading.reader_process import Reader, ReaderProcess, SharedMemory

READERS = 2  # Processes that read.
AHEAD = 2 * READERS  # Groups that are being read or wait for DALI.
SLOTS = AHEAD + PREFETCH + 2
# Rows that DALI makes at once, where batches are smaller. What it takes of the thread that trains, some 350 us, is the
# same for 16 images, an eighth of the paper's batch, as for 512. More takes memory: a row is 618 KB.
GROUP = 512
ALIGNMENT = 64  # Bytes. torch's own memory has it, and a kernel may be chosen by it.


class LoaderError(DatasetError):
    """An image of the shard set could not be decoded while training or evaluating."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """One batch on the loader's device."""

    images: Tensor
    """float32 [n, 3, 227, 227] in channels_last memory: gray levels (0..255) less the mean, plus the color jitter. With
    ten crops [10 n, ...], ten rows an image."""
    labels: Tensor
    """int64 [n]; with ten crops [10 n]."""
    samples: NDArray[np.int64]
    """int64 [n]: which samples of the split these are."""

    def __len__(self) -> int:
        return len(self.samples)


@dataclasses.dataclass(frozen=True)
class _Prepared:
    """A group of batches that was read, and waits for DALI or is with it."""

    samples: NDArray[np.int64]
    lengths: list[int]
    """Of its batches."""
    slot: int
    """Where it lies. DALI reads the arrays where they are."""
    images: NDArray[np.uint8]


class Loader:
    """Runs any sequence of planned batches of one split through DALI.

    Args:
        reader: the split's images, as JPEG or as pixels.
        rgb: the training set's statistics; its mean is subtracted.
        batch_size: the largest number of samples a batch will have.
        device: where batches go; a CUDA device decodes there too.
        threads: decoder threads on the host.
        ten_crop: give the ten crops of each image, whatever the plan draws.
        gpu_decoder: which of nvJPEG's decoders is used on a CUDA device.
    """

    def __init__(
        self,
        reader: Reader,
        rgb: RgbStatistics,
        batch_size: int,
        device: torch.device,
        threads: int,
        ten_crop: bool = False,
        gpu_decoder: GpuDecoder = "cuda",
    ) -> None:
        self._reader = reader
        self._device = device
        self._on_gpu = device.type == "cuda"
        self._ten_crop = ten_crop
        self._planned: Iterator[tuple[PlannedBatch, list[int]]] = iter(())
        self._ahead: collections.deque[tuple[ReaderProcess, int, PlannedBatch, list[int]]] = collections.deque()
        self._in_dali: collections.deque[_Prepared] = collections.deque()
        self._copying: collections.deque[tuple[torch.cuda.Event, int]] = collections.deque()
        self._running = False
        self._group = max(batch_size, GROUP // (len(TEN_CROPS) if ten_crop else 1))
        memory = SharedMemory(SLOTS, self._group, reader.row_bytes)
        self._slots = memory.slots
        self._free = list(range(SLOTS))
        mean = np.array(rgb.mean) * MAX_LEVEL
        readers = [ReaderProcess(reader, mean, memory) for _ in range(READERS)]
        self._next_reader = itertools.cycle(readers)
        # Pixels are copied to the GPU as they are; JPEGs are first read by the host's part of the decoder.
        pinned = self._on_gpu and reader.pixels
        if pinned:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(*memory.extent, 0))
        # At once, not when Python next looks: whoever drops a loader, or fails to build one, counts on their end.
        weakref.finalize(self, _close, readers, memory, pinned)
        this = weakref.ref(self)

        def source() -> Any:
            # A pipeline that held its loader would keep it, and DALI's threads, until Python next looks for cycles.
            loader = this()
            assert loader is not None
            return loader._next()

        self._pipeline = define(
            source,
            self._group,
            threads,
            "gpu" if self._on_gpu else "cpu",
            (device.index or 0) if self._on_gpu else None,
            pixels=reader.pixels,
            ten_crop=ten_crop,
            gpu_decoder=gpu_decoder,
        )
        self._pipeline.build()

    def run(self, planned: Iterable[PlannedBatch]) -> Iterator[Batch]:
        """Yields each planned batch, in order; starting again, even before the end, drops what was under way.

        Raises:
            DatasetError: if an image cannot be read or does not decode; it names the sample.
            RuntimeError: if DALI or CUDA fails for another reason, as where memory is short.
        """
        self._drain()
        self._planned = merged(planned, self._group)
        self._running = True
        while True:
            try:
                outputs = self._pipeline.run(torch.cuda.current_stream(self._device) if self._on_gpu else None)
            except StopIteration:
                self._rewind()
                return
            except RuntimeError as error:
                self._check_damage(error)
                raise
            yield from self._hand_over(outputs[0].as_tensor())

    def _next(self) -> tuple[TensorListCPU, TensorListCPU]:
        """The next group for DALI, which calls this in the thread that asks for a batch."""
        while len(self._ahead) < AHEAD and (group := next(self._planned, None)) is not None:
            slot, process = self._take_slot(), next(self._next_reader)
            process.submit(slot, group[0])
            self._ahead.append((process, slot, *group))
        if not self._ahead:
            raise StopIteration
        process, slot, planned, lengths = self._ahead.popleft()
        try:
            shape = process.result()
        except BaseException:
            self._free.append(slot)
            raise
        images = self._slots[slot].images[: math.prod(shape)].reshape(shape)
        self._in_dali.append(_Prepared(planned.samples, lengths, slot, images))
        return TensorListCPU(images), TensorListCPU(self._slots[slot].numbers[: len(planned)])

    def _take_slot(self) -> int:
        """A slot that nobody reads."""
        while not self._free:
            # All are with the GPU: the oldest is the first to come back.
            event, slot = self._copying.popleft()
            event.synchronize()
            self._free.append(slot)
        return self._free.pop()

    def _hand_over(self, output: Any) -> Iterator[Batch]:
        """Makes DALI's output torch's; on a GPU in the order of the current stream, so that the host never waits.

        On a CPU a batch is part of DALI's own memory (DLPack), which goes back with its last reference. On a GPU it is
        a copy in torch's memory, 2 x 618 KB an image at the memory's speed: DALI takes a DLPack tensor back only after
        a synchronization of the whole device, so that its memory would not be bounded by the batches in use.
        """
        prepared = self._in_dali.popleft()
        labels = torch.from_numpy(self._slots[prepared.slot].labels[: len(prepared.samples)])
        if self._on_gpu:
            # A view, valid until DALI runs again: what is queued on this stream by then is done before.
            images = torch.as_tensor(output, device=self._device)
            labels = labels.to(self._device, non_blocking=True)
            # Until the stream is here, the GPU may still be reading the group's host memory.
            self._copying.append((torch.cuda.current_stream(self._device).record_event(), prepared.slot))
            while self._copying and self._copying[0][0].query():
                self._free.append(self._copying.popleft()[1])
        else:
            images, labels = torch.from_dlpack(output), labels.clone()
            self._free.append(prepared.slot)
        start = 0
        for length in prepared.lengths:
            batch = slice(start, start + length)
            yield self._batch(images[batch], labels[batch], prepared.samples[batch])
            start += length

    def _batch(self, images: Tensor, labels: Tensor, samples: NDArray[np.int64]) -> Batch:
        """A batch of its own, from its part of a group."""
        if self._on_gpu or images.data_ptr() % ALIGNMENT:
            images = images.clone()
        if self._ten_crop:
            images, labels = images.flatten(0, 1), labels.repeat_interleave(len(TEN_CROPS))
        return Batch(images.permute(0, 3, 1, 2), labels, samples)

    def _drain(self) -> None:
        """Lets DALI finish what an earlier `run`, not read to its end, had already handed to it."""
        self._planned = iter(())
        while self._ahead:
            process, slot, *_ = self._ahead.popleft()
            self._free.append(slot)
            with contextlib.suppress(DatasetError):
                process.result()
        while self._running:
            try:
                self._pipeline.run()
            except StopIteration:
                self._rewind()

    def _rewind(self) -> None:
        """After StopIteration: DALI will ask for a batch again."""
        self._pipeline.reset()
        self._free += [prepared.slot for prepared in self._in_dali]
        self._in_dali.clear()
        self._running = False

    def _check_damage(self, error: RuntimeError) -> None:
        """Raises LoaderError, naming the sample, if an image that DALI has is not one of a set; returns otherwise."""
        if self._reader.pixels:
            return
        for prepared in self._in_dali:
            for sample, jpeg in zip(prepared.samples, prepared.images, strict=True):
                try:
                    decode_stored(jpeg.tobytes())
                except ImageError as reason:
                    raise LoaderError(self._reader.describe(int(sample), str(reason))) from error


def _close(readers: list[ReaderProcess], memory: SharedMemory, pinned: bool) -> None:
    for reader in readers:
        reader.close()
    if pinned:
        torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(memory.extent[0]))
    memory.close()
