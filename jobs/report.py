"""One self-contained HTML page about a run.

It shows the curves with the schedule's decisions, the first layer's filters and the settings. With --data it also shows
images with their most probable classes, nearest neighbors by fc7, and the classes most often confused.

    python jobs/report.py --storage RUNS --name first --data SHARDS --output report.html
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from jobs.cli.command import GpuChoice, run


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
    gpu: GpuChoice = None
    """Use a GPU; None: if torch sees one."""


if __name__ == "__main__":
    run(ReportConfig, "jobs.report")  # Before the imports below, which take seconds.

import torch

from jobs.cli.device import choose_device
from jobs.reporting.page import gallery, page
from jobs.reporting.predictions import predict
from jobs.training import checkpoint
from jobs.training.run_storage import best_checkpoint
from jobs.training.trackers import EVENTS, read_events
from jobs.training.worker import make_network
from pipeline.dataset.info import read_dataset
from pipeline.storage.locations import join
from pipeline.storage.remote import write_atomically


def main(config: ReportConfig) -> None:
    location = join(config.storage, config.name)
    device = choose_device(config.gpu)
    states = checkpoint.committed(location)
    with best_checkpoint(location, states) as (_, folder):
        network = make_network(checkpoint.read_state(folder).identity)
        checkpoint.load_network(folder, network)
    network = network.to(memory_format=torch.channels_last).to(device).eval()
    *_, state = states.values()
    images: dict[str, Any] = {}
    if config.data is not None:
        info = read_dataset(config.data)
        checkpoint.check_other_classes(state.identity, info, location, str(config.data))
        images = gallery(predict(network, state.identity.rgb, device, config.data, info), config.data, info)
    events = read_events(join(location, EVENTS))
    write_atomically(config.output, page(config.name, state, network, events, images).encode())
    print(f"report: {config.output}")
