"""Checks, before an expensive run, what makes runs fail late: each node, the network, the storage and the data.

    ray job submit --working-dir . -- python jobs/doctor.py --data s3://BUCKET/shards --stage /mnt/nvme \
        --storage s3://BUCKET/runs --workers 8 --gpus

Give what the run will be given. Plain `python jobs/doctor.py` checks this machine alone. Prints a table with a cure for
each failure; exit status 1 if anything failed. Every step has a time limit, so that the doctor itself never hangs.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import random
import secrets
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import ray
import torch
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from jobs import checks
from jobs.checks import Finding, finding
from jobs.cli import GpuChoice, one_line, run
from jobs.cluster import CONNECT_SECONDS, connected, on_cluster
from jobs.inspector import Facts, Inspector, Rank, bus_bandwidth
from jobs.nodes import NoAnswer, Node, alive_nodes, collect, on
from pipeline.dataset import DatasetInfo, read_dataset, write_json
from pipeline.staging import read_remote_dataset
from pipeline.storage import is_url, on_disk

SAMPLE_SHARDS = 2  # Of each split, hashed on each node.
STEP_SECONDS = 120.0  # For what reads data or sums gradients.
PING_ROUNDS = 3
STEPS = 8  # More steps with a time limit than any run of the doctor has.


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


def main(config: DoctorConfig) -> None:
    """Examines the cluster and prints what it found.

    Raises:
        ValueError: if Ray cannot be reached, or anything failed, after the table was printed.
    """
    limit = CONNECT_SECONDS + config.wait + STEPS * STEP_SECONDS
    watchdog = threading.Timer(limit, _give_up, [limit])
    watchdog.daemon = True
    watchdog.start()
    with connected(config.workers, logging_level=logging.ERROR, log_to_driver=False):
        found = list(examine(config))
    watchdog.cancel()
    print_table(found)
    failed = [one.check for one in found if one.status == "failed"]
    if config.json is not None:
        write_json(config.json, {"failed": failed, "findings": [dataclasses.asdict(one) for one in found]})
    if failed:
        raise ValueError(f"{len(failed)} of {len(found)} checks failed ({', '.join(failed)}): the table has the cures")


def examine(config: DoctorConfig) -> Iterator[Finding]:
    """All findings, in the order in which one explains the next."""
    gpus = config.gpus if config.gpus is not None else ray.cluster_resources().get("GPU", 0) > 0
    usable = [row for row in ray.nodes() if row["Alive"] and row["Resources"].get("CPU", 0) >= 1]
    world = config.workers or (max(int(ray.cluster_resources().get("GPU", 0)), 1) if gpus else max(len(usable), 1))
    bundle = {"CPU": 1, **({"GPU": 1} if gpus else {})}
    # Asked for first: with an autoscaler this brings up the nodes that are to be examined, and keeps them.
    places = placement_group([bundle] * world, strategy="SPREAD")
    placed = places.wait(config.wait)
    nodes = alive_nodes()
    inspectors = {node: ray.remote(Inspector).options(**on(node)).remote() for node in nodes}
    answers = collect({node: one.facts.remote(config.stage) for node, one in inspectors.items()})
    facts: dict[Node, Facts] = {node: fact for node, fact in answers.items() if not isinstance(fact, NoAnswer)}
    yield finding(
        "nodes answer",
        [f"{node}: {fact.why}" for node, fact in answers.items() if isinstance(fact, NoAnswer)],
        f"{len(nodes)}: {', '.join(map(str, nodes[:8]))}{', ...' if len(nodes) > 8 else ''}",
        "look at /tmp/ray/session_latest/logs on that node; end its Ray and start it again",
    )
    if facts:
        inspectors = {node: inspectors[node] for node in facts}
        one_machine = not on_cluster()
        yield checks.check_versions(facts)
        yield checks.check_token(facts, one_machine)
        yield from checks.check_limits(facts)
        yield checks.check_clocks(measure_clocks(inspectors))
        yield from checks.check_gpus(facts, gpus, torch.version.cuda)
        yield check_storage(config.storage, inspectors)
        info, about_data = check_data(config, inspectors)
        yield about_data
        need = None if info is None else sum(part.bytes for part in info.splits.values())
        yield checks.check_disk(facts, need)
    if placed:
        yield check_all_reduce(places, bundle, world, gpus)
    else:
        yield Finding(
            "all-reduce",
            "failed",
            f"no room for {world} worker(s) of {bundle} within {config.wait} s; the cluster has "
            + ", ".join(f"{ray.cluster_resources().get(kind, 0):g} {kind}" for kind in ("CPU", "GPU")),
            "fewer --workers, end other jobs (`ray status`), or give the cluster longer to grow with --wait",
        )
    remove_placement_group(places)


def measure_clocks(inspectors: dict[Node, ray.actor.ActorHandle]) -> dict[Node, tuple[float, float]]:
    """How many seconds each node is ahead, by the quickest of a few calls, and half of that call's duration."""
    skews = {}
    for node, inspector in inspectors.items():
        best = (0.0, float("inf"))
        for _ in range(PING_ROUNDS):
            sent = time.time()
            answer = collect({node: inspector.clock.remote()})[node]
            doubt = (time.time() - sent) / 2
            if not isinstance(answer, NoAnswer) and doubt < best[1]:
                best = (answer - sent - doubt, doubt)
        skews[node] = best
    return skews


def check_storage(storage: str | None, inspectors: dict[Node, ray.actor.ActorHandle]) -> Finding:
    """A file that one node writes is read on every node."""
    if storage is None:
        return Finding("storage", "skipped", "give --storage to check it")
    location = storage if is_url(storage) else os.path.abspath(storage)
    name, data = f".doctor-{secrets.token_hex(8)}", secrets.token_bytes(1024)
    writer = next(iter(inspectors))
    cure = "give a --storage that every node can write and read: a URL (s3://, gs://) or a shared mount"
    written = collect({writer: inspectors[writer].write.remote(location, name, data)}, STEP_SECONDS)[writer]
    if isinstance(written, NoAnswer):
        return Finding(
            "storage", "failed", f"{writer} cannot write {storage}: {one_line(ValueError(written.why))}", cure
        )
    answers = collect({node: one.read.remote(location, name) for node, one in inspectors.items()}, STEP_SECONDS)
    collect({writer: inspectors[writer].remove.remote(location, name)}, STEP_SECONDS)
    wrong = [f"{node} does not read what {writer} wrote" for node, answer in answers.items() if not _same(answer, data)]
    return finding("storage", wrong, f"written on {writer}, read on {len(answers)} node(s)", cure)


def check_data(
    config: DoctorConfig, inspectors: dict[Node, ray.actor.ActorHandle]
) -> tuple[DatasetInfo | None, Finding]:
    """The same finished set is there for every node, and a sample of its shards has the right bytes."""
    if config.data is None:
        return None, Finding("data", "skipped", "give --data to check it")
    location = config.data if is_url(config.data) else os.path.abspath(config.data)
    try:
        info = read_remote_dataset(location) if is_url(location) else read_dataset(Path(location))
    except (ValueError, OSError) as error:
        return None, Finding("data", "failed", one_line(error), "give the --data of a finished set")
    sample = [
        (split, row)
        for split, part in info.splits.items()
        for row in random.Random(0).sample(part.shards, min(SAMPLE_SHARDS, len(part.shards)))
    ]
    prints = collect({node: one.fingerprint.remote(location) for node, one in inspectors.items()}, STEP_SECONDS)
    wrong = [
        f"{node} does not see this set"
        + (f" ({one_line(ValueError(seen.why))[:120]})" if isinstance(seen, NoAnswer) else "")
        for node, seen in prints.items()
        if seen != info.fingerprint
    ]
    if wrong:
        cure = (
            "put the set on a mount that every node has, or in an object store, and copy it to each disk with --stage"
        )
        return info, Finding("data", "failed", "; ".join(wrong), cure)
    # Spread over the nodes: one bad link or disk among them is met, too.
    readers = list(inspectors.items())
    calls = {
        (split, row): readers[number % len(readers)][1].digest_shard.remote(location, split, row.name)
        for number, (split, row) in enumerate(sample)
    }
    digests = collect(calls, STEP_SECONDS)
    bad = [row.name for (_, row), digest in digests.items() if digest != row.sha256]
    return info, finding(
        "data",
        [f"{name} is not the shard that dataset.json describes" for name in bad],
        f"{sum(part.samples for part in info.splits.values()):,} images; {len(sample)} shards hashed",
        f"python jobs/verify_shards.py --data {on_disk(location)} finds all damage, and says how to mend it",
    )


def check_all_reduce(places: ray.util.placement_group, bundle: dict[str, int], world: int, gpus: bool) -> Finding:
    """All ranks, placed as training places them, sum AlexNet's gradient."""
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
    name = "NCCL" if gpus else "Gloo"
    cure = (
        "all ports between the nodes must be open; GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, if set, must name the "
        "interface with the node's address, and be so before `ray start`; NCCL_DEBUG=INFO tells more"
    )
    store = collect({0: ranks[0].rendezvous.remote()})[0]
    if isinstance(store, NoAnswer):
        return Finding("all-reduce", "failed", f"rank 0: {store.why}", cure)
    calls = {rank: one.all_reduce.remote(store, rank, world, gpus, STEP_SECONDS / 2) for rank, one in ranks.items()}
    answers = collect(calls, STEP_SECONDS)
    for one in ranks.values():
        ray.kill(one)
    wrong = [f"rank {r}: {one_line(ValueError(a.why))}" for r, a in answers.items() if isinstance(a, NoAnswer)]
    if wrong:
        return Finding("all-reduce", "failed", f"{name}: " + "; ".join(wrong[:4]), cure)
    seconds, bandwidth = bus_bandwidth(list(answers.values()), world)
    text = f"{name}, {world} rank(s): AlexNet's gradient in {seconds:.3f} s, {bandwidth:.2f} GB/s"
    slow = [f"{text}, which is too slow to train over"] if world > 1 and bandwidth < checks.SLOWEST_GB_PER_S else []
    return finding("all-reduce", slow, text, cure)


def print_table(found: list[Finding]) -> None:
    """One line a finding, and below each failure its cure."""
    width = max(len(one.check) for one in found)
    for one in found:
        print(f"{one.status.upper():<8}{one.check:<{width}}  {one.found}")
        if one.cure:
            print(f"{'':8}{'':{width}}  cure: {one.cure}")


def _same(answer: object, data: bytes) -> bool:
    return isinstance(answer, bytes) and answer == data


def _give_up(seconds: float) -> None:
    print(
        f"error: the doctor had no end after {seconds:.0f} s: Ray itself hangs; start the cluster anew", file=sys.stderr
    )
    sys.stderr.flush()
    os._exit(1)


if __name__ == "__main__":
    run(DoctorConfig, main)
