"""Draws the README's pictures into docs/img/, for a light page and a dark one.

    python -m tests.benchmarks.figures

The loaders' chart is of docs/benchmarks/loaders.json, the batch of a few generated images.
"""

from __future__ import annotations

import dataclasses
import io
import json
import tempfile
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure
from PIL import Image

from jobs import look
from jobs.cli.command import run
from pipeline.images.synthetic import write_folder
from pipeline.storage.remote import write_atomically
from tests.photographs import build_shard_set

ROOT = Path(__file__).resolve().parents[2]
PAGES = {"light": ("#ffffff", "#1f2328"), "dark": ("#0d1117", "#e6edf3")}
"""GitHub's background and text."""
OURS, OTHERS = "#3a86d4", "#8fa3b8"
SEED = 23  # With it, one image of the two is flipped.
CORES = "2"
NO_LOADERS = ("no more", "bare copy")  # Of decoding or copying alone, which give no batches.


@dataclasses.dataclass(frozen=True)
class FiguresConfig:
    output: Path = ROOT / "docs" / "img"
    """The folder to write to."""
    rates: Path = ROOT / "docs" / "benchmarks" / "loaders.json"
    """What tests.benchmarks.loader_speed --json wrote."""


def loader_bars(rates: dict[str, dict[str, float]]) -> Figure:
    """A bar for each loader's images per second, the fastest on top."""
    shown = {name: by_cores[CORES] for name, by_cores in rates.items() if not any(word in name for word in NO_LOADERS)}
    names = sorted(shown, key=shown.__getitem__)
    figure = Figure(figsize=(8, 0.36 * len(names) + 1), layout="constrained")
    axes = figure.subplots()
    colors = [OURS if name.startswith("ours") else OTHERS for name in names]
    bars = axes.barh(names, [shown[name] for name in names], color=colors)
    axes.bar_label(bars, fmt="{:,.0f}", padding=4)
    axes.set_xlabel(f"images/s on {CORES} CPU cores; pixels and raw: decoded before, others: from JPEGs")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.12)
    return figure


def batch(folder: Path) -> bytes:
    """What jobs/look.py draws of two generated images, as a JPEG."""
    write_folder(folder / "images", classes=6, train_per_class=4, val_per_class=1, seed=0, log=lambda line: None)
    shards = build_shard_set(folder / "images", folder / "shards")
    look.main(look.LookConfig(shards, folder / "look.png", images=2, seed=SEED))
    drawn = io.BytesIO()
    Image.open(folder / "look.png").convert("RGB").save(drawn, "JPEG", quality=85)
    return drawn.getvalue()


def main(config: FiguresConfig) -> None:
    config.output.mkdir(parents=True, exist_ok=True)
    rates = json.loads(config.rates.read_text("utf-8"))
    for page, (background, text) in PAGES.items():
        style = {
            "figure.facecolor": background,
            "axes.facecolor": background,
            "savefig.facecolor": background,
            **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), text),
            "svg.hashsalt": page,
            "svg.fonttype": "none",  # Text as text, a tenth of its outlines.
            "font.family": "sans-serif",
        }
        with tempfile.TemporaryDirectory() as folder, mpl.rc_context(style):
            chart = io.BytesIO()
            loader_bars(rates).savefig(chart, format="svg", metadata={"Date": None})
            write_atomically(config.output / f"loaders-{page}.svg", chart.getvalue())
            write_atomically(config.output / f"batch-{page}.jpg", batch(Path(folder)))
    print(f"pictures: {config.output}")


if __name__ == "__main__":
    run(FiguresConfig, main)
