"""The report's figures, drawn by matplotlib as inline SVG whose text and lines take the page's color."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter
from numpy.typing import NDArray

FILTER_COLUMNS = 16  # 96 filters in six rows; the paper's figure 3 has 12 to a row.
CHART_INCHES = (5.0, 3.3)  # Small, so that text stays legible on a phone, where a chart fills the width.
TRAINING, VALIDATION, FIVE = "#3a86d4", "#e0762b", "#3fa36b"  # Distinct to the color-blind, on black and on white.
RIGHT, OTHER = "#3fa36b", "#8fa3b8"  # The true class, and all others.
IMAGE_DPI = 96  # An image of 1.5 inches has 144 pixels, twice what a phone shows.

Points = Sequence[tuple[float, float]]
"""(epochs done, value), in order."""


def curves(history: list[dict[str, Any]], within: Mapping[str, Points]) -> dict[str, str]:
    """Loss, error and learning rate by epoch as SVG, by their captions.

    Args:
        history: one row an epoch.
        within: what was measured within the epochs, by the names that trackers use; may be empty.
    """
    epochs = [row["epoch"] for row in history]
    loss, error, rate = (_axes(history) for _ in range(3))

    if points := within.get("train/loss"):
        loss.plot(*zip(*points, strict=True), color=TRAINING, alpha=0.4, linewidth=1)
    loss.plot(epochs, [row["train_loss"] for row in history], "o-", color=TRAINING, label="training")
    loss.plot(epochs, [row["val_loss"] for row in history], "s-", color=VALIDATION, label="validation")

    for key, style, color, label in (
        ("train_error", "o-", TRAINING, "training, top-1"),
        ("top1_error", "s-", VALIDATION, "validation, top-1"),
        ("top5_error", "^-", FIVE, "validation, top-5"),
    ):
        error.plot(epochs, [100 * row[key] for row in history], style, color=color, label=label)
    error.set_ylim(bottom=0)

    # A row has one rate, but some schedules change it within the epoch; the events have every rate.
    rates = within.get("train/lr") or [(row["epoch"], row["lr"]) for row in history]
    # Steps, not slopes: each value is the rate of the steps before it.
    rates = [(0, rates[0][1]), *rates]
    rate.plot(*zip(*rates, strict=True), color=TRAINING, drawstyle="steps-pre")
    if all(value > 0 for _, value in rates):
        rate.set_yscale("log")
        rate.yaxis.set_minor_formatter(NullFormatter())
        # Wide enough for a power of ten, since only those ticks have numbers.
        rate.set_ylim(min(value for _, value in rates) / 4, 4 * max(value for _, value in rates))

    captions = {"Loss (nats)": loss, "Error (%)": error, "Learning rate": rate}
    for axes in captions.values():
        if axes.get_legend_handles_labels()[0]:
            # Above the curves and without a frame, which would be white on a dark page.
            axes.legend(frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(-0.02, 1.0), fontsize=9)
    return {caption: _svg(axes.get_figure()) for caption, axes in captions.items()}


def _axes(history: list[dict[str, Any]]) -> Axes:
    """Axes over the epochs, the schedule's decisions marked."""
    axes = Figure(figsize=CHART_INCHES, layout="constrained").subplots()
    axes.grid(alpha=0.3)
    axes.set_xlabel("epoch")
    axes.set_xlim(0, history[-1]["epoch"] + 0.2)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    decisions = [row["epoch"] for row in history if row["reason"]]
    if decisions:
        style = {"linestyles": "--", "linewidth": 1, "color": "gray", "transform": axes.get_xaxis_transform()}
        axes.vlines(decisions, 0, 1, label="the rate drops, or the run stops", **style)
    return axes


def filters(weights: NDArray[np.float32]) -> str:
    """conv1's weights [96, 3, 11, 11], each filter scaled by its own largest, zero being gray: the paper's figure 3."""
    figure = Figure(figsize=(8, 8 * len(weights) / FILTER_COLUMNS**2))
    grid = figure.subplots(len(weights) // FILTER_COLUMNS, FILTER_COLUMNS)
    figure.subplots_adjust(0, 0, 1, 1, 0.1, 0.1)
    for axes, weight in zip(grid.flat, weights.transpose(0, 2, 3, 1), strict=True):
        # "none" keeps the pixels sharp at any size.
        axes.imshow(0.5 + 0.5 * weight / np.abs(weight).max(), interpolation="none")
        axes.axis("off")
    return _svg(figure)


def photograph(image: NDArray[np.uint8], truth: int, top: Sequence[tuple[int, float]], names: list[str]) -> str:
    """An image of class `truth` beside its most probable (class, probability): the paper's figure 4 (left)."""
    figure = Figure(figsize=(4.4, 1.5))
    left, right = figure.add_axes((0, 0, 1.5 / 4.4, 1)), figure.add_axes((0.36, 0, 0.64, 1))
    left.imshow(image)
    right.set(xlim=(0, 1), ylim=(len(top) - 0.5, -1.5))
    right.text(0.01, -1, names[truth], va="center", fontweight="bold", parse_math=False)
    for place, (label, probability) in enumerate(top):
        right.barh(place, probability, color=RIGHT if label == truth else OTHER, alpha=0.6)
        right.text(0.01, place, f"{probability:.0%}  {names[label]}", va="center", fontsize=9, parse_math=False)
    for axes in (left, right):
        axes.axis("off")
    return _svg(figure)


def neighbors(images: Sequence[NDArray[np.uint8]], labels: Sequence[int], names: list[str]) -> str:
    """A validation image, then the training images nearest to it, by class: the paper's figure 4 (right)."""
    figure = Figure(figsize=(1.5 * len(images), 1.7), layout="constrained")
    for i, axes in enumerate(figure.subplots(1, len(images))):
        axes.imshow(images[i])
        axes.axis("off")
        color = RIGHT if i > 0 and labels[i] == labels[0] else "black"
        axes.set_title(f"{names[labels[i]]:.18}", fontsize=9, color=color, parse_math=False)
    return _svg(figure)


def _svg(figure: Any) -> str:
    """A figure as inline SVG; what is black takes the page's color."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "font.family": "sans-serif"}), warnings.catch_warnings():
        # The browser draws the text, with fonts of its own.
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure.savefig(buffer, format="svg", dpi=IMAGE_DPI, transparent=True)
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace("#000000", "currentColor")
