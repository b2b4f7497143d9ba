"""The picture of a batch: its pixels against Pillow's, its file, and what is said where there is no set."""

from __future__ import annotations

import dataclasses
import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs.look import LookConfig, Seen, look, main
from pipeline.dataset.info import read_dataset
from pipeline.dataset.split_reader import SplitReader

ROOT = Path(__file__).resolve().parents[2]


def seen(shard_set: Path, **settings: object) -> tuple[Seen, SplitReader]:
    info = read_dataset(shard_set)
    reader = SplitReader(shard_set, info, "train")
    config = dataclasses.replace(LookConfig(shard_set, images=9, color="std", exaggerate=3.0), **settings)  # type: ignore[arg-type]
    return look(config, info, reader), reader


def test_the_pixels_are_the_images(shard_set: Path) -> None:
    found, reader = seen(shard_set)
    flips = found.drawn.flips
    assert flips.any()
    assert not flips.all()
    assert np.abs(found.drawn.shifts).max() > 5
    for row, sample in enumerate(found.samples):
        stored = np.asarray(Image.open(io.BytesIO(reader.image(sample).tobytes()))).astype(int)
        np.testing.assert_array_equal(found.stored[row], stored)
        top, left = found.drawn.crops[row]
        crop = stored[top : top + 227, left : left + 227]
        crop = crop[:, ::-1] if flips[row] else crop
        for pixels, factor in ((found.network[row], 1), (found.exaggerated[row], 3)):
            expected = np.clip(crop + factor * found.drawn.shifts[row], 0, 255)
            assert np.abs(pixels - expected).max() <= 1


def test_another_step_and_no_color(shard_set: Path) -> None:
    first, _ = seen(shard_set, batch_size=15)
    second, _ = seen(shard_set, batch_size=15, step=2, color="none")
    assert not set(first.samples) & set(second.samples)
    assert not second.drawn.shifts.any()
    with pytest.raises(ValueError, match="an epoch has 3"):
        seen(shard_set, batch_size=15, step=3)


def test_the_picture_is_written(shard_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "look.png"
    main(LookConfig(shard_set, output, images=2))
    with Image.open(output) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    assert pixels.shape[1] > 900
    # The crops are marked in a color that the pictures do not have.
    assert (np.abs(pixels - [255, 45, 149]).sum(axis=2) < 30).sum() > 1000
    assert str(output) in capsys.readouterr().out


def make_look(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`make look` in this environment instead of the project's own .venv."""
    command = ["make", "-o", ".venv/.installed", "look", f"BIN={Path(sys.executable).parent}", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)


def test_make_look(shard_set: Path, tmp_path: Path) -> None:
    done = make_look(f"DATA={shard_set}", f"LOOK={tmp_path / 'look.png'}")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "look.png").read_bytes().startswith(b"\x89PNG")


def test_make_look_without_a_set_says_how_to_make_one(tmp_path: Path) -> None:
    done = make_look(f"DATA={tmp_path / 'none'}")
    assert done.returncode != 0
    assert "make demo" in done.stderr
    assert "make look DATA=SHARDS" in done.stderr
