"""Staging: whole or refused, once per node, and from a real S3 endpoint."""

from __future__ import annotations

import collections
import hashlib
import resource
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock

from pipeline.dataset.info import DatasetError, read_dataset
from pipeline.dataset.split_reader import SplitReader
from pipeline.loading.loader import Loader
from pipeline.loading.plan import Plan, color_matrix
from pipeline.staging.decoded_cache import stage_pixels
from pipeline.staging.staging import stage
from tests.damage import flip_bit, own_copy
from tests.faulty_proxy import FAULTS, faulty_proxy
from tests.photographs import decoded
from tests.shard_sets import s3_options

CURE = "run the command that made the set again, which adds it and changes no image"


def tree(root: Path) -> dict[str, str]:
    """sha256 of each file that training reads."""
    files = [p for p in root.rglob("*") if p.suffix in (".tar", ".arrow") or p.name == "dataset.json"]
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def stage_quietly(location: str | Path, folder: Path) -> tuple[Path, list[str]]:
    lines: list[str] = []
    return stage(str(location), folder, lines.append), lines


def test_a_staged_set_is_the_set(shard_set: Path, tmp_path: Path) -> None:
    staged, lines = stage_quietly(shard_set, tmp_path)
    assert tree(staged) == tree(shard_set)
    assert lines
    assert len(SplitReader(staged, read_dataset(staged), "train")) == 45
    # What only other readers and the sharding read is a request less for each shard, of a thousand.
    assert {path.suffix for path in staged.rglob("*") if path.is_file()} == {".tar", ".arrow", ".json"}
    assert sorted(path.name for path in staged.rglob("*.json")) == ["dataset.json", "staged.json"]
    again, lines = stage_quietly(shard_set, tmp_path)
    assert again == staged
    assert lines == []


def test_one_split_is_staged_alone_and_the_other_later(shard_set: Path, tmp_path: Path) -> None:
    staged = stage(str(shard_set), tmp_path, print, ("val",))
    assert len(SplitReader(staged, read_dataset(shard_set), "val")) == 15
    assert not list(staged.glob("train/*.tar"))
    # What is not whole shall not pass for it.
    assert not (staged / "dataset.json").exists()
    kept = (staged / "val" / "val-000000.tar").stat()
    again, lines = stage_quietly(shard_set, tmp_path)
    assert again == staged
    assert "in 5 of 7 shards" in lines[0]
    assert (staged / "val" / "val-000000.tar").stat().st_ino == kept.st_ino
    assert tree(staged) == tree(shard_set)


def test_a_shard_that_is_not_what_the_set_says_is_refused(shard_set: Path, tmp_path: Path, quick: None) -> None:
    damaged = own_copy(shard_set, tmp_path / "source")
    tar = damaged / "train" / "train-000002.tar"
    flip_bit(tar, 3000)
    with pytest.raises(DatasetError, match=r"train-000002\.tar is not the shard"):
        stage_quietly(damaged, tmp_path / "disk")
    assert not list((tmp_path / "disk").rglob("dataset.json"))
    assert not list((tmp_path / "disk").rglob("train-000002.tar"))
    flip_bit(tar, 3000)
    staged, _ = stage_quietly(damaged, tmp_path / "disk")
    assert tree(staged) == tree(shard_set)


def test_a_damaged_index_is_refused(shard_set: Path, tmp_path: Path, quick: None) -> None:
    damaged = own_copy(shard_set, tmp_path / "source")
    flip_bit(damaged / "train.arrow", 1000)
    with pytest.raises(DatasetError, match=rf"train\.arrow is damaged \(its sha256 .*\): {CURE}") as found:
        stage_quietly(damaged, tmp_path / "disk")
    assert "\n" not in str(found.value)
    assert not list((tmp_path / "disk").rglob("dataset.json"))
    flip_bit(damaged / "train.arrow", 1000)
    (damaged / "train.arrow").rename(tmp_path / "away")
    for copy in (
        lambda: stage_quietly(damaged, tmp_path / "disk"),
        lambda: stage_pixels(str(damaged), tmp_path, print, 1),
    ):
        with pytest.raises(DatasetError, match=rf"source/train\.arrow is missing: {CURE}"):
            copy()
    (tmp_path / "away").rename(damaged / "train.arrow")
    staged, _ = stage_quietly(damaged, tmp_path / "disk")
    assert tree(staged) == tree(shard_set)


@pytest.mark.parametrize("text", ["", "{}", "[]", "[" * 99999])
def test_a_copy_that_does_not_say_of_what_is_named(shard_set: Path, tmp_path: Path, text: str) -> None:
    staged, _ = stage_quietly(shard_set, tmp_path)
    (staged / "staged.json").write_text(text)
    with pytest.raises(DatasetError, match=rf"staged\.json is damaged: delete {staged}, and run the command"):
        SplitReader(staged, read_dataset(staged), "train")


def test_a_full_disk_is_foreseen(shard_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("pipeline.staging.staging.shutil.disk_usage", lambda _: usage)
    with pytest.raises(DatasetError, match="--stage"):
        stage_quietly(shard_set, tmp_path)
    assert not list(tmp_path.rglob("*.tar"))


def test_a_disk_that_takes_no_large_file(shard_set: Path, tmp_path: Path) -> None:
    """A real error of the kernel, as that of a full disk is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max(p.stat().st_size for p in shard_set.rglob("*.tar")) - 1, hard))
    try:
        with pytest.raises(DatasetError, match=r"^staging .* failed: \[Errno 27\] File too large.* goes on"):
            stage_quietly(shard_set, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.rglob("dataset.json"))
    assert not list(tmp_path.rglob("*.tmp"))
    staged, _ = stage_quietly(shard_set, tmp_path)
    assert tree(staged) == tree(shard_set)


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


# pyarrow's own client outlived 20 failures in a row of one request, and gave up after 6 seconds of them.
WITHIN_THE_CLIENTS_PATIENCE = 5


def test_failures_on_the_way_from_s3_change_nothing(
    shard_set: Path, tmp_path: Path, s3: str, client: Any, quick: None, caplog: pytest.LogCaptureFixture
) -> None:
    for path in shard_set.rglob("*.*"):
        client.upload_file(str(path), "bucket", f"shards/{path.relative_to(shard_set)}")
    with faulty_proxy(s3) as proxy:
        for number, fault in enumerate(FAULTS[:3]):
            proxy.plan[f"train-00000{number}.tar"] = collections.deque([fault] * WITHIN_THE_CLIENTS_PATIENCE)
        proxy.plan["train.arrow"] = collections.deque(["503"])
        proxy.plan["val.arrow"] = collections.deque(["reset"])
        proxy.plan["train-000004.tar"] = collections.deque(["flipped"])
        proxy.plan["dataset.json"] = collections.deque(["503"])
        staged, _ = stage_quietly(f"s3://bucket/shards{s3_options(proxy.address)}", tmp_path)
        assert tree(staged) == tree(shard_set)
        assert not list(tmp_path.rglob("*.tmp"))
        assert not any(proxy.plan.values())
        # Only what the client cannot see is left to us.
        (said,) = [line for line in caplog.messages if " failed (" in line]
        assert "train-000004.tar" in said
        assert "checksum mismatch" in said
        proxy.gets.clear()
        again, lines = stage_quietly(f"s3://bucket/shards{s3_options(proxy.address)}", tmp_path)
        assert (again, lines) == (staged, [])
        assert [path.rpartition("/")[2] for path in proxy.gets] == ["dataset.json"]
    with pytest.raises(DatasetError, match=r"the shard set s3://bucket/nothing is unfinished"):
        stage_quietly(f"s3://bucket/nothing{s3_options(s3)}", tmp_path)


# As decoded pixels.


def test_pixels_are_the_jpegs_and_give_the_same_batches(shard_set: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    staged = stage_pixels(str(shard_set), tmp_path, lines.append, 2)
    info = read_dataset(staged)
    jpegs, pixels = SplitReader(shard_set, read_dataset(shard_set), "train"), SplitReader(staged, info, "train")
    assert (jpegs.pixels, pixels.pixels) == (False, True)
    np.testing.assert_array_equal(pixels.labels, jpegs.labels)
    for sample in range(len(jpegs)):
        assert pixels.key(sample) == jpegs.key(sample)
        np.testing.assert_array_equal(pixels.image(sample), decoded(jpegs.image(sample).tobytes()))
    plan = Plan(len(jpegs), 5, 3, color_matrix(info.rgb))
    runs = []
    for reader in (jpegs, pixels):
        batches = Loader(reader, info.rgb, 5, torch.device("cpu"), 2).run(plan.epoch(0))
        runs.append([(batch.images, batch.images.clone(), batch.labels) for batch in batches])
    assert len(runs[0]) == plan.steps
    for one, two in zip(*runs, strict=True):
        assert all(torch.equal(mine, other) for mine, other in zip(one, two, strict=True))
        # A batch stays as it is while later ones are made.
        assert torch.equal(one[0], one[1])
    assert sorted(path.name for path in staged.iterdir()) == [
        *("dataset.json", "pixels.json", "staged.json", "train", "train.arrow", "val", "val.arrow")
    ]
    lines.clear()
    assert stage_pixels(str(shard_set), tmp_path, lines.append, 2) == staged
    assert lines == []


def test_an_interrupted_decoding_goes_on_and_a_cut_file_is_refused(shard_set: Path, tmp_path: Path) -> None:
    staged = stage_pixels(str(shard_set), tmp_path, lambda _: None, 2)
    kept, lost = staged / "train" / "train-000000.rgb", staged / "train" / "train-000001.rgb"
    whole, before = lost.read_bytes(), kept.stat().st_ino
    lost.write_bytes(whole[:-1])
    with pytest.raises(DatasetError, match=rf"this is a staged copy, so delete {lost} and run the same command again"):
        SplitReader(staged, read_dataset(staged), "train")
    lost.unlink()
    stage_pixels(str(shard_set), tmp_path, lambda _: None, 2)
    assert lost.read_bytes() == whole
    assert kept.stat().st_ino == before
