"""Shard sets as other programs write them."""

from __future__ import annotations

import functools
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import webdataset
from PIL import Image

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
