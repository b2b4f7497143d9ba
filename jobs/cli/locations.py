"""Whether a location on the command line is what its flag takes: a shard set, a checkpoint, or where to write."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from shlex import quote

from pipeline.dataset.info import DATASET_FILE
from pipeline.dataset.sample_index import index_file
from pipeline.sharding.claim import UNFINISHED_FILE
from pipeline.storage.locations import is_url

SET_FILES = (DATASET_FILE, UNFINISHED_FILE, index_file("train"))
IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png", ".tar")  # Of what jobs/shard_imagenet.py reads.
DEPTH = 3  # Images of a class lie in ROOT/train/CLASS.
LOOKED_AT = 20  # Items of a folder: a class may have a million.


def check_parent(option: str, path: Path) -> None:
    """Raises ValueError for a file to be written after the work where there is no folder for it."""
    if not path.parent.is_dir():
        raise ValueError(f"{option} {path} cannot be written: there is no folder {path.parent}")


def check_locations(config: object) -> None:
    """Looks at a command's --stage, and at its --data and --checkpoint as far as they are on this machine's disk.

    Raises:
        ValueError: if --stage is a URL, --data a source of images or a run, or --checkpoint a shard set.
    """
    data, checkpoint, stage = (str(getattr(config, name, None) or "") for name in ("data", "checkpoint", "stage"))
    if is_url(stage):
        raise ValueError(f"--stage {stage} is a URL: give a folder on each node's own disk")
    if checkpoint and os.path.exists(os.path.join(checkpoint, DATASET_FILE)):
        raise ValueError(f"--checkpoint {checkpoint} is a shard set: give a run's folder, and the set as --data")
    if not data or is_url(data) or any(os.path.exists(os.path.join(data, name)) for name in SET_FILES):
        return
    if os.path.exists(os.path.join(data, "state.json")) or any(Path(data).glob("checkpoint_*")):
        raise ValueError(f"--data {data} holds checkpoints: give the shard set that jobs/shard_imagenet.py made")
    if _is_source(Path(data), DEPTH):
        made = f"{os.path.abspath(data).removesuffix('.tar')}-shards"
        raise ValueError(
            f"--data {data} is a source of images, and no shard set: make one with `python jobs/shard_imagenet.py "
            f"--source {quote(data)} --output {quote(made)}`, and give --data {quote(made)}"
        )


def _is_source(path: Path, depth: int) -> bool:
    """Whether it is an image or a tar, or the first things in it are."""
    if path.is_file():
        return path.suffix.lower() in IMAGE_SUFFIXES
    if depth == 0 or not path.is_dir():
        return False
    return any(_is_source(item, depth - 1) for item in itertools.islice(path.iterdir(), LOOKED_AT))
