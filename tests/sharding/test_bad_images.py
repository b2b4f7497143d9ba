"""Bad images are set aside with a reason and counted; too many fail the set, and no old state of one gets in."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from jobs.shard_imagenet import ShardConfig, main
from pipeline.dataset.annotation import ShardError
from pipeline.dataset.info import read_dataset
from pipeline.sharding.shard_set import ShardSetError, find_finished
from pipeline.sharding.shards import BadImageError, build_shard
from pipeline.storage.retry import SourceReadError
from tests.shard_sets import PER_SHARD, build_all, contents, make, planned


def test_bad_images_are_set_aside_with_a_reason(source: Path, tmp_path: Path) -> None:
    (source / "n0" / "n0_1.JPEG").write_bytes(b"")
    (source / "n1" / "n1_1.JPEG").unlink()
    (source / "n1" / "n1_1.JPEG").symlink_to(tmp_path / "nowhere")
    plan = planned(source)
    output = make(tmp_path / "out", plan, max_bad_fraction=0.2)
    info = read_dataset(output)
    assert info.set_aside == 2
    assert sum(split.samples for split in info.splits.values()) == 16
    lines = [json.loads(line) for line in (output / "rejects.jsonl").read_text().splitlines()]
    assert sorted((line["path"], line["class"], line["reason"]) for line in lines) == [
        (str(source / "n0" / "n0_1.JPEG"), "n0", "the file is empty"),
        (str(source / "n1" / "n1_1.JPEG"), "n1", "it cannot be read: No such file or directory"),
    ]
    assert find_finished(output, plan) == info


@pytest.mark.parametrize(
    ("settings", "allowed"),
    [
        ({"on_bad_image": "fail", "max_bad_fraction": 1.0}, "--on-bad-image fail"),
        ({"max_bad_fraction": 0.05}, "--max-bad-fraction 0.05"),
        ({"max_bad_fraction": 0.06}, None),
    ],
)
def test_a_finished_set_is_refused_where_fewer_may_be_bad_now(
    source: Path, tmp_path: Path, settings: dict[str, Any], allowed: str | None
) -> None:
    (source / "n0" / "n0_1.JPEG").write_bytes(b"")
    output = make(tmp_path / "out", planned(source), max_bad_fraction=0.06)
    config = ShardConfig(str(output), str(source), samples_per_shard=PER_SHARD, **settings)
    said = f"1 of 18 images set aside, more than {allowed} allows; {output}/rejects.jsonl lists them"
    with nullcontext() if allowed is None else pytest.raises(ShardSetError, match=said):
        main(config)


def test_a_folder_that_is_gone_is_no_fault_of_its_images(source: Path, tmp_path: Path) -> None:
    plan = planned(source)
    (source / "n1").rename(tmp_path / "away")
    with pytest.raises(SourceReadError, match=r"n1_\d.JPEG failed on .*, which has no such folder: No .*again"):
        make(tmp_path / "out", plan, max_bad_fraction=1.0)
    (tmp_path / "away").rename(source / "n1")
    assert read_dataset(make(tmp_path / "out", plan, max_bad_fraction=0.0)).set_aside == 0


def test_too_many_bad_images_fail_and_leave_no_set(source: Path, tmp_path: Path) -> None:
    (source / "n0" / "n0_1.JPEG").write_bytes(b"")
    plan = planned(source)
    with pytest.raises(
        ShardSetError, match=r"1 of 18 images are bad.*n0_1.JPEG: the file is empty.*rejects\."
    ) as caught:
        make(tmp_path / "out", plan, max_bad_fraction=0.001)
    assert "--max-bad-fraction 0.06" in str(caught.value)
    assert not (tmp_path / "out" / "dataset.json").exists()
    # The advice works, and what was built is kept.
    assert build_shard(tmp_path / "out", plan.shards[0], plan.image, set_aside=True).kept
    assert read_dataset(make(tmp_path / "out", plan, max_bad_fraction=0.06)).set_aside == 1


def test_a_mended_image_of_the_same_size_gets_in(source: Path, whole: Path, tmp_path: Path) -> None:
    path = source / "n0" / "n0_1.JPEG"
    good = path.read_bytes()
    path.write_bytes(bytes(len(good)))
    build_all(tmp_path / "out", planned(source))
    path.write_bytes(good)
    assert contents(make(tmp_path / "out", planned(source))) == contents(whole)


def test_the_first_bad_image_ends_it_where_none_may_be_bad(source: Path, tmp_path: Path) -> None:
    for path in source.rglob("*.JPEG"):
        path.write_bytes(b"no image")
    plan = planned(source)
    with pytest.raises(BadImageError, match=r"n\d_\d.JPEG: it is no image in a known format; replace or remove"):
        build_shard(tmp_path / "out", plan.shards[0], plan.image, set_aside=False)
    assert not (tmp_path / "out").exists()
    # A shard that was kept from a more lenient run is no way around it.
    build_shard(tmp_path / "out", plan.shards[0], plan.image, set_aside=True)
    with pytest.raises(BadImageError):
        build_shard(tmp_path / "out", plan.shards[0], plan.image, set_aside=False)


def test_a_split_without_a_good_image_fails(source: Path, tmp_path: Path) -> None:
    for entry in planned(source).listing.splits["val"]:
        Path(entry.path).write_bytes(b"")
    with pytest.raises(ShardSetError, match="every val image was set aside, the first reason: the file is empty"):
        make(tmp_path / "out", planned(source), max_bad_fraction=1.0)


def test_an_image_that_changes_while_the_job_runs_is_noticed(source: Path, tmp_path: Path) -> None:
    plan = planned(source)
    Path(plan.shards[0].entries[0].path).write_bytes(b"something else")
    with pytest.raises(ShardError, match=r"has 14 bytes and had \d+ when it was listed: run the same command again"):
        build_shard(tmp_path, plan.shards[0], plan.image, set_aside=True)
