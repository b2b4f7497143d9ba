"""Draws the pictures of README.md and docs/ into docs/img/, for a light page and a dark one.

    python -m tests.benchmarks.figures

The batch is of a few generated images. The others are drawn from JSON in docs/benchmarks/; one whose JSON is missing is
named and left out. With --report, the top of that page is one more picture.

    loaders.json    {LOADER: {CORES: images/s}}, by tests.benchmarks.loader_speed
    rgb.json        the `rgb` of a set's dataset.json
    learning.json   [{"run": "NAME, seed N", "epoch": [1, ...], "train_loss": [nats, ...],
                    "val_top1_error": [fraction, ...]}, ...], by tests.benchmarks.learning
    exactness.json  [{"run": NAME, "step": [1, ...], "train_loss": [nats, ...], "killed_after": [step, ...],
                    "weights_sha256": DIGEST}, ...], by tests.benchmarks.exactness
                    The first row is what the others are compared with.

The lists of a row have one length. Steps count from the run's start.
"""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from jobs import look
from jobs.cli.command import run
from pipeline.images.synthetic import write_folder
from pipeline.storage.remote import write_atomically
from tests.photographs import build_shard_set

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = {"light": ("#ffffff", "#1f2328"), "dark": ("#0d1117", "#e6edf3")}
"""GitHub's background and text."""
OURS, OTHERS = "#3a86d4", "#8fa3b8"
LINES = (OURS, "#e0762b", "#3fa36b", OTHERS)  # Distinct to the color-blind, on black and on white.
SEED = 23  # With it, one image of the two is flipped.
CORES = "2"
NO_LOADERS = ("no more", "bare copy")  # Of decoding or copying alone, which give no batches.
CHROMIUM = "chromium"
REPORT_SIZE = (1000, 2200)
DEVIATIONS = 3  # Shown of each color component, to both sides.
IMAGENET_EIGENVALUES = (0.2175, 0.0188, 0.0045)  # As most programs have them, from fb.resnet.torch; RGB in [0, 1].


@dataclasses.dataclass(frozen=True)
class FiguresConfig:
    output: Path = DOCS / "img"
    """The folder to write to."""
    data: Path = DOCS / "benchmarks"
    """The folder with the JSON."""
    report: Path | None = None
    """A page by jobs/report.py, to be photographed by Chromium (Debian's package chromium)."""


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


def rgb_components(rgb: dict[str, Any]) -> Figure:
    """The colors along each of a set's RGB components, through its mean color."""
    figure = Figure(figsize=(8, 3), layout="constrained")
    deviations = np.linspace(-DEVIATIONS, DEVIATIONS, 256)[None, :, None]
    values = rgb["eigenvalues"]
    for i, axes in enumerate(figure.subplots(3, sharex=True)):
        colors = rgb["mean"] + deviations * np.sqrt(values[i]) * np.array(rgb["eigenvectors"])[:, i]
        axes.imshow(np.clip(colors, 0, 1), extent=(-DEVIATIONS, DEVIATIONS, 0, 1), aspect="auto")
        axes.set_yticks([])
        known = f"ImageNet: {IMAGENET_EIGENVALUES[i]:.4f}"
        title = (
            f"component {i + 1}: {values[i] / sum(values):.1%} of the variance, eigenvalue {values[i]:.4f} ({known})"
        )
        axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel("standard deviations from the mean color")
    return figure


def learning_curves(rows: list[dict[str, Any]]) -> Figure:
    """Training loss and validation error by epoch: a line for each seed, a color for all seeds of a run."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    captions = {"train_loss": "training loss (nats)", "val_top1_error": "validation error, top-1"}
    names = [row["run"].partition(", seed")[0] for row in rows]
    colors = dict(zip(dict.fromkeys(names), LINES, strict=False))
    for axes, (key, caption) in zip(figure.subplots(1, 2), captions.items(), strict=True):
        for number, (name, row) in enumerate(zip(names, rows, strict=True)):
            label = f"{name} ({names.count(name)} seeds)" if name not in names[:number] else None
            axes.plot(row["epoch"], row[key], color=colors[name], alpha=0.7, linewidth=1.2, label=label)
        axes.set_xlabel("epoch")
        axes.set_title(caption, fontsize=10)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.legend(frameon=False)
    return figure


def exactness_overlay(rows: list[dict[str, Any]]) -> Figure:
    """The loss of each run by step, each line thinner than the one below it; a mark where a run was killed."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    axes = figure.subplots()
    first = dict(zip(rows[0]["step"], rows[0]["train_loss"], strict=True))
    for row, color, width in zip(rows, (OTHERS, *LINES), (6, 3, 1), strict=False):
        apart = max(abs(loss - first[step]) for step, loss in zip(row["step"], row["train_loss"], strict=True))
        compared = f": losses at most {apart:.1g} apart" if apart else ": equal losses"
        if row["weights_sha256"] == rows[0]["weights_sha256"]:
            compared += " and weights"
        label = row["run"] + (compared if row is not rows[0] else "")
        axes.plot(row["step"], row["train_loss"], color=color, linewidth=width, label=label)
        for step in row["killed_after"]:
            place = (step, row["train_loss"][row["step"].index(step)])
            arrow = {"arrowstyle": "->", "color": color}
            axes.annotate("killed", place, (0, 24), textcoords="offset points", ha="center", arrowprops=arrow)
    axes.set_xlabel("step")
    axes.set_ylabel("training loss (nats)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1))  # Above the lines.
    return figure


CHARTS: dict[str, Callable[[Any], Figure]] = {
    "loaders": loader_bars,
    "rgb": rgb_components,
    "learning": learning_curves,
    "exactness": exactness_overlay,
}
"""By the name of the JSON and of the picture."""


def batch(folder: Path) -> bytes:
    """What jobs/look.py draws of two generated images, as a JPEG."""
    write_folder(folder / "images", classes=6, train_per_class=4, val_per_class=1, seed=0, log=lambda line: None)
    shards = build_shard_set(folder / "images", folder / "shards")
    look.main(look.LookConfig(shards, folder / "look.png", images=2, seed=SEED))
    return as_jpeg(folder / "look.png")


def as_jpeg(picture: Path) -> bytes:
    drawn = io.BytesIO()
    Image.open(picture).convert("RGB").save(drawn, "JPEG", quality=85)
    return drawn.getvalue()


def screenshot(page: Path, output: Path, scheme: str, width: int, height: int) -> None:
    """Writes a PNG of a page's top as Chromium shows it, where the reader has it light or dark.

    Raises:
        subprocess.CalledProcessError: if Chromium fails.
    """
    schemes = {"dark": 0, "light": 1}  # Blink's PreferredColorScheme
    color = f"--blink-settings=preferredColorScheme={schemes[scheme]}"
    chromium(page, width, height, f"--screenshot={output}", color, "--hide-scrollbars")


def chromium(page: Path, width: int, height: int, *options: str) -> str:
    """What Chromium prints of a page in a window of that size.

    Raises:
        subprocess.CalledProcessError: if Chromium fails.
    """
    with tempfile.TemporaryDirectory() as profile:
        always = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
        command = [CHROMIUM, *always, f"--window-size={width},{height}", *options, page.resolve().as_uri()]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def main(config: FiguresConfig) -> None:
    config.output.mkdir(parents=True, exist_ok=True)
    files = {name: config.data / f"{name}.json" for name in CHARTS}
    for name, file in files.items():
        if not file.exists():
            print(f"not drawn: {name}, as there is no {file}")
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
            for name, file in files.items():
                if file.exists():
                    chart = io.BytesIO()
                    CHARTS[name](json.loads(file.read_text("utf-8"))).savefig(
                        chart, format="svg", metadata={"Date": None}
                    )
                    write_atomically(config.output / f"{name}-{page}.svg", chart.getvalue())
            write_atomically(config.output / f"batch-{page}.jpg", batch(Path(folder)))
            if config.report is not None:
                screenshot(config.report, Path(folder) / "report.png", page, *REPORT_SIZE)
                write_atomically(config.output / f"report-{page}.jpg", as_jpeg(Path(folder) / "report.png"))
    print(f"pictures: {config.output}")


if __name__ == "__main__":
    run(FiguresConfig, main)
