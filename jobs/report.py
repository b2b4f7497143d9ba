"""One HTML page about a run: its curves, its settings and its first layer's filters; no other file is needed."""

from __future__ import annotations

import dataclasses
import html
import io
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from jobs import checkpoint
from jobs.checkpoint import CheckpointError, State
from jobs.cli import run
from jobs.evaluate import local_checkpoint
from jobs.worker import make_network
from pipeline.dataset import write_atomically
from pipeline.storage import join

FILTER_COLUMNS = 16  # 96 filters in six rows; the paper's figure 3 has 12 to a row.

STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fff; --line: #d0d0d0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e8; --paper: #161616; --line: #444; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
       max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
figure { margin: 1.5rem 0; } svg { width: 100%; height: auto; } svg text { fill: currentColor; }
table { border-collapse: collapse; width: 100%; } .scroll { overflow-x: auto; }
th, td { text-align: left; padding: .25rem .75rem .25rem 0; border-bottom: 1px solid var(--line);
         font-variant-numeric: tabular-nums; white-space: nowrap; }
td.text { white-space: normal; overflow-wrap: anywhere; }
"""


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    storage: str
    """Where runs are kept, as given to jobs/train.py."""
    name: str
    """The run."""
    output: Path
    """The page to write."""


def filters(weights: NDArray[np.float32]) -> NDArray[np.float64]:
    """conv1's weights [96, 3, 11, 11] as one picture [rows, columns, 3] in [0, 1]: the paper's figure 3.

    Each filter is scaled by its own largest weight, zero being middle grey.
    """
    count, channels, height, width = weights.shape
    scaled = 0.5 + 0.5 * weights / np.abs(weights).max(axis=(1, 2, 3), keepdims=True)
    tiles = np.pad(scaled.transpose(0, 2, 3, 1), ((0, 0), (0, 1), (0, 1), (0, 0)), constant_values=0.5)
    rows = tiles.reshape(count // FILTER_COLUMNS, FILTER_COLUMNS, height + 1, width + 1, channels)
    return rows.transpose(0, 2, 1, 3, 4).reshape(-1, FILTER_COLUMNS * (width + 1), channels).astype(np.float64)


def curves(history: list[dict[str, Any]]) -> Figure:
    """Loss, errors and rate by epoch, with the schedule's decisions marked."""
    epochs = [row["epoch"] for row in history]
    figure = Figure(figsize=(9, 7.5), layout="constrained")
    losses, errors, rates = figure.subplots(3, 1, sharex=True, height_ratios=[3, 3, 1.2])
    losses.plot(epochs, [row["train_loss"] for row in history], "o-", label="training")
    losses.plot(epochs, [row["val_loss"] for row in history], "s-", label="validation")
    losses.set_ylabel("loss (nats)")
    for key, label, form in (
        ("train_error", "training, top-1", "o-"),
        ("top1_error", "validation, top-1", "s-"),
        ("top5_error", "validation, top-5", "^-"),
    ):
        errors.plot(epochs, [100 * row[key] for row in history], form, label=label)
    errors.set_ylabel("error (%)")
    errors.set_ylim(bottom=0)
    rates.step(epochs, [row["lr"] for row in history], where="mid")
    rates.set_yscale("log")
    rates.set_ylabel("learning rate")
    rates.set_xlabel("epoch")
    rates.xaxis.get_major_locator().set_params(integer=True)
    for axes in (losses, errors, rates):
        axes.grid(alpha=0.3)
        for row in history:
            if row["reason"]:
                axes.axvline(row["epoch"], linestyle=":", color="gray")
    # Without a frame, which would be white on a dark page.
    losses.legend(frameon=False, labelcolor="gray")
    errors.legend(frameon=False, labelcolor="gray")
    return figure


def picture(image: NDArray[np.float64]) -> Figure:
    """An image as a figure, its pixels kept sharp."""
    height, width = image.shape[:2]
    figure = Figure(figsize=(9, 9 * height / width), layout="constrained")
    axes = figure.subplots()
    axes.imshow(image, interpolation="nearest")
    axes.axis("off")
    return figure


def svg(figure: Figure, description: str) -> str:
    """A figure as an inline SVG whose text and lines take the page's colour."""
    buffer = io.StringIO()
    style = {"svg.fonttype": "none", "svg.hashsalt": "report", "font.family": "sans-serif"}
    with mpl.rc_context(style):
        figure.patch.set_alpha(0)
        for axes in figure.axes:
            axes.patch.set_alpha(0)
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    drawing = text[text.index("<svg") :].replace("#000000", "currentColor")
    label = html.escape(description)
    return f'<figure role="img" aria-label="{label}">{drawing}<figcaption>{label}</figcaption></figure>'


def table(rows: list[tuple[str, str]]) -> str:
    cells = "".join(f'<tr><th>{html.escape(k)}</th><td class="text">{html.escape(v)}</td></tr>' for k, v in rows)
    return f"<table>{cells}</table>"


def epochs_table(history: list[dict[str, Any]]) -> str:
    heads = ("epoch", "train loss", "train error", "val loss", "top-1", "top-5", "rate", "seconds", "decision")
    lines = []
    for row in history:
        cells = (
            str(row["epoch"]),
            f"{row['train_loss']:.3f}",
            f"{row['train_error']:.1%}",
            f"{row['val_loss']:.3f}",
            f"{row['top1_error']:.1%}",
            f"{row['top5_error']:.1%}",
            f"{row['lr']:g}",
            f"{row['seconds']:.0f}",
            row["reason"],
        )
        lines.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{name}</th>" for name in heads)
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(lines)}</table></div>'


def page(name: str, state: State, weights: NDArray[np.float32]) -> str:
    """The whole page, for a run's newest state and its best checkpoint's first-layer weights."""
    history = state.progress.history
    best = min(history, key=lambda row: float(row["top1_error"]))
    classes = len(state.identity.wnids)
    settings = [(key, str(value)) for key, value in dataclasses.asdict(state.identity.recipe).items()]
    facts = [("classes", str(classes)), ("shard set", state.identity.dataset)]
    caption = "The 96 filters of the first layer, each scaled by its largest weight (the paper's figure 3)"
    return "\n".join(
        [
            '<!doctype html><html lang="en"><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{html.escape(name)}</title><style>{STYLE}</style>",
            f"<h1>Run {html.escape(name)}</h1>",
            f"<p>{len(history)} epochs; lowest validation error {best['top1_error']:.1%} top-1, "
            f"{best['top5_error']:.1%} top-5 after epoch {best['epoch']}. Guessing among {classes} classes: "
            f"{1 - 1 / classes:.1%}.</p>",
            svg(curves(history), "Loss, error and learning rate by epoch; dotted lines mark the schedule's decisions"),
            svg(picture(filters(weights)), caption),
            "<h2>Epochs</h2>",
            epochs_table(history),
            "<h2>Settings</h2>",
            table(settings + facts),
            "</html>",
        ]
    )


def main(config: ReportConfig) -> None:
    location = join(config.storage, config.name)
    states = checkpoint.committed(location)
    if checkpoint.best(states) is None:
        raise CheckpointError(
            f"the run {location} has no finished epoch: train first, or give its --storage and --name"
        )
    with local_checkpoint(location) as (_, folder):
        network = make_network(checkpoint.read_state(folder).identity)
        checkpoint.load_network(folder, network)
    weights = network.conv1.weight.detach().numpy()
    write_atomically(config.output, page(config.name, list(states.values())[-1], weights).encode())
    print(f"report: {config.output}")


if __name__ == "__main__":
    run(ReportConfig, main)
