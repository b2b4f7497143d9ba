"""One HTML page about a run; no other file is needed to read it.

Its curves with the schedule's decisions, its first layer's filters, its settings; with --data also what the network
makes of the images: their most probable classes, their nearest neighbours by fc7, and the classes it confuses most.
"""

from __future__ import annotations

import dataclasses
import html
import json
import os
from pathlib import Path
from typing import Any

import torch

from jobs import charts, checkpoint
from jobs.answers import Asker
from jobs.checkpoint import CheckpointError, State
from jobs.cli import run
from jobs.device import choose_device
from jobs.evaluate import local_checkpoint
from jobs.gallery import gallery
from jobs.page import STYLE, epochs_table, table
from jobs.trackers import EVENTS, Events, read_events
from jobs.worker import make_network
from model.alexnet import AlexNet
from pipeline.dataset import read_dataset, write_atomically
from pipeline.storage import join

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


def page(name: str, state: State, network: AlexNet, events: Events, rates: dict[str, Any], images: str) -> str:
    """The whole page.

    Args:
        name: the run's.
        state: its newest.
        network: its best checkpoint's.
        events: what was tracked.
        rates: by the names of RATES; may be empty.
        images: the sections about a shard set; may be empty.
    """
    history = state.progress.history
    best = min(history, key=lambda row: float(row["top1_error"]))
    classes = len(state.identity.wnids)
    recipe = [(key, str(value)) for key, value in dataclasses.asdict(state.identity.recipe).items()]
    facts = [("classes", str(classes)), ("shard set", state.identity.dataset)]
    facts += [("machine", text) for text in events.machines]
    measured = [(meaning, f"{rates[key]:,.1f} images/s") for key, meaning in RATES.items() if key in rates]
    if "data_wait" in rates:
        measured.append(("waiting for data", f"{rates['data_wait']:.1%} of the training time"))
    decisions = "".join(f"<li>{html.escape(row['reason'])}</li>" for row in history if row["reason"])
    per_epoch = history[0]["images"] / state.identity.recipe.batch_size
    within = {tag: [(step / per_epoch, value) for step, value in points] for tag, points in events.scalars.items()}
    caption = "The 96 filters of the first layer, each scaled by its largest weight (the paper's figure 3)"
    return "\n".join(
        [
            '<!doctype html><html lang="en"><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{html.escape(name)}</title><style>{STYLE}</style>",
            f"<h1>Run {html.escape(name)}</h1>",
            f"<p>{len(history)} epochs; lowest validation error {best['top1_error']:.1%} top-1, "
            f"{best['top5_error']:.1%} top-5 after epoch {best['epoch']}. Guessing among {classes} classes: "
            f"{1 - 1 / classes:.1%}.</p>",
            f'<div class="charts">{"".join(charts.charts(history, within))}</div>',
            f"<h2>The schedule's decisions</h2><ul>{decisions}</ul>" if decisions else "",
            "<h2>First layer</h2>",
            charts.png(charts.filters(network.conv1.weight.detach().cpu().numpy()), caption),
            images,
            "<h2>Epochs</h2>",
            epochs_table(history),
            f"<h2>Rates, by jobs/benchmark.py</h2>{table(measured)}" if measured else "",
            "<h2>Data and machine</h2>",
            table(facts),
            "<h2>Settings</h2>",
            table(recipe),
            "</html>",
        ]
    )


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
    images = ""
    if config.data is not None:
        info = read_dataset(config.data)
        checkpoint.refuse_other_classes(state.identity, info, location, str(config.data))
        asker = Asker(network, state.identity.rgb, config.batch_size, device, config.threads)
        answers = asker.ask(config.data, info, config.images, config.shown, config.queries)
        images = gallery(answers, config.data, info)
    events = read_events(join(location, EVENTS))
    write_atomically(config.output, page(config.name, state, network, events, rates, images).encode())
    print(f"report: {config.output}")


if __name__ == "__main__":
    run(ReportConfig, main)
