"""The doctor's judgements: from what the nodes told to findings with a cure. Nothing here touches a machine."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Literal

from jobs.inspector import Facts
from jobs.nodes import Node

LEAST_FILES = 16_384  # A set of 1,281 shards stays mapped, beside a socket to each peer and Ray's own.
LEAST_SHM = 2 * 2**30  # Bytes. Docker gives 64 MB unless told; NCCL and Ray's object store want more.
BUSY_PERCENT = 10
BUSY_MIB = 1000  # A driver with nothing running holds a few hundred.
MOST_SKEW = 5.0  # Seconds. Logs and events of several nodes are no longer in order; S3 refuses at 900.
SLOWEST_GB_PER_S = 0.1  # A 1 Gb/s network carries as much: a step of AlexNet would wait five seconds for its gradient.
# The driver branch that every CUDA of a major version runs on, by table 1 of DRIVER_TABLE. requirements.lock has 13.
DRIVER_TABLE = "https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html"
LEAST_DRIVER = {12: 525, 13: 580}


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the table."""

    check: str
    status: Literal["ok", "failed", "skipped"]
    found: str
    cure: str = ""
    """What to do; empty where nothing is."""


def finding(check: str, wrong: list[str], right: str, cure: str) -> Finding:
    """Failed with all that is wrong, or ok."""
    return Finding(check, "failed", "; ".join(wrong), cure) if wrong else Finding(check, "ok", right)


def check_versions(facts: Mapping[Node, Facts]) -> Finding:
    """Python, the packages and the code are the same on all nodes."""
    wrong = []
    names = list(next(iter(facts.values())).versions)
    for name in names:
        holders = collections.defaultdict(list)
        for node, fact in facts.items():
            holders[fact.versions[name]].append(str(node))
        if len(holders) > 1 or "missing" in holders:
            wrong.append(f"{name} is " + ", ".join(f"{v} on {_some(who)}" for v, who in holders.items()))
    first = next(iter(facts.values())).versions
    shown = ", ".join(f"{name} {first[name]}" for name in ("python", "ray", "torch"))
    return finding(
        "versions",
        wrong,
        f"{shown} and {len(names) - 3} more, on {len(facts)} node(s)",
        "install requirements.lock with Python 3.11 on each node; `ray job submit --working-dir .` brings the code",
    )


def check_token(facts: Mapping[Node, Facts], one_machine: bool) -> Finding:
    """Every node asks for the token; a Ray of this machine alone listens on loopback and is left as it is."""
    if one_machine:
        return Finding("token", "skipped", "Ray runs on this machine alone, on loopback")
    return finding(
        "token",
        [
            f"RAY_AUTH_MODE is {fact.auth_mode or 'not set'} on {node}"
            for node, fact in facts.items()
            if fact.auth_mode != "token"
        ],
        f"required on {len(facts)} node(s)",
        "export RAY_AUTH_MODE=token before `ray start` on each node, with one token (ray get-auth-token --generate)",
    )


def check_limits(facts: Mapping[Node, Facts]) -> Iterator[Finding]:
    """Open files and shared memory."""
    yield finding(
        "open files",
        [f"{fact.nofile} on {node}" for node, fact in facts.items() if fact.nofile < LEAST_FILES],
        f"at least {min(fact.nofile for fact in facts.values()):,}",
        "`ulimit -n 65536` before `ray start` (a container: --ulimit nofile=65536)",
    )
    yield finding(
        "/dev/shm",
        [f"{fact.shm_bytes / 2**30:.2f} GiB on {node}" for node, fact in facts.items() if fact.shm_bytes < LEAST_SHM],
        f"at least {min(fact.shm_bytes for fact in facts.values()) / 2**30:.1f} GiB",
        f"{LEAST_SHM / 2**30:.0f} GiB or more: `docker run --shm-size`, an emptyDir of medium Memory in Kubernetes",
    )


def check_clocks(skews: Mapping[Node, tuple[float, float]]) -> Finding:
    """Each node's clock against this one's.

    Args:
        skews: seconds that the node is ahead, and how far off that may be.
    """
    return finding(
        "clocks",
        [f"{node} is {skew:+.1f} s off" for node, (skew, doubt) in skews.items() if abs(skew) - doubt > MOST_SKEW],
        f"within {max(abs(skew) + doubt for skew, doubt in skews.values()):.2f} s",
        "start the nodes' time service (timedatectl set-ntp true)",
    )


def check_disk(facts: Mapping[Node, Facts], need: int | None) -> Finding:
    """Room for the set in the folder to stage to.

    Args:
        need: bytes of the set; None if no set was given.
    """
    free = {node: fact.free_bytes for node, fact in facts.items() if fact.free_bytes is not None}
    if not free or need is None:
        return Finding("disk", "skipped", "give --data and --stage to check the room for staging")
    return finding(
        "disk",
        [
            f"{there / 1e9:.1f} GB free on {node}, {need / 1e9:.1f} GB needed"
            for node, there in free.items()
            if there < need
        ],
        f"at least {min(free.values()) / 1e9:.1f} GB free, {need / 1e9:.1f} GB needed",
        "free some, or give a larger disk with --stage; what was staged there before counts as used",
    )


def check_gpus(facts: Mapping[Node, Facts], wanted: bool, cuda: str | None) -> Iterator[Finding]:
    """GPUs are there, idle, alike, and their driver is new enough for the CUDA of torch and DALI.

    Args:
        wanted: whether the run is to use GPUs.
        cuda: torch.version.cuda.
    """
    if not wanted:
        yield Finding("GPUs", "skipped", "the cluster offers none and --gpus was not given")
        return
    having = {node: fact for node, fact in facts.items() if fact.gpus or node.gpus}
    wrong = [
        f"{node} offers {node.gpus} to Ray, nvidia-smi shows {len(fact.gpus)}"
        + (f" ({fact.gpu_error})" if fact.gpu_error else "")
        for node, fact in having.items()
        if len(fact.gpus) != node.gpus
    ]
    kinds = sorted({gpu.name for fact in having.values() for gpu in fact.gpus})
    count = sum(len(fact.gpus) for fact in having.values())
    if not having:
        wrong.append("no node has one")
    yield finding(
        "GPUs visible",
        wrong,
        f"{count} x {' and '.join(kinds)}",
        "mend the driver on that node until nvidia-smi lists the GPUs, and `ray start` it again",
    )
    yield finding(
        "GPUs idle",
        [
            f"GPU {number} of {node} is {gpu.utilisation} % busy with {gpu.used_mib} MiB in use"
            for node, fact in having.items()
            for number, gpu in enumerate(fact.gpus)
            if gpu.utilisation > BUSY_PERCENT or gpu.used_mib > BUSY_MIB
        ],
        f"{count} of {count}",
        "end what uses it (`nvidia-smi` on that node names the process)",
    )
    least = LEAST_DRIVER.get(int((cuda or "0").split(".")[0]))
    drivers = sorted({gpu.driver for fact in having.values() for gpu in fact.gpus})
    wrong = [f"{' and '.join(drivers)} on different nodes"] if len(drivers) > 1 else []
    if least is None and not wrong:
        found = f"{', '.join(drivers) or 'none'}; which one CUDA {cuda} needs is not known here: see {DRIVER_TABLE}"
        yield Finding("GPU driver", "skipped", found)
        return
    wrong += [
        f"{driver} is too old for the CUDA {cuda} of torch and DALI"
        for driver in drivers
        if least is not None and int(driver.split(".")[0]) < least
    ]
    yield finding(
        "GPU driver",
        wrong,
        f"{', '.join(drivers) or 'none'}, good for CUDA {cuda}",
        f"install the same driver on all nodes, {least or 'new enough'} or newer ({DRIVER_TABLE})",
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
