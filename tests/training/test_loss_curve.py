"""The loss curve of two and of four workers is one worker's, step by step, but for float32's rounding.

The network, the loader and the loop are those of a run, on photographs, without dropout, which each worker draws for
itself; only Ray is not there.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jobs.training.run_state import RunFingerprint
from jobs.training.worker import WorkerData, make_network
from model.metrics import LabeledImages, Score
from model.recipe import RECIPES
from model.training import StepAction, Trainer, Worker
from pipeline.dataset.info import read_dataset
from tests.ranks import run_ranks

BATCH, MICRO_BATCH, EPOCHS = 9, 2, 2  # Among four workers three, which are two and one, two, two and two.
# A tenth of the paper's rate: at 0.01 so small a batch goes up and down, and rounding grows thirtyfold in ten steps.
RECIPE = dataclasses.replace(RECIPES["default"], batch_size=BATCH, epochs=EPOCHS, dropout=0.0, lr=0.001)
ROUNDING = 5e-5  # One worker that only sums its own images in other parts is up to 7e-6 off.


class Curve:
    """Notes the loss of each step, and the validation's."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.errors: list[float] = []

    def on_step_end(self, trainer: Trainer, batches: Sequence[LabeledImages], own_seconds: float) -> StepAction:
        return StepAction.NOTHING

    def on_log(self, trainer: Trainer, score: Score, images_per_s: float, data_wait: float) -> None:
        self.losses.append(score.loss)
        self.errors.append(score.top1_error)

    def on_epoch_end(self, trainer: Trainer, row: dict[str, Any]) -> None:
        self.losses.append(row["val_loss"])

    def on_validation_batch(self, trainer: Trainer) -> StepAction:
        return StepAction.NOTHING

    def checkpoint(self, trainer: Trainer) -> None: ...

    def on_warning(self, trainer: Trainer, warning: str) -> None: ...


def train(rank: int, world: int, shards: Path, folder: Path) -> None:
    """Trains as one of `world` workers: the curve in folder/WORLD-RANK.json."""
    torch.set_num_threads(1)
    worker = Worker(rank, world, torch.device("cpu"))
    data = WorkerData(shards, RECIPE, worker, micro_batch=BATCH if world == 1 else MICRO_BATCH, threads=1)
    network = make_network(RunFingerprint.of(RECIPE, data.info)).to(memory_format=torch.channels_last)
    curve = Curve()
    Trainer(network, RECIPE, worker, log_every=1).fit(data, curve)
    (folder / f"{world}-{rank}.json").write_text(json.dumps([curve.losses, curve.errors]))


@pytest.mark.slow
def test_two_and_four_workers_have_one_workers_loss_curve(shard_set: Path, tmp_path: Path) -> None:
    curves = {}
    for world in (1, 2, 4):
        folder = tmp_path / f"of-{world}"
        folder.mkdir()
        run_ranks(world, folder, train, shard_set, tmp_path)
        ranks = [json.loads((tmp_path / f"{world}-{rank}.json").read_text()) for rank in range(world)]
        assert all(curve == ranks[0] for curve in ranks)
        curves[world] = ranks[0]
    losses, errors = curves[1]
    steps = read_dataset(shard_set).splits["train"].samples // BATCH
    assert len(losses) == EPOCHS * (steps + 1)
    # The curve goes somewhere, so that equal ones mean equal steps.
    assert np.ptp(losses) > 1000 * ROUNDING
    for world in (2, 4):
        np.testing.assert_allclose(curves[world][0], losses, rtol=ROUNDING)
        assert curves[world][1] == errors
