"""Where a run goes on: rank 0 reads the newest whole checkpoint and sends it to the other ranks.

Were each rank to read for itself, one bad read would leave replicas that differ from then on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed

from jobs.training import checkpoint
from jobs.training.checkpoint import scan
from jobs.training.run_state import CheckpointError, DamagedError, RunFingerprint
from jobs.training.run_storage import local_checkpoint, local_copy, set_aside
from model.training import Progress, Trainer
from pipeline.storage.locations import join, shown


def resume(run: str, start: str | None, trainer: Trainer, identity: RunFingerprint) -> bool:
    """Puts the trainer of every rank where the run left off.

    Args:
        run: the run's folder, a path or URL.
        start: the checkpoint of a run that has none of its own; None for initial weights.

    Returns:
        Whether there was a checkpoint.

    Raises:
        CheckpointError: on rank 0, if no checkpoint is whole, or they belong to another data set or configuration.
    """
    found: list[Any] = [None]
    if trainer.worker.rank == 0 and _restore_newest(run, start, trainer, identity):
        momentum = [name for name, p in trainer.network.named_parameters() if p in trainer.optimizer.state]
        found = [(trainer.progress.to_json(), momentum)]
    if trainer.worker.world > 1:
        distributed.broadcast_object_list(found, src=0, device=torch.device("cpu"))
        if found[0] is not None:
            _share(trainer, *found[0])
    return found[0] is not None


def _restore_newest(run: str, start: str | None, trainer: Trainer, identity: RunFingerprint) -> bool:
    states, damaged = scan(run)
    broken = []
    for name in reversed(states):
        try:
            with local_copy(join(run, name)) as folder:
                checkpoint.restore(folder, trainer, identity)
        except DamagedError as error:
            print(f"warning: {error}; taking the checkpoint before it", flush=True)
            damaged.append(error)
            broken.append(name)
            continue
        # Only now: a node that reads nothing right must not leave a run without checkpoints.
        for other in broken:
            set_aside(run, other)
        return True
    if damaged:
        raise CheckpointError(f"no checkpoint of {shown(run)} is whole: {damaged[0]}. Use another --name")
    if start is not None:
        with local_checkpoint(start) as (_, folder):
            checkpoint.restore(folder, trainer, identity)
    return start is not None


@torch.no_grad()
def _share(trainer: Trainer, progress: dict[str, Any], momentum: list[str]) -> None:
    """Sends rank 0's weights and momentum to the others, and puts them where it stands."""
    if trainer.worker.rank != 0:
        checkpoint.momentum_buffers(trainer, momentum)
        trainer.resume(Progress.from_json(progress))
    buffers = [
        trainer.optimizer.state[p]["momentum_buffer"]
        for p in trainer.network.parameters()
        if p in trainer.optimizer.state
    ]
    for tensor in [*trainer.network.state_dict().values(), *buffers]:
        sent = tensor.contiguous()
        distributed.broadcast(sent, src=0)
        tensor.copy_(sent)
