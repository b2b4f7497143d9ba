"""Shard sets as other programs write them, annotated step by step as the job does, but without Ray."""

from __future__ import annotations

import functools
import hashlib
import io
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import webdataset
from PIL import Image

from pipeline.annotate import AnnotatedShard, annotate_shard
from pipeline.annotated_set import begin, check_first_images, describe, find_shards, finish_annotated
from pipeline.dataset import DatasetInfo
from pipeline.label_names import read_label_names
from tests.photographs import encoded, photograph

WNIDS = ("n01440764", "n02102040", "n03888257")
Sample = Mapping[str, Any]
"""A key, as __key__, and the bytes, number or text of each component."""


@functools.cache
def stored(seed: int, form: str = "RGB", **options: Any) -> bytes:
    """A photograph as a set holds it, resized by Pillow."""
    image = Image.fromarray(photograph(seed, 330, 280)).resize((256, 256), Image.Resampling.LANCZOS)
    return encoded(image.convert(form), quality=85, **options)


def sample(number: int, **changes: Any) -> dict[str, Any]:
    """A sample named as ImageNet's images are, its class the rest of its number; `changes` to None leave a part out."""
    label = number % len(WNIDS)
    whole = {"__key__": f"{WNIDS[label]}_{number}", "cls": label, "jpg": stored(number), **changes}
    return {name: value for name, value in whole.items() if value is not None}


def write_shards(root: Path, split: str, samples: Iterable[Sample], per_shard: int = 6) -> None:
    """Writes ROOT/SPLIT/SPLIT-000000.tar and so on by webdataset's own writer, which stores JPEG bytes as given."""
    (root / split).mkdir(parents=True, exist_ok=True)
    with webdataset.ShardWriter(str(root / split / f"{split}-%06d.tar"), maxcount=per_shard, verbose=0) as writer:
        for one in samples:
            writer.write(dict(one))


def write_set(root: Path) -> Path:
    """15 training images of three classes in three shards, and 9 to validate on in two."""
    write_shards(root, "train", (sample(number) for number in range(15)))
    write_shards(root, "val", (sample(number) for number in range(100, 109)))
    return root


def annotate(root: Path, classes: Path | None = None) -> tuple[DatasetInfo | None, list[str]]:
    """What `jobs.annotate` does, in this process: the set's description, or what is wrong with it."""
    given = None if classes is None else read_label_names(classes)
    shards = find_shards(root)
    check_first_images(root, shards)
    begin(root, shards)
    count = None if given is None else len(given.wnids)
    done: list[AnnotatedShard] = [annotate_shard(root, split, name, count) for split, name in shards]
    faults = [str(fault) for shard in done for fault in shard.faults]
    if faults:
        return None, faults
    info, _, wrong = describe(root, done, given)
    if wrong:
        return None, [str(fault) for fault in wrong]
    finish_annotated(root, done, info)
    return info, []


def described(root: Path, classes: Path | None = None) -> DatasetInfo:
    """Annotates a set in which nothing is wrong."""
    info, faults = annotate(root, classes)
    assert faults == []
    assert info is not None
    return info


def digests(root: Path) -> dict[str, str]:
    """The sha256 of each tar of a set."""
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in root.rglob("*.tar")}


def contents(root: Path) -> dict[str, bytes]:
    """Every file of a set."""
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def unpacked(root: Path, split: str) -> list[dict[str, Any]]:
    """A split's samples in the order of its tars, as `tarfile` and webdataset's rule for keys read them."""
    samples: dict[str, dict[str, Any]] = {}
    for path in sorted((root / split).glob("*.tar")):
        with tarfile.open(path) as archive:
            for member in archive:
                key, extension = webdataset.tariterators.base_plus_ext(member.name.removeprefix("./"))
                if member.isfile() and key is not None:
                    data = archive.extractfile(member).read()  # type: ignore[union-attr]
                    samples.setdefault(key, {"__key__": key})[extension.lower()] = data
    return list(samples.values())


def jpeg_of(one: Sample) -> bytes:
    return one["jpg"] if "jpg" in one else one["jpeg"]


def picture_of(one: Sample) -> Image.Image:
    """What Pillow makes of it, in RGB."""
    return Image.open(io.BytesIO(jpeg_of(one))).convert("RGB")
