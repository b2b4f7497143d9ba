"""How well an epoch is shuffled: this project's plan beside the shuffle buffers of DALI's and webdataset's readers.

    python -m tests.benchmarks.shuffle_quality

Makes tars of tiny JPEGs in the order of their classes, the worst case, and reads back the order of an epoch. A buffer
mixes only what is in it at once: how far a sample travels grows with the buffer, not with the set. The last row is what
uniform permutations (numpy's) give. The table is Markdown.
"""

from __future__ import annotations

import dataclasses
import io
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from numpy.typing import NDArray
from nvidia.dali import Pipeline, fn
from PIL import Image

from jobs.cli.command import run
from pipeline.loading.plan import Plan
from tests.benchmarks.contest import check_least

PERMUTATIONS = 200
DIGITS = 6  # Of a sample's number, which is its key.


@dataclasses.dataclass(frozen=True)
class ShuffleConfig:
    classes: int = 40
    """Classes, in whose order the set lies."""
    per_class: int = 200
    """Images of each."""
    per_tar: int = 500
    """Images to a tar."""
    buffers: tuple[int, ...] = (100, 1000)
    """Sizes of the shuffle buffers, in samples; by default half a class and five classes. webdataset's manual uses 1000
    and DALI 1024, which is less than one class of ImageNet."""
    batch_size: int = 128
    """For the number of classes that meet in a batch."""
    seed: int = 0
    """Of every shuffle."""

    def __post_init__(self) -> None:
        check_least(self, "classes", "per_class", "per_tar", "buffers", "batch_size")

    @property
    def samples(self) -> int:
        return self.classes * self.per_class


@dataclasses.dataclass(frozen=True)
class Quality:
    """Of one epoch's order, or the mean over several."""

    correlation: float
    """Spearman's, between a sample's place in the source and in the epoch: 0 when shuffled, 1 when not."""
    mean_run: float
    """How many images of one class follow each other, on average."""
    longest_run: float
    classes_in_batch: float
    """Different classes in a batch, on average."""
    seen: float
    """Different samples in the epoch."""

    @classmethod
    def of(cls, order: NDArray[np.int64], per_class: int, batch_size: int) -> Quality:
        """Of sample numbers in the epoch's order [n], where sample i is of class i // per_class."""
        labels = order // per_class
        ends = np.flatnonzero(np.r_[labels[1:] != labels[:-1], True])
        runs = np.diff(np.r_[-1, ends])
        batches = labels[: len(labels) // batch_size * batch_size].reshape(-1, batch_size)
        # The epoch holds a sample's number; its rank among the numbers is the same thing, unless some are repeated.
        ranks = np.argsort(np.argsort(order, kind="stable"), kind="stable")
        return cls(
            correlation=float(np.corrcoef(ranks, np.arange(len(order)))[0, 1]),
            mean_run=float(runs.mean()),
            longest_run=float(runs.max()),
            classes_in_batch=float(np.mean([len(np.unique(batch)) for batch in batches])),
            seen=float(len(np.unique(order))),
        )

    @classmethod
    def mean(cls, several: list[Quality]) -> Quality:
        return cls(*np.mean([dataclasses.astuple(quality) for quality in several], axis=0).tolist())


def write_tars(folder: Path, config: ShuffleConfig) -> list[Path]:
    """WebDataset tars in the order of the classes: NUMBER.cls and NUMBER.jpg, and DALI's index beside each."""
    paths = []
    for start in range(0, config.samples, config.per_tar):
        path = folder / f"ordered-{start // config.per_tar:06d}.tar"
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for sample in range(start, min(start + config.per_tar, config.samples)):
                label = sample // config.per_class
                picture = io.BytesIO()
                Image.new("RGB", (8, 8), (label % 256, sample % 256, 0)).save(picture, "JPEG")
                for extension, data in (("cls", str(label).encode()), ("jpg", picture.getvalue())):
                    member = tarfile.TarInfo(f"{sample:0{DIGITS}d}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        index = Path(sys.executable).with_name("wds2idx")
        subprocess.run([index, path, path.with_suffix(".idx")], check=True, capture_output=True)
        paths.append(path)
    return paths


def dali_epochs(paths: list[Path], buffer: int, config: ShuffleConfig, tars: bool) -> Iterator[NDArray[np.int64]]:
    """Epochs of `readers.webdataset` with its buffer; `tars`: the order of the tars is shuffled after each epoch."""
    reader = Pipeline(batch_size=1, num_threads=1, device_id=None)
    with reader:
        outputs: Any = fn.readers.webdataset(
            paths=[str(path) for path in paths],
            index_paths=[str(path.with_suffix(".idx")) for path in paths],
            ext=["jpg", "cls"],
            random_shuffle=True,
            initial_fill=buffer,
            shuffle_after_epoch=tars,
            seed=config.seed,
        )
        reader.set_outputs(fn.get_property(outputs[0], key="source_info"))
    reader.build()
    while True:
        yield np.array([sample_of(reader.run()[0].at(0).tobytes().decode()) for _ in range(config.samples)])


def sample_of(source: str) -> int:
    """The sample's number in DALI's source_info, "TAR:OFFSET:NUMBER.jpg"."""
    return int(source.rpartition(":")[2].removesuffix(".jpg"))


def webdataset_epochs(paths: list[Path], buffer: int, config: ShuffleConfig, tars: bool) -> Iterator[NDArray[np.int64]]:
    """Epochs of webdataset's `.shuffle(buffer)`; `tars`: the order of the tars is shuffled too."""
    names = [str(path) for path in paths]
    tar_buffer = len(names) if tars else False
    shuffled = webdataset.WebDataset(names, shardshuffle=tar_buffer, seed=config.seed).shuffle(buffer, seed=config.seed)
    while True:
        yield np.array([int(sample["__key__"]) for sample in shuffled])


def compare(config: ShuffleConfig) -> dict[str, Quality]:
    """The second epoch of each way of shuffling (the first of DALI's has the tars in their order), by name."""
    plan = Plan(config.samples, config.batch_size, config.seed, np.eye(3))
    orders = {"this plan": plan.order(1)}
    with tempfile.TemporaryDirectory() as folder:
        paths = write_tars(Path(folder), config)
        for buffer in config.buffers:
            for tars in (False, True):
                note = ", tars shuffled" if tars else ""
                for name, epochs in (
                    (f"DALI readers.webdataset, initial_fill {buffer:,}", dali_epochs),
                    (f"webdataset .shuffle({buffer:,})", webdataset_epochs),
                ):
                    both = epochs(paths, buffer, config, tars)
                    next(both)
                    orders[f"{name}{note}"] = next(both)
    found = {name: Quality.of(order, config.per_class, config.batch_size) for name, order in orders.items()}
    generator = np.random.default_rng(config.seed)
    uniform = [
        Quality.of(generator.permutation(config.samples), config.per_class, config.batch_size)
        for _ in range(PERMUTATIONS)
    ]
    found["a uniform permutation (expected)"] = Quality.mean(uniform)
    return found


def table(found: dict[str, Quality], config: ShuffleConfig) -> str:
    """Markdown."""
    lines = [
        f"| {config.samples:,} images, {config.classes} classes in order | rank correlation | mean run | longest run | "
        f"classes in a batch of {config.batch_size} | different images seen |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, q in found.items():
        lines.append(
            f"| {name} | {q.correlation:+.3f} | {q.mean_run:.2f} | {q.longest_run:.1f} | {q.classes_in_batch:.1f} | "
            f"{q.seen:,.0f} |"
        )
    return "\n".join(lines)


def main(config: ShuffleConfig) -> None:
    print(table(compare(config), config))
    print(
        f"Rank correlation of a uniform permutation: 0 with standard deviation {1 / np.sqrt(config.samples - 1):.3f}. "
        f"Orders are of a second epoch; the expected row is the mean of {PERMUTATIONS}. "
        "Where whole tars are shuffled, the correlation is that of a few tars' order: another one each epoch."
    )


if __name__ == "__main__":
    run(ShuffleConfig, main)
