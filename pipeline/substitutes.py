"""What training takes for an image that cannot be read, where it shall go on without it: the next of the epoch's order.

The order is the plan's, so the substitute is the same for any number of workers, any batch cut and after any resume. It
is seen through the window, flip and colour that were drawn for the image it stands for, so that where both occur in
one epoch, they are two views.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from pipeline.dataset import DatasetError, ImageError
from pipeline.plan import Plan
from pipeline.split_reader import SplitReader

# Of a random order, so many damaged images in a row are no few bad sectors: a fifth of the set damaged would have it
# once in ten million draws.
MOST_IN_A_ROW = 10


@dataclasses.dataclass(frozen=True, order=True)
class Skip:
    """One image that training went on without."""

    epoch: int
    """From 1."""
    shard: str
    key: str
    reason: str
    """A clause about the image."""
    substitute: str
    """The key of the image taken for it."""

    def __str__(self) -> str:
        return f"epoch {self.epoch}: {self.key} of {self.shard} {self.reason}; {self.substitute} takes its place"


class Substitutes:
    """Finds substitutes in one epoch (`loader.Substitute`).

    Args:
        reader: the training images.
        plan: theirs.
        epoch: which, from 0.
        record: told of each image that is skipped, as it happens.
    """

    def __init__(self, reader: SplitReader, plan: Plan, epoch: int, record: Callable[[Skip], None]) -> None:
        self._reader = reader
        self._plan = plan
        self._epoch = epoch
        self._record = record

    @functools.cached_property
    def _order(self) -> NDArray[np.int64]:
        return self._plan.order(self._epoch)

    def __call__(self, error: ImageError) -> tuple[int, NDArray[np.uint8]]:
        """The next sample of the epoch's order that can be read, and its bytes; after the last comes the first.

        Raises:
            DatasetError: if the next ones cannot be read either.
        """
        position = int(np.flatnonzero(self._order == error.sample)[0])
        for sample in np.roll(self._order, -position)[1:MOST_IN_A_ROW]:
            try:
                image = self._reader.image(sample)
            except ImageError:
                continue  # It is recorded in its own turn.
            self._record(Skip(self._epoch + 1, error.shard, error.key, error.reason, self._reader.key(sample)))
            return int(sample), image
        raise DatasetError(
            f"{error}. Nor can the images be read that follow it in epoch {self._epoch + 1}, so this is no single "
            "image's damage: --skip-corrupt does not go on"
        ) from error
