"""One self-contained HTML page about a run.

It shows the curves with the schedule's decisions, the first layer's filters and the settings. With --data it also shows
images with their most probable classes, nearest neighbors by fc7, and the classes most often confused.

    python jobs/report.py --storage RUNS --name first --data SHARDS --output report.html
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from jobs.cli.command import GpuChoice, log, run


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
    gpu: GpuChoice = None
    """Use a GPU; None: if torch sees one."""


if __name__ == "__main__":
    run(ReportConfig, "jobs.report")  # Before the imports below, which take seconds.

import torch

from jobs.cli.device import choose_device
from jobs.reporting.page import gallery, page, read_rates
from jobs.reporting.predictions import predict
from jobs.training import checkpoint
from jobs.training.run_state import CheckpointError, DamagedError, State
from jobs.training.run_storage import local_copy
from jobs.training.trackers import EVENTS, read_events
from jobs.training.worker import make_network
from model.alexnet import AlexNet
from pipeline.dataset.info import read_dataset
from pipeline.storage.locations import join, shown
from pipeline.storage.remote import write_atomically


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
    network = best_network(location, states).to(memory_format=torch.channels_last).to(device).eval()
    images: dict[str, Any] = {}
    if config.data is not None:
        info = read_dataset(config.data)
        checkpoint.check_other_classes(state.identity, info, location, str(config.data))
        images = gallery(predict(network, state.identity.rgb, device, config.data, info), config.data, info)
    events = read_events(join(location, EVENTS))
    write_atomically(config.output, page(config.name, state, network, events, rates, images).encode())
    print(f"report: {config.output}")


def best_network(run: str, states: dict[str, State]) -> AlexNet:
    """The network of a run's best checkpoint, of those whose files are whole.

    Raises:
        CheckpointError: if none is.
    """
    left = dict(states)
    while (name := checkpoint.best(left)) is not None:
        try:
            with local_copy(join(run, name)) as folder:
                network = make_network(left.pop(name).identity)
                checkpoint.load_network(folder, network)
                return network
        except DamagedError as error:
            log(f"warning: {name} is left out, the next best is taken: {error}")
    raise CheckpointError(
        f"no checkpoint at an epoch's end of {shown(run)} is whole: train to the next epoch's end first"
    )
