"""The report's page, of a run that nobody trained."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from jobs.reporting.page import gallery, page
from jobs.reporting.predictions import predict
from jobs.training.run_state import RunFingerprint, State
from jobs.training.trackers import EVENTS, TrackedRun, make_trackers, read_events
from jobs.training.worker import make_network
from model.metrics import Score
from model.progress import Progress
from model.recipe import Recipe
from model.schedule import Plateau
from pipeline.dataset.info import read_dataset
from tests.photographs import write_source
from tests.shard_sets import make, planned


@pytest.fixture(scope="session")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    source = write_source(folder / "images", images=8, classes=2)
    data = make(folder / "shards", planned(source, per_shard=8, val_fraction=0.5))
    info = read_dataset(data)
    # A class's name is text, never markup or a formula.
    info = dataclasses.replace(info, classes=tuple(dataclasses.replace(c, name="<b>$x$ 中") for c in info.classes))
    # It never improves, and ends by the schedule.
    recipe, score = Recipe(patience=2), Score(loss=2.0, top1_error=0.5, top5_error=0.25, images=8)
    progress = Progress(Plateau(recipe.lr))
    while not progress.finished:
        progress.rate = progress.schedule.lr
        progress.close_epoch(recipe, score, score).update(seconds=9.0, train_seconds=8.0)
    # The first epochs of an older version's run, one stopped in its validation, and one in its midst.
    progress.history[-2].update(images_in_train_seconds=0)
    progress.history[-1].update(images_in_train_seconds=4000)
    tensorboard, *_ = make_trackers(None, TrackedRun(str(folder / "run"), {}, "this machine", 0))
    tensorboard.log({"train/loss": 2.5}, 5)
    tensorboard.close("finished")
    identity = RunFingerprint.of(recipe, info)
    network = make_network(identity).eval()
    predictions = predict(network, info.rgb, torch.device("cpu"), data, info)
    events = read_events(str(folder / "run" / EVENTS))
    path = folder / "report.html"
    path.write_text(page("small", State(identity, progress), network, events, gallery(predictions, data, info)))
    return path
