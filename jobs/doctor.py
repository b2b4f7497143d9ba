r"""Checks, before an expensive run, what makes runs fail late: each node, the network, the storage and the data.

    ray job submit --working-dir . -- python jobs/doctor.py --data s3://BUCKET/shards --stage /mnt/nvme \
        --storage s3://BUCKET/runs --workers 8 --gpus

Give what the run will be given. Plain `python jobs/doctor.py` checks this machine alone. Prints a table with a cure for
each failure; exit status 1 if anything failed. Every check has a time limit.
"""

from __future__ import annotations

import dataclasses
import logging
import platform
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jobs.cli.command import GpuChoice, run


@dataclasses.dataclass(frozen=True)
class DoctorConfig:
    """What the run to come will be given."""

    data: str | None = None
    """The shard set: a folder or a URL."""
    storage: str | None = None
    """Where runs are kept: a folder or a URL."""
    stage: str | None = None
    """The folder on each node's own disk that the set will be copied to."""
    workers: int | None = None
    """How many processes will train: one per GPU of the cluster, or one per node on CPU."""
    gpus: GpuChoice = None
    """Train on GPUs; None: if the cluster has any."""
    wait: int = 60
    """Seconds that the cluster is given to grow to the workers' size; booting nodes take fifteen minutes."""
    json: Path | None = None
    """Also write the table to this file."""

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"--workers is {self.workers}; it must be at least 1")
        if self.wait < 1:
            raise ValueError(f"--wait is {self.wait}; it must be at least 1 second")


if __name__ == "__main__":
    run(DoctorConfig, "jobs.doctor")  # Before the imports below, which take seconds.

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from jobs.cluster.connection import check_gpus_or_cluster, connected
from jobs.cluster.nodes import NoAnswer, alive_nodes, collect, on_each
from jobs.cluster.paths import with_whole_paths
from jobs.diagnostics.checks import (
    NODE_CHECKS,
    STEP_SECONDS,
    Finding,
    check_all_reduce,
    check_gpus,
    judge,
    remove_file,
    write_file,
)
from jobs.diagnostics.probe import Rank
from pipeline.dataset.info import write_json


def main(config: DoctorConfig) -> None:
    """Examines the cluster and prints what it found.

    Raises:
        ValueError: if Ray cannot be reached, or anything failed, after the table was printed.
    """
    with connected(logging_level=logging.ERROR, log_to_driver=False):
        found = list(examine(config))
    width = max(len(one.check) for one in found)
    for one in found:
        print(f"{one.status.upper():<8}{one.check:<{width}}  {one.found}")
        if one.cure:
            print(f"{'':8}{'':{width}}  cure: {one.cure}")
    failed = [one.check for one in found if one.status == "failed"]
    if config.json is not None:
        write_json(config.json, {"failed": failed, "findings": [dataclasses.asdict(one) for one in found]})
    if failed:
        raise ValueError(f"{len(failed)} of {len(found)} checks failed ({', '.join(failed)}): the table has the cures")


def examine(config: DoctorConfig) -> Iterator[Finding]:
    """All rows, of the cluster that this process is connected to."""
    resources = ray.cluster_resources()
    gpus = config.gpus if config.gpus is not None else resources.get("GPU", 0) > 0
    present = int(resources.get("GPU", 0)) if gpus else sum(node.cpus > 0 for node in alive_nodes())
    if gpus:
        check_gpus_or_cluster(present)
    world = config.workers or max(present, 1)
    bundle = {"CPU": 1, "GPU": 1} if gpus else {"CPU": 1}
    # Asked for first: with an autoscaler this brings up the nodes that are to be examined, and keeps them.
    places = placement_group([bundle] * world, strategy="SPREAD")
    placed = places.wait(config.wait)
    answers = on_each(alive_nodes(), platform.node)
    cure = "look at /tmp/ray/session_latest/logs on that node; end its Ray and start it again"
    yield judge("nodes answer", answers, cure)
    nodes = [node for node, answer in answers.items() if not isinstance(answer, NoAnswer)]
    config = with_whole_paths(config, "storage", "data")
    storage = config.storage
    marker = f".doctor-{secrets.token_hex(8)}"
    given = {"data": config.data, "storage": storage, "stage": config.stage, "marker": marker}
    # What the first node writes, each node must read. If it cannot write, its own row says why.
    writer = nodes[:1] if storage else []
    on_each(writer, write_file, storage, marker, seconds=STEP_SECONDS)
    yield from (check.run(nodes, given) for check in NODE_CHECKS if nodes)
    on_each(writer, remove_file, storage, marker, seconds=STEP_SECONDS)
    if placed:
        ranks = start_ranks(places, bundle, world)
        if gpus:
            yield check_gpus(ranks)
        yield check_all_reduce(ranks, gpus)
    else:
        there = ", ".join(f"{ray.cluster_resources().get(kind, 0):g} {kind}" for kind in ("CPU", "GPU"))
        yield Finding(
            "all-reduce",
            "failed",
            f"no room for {world} worker(s) of {bundle} within {config.wait} s; the cluster has {there}",
            "fewer --workers, end other jobs (`ray status`), or give the cluster longer to grow with --wait",
        )
    remove_placement_group(places)


def start_ranks(places: PlacementGroup, bundle: dict[str, int], world: int) -> dict[str, Any]:
    """An actor in each place, by its rank and its node's address."""
    ranks = {
        rank: ray.remote(Rank)
        .options(
            num_cpus=bundle["CPU"],
            num_gpus=bundle.get("GPU", 0),
            scheduling_strategy=PlacementGroupSchedulingStrategy(places, placement_group_bundle_index=rank),
        )
        .remote()
        for rank in range(world)
    }
    addresses = collect({rank: actor.address.remote() for rank, actor in ranks.items()})
    return {
        f"rank {rank}" + ("" if isinstance(address, NoAnswer) else f" on {address}"): ranks[rank]
        for rank, address in addresses.items()
    }
