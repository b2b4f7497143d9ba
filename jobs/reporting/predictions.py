"""What a trained network predicts for a shard set: most probable classes, nearest images by fc7, confusions."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from jobs.cli.cores import cores
from jobs.cli.progress import counted
from model.alexnet import AlexNet
from pipeline.dataset.info import DatasetInfo
from pipeline.dataset.split_reader import SplitReader
from pipeline.images.rgb_stats import RgbStatistics
from pipeline.loading.loader import Batch, Loader
from pipeline.loading.plan import center_crops

IMAGES = 10_000  # Of each split, at most
BATCH_SIZE = 100
SHOWN, TOP = 12, 5  # Validation images, and each one's most probable classes
QUERIES = 5  # Validation images whose nearest training images are shown
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


@torch.no_grad()
def predict(network: AlexNet, rgb: RgbStatistics, device: torch.device, data: Path, info: DatasetInfo) -> Predictions:
    """Runs a network on the first images of each split of a shard set.

    Args:
        network: in evaluation mode, on the device.
        rgb: the training run's statistics: their mean is part of what was learned.
        device: where the loader puts the images.
        data: the shard set, of the network's classes.
        info: its description.
    """

    def batches(reader: SplitReader) -> Iterator[Batch]:
        samples = np.arange(min(IMAGES, len(reader)))
        loader = Loader(reader, rgb, BATCH_SIZE, device, cores())
        return counted(loader.run(center_crops(samples).chunks(BATCH_SIZE)), len(samples))

    val, train = (SplitReader(data, info, split) for split in ("val", "train"))
    logits: list[torch.Tensor] = []
    queries = torch.empty(0)
    for batch in batches(val):
        hidden = network.last_hidden(batch.images)
        logits.append(network.fc8(hidden).float().cpu())
        queries = queries if len(queries) else hidden[:QUERIES].float()
    # A batch's distances are kept, not its outputs.
    distances = [torch.cdist(queries, network.last_hidden(batch.images).float()).cpu() for batch in batches(train)]
    probabilities = F.softmax(torch.cat(logits), dim=1)
    top = probabilities[:SHOWN].topk(min(TOP, probabilities.shape[1]), dim=1)
    whole = torch.cat(distances, dim=1)
    return Predictions(
        val_labels=val.labels[: len(probabilities)].astype(np.int64),
        predicted=probabilities.argmax(dim=1).numpy(),
        top=[list(zip(*row, strict=True)) for row in zip(top.indices.tolist(), top.values.tolist(), strict=True)],
        nearest=whole.topk(min(NEAREST, whole.shape[1]), largest=False).indices.numpy(),
        train_images=whole.shape[1],
    )


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
