"""How many cores a process may use. Imports nothing heavy, as command lines have it as a default."""

from __future__ import annotations

import math
import os
from pathlib import Path


def cores(groups: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")) -> int:
    """The cores that this process may use: those of its affinity (taskset, Slurm), up to the CPU limit of its cgroups,
    rounded up (docker --cpus, Kubernetes).

    Args:
        groups: this process's cgroups; a parameter for tests.
        mount: where cgroups are mounted; a parameter for tests.
    """
    most = float(len(os.sched_getaffinity(0)))
    for line in groups.read_text("utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        # Version 2 has one hierarchy without a name, version 1 one for each controller.
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = mount / "cpu" if controllers else mount
        # A limit holds for all below it. A container may see its own group at the top, and its path not at all.
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(top):
                most = min(most, _limit(folder))
    return math.ceil(most)


def _limit(group: Path) -> float:
    """A cgroup's CPU limit in cores; infinite if it has none."""
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text("ascii").split()
        else:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text("ascii").strip() for name in ("quota", "period"))
    except OSError:
        return math.inf
    return int(quota) / int(period) if quota not in ("max", "-1") else math.inf
