"""A run's curves as small SVG charts in the page's own colours, and the first layer's filters as a picture."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter
from numpy.typing import NDArray
from PIL import Image

FILTER_COLUMNS = 16  # 96 filters in six rows; the paper's figure 3 has 12 to a row.
CHART_INCHES = (5.0, 3.3)  # So small that the letters are still read on a telephone, where a chart is as wide as it.
TRAINING, VALIDATION, FIVE = "#3a86d4", "#e0762b", "#3fa36b"  # Told apart by the colour-blind, on black and on white.

Points = Sequence[tuple[float, float]]
"""(epochs done, value), in order."""


def charts(history: list[dict[str, Any]], within: Mapping[str, Points]) -> list[str]:
    """Loss, error, learning rate and throughput by epoch, the schedule's decisions marked; SVG figures.

    Args:
        history: one row an epoch.
        within: what was measured within the epochs, by the names that trackers use; may be empty.
    """
    return [
        svg(_loss(history, within), "Loss (nats)"),
        svg(_error(history), "Error (%)"),
        svg(_rate(history, within), "Learning rate"),
        svg(_throughput(history, within), "Training images per second, and time spent waiting for data"),
    ]


def _chart(history: list[dict[str, Any]]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=CHART_INCHES, layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    axes.set_xlabel("epoch")
    axes.set_xlim(0, history[-1]["epoch"] + 0.2)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    for number, row in enumerate(row for row in history if row["reason"]):
        label = "the rate drops, or the run stops" if number == 0 else None
        axes.axvline(row["epoch"], linestyle="--", linewidth=1, color="gray", label=label)
    return figure, axes


def _column(history: list[dict[str, Any]], key: str, scale: float = 1.0) -> tuple[list[float], list[float]]:
    return [row["epoch"] for row in history], [scale * row[key] for row in history]


def _within(axes: Axes, points: Points | None, **style: Any) -> None:
    if points:
        axes.plot(*zip(*points, strict=True), **style)


def _legend(axes: Axes) -> None:
    # Above the curves and without a frame, which would be white on a dark page.
    axes.legend(frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(-0.02, 1.0), borderaxespad=0.2, fontsize=9)


def _loss(history: list[dict[str, Any]], within: Mapping[str, Points]) -> Figure:
    figure, axes = _chart(history)
    _within(axes, within.get("train/loss"), color=TRAINING, alpha=0.4, linewidth=1)
    axes.plot(*_column(history, "train_loss"), "o-", color=TRAINING, label="training", markersize=4)
    axes.plot(*_column(history, "val_loss"), "s-", color=VALIDATION, label="validation", markersize=4)
    _legend(axes)
    return figure


def _error(history: list[dict[str, Any]]) -> Figure:
    figure, axes = _chart(history)
    axes.plot(*_column(history, "train_error", 100), "o-", color=TRAINING, label="training, top-1", markersize=4)
    axes.plot(*_column(history, "top1_error", 100), "s-", color=VALIDATION, label="validation, top-1", markersize=4)
    axes.plot(*_column(history, "top5_error", 100), "^-", color=FIVE, label="validation, top-5", markersize=4)
    axes.set_ylim(bottom=0)
    _legend(axes)
    return figure


def _rate(history: list[dict[str, Any]], within: Mapping[str, Points]) -> Figure:
    figure, axes = _chart(history)
    # A row's rate was that of its whole epoch, but under a schedule that changes within; events know those.
    points = within.get("train/lr") or [(row["epoch"], row["lr"]) for row in history]
    # Each is the rate of the steps before it: a slope would show rates that never were.
    points = [(0, points[0][1]), *points]
    _within(axes, points, color=TRAINING, linewidth=2, drawstyle="steps-pre")
    if all(rate > 0 for _, rate in points):
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(NullFormatter())
        # Wide enough to hold a power of ten, whose ticks alone have numbers.
        axes.set_ylim(min(rate for _, rate in points) / 4, 4 * max(rate for _, rate in points))
    if any(row["reason"] for row in history):
        _legend(axes)
    return figure


def _throughput(history: list[dict[str, Any]], within: Mapping[str, Points]) -> Figure:
    figure, axes = _chart(history)
    _within(axes, within.get("train/images_per_s"), color=TRAINING, alpha=0.4, linewidth=1)
    timed = [row for row in history if row.get("train_seconds")]
    means = [row["images"] / row["train_seconds"] for row in timed]
    axes.plot([row["epoch"] for row in timed], means, "o-", color=TRAINING, label="images/s", markersize=4)
    axes.set_ylim(bottom=0)
    if waits := within.get("train/data_wait"):
        other = axes.twinx()
        other.spines["top"].set_visible(False)
        _within(other, [(x, 100 * y) for x, y in waits], color=VALIDATION, linewidth=1)
        other.set_ylim(0, max(10.0, *(110 * y for _, y in waits)))
        other.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
        axes.plot([], [], color=VALIDATION, linewidth=1, label="waiting for data (right)")
    _legend(axes)
    return figure


def svg(figure: Figure, description: str) -> str:
    """A figure as an inline SVG whose text and lines take the page's colour."""
    buffer = io.StringIO()
    style = {"svg.fonttype": "none", "svg.hashsalt": description, "font.family": "sans-serif"}
    with mpl.rc_context(style):
        figure.patch.set_alpha(0)
        for axes in figure.axes:
            axes.patch.set_alpha(0)
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    drawing = text[text.index("<svg") :].replace("#000000", "currentColor")
    label = html.escape(description)
    return f'<figure role="img" aria-label="{label}"><figcaption>{label}</figcaption>{drawing}</figure>'


def filters(weights: NDArray[np.float32]) -> NDArray[np.uint8]:
    """conv1's weights [96, 3, 11, 11] as one picture [rows, columns, 4], RGB and opacity: the paper's figure 3.

    Each filter is scaled by its own largest weight, zero being middle grey; between them the page is seen.
    """
    count, channels, height, width = weights.shape
    scaled = 127.5 + 127.5 * weights / np.abs(weights).max(axis=(1, 2, 3), keepdims=True)
    opaque = np.insert(scaled.transpose(0, 2, 3, 1), channels, 255.0, axis=3)
    tiles = np.pad(opaque, ((0, 0), (0, 1), (0, 1), (0, 0)))
    rows = tiles.reshape(count // FILTER_COLUMNS, FILTER_COLUMNS, height + 1, width + 1, channels + 1)
    picture = rows.transpose(0, 2, 1, 3, 4).reshape(-1, FILTER_COLUMNS * (width + 1), channels + 1)
    # Without the last line and column, the picture ends with its filters.
    return np.rint(picture[:-1, :-1]).astype(np.uint8)


def png(pixels: NDArray[np.uint8], description: str) -> str:
    """A picture whose pixels stay sharp when the page enlarges them, as an HTML figure."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    label = html.escape(description)
    source = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return f'<figure><img class="sharp" src="{source}" alt="{label}"><figcaption>{label}</figcaption></figure>'
