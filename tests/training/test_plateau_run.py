"""Training under the plateau schedule to its own end, undisturbed and interrupted in the middle of a patience count."""

from __future__ import annotations

import base64
import dataclasses
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from jobs.reporting import charts
from jobs.reporting.page import gallery, page
from jobs.reporting.predictions import Confusion, confusions, predict
from jobs.training import checkpoint
from jobs.training.config import TrainConfig
from jobs.training.run_state import RunFingerprint
from jobs.training.trackers import EVENTS, TrackedRun, make_trackers, read_events
from jobs.training.worker import Reporter, WorkerData, make_network
from model.recipe import RECIPES
from model.schedule import PAPER_REDUCTIONS
from model.training import Progress, Trainer, Worker
from pipeline.dataset.info import read_dataset
from tests.photographs import write_source
from tests.shard_sets import make, planned

PATIENCE = 2
RECIPE = dataclasses.replace(RECIPES["default"], batch_size=4, lr=1e-4, patience=PATIENCE)
CPU = Worker(0, 1, torch.device("cpu"))


class InterruptedRunError(Exception):
    """Stands for a kill."""


class NoCluster:
    """Stands for what polls for a stop request."""

    def __init__(self, *_: object) -> None: ...

    def news(self) -> tuple[None, None]:
        return None, None


class Keeper(Reporter):
    """Tells the trackers as in any run, but keeps the newest checkpoint in a folder, without Ray Train."""

    def __init__(self, folder: Path, die_in: int | None, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._folder, self._die_in = folder, die_in

    def on_log(self, trainer: Trainer, *measured: Any) -> None:
        super().on_log(trainer, *measured)
        if trainer.progress.epoch + 1 == self._die_in:
            raise InterruptedRunError

    def checkpoint(self, trainer: Trainer) -> None:
        checkpoint.save(self._folder, trainer, self._identity)


@pytest.fixture(scope="module")
def tiny_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes, eight training and eight validation images."""
    root = tmp_path_factory.mktemp("tiny")
    source = write_source(root / "images", images=8, classes=2)
    return make(root / "shards", planned(source, per_shard=8, val_fraction=0.5))


def train(data: Path, folder: Path, die_in: int | None = None) -> Trainer:
    """Trains, from the checkpoint in `folder` if there is one, until the schedule ends it or it dies in an epoch."""
    loaded = WorkerData(data, RECIPE, CPU, RECIPE.batch_size, 1)
    identity = RunFingerprint.of(RECIPE, loaded.info)
    trainer = Trainer(make_network(identity).to(memory_format=torch.channels_last), RECIPE, CPU)
    folder.mkdir(exist_ok=True)
    if (folder / checkpoint.STATE_FILE).exists():
        checkpoint.restore(folder, trainer, identity)
    config = TrainConfig(str(data), str(folder.parent), folder.name)
    start = trainer.progress.epoch * loaded.steps
    trackers = make_trackers(None, TrackedRun(str(folder), {}, "this machine", start))
    trainer.fit(loaded, Keeper(folder, die_in, config, identity, CPU, loaded.steps, trackers))
    return trainer


def learned(progress: Progress) -> list[dict[str, Any]]:
    """The history without what the clock says."""
    return [{name: value for name, value in row.items() if "seconds" not in name} for row in progress.history]


def test_the_rate_is_drawn_as_steps() -> None:
    measured = dict.fromkeys(("train_loss", "val_loss", "train_error", "top1_error", "top5_error"), 0.5)
    rates = ((1, 0.1), (2, 0.1), (3, 0.01))
    history = [{**measured, "epoch": epoch, "lr": rate, "reason": ""} for epoch, rate in rates]
    for within in ({}, {"train/lr": [(0.5, 0.1), (1.5, 0.1), (2.5, 0.01), (3.0, 0.01)]}):
        drawing = charts.curves(history, within)["Learning rate"]
        (drawn,) = re.findall(rf'<path d="([^"]+)"[^>]*stroke: {charts.TRAINING}', drawing)
        points = np.array(re.findall(r"[-.\d]+", drawn), np.float64).reshape(-1, 2)
        moves = np.abs(np.diff(points, axis=0)) > 0.01
        assert moves.any(axis=0).all()
        assert not moves.all(axis=1).any()


def test_each_filter_is_drawn_by_itself() -> None:
    weights = np.random.default_rng(0).normal(size=(96, 3, 11, 11)).astype(np.float32)
    images = re.findall(r"data:image/png;base64,\s*([^\"]+)", charts.filters(weights))
    for image, weight in zip(images, weights, strict=True):
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(image))).convert("RGB"), np.float64)
        np.testing.assert_allclose(shown / 127.5 - 1, weight.transpose(1, 2, 0) / np.abs(weight).max(), atol=0.01)


def test_confusions_start_with_the_worst_class() -> None:
    labels, predicted = np.array([0, 0, 0, 1, 1, 3]), np.array([0, 1, 1, 1, 3, 3])
    assert confusions(labels, predicted, 4) == [
        Confusion(label=0, images=3, wrong=2, mistaken_for=1, as_that=2),
        Confusion(label=1, images=2, wrong=1, mistaken_for=3, as_that=1),
        Confusion(label=3, images=1, wrong=0, mistaken_for=0, as_that=0),
    ]


@pytest.mark.slow
def test_a_plateau_run_ends_itself_the_same_when_it_was_interrupted(
    tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.training.worker.StopRequestPoller", NoCluster)
    whole = train(tiny_set, tmp_path / "whole")
    decisions = [row["epoch"] for row in whole.progress.history if row["reason"]]
    assert whole.progress.schedule.stopped
    assert len(decisions) == PAPER_REDUCTIONS + 1
    assert len(whole.progress.history) == decisions[-1] < RECIPE.epochs
    rates = [whole.progress.history[epoch - 1]["lr"] for epoch in decisions]
    assert rates == pytest.approx([1e-4, 1e-5, 1e-6, 1e-7], rel=1e-9)

    # In the epoch of the second decision, when the count stands at one of two.
    with pytest.raises(InterruptedRunError):
        train(tiny_set, tmp_path / "parts", die_in=decisions[1])
    kept = checkpoint.read_state(tmp_path / "parts").progress
    assert (kept.epoch, kept.schedule.bad_epochs, kept.schedule.reductions) == (decisions[1] - 1, PATIENCE - 1, 1)
    parts = train(tiny_set, tmp_path / "parts")
    assert learned(parts.progress) == learned(whole.progress)
    assert parts.progress.schedule == whole.progress.schedule
    for one, other in zip(whole.network.parameters(), parts.network.parameters(), strict=True):
        assert one.equal(other)
        momenta = [t.optimizer.state[p]["momentum_buffer"] for t, p in ((whole, one), (parts, other))]
        assert momenta[0].equal(momenta[1])

    state = checkpoint.read_state(tmp_path / "parts")
    network = make_network(state.identity).eval()
    checkpoint.load_network(tmp_path / "parts", network)
    info = read_dataset(tiny_set)
    # A class's name is text, never markup or a formula.
    info = dataclasses.replace(info, classes=tuple(dataclasses.replace(c, name="<b>$x$ 中") for c in info.classes))
    predictions = predict(network, state.identity.rgb, CPU.device, tiny_set, info)
    events = read_events(str(tmp_path / "parts" / EVENTS))
    # One value an epoch: what the interruption made happen twice is there once.
    assert [step for step, _ in events.scalars["train/loss"]] == [2 * row["epoch"] for row in parts.progress.history]
    text = page("parts", state, network, events, {}, gallery(predictions, tiny_set, info))
    (tmp_path / "report.html").write_text(text)
    for epoch in decisions:
        assert text.count(f"<li>epoch {epoch}: error ") == 1
    assert text.count("stopping, the rate was reduced 3 times</li>") == 1
    assert (text.count("<svg"), text.count("<image")) == (3 + 1 + 8 + 5, 96 + 8 + 5 * 7)
    assert "<b>" not in text
    assert "&lt;b&gt;$x$ 中" in text
    assert text.count("this machine") == 1
    assert 'src="http' not in text
