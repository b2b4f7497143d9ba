"""Executes a plan with DALI: bytes and the plan's numbers in, batches on the device out.

The same graph on CPU and GPU: `decoders.image`, then `crop_mirror_normalize` with crop position, flip and mean (less
the color jitter) of each sample. DALI draws nothing and shuffles nothing.

Reader threads prepare whole batches ahead: they draw the plan's numbers, read the images into one buffer and check
them. The thread that trains hands DALI five arrays a batch and takes the result; it touches no image.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import Pipeline, fn, types
from nvidia.dali.plugin.pytorch import feed_ndarray
from nvidia.dali.tensors import TensorListCPU
from torch import Tensor

from pipeline.dataset import DatasetError
from pipeline.decode import ImageError, decode_stored
from pipeline.plan import CROP_SIZE, LAST, TEN_CROPS, PlannedBatch
from pipeline.rgb_stats import MAX_LEVEL, RgbStatistics
from pipeline.split_reader import Allocate

# DALI leaves host memory of less than 32 MB to malloc, which gives the images of a batch back to the system each time:
# faults on new pages then cost a quarter of the decoding. DALI reads this at its first allocation.
os.environ.setdefault("DALI_MALLOC_POOL_THRESHOLD", "256k")
PREFETCH = 2  # Batches that DALI keeps ready; two hide the decoder behind the step, more only take memory.
READERS = 2  # Threads that read, each a batch at a time. More contend for the interpreter's lock.
DECODER_BUFFER = 2**20  # Bytes that nvJPEG reserves a thread: a set's image has 196,608. Its defaults are 8 and 16 MiB.

GpuDecoder = Literal["cuda", "hardware"]


class LoaderError(DatasetError):
    """An image of the shard set could not be decoded while training or evaluating."""


class Reader(Protocol):
    """Where a loader's images come from (`pipeline.split_reader.SplitReader`)."""

    labels: NDArray[np.int32]
    pixels: bool

    def read(self, samples: NDArray[np.int64], allocate: Allocate) -> NDArray[np.uint8]: ...

    def describe(self, sample: int, what: str) -> str: ...


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


def decoder_name(pixels: bool, gpu: bool, gpu_decoder: GpuDecoder = "cuda") -> str:
    """What decides an image's pixels: decoders differ by some levels, so that a run keeps to one.

    Args:
        pixels: whether the images come decoded, as from a cache of pixels: libjpeg-turbo made them on any machine.
    """
    return "libjpeg-turbo" if pixels or not gpu else f"nvjpeg-{gpu_decoder}"


def define(
    source: Callable[[], Any],
    batch_size: int,
    threads: int,
    device: Literal["cpu", "gpu"],
    device_id: int | None,
    *,
    pixels: bool = False,
    ten_crop: bool = False,
    gpu_decoder: GpuDecoder = "cuda",
) -> Pipeline:
    """The graph for batches of up to `batch_size` images, unbuilt. Its output is float32 HWC.

    Args:
        source: called once a batch, returns its arrays, or raises StopIteration at the end: images (uint8 [n, bytes] of
            JPEGs, or [n, 256, 256, 3] of pixels), left and top of the crop as fractions of the room for it (float32
            [n]), flip (int32 [n]) and what to subtract from r, g, b (float32 [n, 3]). With ten crops, images and the
            last. The arrays must stay as they are until the batch is out.
        batch_size: the largest batch.
        threads: decoder threads on the host.
        device: the operators' only difference.
        device_id: the GPU's index among those this process sees, or None on CPU.
        pixels: images come decoded.
        ten_crop: decode each image once and cut it ten times (section 4.1); the output is [10, 227, 227, 3] an image.
        gpu_decoder: which of nvJPEG's decoders takes every image.
    """
    on_gpu = device == "gpu"
    kinds = [(types.UINT8, 3 if pixels else 1), (types.FLOAT, 0), (types.FLOAT, 0), (types.INT32, 0), (types.FLOAT, 1)]
    kinds = [kinds[0], kinds[-1]] if ten_crop else kinds
    pipeline = Pipeline(batch_size, threads, device_id, prefetch_queue_depth=PREFETCH)
    with pipeline:
        given, *place, mean = fn.external_source(
            source=source,
            num_outputs=len(kinds),
            dtype=[kind for kind, _ in kinds],
            ndim=[dimensions for _, dimensions in kinds],
            no_copy=True,
        )
        if pixels:
            images = given.gpu() if on_gpu else given
        else:
            images = fn.decoders.image(
                given,
                device="mixed" if on_gpu else "cpu",
                output_type=types.RGB,
                # libjpeg-turbo, which decodes on the CPU, interpolates chroma; nvJPEG does so only when asked.
                jpeg_fancy_upsampling=True,
                # The stored pixels are what is counted, verified and read by others; DALI would turn them by EXIF.
                adjust_orientation=False,
                # All or nothing. By default a share of each batch goes to the hardware decoder, whose pixels differ: an
                # image would depend on its place in the batch.
                hw_decoder_load=1.0 if gpu_decoder == "hardware" else 0.0,
                device_memory_padding=DECODER_BUFFER,
                host_memory_padding=DECODER_BUFFER,
            )

        def crop(left: Any, top: Any, flip: Any) -> Any:
            return fn.crop_mirror_normalize(
                images,
                device=device,
                crop=(CROP_SIZE, CROP_SIZE),
                crop_pos_x=left,
                crop_pos_y=top,
                mirror=flip,
                mean=mean,
                dtype=types.FLOAT,
                # Which permuted is torch's channels_last.
                output_layout="HWC",
            )

        if ten_crop:
            output = fn.stack(*(crop(left / LAST, top / LAST, int(flip)) for top, left, flip in TEN_CROPS))
        else:
            output = crop(*place)
        pipeline.set_outputs(output)
    return pipeline


class _Buffers:
    """Host memory for the bytes of batches, used again and again: new pages for each would cost as much as reading.

    Args:
        pinned: whether it is to be page-locked, from which copies to a GPU run beside the host.
    """

    def __init__(self, pinned: bool) -> None:
        self.pinned = pinned
        self._free: collections.deque[NDArray[np.uint8]] = collections.deque()

    def take(self, size: int) -> NDArray[np.uint8]:
        """Memory of at least so many bytes, from any thread."""
        try:
            buffer = self._free.pop()
        except IndexError:
            buffer = np.empty(0, np.uint8)
        if len(buffer) >= size:
            return buffer
        # Some more, as the next batch's longest JPEG may be longer.
        return torch.empty(size + size // 4, dtype=torch.uint8, pin_memory=self.pinned).numpy()

    def give(self, buffer: NDArray[np.uint8]) -> None:
        """Takes back what nobody reads any more."""
        self._free.append(buffer)


@dataclasses.dataclass(frozen=True)
class _Prepared:
    """A batch that was read, and waits for DALI or is with it."""

    samples: NDArray[np.int64]
    labels: Tensor
    """int64, on the host."""
    inputs: tuple[TensorListCPU, ...]
    """What `define` takes. DALI reads these arrays where they are."""
    images: NDArray[np.uint8]
    """The first of the inputs."""
    buffer: NDArray[np.uint8]
    """The memory of the images among them."""


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
        self._mean = np.array(rgb.mean) * MAX_LEVEL
        self._device = device
        self._on_gpu = device.type == "cuda"
        self._ten_crop = ten_crop
        self._planned: Iterator[PlannedBatch] = iter(())
        self._ahead: collections.deque[Future[_Prepared]] = collections.deque()
        self._in_dali: collections.deque[_Prepared] = collections.deque()
        self._copying: collections.deque[tuple[torch.cuda.Event, _Prepared]] = collections.deque()
        self._running = False
        self._buffers = _Buffers(self._on_gpu)
        self._pool = ThreadPoolExecutor(READERS, "reader")
        # At once, not when Python next looks: whoever drops a loader counts on its threads' end.
        weakref.finalize(self, self._pool.shutdown, cancel_futures=True)
        this = weakref.ref(self)

        def source() -> Any:
            # A pipeline that held its loader would keep it, and DALI's threads, until Python next looks for cycles.
            loader = this()
            assert loader is not None
            return loader._next()

        self._pipeline = define(
            source,
            batch_size,
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
        self._planned = iter(planned)
        self._running = True
        while True:
            try:
                outputs = self._pipeline.run(torch.cuda.current_stream(self._device) if self._on_gpu else None)
            except StopIteration:
                self._rewind()
                return
            except RuntimeError as error:
                self._refuse_damage(error)
                raise
            yield self._hand_over(outputs[0].as_tensor())

    def _next(self) -> tuple[TensorListCPU, ...]:
        """The next batch for DALI, which calls this in the thread that asks for a batch."""
        while len(self._ahead) < READERS and (planned := next(self._planned, None)) is not None:
            self._ahead.append(self._pool.submit(_prepare, self._reader, self._mean, self._buffers, planned))
        if not self._ahead:
            raise StopIteration
        prepared = self._ahead.popleft().result()
        self._in_dali.append(prepared)
        return (prepared.inputs[0], prepared.inputs[-1]) if self._ten_crop else prepared.inputs

    def _hand_over(self, output: Any) -> Batch:
        """Makes DALI's output torch's; on a GPU in the order of the current stream, so that the host never waits.

        On a CPU the tensor is DALI's own memory (DLPack), which goes back with its last reference. On a GPU it is a
        copy in torch's memory, 2 x 618 KB an image at the memory's speed: DALI takes a DLPack tensor back only after a
        synchronization of the whole device, so that its memory would not be bounded by the batches in use.
        """
        prepared = self._in_dali.popleft()
        labels = prepared.labels
        if self._on_gpu:
            stream = torch.cuda.current_stream(self._device)
            images = torch.empty(output.shape(), dtype=torch.float32, device=self._device)
            feed_ndarray(output, images, cuda_stream=stream)
            labels = labels.to(self._device, non_blocking=True)
            # Until the stream is here, the GPU may still be reading the batch's host memory.
            self._copying.append((stream.record_event(), prepared))
            while self._copying and self._copying[0][0].query():
                self._buffers.give(self._copying.popleft()[1].buffer)
        else:
            images = torch.from_dlpack(output)
            self._buffers.give(prepared.buffer)
        if self._ten_crop:
            images, labels = images.flatten(0, 1), labels.repeat_interleave(len(TEN_CROPS))
        return Batch(images.permute(0, 3, 1, 2), labels, prepared.samples)

    def _drain(self) -> None:
        """Lets DALI finish what an earlier `run`, not read to its end, had already handed to it."""
        self._planned = iter(())
        for waiting in self._ahead:
            waiting.cancel()
        self._ahead.clear()
        while self._running:
            try:
                self._pipeline.run()
            except StopIteration:
                self._rewind()

    def _rewind(self) -> None:
        """After StopIteration: DALI will ask for a batch again."""
        self._pipeline.reset()
        self._in_dali.clear()
        self._running = False

    def _refuse_damage(self, error: RuntimeError) -> None:
        """Raises LoaderError, naming the sample, if an image that DALI has is not one of a set; returns otherwise."""
        if self._reader.pixels:
            return
        for prepared in self._in_dali:
            for sample, jpeg in zip(prepared.samples, prepared.images, strict=True):
                try:
                    decode_stored(jpeg.tobytes())
                except ImageError as reason:
                    raise LoaderError(self._reader.describe(int(sample), str(reason))) from error


def _prepare(reader: Reader, mean: NDArray[np.float64], buffers: _Buffers, planned: PlannedBatch) -> _Prepared:
    """Reads a batch and draws its numbers, in a reader thread: all of a batch's work that is not DALI's."""
    taken = []

    def allocate(shape: tuple[int, int]) -> NDArray[np.uint8]:
        rows, width = shape
        taken.append(buffers.take(rows * width))
        return taken[0][: rows * width].reshape(shape)

    drawn = planned.draw(planned.samples)
    # DALI's anchor is round(position * (256 - 227)), which is each offset exactly.
    top, left = np.ascontiguousarray(drawn.crops.T / LAST, np.float32)
    labels = torch.from_numpy(reader.labels[planned.samples].astype(np.int64))
    images = reader.read(planned.samples, allocate)
    numbers = (left, top, drawn.flips.astype(np.int32), (mean - drawn.shifts).astype(np.float32))
    # DALI would wrap and check the arrays in the thread that asks for a batch.
    inputs = tuple(TensorListCPU(array) for array in (images, *numbers))
    return _Prepared(planned.samples, labels.pin_memory() if buffers.pinned else labels, inputs, images, taken[0])
