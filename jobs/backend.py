"""Ray Train's set-up of torch on every worker, by the node's own interface and address (`jobs.network`)."""

from __future__ import annotations

import dataclasses
from datetime import timedelta

import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _set_torch_distributed_env_vars, _TorchBackend
from ray.train.v2._internal.execution.worker_group import ExecutionGroup

from jobs.network import join, open_meeting


class NodeBackend(_TorchBackend):
    """Ray Train's set-up of torch, but for the interface and the meeting."""

    def on_start(self, worker_group: ExecutionGroup, backend_config: TorchConfig) -> None:
        gpus = worker_group.get_resources_per_worker().get("GPU", 0)
        backend = backend_config.backend or ("nccl" if gpus else "gloo")
        worker_group.execute(_set_torch_distributed_env_vars)
        meeting = worker_group.execute_single(0, open_meeting)
        world, limit = len(worker_group), timedelta(seconds=backend_config.timeout_s)
        ray.get([worker_group.execute_single_async(r, join, meeting, r, world, backend, limit) for r in range(world)])


@dataclasses.dataclass
class NodeTorchConfig(TorchConfig):
    """What TorchTrainer needs to set torch up by NodeBackend."""

    @property
    def backend_cls(self) -> type[NodeBackend]:
        return NodeBackend
