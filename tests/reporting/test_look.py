"""The picture of a batch: its pixels against Pillow's, its file, and what is said where there is no set."""

from __future__ import annotations

import io
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from jobs.look import EXAGGERATION, LookConfig, look
from pipeline.dataset.info import read_dataset
from pipeline.dataset.split_reader import SplitReader
from tests.processes import run_here

ROOT = Path(__file__).resolve().parents[2]


def test_the_pixels_are_the_images(shard_set: Path) -> None:
    info = read_dataset(shard_set)
    reader = SplitReader(shard_set, info, "train")
    found = look(LookConfig(shard_set, images=9), info, reader)
    flips = found.drawn.flips
    assert flips.any()
    assert not flips.all()
    assert EXAGGERATION * np.abs(found.drawn.shifts).max() > 5
    for row, sample in enumerate(found.samples):
        stored = np.asarray(Image.open(io.BytesIO(reader.image(sample).tobytes()))).astype(int)
        np.testing.assert_array_equal(found.stored[row], stored)
        top, left = found.drawn.crops[row]
        crop = stored[top : top + 227, left : left + 227]
        crop = crop[:, ::-1] if flips[row] else crop
        for pixels, factor in ((found.network[row], 1), (found.exaggerated[row], EXAGGERATION)):
            expected = np.clip(crop + factor * found.drawn.shifts[row], 0, 255)
            assert np.abs(pixels - expected).max() <= 1


def make_look(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`make look` in this environment instead of the project's own .venv."""
    # Below another make, as in `make test`, it would also print where it is.
    command = [
        "make",
        "--no-print-directory",
        "-o",
        ".venv/.installed",
        "look",
        f"BIN={Path(sys.executable).parent}",
        *arguments,
    ]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)


def test_make_look_writes_the_picture(shard_set: Path, tmp_path: Path) -> None:
    output = tmp_path / "look.png"
    shown = make_look("--dry-run", f"DATA={shard_set}", f"LOOK={output}").stdout.splitlines()[-1]
    _, job, *arguments = shlex.split(shown)
    assert job == "jobs/look.py"
    done = run_here("look", *arguments)
    assert done.returncode == 0, done.stderr
    assert str(output) in done.stdout
    with Image.open(output) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    assert pixels.shape[1] > 900
    # The crops are marked in a color that the pictures do not have.
    assert (np.abs(pixels - [255, 45, 149]).sum(axis=2) < 30).sum() > 1000


def test_make_look_without_a_set_says_how_to_make_one(tmp_path: Path) -> None:
    done = make_look(f"DATA={tmp_path / 'none'}")
    assert done.returncode != 0
    assert "make demo" in done.stderr
    assert "make look DATA=SHARDS" in done.stderr
