"""How fast photographs become shards, beside bare loops over the same libraries and beside other writers.

    python -m tests.benchmarks.shard_speed --source FOLDER --work FOLDER

FOLDER holds one folder of photographs a class. They are first brought to ImageNet's usual size (0.1875 megapixels,
500 x 375, 4:2:0) and repeated under other names up to --images. Then every writer that is installed runs in a process
of its own, turn and turn about, on one core and on two; medians and ratios of one call are what counts. A writer that
fails, or takes longer than ten minutes, is left out and named. The other writers,
best in an environment of their own:

    pip install -e .[bench]
    pip install --no-deps img2dataset 'albumentations<2' albucore  # img2dataset asks for webdataset below 0.3
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
from pathlib import Path

from PIL import Image

from jobs.cli import run
from pipeline.dataset import write_json
from tests.benchmarks.shard_writers import WRITERS, installed, photographs

LIMIT = "bare loop, area"
TIME_OUT_S = 600


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
        if unknown := set(self.writers) - set(WRITERS):
            raise ValueError(f"--writers {', '.join(sorted(unknown))} must be among {', '.join(WRITERS)}")
        if self.images < 1 or self.rounds < 1:
            raise ValueError("--images and --rounds must be at least 1")


def make_variants(config: SpeedConfig) -> Path:
    """The photographs at ImageNet's size, repeated; in the same class folders."""
    folder = config.work / "photographs"
    originals = photographs(config.source)
    if folder.is_dir() and len(photographs(folder)) == config.images:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    for number in range(config.images):
        path = Path(originals[number % len(originals)][0])
        target = folder / path.parent.name / f"{path.stem}_{number // len(originals)}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        if number >= len(originals):
            first = folder / path.parent.name / f"{path.stem}_0.jpg"
            shutil.copyfile(first, target)
            continue
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


def seconds(name: str, source: Path, work: Path, cores: int) -> float:
    """One run of one writer, pinned to so many cores.

    Raises:
        ValueError: if it fails or does not end.
    """
    output = work / "written"
    for left in (output, output.with_suffix(".beton"), output.with_suffix(".csv")):
        shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
    allowed = ",".join(map(str, sorted(os.sched_getaffinity(0))[:cores]))
    command = ["taskset", "-c", allowed, sys.executable, "-m", "tests.benchmarks.shard_writers", "--name", name]
    process = subprocess.Popen(
        [*command, "--source", str(source), "--output", str(output), "--cores", str(cores)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "NO_ALBUMENTATIONS_UPDATE": "1"},
        start_new_session=True,
    )
    try:
        printed, errors = process.communicate(timeout=TIME_OUT_S)
    except subprocess.TimeoutExpired:
        raise ValueError(f"{name} did not end within {TIME_OUT_S} s") from None
    finally:
        # Its worker processes too.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    if process.returncode:
        raise ValueError(f"{name} failed: {(errors.strip().splitlines() or ['nothing said'])[-1]}")
    return float(json.loads(printed.splitlines()[-1])["seconds"])


def main(config: SpeedConfig) -> None:
    if len(os.sched_getaffinity(0)) < max(config.cores):
        raise ValueError(f"--cores {max(config.cores)}: this process may use {len(os.sched_getaffinity(0))}")
    work = config.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    source = make_variants(dataclasses.replace(config, work=work))
    size = sum(Path(path).stat().st_size for path, _ in photographs(source)) / config.images
    writers = [name for name in config.writers if installed(name)]
    if missing := [name for name in config.writers if name not in writers]:
        print(f"not installed: {', '.join(missing)}")
    found: dict[str, dict[int, list[float]]] = {name: {cores: [] for cores in config.cores} for name in writers}
    for number in range(config.rounds):
        for cores in config.cores:
            for name in list(found):
                try:
                    found[name][cores].append(config.images / seconds(name, source, work, cores))
                except ValueError as error:
                    print(f"left out: {error}", flush=True)
                    del found[name]
                    continue
                print(f"round {number + 1}, {cores} core(s), {name}: {found[name][cores][-1]:.1f} images/s", flush=True)
    rates = {name: {c: statistics.median(values) for c, values in by.items()} for name, by in found.items()}
    print(f"\n{platform.machine()}, {config.images} photographs of {size / 1000:.0f} KB, medians of {config.rounds}")
    for row in table(rates, config.cores):
        print(row)
    if config.json is not None:
        write_json(config.json, rates)


def table(rates: dict[str, dict[int, float]], cores: tuple[int, ...]) -> list[str]:
    """Markdown: images/s and the ratio to the bare loop, for each number of cores, and what the last core adds."""
    rows = ["| writer | " + " | ".join(f"{c} core(s): images/s | of the bare loop" for c in cores) + " | more cores |"]
    rows.append("| --- " * (2 * len(cores) + 2) + "|")
    for name, by in rates.items():
        cells = []
        for c in cores:
            limit = rates.get(LIMIT, {}).get(c)
            cells += [f"{by[c]:,.0f}", f"{by[c] / limit:.2f}" if limit else ""]
        rows.append(f"| {name} | {' | '.join(cells)} | {by[cores[-1]] / by[cores[0]]:.2f} x |")
    return rows


if __name__ == "__main__":
    run(SpeedConfig, main)
