"""A Ray cluster of several raylets on loopback, all on this machine."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from ray._private import ray_constants
from ray.cluster_utils import Cluster

from jobs.cluster.connection import LOOPBACK_SWITCH
from tests import ROOT
from tests.processes import below

NODE = {"node_ip_address": "127.0.0.1", "object_store_memory": 100 * 2**20}


@contextlib.contextmanager
def raylets(count: int, cpus: int = 1) -> Iterator[Cluster]:
    """So many, with so many CPUs each, of which the first is the head. Commands join them by RAY_ADDRESS meanwhile.

    The cluster's own processes find the project, as on nodes where it is installed.
    """
    node = {**NODE, "num_cpus": cpus}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**LOOPBACK_SWITCH, "PYTHONPATH": str(ROOT)}.items():
            patch.setenv(name, value)
        # Ray reads the switch at import. Without it, what joins from this process asks for another address.
        patch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", False)
        cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
        try:
            for _ in range(count - 1):
                cluster.add_node(**node)
            patch.setenv("RAY_ADDRESS", cluster.address)
            yield cluster
        finally:
            cluster.shutdown()


def raylet_of(node: Any) -> int:
    """The process id of a node's raylet."""
    pid: int = node.all_processes["raylet"][0].process.pid
    return pid


def lose(node: Any) -> None:
    """SIGKILLs a node's raylet and all that it started."""
    raylet = raylet_of(node)
    for pid in (raylet, *below(raylet)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
