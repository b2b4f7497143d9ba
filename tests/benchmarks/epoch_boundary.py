"""How long training waits for data where one epoch ends and the next begins, with a short validation between them.

    python -m tests.benchmarks.epoch_boundary --data SHARDS

The data come through the class that training uses. In the place of the network stands a device that takes a stated time
a batch and leaves the host idle, as a GPU does. Each epoch's order is sorted for as many images as are stated, since
that takes time, too.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray

from jobs.cli.command import run
from jobs.cli.device import processor
from jobs.training.data import WorkerData
from model.recipe import Recipe
from model.training import Worker
from pipeline.dataset.info import write_json
from pipeline.loading.plan import Plan
from tests.benchmarks.contest import check_least


@dataclasses.dataclass(frozen=True)
class BoundaryConfig:
    data: Path
    """A shard set on a local disk."""
    batch_size: int = 128
    step_seconds: float = 0.1
    """What the device takes for a batch."""
    validation_images: int = 128
    """How many are looked at between two epochs."""
    plan_images: int = 1_281_167
    """Of the plan that is sorted for each epoch: ImageNet's."""
    epochs: int = 6
    json: Path | None = None
    """Also write the figures to this file."""

    def __post_init__(self) -> None:
        check_least(self, "epochs", least=2)


def boundaries(config: BoundaryConfig) -> list[dict[str, float]]:
    """Of each boundary, in seconds: from the last step's end to the next epoch's first batch, and its parts."""
    recipe = Recipe(batch_size=config.batch_size, epochs=config.epochs)
    data = WorkerData(config.data, recipe, Worker(0, 1, torch.device("cpu")), config.batch_size, os.cpu_count() or 1)
    large = Plan(config.plan_images, config.batch_size, 0, np.eye(3))
    order = Plan.order

    def sorted_as_imagenet(self: Plan, epoch: int) -> NDArray[np.int64]:
        if self is not large:
            large.order(epoch)
        return order(self, epoch)

    def on_device(batches: Iterator[object]) -> None:
        for _ in batches:
            time.sleep(config.step_seconds)

    found = []
    with mock.patch.object(Plan, "order", sorted_as_imagenet):
        ended = validated = 0.0
        for epoch in range(config.epochs):
            steps = data.training(epoch, 0)
            next(steps)
            if epoch:
                first = time.perf_counter()
                found.append(
                    {"validation_s": validated - ended, "data_wait_s": first - validated, "all_s": first - ended}
                )
            on_device(steps)
            ended = time.perf_counter()
            validation = data.validation()
            on_device(itertools.islice(validation, -(-config.validation_images // config.batch_size)))
            validated = time.perf_counter()
    return found


def main(config: BoundaryConfig) -> None:
    found = boundaries(config)
    middle = {name: statistics.median(one[name] for one in found) for name in found[0]}
    print(f"{processor()}, {os.cpu_count()} cores; batches of {config.batch_size}, {config.step_seconds:g} s each")
    print(f"from the last step's end to the next epoch's first batch: {middle['all_s']:.3f} s, medians of {len(found)}")
    print(f"  validation of {config.validation_images} images: {middle['validation_s']:.3f} s")
    print(f"  waiting for the first batch: {middle['data_wait_s']:.3f} s")
    if config.json is not None:
        write_json(config.json, {"median": middle, "boundaries": found})


if __name__ == "__main__":
    run(BoundaryConfig, main)
