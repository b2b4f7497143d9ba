"""A set written straight into an object store: the bytes that a disk gets, continued, and safe from a second job."""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

import pytest

from pipeline.dataset.info import read_dataset
from pipeline.sharding import shards
from pipeline.sharding.set_folder import claim_folder, is_left_over
from pipeline.sharding.shard_set import ShardSetError, find_finished, finish, tidy
from pipeline.sharding.shards import build_in_steps
from pipeline.storage.locations import join
from pipeline.storage.remote import read
from pipeline.storage.retry import SourceReadError
from tests.faulty_proxy import faulty_proxy
from tests.shard_sets import SET_IN_BUCKET, build_all, build_shard, contents, in_bucket, make, planned, stored_in


def test_a_store_gets_the_bytes_of_a_disk_and_dataset_json_before_the_contact_sheet_alone(
    images: Path, whole: Path, s3: str, client: Any
) -> None:
    plan = planned(images)
    with faulty_proxy(s3) as proxy:
        output = in_bucket(proxy.address)
        assert find_finished(output, plan) is None
        make(output, plan)
        assert stored_in(client) == contents(whole)
        names = [path.partition(f"{SET_IN_BUCKET}/")[2] for path in proxy.writes]
        assert set(names[names.index("dataset.json") :]) == {"dataset.json", "contact_sheet.jpg", ""}
        proxy.writes.clear()
        assert find_finished(output, plan) == read_dataset(output)
        assert not is_left_over(output)
        assert proxy.writes == []


def test_failures_of_the_store_are_outlived_or_leave_nothing_that_vouches(
    images: Path,
    whole: Path,
    s3: str,
    client: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("pipeline.storage.retry.FIRST_WAIT_S", 0.001)
    plan = planned(images)
    with faulty_proxy(s3) as proxy:
        output = in_bucket(proxy.address)
        for name in ("train-000000.tar", "train-000001.idx", "val-000000.json", "dataset.json"):
            proxy.write_plan[name] = collections.deque(["403"])
        make(output, plan)
        assert not any(proxy.write_plan.values())
        assert stored_in(client) == contents(whole)
        failed = [line for line in caplog.messages if " failed (" in line]
        assert len(failed) == 4
        assert "SECRET" not in caplog.text
        monkeypatch.setattr("pipeline.storage.retry.ATTEMPTS", 2)
        client.put_object(Bucket="bucket", Key=f"{SET_IN_BUCKET}/train/train-000002.tar", Body=b"half a tar")
        client.put_object(Bucket="bucket", Key=f"{SET_IN_BUCKET}/train/train-000009.tar", Body=b"of a larger source")
        proxy.write_plan["train-000002.idx"] = collections.deque(["403"] * 2)
        with pytest.raises(SourceReadError, match=r"train-000002\.idx cannot be written in 2 attempts") as found:
            build_shard(output, plan.shards[2], plan.image)
        assert "SECRET" not in str(found.value)
        assert "train/train-000002.json" not in stored_in(client)
        # The same command goes on from there.
        assert find_finished(output, plan) is None
        built = build_all(output, plan)
        assert [one.annotation.name for one in built if not one.kept] == ["train-000002"]
        finish(output, plan, built)
        assert stored_in(client) == contents(whole)


def test_two_jobs_that_make_the_same_set_do_no_harm(
    images: Path, whole: Path, s3: str, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "STEP_EVERY_S", 0.0)
    output, plan = in_bucket(s3), planned(images)
    claim_folder(output, plan)
    # The second is at work on a shard while the first writes all and finishes.
    slow = build_in_steps(output, plan.shards[0], plan.image, claim=plan.claim)
    next(slow)
    make(output, plan)
    list(slow)
    assert stored_in(client) == contents(whole)


def test_two_jobs_that_make_different_sets_meet_and_one_is_refused_by_name(images: Path, s3: str, client: Any) -> None:
    output, plan, other = in_bucket(s3), planned(images), planned(images, quality=80)
    claim_folder(output, plan)
    with pytest.raises(
        ShardSetError, match=rf"s3://bucket/{SET_IN_BUCKET} holds an unfinished set of another quality .*another --o"
    ):
        claim_folder(output, other)
    # Both looked before either had written.
    other.claim.write(output)
    for steps in (
        lambda: list(build_in_steps(output, plan.shards[0], plan.image, claim=plan.claim)),
        lambda: finish(output, plan, [build_shard(output, s, plan.image) for s in plan.shards]),
    ):
        with pytest.raises(
            ShardSetError, match=rf"^another job has begun a set of another quality .* in s3://bucket/{SET_IN_BUCKET}:"
        ):
            steps()
        assert "dataset.json" not in stored_in(client)
    assert not build_shard(output, other.shards[0], other.image).kept


def test_anything_else_in_the_place_is_left_alone(images: Path, s3: str, client: Any) -> None:
    client.put_object(Bucket="bucket", Key=f"{SET_IN_BUCKET}/notes.txt", Body=b"somebody's")
    with pytest.raises(
        ShardSetError, match=rf"s3://bucket/{SET_IN_BUCKET} holds 'notes.txt' and no shard set of this program"
    ):
        claim_folder(in_bucket(s3), planned(images))
    assert stored_in(client) == {"notes.txt": b"somebody's"}


def test_google_store(images: Path, whole: Path, gcs: str) -> None:
    output, plan = f"gs://anonymous@bucket/{SET_IN_BUCKET}?scheme=http&endpoint_override={gcs}", planned(images)
    make(output, plan)
    on_disk = contents(whole)
    assert {name: read(join(output, name)) for name in on_disk} == on_disk
    assert find_finished(output, plan) == read_dataset(output)
    tidy(output, read_dataset(output), print)
