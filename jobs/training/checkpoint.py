"""Checkpoints: network and momentum as safetensors, everything else as JSON; nothing in them is ever executed.

    model.safetensors       the network's parameters and running statistics by name
    optimizer.safetensors   each parameter's momentum by the same name
    state.json              what was being trained on what, and how far it had come

A run's folder lists its committed checkpoints in a file of Ray Train's; a folder that is not listed there may be half
written and is never used.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from pyarrow import fs as arrow_fs
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from model.recipe import Recipe
from model.training import Progress, Trainer
from pipeline.dataset.info import DatasetInfo
from pipeline.images.rgb_stats import RgbStatistics
from pipeline.storage.locations import open_location, read_text

SCHEMA_VERSION = 2
STATE_FILE = "state.json"
MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
RUN_FILE = "checkpoint_manager_snapshot.json"  # Ray Train's list of committed checkpoints
SPARE_FILE = f"{RUN_FILE}.spare"  # The list as it was after the last checkpoint that was wholly committed.
CHECKPOINT_PREFIX = "checkpoint_"
LIST_READS, LIST_WAIT_S = 20, 0.1  # Ray Train writes its list in place: whoever reads it just then finds a part of it.


# What has a run's images decoded as before.
DECODER_CURES = {
    "libjpeg-turbo": "--no-gpus, or --stage DIR --stage-as pixels on GPUs",
    "nvjpeg-cuda": "--gpus --gpu-decoder cuda --stage-as jpeg",
    "nvjpeg-hardware": "--gpus --gpu-decoder hardware --stage-as jpeg",
}


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or belongs to another data set or configuration."""


@dataclasses.dataclass(frozen=True)
class RunFingerprint:
    """What a run trains, and on what: a run may only be continued with the same."""

    recipe: Recipe
    dataset: str
    """The shard set's fingerprint."""
    wnids: tuple[str, ...]
    """The classes, by label."""
    rgb: RgbStatistics
    """Of the training set: evaluation must subtract the same mean."""
    decoder: str = "libjpeg-turbo"
    """What decided the images' pixels (`pipeline.loading.loader.decoder_name`)."""
    precision: str = "float32"
    """float32, or bfloat16 for autocast."""

    @classmethod
    def of(
        cls, recipe: Recipe, info: DatasetInfo, decoder: str = "libjpeg-turbo", precision: str = "float32"
    ) -> RunFingerprint:
        wnids = tuple(label.wnid for label in info.classes)
        return cls(recipe, info.fingerprint, wnids, info.rgb, decoder, precision)

    def differences(self, other: RunFingerprint) -> list[str]:
        """What differs from another run, one phrase each.

        The number of epochs may, so that a run can be extended; not under a schedule that counts on it.
        """
        free = {"epochs"} if self.recipe.schedule == "plateau" else set()
        found = [
            f"{field.name} is {getattr(other.recipe, field.name)}, was {getattr(self.recipe, field.name)}"
            for field in dataclasses.fields(Recipe)
            if field.name not in free and getattr(self.recipe, field.name) != getattr(other.recipe, field.name)
        ]
        if self.dataset != other.dataset:
            found.append(f"the shard set is {other.dataset[:12]}, was {self.dataset[:12]}")
        if self.decoder != other.decoder:
            found.append(f"the JPEG decoder is {other.decoder}, was {self.decoder} ({DECODER_CURES[self.decoder]})")
        if self.precision != other.precision:
            found.append(f"the precision is {other.precision}, was {self.precision} (--precision {self.precision})")
        return found


@dataclasses.dataclass(frozen=True)
class State:
    """The contents of `state.json`."""

    identity: RunFingerprint
    progress: Progress
    origin: str = ""
    """Where weights come from that were not trained here; empty for a run's own."""

    def to_json(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "origin": self.origin,
            "identity": dataclasses.asdict(self.identity),
            "progress": self.progress.to_json(),
        }

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> State:
        """Parses `state.json`.

        Raises:
            CheckpointError: naming `where`, if it is not what this program writes.
        """
        try:
            value = json.loads(text)
            if value["schema_version"] != SCHEMA_VERSION:
                raise ValueError(
                    f"its schema version is {value['schema_version']}, this program reads {SCHEMA_VERSION}"
                )
            identity = value["identity"]
            return cls(
                RunFingerprint(
                    Recipe(**identity["recipe"]),
                    str(identity["dataset"]),
                    tuple(identity["wnids"]),
                    RgbStatistics.from_json(identity["rgb"]),
                    _one_of(DECODER_CURES, identity["decoder"]),
                    _one_of(("float32", "bfloat16"), identity["precision"]),
                ),
                Progress.from_json(value["progress"]),
                str(value.get("origin", "")),
            )
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{where} is no {STATE_FILE} of this program: {error!r}") from error


def _one_of(names: Collection[str], value: object) -> str:
    """Raises ValueError for any other value."""
    if not isinstance(value, str) or value not in names:
        raise ValueError(f"{value!r} is none of {', '.join(names)}")
    return value


def save(folder: Path, trainer: Trainer, identity: RunFingerprint) -> None:
    """Writes a checkpoint of everything that training needs to go on exactly."""
    momentum = {
        name: trainer.optimizer.state[parameter]["momentum_buffer"]
        for name, parameter in trainer.network.named_parameters()
        if parameter in trainer.optimizer.state
    }
    save_network(folder, trainer.network, State(identity, trainer.progress))
    save_file({name: value.contiguous() for name, value in momentum.items()}, folder / OPTIMIZER_FILE)


def save_network(folder: Path, network: nn.Module, state: State) -> None:
    """Writes what evaluation needs: a network's tensors, and what they are."""
    tensors = {name: tensor.detach().contiguous() for name, tensor in network.state_dict().items()}
    save_file(tensors, folder / MODEL_FILE)
    (folder / STATE_FILE).write_text(json.dumps(state.to_json(), indent=1), "utf-8")


def read_state(folder: Path) -> State:
    """Reads a checkpoint's state.

    Raises:
        CheckpointError: if the folder is no checkpoint.
    """
    try:
        text = (folder / STATE_FILE).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(
            f"{folder} is no checkpoint: it has no {STATE_FILE}; give a checkpoint_* folder"
        ) from None
    return State.from_json(text, str(folder / STATE_FILE))


def restore(folder: Path, trainer: Trainer, identity: RunFingerprint) -> None:
    """Puts a trainer where a checkpoint left off.

    Raises:
        CheckpointError: if the checkpoint is damaged or belongs to another data set or configuration.
    """
    state = read_state(folder)
    check_other(state, identity, str(folder))
    load_network(folder, trainer.network)
    momentum = _load(folder / OPTIMIZER_FILE)
    for name, parameter in trainer.network.named_parameters():
        if name in momentum:
            buffer = torch.empty_like(parameter, memory_format=torch.preserve_format).copy_(momentum[name])
            trainer.optimizer.state[parameter]["momentum_buffer"] = buffer
    # The same checkpoint may be the end of a shorter run.
    state.progress.finished = finished(state, identity.recipe)
    trainer.resume(state.progress)


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
        CheckpointError: if a tensor is missing, superfluous or of another shape.
    """
    tensors = _load(folder / MODEL_FILE)
    named = network.state_dict()
    odd = sorted(tensors.keys() ^ named.keys()) or [n for n in named if named[n].shape != tensors[n].shape]
    if odd:
        raise CheckpointError(f"{folder / MODEL_FILE} does not fit this network: {', '.join(odd)} differ(s)")
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(tensors[name])


def _load(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, FileNotFoundError) as error:
        raise CheckpointError(f"{path} is damaged or missing ({error}): use an earlier checkpoint") from error


def committed(run: str) -> dict[str, State]:
    """The committed checkpoints of the run at a path or URL, in the order of training: folder name -> state.

    Raises:
        CheckpointError: if their list stays half written, and there is none before it, or names what is no checkpoint
            of the run, or a checkpoint's state cannot be understood.
    """
    filesystem, path = open_location(run)
    if filesystem.get_file_info(f"{path}/{RUN_FILE}").type != arrow_fs.FileType.File:
        return {}
    value = _read_list(filesystem, path)
    results = [
        *value["checkpoint_results"],
        *([value["latest_checkpoint_result"]] if value["latest_checkpoint_result"] else []),
    ]
    states = {}
    for folder in {_own_folder(result["checkpoint_dir_name"], f"{path}/{RUN_FILE}") for result in results}:
        file = f"{path}/{folder}/{STATE_FILE}"
        states[folder] = State.from_json(read_text(filesystem, file), file)
    return dict(sorted(states.items(), key=lambda item: (item[1].progress.epoch, item[1].progress.step)))


def _own_folder(name: object, where: str) -> str:
    """The name of a checkpoint's folder, if it is one within the run: Ray Train removes those that have had their time.

    Raises:
        CheckpointError: if it is another, as in a list that somebody made.
    """
    if not isinstance(name, str) or not name.startswith(CHECKPOINT_PREFIX) or "/" in name:
        raise CheckpointError(f"{where} names {name!r}, which is no checkpoint of this run: use another --name")
    return name


def _read_list(filesystem: arrow_fs.FileSystem, path: str) -> dict[str, Any]:
    listing = f"{path}/{RUN_FILE}"
    for attempt in range(LIST_READS):
        if attempt:
            time.sleep(LIST_WAIT_S)
        try:
            value: dict[str, Any] = json.loads(read_text(filesystem, listing))
        except ValueError:
            continue
        return value
    try:
        # Of one that stays half written, as a full disk or a kill leaves it, the one before: Ray Train removes
        # checkpoints only after it has written the list without them.
        spare: dict[str, Any] = json.loads(read_text(filesystem, f"{path}/{SPARE_FILE}"))
    except (FileNotFoundError, ValueError):
        raise CheckpointError(
            f"the list of checkpoints {listing} is half written, as by a run that was killed, and there is none before "
            "it: start the run's training command again, which starts it anew"
        ) from None
    return spare


def best(states: dict[str, State]) -> str | None:
    """Of a run's checkpoints at an epoch's end, the one with the lowest validation top-1 error; the first of equals."""
    ended = {name: state for name, state in states.items() if state.progress.step == 0 and state.progress.history}
    return min(ended, key=lambda name: float(ended[name].progress.history[-1]["top1_error"]), default=None)
