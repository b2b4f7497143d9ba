"""The report's page: its template, filled with a run's figures and tables."""

from __future__ import annotations

import dataclasses
import json
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
RATES = {
    "decode_limit_images_per_s": "decoding the JPEGs whole, the limit",
    "loader_images_per_s": "the loader alone",
    "network_images_per_s": "the network alone",
    "train_images_per_s": "training",
}
"""What jobs/benchmark.py --json writes."""


def page(
    name: str, state: State, network: AlexNet, events: Events, rates: dict[str, Any], images: dict[str, Any]
) -> str:
    """The whole page: of the newest state, the best checkpoint's network, and what `read_rates` and `gallery` gave."""
    history = state.progress.history
    measured = [(meaning, f"{rates[key]:,.1f} images/s") for key, meaning in RATES.items() if key in rates]
    if "data_wait" in rates:
        measured.append(("waiting for data", f"{rates['data_wait']:.1%} of the training time"))
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
        rates=measured,
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


def read_rates(path: Path) -> dict[str, Any]:
    """What jobs/benchmark.py --json wrote.

    Raises:
        ValueError: if the file is something else.
    """
    try:
        value = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"--benchmark {path} is no JSON ({error}): give what benchmark.py --json wrote") from error
    if not isinstance(value, dict) or not all(isinstance(value.get(key), float | int) for key in RATES):
        raise ValueError(f"--benchmark {path} lacks {', '.join(RATES)}: give what benchmark.py --json wrote")
    return value
