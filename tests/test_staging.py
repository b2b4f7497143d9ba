"""Staging: whole or refused, once per node, and from a real S3 endpoint."""

from __future__ import annotations

import hashlib
import shutil
import threading
from pathlib import Path

import boto3
import pytest
from filelock import FileLock

from pipeline.dataset import DatasetError, SplitReader, read_dataset
from pipeline.staging import stage


def tree(root: Path) -> dict[str, str]:
    """sha256 of each file but the annotations and rejects, which training does not read."""
    files = [p for p in root.rglob("*") if p.suffix in (".tar", ".idx") or p.name == "dataset.json"]
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def stage_quietly(location: str | Path, folder: Path) -> tuple[Path, list[str]]:
    lines: list[str] = []
    return stage(str(location), folder, lines.append), lines


def test_a_staged_set_is_the_set(shard_set: Path, tmp_path: Path) -> None:
    staged, lines = stage_quietly(shard_set, tmp_path)
    assert tree(staged) == tree(shard_set)
    assert lines
    assert len(SplitReader(staged, read_dataset(staged), "train")) == 45
    assert not list(tmp_path.rglob("*.tmp"))
    again, lines = stage_quietly(shard_set, tmp_path)
    assert again == staged
    assert lines == []


def test_an_interrupted_staging_goes_on(shard_set: Path, tmp_path: Path) -> None:
    staged, _ = stage_quietly(shard_set, tmp_path)
    (staged / "dataset.json").unlink()
    kept, lost = staged / "train" / "train-000000.tar", staged / "train" / "train-000001.tar"
    lost.unlink()
    before = kept.stat()
    staged, lines = stage_quietly(shard_set, tmp_path)
    assert tree(staged) == tree(shard_set)
    assert "in 1 of 7 shards" in lines[0]
    assert kept.stat().st_ino == before.st_ino
    assert lost.exists()


def test_a_shard_that_is_not_what_the_set_says_is_refused(shard_set: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "source"
    shutil.copytree(shard_set, damaged)
    tar = damaged / "train" / "train-000002.tar"
    data = bytearray(tar.read_bytes())
    data[3000] ^= 1
    tar.write_bytes(data)
    with pytest.raises(DatasetError, match=r"train-000002\.tar is not the shard"):
        stage_quietly(damaged, tmp_path / "disk")
    assert not list((tmp_path / "disk").rglob("dataset.json"))
    assert not list((tmp_path / "disk").rglob("train-000002.tar"))
    shutil.copy(shard_set / "train" / "train-000002.tar", tar)
    staged, _ = stage_quietly(damaged, tmp_path / "disk")
    assert tree(staged) == tree(shard_set)


def test_an_unfinished_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no finished shard set"):
        stage_quietly(tmp_path, tmp_path / "disk")


def test_a_full_disk_is_foreseen(shard_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("pipeline.staging.shutil.disk_usage", lambda _: usage)
    with pytest.raises(DatasetError, match="--stage"):
        stage_quietly(shard_set, tmp_path)
    assert not list(tmp_path.rglob("*.tar"))


def test_a_second_process_waits_and_says_so(shard_set: Path, tmp_path: Path) -> None:
    name = read_dataset(shard_set).fingerprint[:16]
    waiting = threading.Event()
    lines: list[str] = []

    def report(line: str) -> None:
        lines.append(line)
        waiting.set()

    lock = FileLock(tmp_path / f".{name}.lock")
    with lock:
        other = threading.Thread(target=lambda: stage(str(shard_set), tmp_path, report))
        other.start()
        assert waiting.wait(30)
        assert lines == [f"waiting for another process of this node to stage {shard_set}"]
        assert not (tmp_path / name).exists()
    other.join(60)
    assert tree(tmp_path / name) == tree(shard_set)


def test_from_s3(shard_set: Path, tmp_path: Path, s3: str) -> None:
    client = boto3.client("s3", endpoint_url=f"http://{s3}")
    client.create_bucket(Bucket="bucket")
    for path in shard_set.rglob("*.*"):
        client.upload_file(str(path), "bucket", f"shards/{path.relative_to(shard_set)}")
    location = f"s3://bucket/shards?region=us-east-1&scheme=http&endpoint_override={s3}"
    staged, _ = stage_quietly(location, tmp_path)
    assert tree(staged) == tree(shard_set)
    with pytest.raises(DatasetError, match="no finished shard set"):
        stage_quietly(location.replace("shards", "nothing"), tmp_path)
