"""The report, its figures and page against what they are of; a batch's picture, its pixels against Pillow's."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs.look import EXAGGERATION, LookConfig, look
from jobs.report import ReportConfig, main
from jobs.reporting import charts
from jobs.reporting.predictions import Confusion, confusions
from jobs.training.run_state import CheckpointError
from pipeline.dataset.info import read_dataset
from pipeline.dataset.split_reader import SplitReader
from tests.damage import edit_dataset, own_copy
from tests.processes import run_here


def test_each_filter_is_drawn_by_itself() -> None:
    weights = np.random.default_rng(0).normal(size=(96, 3, 11, 11)).astype(np.float32)
    images = re.findall(r"data:image/png;base64,\s*([^\"]+)", charts.filters(weights))
    for image, weight in zip(images, weights, strict=True):
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(image))).convert("RGB"), np.float64)
        np.testing.assert_allclose(shown / 127.5 - 1, weight.transpose(1, 2, 0) / np.abs(weight).max(), atol=0.01)


def test_confusions_start_with_the_worst_class() -> None:
    labels, predicted = np.array([0, 0, 0, 1, 1, 3]), np.array([0, 1, 1, 1, 3, 3])
    assert confusions(labels, predicted, 4) == [
        Confusion(label=0, images=3, wrong=2, mistaken_for=1, as_that=2),
        Confusion(label=1, images=2, wrong=1, mistaken_for=3, as_that=1),
        Confusion(label=3, images=1, wrong=0, mistaken_for=0, as_that=0),
    ]


@pytest.mark.slow
def test_the_page_shows_a_runs_decisions_its_network_and_its_set(report: Path) -> None:
    text = report.read_text()
    for epoch in (3, 5, 7, 9):
        assert text.count(f"<li>epoch {epoch}: error ") == 1
    assert text.count("stopping, the rate was reduced 3 times</li>") == 1
    assert (text.count("<svg"), text.count("<image")) == (3 + 1 + 8 + 5, 96 + 8 + 5 * 7)
    assert "<b>" not in text
    assert "&lt;b&gt;$x$ 中" in text
    assert [rate for rate in re.findall(r"<td>([\d,]*)</td><td>9</td></tr>", text) if rate] == ["500"]
    assert text.count("this machine") == 1
    assert 'src="http' not in text


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


def test_the_picture_has_the_crops_marked(shard_set: Path, tmp_path: Path) -> None:
    """Of a set of one color, too, and of a name that is a formula which matplotlib cannot read."""
    output, odd = tmp_path / "look.png", own_copy(shard_set, tmp_path / "$x^$")
    edit_dataset(odd, lambda value: value["rgb"].update(eigenvalues=[0, 0, 0]))
    done = run_here("look", "--data", odd, "--output", tmp_path / "nowhere" / "look.png")
    assert f"--output {tmp_path}/nowhere/look.png cannot be written: there is no folder" in done.stderr
    done = run_here("look", "--data", odd, "--output", output)
    assert done.returncode == 0, done.stderr
    assert str(output) in done.stdout
    with Image.open(output) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    assert pixels.shape[1] > 900
    # In a color that the pictures do not have.
    assert (np.abs(pixels - [255, 45, 149]).sum(axis=2) < 30).sum() > 1000


def test_a_run_that_has_nothing_to_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"^{tmp_path}/none holds no finished epoch's checkpoint: train first"):
        main(ReportConfig(str(tmp_path), "none", tmp_path / "report.html"))
