"""How fast photographs become shards, beside bare loops over the same libraries and beside other writers.

    python -m tests.benchmarks.shard_speed --source FOLDER --work FOLDER

FOLDER holds one folder of photographs a class. They are first brought to ImageNet's usual size (0.1875 megapixels,
500 x 375, 4:2:0) and repeated under other names up to --images. Then every writer that is installed runs in a process
of its own, turn and turn about, on one core and on two; medians and ratios of one call are what counts. Where a writer
fails, or takes longer than five minutes, it is left out and named, as is ffcv's on one core. The other writers, best in
an environment of their own:

    pip install -e .[bench] wandb fire exifread-nocycle simsimd stringzilla
    # These by themselves, since img2dataset asks for webdataset below 0.3.
    pip install --no-deps img2dataset albumentations==1.4.24 albucore==0.0.23
"""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import platform
import shutil
from pathlib import Path

from PIL import Image

from jobs.cli.command import run
from pipeline.dataset.info import write_json
from tests.benchmarks.contest import check_cores, check_least, present, run_pinned, table, take_turns
from tests.benchmarks.shard_writers import WRITERS, installed, photographs

LIMIT = "bare loop, area"
TIME_OUT_S = 300


@dataclasses.dataclass(frozen=True)
class SpeedConfig:
    source: Path
    """Folder with one folder of photographs a class."""
    work: Path
    """Folder for the variants and for what is written; about 100 KB an image."""
    images: int = 2000
    """How many photographs to convert."""
    megapixels: float = 0.1875
    """Size of each variant; 0 leaves the photographs as they are."""
    cores: tuple[int, ...] = (1, 2)
    """Measure on so many cores, each."""
    rounds: int = 3
    """Each writer is measured so often; the median counts."""
    writers: tuple[str, ...] = tuple(WRITERS)
    """Which writers."""
    json: Path | None = None
    """Also write the rates to this file."""

    def __post_init__(self) -> None:
        check_least(self, "images", "cores", "rounds")
        check_least(self, "megapixels", least=0)
        if unknown := set(self.writers) - set(WRITERS):
            raise ValueError(f"--writers {', '.join(sorted(unknown))} must be among {', '.join(WRITERS)}")


def make_variants(config: SpeedConfig) -> Path:
    """The photographs at ImageNet's size, repeated; in the same class folders."""
    folder = config.work / "photographs"
    originals = photographs(config.source)
    if len(list(folder.glob("*/*"))) == config.images:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    for number in range(config.images):
        path = Path(originals[number % len(originals)][0])
        target = folder / path.parent.name / f"{path.stem}_{number // len(originals)}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        if number >= len(originals):
            shutil.copyfile(target.with_name(f"{path.stem}_0.jpg"), target)
        else:
            target.write_bytes(_variant(path.read_bytes(), config.megapixels))
    return folder


def _variant(data: bytes, megapixels: float) -> bytes:
    if not megapixels:
        return data
    with Image.open(io.BytesIO(data)) as image:
        scale = (megapixels * 1e6 / (image.width * image.height)) ** 0.5
        size = round(image.width * scale), round(image.height * scale)
        buffer = io.BytesIO()
        # ImageNet's files have 4.4 bits a pixel; enlarged photographs need this quality for about as many.
        image.convert("RGB").resize(size, Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=97, subsampling=2)
    return buffer.getvalue()


def rate(config: SpeedConfig, source: Path, work: Path, name: str, cores: int) -> float:
    """Images per second of one run of one writer.

    Raises:
        ValueError: if it fails or does not end.
    """
    output = work / "written"
    for left in (output, output.with_suffix(".beton"), output.with_suffix(".csv")):
        shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
    arguments = ["-m", "tests.benchmarks.shard_writers", "--name", name, "--source", str(source)]
    arguments += ["--output", str(output), "--cores", str(cores)]
    printed = run_pinned(name, arguments, cores, TIME_OUT_S, NO_ALBUMENTATIONS_UPDATE="1")
    return config.images / float(json.loads(printed[-1])["seconds"])


def main(config: SpeedConfig) -> None:
    check_cores(config.cores)
    work = config.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    source = make_variants(dataclasses.replace(config, work=work))
    size = sum(Path(path).stat().st_size for path, _ in photographs(source)) / config.images
    writers = present(config.writers, installed)
    rates = take_turns(writers, config.cores, config.rounds, functools.partial(rate, config, source, work))
    print(f"\n{platform.machine()}, {config.images} photographs of {size / 1000:.0f} KB, medians of {config.rounds}")
    for row in table(rates, config.cores, "writer", LIMIT, "bare loop"):
        print(row)
    if config.json is not None:
        write_json(config.json, rates)


if __name__ == "__main__":
    run(SpeedConfig, main)
