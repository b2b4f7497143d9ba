"""What `loader_speed` asks of every loader that it times."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from jobs.cli.command import GpuChoice
from jobs.cli.device import choose_device
from pipeline.dataset.info import read_dataset
from pipeline.dataset.split_reader import SplitReader
from pipeline.loading.graph import GpuDecoder
from pipeline.loading.plan import CROP_SIZE, Plan, color_matrix
from tests.benchmarks.contest import check_least
from tests.benchmarks.loader_sets import open_train

BATCH = 128
SHAPE = (BATCH, 3, CROP_SIZE, CROP_SIZE)


@dataclasses.dataclass(frozen=True)
class PeerConfig:
    name: str
    """One of PEERS."""
    data: Path
    """A shard set on a local disk; its training images are read."""
    work: Path
    """Folder for what the loaders read."""
    cores: int = 1
    """Threads or worker processes."""
    gpu: GpuChoice = False
    """Give batches on a GPU; ours and DALI's can."""
    gpu_decoder: GpuDecoder = "cuda"
    """What decodes JPEGs there."""
    seconds: float = 6.0
    """Measure for at least so long."""
    prepare: bool = False
    """Only make what this loader reads."""

    def __post_init__(self) -> None:
        check_least(self, "cores")
        check_least(self, "seconds", least=0.1)

    @functools.cached_property
    def reader(self) -> SplitReader:
        return open_train(self.data)

    @functools.cached_property
    def device(self) -> torch.device:
        return choose_device(self.gpu)

    @functools.cached_property
    def mean(self) -> list[float]:
        """In gray levels."""
        return [255 * value for value in read_dataset(self.data).rgb.mean]

    @functools.cached_property
    def plan(self) -> Plan:
        return Plan(len(self.reader), BATCH, 0, color_matrix(read_dataset(self.data).rgb))


Batches = Iterator[Tensor | None]
"""One pass: a tensor a batch, or None for one that is decoded and no more."""
