"""Ray Train where it is done otherwise here: torch is set up by the node's own interface and address (`jobs.network`),
Ctrl-C is not an abort, and a Ray of one machine has nobody look after a dead run's room."""

from __future__ import annotations

import dataclasses
from datetime import timedelta
from typing import Any

import ray
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.torch.config import _set_torch_distributed_env_vars, _TorchBackend
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.worker_group import ExecutionGroup

from jobs.cluster import on_cluster
from jobs.network import join, open_meeting, process_name


class NodeBackend(_TorchBackend):
    """Ray Train's set-up of torch, but for the interface and the meeting."""

    def on_start(self, worker_group: ExecutionGroup, backend_config: TorchConfig) -> None:
        gpus = worker_group.get_resources_per_worker().get("GPU", 0)
        backend = backend_config.backend or ("nccl" if gpus else "gloo")
        worker_group.execute(_set_torch_distributed_env_vars)
        # By which a process that Ray or `jobs.hang` speaks of is told.
        places = [f"rank {rank} is {place}" for rank, place in enumerate(worker_group.execute(process_name))]
        print(f"workers: {', '.join(places)}", flush=True)
        meeting = worker_group.execute_single(0, open_meeting)
        world, limit = len(worker_group), timedelta(seconds=backend_config.timeout_s)
        ray.get([worker_group.execute_single_async(r, join, meeting, r, world, backend, limit) for r in range(world)])


@dataclasses.dataclass
class NodeTorchConfig(TorchConfig):
    """What TorchTrainer needs to set torch up by NodeBackend."""

    @property
    def backend_cls(self) -> type[NodeBackend]:
        return NodeBackend


class NodeTrainer(TorchTrainer):
    """Ray Train's trainer, which leaves signals to its caller."""

    def _register_sigint_handler(self, controller: object) -> None:
        """Ray Train would take Ctrl-C for a wish to leave at once, without a word or a checkpoint."""

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        if on_cluster():
            return callbacks
        # An actor frees the room of a run whose driver died, as the dashboard tells. A Ray that was started for this
        # run has none, and ends with its driver; the actor would complain once a second, or ask another Ray on this
        # machine, which does not know the run, and take the room of the living.
        return [callback for callback in callbacks if not isinstance(callback, PlacementGroupCleanerCallback)]
