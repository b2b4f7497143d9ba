"""A run under the plateau schedule to its own end, undisturbed and interrupted in the middle of a patience count."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from safetensors.torch import load_file

from jobs import checkpoint
from model.schedule import PAPER_REDUCTIONS
from pipeline.resize import encoder_settings
from pipeline.shard_set import SetPlan, claim_folder, finish
from pipeline.shards import build_shard, plan_shards
from pipeline.sources import read_source
from tests.photographs import write_source
from tests.test_train_job import call

PATIENCE = 2
SETTINGS = ["--workers", "1", "--batch-size", "4", "--lr", "0.0001", "--patience", PATIENCE, "--no-gpus"]
MOST = 60  # Epochs; the schedule is to stop long before.


@pytest.fixture(scope="module")
def tiny_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes, eight training and eight validation images."""
    root = tmp_path_factory.mktemp("tiny")
    listing = read_source(write_source(root / "images", images=8, classes=2), None, val_fraction=0.5, seed=0)
    image = encoder_settings(90)
    plan = SetPlan(listing, image, 0, 8, tuple(plan_shards(listing, 0, 8)))
    claim_folder(root / "shards", plan)
    annotations = [build_shard(root / "shards", shard, image, set_aside=True).annotation for shard in plan.shards]
    finish(root / "shards", plan, annotations, max_bad_fraction=0.0)
    return root / "shards"


def train(data: Path, storage: Path, epochs: int) -> checkpoint.State:
    """Runs or continues the run called "it" up to so many epochs; its newest state."""
    done = call("train", "--data", data, "--storage", storage, "--name", "it", "--epochs", epochs, *SETTINGS)
    assert done.returncode == 0, done.stdout + done.stderr
    return list(checkpoint.committed(str(storage / "it")).values())[-1]


def learnt(row: Mapping[str, object]) -> dict[str, object]:
    """A row of the history without what the clock says."""
    return {name: value for name, value in row.items() if "seconds" not in name}


@pytest.mark.slow
def test_a_plateau_run_ends_itself_the_same_when_it_was_interrupted(tiny_set: Path, tmp_path: Path) -> None:
    whole = train(tiny_set, tmp_path / "whole", MOST).progress
    decisions = [row["epoch"] for row in whole.history if row["reason"]]
    assert whole.schedule.stopped
    assert len(decisions) == PAPER_REDUCTIONS + 1
    assert len(whole.history) == decisions[-1] < MOST
    rates = [whole.history[epoch - 1]["lr"] for epoch in decisions]
    assert rates == pytest.approx([1e-4, 1e-5, 1e-6, 1e-7], rel=1e-9)

    # One epoch before the second decision, the count stands at one of two.
    half = train(tiny_set, tmp_path / "parts", decisions[1] - 1).progress
    assert (half.schedule.bad_epochs, half.schedule.reductions) == (PATIENCE - 1, 1)
    parts = train(tiny_set, tmp_path / "parts", MOST).progress
    assert [learnt(row) for row in parts.history] == [learnt(row) for row in whole.history]
    assert parts.schedule == whole.schedule
    last = f"checkpoint_{decisions[-1]:04d}_000000"
    for name in ("model.safetensors", "optimizer.safetensors"):
        one, other = (load_file(tmp_path / storage / "it" / last / name) for storage in ("whole", "parts"))
        assert one.keys() == other.keys()
        assert all(one[key].equal(other[key]) for key in one)

    page = tmp_path / "report.html"
    done = call("report", "--storage", tmp_path / "parts", "--name", "it", "--output", page, "--data", tiny_set)
    assert done.returncode == 0, done.stderr
    text = page.read_text()
    for epoch in decisions:
        assert text.count(f"<li>epoch {epoch}: error ") == 1
    assert text.count("stopping, the rate was reduced 3 times</li>") == 1
    # Four charts, the filters; eight cards, and five rows of an image with its six nearest.
    assert (text.count("<svg"), text.count("data:image/png"), text.count('class="thumbnail"')) == (4, 1, 8 + 5 * 7)
    assert "1 worker(s) on " in text
    assert "http-equiv" not in text
    assert 'src="http' not in text
