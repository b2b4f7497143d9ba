"""The report's page: its template, filled with a run's figures and tables."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jinja2

from jobs.reporting import charts
from jobs.reporting.predictions import Predictions, confusions
from jobs.training.run_state import State
from jobs.training.trackers import Events
from model.alexnet import AlexNet
from pipeline.dataset.info import DatasetInfo
from pipeline.dataset.split_reader import SplitReader

TEMPLATE = "report.html.j2"  # Beside this file
WORST = 20  # Classes in the table of confusions


def page(name: str, state: State, network: AlexNet, events: Events, images: dict[str, Any]) -> str:
    """The whole page: of the newest state, the best checkpoint's network, and what `gallery` gave."""
    history = state.progress.history
    per_epoch = history[0]["images"] / state.identity.recipe.batch_size
    within = {tag: [(step / per_epoch, value) for step, value in points] for tag, points in events.scalars.items()}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template(TEMPLATE).render(
        name=name,
        history=history,
        best=min(history, key=lambda row: float(row["top1_error"])),
        classes=len(state.identity.wnids),
        curves=charts.curves(history, within),
        filters=charts.filters(network.conv1.weight.detach().cpu().numpy()),
        images=images,
        facts=[("shard set", state.identity.dataset), *(("machine", text) for text in events.machines)],
        settings=dataclasses.asdict(state.identity.recipe).items(),
    )


def gallery(predictions: Predictions, data: Path, info: DatasetInfo) -> dict[str, Any]:
    """What the page shows of a shard set."""
    val, train = (SplitReader(data, info, split) for split in ("val", "train"))
    names = [label.name for label in info.classes]
    neighbors = []
    for i, nearest in enumerate(predictions.nearest.tolist()):
        pixels = [val.decoded(i), *(train.decoded(sample) for sample in nearest)]
        neighbors.append(charts.neighbors(pixels, [val.labels[i], *train.labels[nearest]], names))
    return {
        "photographs": [
            charts.photograph(val.decoded(i), val.labels[i], top, names) for i, top in enumerate(predictions.top)
        ],
        "neighbors": neighbors,
        "confusions": confusions(predictions.val_labels, predictions.predicted, len(names))[:WORST],
        "names": names,
        "searched": {"val": len(predictions.val_labels), "train": predictions.train_images},
        "available": {"val": len(val), "train": len(train)},
    }
