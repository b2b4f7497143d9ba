"""A set written straight into an object store: the bytes that a disk gets, continued, and safe from a second job."""

from __future__ import annotations

import collections
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from pyarrow import fs

from jobs.shard_imagenet import ShardConfig
from jobs.shard_imagenet import main as shard
from jobs.verify_shards import VerifyConfig, VerifyError
from jobs.verify_shards import main as verify
from pipeline.dataset.info import read_dataset
from pipeline.sharding.set_folder import claim_folder, is_left_over
from pipeline.sharding.shard_set import ShardSetError, find_finished, finish, tidy
from pipeline.sharding.shards import build_in_steps, build_shard
from pipeline.staging.staging import stage
from pipeline.storage.retry import SourceReadError
from tests.faulty_proxy import faulty_proxy
from tests.photographs import write_source
from tests.raylets import raylets
from tests.shard_sets import build_all, contents, make, planned

SET = "sets/photographs"


def location(server: str) -> str:
    return f"s3://KEY:SECRET@bucket/{SET}?region=us-east-1&scheme=http&endpoint_override={server}"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """15 training and 3 validation images: four shards and one."""
    return write_source(tmp_path_factory.mktemp("source") / "images", images=6, longest=300)


@pytest.fixture(scope="module")
def on_disk(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return contents(make(tmp_path_factory.mktemp("disk") / "out", planned(images)))


@pytest.fixture
def client(s3: str) -> Any:
    client = boto3.client("s3", endpoint_url=f"http://{s3}")
    client.create_bucket(Bucket="bucket")
    return client


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.storage.retry.FIRST_WAIT_S", 0.001)


def stored(client: Any) -> dict[str, bytes]:
    """What lies in the bucket, by Amazon's own client; what stands for a folder is left out."""
    keys = [item["Key"] for item in client.list_objects_v2(Bucket="bucket").get("Contents", [])]
    assert all(key.startswith(f"{SET}/") for key in keys)
    return {
        key.removeprefix(f"{SET}/"): client.get_object(Bucket="bucket", Key=key)["Body"].read()
        for key in keys
        if not key.endswith("/")
    }


def test_a_store_gets_the_bytes_of_a_disk_and_dataset_json_before_the_pictures_alone(
    images: Path, on_disk: dict[str, bytes], s3: str, client: Any, tmp_path: Path
) -> None:
    plan = planned(images)
    with faulty_proxy(s3) as proxy:
        output = location(proxy.address)
        assert find_finished(output, plan) is None
        make(output, plan)
        assert stored(client) == on_disk
        names = [path.partition(f"{SET}/")[2] for path in proxy.writes]
        assert set(names[names.index("dataset.json") :]) == {"dataset.json", "contact_sheet.jpg", "rgb_pca.png", ""}
        proxy.writes.clear()
        assert find_finished(output, plan) == read_dataset(output)
        assert not is_left_over(output)
        assert proxy.writes == []
    staged = stage(location(s3), tmp_path, lambda _: None)
    read = {name for name in on_disk if name.endswith((".tar", ".arrow")) or name == "dataset.json"}
    assert {name: data for name, data in contents(staged).items() if name in read} == {n: on_disk[n] for n in read}


def test_only_what_is_missing_or_half_there_is_built_again(
    images: Path, on_disk: dict[str, bytes], s3: str, client: Any
) -> None:
    output, plan = location(s3), planned(images)
    build_all(output, plan)
    tar = stored(client)["train/train-000001.tar"]
    client.put_object(Bucket="bucket", Key=f"{SET}/train/train-000001.tar", Body=tar[: len(tar) // 2])
    client.delete_object(Bucket="bucket", Key=f"{SET}/train/train-000003.json")
    client.put_object(Bucket="bucket", Key=f"{SET}/train/train-000009.tar", Body=b"of a larger source")
    claim_folder(output, plan)
    built = [build_shard(output, shard, plan.image, set_aside=True) for shard in plan.shards]
    assert [one.annotation.name for one in built if not one.kept] == ["train-000001", "train-000003"]
    finish(output, plan, built, 0.0)
    assert stored(client) == on_disk


def test_failures_of_the_store_are_outlived_or_leave_nothing_that_vouches(
    images: Path,
    on_disk: dict[str, bytes],
    s3: str,
    client: Any,
    quick: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    plan = planned(images)
    with faulty_proxy(s3) as proxy:
        output = location(proxy.address)
        for name in ("train-000000.tar", "train-000001.idx", "val-000000.json", "dataset.json"):
            proxy.write_plan[name] = collections.deque(["403"])
        make(output, plan)
        assert not any(proxy.write_plan.values())
        assert stored(client) == on_disk
        failed = [line for line in caplog.messages if " failed (" in line]
        assert len(failed) == 4
        assert "SECRET" not in caplog.text
        monkeypatch.setattr("pipeline.storage.retry.ATTEMPTS", 2)
        client.put_object(Bucket="bucket", Key=f"{SET}/train/train-000002.tar", Body=b"half a tar")
        proxy.write_plan["train-000002.idx"] = collections.deque(["403"] * 2)
        with pytest.raises(SourceReadError, match=r"train-000002\.idx cannot be written in 2 attempts") as found:
            build_shard(output, plan.shards[2], plan.image, set_aside=True)
        assert "SECRET" not in str(found.value)
        assert "train/train-000002.json" not in stored(client)


def test_two_jobs_that_make_the_same_set_do_no_harm(
    images: Path, on_disk: dict[str, bytes], s3: str, client: Any
) -> None:
    output, plan = location(s3), planned(images)
    claim_folder(output, plan)
    claim_folder(output, plan)
    # The second is at work on a shard while the first writes all and finishes.
    slow = build_in_steps(output, plan.shards[0], plan.image, True, careful=True, claim=plan.claim)
    next(slow)
    finish(output, plan, [build_shard(output, shard, plan.image, set_aside=True) for shard in plan.shards], 0.0)
    written = stored(client)
    list(slow)
    assert stored(client) == written
    assert stored(client) == on_disk
    built = [build_shard(output, shard, plan.image, set_aside=True) for shard in plan.shards]
    finish(output, plan, built, 0.0)
    assert stored(client) == on_disk


@pytest.mark.parametrize("later", [{"quality": 80}, {"seed": 1}, {"per_shard": 5}])
def test_two_jobs_that_make_different_sets_meet_and_one_is_refused_by_name(
    images: Path, s3: str, client: Any, later: dict[str, int]
) -> None:
    output, plan, other = location(s3), planned(images), planned(images, **later)
    claim_folder(output, plan)
    with pytest.raises(
        ShardSetError, match=rf"s3://bucket/{SET} holds an unfinished set of another .* \(.*another --o"
    ):
        claim_folder(output, other)
    # Both looked before either had written.
    other.claim.write(output)
    for steps in (
        lambda: list(build_in_steps(output, plan.shards[0], plan.image, True, claim=plan.claim)),
        lambda: finish(output, plan, [build_shard(output, s, plan.image, True) for s in plan.shards], 0.0),
    ):
        with pytest.raises(ShardSetError, match=rf"^another job has begun a set of another .* in s3://bucket/{SET}:"):
            steps()
        assert "dataset.json" not in stored(client)
    (built, *_) = [build_shard(output, shard, other.image, set_aside=True) for shard in other.shards]
    assert not built.kept


def test_anything_else_in_the_place_is_left_alone(images: Path, s3: str, client: Any) -> None:
    client.put_object(Bucket="bucket", Key=f"{SET}/notes.txt", Body=b"somebody's")
    with pytest.raises(ShardSetError, match=rf"s3://bucket/{SET} holds 'notes.txt' and no shard set of this program"):
        claim_folder(location(s3), planned(images))
    assert stored(client) == {"notes.txt": b"somebody's"}


def test_google_store(images: Path, on_disk: dict[str, bytes], gcs: str) -> None:
    output, plan = f"gs://anonymous@bucket/{SET}?scheme=http&endpoint_override={gcs}", planned(images)
    make(output, plan)
    store, root = fs.FileSystem.from_uri(output)
    for name, data in on_disk.items():
        with store.open_input_stream(f"{root}/{name}") as stream:
            assert stream.read() == data
    assert find_finished(output, plan) == read_dataset(output)
    tidy(output, read_dataset(output), print)


@pytest.fixture
def joined(s3: str) -> Iterator[None]:
    """A Ray that the jobs join, and whose workers know the store's keys."""
    with raylets(1, cpus=2):
        yield


@pytest.mark.slow
def test_the_jobs_make_and_verify_a_set_at_a_url(
    images: Path, on_disk: dict[str, bytes], s3: str, client: Any, joined: None, capsys: pytest.CaptureFixture[str]
) -> None:
    output = location(s3)
    with faulty_proxy(s3) as proxy:
        proxy.write_plan["train-000001.tar"] = collections.deque(["403"])
        shard(ShardConfig(output=location(proxy.address), source=str(images), samples_per_shard=4, workers=2))
    assert stored(client) == on_disk
    # A worker has nobody else to tell.
    assert f"s3://bucket/{SET}/train/train-000001.tar: attempt 1 of 7 failed (" in capsys.readouterr().err
    shard(ShardConfig(output=output, source=str(images), samples_per_shard=4, workers=2))
    assert "finished before; nothing to do" in capsys.readouterr().out
    verify(VerifyConfig(data=output, decode=True, workers=2))
    said = capsys.readouterr()
    assert "OK train: 15 images in 4 shards" in said.out
    tar = on_disk["train/train-000002.tar"]
    client.put_object(Bucket="bucket", Key=f"{SET}/train/train-000002.tar", Body=tar[:3000] + b"x" + tar[3001:])
    with pytest.raises(VerifyError, match=rf"^s3://bucket/{SET} has \d+ faults, in 1 of 5 shards"):
        verify(VerifyConfig(data=output, workers=2))
    said = capsys.readouterr()
    assert f"delete s3://bucket/{SET}/train/train-000002.* in the store, then python jobs/shard_imagenet.py" in said.out
    assert "SECRET" not in said.out + said.err


@pytest.mark.parametrize("output", ["http://host/set?key=SECRET", "https://host/set", "file://host/set"])
def test_what_cannot_be_written_is_refused(output: str) -> None:
    with pytest.raises(
        ValueError, match=r"--output (https?|file)://host/set cannot be written: give a folder, s3://"
    ) as found:
        ShardConfig(output=output, source="images")
    assert "SECRET" not in str(found.value)


def test_a_claim_that_cannot_be_understood_is_named(images: Path, tmp_path: Path) -> None:
    (tmp_path / "unfinished.json").write_text(json.dumps({"settings": 1}))
    with pytest.raises(ShardSetError, match=r"unfinished\.json cannot be read .*start again"):
        claim_folder(tmp_path, planned(images))
