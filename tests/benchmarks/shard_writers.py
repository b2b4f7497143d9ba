"""Ways to turn photographs into 256 x 256 JPEGs to train from, each timed in a process of its own by `shard_speed`.

    python -m tests.benchmarks.shard_writers NAME --source FOLDER --output FOLDER --cores 1

The source is a folder with one folder of photographs a class. Every contender stores the central square, antialiased,
as JPEG of quality 90, 4:2:0 where it leaves the choice; seconds count from the first photograph asked for to the last
byte written, starts of worker processes included, imports not.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import io
import json
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import simplejpeg
import torch
import webdataset
from numpy.typing import NDArray
from PIL import Image

from jobs.cli.command import run
from pipeline.images.decode import IMAGE_SIZE
from pipeline.images.resize import encoder_settings, resize
from pipeline.sharding.set_folder import claim_folder
from pipeline.sharding.shard_plan import SetPlan, ShardPlan, plan_shards
from pipeline.sharding.shard_set import finish
from pipeline.sharding.shards import BuiltShard
from pipeline.sources.sources import read_source
from tests.shard_sets import build_shard

QUALITY = 90
SAMPLES_PER_SHARD = 200  # Small, so that two workers end together on a few thousand photographs.

Result = TypeVar("Result")

Photographs = Sequence[tuple[str, int]]
"""Path and class of each."""


def photographs(source: Path) -> Photographs:
    """What lies in a folder of class folders.

    Raises:
        ValueError: if that is nothing.
        OSError: if it is no folder.
    """
    folders = sorted(folder for folder in source.iterdir() if folder.is_dir())
    found = [(str(path), label) for label, folder in enumerate(folders) for path in sorted(folder.iterdir())]
    if not found:
        raise ValueError(f"{source} holds no photographs: give a folder with one folder of them a class")
    return found


def shards_of(images: Photographs) -> list[Photographs]:
    return [images[start : start + SAMPLES_PER_SHARD] for start in range(0, len(images), SAMPLES_PER_SHARD)]


def in_processes(work: Callable[[Any], Result], items: Sequence[Any], cores: int) -> list[Result]:
    if cores == 1:
        return [work(item) for item in items]
    with multiprocessing.get_context("fork").Pool(cores) as pool:
        return pool.map(work, items, chunksize=1)


def _bare(resizing: Callable[[NDArray[np.uint8]], NDArray[np.uint8]], images: Photographs) -> None:
    for path, _ in images:
        square = resizing(simplejpeg.decode_jpeg(Path(path).read_bytes()))
        simplejpeg.encode_jpeg(square, QUALITY, "RGB", "420")


def _square(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The central square, a view."""
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return image[top : top + side, left : left + side]


def _area(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    import cv2

    cv2.setNumThreads(1)
    return cv2.resize(_square(image), (IMAGE_SIZE, IMAGE_SIZE), interpolation=cv2.INTER_AREA)


def bare_area(source: Path, output: Path, cores: int) -> None:
    """libjpeg-turbo decode, OpenCV's area resize, encode; nothing is written."""
    in_processes(functools.partial(_bare, _area), shards_of(photographs(source)), cores)


def bare_bicubic(source: Path, output: Path, cores: int) -> None:
    """libjpeg-turbo decode, torch's antialiased bicubic resize, encode; nothing is written."""
    in_processes(functools.partial(_bare, resize), shards_of(photographs(source)), cores)


def ours(source: Path, output: Path, cores: int) -> None:
    """This project's conversion without Ray: the whole set, with moments, digests, index and descriptions."""
    listing = read_source(source, None, 0.1, 0, None, None)
    shards = plan_shards(listing, 0, SAMPLES_PER_SHARD)
    plan = SetPlan(listing, encoder_settings(QUALITY), 0, SAMPLES_PER_SHARD, tuple(shards))
    claim_folder(output, plan)
    build = functools.partial(_build, output, plan)
    finish(output, plan, in_processes(build, shards, cores))


def _build(output: Path, plan: SetPlan, shard: ShardPlan) -> BuiltShard:
    return build_shard(output, shard, plan.image)


def by_pillow(path: str) -> bytes:
    """What most scripts do: Pillow's decoder, antialiased bicubic resize, center crop, Pillow's encoder."""
    with Image.open(path) as image:
        picture = image.convert("RGB")
    shorter = min(picture.size)
    width, height = (round(side * IMAGE_SIZE / shorter) for side in picture.size)
    resized = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - IMAGE_SIZE) // 2, (height - IMAGE_SIZE) // 2
    buffer = io.BytesIO()
    resized.crop((left, top, left + IMAGE_SIZE, top + IMAGE_SIZE)).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def _write_tar(output: Path, numbered: tuple[int, Photographs]) -> None:
    number, images = numbered
    with webdataset.TarWriter(str(output / f"train-{number:06d}.tar")) as tar:
        for path, label in images:
            tar.write({"__key__": Path(path).stem, "jpg": by_pillow(path), "cls": label})


def pillow_script(source: Path, output: Path, cores: int) -> None:
    """Pillow and webdataset.TarWriter: the straightforward script."""
    output.mkdir(parents=True)
    in_processes(functools.partial(_write_tar, output), list(enumerate(shards_of(photographs(source)))), cores)


def img2dataset(source: Path, output: Path, cores: int) -> None:
    """img2dataset from file:// addresses to WebDataset shards, with its own resize (OpenCV's area)."""
    from img2dataset import download

    table = output.with_suffix(".csv")
    rows = [f"file://{path},{label}" for path, label in photographs(source)]
    table.write_text("\n".join(["url,caption", *rows]) + "\n")
    download(
        url_list=str(table),
        input_format="csv",
        caption_col="caption",
        output_folder=str(output),
        output_format="webdataset",
        image_size=IMAGE_SIZE,
        resize_mode="center_crop",
        encode_quality=QUALITY,
        extract_exif=False,
        processes_count=cores,
        thread_count=2,
        number_sample_per_shard=SAMPLES_PER_SHARD,
    )


def _litdata_sample(item: tuple[str, int]) -> dict[str, object]:
    return {"jpg": by_pillow(item[0]), "cls": item[1]}


def litdata(source: Path, output: Path, cores: int) -> None:
    """litdata.optimize around Pillow's conversion."""
    from litdata import optimize

    optimize(
        fn=_litdata_sample,
        inputs=list(photographs(source)),
        output_dir=str(output),
        chunk_bytes="64MB",
        num_workers=cores,
        start_method="fork",
        verbose=False,
    )


def _write_mds(output: Path, numbered: tuple[int, Photographs]) -> None:
    from streaming import MDSWriter

    number, images = numbered
    columns = {"jpg": "bytes", "cls": "int"}
    with MDSWriter(columns=columns, out=str(output / str(number)), hashes=["sha256"]) as writer:
        for path, label in images:
            writer.write({"jpg": by_pillow(path), "cls": label})


def streaming(source: Path, output: Path, cores: int) -> None:
    """MosaicML streaming's MDSWriter around Pillow's conversion."""
    in_processes(functools.partial(_write_mds, output), list(enumerate(shards_of(photographs(source)))), cores)


@dataclasses.dataclass
class _Squares:
    """What ffcv's writer asks for: central squares, which it resizes itself."""

    images: Photographs

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[NDArray[np.uint8], int]:
        path, label = self.images[i]
        with Image.open(path) as image:
            return np.ascontiguousarray(_square(np.asarray(image.convert("RGB")))), label


def ffcv(source: Path, output: Path, cores: int) -> None:
    """ffcv's DatasetWriter in JPEG mode, with its own resize (OpenCV's area)."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    image = RGBImageField(write_mode="jpg", max_resolution=IMAGE_SIZE, jpeg_quality=QUALITY)
    fields = {"image": image, "label": IntField()}
    writer = DatasetWriter(str(output.with_suffix(".beton")), fields, num_workers=cores)
    writer.from_indexed_dataset(_Squares(photographs(source)), chunksize=50)


def job(source: Path, output: Path, cores: int) -> None:
    """`python jobs/shard_imagenet.py`, the start of Python and Ray included."""
    command = [sys.executable, "jobs/shard_imagenet.py", "--source", str(source), "--output", str(output)]
    options = ["--workers", str(cores), "--samples-per-shard", str(SAMPLES_PER_SHARD)]
    subprocess.run([*command, *options], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


WRITERS: dict[str, tuple[Callable[[Path, Path, int], None], str | None]] = {
    "bare loop, area": (bare_area, "cv2"),
    "bare loop, bicubic": (bare_bicubic, None),
    "ours": (ours, None),
    "ours, as a Ray job": (job, None),
    "Pillow + TarWriter": (pillow_script, None),
    "img2dataset": (img2dataset, "img2dataset"),
    "litdata": (litdata, "litdata"),
    "streaming": (streaming, "streaming"),
    "ffcv": (ffcv, "ffcv"),
}
"""Each contender and the package it needs beyond this project's."""

IMPORTED_LATE = ("torchvision.models",)
"""By this project, for ImageNet's names; others import what they use at once."""


def installed(name: str) -> bool:
    package = WRITERS[name][1]
    return package is None or importlib.util.find_spec(package) is not None


@dataclasses.dataclass(frozen=True)
class WriterConfig:
    name: str
    """One of WRITERS."""
    source: Path
    """Folder with one folder of photographs a class."""
    output: Path
    """A folder that does not exist."""
    cores: int = 1
    """Worker processes."""

    def __post_init__(self) -> None:
        if self.name not in WRITERS:
            raise ValueError(f"--name {self.name!r} must be one of {', '.join(WRITERS)}")


def main(config: WriterConfig) -> None:
    """Prints {"images": ..., "seconds": ...} as the last line."""
    torch.set_num_threads(1)
    write, package = WRITERS[config.name]
    if package is not None:
        importlib.import_module(package)
    for name in IMPORTED_LATE:
        importlib.import_module(name)
    images = len(photographs(config.source))
    started = time.perf_counter()
    write(config.source, config.output, config.cores)
    print(json.dumps({"images": images, "seconds": time.perf_counter() - started}), flush=True)


if __name__ == "__main__":
    run(WriterConfig, main)
