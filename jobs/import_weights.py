"""Makes a checkpoint of published AlexNet weights, so that jobs/evaluate.py can judge them on a shard set.

Known files: Caffe's bvlc_alexnet.caffemodel and bvlc_reference_caffenet.caffemodel, and alexnet.pth.tar of
jiecaoyu/pytorch_imagenet; the contents decide which. Pickled dumps (.npy) are not read: they can run code.

    python jobs/import_weights.py --source bvlc_alexnet.caffemodel --data SHARDS --output imported
"""

from __future__ import annotations

import dataclasses
import hashlib
import pickle
import shlex
from collections.abc import Mapping
from pathlib import Path

from jobs.cli.command import run


@dataclasses.dataclass(frozen=True)
class ImportConfig:
    source: Path
    """The file: .caffemodel or .pth.tar."""
    data: Path
    """A shard set with the classes that the weights tell apart, in order: for ImageNet, that of the wnids."""
    output: Path
    """The checkpoint's folder; it must not exist."""


if __name__ == "__main__":
    run(ImportConfig, "jobs.import_weights")  # Before the imports below, which take seconds.

import torch

from jobs.training import checkpoint
from jobs.training.run_state import RunFingerprint, State
from jobs.training.worker import make_network
from model.progress import Progress
from model.recipe import Recipe
from model.schedule import Plateau
from model.weights.caffemodel import read_caffemodel
from model.weights.interchange import CAFFE_MEAN, Imported, InterchangeError, from_caffe, from_jiecaoyu
from pipeline.dataset.info import DatasetInfo, read_dataset
from pipeline.images.rgb_stats import MAX_LEVEL, RgbStatistics


def read_source(path: Path) -> Imported:
    """The network in a file.

    Raises:
        InterchangeError: if it is none of the known ones.
    """
    try:
        if path.suffix == ".caffemodel":
            return from_caffe(read_caffemodel(path.read_bytes(), str(path)))
        if path.name.endswith((".pth.tar", ".pth", ".pt")):
            state = torch.load(path, map_location="cpu", weights_only=True)
            if not isinstance(state, Mapping):
                raise InterchangeError(f"it holds a {type(state).__name__}, and no mapping of names to tensors")
            return from_jiecaoyu(state)
    except InterchangeError as error:
        raise InterchangeError(f"{path} cannot be imported: {error}") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
        raise InterchangeError(f"{path} is no file of torch.save that holds only tensors: {error}") from error
    raise InterchangeError(f"{path} is of no known kind: give a .caffemodel, or the .pth.tar of jiecaoyu's AlexNet")


def describe(imported: Imported, info: DatasetInfo, where: Path) -> RunFingerprint:
    """What the weights are and which classes they know, as a checkpoint says it.

    Raises:
        InterchangeError: if the set's classes cannot be theirs.
    """
    wnids = tuple(label.wnid for label in info.classes)
    if len(wnids) != imported.classes:
        raise InterchangeError(
            f"the weights tell {imported.classes} classes apart, the set {where} has {len(wnids)}: give one with all "
            "of them, as jobs/shard_imagenet.py makes of the whole of ImageNet"
        )
    if list(wnids) != sorted(wnids):
        raise InterchangeError(f"the classes of {where} are not in the order of their wnids, as the weights' are")
    # Both sources subtracted this mean, as an image. It is all that is known, and evaluation uses nothing else.
    r, g, b = (level / MAX_LEVEL for level in CAFFE_MEAN)
    none = (0.0, 0.0, 0.0)
    rgb = RgbStatistics(0, (r, g, b), none, (none,) * 3, none, (none,) * 3)
    recipe = Recipe(groups=2, normalization=imported.normalization, biases="caffe", hidden_bias=0.1, color="none")
    return RunFingerprint(recipe, "imported", wnids, rgb)


def main(config: ImportConfig) -> None:
    if config.output.exists():
        raise InterchangeError(f"{config.output} exists already: give another --output")
    imported = read_source(config.source)
    identity = describe(imported, read_dataset(config.data), config.data)
    network = make_network(identity)
    network.load_state_dict(imported.tensors)
    with config.source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    origin = f"{imported.description}, imported from {config.source.name} (sha256 {digest[:16]})"
    config.output.mkdir(parents=True)
    progress = Progress(Plateau(identity.recipe.lr), finished=True)
    checkpoint.save_network(config.output, network, State(identity, progress, origin))
    print(f"{origin}: {imported.classes} classes, normalization {imported.normalization}, BGR turned to RGB")
    command = ["python", "jobs/evaluate.py", "--data", str(config.data), "--checkpoint", str(config.output)]
    print(f"next: {shlex.join(command)}")
