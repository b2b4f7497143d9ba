"""One self-contained HTML page about a run.

It shows the curves with the schedule's decisions, the first layer's filters and the settings. With --data it also shows
images with their most probable classes, nearest neighbors by fc7, and the classes most often confused.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch

from jobs.cli.command import run
from jobs.cli.device import choose_device
from jobs.reporting.page import gallery, page, read_rates
from jobs.reporting.predictions import Predictor
from jobs.training import checkpoint
from jobs.training.checkpoint import CheckpointError
from jobs.training.run_storage import local_checkpoint
from jobs.training.trackers import EVENTS, read_events
from jobs.training.worker import make_network
from pipeline.dataset.info import read_dataset
from pipeline.storage.locations import join
from pipeline.storage.remote import write_atomically


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
        checkpoint.check_other_classes(state.identity, info, location, str(config.data))
        predictor = Predictor(network, state.identity.rgb, config.batch_size, device, config.threads)
        predictions = predictor.predict(config.data, info, config.images, config.shown, config.queries)
        images = gallery(predictions, config.data, info)
    events = read_events(join(location, EVENTS))
    write_atomically(config.output, page(config.name, state, network, events, rates, images).encode())
    print(f"report: {config.output}")


if __name__ == "__main__":
    run(ReportConfig, main)
