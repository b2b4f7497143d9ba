"""A run that grows and shrinks with its cluster: the same batches, and the curve of a run of one worker."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from jobs.cli.workers import Workers
from jobs.cluster.nodes import Node
from jobs.training.checkpoint import committed
from jobs.training.config import TrainConfig
from jobs.training.resources import Resources, check_shortage, few_images
from jobs.training.run_state import RunFingerprint
from jobs.training.trackers import EVENTS, read_events
from jobs.training.worker import WorkerData, make_network
from model.metrics import LabeledImages, Score
from model.recipe import RECIPES, Recipe
from model.training import StepAction, StoppedError, Trainer, Worker
from tests.observer import assert_trained_once
from tests.raylets import NODE, lose, raylets
from tests.runs import BATCH, STEPS, Run, last, plan

MOST_EPOCHS = 99


@pytest.mark.parametrize(
    ("text", "workers", "elastic"),
    [("4", Workers(4, 4), False), ("2:4", Workers(2, 4), True), ("3:3", Workers(3, 3), False)],
)
def test_workers_are_one_number_or_two(text: str, workers: Workers, elastic: bool) -> None:
    assert Workers.parse(text) == workers
    assert workers.elastic == elastic


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("0", "at least 1"),
        ("0:2", "at least 1"),
        ("4:2", "as 2:4"),
        ("2:", "a number, or two"),
        ("-1", "a number, or two"),
    ],
)
def test_what_is_no_number_of_workers_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=rf"--workers is .*{reason}"):
        Workers.parse(text)


def test_a_batch_that_the_most_workers_cannot_share_is_refused() -> None:
    config = TrainConfig("data", "storage", "run", workers=Workers(2, 8), batch_size=7)
    with pytest.raises(ValueError, match="8 workers cannot share a batch of 7: use fewer --workers or a larger"):
        config.make_recipe()
    assert TrainConfig("data", "storage", "run", workers=Workers(2, 7), batch_size=7).make_recipe().batch_size == 7


@pytest.mark.parametrize(
    ("workers", "batch_size", "micro_batch", "fits"),
    [
        (Workers(1, 1), 128, 1024, True),
        (Workers(1, 1), 129, 128, False),
        (Workers(2, 2), 257, 128, False),  # 129 and 128
        (Workers(2, 2), 256, 128, True),
        (Workers(2, 4), 6, 128, False),  # With four, two have 1
        (Workers(1, 1), 4, 1, False),
    ],
)
def test_batch_normalization_refuses_a_single_image(
    workers: Workers, batch_size: int, micro_batch: int, fits: bool
) -> None:
    parts = {
        len(p)
        for w in range(workers.min_workers, workers.max_workers + 1)
        for p in np.array_split(range(batch_size), w)
    }
    pieces = {min(micro_batch, part - start) for part in parts for start in range(0, part, micro_batch)}
    assert (1 not in pieces) == fits
    with contextlib.nullcontext() if fits else pytest.raises(ValueError, match=r"batch normalization needs two images"):
        workers.check_single_images(batch_size, micro_batch)


def cluster(*nodes: tuple[int, int]) -> list[Node]:
    """Nodes of so many cores and GPUs."""
    return [Node(str(i), f"10.0.0.{i}", gpus, cpus) for i, (cpus, gpus) in enumerate(nodes)]


@pytest.mark.parametrize(
    ("workers", "nodes", "cores"),
    [
        (Workers(2, 4), [(8, 0)], 4),  # What is there, for the two that start
        (Workers(2, 4), [(24, 3)], 8),  # One for each GPU that is there
        (Workers(2, 4), [(16, 8)], 4),
        (Workers(2, 4), [(2, 1)], 2),  # The second comes with a node of its own
        (None, [(16, 8)], 2),
        (Workers(16, 16), [(4, 0), (96, 8)], 12),
        (None, [(8, 0), (8, 0)], 8),  # No worker is spread over nodes
        (Workers(2, 2), [(8, 0)] * 3, 8),
        (Workers(2, 8), [(8, 0)] * 4, 8),
        (Workers(3, 3), [(8, 0), (8, 0)], 4),
        (Workers(2, 2), [(4, 1), (4, 1), (32, 0)], 4),
        (Workers(4, 4), [(2, 0)], 1),  # Nodes are to come
    ],
)
def test_a_worker_has_its_share_of_the_cores_of_its_node(
    workers: Workers | None, nodes: list[tuple[int, int]], cores: int
) -> None:
    found = Resources.of(TrainConfig("data", "storage", "run", workers=workers), cluster(*nodes))
    gpus = sum(count for _, count in nodes)
    default = Workers(max(gpus, 1), max(gpus, 1))
    assert found == Resources(workers or default, gpus > 0, cores)


def test_gpus_are_refused_on_a_machine_without_and_awaited_on_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig("data", "storage", "run", workers=Workers(8, 8), gpus=True)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ValueError, match="--gpus was given, and Ray sees no GPU on this machine: leave it out"):
        Resources.of(config, cluster((8, 0)))
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.0:6379")
    with pytest.raises(ValueError, match=r"no node with a GPU is there yet.*: give --cpus-per-worker, as 12"):
        Resources.of(config, cluster((0, 0)))
    assert Resources.of(dataclasses.replace(config, cpus_per_worker=12), cluster((0, 0))).cpus_per_worker == 12


def test_workers_that_fit_no_node_are_waited_for_aloud(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    resources, nodes = Resources(Workers(2, 2), False, 12), cluster((16, 0), (8, 0))
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.0:6379")
    check_shortage(resources, nodes, RECIPES["default"])
    said = capsys.readouterr().out
    assert "waiting for the cluster to grow: the run needs room for 2 worker(s) of 12 core(s) each" in said
    assert "and there is room for 1 now (10.0.0.0 with 16 core(s) and 0 GPU(s), 10.0.0.1 with 8" in said
    check_shortage(Resources(Workers(2, 2), False, 8), nodes, RECIPES["default"])
    assert not capsys.readouterr().out
    monkeypatch.delenv("RAY_ADDRESS")
    with pytest.raises(ValueError, match=r"room for 2 worker.*use fewer --workers"):
        check_shortage(resources, nodes, RECIPES["default"])


@pytest.mark.parametrize(
    ("workers", "gpus", "recipe", "images"),
    [
        (4, True, "default", None),
        (5, True, "default", 25),
        (5, False, "default", None),
        (32, True, "large-batch", None),
    ],
)
def test_gpus_that_get_few_images_are_told_of_the_recipe_for_them(
    workers: int, gpus: bool, recipe: str, images: int | None
) -> None:
    warning = few_images(Resources(Workers(1, workers), gpus, 1), RECIPES[recipe])
    assert (warning is None) == (images is None)
    if warning is not None:
        assert f"a GPU gets {images} of a batch's 128 images" in warning
        assert "--recipe large-batch with its 8192 images" in warning


class Losses:
    """Keeps each step's loss, and stops after so many."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.losses: list[float] = []

    def on_step_end(self, trainer: Trainer, batches: Sequence[LabeledImages], own_seconds: float) -> StepAction:
        return StepAction.STOP if len(self.losses) + 1 == self.steps else StepAction.NOTHING

    def on_log(self, trainer: Trainer, score: Score, images_per_s: float, data_wait: float) -> None:
        self.losses.append(score.loss)

    def on_epoch_end(self, trainer: Trainer, row: dict[str, Any]) -> None: ...

    def on_validation_batch(self, trainer: Trainer) -> StepAction:
        return StepAction.NOTHING

    def checkpoint(self, trainer: Trainer) -> None: ...

    def on_warning(self, trainer: Trainer, warning: str) -> None: ...


def alone(shards: Path, recipe: Recipe, steps: int, micro_batch: int) -> NDArray[np.float64]:
    """The loss of each of so many steps of one worker, in this process."""
    worker = Worker(0, 1, torch.device("cpu"))
    data = WorkerData(shards, recipe, worker, micro_batch, threads=2)
    losses = Losses(steps)
    with pytest.raises(StoppedError):
        Trainer(make_network(RunFingerprint.of(recipe, data.info)), recipe, worker, log_every=1).fit(data, losses)
    return np.array(losses.losses)


@pytest.mark.long
def test_a_run_grows_and_shrinks_with_its_cluster_and_learns_the_same(shard_set: Path, tmp_path: Path) -> None:
    more = ["--dropout", 0, "--lr", 0.001, "--cpus-per-worker", 1, "--resize-seconds", 10]
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
    run_folder = tmp_path / "run"
    progress = list(committed(str(run_folder)).values())[-1].progress
    steps = progress.epoch * STEPS + progress.step
    assert assert_trained_once(notes, plan(shard_set), steps) == [2, 3, 2]
    recipe = dataclasses.replace(RECIPES["default"], batch_size=BATCH, dropout=0.0, lr=0.001)
    shown = dict(read_events(str(run_folder / EVENTS)).scalars["train/loss"])
    assert sorted(shown) == list(range(1, steps + 1))
    wanted = alone(shard_set, recipe, steps, BATCH)
    found = np.array([shown[step] for step in sorted(shown)])
    # The first epoch, before rounding has grown.
    np.testing.assert_allclose(found[:STEPS], wanted[:STEPS], rtol=2e-6)
    # Training multiplies a difference. The yardstick is what the same worker makes of another order of additions.
    rounding = np.abs(alone(shard_set, recipe, steps, 2) - wanted).max()
    assert rounding < 0.02 * wanted.std()
    assert np.abs(found - wanted).max() < 5 * rounding
