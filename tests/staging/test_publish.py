"""A set copied to object stores: byte for byte, proved by what they give back, and gone on with after failures."""

from __future__ import annotations

import collections
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import boto3
import pytest
from pyarrow import fs

from jobs.shard_imagenet import ShardConfig, main
from pipeline.dataset.info import DatasetError
from pipeline.staging.publish import StoreError, check_destination, publish
from pipeline.staging.staging import stage
from tests.faulty_proxy import faulty_proxy

SET = "sets/photographs"


def location(server: str, bucket: str = "bucket", user: str = "") -> str:
    return f"s3://{user}{bucket}/{SET}?region=us-east-1&scheme=http&endpoint_override={server}"


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def small(shard_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with three shards."""
    root = Path(shutil.copytree(shard_set, tmp_path_factory.mktemp("small") / "set"))
    value = json.loads((root / "dataset.json").read_bytes())
    for split, count in (("train", 2), ("val", 1)):
        for row in value["splits"][split]["shards"][count:]:
            for path in (root / split).glob(f"{row['name']}.*"):
                path.unlink()
        del value["splits"][split]["shards"][count:]
    (root / "dataset.json").write_text(json.dumps(value, indent=2) + "\n")
    return root


@pytest.fixture
def client(s3: str) -> Any:
    client = boto3.client("s3", endpoint_url=f"http://{s3}")
    client.create_bucket(Bucket="bucket")
    return client


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.storage.retry.FIRST_WAIT_S", 0.001)


def stored(client: Any) -> dict[str, bytes]:
    """What lies in the bucket, by Amazon's own client."""
    keys = [item["Key"] for item in client.list_objects_v2(Bucket="bucket").get("Contents", [])]
    assert all(key.startswith(f"{SET}/") for key in keys)
    return {key.removeprefix(f"{SET}/"): client.get_object(Bucket="bucket", Key=key)["Body"].read() for key in keys}


def put(client: Any, name: str, data: bytes) -> None:
    client.put_object(Bucket="bucket", Key=f"{SET}/{name}", Body=data)


def written(paths: Iterable[str]) -> list[str]:
    """The files of requests, in order; an upload takes several."""
    return [path.partition(f"{SET}/")[2] for path in paths]


def after_dataset(paths: list[str]) -> set[str]:
    """What was written since dataset.json was begun."""
    names = written(paths)
    return set(names[names.index("dataset.json") :])


def copied(root: Path, to: str) -> tuple[int, list[str]]:
    lines: list[str] = []
    return publish(root, to, lines.append).sent, lines


def test_the_job_brings_a_finished_set_to_s3_and_training_stages_it(
    shard_set: Path, tmp_path: Path, s3: str, client: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    output = Path(shutil.copytree(shard_set, tmp_path / "set"))
    (output / "notes.txt").write_text("not of the set")
    (output / "train" / ".train-000000.tar.x.tmp").write_text("left by a kill")
    with faulty_proxy(s3) as proxy:
        config = ShardConfig(
            output=output,
            source=str(shard_set.parent / "images"),
            val_fraction=0.25,
            samples_per_shard=10,
            copy_to=location(proxy.address, user="KEY:SECRET@"),
        )
        main(config)
        assert stored(client) == files(shard_set)
        assert after_dataset(proxy.writes) == {"dataset.json"}
        said = capsys.readouterr()
        assert "finished before; nothing to do" in said.out
        assert f"The set is at s3://bucket/{SET}, read back: 27 of 27 files were sent" in said.out
        assert "SECRET" not in said.out + said.err
        proxy.writes.clear()
        proxy.gets.clear()
        main(config)
        assert proxy.writes == []
        assert f"The set was at s3://bucket/{SET} before, all 27 files right" in capsys.readouterr().out
        # Nothing is believed unread.
        assert set(written(proxy.gets)) >= {n for n, data in files(shard_set).items() if data}
    lines: list[str] = []
    staged = stage(location(s3), tmp_path / "disk", lines.append)
    assert {name: data for name, data in files(staged).items() if name != "staged.json"} == {
        name: data
        for name, data in files(shard_set).items()
        if name.endswith((".tar", ".arrow")) or name == "dataset.json"
    }


def test_what_is_damaged_there_is_sent_again_and_nothing_else(small: Path, s3: str, client: Any) -> None:
    right = files(small)
    flipped, cut, index = "train/train-000001.tar", "val/val-000000.tar", "train/train-000000.idx"
    wrong = {
        flipped: right[flipped][:-1] + bytes([right[flipped][-1] ^ 1]),
        cut: right[cut][: len(right[cut]) // 2],
        index: right[index].replace(b"jpg", b"jpe", 1),
    }
    for name, data in (right | wrong).items():
        if name != "rejects.jsonl":
            put(client, name, data)
    with faulty_proxy(s3) as proxy:
        sent, _ = copied(small, location(proxy.address))
        assert sent == 4
        assert set(written(proxy.writes)) == {flipped, cut, index, "rejects.jsonl"}
    assert stored(client) == right


def test_failures_of_the_store_are_outlived(small: Path, s3: str, client: Any, quick: None) -> None:
    with faulty_proxy(s3) as proxy:
        proxy.write_plan["train-000000.tar"] = collections.deque(["403"])
        proxy.write_plan["train-000001.idx"] = collections.deque(["403"])
        proxy.plan["train-000001.tar"] = collections.deque(["flipped"])
        # A store that says it has all it was sent, and has not: a tar's upload begins with a request without a body.
        proxy.write_plan["val-000000.tar"] = collections.deque(["", "truncated"])
        proxy.write_plan["dataset.json"] = collections.deque(["403"])
        sent, lines = copied(small, location(proxy.address))
        assert not any(proxy.plan.values())
        assert not any(proxy.write_plan.values())
        assert sent == len(files(small))
        failed = {line.partition(":")[0] for line in lines if " failed (" in line}
        tars = {"train/train-000000.tar", "train/train-000001.tar", "val/val-000000.tar"}
        assert failed == {*tars, "train/train-000001.idx", "dataset.json"}
        assert after_dataset(proxy.writes) == {"dataset.json"}
    assert stored(client) == files(small)


def test_a_stop_in_the_middle_vouches_for_nothing_and_the_next_run_goes_on(
    small: Path, s3: str, client: Any, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.storage.retry.ATTEMPTS", 2)
    for name, data in files(small).items():
        if name.startswith("train/"):
            put(client, name, data)
    with faulty_proxy(s3) as proxy:
        proxy.write_plan["val-000000.tar"] = collections.deque(["403"] * 2)
        with pytest.raises(StoreError, match=r"val-000000\.tar cannot be copied in 2 attempts.*same command") as found:
            copied(small, location(proxy.address))
        assert "\n" not in str(found.value)
        there = stored(client)
        assert "dataset.json" not in there
        proxy.writes.clear()
        sent, _ = copied(small, location(proxy.address))
        assert set(written(proxy.writes)) == set(files(small)) - set(there)
        assert sent == len(files(small)) - len(there)
    assert stored(client) == files(small)


def test_a_damaged_local_shard_is_named(small: Path, tmp_path: Path, s3: str, client: Any, quick: None) -> None:
    root = Path(shutil.copytree(small, tmp_path / "set"))
    tar = root / "train" / "train-000001.tar"
    data = tar.read_bytes()
    for damaged in (data[:3000] + bytes([data[3000] ^ 1]) + data[3001:], data[:-512]):
        tar.write_bytes(damaged)
        with pytest.raises(DatasetError, match=r"train-000001\.tar is damaged.* rm .*/train-000001\.\* && ") as found:
            copied(root, location(s3))
        assert "\n" not in str(found.value)
        assert "dataset.json" not in stored(client)
    tar.write_bytes(data)
    copied(root, location(s3))
    assert stored(client) == files(small)


def test_another_set_is_refused_and_left_alone(small: Path, s3: str, client: Any) -> None:
    text = (small / "dataset.json").read_text(encoding="utf-8")
    for other, why in ((text.replace('"n0"', '"n9"'), "another set"), (text[:99], "cannot be read")):
        put(client, "dataset.json", other.encode())
        with pytest.raises(DatasetError, match=f"^s3://bucket/{SET} holds .*{why}.*--copy-to another URL"):
            copied(small, location(s3))
        assert stored(client) == {"dataset.json": other.encode()}


def test_google_store(small: Path, tmp_path: Path, gcs: str) -> None:
    to = f"gs://anonymous@bucket/{SET}?scheme=http&endpoint_override={gcs}"
    check_destination(to)
    assert copied(small, to)[0] == len(files(small))
    store, root = fs.FileSystem.from_uri(to)
    for name, data in files(small).items():
        with store.open_input_stream(f"{root}/{name}") as stream:
            assert stream.read() == data
    assert copied(small, to)[0] == 0


def test_a_bucket_that_is_not_there_is_found_before_the_work(s3: str, client: Any, tmp_path: Path) -> None:
    check_destination(location(s3))
    config = ShardConfig(output=tmp_path / "out", source=str(tmp_path), copy_to=location(s3, "nobody"))
    with pytest.raises(StoreError, match=rf"^s3://nobody/{SET} cannot be listed .*NO_SUCH_BUCKET.*the bucket exists"):
        main(config)


@pytest.mark.parametrize("to", ["shards", "/mnt/shards", "http://host/set?key=SECRET", "file:///mnt/set"])
def test_what_is_no_object_store_is_refused(to: str) -> None:
    assert ShardConfig(output=Path("out"), source="images", copy_to="gs://bucket/set").copy_to
    with pytest.raises(ValueError, match="give a URL that can be written, as s3://BUCKET/SET") as found:
        ShardConfig(output=Path("out"), source="images", copy_to=to)
    assert "SECRET" not in str(found.value)
