"""The pictures of README.md and docs/: what they compare, and what is said where there is nothing to draw."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.benchmarks import figures

LOSSES = [2.5, 2.25, 2.0, 1.75]
ROWS = [
    {"run": "one", "step": [1, 2, 3, 4], "train_loss": LOSSES, "killed_after": [], "weights_sha256": "a"},
    {
        "run": "two",
        "step": [1, 2, 3, 4],
        "train_loss": [2.5, 2.25, 2.125, 1.75],
        "killed_after": [],
        "weights_sha256": "b",
    },
    {"run": "killed", "step": [1, 2, 3, 4], "train_loss": LOSSES, "killed_after": [2, 3], "weights_sha256": "a"},
]


def test_runs_are_compared_step_by_step_with_the_first() -> None:
    [axes] = figures.exactness_overlay(ROWS).axes
    legend = axes.get_legend()
    assert legend is not None
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == ["one", "two: losses at most 0.1 apart", "killed: equal losses and weights"]
    assert [text.xy[0] for text in axes.texts] == [2, 3]  # type: ignore[attr-defined]


def test_seeds_of_a_run_share_a_color_and_may_end_apart() -> None:
    runs = {"ours, seed 0": [2.0, 1.0], "plain": [2.0], "ours, seed 1": [2.0, 1.5, 1.0]}
    rows = [
        {"run": run, "epoch": list(range(1, len(losses) + 1)), "train_loss": losses, "val_top1_error": losses}
        for run, losses in runs.items()
    ]
    loss, _ = figures.learning_curves(rows).axes
    assert [np.asarray(line.get_ydata()).tolist() for line in loss.lines] == list(runs.values())
    first, plain, second = (line.get_color() for line in loss.lines)
    assert first == second != plain


def test_a_picture_without_its_json_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(figures, "batch", lambda folder: b"")
    (tmp_path / "exactness.json").write_text(json.dumps(ROWS))
    figures.main(figures.FiguresConfig(tmp_path / "img", tmp_path))
    named = [line.split()[2].strip(",") for line in capsys.readouterr().out.splitlines() if "not drawn" in line]
    assert {*named, "exactness"} == set(figures.CHARTS)
    drawn = {path.name for path in (tmp_path / "img").iterdir()}
    assert drawn == {"batch-light.jpg", "batch-dark.jpg", "exactness-light.svg", "exactness-dark.svg"}
