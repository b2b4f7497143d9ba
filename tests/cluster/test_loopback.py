"""A Ray that a command starts for itself, and training in it, listen on loopback only: by the kernel's own table."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.sharding.test_shard_job import JOB, environment

LISTEN = "0A"
DEADLINE_S = 280  # Of a machine with much else to do; it takes fifteen seconds on one that has not.
# Two ranks that have met, and a task's worker, wait until the file is there.
SCRIPT = """
import pathlib, sys, time
import ray, torch
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from jobs.training.backend import NodeTorchConfig
from jobs.cluster.connection import connected

storage = pathlib.Path(sys.argv[1])
def loop():
    total = torch.ones(1)
    torch.distributed.all_reduce(total)
    assert total.item() == 2
    if ray.train.get_context().get_world_rank() == 0:
        (storage / "met").touch()
    while not (storage / "end").exists():
        time.sleep(0.1)

with connected(2):
    run = RunConfig(name="run", storage_path=str(storage))
    scale = ScalingConfig(num_workers=2)
    TorchTrainer(loop, torch_config=NodeTorchConfig(run=str(storage)), scaling_config=scale, run_config=run).fit()
"""


def listening(session: int) -> list[str]:
    """The local addresses, in the kernel's hex, at which the processes of a session listen."""
    inodes = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(process.name)) == session:
                inodes |= set(re.findall(r"socket:\[(\d+)\]", " ".join(os.readlink(f) for f in process.glob("fd/*"))))
        except (ProcessLookupError, FileNotFoundError):
            continue  # It ended while we looked.
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTEN and fields[9] in inodes:
                found.append(fields[1].partition(":")[0])
    return found


@pytest.mark.slow
def test_nothing_listens_beyond_loopback(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        cwd=JOB.parents[1],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + DEADLINE_S
        while not (tmp_path / "met").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        addresses = listening(process.pid) if (tmp_path / "met").exists() else []
    finally:
        (tmp_path / "end").touch()
        output, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, output
    # The GCS, the raylet's two, the controller, the two ranks' and their Gloo's, and the store's.
    assert len(addresses) >= 9
    # 127.x.y.z, little-endian; as IPv4, or mapped into IPv6.
    assert [a for a in addresses if not re.fullmatch(r"(0{16}FFFF0000)?[0-9A-F]{6}7F", a)] == []
