"""Sources made in code, and what a listing of one holds."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path

from pipeline.images.resize import encoder_settings
from pipeline.sharding.shard_plan import SetPlan, plan_shards
from pipeline.sources.files import read_bytes
from pipeline.sources.sources import Listing, read_source
from tests.shard_sets import contents, make

A, B, C = "n00000001", "n00000002", "n00000003"
Layout = Mapping[str, "bytes | str | Layout"]
"""Files, and tars as the layouts that they hold."""


def tar_of(layout: Layout, form: int = tarfile.GNU_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, content in layout.items():
            data = _bytes_of(content, form)
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def _bytes_of(content: bytes | str | Layout, form: int = tarfile.GNU_FORMAT) -> bytes:
    if isinstance(content, bytes):
        return content
    return content.encode() if isinstance(content, str) else tar_of(content, form)


def write(root: Path, layout: Layout) -> Path:
    for name, content in layout.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(_bytes_of(content))
    return root


def below(folder: str, *layouts: Layout) -> Layout:
    return {f"{folder}/{name}": content for layout in layouts for name, content in layout.items()}


def image(*place: object) -> bytes:
    """Listing reads no images: their bytes need only tell them apart."""
    return " ".join(map(str, place)).encode()


def class_images(wnid: str, numbers: range = range(3)) -> Layout:
    return {f"{wnid}_{i}.JPEG": image(wnid, i) for i in numbers}


def samples(classes: Mapping[str, range], labels: Mapping[str, int], key: str = "{wnid}_{i}", note: str = "") -> Layout:
    """A WebDataset's shard."""
    parts: dict[str, bytes | str] = {}
    for wnid, numbers in classes.items():
        for i in numbers:
            name = key.format(wnid=wnid, i=i)
            parts |= {f"{name}.cls": str(labels[wnid]), f"{name}.jpg": image(wnid, i)}
            if note:
                parts[f"{name}.json"] = note % {"wnid": wnid, "i": i}
    return parts


def listed(
    source: str | Path,
    val: str | Path | None = None,
    labels: str | Path | None = None,
    synsets: str | Path | None = None,
    fraction: float = 0.25,
    seed: int = 0,
) -> Listing:
    return read_source(source, val, fraction, seed, labels, synsets)


def images(listing: Listing) -> list[tuple[str, str, int, bytes]]:
    """Each image's split, key, label and bytes, in order, which decide the bytes of the set that is made of them."""
    return [
        (split, entry.key, entry.label, read_bytes(entry.path, entry.offset, entry.size))
        for split, entries in listing.splits.items()
        for entry in entries
    ]


def set_plan(listing: Listing) -> SetPlan:
    return SetPlan(listing, encoder_settings(90), 0, 5, tuple(plan_shards(listing, 0, 5)))


def made(listing: Listing, output: Path) -> dict[str, bytes]:
    """Every file of the set that a listing gives."""
    return contents(make(output, set_plan(listing)))
