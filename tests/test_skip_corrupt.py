"""`--skip-corrupt`: what is taken for a corrupt image, how it is seen, and what is said about it.

What should come is worked out from the undamaged set's tars, decoded with Pillow, in float64. The data come through the
class that training uses.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from jobs.skipped import SkipList, read_skips, summary
from jobs.worker import WorkerData
from model.recipe import Recipe
from model.training import Worker
from pipeline.dataset import DatasetError, ImageError, read_dataset
from pipeline.plan import Plan, colour_matrix
from pipeline.substitutes import MOST_IN_A_ROW, Skip
from tests.damage import flip_in_the_header, flip_in_the_middle, own_copy, places
from tests.test_stream import mean_level, stored

CPU = torch.device("cpu")
SEED, BATCH, STEPS = 5, 15, 3  # Three steps have all 45 images, so that the last one's substitute is the first.
DAMAGED = (0, 13, 14, 29, 44)  # Places in the first epoch's order: alone, two in a row, and around the end.
Row = tuple[int, int]  # Sample and label


def plan_of(shard_set: Path) -> Plan:
    return Plan(45, BATCH, SEED, colour_matrix(read_dataset(shard_set).rgb))


def damage(root: Path, samples: NDArray[np.int64]) -> None:
    for number, sample in enumerate(samples):
        (flip_in_the_middle if number % 2 else flip_in_the_header)(places(root, "train")[sample])


@pytest.fixture(scope="module")
def bad(shard_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = own_copy(shard_set, tmp_path_factory.mktemp("bad") / "shards")
    damage(root, plan_of(shard_set).order(0)[list(DAMAGED)])
    return root


def worker_data(root: Path, run: Path | None, rank: int, world: int) -> WorkerData:
    skips = None if run is None else SkipList(str(run), rank)
    return WorkerData(root, Recipe(batch_size=BATCH, seed=SEED), Worker(rank, world, CPU), 4, 1, skips)


def stream(
    root: Path, run: Path, world: int, epoch: int, first: int = 0, stop: int = STEPS
) -> tuple[list[Row], torch.Tensor]:
    """All rows of some steps in the global batches' order, and their pixels [rows, 3, 227, 227]."""
    rows: list[list[Row]] = [[] for _ in range(first, stop)]
    pixels: list[list[torch.Tensor]] = [[] for _ in range(first, stop)]
    for rank in range(world):
        steps = worker_data(root, run, rank, world).training(epoch, first)
        for step, batches in zip(range(stop - first), steps, strict=False):
            for batch in batches:
                rows[step] += zip(batch.samples.tolist(), batch.labels.tolist(), strict=True)
                pixels[step].append(batch.images)
    return [row for step in rows for row in step], torch.cat([images for step in pixels for images in step])


def expected_skips(shard_set: Path, epoch: int) -> dict[int, int]:
    """What should be taken for each corrupt sample."""
    plan, train = plan_of(shard_set), places(shard_set, "train")
    corrupt = {int(sample) for sample in plan.order(0)[list(DAMAGED)]}
    order = plan.order(epoch).tolist()
    twice = order + order
    assert len(train) == len(order)
    return {s: next(t for t in twice[order.index(s) + 1 :] if t not in corrupt) for s in corrupt}


@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_next_readable_image_is_seen_as_the_corrupt_one_would_have_been(
    shard_set: Path, bad: Path, tmp_path: Path, world: int, epoch: int
) -> None:
    rows, pixels = stream(bad, tmp_path, world, epoch)
    taken, (images, labels) = expected_skips(shard_set, epoch), stored(shard_set, "train")
    at = 0
    for views in plan_of(shard_set).epoch(epoch):
        for sample, (top, left), flip, shift in zip(views.samples, views.crops, views.flips, views.shifts, strict=True):
            shown = taken.get(int(sample), int(sample))
            assert rows[at] == (shown, labels[shown])
            window = images[shown][top : top + 227, left : left + 227]
            window = window[:, ::-1] if flip else window
            expected = window - mean_level(shard_set) + shift.astype(np.float64)
            assert np.abs(pixels[at].numpy() - expected.transpose(2, 0, 1)).max() <= 1
            at += 1
    assert at == len(rows) == 45


@pytest.mark.parametrize("stopped", [1, 2])
def test_a_run_resumed_by_others_takes_the_same(shard_set: Path, bad: Path, tmp_path: Path, stopped: int) -> None:
    rows, pixels = stream(bad, tmp_path / "whole", 1, 0)
    before = stream(bad, tmp_path / "resumed", 2, 0, 0, stopped)
    after = stream(bad, tmp_path / "resumed", 3, 0, stopped)
    assert before[0] + after[0] == rows
    assert torch.equal(torch.cat([before[1], after[1]]), pixels)
    assert read_skips(str(tmp_path / "resumed")) == read_skips(str(tmp_path / "whole"))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_each_skip_is_said_listed_and_counted_once(
    shard_set: Path, bad: Path, tmp_path: Path, world: int, capsys: pytest.CaptureFixture[str]
) -> None:
    for epoch in (0, 1, 1):  # The second epoch twice, as after a kill.
        stream(bad, tmp_path, world, epoch)
    train = places(shard_set, "train")
    expected = sorted(
        (epoch + 1, train[sample].shard, train[sample].key, train[substitute].key)
        for epoch in (0, 1)
        for sample, substitute in expected_skips(shard_set, epoch).items()
    )
    skips = read_skips(str(tmp_path))
    assert [(s.epoch, s.shard, s.key, s.substitute) for s in skips] == expected
    assert all("CRC-32" in skip.reason for skip in skips)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("skipping a corrupt image, ")]
    assert len(said) == 3 * len(DAMAGED)
    assert {line.removeprefix("skipping a corrupt image, ") for line in said} == {str(skip) for skip in skips}
    line = summary(str(tmp_path), str(bad))
    assert line.startswith(f"skipped 5 corrupt image(s), 10 time(s) in all, listed in {tmp_path}/skipped; find the ")
    assert line.endswith(f"python jobs/verify_shards.py --data {bad}")
    assert all(skip.shard in line for skip in skips)


def test_a_whole_set_leaves_no_list(shard_set: Path, tmp_path: Path) -> None:
    stream(shard_set, tmp_path, 2, 0)
    assert list(tmp_path.iterdir()) == []
    assert summary(str(tmp_path), str(shard_set)) == ""


def test_without_the_flag_the_first_corrupt_image_stops(bad: Path) -> None:
    with pytest.raises(ImageError, match="it is not what was written"):
        list(worker_data(bad, None, 0, 1).training(0, 0))


@pytest.mark.parametrize("many", [MOST_IN_A_ROW - 1, MOST_IN_A_ROW])
def test_ten_in_a_row_are_no_single_images_damage(shard_set: Path, tmp_path: Path, many: int) -> None:
    root, order = own_copy(shard_set, tmp_path / "shards"), plan_of(shard_set).order(0)
    damage(root, order[20 : 20 + many])
    if many < MOST_IN_A_ROW:
        rows, _ = stream(root, tmp_path / "run", 1, 0)
        assert {sample for sample, _ in rows[20 : 21 + many]} == {int(order[20 + many])}
        return
    with pytest.raises(
        DatasetError, match=rf"{places(root, 'train')[order[20]].key} of .*: --skip-corrupt does not go on"
    ):
        stream(root, tmp_path / "run", 1, 0)


def test_validation_never_skips(shard_set: Path, tmp_path: Path) -> None:
    root = own_copy(shard_set, tmp_path / "shards")
    place = places(root, "val")[7]
    flip_in_the_middle(place)
    data = worker_data(root, tmp_path / "run", 0, 1)
    list(data.training(0, 0))
    with pytest.raises(ImageError, match=rf"val image {place.key} of {place.shard}: it is not what was written"):
        list(data.validation())
    assert not (tmp_path / "run").exists()


def test_a_set_that_cannot_be_checked_cannot_be_skipped_in(shard_set: Path, tmp_path: Path) -> None:
    root = own_copy(shard_set, tmp_path / "shards")
    for path in (root / "train").glob("*.json"):
        path.unlink()
    with pytest.raises(DatasetError, match=r"5 train shard.* which --skip-corrupt needs: make the set again, or leave"):
        worker_data(root, tmp_path / "run", 0, 1)


def test_a_list_that_cannot_be_understood_is_refused(tmp_path: Path) -> None:
    SkipList(str(tmp_path), 0).add(Skip(1, "train-000000", "n0_1", "is bad", "n0_2"))
    (tmp_path / "skipped" / "rank-0001.jsonl").write_text("{}\n")
    with pytest.raises(DatasetError, match=r"rank-0001\.jsonl is no list of skipped images .*: remove it"):
        read_skips(str(tmp_path))
