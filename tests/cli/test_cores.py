"""How many cores a command may use: what taskset, Slurm, docker --cpus and Kubernetes leave it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.cli.cores import cores
from tests.processes import outside_clusters
from tests.runs import ROOT

MANY = 8


@pytest.mark.parametrize(
    ("group", "limits", "found"),
    [
        ("0::/", {}, MANY),
        ("0::/", {"cpu.max": "max 100000"}, MANY),
        ("0::/", {"cpu.max": "200000 100000"}, 2),
        # docker --cpus 1.5, and --cpus 0.3
        ("0::/", {"cpu.max": "150000 100000"}, 2),
        ("0::/", {"cpu.max": "30000 100000"}, 1),
        ("0::/", {"cpu.max": "6400000 100000"}, MANY),
        # Kubernetes without a namespace of cgroups: the pod has less than the container asks for.
        ("0::/pod/one", {"pod/cpu.max": "300000 100000", "pod/one/cpu.max": "400000 100000", "cpu.max": "max 1"}, 3),
        ("0::/pod/one", {"pod/cpu.max": "300000 100000", "pod/two/cpu.max": "100000 100000"}, 3),
        # The path is the host's, and the container sees its own group at the top.
        ("0::/docker/0123", {"cpu.max": "500000 100000"}, 5),
        # Version 1
        ("3:cpuset:/\n2:cpu,cpuacct:/a", {"cpu/a/cpu.cfs_quota_us": "350000", "cpu/a/cpu.cfs_period_us": "100000"}, 4),
        ("2:cpu,cpuacct:/a\n0::/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, MANY),
        ("4:cpuacct:/a", {"cpu/a/cpu.cfs_quota_us": "100000", "cpu/a/cpu.cfs_period_us": "100000"}, MANY),
    ],
)
def test_the_cores_are_those_that_the_cgroups_leave(
    group: str, limits: dict[str, str], found: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(MANY)))
    (tmp_path / "groups").write_text(f"{group}\n")
    for name, text in limits.items():
        (tmp_path / "mount" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mount" / name).write_text(f"{text}\n")
    assert cores(tmp_path / "groups", tmp_path / "mount") == found


def within_one_core(program: str) -> str:
    core = str(min(os.sched_getaffinity(0)))
    command = ["taskset", "--cpu-list", core, sys.executable, "-c", program]
    return subprocess.run(
        command, cwd=ROOT, env=outside_clusters(), capture_output=True, text=True, check=True
    ).stdout.strip()


def test_a_command_takes_the_cores_that_taskset_leaves_it() -> None:
    program = "from jobs.benchmark import BenchmarkConfig; print(BenchmarkConfig('a').threads)"
    assert within_one_core(program) == "1"


@pytest.mark.slow
def test_a_ray_that_a_command_starts_has_the_cores_that_taskset_leaves() -> None:
    program = "import ray; from jobs.cluster.connection import connected\n"
    program += "with connected(): print(int(ray.cluster_resources()['CPU']))"
    assert within_one_core(program) == "1"
