"""What the loaders of `loader_peers` read, each made once from a shard set's training images.

Where a loader stops at the end of an epoch, its set holds every image REPEATS times: starts are not what is timed.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.io import ImageReadMode, decode_jpeg

from pipeline.dataset.info import read_dataset
from pipeline.dataset.split_reader import SplitReader
from pipeline.staging.decoded_cache import stage_pixels

REPEATS = 4


def open_train(data: Path) -> SplitReader:
    return SplitReader(data, read_dataset(data), "train")


def make_pixels(data: Path, target: Path) -> None:
    stage_pixels(str(data), target, print, os.cpu_count() or 1)
    for lock in target.glob(".*.lock"):
        lock.unlink()


def make_folder(data: Path, target: Path, split: str = "train") -> None:
    reader = SplitReader(data, read_dataset(data), split)
    for i in range(len(reader)):
        path = target / f"{reader.labels[i]:04d}" / f"{reader.key(i)}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(reader.image(i).tobytes())


def make_links(data: Path, target: Path) -> None:
    target.mkdir()
    tars = sorted((data / "train").glob("*.tar")) * REPEATS
    for number, tar in enumerate(tars):
        (target / f"train-{number:06d}.tar").symlink_to(tar.resolve())


def _samples(data: Path) -> list[dict[str, Any]]:
    reader = open_train(data)
    one = [{"jpg": reader.image(i).tobytes(), "cls": int(reader.labels[i])} for i in range(len(reader))]
    return one * REPEATS


def make_litdata(data: Path, target: Path) -> None:
    from litdata import optimize

    options = {"chunk_bytes": "64MB", "num_workers": 1, "start_method": "fork"}
    optimize(fn=_itself, inputs=_samples(data), output_dir=str(target), **options)


def _itself(sample: dict[str, Any]) -> dict[str, Any]:
    return sample


def make_mds(data: Path, target: Path) -> None:
    from streaming import MDSWriter

    with MDSWriter(columns={"jpg": "bytes", "cls": "int"}, out=str(target)) as writer:
        for sample in _samples(data):
            writer.write(sample)


@dataclasses.dataclass
class _Decoded:
    """What ffcv's writer asks for: pixels, which it encodes again in its JPEG mode."""

    reader: SplitReader

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, i: int) -> tuple[NDArray[np.uint8], int]:
        image = decode_jpeg(torch.from_numpy(self.reader.image(i).copy()), mode=ImageReadMode.RGB)
        return image.permute(1, 2, 0).contiguous().numpy(), int(self.reader.labels[i])


def make_ffcv(mode: str, data: Path, target: Path) -> None:
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    fields = {"image": RGBImageField(write_mode=mode, jpeg_quality=90), "label": IntField()}
    writer = DatasetWriter(str(target), fields, num_workers=1)
    writer.from_indexed_dataset(_Decoded(open_train(data)), chunksize=50)
