"""Writes photograph-like images of a few made-up classes, laid out like ImageNet, to try everything with.

python jobs/generate_images.py --output images
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from jobs.cli.command import run
from pipeline.images.synthetic import write_folder


@dataclass(frozen=True)
class Config:
    output: Path
    """The folder to make: train/WNID/*.JPEG and val/WNID/*.JPEG."""
    classes: int = 6
    """How many classes, 2 to 8."""
    train_per_class: int = 150
    """Training images in each class."""
    val_per_class: int = 30
    """Validation images in each class."""
    seed: int = 0
    """The same seed gives the same images."""


def main(config: Config) -> None:
    log = functools.partial(print, flush=True)  # Each line when it is true, into a pipe too.
    write_folder(config.output, config.classes, config.train_per_class, config.val_per_class, config.seed, log)
    print(f"images in {config.output}; next: python jobs/shard_imagenet.py --source {config.output} --output SHARDS")


if __name__ == "__main__":
    run(Config, main)
