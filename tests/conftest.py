"""A small shard set that many tests read and none changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.resize import encoder_settings
from pipeline.shard_set import SetPlan, claim_folder, finish
from pipeline.shards import build_shard, plan_shards
from pipeline.sources import read_source
from tests.photographs import write_source


@pytest.fixture(scope="session")
def shard_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes, 45 training and 15 validation images, ten to a shard."""
    root = tmp_path_factory.mktemp("shard_set")
    source = write_source(root / "images", images=20)
    listing = read_source(source, None, val_fraction=0.25, seed=0)
    image = encoder_settings(90)
    plan = SetPlan(listing, image, 0, 10, tuple(plan_shards(listing, 0, 10)))
    output = root / "shards"
    claim_folder(output, plan)
    annotations = [build_shard(output, shard, image, set_aside=True).annotation for shard in plan.shards]
    finish(output, plan, annotations, max_bad_fraction=0.0)
    return output
