"""What a trained network predicts for a shard set: most probable classes, nearest images by fc7, confusions."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from jobs.cli.progress import counted
from model.alexnet import AlexNet
from pipeline.dataset.info import DatasetInfo
from pipeline.dataset.split_reader import SplitReader
from pipeline.images.rgb_stats import RgbStatistics
from pipeline.loading.loader import Batch, Loader
from pipeline.loading.plan import center_crops

TOP = 5
NEAREST = 6  # The paper's figure 4 (right)


@dataclasses.dataclass(frozen=True)
class Predictions:
    """By the center crop, for the first images of each split: a fair sample, since a split's order is random."""

    val_labels: NDArray[np.int64]
    """[v]: the true classes."""
    predicted: NDArray[np.int64]
    """[v]: the most probable classes."""
    top: list[list[tuple[int, float]]]
    """Of each of the first images, the five most probable classes and their probabilities, falling."""
    nearest: NDArray[np.int64]
    """[queries, 6]: the training samples whose fc7 is nearest to that of the first validation images, rising."""
    train_images: int
    """Among how many training images the nearest were searched."""


@dataclasses.dataclass(frozen=True)
class Confusion:
    """The errors of one class."""

    label: int
    images: int
    wrong: int
    mistaken_for: int
    """The class that it is most often taken for."""
    as_that: int
    """In how many images."""


@dataclasses.dataclass(frozen=True)
class Predictor:
    """Runs a network on the images of a shard set."""

    network: AlexNet
    """In evaluation mode, on the device."""
    rgb: RgbStatistics
    """The training run's statistics: their mean is part of what was learned."""
    batch_size: int
    device: torch.device
    threads: int
    """Decoder threads."""

    @torch.no_grad()
    def predict(self, data: Path, info: DatasetInfo, images: int, shown: int, queries: int) -> Predictions:
        """Runs the first `images` images of each split.

        Args:
            data: the shard set, of the network's classes.
            info: its description.
            images: at most so many of each split.
            shown: return the five most probable classes of so many validation images.
            queries: return the nearest training images of so many validation images.
        """
        logits: list[torch.Tensor] = []
        codes: list[torch.Tensor] = []
        val, train = (SplitReader(data, info, split) for split in ("val", "train"))
        for batch in self._batches(val, images):
            hidden = self.network.last_hidden(batch.images)
            logits.append(self.network.fc8(hidden).float().cpu())
            if sum(len(code) for code in codes) < queries:
                codes.append(hidden[:queries].float())
        probabilities = F.softmax(torch.cat(logits), dim=1)
        top = probabilities[:shown].topk(min(TOP, probabilities.shape[1]), dim=1)
        return Predictions(
            val_labels=val.labels[: len(probabilities)].astype(np.int64),
            predicted=probabilities.argmax(dim=1).numpy(),
            top=[list(zip(*row, strict=True)) for row in zip(top.indices.tolist(), top.values.tolist(), strict=True)],
            nearest=self._nearest(torch.cat(codes)[:queries], train, images),
            train_images=min(images, len(train)),
        )

    def _nearest(self, codes: torch.Tensor, train: SplitReader, images: int) -> NDArray[np.int64]:
        """By Euclidean distance of fc7's outputs (section 6.1); a batch's distances are kept, not its outputs."""
        distances = [
            torch.cdist(codes, self.network.last_hidden(batch.images).float()).cpu()
            for batch in self._batches(train, images)
        ]
        whole = torch.cat(distances, dim=1)
        return whole.topk(min(NEAREST, whole.shape[1]), largest=False).indices.numpy()

    def _batches(self, reader: SplitReader, images: int) -> Iterator[Batch]:
        samples = np.arange(min(images, len(reader)))
        loader = Loader(reader, self.rgb, self.batch_size, self.device, self.threads)
        return counted(loader.run(center_crops(samples).chunks(self.batch_size)), len(samples))


def confusions(labels: NDArray[np.int64], predicted: NDArray[np.int64], classes: int) -> list[Confusion]:
    """Every class that has images, those with the highest error first.

    Args:
        labels: [n] the true classes.
        predicted: [n] the most probable ones.
        classes: how many there are.
    """
    counts = np.bincount(labels * classes + predicted, minlength=classes * classes).reshape(classes, classes)
    images = counts.sum(axis=1)
    np.fill_diagonal(counts, 0)
    wrong, mistaken_for, as_that = counts.sum(axis=1), counts.argmax(axis=1), counts.max(axis=1)
    order = np.lexsort((-as_that, -wrong / np.maximum(images, 1)))
    columns = (order, *(column[order] for column in (images, wrong, mistaken_for, as_that)))
    return [Confusion(*row) for row in np.stack(columns, axis=1).tolist() if row[1]]
