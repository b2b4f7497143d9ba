"""Where a run goes on: rank 0 reads the newest whole checkpoint and sends it to the other ranks.

Were each rank to read for itself, one bad read would leave replicas that differ from then on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed, nn

from jobs.training import checkpoint
from jobs.training.checkpoint import is_damage, none_whole, scan
from jobs.training.run_state import CheckpointError, DamagedError, RunFingerprint
from jobs.training.run_storage import local_checkpoint, local_copy, set_aside
from model.alexnet import LAST_LAYER
from model.progress import Progress
from model.training import Trainer
from pipeline.storage.locations import join, shown


def resume(
    run: str, start: str | None, trainer: Trainer, identity: RunFingerprint, init_from: str | None = None
) -> bool:
    """Puts the trainer of every rank where the run left off.

    Args:
        run: the run's folder, a path or URL.
        start: the checkpoint of a run that has none of its own; None for initial weights.
        init_from: where these are (see `initialize`); None to leave the network as it is.

    Returns:
        Whether there was a checkpoint.

    Raises:
        CheckpointError: on rank 0, if no checkpoint is whole, they belong to another data set or configuration, or the
            initial weights do not fit.
    """
    found: list[Any] = [False, None]
    if trainer.worker.rank == 0:
        found[0] = _restore_newest(run, start, trainer, identity)
        if not found[0] and init_from is not None:
            initialize(trainer.network, identity, init_from)
        if found[0] or init_from is not None:
            momentum = [name for name, p in trainer.network.named_parameters() if p in trainer.optimizer.state]
            found[1] = trainer.progress.to_json(), momentum
    if trainer.worker.world > 1:
        distributed.broadcast_object_list(found, src=0, device=torch.device("cpu"))
        if found[1] is not None:
            _share(trainer, *found[1])
    return bool(found[0])


def initialize(network: nn.Module, identity: RunFingerprint, location: str) -> None:
    """Gives a network trained weights; its last layer stays as it is if theirs has another number of classes.

    Args:
        network: as the recipe initializes it.
        location: of a checkpoint_* folder or a run's folder (its best checkpoint).

    Raises:
        CheckpointError: if there are no such weights, or they are another network's.
    """
    with local_checkpoint(location) as (location, folder):
        state = checkpoint.read_state(folder)
        recipe, tensors = state.identity.recipe, checkpoint.load_tensors(folder, checkpoint.MODEL_FILE, state)
    where = shown(location)
    # Not all that a network computes shows in its tensors.
    differing = [
        f"{name} is {getattr(identity.recipe, name)} here and {getattr(recipe, name)} there "
        f"(--{name} {getattr(recipe, name)})"
        for name in ("groups", "normalization")
        if getattr(identity.recipe, name) != getattr(recipe, name)
    ]
    if differing:
        raise CheckpointError(f"the weights of {where} are another network's: {'; '.join(differing)}")
    said = f"starting with the weights of {where}"
    classes = len(tensors.get(f"{LAST_LAYER}.bias", identity.wnids))
    if classes != len(identity.wnids):
        said += (
            f": they tell {classes} classes apart, the set has {len(identity.wnids)}, so the last layer is made anew"
        )
        tensors |= {name: own for name, own in network.state_dict().items() if name.startswith(LAST_LAYER)}
    checkpoint.fill(network, tensors, where)
    print(said, flush=True)


def _restore_newest(run: str, start: str | None, trainer: Trainer, identity: RunFingerprint) -> bool:
    states, damaged = scan(run)
    broken = []
    for name in reversed(states):
        try:
            with local_copy(join(run, name)) as folder:
                checkpoint.restore(folder, trainer, identity)
        except (DamagedError, OSError) as error:
            if not is_damage(error, run):
                raise
            print(f"warning: {error}; taking the checkpoint before it", flush=True)
            damaged.append(error)
            broken.append(name)
            continue
        # Only now: a node that reads nothing right must not leave a run without checkpoints.
        for other in broken:
            set_aside(run, other)
        return True
    if damaged:
        raise none_whole(run, damaged)
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
