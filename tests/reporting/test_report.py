"""The report: its figures against what they are of, and the whole page of a run under the plateau schedule."""

from __future__ import annotations

import base64
import dataclasses
import io
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from jobs.reporting import charts
from jobs.reporting.page import gallery, page
from jobs.reporting.predictions import Confusion, confusions, predict
from jobs.training.run_state import RunFingerprint, State
from jobs.training.trackers import EVENTS, TrackedRun, make_trackers, read_events
from jobs.training.worker import make_network
from model.schedule import PAPER_REDUCTIONS
from pipeline.dataset.info import read_dataset
from tests.model.test_training import RECIPE, Recorder, SmallData, make_trainer
from tests.photographs import write_source
from tests.shard_sets import make, planned


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


def test_the_page_shows_a_runs_decisions_its_network_and_its_set(tmp_path: Path) -> None:
    """The decisions are those of a small network, which ends by the schedule; the pictures are of an AlexNet's."""
    source = write_source(tmp_path / "images", images=8, classes=2)
    data = make(tmp_path / "shards", planned(source, per_shard=8, val_fraction=0.5))
    info = read_dataset(data)
    # A class's name is text, never markup or a formula.
    info = dataclasses.replace(info, classes=tuple(dataclasses.replace(c, name="<b>$x$ 中") for c in info.classes))
    recipe = dataclasses.replace(RECIPE, epochs=500, patience=2)
    trainer = make_trainer(recipe)
    trainer.fit(SmallData(), Recorder(tmp_path / "run"))
    tensorboard, *_ = make_trackers(None, TrackedRun(str(tmp_path / "run"), {}, "this machine", 0))
    tensorboard.log({"train/loss": 2.5}, 5)
    tensorboard.close("finished")
    identity = RunFingerprint.of(recipe, info)
    network = make_network(identity).eval()
    predictions = predict(network, info.rgb, torch.device("cpu"), data, info)
    events = read_events(str(tmp_path / "run" / EVENTS))
    text = page("small", State(identity, trainer.progress), network, events, {}, gallery(predictions, data, info))
    decisions = [row["epoch"] for row in trainer.progress.history if row["reason"]]
    assert len(decisions) == PAPER_REDUCTIONS + 1
    for epoch in decisions:
        assert text.count(f"<li>epoch {epoch}: error ") == 1
    assert text.count("stopping, the rate was reduced 3 times</li>") == 1
    assert (text.count("<svg"), text.count("<image")) == (3 + 1 + 8 + 5, 96 + 8 + 5 * 7)
    assert "<b>" not in text
    assert "&lt;b&gt;$x$ 中" in text
    assert text.count("this machine") == 1
    assert 'src="http' not in text
