"""--workers: a number, or a range within which it may change."""

from __future__ import annotations

import dataclasses
import re
from typing import Annotated

import tyro


@dataclasses.dataclass(frozen=True)
class Workers:
    """How many processes train; as many as the cluster has room for, where the two differ.

    Raises:
        ValueError: if there are none, or more at least than at most.
    """

    min_workers: int
    """Below it, training waits."""
    max_workers: int
    """Beyond it, room is left to others."""

    def __post_init__(self) -> None:
        if self.min_workers < 1:
            raise ValueError(f"--workers is {self}; it must be at least 1")
        if self.min_workers > self.max_workers:
            raise ValueError(
                f"--workers is {self}; the smaller number comes first, as {self.max_workers}:{self.min_workers}"
            )

    @classmethod
    def parse(cls, text: str) -> Workers:
        """Reads "4" or "2:4"."""
        match = re.fullmatch(r"(\d+)(?::(\d+))?", text)
        if match is None:
            raise ValueError(f"--workers is {text!r}; it must be a number, or two as 2:4")
        return cls(int(match[1]), int(match[2] or match[1]))

    @property
    def elastic(self) -> bool:
        """Whether their number may change while they train."""
        return self.min_workers < self.max_workers

    def __str__(self) -> str:
        numbers = dict.fromkeys((self.min_workers, self.max_workers))
        return ":".join(map(str, numbers))

    def check_more_than(self, batch_size: int) -> None:
        """Raises ValueError if a worker would have no image of a global batch.

        The plan's parts of a batch may differ by one image, so that any number of workers up to its size will do.
        """
        if self.max_workers > batch_size:
            raise ValueError(
                f"{self.max_workers} workers cannot share a batch of {batch_size}: use fewer --workers or a larger "
                "--batch-size"
            )

    def check_single_images(self, batch_size: int, micro_batch: int) -> None:
        """Raises ValueError if some worker's last micro-batch would be one image, which has no variance."""
        for count in range(self.min_workers, self.max_workers + 1):
            for part in {batch_size // count, -(-batch_size // count)}:
                if 1 in (part, micro_batch, part % micro_batch):
                    raise ValueError(
                        f"batch normalization needs two images, and of {count} worker(s) one would have {part} of a "
                        f"batch of {batch_size}, the last alone: use another --batch-size, --micro-batch or --workers"
                    )


def choose_workers(
    workers: Annotated[
        str | None, tyro.conf.arg(metavar="N|MIN:MAX", help_behavior_hint="(default: one per GPU, or one on CPU)")
    ] = None,
) -> Workers | None:
    """One number, or a range.

    Args:
        workers: How many processes train. 2:4: from two to four, as nodes come and go, each time from the last
            checkpoint, with the same batches.
    """
    return None if workers is None else Workers.parse(workers)


WorkersChoice = Annotated[Workers | None, tyro.conf.arg(name="", constructor=choose_workers)]
