"""Training at a stretch, and stopped and resumed at five random steps: the same weights, bit for bit, at each of them.

The network, the loader and the checkpoints are those of a run; only Ray is not there. Each part of the stopped run is
made of new objects, after everything that draws random numbers has been set to something else.
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import distributed

from jobs.training import checkpoint
from jobs.training.checkpoint import MODEL_FILE, OPTIMIZER_FILE
from jobs.training.run_state import RunFingerprint
from jobs.training.worker import WorkerData, make_network
from model.metrics import LabeledImages, Score
from model.recipe import RECIPES, Recipe
from model.training import StepAction, StoppedError, Trainer, Worker
from pipeline.dataset.info import read_dataset
from tests.ranks import run_ranks

BATCH, EPOCHS, STOPS = 9, 3, 5
CPU = torch.device("cpu")


def random_steps(seed: int, epochs: int, steps: int) -> list[tuple[int, int]]:
    """Where to stop, (epoch, steps completed of it), in order; at an epoch's end there is a checkpoint anyway."""
    places = [(epoch, step) for epoch in range(epochs) for step in range(1, steps)]
    chosen = np.random.default_rng(seed).choice(len(places), STOPS, replace=False)
    return [places[number] for number in sorted(chosen)]


def checkpoint_at(folder: Path, place: tuple[int, int]) -> Path:
    return folder / "checkpoint_{}_{}".format(*place)


class Stops:
    """Writes a checkpoint at some steps, notes its digest, and leaves there if it shall.

    Args:
        folder: holds the last checkpoint, and in `digests` a line for each.
    """

    def __init__(
        self, folder: Path, identity: RunFingerprint, worker: Worker, wishes: dict[tuple[int, int], StepAction]
    ) -> None:
        self._folder, self._identity, self._worker, self._wishes = folder, identity, worker, wishes

    def on_step_end(self, trainer: Trainer, batches: Sequence[LabeledImages], own_seconds: float) -> StepAction:
        return self._wishes.get((trainer.progress.epoch, trainer.progress.step), StepAction.NOTHING)

    def on_log(self, trainer: Trainer, score: Score, images_per_s: float, data_wait: float) -> None: ...

    def on_epoch_end(self, trainer: Trainer, row: dict[str, Any]) -> None: ...

    def on_validation_batch(self, trainer: Trainer) -> StepAction:
        return StepAction.NOTHING

    def checkpoint(self, trainer: Trainer) -> None:
        place = (trainer.progress.epoch, trainer.progress.step)
        # Of the epochs' ends only the last is looked at.
        if self._worker.rank == 0 and (place in self._wishes or trainer.progress.finished):
            folder = checkpoint_at(self._folder, place)
            folder.mkdir(parents=True)
            checkpoint.save(folder, trainer, self._identity)
            files = [folder / name for name in (MODEL_FILE, OPTIMIZER_FILE)]
            digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
            # Half a gigabyte each.
            for before in set(self._folder.glob("checkpoint_*")) - {folder}:
                shutil.rmtree(before)
            with (self._folder / "digests").open("a") as noted:
                noted.write(f"{place} {' '.join(digests)}\n")
        if self._worker.world > 1:
            distributed.barrier()

    def on_warning(self, trainer: Trainer, warning: str) -> None: ...


def train(shards: Path, folder: Path, recipe: Recipe, worker: Worker, wishes: dict, start: Path | None) -> None:
    """Trains from the start, or from a checkpoint, to the end or to where it shall stop."""
    for scramble in (random.seed, np.random.seed, torch.manual_seed):
        scramble(len(wishes) + 77)
    data = WorkerData(shards, recipe, worker, micro_batch=BATCH, threads=1)
    identity = RunFingerprint.of(recipe, data.info)
    trainer = Trainer(make_network(identity).to(memory_format=torch.channels_last), recipe, worker, log_every=4)
    if start is not None:
        checkpoint.restore(start, trainer, identity)
    trainer.fit(data, Stops(folder, identity, worker, wishes))


def stretch_and_stops(rank: int, world: int, shards: Path, folder: Path, places: list[tuple[int, int]]) -> None:
    """The same training twice, as one of `world` workers: checkpoints in folder/stretch and folder/stopped."""
    torch.set_num_threads(1)
    worker = Worker(rank, world, CPU)
    recipe = dataclasses.replace(RECIPES["default"], batch_size=BATCH, epochs=EPOCHS)
    train(shards, folder / "stretch", recipe, worker, dict.fromkeys(places, StepAction.CHECKPOINT), None)
    start = None
    for place in places:
        with pytest.raises(StoppedError):
            train(shards, folder / "stopped", recipe, worker, {place: StepAction.STOP}, start)
        start = checkpoint_at(folder / "stopped", place)
    train(shards, folder / "stopped", recipe, worker, {}, start)


# Of three numbers the sum depends on their order, as that of two does not.
@pytest.mark.long
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_a_run_stopped_and_resumed_at_random_steps_has_the_same_weights(
    workers: int, shard_set: Path, tmp_path: Path
) -> None:
    steps = read_dataset(shard_set).splits["train"].samples // BATCH
    places = random_steps(workers, EPOCHS, steps)
    run_ranks(workers, tmp_path, stretch_and_stops, shard_set, tmp_path, places)
    stretch, stopped = ((tmp_path / kind / "digests").read_text().splitlines() for kind in ("stretch", "stopped"))
    assert stopped == stretch
    assert [line.partition(")")[0] + ")" for line in stretch] == [str(place) for place in [*places, (EPOCHS, 0)]]
    # The weights move, so that equal ones mean something.
    assert len({line.split()[2] for line in stretch}) == STOPS + 1
