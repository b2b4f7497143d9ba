"""One rank of the training loop without Ray, for tests/benchmarks/launch_overhead.py:

torchrun --standalone --nproc-per-node 2 -m tests.benchmarks.torchrun_rank --data SHARDS --batch-size 8
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from jobs.cli.command import run
from jobs.training.run_state import RunFingerprint
from jobs.training.worker import WorkerData, make_network
from model.metrics import LabeledImages, Score
from model.recipe import RECIPES
from model.training import StepAction, Trainer, Worker


@dataclasses.dataclass(frozen=True)
class RankConfig:
    data: Path
    """The shard set."""
    batch_size: int
    """Images per step over all ranks."""


class Quiet:
    """Observes training (`model.training.Observer`), says nothing and keeps nothing."""

    def on_step_end(self, trainer: Trainer, batches: Sequence[LabeledImages], own_seconds: float) -> StepAction:
        return StepAction.NOTHING

    def on_log(self, trainer: Trainer, score: Score, images_per_s: float, data_wait: float) -> None: ...

    def on_epoch_end(self, trainer: Trainer, row: dict[str, Any]) -> None: ...

    def on_validation_batch(self, trainer: Trainer) -> StepAction:
        return StepAction.NOTHING

    def checkpoint(self, trainer: Trainer) -> None: ...

    def on_warning(self, trainer: Trainer, warning: str) -> None: ...


class Printer(Quiet):
    """Says each step as jobs/train.py does."""

    def __init__(self, rank: int, steps: int) -> None:
        self._rank, self._steps = rank, steps

    def on_log(self, trainer: Trainer, score: Score, images_per_s: float, data_wait: float) -> None:
        if self._rank == 0:
            step = f"epoch 1/1 step {trainer.progress.step}/{self._steps}"
            print(f"{step}: loss {score.loss:.3f}, {images_per_s:.1f} images/s", flush=True)


def main(config: RankConfig) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    worker = Worker(distributed.get_rank(), distributed.get_world_size(), torch.device("cpu"))
    recipe = dataclasses.replace(RECIPES["default"], batch_size=config.batch_size, epochs=1)
    data = WorkerData(config.data, recipe, worker, -(-config.batch_size // worker.world), threads=1)
    network = make_network(RunFingerprint.of(recipe, data.info)).to(memory_format=torch.channels_last)
    Trainer(network, recipe, worker, log_every=1).fit(data, Printer(worker.rank, data.steps))


if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    run(RankConfig, main)
