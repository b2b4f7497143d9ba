"""The loss curve is one worker's, step by step, but for float32's rounding: of four workers, and of workers that come
and go.

The network, the loader and the loop are those of a run, on photographs, without dropout, which each worker draws for
itself.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs.training.checkpoint import committed
from jobs.training.run_state import RunFingerprint
from jobs.training.trackers import EVENTS, read_events
from jobs.training.worker import WorkerData, make_network
from model.recipe import RECIPES
from model.training import StepAction, StoppedError, Trainer, Worker
from tests.model.test_training import Recorder
from tests.observer import assert_trained_once
from tests.ranks import run_ranks
from tests.raylets import NODE, lose, raylets
from tests.runs import BATCH, STEPS, Run, last, plan

EPOCHS, MOST_EPOCHS = 2, 99
# A tenth of the paper's rate: at 0.01 so small a batch goes up and down, and rounding grows thirtyfold in ten steps.
RECIPE = dataclasses.replace(RECIPES["default"], batch_size=BATCH, dropout=0.0, lr=0.001)
ROUNDING = 5e-5  # One worker that only sums its own images in other parts is up to 7e-6 off.


def train(shards: Path, worker: Worker, micro_batch: int, steps: int) -> Recorder:
    """Trains so many steps as one of the workers, and validates where the last one ends an epoch."""
    recipe = dataclasses.replace(RECIPE, epochs=-(-steps // STEPS))
    data = WorkerData(shards, recipe, worker, micro_batch, threads=1)
    network = make_network(RunFingerprint.of(recipe, data.info)).to(memory_format=torch.channels_last)
    epoch, step = divmod(steps, STEPS)
    record = Recorder(None, wishes={(epoch, step): StepAction.STOP})
    try:
        Trainer(network, recipe, worker, log_every=1).fit(data, record)
    except StoppedError:
        assert step
    return record


def train_rank(rank: int, world: int, shards: Path, folder: Path) -> None:
    """Trains as one of `world` workers: the curve in folder/RANK.json."""
    torch.set_num_threads(1)
    # Among four workers three images, which are two and one, two, two and two.
    record = train(shards, Worker(rank, world, torch.device("cpu")), 2, EPOCHS * STEPS)
    (folder / f"{rank}.json").write_text(json.dumps([record.losses, record.rows]))


def alone(shards: Path, micro_batch: int, steps: int) -> Recorder:
    return train(shards, Worker(0, 1, torch.device("cpu")), micro_batch, steps)


@pytest.mark.slow
def test_four_workers_have_one_workers_loss_curve(shard_set: Path, tmp_path: Path) -> None:
    one = alone(shard_set, BATCH, EPOCHS * STEPS)
    run_ranks(4, tmp_path, train_rank, shard_set, tmp_path)
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(4)]
    assert all(rank == ranks[0] for rank in ranks)
    losses, rows = ranks[0]
    assert len(losses) == EPOCHS * STEPS
    # The curve goes somewhere, so that equal ones mean equal steps.
    assert np.ptp(losses) > 1000 * ROUNDING
    np.testing.assert_allclose(losses, one.losses, rtol=ROUNDING)
    for name in ("train_loss", "val_loss"):
        np.testing.assert_allclose([r[name] for r in rows], [r[name] for r in one.rows], rtol=ROUNDING)
    for name in ("train_error", "top1_error", "top5_error", "images", "val_images"):
        assert [row[name] for row in rows] == [row[name] for row in one.rows]


@pytest.mark.long
def test_a_run_grows_and_shrinks_with_its_cluster_and_learns_the_same(shard_set: Path, tmp_path: Path) -> None:
    more = ["--dropout", 0, "--lr", RECIPE.lr, "--cpus-per-worker", 1, "--resize-seconds", 10]
    with raylets(2) as cluster:
        address = {"RAY_ADDRESS": cluster.address}
        notes = tmp_path / "notes"
        run = Run(shard_set, str(tmp_path), "2:3", MOST_EPOCHS, *more, checkpoint_every=0, notes=notes, **address)
        run.wait_for("2 to 3 workers on CPU with 1 core(s) each")
        run.wait_for(f"epoch 1/{MOST_EPOCHS} step 1/{STEPS}")
        third = cluster.add_node(**NODE, num_cpus=1)
        run.wait_for(", with 3 worker(s)")
        grown = int(re.findall(r"continuing after epoch (\d+), step 0, with 3", run.lines[-1])[0])
        run.wait_for(f"epoch {grown + 2}/{MOST_EPOCHS} step 1/{STEPS}")
        # Else two workers would do again what the three did.
        while last(str(tmp_path / "run")) <= (grown, 0):
            run.wait_for(" step ")
        lose(third)
        run.wait_for(", with 2 worker(s)")
        assert run.text.count("failure 1 of at most 4: rank ") == 1
        run.wait_for("step 2/")
        run.process.terminate()
        assert run.end() == 1, run.text
        assert "error: stopped after epoch" in run.lines[-1]
    run_folder = str(tmp_path / "run")
    progress = list(committed(run_folder).values())[-1].progress
    steps = progress.epoch * STEPS + progress.step
    assert assert_trained_once(notes, plan(shard_set), steps) == [2, 3, 2]
    shown = dict(read_events(f"{run_folder}/{EVENTS}").scalars["train/loss"])
    assert sorted(shown) == list(range(1, steps + 1))
    found, wanted = np.array([shown[step] for step in sorted(shown)]), np.array(alone(shard_set, BATCH, steps).losses)
    # The first epoch, before rounding has grown.
    np.testing.assert_allclose(found[:STEPS], wanted[:STEPS], rtol=2e-6)
    # Training multiplies a difference. The yardstick is what the same worker makes of another order of additions.
    rounding = np.abs(np.subtract(alone(shard_set, 2, steps).losses, wanted)).max()
    assert rounding < 0.02 * wanted.std()
    assert np.abs(found - wanted).max() < 5 * rounding
