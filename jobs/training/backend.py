"""Sets torch up in Ray Train's workers by the node's own interface and address, and has SIGTERM stop the run."""

from __future__ import annotations

import dataclasses
from datetime import timedelta
from typing import Any

import ray
from ray.train.torch import TorchConfig, TorchTrainer

from jobs.cluster.network import join, open_store, process_name
from jobs.cluster.ray_private import TrainerHooks
from jobs.training.stop_signals import ignore_sigterm, stop_on_sigterm

TorchBackend: Any = TorchConfig().backend_cls


class NodeBackend(TorchBackend):
    """Ray Train's backend for torch, but for the interface and the rendezvous store."""

    # Not super().on_start(): the store that it opens listens on all addresses.
    def on_start(self, worker_group: Any, backend_config: NodeTorchConfig) -> None:
        gpus = worker_group.get_resources_per_worker().get("GPU", 0)
        # What is on the CPU, as the word that a run shall stop, goes by Gloo and waits for no GPU.
        backend = backend_config.backend or ("cpu:gloo,cuda:nccl" if gpus else "gloo")
        # By which a process that Ray or `jobs.training.watchdog` speaks of is told.
        places = [f"rank {rank} is {place}" for rank, place in enumerate(worker_group.execute(process_name))]
        print(f"workers: {', '.join(places)}", flush=True)
        store = worker_group.execute_single(0, open_store)
        world, limit = len(worker_group), timedelta(seconds=backend_config.timeout_s)
        ray.get([worker_group.execute_single_async(r, join, store, r, world, backend, limit) for r in range(world)])

    def on_training_start(self, worker_group: Any, backend_config: NodeTorchConfig) -> None:
        worker_group.execute(stop_on_sigterm, backend_config.run)

    def on_shutdown(self, worker_group: Any, backend_config: NodeTorchConfig) -> None:
        # Without waiting: some may be dead.
        worker_group.execute_async(ignore_sigterm)
        super().on_shutdown(worker_group, backend_config)


@dataclasses.dataclass
class NodeTorchConfig(TorchConfig):
    """Has TorchTrainer use NodeBackend."""

    run: str = ""
    """The run's folder, a path or URL."""

    @property
    def backend_cls(self) -> type[NodeBackend]:
        return NodeBackend


class NodeTrainer(TrainerHooks, TorchTrainer):
    """A TorchTrainer that leaves Ctrl-C to its caller."""
