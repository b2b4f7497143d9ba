"""The pictures of README.md and docs/: what they compare, and what is said where there is nothing to draw."""

from __future__ import annotations

import json
from pathlib import Path

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
    # The kill took the event of step 2.
    {"run": "killed", "step": [1, 3, 4], "train_loss": [2.5, 2.0, 1.75], "killed_after": [2, 3], "weights_sha256": "a"},
]


def test_runs_are_compared_step_by_step_with_the_first() -> None:
    [axes] = figures.exactness_overlay(ROWS).axes
    legend = axes.get_legend()
    assert legend is not None
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == ["one", "two: losses at most 0.1 apart", "killed: equal losses and weights"]
    assert [text.xy[0] for text in axes.texts] == [2, 3]  # type: ignore[attr-defined]


def test_seeds_of_a_run_are_one_line() -> None:
    rows = [
        {"run": "ours", "epoch": [1, 2], "train_loss": [2.0, loss], "val_top1_error": [0.5, 0.25]} for loss in (1, 2)
    ]
    loss, error = figures.learning_curves(rows).axes
    assert [list(line.get_ydata()) for axes in (loss, error) for line in axes.lines] == [[2.0, 1.5], [0.5, 0.25]]


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
