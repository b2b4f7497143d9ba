"""What executes a plan: JPEG bytes or pixels and the plan's numbers in, batches on the device out.

DALI draws nothing and shuffles nothing. `external_source` hands it each image's bytes and window, and the decoder takes
just the window; images that are decoded already come as they are. What comes out is uint8 on the device, where
`finish.py` mirrors it and subtracts the mean, into which the colour shift is folded. CPU and GPU run the same code.
"""

from __future__ import annotations

import collections
import dataclasses
import io
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import Pipeline, fn, types
from PIL import Image
from torch import Tensor

from pipeline.dataset import DatasetError, ImageError
from pipeline.finish import Finisher
from pipeline.pixel_stage import PixelReader
from pipeline.plan import CROP_OFFSETS, CROP_SIZE, Views
from pipeline.rgb_stats import MAX_LEVEL, RgbStatistics
from pipeline.split_reader import SplitReader

# DALI leaves host memory of less than 32 MB to malloc, which gives the windows of a batch back to the system each time:
# faults on new pages then cost a quarter of the decoding. DALI reads this at its first allocation.
os.environ.setdefault("DALI_MALLOC_POOL_THRESHOLD", "256k")
PREFETCH = 2  # Batches that DALI keeps ready; two hide the decoder behind the step, more only take memory.


# Given the error of an image that cannot be read: which sample to take for it, and that one's bytes.
Substitute = Callable[[ImageError], tuple[int, NDArray[np.uint8]]]


class LoaderError(DatasetError):
    """An image of the shard set could not be decoded while training or evaluating."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """One batch on the loader's device."""

    images: Tensor
    """float32 [n, 3, 227, 227] in channels_last memory: grey levels (0..255) less the mean, plus the colour shift."""
    labels: Tensor
    """int64 [n]."""
    samples: NDArray[np.int64]
    """int64 [n]: which samples of the split these are."""

    def __len__(self) -> int:
        return len(self.samples)


def define(
    source: Callable[[], Any],
    batch_size: int,
    threads: int,
    device: str,
    device_id: int | None,
    pixels: bool = False,
) -> Pipeline:
    """The pipeline for batches of up to `batch_size` images, unbuilt.

    Args:
        source: called once a batch; returns its images, crop_x and crop_y (of pixels, the images alone), or raises
            StopIteration at the end. What it returns must stay as it is until the batch is out.
        batch_size: the largest batch.
        threads: decoder threads on the host.
        device: "cpu" or "gpu"; the operators' only difference.
        device_id: the GPU's index among those this process sees, or None on CPU.
        pixels: images come as uint8 [256, 256, 3], not as JPEG bytes.
    """
    on_gpu = device == "gpu"
    pipeline = Pipeline(batch_size, threads, device_id, prefetch_queue_depth=PREFETCH)
    with pipeline:
        if pixels:
            (images,) = fn.external_source(source=source, num_outputs=1, dtype=types.UINT8, ndim=3, no_copy=True)
            # By DALI's threads, from a mapped file that may be on a disk. `crop` would take longer than whole copies.
            output = fn.copy(images.gpu() if on_gpu else images, device=device)
        else:
            encoded, crop_x, crop_y = fn.external_source(
                source=source,
                num_outputs=3,
                dtype=[types.UINT8, types.FLOAT, types.FLOAT],
                ndim=[1, 0, 0],
                no_copy=True,
            )
            output = fn.decoders.image_crop(
                encoded,
                device="mixed" if on_gpu else "cpu",
                output_type=types.RGB,
                # libjpeg-turbo, which decodes on the CPU, interpolates chroma; nvJPEG does so only when asked.
                jpeg_fancy_upsampling=True,
                # The stored pixels are what is counted, verified and read by others; DALI would turn them by EXIF.
                adjust_orientation=False,
                crop=(CROP_SIZE, CROP_SIZE),
                crop_pos_x=crop_x,
                crop_pos_y=crop_y,
            )
        pipeline.set_outputs(output)
    return pipeline


def window_positions(views: Views) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """crop_x and crop_y of `define`, each [n]: DALI takes a window's place as a fraction of its room, offset / 29."""
    y, x = np.ascontiguousarray(views.crops.T / (CROP_OFFSETS - 1), dtype=np.float32)
    return x, y


def window_decoder(
    image: Callable[[int], NDArray[np.uint8]], views: Iterator[Views], batch_size: int, threads: int, gpu: bool
) -> Pipeline:
    """`define`, built, that decodes each view's window and no more, to be timed.

    Args:
        image: gives a sample's JPEG.
    """
    in_flight: collections.deque[Any] = collections.deque(maxlen=2 * PREFETCH)

    def source() -> Any:
        step = next(views)
        in_flight.append(([image(sample) for sample in step.samples], *window_positions(step)))
        return in_flight[-1]

    pipeline = define(source, batch_size, threads, "gpu" if gpu else "cpu", 0 if gpu else None)
    pipeline.build()
    return pipeline


class Loader:
    """Runs any sequence of `Views` of one split through DALI.

    Args:
        reader: the split's images, as JPEG or as pixels.
        rgb: the training set's statistics; its mean is subtracted.
        batch_size: the largest number of rows a `Views` will have.
        device: where batches go; a CUDA device decodes there too.
        threads: decoder threads on the host.
    """

    def __init__(
        self, reader: SplitReader | PixelReader, rgb: RgbStatistics, batch_size: int, device: torch.device, threads: int
    ) -> None:
        self._reader = reader
        self._pixels = isinstance(reader, PixelReader)
        self._mean = np.array(rgb.mean) * MAX_LEVEL
        self._device = device
        self._views: Iterator[Views] = iter(())
        self._substitute: Substitute | None = None
        # With each batch under way, what DALI reads of it without a copy of its own.
        self._in_flight: collections.deque[tuple[Views, tuple[Any, ...]]] = collections.deque()
        self._running = False
        on_gpu = device.type == "cuda"
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
            "gpu" if on_gpu else "cpu",
            (device.index or 0) if on_gpu else None,
            self._pixels,
        )
        self._finisher = Finisher(device)
        self._pipeline.build()

    def _next(self) -> tuple[Any, ...]:
        views, images = self._read(next(self._views))
        given: tuple[Any, ...] = (images,)
        if not self._pixels:
            given = images, *window_positions(views)
        self._in_flight.append((views, given))
        return given

    def _read(self, views: Views) -> tuple[Views, list[NDArray[np.uint8]]]:
        """The images' bytes, and the views with the samples that they are of."""
        samples, images = [], []
        for sample in views.samples:
            try:
                image = self._reader.image(sample)
            except ImageError as error:
                if self._substitute is None:
                    raise
                sample, image = self._substitute(error)
            samples.append(sample)
            images.append(image)
        return dataclasses.replace(views, samples=np.array(samples, np.int64)), images

    def run(self, views: Iterable[Views], substitute: Substitute | None = None) -> Iterator[Batch]:
        """Yields one batch for each `Views`, in order; starting again, even before the end, drops what was under way.

        Args:
            substitute: what to take for an image that cannot be read, seen as that one would have been; None stops.

        Raises:
            DatasetError: if an image cannot be read or does not decode; it names the sample.
        """
        self._drain()
        self._views = iter(views)
        self._substitute = substitute
        self._running = True
        while True:
            try:
                (output,) = self._pipeline.run()
            except StopIteration:
                self._rewind()
                return
            except RuntimeError as error:
                raise LoaderError(self._diagnose(error)) from error
            done, _ = self._in_flight.popleft()
            windows = self._windows(torch.from_dlpack(output.as_tensor()), done)
            images = self._finisher.finish(windows, done.flips, (self._mean - done.shifts).astype(np.float32))
            # DALI takes its buffer back with the last reference.
            del output, windows
            yield Batch(images, self._finisher.labels(self._reader.labels[done.samples]), done.samples)

    def _windows(self, images: Tensor, views: Views) -> Sequence[Tensor]:
        """Each image's window, of DALI's output: a view, not a copy."""
        if not self._pixels:
            return images.unbind()
        return [
            image[top : top + CROP_SIZE, left : left + CROP_SIZE]
            for image, (top, left) in zip(images, views.crops.tolist(), strict=True)
        ]

    def _drain(self) -> None:
        """Lets DALI finish what an earlier `run`, not read to its end, had already handed to it."""
        self._views = iter(())
        while self._running:
            try:
                self._pipeline.run()
            except StopIteration:
                self._rewind()

    def _rewind(self) -> None:
        """After StopIteration: DALI will ask for a batch again."""
        self._pipeline.reset()
        self._in_flight.clear()
        self._running = False

    def _diagnose(self, error: RuntimeError) -> str:
        """Names the sample under way that does not decode."""
        if isinstance(self._reader, PixelReader):
            return f"DALI failed: {error}"
        for views, _ in self._in_flight:
            for sample in views.samples:
                try:
                    with Image.open(io.BytesIO(self._reader.image(sample).tobytes())) as image:
                        image.load()
                except OSError as reason:
                    return self._reader.describe(sample, f"it does not decode: {reason}")
        return f"DALI failed: {error}"
