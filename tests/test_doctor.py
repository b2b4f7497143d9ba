"""The doctor: its judgements on made-up nodes, and the command on a real Ray with real faults."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jobs.checks import check_clocks, check_disk, check_gpus, check_limits, check_token, check_versions
from jobs.inspector import Facts, Gpu, bus_bandwidth, read_gpus
from jobs.nodes import Node
from tests import hosts
from tests.processes import outside_clusters

ROOT = Path(__file__).resolve().parent.parent
NO_HOSTS = hosts.missing()
A, B = Node("a", "10.0.0.1", "one", 1, 8), Node("b", "10.0.0.2", "two", 1, 8)
VERSIONS = {"python": "3.11.7", "ray": "2.60.0", "torch": "2.14.1", "this project's code": "abc"}
GOOD = Facts(VERSIONS, "token", 65_536, 2**34, 10**12, (Gpu("A100", "580.10", 0, 5),), "")
CUDA = "13.0"


def statuses(other: Facts) -> dict[str, str]:
    """What two nodes come to, of which one is good."""
    facts = {A: GOOD, B: other}
    found = [check_versions(facts), check_token(facts, False), *check_limits(facts), check_disk(facts, 10**11)]
    return {one.check: one.status for one in [*found, *check_gpus(facts, True, CUDA)]}


def test_two_good_nodes_pass() -> None:
    assert set(statuses(GOOD).values()) == {"ok"}


@pytest.mark.parametrize(
    ("change", "check"),
    [
        ({"versions": {**VERSIONS, "torch": "2.13.0"}}, "versions"),
        ({"versions": {**VERSIONS, "this project's code": "abd"}}, "versions"),
        ({"auth_mode": ""}, "token"),
        ({"nofile": 1024}, "open files"),
        ({"shm_bytes": 64 * 2**20}, "/dev/shm"),
        ({"free_bytes": 10**10}, "disk"),
        ({"gpus": (), "gpu_error": "no such file"}, "GPUs visible"),
        ({"gpus": (Gpu("A100", "580.10", 97, 5),)}, "GPUs idle"),
        ({"gpus": (Gpu("A100", "580.10", 0, 30_000),)}, "GPUs idle"),
        ({"gpus": (Gpu("A100", "550.54", 0, 5),)}, "GPU driver"),
    ],
)
def test_each_fault_fails_its_own_check_alone(change: dict[str, Any], check: str) -> None:
    found = statuses(dataclasses.replace(GOOD, **change))
    assert {name for name, status in found.items() if status == "failed"} == {check}


def test_a_driver_is_not_judged_for_a_cuda_that_is_not_known() -> None:
    old, new = ("GPU driver", "skipped"), ("GPU driver", "failed")
    mixed = {A: GOOD, B: dataclasses.replace(GOOD, gpus=(Gpu("A100", "590.10", 0, 5),))}
    for facts, cuda, wanted in (({A: GOOD}, "14.0", old), ({A: GOOD}, None, old), (mixed, "14.0", new)):
        assert [(one.check, one.status) for one in check_gpus(facts, True, cuda)][-1] == wanted


def test_a_clock_is_wrong_only_beyond_the_doubt_of_its_measurement() -> None:
    assert check_clocks({A: (0.1, 0.01), B: (6.0, 2.0)}).status == "ok"
    wrong = check_clocks({A: (0.1, 0.01), B: (-60.0, 2.0)})
    assert (wrong.status, "10.0.0.2 is -60.0 s" in wrong.found) == ("failed", True)


def test_what_nvidia_smi_prints_is_read() -> None:
    text = "NVIDIA A100-SXM4-40GB, 580.65.06, 12, 431\nNVIDIA A100-SXM4-40GB, 580.65.06, [N/A], 0\n"
    assert [(gpu.driver, gpu.utilisation, gpu.used_mib) for gpu in read_gpus(text)] == [
        ("580.65.06", 12, 431),
        ("580.65.06", 0, 0),
    ]


def test_bus_bandwidth_is_a_rings() -> None:
    # Two ranks: each link carries the buffer once. 249.5 MB in a second; the slowest rank counts.
    seconds, bandwidth = bus_bandwidth([[1.0, 0.5, 0.5], [0.5, 1.0, 1.0]], 2)
    assert (seconds, bandwidth) == (1.0, pytest.approx(0.249513, rel=1e-4))


def doctor(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = outside_clusters()
    return subprocess.run(
        [sys.executable, "jobs/doctor.py", *map(str, arguments)],
        cwd=ROOT,
        env={**inherited, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
def test_a_healthy_machine_passes_and_a_bad_storage_and_a_damaged_shard_are_named(
    shard_set: Path, tmp_path: Path
) -> None:
    common = ["--stage", tmp_path, "--workers", 2, "--json", tmp_path / "found.json"]
    done = doctor("--data", shard_set, "--storage", tmp_path / "runs", *common)
    found = {row["check"]: row for row in json.loads((tmp_path / "found.json").read_text())["findings"]}
    assert done.returncode == 0, done.stdout + done.stderr
    assert {name for name, row in found.items() if row["status"] == "ok"} >= {"storage", "data", "disk", "all-reduce"}
    assert not list((tmp_path / "runs").iterdir())

    damaged = tmp_path / "damaged"
    shutil.copytree(shard_set, damaged)
    for tar in damaged.rglob("*.tar"):
        data = bytearray(tar.read_bytes())
        data[3000] ^= 1
        tar.write_bytes(data)
    # /proc can be written by nobody, root included.
    done = doctor("--data", damaged, "--storage", "/proc/runs", *common)
    written = json.loads((tmp_path / "found.json").read_text())
    assert (done.returncode, set(written["failed"])) == (1, {"storage", "data"})
    assert all(row["cure"] for row in written["findings"] if row["status"] == "failed")
    assert "verify_shards.py" in done.stdout


@pytest.mark.long
@pytest.mark.skipif(NO_HOSTS is not None, reason=str(NO_HOSTS))
def test_what_is_wrong_with_one_host_of_two_is_named(shard_set: Path, tmp_path: Path) -> None:
    local = tmp_path / "disk"
    poor = "ulimit -n 2048; mount -t tmpfs -o size=64m tmpfs /dev/shm; mount -o remount,size=10k $DISK"
    with hosts.cluster((1, 1), local, prepare={2: poor}) as two:
        submit = ["ray", "job", "submit", "--address", f"http://{hosts.NETWORK}.1:8265", "--working-dir", ROOT, "--"]
        where = ["--data", shard_set, "--storage", local / "runs", "--stage", local, "--workers", 2]
        found = tmp_path / "found.json"
        done = two[1].run(*submit, "python", "jobs/doctor.py", *where, "--json", found, timeout=240)
    rows = {row["check"]: row for row in json.loads(found.read_text())["findings"]}
    failed = {name for name, row in rows.items() if row["status"] == "failed"}
    assert (done.returncode, failed) == (1, {"storage", "disk", "open files", "/dev/shm"}), done.stdout
    for name in failed:
        assert f"{hosts.NETWORK}.2" in rows[name]["found"]
        # Of the storage it also says who wrote what the other does not read.
        assert name == "storage" or f"{hosts.NETWORK}.1 " not in rows[name]["found"]
    assert {name for name, row in rows.items() if row["status"] == "ok"} >= {"versions", "token", "data", "all-reduce"}
