"""One self-contained HTML page about a run.

It shows the curves with the schedule's decisions, the first layer's filters and the settings. With --data it also shows
images with their most probable classes, nearest neighbors by fc7, and the classes most often confused.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import jinja2
import torch

from jobs import charts, checkpoint
from jobs.checkpoint import CheckpointError, State
from jobs.cli import run
from jobs.device import choose_device
from jobs.evaluate import local_checkpoint
from jobs.predictions import Predictions, Predictor, confusions
from jobs.trackers import EVENTS, Events, read_events
from jobs.worker import make_network
from model.alexnet import AlexNet
from pipeline.dataset import DatasetInfo, read_dataset, write_atomically
from pipeline.split_reader import SplitReader
from pipeline.storage import join

TEMPLATE = "report.html.j2"  # Beside this file
WORST = 20  # Classes in the table of confusions
RATES = {
    "decode_limit_images_per_s": "decoding the JPEGs whole, the limit",
    "loader_images_per_s": "the loader alone",
    "network_images_per_s": "the network alone",
    "train_images_per_s": "training",
}
"""What jobs/benchmark.py --json writes."""


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    storage: str
    """Where runs are kept, as given to jobs/train.py."""
    name: str
    """The run."""
    output: Path
    """The page to write."""
    data: Path | None = None
    """A shard set of the run's classes, to show images of."""
    benchmark: Path | None = None
    """What jobs/benchmark.py --json wrote on the same machine, to show its rates."""
    images: int = 10_000
    """Look at no more than so many images of each split."""
    shown: int = 12
    """Show the most probable classes of so many validation images."""
    queries: int = 5
    """And the nearest training images of so many."""
    gpu: bool = dataclasses.field(default_factory=torch.cuda.is_available)
    """Use a GPU; by default, if torch sees one."""
    batch_size: int = 100
    """Images at a time."""
    threads: int = os.cpu_count() or 1
    """Decoder threads."""

    def __post_init__(self) -> None:
        for field in ("images", "shown", "queries", "batch_size", "threads"):
            if getattr(self, field) < 1:
                raise ValueError(f"--{field.replace('_', '-')} is {getattr(self, field)}; it must be at least 1")


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


def main(config: ReportConfig) -> None:
    location = join(config.storage, config.name)
    states = checkpoint.committed(location)
    if checkpoint.best(states) is None:
        raise CheckpointError(
            f"the run {location} has no finished epoch: train first, or give its --storage and --name"
        )
    state = list(states.values())[-1]
    device = choose_device(config.gpu)
    rates = read_rates(config.benchmark) if config.benchmark else {}
    with local_checkpoint(location) as (_, folder):
        network = make_network(checkpoint.read_state(folder).identity)
        checkpoint.load_network(folder, network)
    network.to(memory_format=torch.channels_last).to(device).eval()
    images: dict[str, Any] = {}
    if config.data is not None:
        info = read_dataset(config.data)
        checkpoint.refuse_other_classes(state.identity, info, location, str(config.data))
        predictor = Predictor(network, state.identity.rgb, config.batch_size, device, config.threads)
        predictions = predictor.predict(config.data, info, config.images, config.shown, config.queries)
        images = gallery(predictions, config.data, info)
    events = read_events(join(location, EVENTS))
    write_atomically(config.output, page(config.name, state, network, events, rates, images).encode())
    print(f"report: {config.output}")


if __name__ == "__main__":
    run(ReportConfig, main)
