"""What the doctor tries where a training worker would be: the device, and the exchange with the other ranks."""

from __future__ import annotations

import io
import statistics
import time
from datetime import timedelta
from typing import Literal

import numpy as np
import ray
import torch
from PIL import Image
from torch import distributed

from jobs.cluster.network import join, open_store
from pipeline.loading.graph import define

GRADIENT = 62_378_344  # float32 values that a step's all-reduce sums: AlexNet's parameters.
ROUNDS = 3
TIMEOUT = timedelta(seconds=60)


class Rank:
    """A Ray actor."""

    def address(self) -> str:
        """Of its node."""
        return str(ray.util.get_node_ip_address())

    def use_device(self, device: Literal["cpu", "gpu"]) -> str:
        """Runs torch and the DALI graph of training on the device; its name.

        Raises:
            RuntimeError: torch's or DALI's, if they cannot use it.
        """
        name = "CPU"
        if device == "gpu":
            torch.ones(1, device="cuda").sum().item()
            name = torch.cuda.get_device_name()
        jpeg = io.BytesIO()
        Image.new("RGB", (256, 256)).save(jpeg, "JPEG")
        batch = [np.frombuffer(jpeg.getvalue(), np.uint8)[None], np.zeros((1, 6), np.float32)]
        pipeline = define(lambda: batch, 1, 1, device, 0 if device == "gpu" else None)
        pipeline.build()
        pipeline.run()
        return name

    def rendezvous(self) -> tuple[str, int]:
        """Where the other ranks find this one: the node's address, and a port."""
        return open_store()

    def all_reduce(self, store: tuple[str, int], rank: int, world: int, backend: str) -> float:
        """Sums a gradient over all ranks; how many seconds it takes, the median of some rounds.

        Raises:
            RuntimeError: if a rank cannot be reached in time.
        """
        join(store, rank, world, backend, TIMEOUT)
        times = []
        try:
            # The first round makes the connections.
            for _ in range(ROUNDS + 1):
                values = torch.full((GRADIENT,), 1.0, device="cuda" if backend == "nccl" else "cpu")
                distributed.barrier()
                started = time.perf_counter()
                distributed.all_reduce(values)
                if backend == "nccl":
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - started)
        finally:
            distributed.destroy_process_group()
        return statistics.median(times[1:])
