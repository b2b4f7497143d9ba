"""The epoch plan: (seed, epoch, position) -> sample, crop, flip, color. Pure: no state, no files, no clock.

Every draw comes from a counter-based generator keyed by (seed, epoch, sample), so what a step sees does not depend on
the number of workers, on batch cuts, on the device, or on where a run was stopped and resumed.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from pipeline.images.decode import IMAGE_SIZE
from pipeline.images.rgb_stats import MAX_LEVEL, RgbStatistics
from pipeline.loading.philox import philox

CROP_SIZE = 227  # The paper says 224 (section 4.1); see model/alexnet.py for why the input is 227.
CROP_OFFSETS = IMAGE_SIZE - CROP_SIZE + 1  # 30 positions in each direction
CENTER = (IMAGE_SIZE - CROP_SIZE) // 2
LAST = CROP_OFFSETS - 1
# Section 4.1: four corners and the center, then the same flipped; top, left, flip of each.
TEN_CROPS = tuple(
    (top, left, flip)
    for flip in (False, True)
    for top, left in ((0, 0), (0, LAST), (LAST, 0), (LAST, LAST), (CENTER, CENTER))
)
COLOR_STD = 0.1  # section 4.1: alpha ~ N(0, 0.1)

# The last word of the generator's counter keeps the streams of one (seed, epoch, sample) apart.
_ORDER, _CROP, _COLOR = 0, 1, 2
_WORDS = 2.0**32
_PIECE = 2**15


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """How each of n images is augmented."""

    crops: NDArray[np.int64]
    """[n, 2]: top and left of the 227 x 227 crop, 0..29."""
    flips: NDArray[np.bool_]
    """[n]: flipped left to right."""
    shifts: NDArray[np.float32]
    """[n, 3]: PCA color jitter, added to r, g, b in gray levels (0..255)."""

    def __len__(self) -> int:
        return len(self.flips)


@dataclasses.dataclass(frozen=True)
class PlannedBatch:
    """Which samples a batch holds, and how they are augmented."""

    samples: NDArray[np.int64]
    """[n]: rows of the split's sample index."""
    draw: Callable[[NDArray[np.int64]], Augmentation]
    """Gives the augmentation of any of the samples. Not called here: it costs more than all else in planning, and
    belongs into the thread that reads the images."""

    def __len__(self) -> int:
        return len(self.samples)

    def chunks(self, size: int) -> Iterator[PlannedBatch]:
        """The samples in order, `size` at a time; the last chunk may be shorter."""
        for start in range(0, len(self), size):
            yield PlannedBatch(self.samples[start : start + size], self.draw)


def merged(planned: Iterable[PlannedBatch], limit: int) -> Iterator[tuple[PlannedBatch, list[int]]]:
    """Joins consecutive batches that share their `draw`. Those of one epoch do.

    Args:
        limit: the most samples of a joined batch; a longer one stays as it is.

    Yields:
        A joined batch, and the lengths of those it holds.
    """
    batches: list[PlannedBatch] = []
    for batch in planned:
        full = sum(map(len, batches)) + len(batch) > limit
        if batches and (full or batch.draw is not batches[0].draw):
            yield _joined(batches)
            batches = []
        batches.append(batch)
    if batches:
        yield _joined(batches)


def _joined(batches: list[PlannedBatch]) -> tuple[PlannedBatch, list[int]]:
    samples = np.concatenate([batch.samples for batch in batches])
    return PlannedBatch(samples, batches[0].draw), [len(batch) for batch in batches]


@dataclasses.dataclass(frozen=True)
class Plan:
    """The training plan of one data set.

    Raises:
        ValueError: if the set holds less than one global batch.
    """

    samples: int
    """How many training samples there are."""
    batch_size: int
    """The global batch: images per step over all workers."""
    seed: int
    """Same seed, same plan."""
    color: NDArray[np.float64]
    """[3, 3]: takes alpha to the shift of r, g, b in gray levels; see `color_matrix`."""

    def __post_init__(self) -> None:
        if self.samples < self.batch_size:
            raise ValueError(
                f"the set has {self.samples} training images, fewer than one batch of {self.batch_size}: "
                f"use --batch-size {max(self.samples, 1)} or less"
            )

    @property
    def steps(self) -> int:
        """Whole batches in an epoch."""
        return self.samples // self.batch_size

    @property
    def dropped(self) -> int:
        """How many samples an epoch leaves out: its tail shorter than a batch, another one each epoch."""
        return self.samples - self.steps * self.batch_size

    def order(self, epoch: int) -> NDArray[np.int64]:
        """The permutation of all samples for one epoch, int64 [samples]."""
        keys = np.empty(self.samples, np.uint64)
        # A piece at a time: the generator's temporaries then stay in the cache, and small whatever the set's size.
        for start in range(0, self.samples, _PIECE):
            stop = min(start + _PIECE, self.samples)
            words = philox(np.arange(start, stop), (0, epoch, _ORDER), self.seed)
            keys[start:stop] = (words[0] << np.uint64(32)) | words[1]
        # Sorting random keys depends on nothing but these words; numpy's shuffles may change between versions.
        return np.argsort(keys, kind="stable")

    def epoch(
        self,
        epoch: int,
        first_step: int = 0,
        rank: int = 0,
        world: int = 1,
        order: NDArray[np.int64] | None = None,
    ) -> Iterator[PlannedBatch]:
        """Each step's part for one rank, from `first_step` to the epoch's end.

        Args:
            order: `order(epoch)`, where it is known already.
        """
        if order is None:
            order = self.order(epoch)
        mine = rank_slice(self.batch_size, rank, world)
        draw = functools.partial(self.augmentation, epoch)
        for step in range(first_step, self.steps):
            start = step * self.batch_size
            yield PlannedBatch(order[start + mine.start : start + mine.stop], draw)

    def endless(self) -> Iterator[PlannedBatch]:
        """One epoch after another, for whoever measures."""
        for epoch in itertools.count():
            yield from self.epoch(epoch)

    def augmentation(self, epoch: int, samples: NDArray[np.int64]) -> Augmentation:
        """The crop, flip and color jitter of each of some samples (int64 [n]) in one epoch."""
        words = philox(samples, (0, epoch, _CROP), self.seed)
        # Scaling a 32-bit word to 30 positions is uneven by less than 1e-8.
        crops = (words[:2] * np.uint64(CROP_OFFSETS)) >> np.uint64(32)
        alpha = COLOR_STD * _normal(philox(samples, (0, epoch, _COLOR), self.seed))[:3]
        # Written out: a matrix product rounds by the number of samples, which is no part of the plan.
        shifts = [row[0] * alpha[0] + row[1] * alpha[1] + row[2] * alpha[2] for row in self.color]
        return Augmentation(
            crops=crops.T.astype(np.int64),
            flips=words[2] >= np.uint64(2**31),
            shifts=np.stack(shifts, axis=1).astype(np.float32),
        )


def _normal(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Box-Muller: uint64 [4, n] of 32-bit words -> four standard normal rows [4, n]."""
    uniform = (words.astype(np.float64) + 0.5) / _WORDS
    radius = np.sqrt(-2.0 * np.log(uniform[:2]))
    angle = 2.0 * np.pi * uniform[2:]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])


def color_matrix(rgb: RgbStatistics, reading: str = "eigenvalue") -> NDArray[np.float64]:
    """The [3, 3] matrix from alpha to the shift of r, g, b in gray levels (section 4.1).

    Args:
        rgb: the training set's statistics, RGB in [0, 1].
        reading: "eigenvalue", the paper's [p1 p2 p3][alpha1 lambda1, ...] with RGB in [0, 1]; "std", the 2012 source's
            square roots of the eigenvalues (it names them color_stdevs), about twice that shift; "none", no shift.

    Raises:
        ValueError: for another reading.
    """
    values = np.array(rgb.eigenvalues)
    scales = {"eigenvalue": values, "std": np.sqrt(values), "none": np.zeros(3)}
    if reading not in scales:
        raise ValueError(f"the color reading is {reading!r}; it must be one of {', '.join(scales)}")
    return np.array(rgb.eigenvectors) * scales[reading] * MAX_LEVEL


def rank_slice(total: int, rank: int, world: int) -> range:
    """The rank's part of `total` things, in order: parts differ by at most one and together are the whole."""
    return range(rank * total // world, (rank + 1) * total // world)


def center_crops(samples: NDArray[np.int64]) -> PlannedBatch:
    """The center crop of each sample (int64 [n]), as validation sees it."""
    return PlannedBatch(samples, _center)


def _center(samples: NDArray[np.int64]) -> Augmentation:
    n = len(samples)
    return Augmentation(np.full((n, 2), CENTER), np.zeros(n, np.bool_), np.zeros((n, 3), np.float32))
