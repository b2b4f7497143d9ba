"""One worker's part of a shard set, as the plan gives it out (`model.training.TrainingData`)."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from jobs.training.watchdog import each_limited
from model.recipe import Recipe
from model.training import Worker
from pipeline.dataset.info import SPLITS, read_dataset
from pipeline.dataset.split_reader import SplitReader
from pipeline.loading.graph import GpuDecoder, decoder_name
from pipeline.loading.loader import Batch, Loader
from pipeline.loading.plan import Plan, PlannedBatch, center_crops, color_matrix, rank_slice
from pipeline.staging.decoded_cache import stage_pixels
from pipeline.staging.staging import stage


def local_set(data: str, folder: str | None, stage_as: str, threads: int, splits: Collection[str] = SPLITS) -> Path:
    """Where this node reads the set at a path or URL: in place, or in a folder of its own disk, by `stage` or
    `stage_pixels`, which copies all splits."""
    report = functools.partial(print, flush=True)
    if folder is None:
        return Path(data)
    if stage_as == "pixels":
        return stage_pixels(data, Path(folder), report, threads)
    return stage(data, Path(folder), report, splits)


class WorkerData:
    """Batches of one worker, for training in one stream over all epochs.

    The loader does not stop at an epoch's end: while the network validates, the next epoch's first batches are read and
    decoded.

    Args:
        data: the shard set, or a staged copy of it, on a disk.
        micro_batch: at most this many images a batch.
        threads: decoder threads.
        hang_seconds: in which each batch must come (see `jobs.training.watchdog`).

    Raises:
        DatasetError: if the set cannot be opened.
    """

    def __init__(
        self,
        data: Path,
        recipe: Recipe,
        worker: Worker,
        micro_batch: int,
        threads: int,
        gpu_decoder: GpuDecoder = "cuda",
        hang_seconds: float = 120.0,
    ) -> None:
        self.info = read_dataset(data)
        train, self._val = (SplitReader(data, self.info, split) for split in ("train", "val"))
        self.decoder = decoder_name(train.pixels, worker.device.type == "cuda", gpu_decoder)
        self._plan = Plan(len(train), recipe.batch_size, recipe.seed, color_matrix(self.info.rgb, recipe.color))
        self._epochs = recipe.epochs
        self._worker = worker
        self._micro_batch = micro_batch
        self._hang_seconds = hang_seconds
        self._train_loader, self._val_loader = (
            Loader(reader, self.info.rgb, micro_batch, worker.device, threads, gpu_decoder=gpu_decoder)
            for reader in (train, self._val)
        )
        self._batches: Iterator[Batch] = iter(())
        self._position: tuple[int, int] | None = None  # Epoch and step that `_batches` gives next.

    @property
    def steps(self) -> int:
        """Steps in an epoch."""
        return self._plan.steps

    def training(self, epoch: int, first_step: int) -> Iterator[list[Batch]]:
        """For each step to the epoch's end, this worker's part of the global batch in micro-batches."""
        if self._position != (epoch, first_step):
            batches = self._train_loader.run(self._planned(epoch, first_step))
            self._batches = each_limited(batches, self._hang_seconds)
        part = len(rank_slice(self._plan.batch_size, self._worker.rank, self._worker.world))
        # Whoever stops in the middle begins anew, unless at this very place.
        self._position = None
        for step in range(first_step, self.steps):
            micro_batches = list(itertools.islice(self._batches, -(-part // self._micro_batch)))
            self._position = (epoch, step + 1) if step + 1 < self.steps else (epoch + 1, 0)
            yield micro_batches

    def validation(self) -> Iterator[Batch]:
        """This worker's part of the validation images, each exactly once over all workers."""
        part = rank_slice(len(self._val), self._worker.rank, self._worker.world)
        samples = np.arange(part.start, part.stop)
        batches = self._val_loader.run(center_crops(samples).chunks(self._micro_batch))
        return each_limited(batches, self._hang_seconds)

    def _planned(self, epoch: int, first_step: int) -> Iterator[PlannedBatch]:
        """The micro-batches from a step on to the last epoch's end."""
        with ThreadPoolExecutor(1, "plan") as pool:
            order = pool.submit(self._plan.order, epoch)
            for current in range(epoch, max(self._epochs, epoch + 1)):
                # Sorting ImageNet takes a third of a second, in which no epoch shall wait.
                following = pool.submit(self._plan.order, current + 1)
                parts = self._plan.epoch(current, first_step, self._worker.rank, self._worker.world, order.result())
                for planned in parts:
                    yield from planned.chunks(self._micro_batch)
                order, first_step = following, 0
