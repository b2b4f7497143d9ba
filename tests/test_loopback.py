"""A Ray that a command starts for itself listens on loopback only: read from the kernel's own table."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_shard_job import JOB, environment

LISTEN = "0A"
SCRIPT = """
import sys, ray
from jobs.cluster import connected
with connected(1):
    ray.get(ray.remote(lambda: 1).remote())
    print("up", flush=True)
    sys.stdin.readline()
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
def test_nothing_listens_beyond_loopback() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        cwd=JOB.parents[1],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert any(line.strip() == "up" for line in process.stdout)
        addresses = listening(process.pid)
    finally:
        process.stdin.close()
        process.wait(60)
        process.stdout.close()
    assert len(addresses) >= 4  # At least the GCS, the raylet's two and the worker's.
    # 127.x.y.z, little-endian; as IPv4, or mapped into IPv6.
    assert [a for a in addresses if not re.fullmatch(r"(0{16}FFFF0000)?[0-9A-F]{6}7F", a)] == []
