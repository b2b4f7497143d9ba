"""What a trained network says of a shard set: the most probable classes, the nearest images by fc7, the confusions."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from jobs.progress import Progress
from model.alexnet import AlexNet
from pipeline.dataset import DatasetInfo
from pipeline.loader import Batch, Loader
from pipeline.plan import center_crops
from pipeline.rgb_stats import RgbStatistics
from pipeline.split_reader import SplitReader

TOP = 5
NEAREST = 6  # The paper's figure 4 (right)


@dataclasses.dataclass(frozen=True)
class Answers:
    """Of the first images of each split, which lies in a random order: a fair sample; by the centre crop."""

    val_labels: NDArray[np.int64]
    """[v]: the true classes."""
    predicted: NDArray[np.int64]
    """[v]: the most probable classes."""
    top: NDArray[np.int64]
    """[shown, 5]: the five most probable classes of the first images, falling."""
    probabilities: NDArray[np.float32]
    """[shown, 5]: theirs."""
    nearest: NDArray[np.int64]
    """[queries, 6]: the training samples whose fc7 is nearest to that of the first validation images, rising."""
    train_images: int
    """Among how many training images the nearest were sought."""


@dataclasses.dataclass(frozen=True)
class Confusion:
    """How one class fares."""

    label: int
    images: int
    wrong: int
    mistaken_for: int
    """The class that it is most often taken for."""
    as_that: int
    """In how many images."""


class Asker:
    """Shows a network the images of a shard set.

    Args:
        network: in evaluation mode, on the device.
        rgb: the training run's statistics, whose mean is part of what was learnt.
        batch_size: images at a time.
        device: where the network is.
        threads: decoder threads.
    """

    def __init__(
        self, network: AlexNet, rgb: RgbStatistics, batch_size: int, device: torch.device, threads: int
    ) -> None:
        self._network, self._rgb, self._batch_size = network, rgb, batch_size
        self._device, self._threads = device, threads

    @torch.no_grad()
    def ask(self, data: Path, info: DatasetInfo, images: int, shown: int, queries: int) -> Answers:
        """Looks at the first `images` images of each split.

        Args:
            data: the shard set, of the network's classes.
            info: its description.
            images: at most so many of each split.
            shown: of how many validation images the five most probable classes are wanted.
            queries: of how many the nearest training images are.
        """
        val = SplitReader(data, info, "val")
        logits: list[torch.Tensor] = []
        codes: list[torch.Tensor] = []
        for batch in self._batches(val, images):
            hidden = self._network.last_hidden(batch.images)
            logits.append(self._network.fc8(hidden).float().cpu())
            if sum(len(code) for code in codes) < queries:
                codes.append(hidden[:queries].float())
        probabilities = F.softmax(torch.cat(logits), dim=1)
        top = probabilities[:shown].topk(min(TOP, probabilities.shape[1]), dim=1)
        train = SplitReader(data, info, "train")
        return Answers(
            val_labels=val.labels[: len(probabilities)].astype(np.int64),
            predicted=probabilities.argmax(dim=1).numpy(),
            top=top.indices.numpy(),
            probabilities=top.values.numpy(),
            nearest=self._nearest(torch.cat(codes)[:queries], train, images),
            train_images=min(images, len(train)),
        )

    def _nearest(self, codes: torch.Tensor, train: SplitReader, images: int) -> NDArray[np.int64]:
        """By Euclidean distance of fc7's outputs (section 6.1); a batch's distances are kept, not its outputs."""
        distances = []
        for batch in self._batches(train, images):
            distances.append(torch.cdist(codes, self._network.last_hidden(batch.images).float()).cpu())
        whole = torch.cat(distances, dim=1)
        return whole.topk(min(NEAREST, whole.shape[1]), largest=False).indices.numpy()

    def _batches(self, reader: SplitReader, images: int) -> Iterator[Batch]:
        samples = np.arange(min(images, len(reader)))
        loader = Loader(reader, self._rgb, self._batch_size, self._device, self._threads)
        with Progress(len(samples), f"{reader.split} images") as progress:
            for batch in loader.run(center_crops(samples).chunks(self._batch_size)):
                yield batch
                progress.advance(len(batch))


def confusions(labels: NDArray[np.int64], predicted: NDArray[np.int64], classes: int) -> list[Confusion]:
    """Every class that has images, the one with the largest part of them wrong first.

    Args:
        labels: [n] the true classes.
        predicted: [n] the most probable ones.
        classes: how many there are.
    """
    counts = np.bincount(labels * classes + predicted, minlength=classes * classes).reshape(classes, classes)
    found = []
    for label in np.flatnonzero(counts.sum(axis=1)):
        row = counts[label].copy()
        images, right = int(row.sum()), int(row[label])
        row[label] = 0
        found.append(Confusion(int(label), images, images - right, int(row.argmax()), int(row.max())))
    return sorted(found, key=lambda c: (-c.wrong / c.images, -c.as_that, c.label))
