"""The report's page in a browser, by Debian's package chromium: light and dark, wide and narrow."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.benchmarks.figures import CHROMIUM, chromium, screenshot

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which(CHROMIUM) is None, reason=f"no {CHROMIUM}: apt-get install {CHROMIUM}"),
]

PAPER = {"light": 255, "dark": 22}
"""The page's background, of each color."""


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
