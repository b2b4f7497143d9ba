"""What executes a plan: JPEG bytes or pixels and the plan's numbers in, batches on the device out.

DALI draws nothing and shuffles nothing. `external_source` hands it each image's bytes, and it decodes the image whole;
images that are decoded already come as they are. What comes out is uint8 on the device. There a window is a view, which
`finish.py` mirrors and from which it subtracts the mean, the colour shift folded in. CPU and GPU run the same code.

Whole, because decoding just the window (`decoders.image_crop`) takes a third longer on a CPU, 0.29 ms for an image of
21 KB instead of 0.22: of the entropy coding it can skip next to nothing, and it goes line by line.
"""

from __future__ import annotations

import collections
import dataclasses
import io
import os
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import Pipeline, fn, types
from PIL import Image
from torch import Tensor

from pipeline.dataset import DatasetError, ImageError
from pipeline.decode import ImageError as NoImageError
from pipeline.decode import refuse_other_size
from pipeline.finish import Finisher
from pipeline.pixel_stage import PixelReader
from pipeline.plan import CROP_SIZE, Views
from pipeline.rgb_stats import MAX_LEVEL, RgbStatistics
from pipeline.split_reader import SplitReader

# DALI leaves host memory of less than 32 MB to malloc, which gives the images of a batch back to the system each time:
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
        source: called once a batch; returns its images, or raises StopIteration at the end. What it returns must stay
            as it is until the batch is out.
        batch_size: the largest batch.
        threads: decoder threads on the host.
        device: "cpu" or "gpu"; the operators' only difference.
        device_id: the GPU's index among those this process sees, or None on CPU.
        pixels: images come as uint8 [256, 256, 3], not as JPEG bytes.
    """
    on_gpu = device == "gpu"
    pipeline = Pipeline(batch_size, threads, device_id, prefetch_queue_depth=PREFETCH)
    with pipeline:
        (given,) = fn.external_source(
            source=source, num_outputs=1, dtype=types.UINT8, ndim=3 if pixels else 1, no_copy=True
        )
        if pixels:
            # By DALI's threads, from a mapped file that may be on a disk.
            output = fn.copy(given.gpu() if on_gpu else given, device=device)
        else:
            output = fn.decoders.image(
                given,
                device="mixed" if on_gpu else "cpu",
                output_type=types.RGB,
                # libjpeg-turbo, which decodes on the CPU, interpolates chroma; nvJPEG does so only when asked.
                jpeg_fancy_upsampling=True,
                # The stored pixels are what is counted, verified and read by others; DALI would turn them by EXIF.
                adjust_orientation=False,
            )
        pipeline.set_outputs(output)
    return pipeline


def bare_decoder(
    image: Callable[[int], NDArray[np.uint8]], views: Iterator[Views], batch_size: int, threads: int, gpu: bool
) -> Pipeline:
    """`define`, built, that decodes each view's image and no more, to be timed.

    Args:
        image: gives a sample's JPEG.
    """
    in_flight: collections.deque[Any] = collections.deque(maxlen=2 * PREFETCH)

    def source() -> Any:
        in_flight.append(([image(sample) for sample in next(views).samples],))
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
        self._mean = np.array(rgb.mean) * MAX_LEVEL
        self._device = device
        self._views: Iterator[Views] = iter(())
        self._substitute: Substitute | None = None
        # With each batch under way, what DALI reads of it without a copy of its own.
        self._in_flight: collections.deque[tuple[Views, list[NDArray[np.uint8]]]] = collections.deque()
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
            isinstance(reader, PixelReader),
        )
        self._finisher = Finisher(device, threads)
        self._pipeline.build()

    def _next(self) -> tuple[list[NDArray[np.uint8]]]:
        views, images = self._read(next(self._views))
        self._in_flight.append((views, images))
        return (images,)

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
            self._refuse_other_size(sample, image)
        return dataclasses.replace(views, samples=np.array(samples, np.int64)), images

    def _refuse_other_size(self, sample: int, image: NDArray[np.uint8]) -> None:
        """Raises LoaderError for a JPEG whose header claims another size; DALI would take memory for any."""
        if isinstance(self._reader, PixelReader):
            return
        try:
            refuse_other_size(image)
        except NoImageError as error:
            raise LoaderError(self._reader.describe(sample, str(error))) from error

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
                decoded = torch.from_dlpack(output.as_tensor())
            except StopIteration:
                self._rewind()
                return
            except RuntimeError as error:
                raise LoaderError(self._diagnose(str(error))) from error
            done, _ = self._in_flight.popleft()
            # Views, not copies.
            windows = [
                image[top : top + CROP_SIZE, left : left + CROP_SIZE]
                for image, (top, left) in zip(decoded, done.crops.tolist(), strict=True)
            ]
            images = self._finisher.finish(windows, done.flips, (self._mean - done.shifts).astype(np.float32))
            # DALI takes its buffer back with the last reference.
            del output, decoded, windows
            yield Batch(images, self._finisher.labels(self._reader.labels[done.samples]), done.samples)

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

    def _diagnose(self, error: str) -> str:
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
