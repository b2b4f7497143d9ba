"""Too many bad images fail the set. A mended or changed image is noticed. `test_odd_images` tests which are bad."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest

from jobs.shard_imagenet import ShardConfig, main
from pipeline.dataset.annotation import ShardError
from pipeline.dataset.info import read_dataset
from pipeline.sharding.shard_set import ShardSetError, check_rejected
from pipeline.storage.retry import SourceReadError
from tests.shard_sets import PER_SHARD, build_all, build_shard, contents, make, planned


@pytest.mark.parametrize(("allowed", "enough"), [(0, False), (0.05, False), (0.06, True)])
def test_a_finished_set_is_refused_where_fewer_may_be_bad_now(
    source: Path, tmp_path: Path, allowed: float, enough: bool
) -> None:
    (source / "n0" / "n0_1.JPEG").write_bytes(b"")
    output = make(tmp_path / "out", planned(source))
    config = ShardConfig(str(output), str(source), samples_per_shard=PER_SHARD, max_bad_fraction=allowed)
    said = f"1 of 18 images set aside, more than --max-bad-fraction {allowed} allows; {output}/rejects.jsonl lists them"
    with nullcontext() if enough else pytest.raises(ShardSetError, match=said):
        main(config)


def test_a_folder_that_is_gone_is_no_fault_of_its_images(source: Path, tmp_path: Path) -> None:
    plan = planned(source)
    (source / "n1").rename(tmp_path / "away")
    with pytest.raises(SourceReadError, match=r"n1_\d.JPEG failed on .*, which has no such folder: No .*again"):
        make(tmp_path / "out", plan)
    (tmp_path / "away").rename(source / "n1")
    assert read_dataset(make(tmp_path / "out", plan)).set_aside == 0


def test_too_many_bad_images_are_an_error_that_lists_them(source: Path, tmp_path: Path) -> None:
    (source / "n0" / "n0_1.JPEG").write_bytes(b"")
    plan = planned(source)
    built = build_all(tmp_path / "out", plan)
    with pytest.raises(ShardSetError, match=r"1 of 18 images are bad.*n0_1.JPEG: the file is empty.*rejects\."):
        check_rejected(tmp_path / "out", plan, built, 0.05)
    assert "n0_1.JPEG" in (tmp_path / "out" / "rejects.jsonl").read_text()
    check_rejected(tmp_path / "out", plan, built, 0.06)


def test_a_repair_that_is_refused_leaves_a_finished_sets_list(source: Path, tmp_path: Path) -> None:
    for entry in (planned(source).shards[0].entries[0], planned(source).shards[1].entries[0]):
        Path(entry.path).write_bytes(b"")
    plan = planned(source)
    output = make(tmp_path / "out", plan)
    first = build_shard(output, plan.shards[0], plan.image)
    with pytest.raises(ShardSetError, match="1 of 18 images are bad"):
        check_rejected(output, plan, [first], 0)
    assert len((output / "rejects.jsonl").read_text().splitlines()) == read_dataset(output).set_aside == 2


def test_a_mended_image_of_the_same_size_gets_in(source: Path, whole: Path, tmp_path: Path) -> None:
    path = source / "n0" / "n0_1.JPEG"
    good = path.read_bytes()
    path.write_bytes(bytes(len(good)))
    build_all(tmp_path / "out", planned(source))
    path.write_bytes(good)
    assert contents(make(tmp_path / "out", planned(source))) == contents(whole)


def test_a_split_without_a_good_image_fails(source: Path, tmp_path: Path) -> None:
    for entry in planned(source).listing.splits["val"]:
        Path(entry.path).write_bytes(b"")
    with pytest.raises(ShardSetError, match="every val image was set aside, the first reason: the file is empty"):
        make(tmp_path / "out", planned(source))


def test_an_image_that_changes_while_the_job_runs_is_noticed(source: Path, tmp_path: Path) -> None:
    plan = planned(source)
    Path(plan.shards[0].entries[0].path).write_bytes(b"something else")
    with pytest.raises(ShardError, match=r"has 14 bytes and had \d+ when it was listed: run the same command again"):
        build_shard(tmp_path, plan.shards[0], plan.image)
