"""Checkpoints: network and momentum as safetensors, everything else as JSON; nothing in them is ever executed.

    model.safetensors       the network's parameters and running statistics by name
    optimizer.safetensors   each parameter's momentum by the same name
    state.json              what was being trained on what, how far it had come, and a sha256 of each file

A run's checkpoints are the folders below its own that hold a state.json, which is written last: a folder without one is
unfinished, and is never used.
"""

from __future__ import annotations

import errno
import hashlib
import math
import re
from collections.abc import Collection
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import nn

from jobs.cli.command import log
from jobs.training.run_state import STATE_FILE, CheckpointError, DamagedError, RunFingerprint, State
from model.recipe import Recipe
from model.training import Trainer
from pipeline.dataset.info import DatasetInfo
from pipeline.storage import remote
from pipeline.storage.locations import is_url, join, shown

MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
CHECKPOINT_PREFIX = "checkpoint_"
_PLACE = re.compile(rf"{CHECKPOINT_PREFIX}(\d+)_(\d+)")


def save_tensors(folder: Path, trainer: Trainer) -> None:
    """Writes a checkpoint's files but for `state.json`.

    Raises:
        OSError, SafetensorError: if the disk fails.
    """
    momentum = {
        name: trainer.optimizer.state[parameter]["momentum_buffer"].contiguous()
        for name, parameter in trainer.network.named_parameters()
        if parameter in trainer.optimizer.state
    }
    _save_network(folder, trainer.network)
    safetensors.save_file(momentum, folder / OPTIMIZER_FILE)


def save_network(folder: Path, network: nn.Module, state: State) -> None:
    """Writes what evaluation needs: a network's tensors, and what they are."""
    _save_network(folder, network)
    remote.write(folder / STATE_FILE, state.to_json(digests(folder)))


def _save_network(folder: Path, network: nn.Module) -> None:
    tensors = {name: tensor.detach().contiguous() for name, tensor in network.state_dict().items()}
    safetensors.save_file(tensors, folder / MODEL_FILE)


def digests(folder: Path) -> dict[str, str]:
    """The sha256 of each of a checkpoint's files but for `state.json`, by name."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def read_state(folder: Path) -> State:
    """A checkpoint's state; CheckpointError if the folder is none."""
    try:
        text = (folder / STATE_FILE).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise DamagedError(f"{folder} is no checkpoint: it has no {STATE_FILE}; give a checkpoint_* folder") from None
    return State.from_json(text, str(folder / STATE_FILE))


def restore(folder: Path, trainer: Trainer, identity: RunFingerprint) -> None:
    """Puts a trainer where a checkpoint left off.

    Raises:
        DamagedError: if the checkpoint's files are not those that were written; the trainer is as before.
        CheckpointError: if the checkpoint belongs to another data set or configuration.
    """
    state = read_state(folder)
    check_other(state, identity, str(folder))
    momentum = load_tensors(folder, OPTIMIZER_FILE, state)
    load_network(folder, trainer.network)
    for name, buffer in momentum_buffers(trainer, momentum).items():
        buffer.copy_(momentum[name])
    # The same checkpoint may be the end of a shorter run.
    state.progress.finished = finished(state, identity.recipe)
    trainer.resume(state.progress)


def momentum_buffers(trainer: Trainer, names: Collection[str]) -> dict[str, torch.Tensor]:
    """Makes the momentum of these parameters, not filled yet, in their memory layout."""
    buffers = {}
    for name, parameter in trainer.network.named_parameters():
        if name in names:
            buffers[name] = torch.empty_like(parameter, memory_format=torch.preserve_format)
            trainer.optimizer.state[parameter]["momentum_buffer"] = buffers[name]
    return buffers


def finished(state: State, recipe: Recipe) -> bool:
    """Whether nothing is left to do under a recipe, which may ask for more epochs than the checkpoint's."""
    return state.progress.schedule.stopped or state.progress.epoch >= recipe.epochs


def check_other(state: State, identity: RunFingerprint, where: str) -> None:
    """Raises CheckpointError if a checkpoint is not of this data set and configuration."""
    differences = state.identity.differences(identity)
    if differences:
        raise CheckpointError(
            f"{where} belongs to another run: {'; '.join(differences)}. Use another --name, or the run's own settings"
        )


def check_other_classes(identity: RunFingerprint, info: DatasetInfo, checkpoint: str, data: str) -> None:
    """Raises CheckpointError if a checkpoint tells other classes apart than a shard set has."""
    wnids = tuple(label.wnid for label in info.classes)
    if identity.wnids != wnids:
        raise CheckpointError(
            f"{checkpoint} tells {len(identity.wnids)} classes apart ({identity.wnids[0]} ...), the set {data} has "
            f"{len(wnids)} ({wnids[0]} ...): give a set with the same classes in the same order"
        )


def load_network(folder: Path, network: nn.Module) -> None:
    """Copies a checkpoint's tensors into a network of the same shape, on any device and memory layout.

    Raises:
        DamagedError: if the file is not the one that was written.
        CheckpointError: if a tensor is missing, superfluous or of another shape.
    """
    fill(network, load_tensors(folder, MODEL_FILE, read_state(folder)), str(folder / MODEL_FILE))


@torch.no_grad()
def fill(network: nn.Module, tensors: dict[str, torch.Tensor], where: str) -> None:
    """Copies tensors into a network by name.

    Raises:
        CheckpointError: naming `where`, if one is missing, superfluous or of another shape.
    """
    named = network.state_dict()
    odd = sorted(tensors.keys() ^ named.keys()) or [n for n in named if named[n].shape != tensors[n].shape]
    if odd:
        raise CheckpointError(f"{where} does not fit this network: {', '.join(odd)} differ(s)")
    for name, parameter in named.items():
        parameter.copy_(tensors[name])


def load_tensors(folder: Path, name: str, state: State) -> dict[str, torch.Tensor]:
    """Reads one of a checkpoint's files.

    Raises:
        DamagedError: if the file is not the one that was written.
    """
    try:
        # Read once: what is hashed is what is used.
        data = (folder / name).read_bytes()
        if hashlib.sha256(data).hexdigest() != state.files.get(name):
            raise DamagedError(f"{folder / name} is damaged: its sha256 is not the one in {STATE_FILE}")
        return safetensors.load(data)
    except (SafetensorError, FileNotFoundError) as error:
        raise DamagedError(f"{folder / name} is damaged or missing ({error})") from error


def scan(run: str) -> tuple[dict[str, State], list[Exception]]:
    """The checkpoints of the run at a path or URL, as far as their states tell.

    Returns:
        the states by folder name, in the order of training; an error for each state that is damaged.
    """
    states: dict[str, State] = {}
    damaged: list[Exception] = []
    for folder in _folders(run):
        where = join(run, folder, STATE_FILE)
        try:
            states[folder] = State.from_json(remote.read(where), shown(where))
        except FileNotFoundError:
            continue  # Unfinished, or just being removed.
        except (DamagedError, OSError) as error:
            if not is_damage(error, run):
                raise
            damaged.append(error)
    return dict(sorted(states.items(), key=lambda item: (item[1].progress.epoch, item[1].progress.step))), damaged


def is_damage(error: Exception, run: str) -> bool:
    """Whether one file of a run is damaged, or on a disk cannot be read; any other OSError may be all the storage's."""
    return isinstance(error, DamagedError) or (_unreadable(error) and not is_url(run))


def _unreadable(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno == errno.EIO


def none_whole(run: str, errors: list[Exception]) -> Exception:
    """The error for a run with no whole checkpoint, of those of its checkpoints."""
    if all(_unreadable(error) for error in errors):
        return errors[0]  # All the disk fails.
    return CheckpointError(f"no checkpoint of {shown(run)} is whole: {errors[-1]}. Use another --name")


def _folders(run: str) -> list[str]:
    """What is named as a run's checkpoints are."""
    return [
        item.name
        for item in remote.scan(run, missing_ok=True)
        if item.folder and item.name.startswith(CHECKPOINT_PREFIX)
    ]


def committed(run: str) -> dict[str, State]:
    """`scan`'s states; what is damaged is logged.

    Raises:
        CheckpointError: if all are damaged.
        OSError: if none can be read.
    """
    states, damaged = scan(run)
    if damaged and not states:
        raise none_whole(run, damaged)
    for error in damaged:
        log(f"warning: left out: {error}")
    return states


def best(states: dict[str, State]) -> str | None:
    """Of a run's checkpoints at an epoch's end, the one with the lowest validation top-1 error; the first of equals."""
    ended = [name for name, state in states.items() if state.progress.step == 0 and state.progress.history]
    return min(ended, key=lambda name: _error(states[name]), default=None)


def superfluous(states: dict[str, State], keep: int) -> list[str]:
    """Which checkpoints may go: all but the newest two, as the newest may turn out damaged, and the `keep` best."""
    names = list(states)
    # Equals stay in their order, so that the best one is among them.
    ranked = sorted((name for name in names if _error(states[name]) < math.inf), key=lambda name: _error(states[name]))
    return [name for name in names if name not in {*names[-2:], *ranked[:keep]}]


def half(run: str, states: dict[str, State]) -> list[str]:
    """Folders of places before the newest checkpoint's that hold none: half sent, or damaged."""
    newest = max(((state.progress.epoch, state.progress.step) for state in states.values()), default=(0, 0))
    places = {name: _PLACE.fullmatch(name) for name in _folders(run) if name not in states}
    return [name for name, place in places.items() if place and (int(place[1]), int(place[2])) < newest]


def _error(state: State) -> float:
    """The validation top-1 error; infinite within an epoch."""
    progress = state.progress
    return float(progress.history[-1]["top1_error"]) if progress.step == 0 and progress.history else math.inf
