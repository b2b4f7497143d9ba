"""The report's page in a browser, by Debian's package chromium: light and dark, wide and narrow."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from jobs.reporting.page import gallery, page
from jobs.reporting.predictions import predict
from jobs.training.run_state import RunFingerprint, State
from jobs.training.trackers import Events
from jobs.training.worker import make_network
from model.metrics import Score
from model.progress import Progress
from model.recipe import RECIPES
from model.schedule import Plateau
from pipeline.dataset.info import read_dataset
from tests.benchmarks.figures import CHROMIUM, chromium, screenshot

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which(CHROMIUM) is None, reason=f"no {CHROMIUM}: apt-get install {CHROMIUM}"),
]

PAPER = {"light": 255, "dark": 22}
"""The page's background, of each color."""


@pytest.fixture(scope="module")
def report(shard_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of three epochs that nobody trained."""
    info, recipe = read_dataset(shard_set), RECIPES["default"]
    progress = Progress(Plateau(recipe.lr), rate=recipe.lr)
    for error in (0.6, 0.4, 0.3):
        row = progress.close_epoch(recipe, Score(45, 3 * error, error, 0.0), Score(15, 3 * error, error, 0.0))
        row.update(train_seconds=3.0, seconds=4.0)
    identity = RunFingerprint.of(recipe, info)
    network = make_network(identity).eval()
    images = gallery(predict(network, info.rgb, torch.device("cpu"), shard_set, info), shard_set, info)
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(page("three", State(identity, progress), network, Events({}, ["this machine"]), images))
    return path


@pytest.mark.parametrize("scheme", PAPER)
def test_the_page_is_light_or_dark_as_the_reader_has_it(report: Path, tmp_path: Path, scheme: str) -> None:
    screenshot(report, tmp_path / "page.png", scheme, width=1200, height=900)
    gray = np.asarray(Image.open(tmp_path / "page.png").convert("L"))
    assert gray.shape == (900, 1200)
    assert gray[0, 0] == PAPER[scheme]
    # Text and lines stand out from it.
    assert (np.abs(gray.astype(int) - PAPER[scheme]) > 100).mean() > 0.01


@pytest.mark.parametrize("width", [1200, 500])
def test_nothing_is_wider_than_the_window(report: Path, tmp_path: Path, width: int) -> None:
    measured = tmp_path / "measured.html"
    script = "<script>document.title = `${document.documentElement.scrollWidth} of ${innerWidth}`</script>"
    measured.write_text(report.read_text() + script)
    found = re.search(r"<title>(\d+) of (\d+)</title>", chromium(measured, width, 900, "--dump-dom"))
    assert found is not None
    assert int(found[2]) == width
    assert int(found[1]) <= width
