"""The sharding command as a user runs it: on Ray, onto a disk and into a store, and given wrong things.

`test_shard_kills` kills it.
"""

from __future__ import annotations

import collections
import dataclasses
import io
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.cli.progress import Progress
from jobs.shard_imagenet import ShardConfig, main
from jobs.verify_shards import VerifyConfig, VerifyError
from jobs.verify_shards import main as verify
from pipeline.sharding.claim import ShardSetError
from pipeline.sharding.set_lock import JobLock
from tests.damage import flip_bit
from tests.faulty_proxy import faulty_proxy
from tests.processes import JOBS, refusal, run_here
from tests.raylets import raylets
from tests.shard_sets import PER_SHARD, SET_IN_BUCKET, contents, in_bucket, planned, stored_in, tars


@pytest.fixture(scope="module")
def joined() -> Iterator[None]:
    """A Ray that commands join. Starting one of their own is most of their time."""
    with raylets(1, cpus=2):
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("joined")
def test_verify_names_a_damaged_shard_and_its_command_mends_that_alone(
    images: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = Path(shutil.copytree(whole, tmp_path / "out"))
    config = VerifyConfig(str(output), decode=True, workers=1)
    verify(config)
    assert capsys.readouterr().out.splitlines() == [
        "OK train: 15 images in 4 shard(s), 5 of each of 3 classes, all decoded",
        "OK val: 3 images in 1 shard(s), 1 of each of 3 classes, all decoded",
    ]
    tar = output / "train" / "train-000003.tar"
    flip_bit(tar, 9000)
    with pytest.raises(VerifyError, match=f"^{output} has "):
        verify(config)
    said = capsys.readouterr().out
    assert "OK val" in said
    assert "OK train" not in said
    faults = [line for line in said.splitlines() if line.startswith("FAULT")]
    assert all(line.startswith("FAULT train-000003") for line in faults)
    (cure,) = [line for line in said.splitlines() if "rm " in line]
    # The commands as they are printed, with the user's images for IMAGES.
    command = "rm " + cure.partition(": rm ")[2].replace("IMAGES", str(images))
    command = command.replace("python jobs/", f"{sys.executable} {JOBS}/")
    kept = {path: path.stat().st_mtime_ns for path in output.rglob("*.tar") if path != tar}
    mended = subprocess.run(command, shell=True, capture_output=True, text=True, check=False, timeout=300)
    assert mended.returncode == 0, mended.stderr
    for line in ("train: 15 images, 4 shard(s)", "images set aside: 0", "RGB PCA eigenvalues"):
        assert line in mended.stdout
    assert contents(output) == contents(whole)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


@pytest.mark.slow
@pytest.mark.usefixtures("joined")
def test_the_jobs_make_and_verify_a_set_at_a_url(
    images: Path, whole: Path, s3: str, client: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ShardConfig(output=in_bucket(s3), source=str(images), samples_per_shard=PER_SHARD, workers=2)
    with faulty_proxy(s3) as proxy:
        proxy.write_plan["train-000001.tar"] = collections.deque(["403"])
        main(dataclasses.replace(config, output=in_bucket(proxy.address)))
    assert stored_in(client) == contents(whole)
    shown = f"s3://bucket/{SET_IN_BUCKET}"
    # A worker has nobody else to tell.
    assert f"{shown}/train/train-000001.tar: attempt 1 of 7 failed (" in capsys.readouterr().err
    main(config)
    assert "finished before; nothing to do" in capsys.readouterr().out
    key = f"{SET_IN_BUCKET}/train/train-000002.tar"
    tar = client.get_object(Bucket="bucket", Key=key)["Body"].read()
    client.put_object(Bucket="bucket", Key=key, Body=tar[:3000] + b"x" + tar[3001:])
    with pytest.raises(VerifyError, match=rf"^{shown} has \d+ fault\(s\), in 1 of 5 shard\(s\)"):
        verify(VerifyConfig(data=config.output, workers=2))
    said = capsys.readouterr()
    assert "OK val: 3 images in 1 shard(s)" in said.out
    assert f"delete {shown}/train/train-000002.* in the store, then python jobs/shard_imagenet.py" in said.out
    assert "SECRET" not in said.out + said.err


@pytest.mark.slow
@pytest.mark.usefixtures("joined")
def test_the_job_stops_at_the_shard_with_more_bad_images_than_it_allows(source: Path, tmp_path: Path) -> None:
    bad = planned(source).shards[0].entries[0].path
    Path(bad).write_bytes(b"no image")
    config = ShardConfig(str(tmp_path / "out"), str(source), workers=1, samples_per_shard=PER_SHARD, max_bad_fraction=0)
    # The second time, the shard is there.
    for _ in range(2):
        with pytest.raises(ShardSetError, match=f"^1 of 18 images are bad, .*; the first is {bad}: it is no image"):
            main(config)
        assert [tar.name for tar in tars(tmp_path / "out", "train")] == ["train-000000.tar"]


def test_a_second_run_does_nothing_and_other_settings_are_refused(images: Path, whole: Path) -> None:
    written = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    arguments = ["--source", images, "--output", whole, "--samples-per-shard", PER_SHARD]
    again = run_here("shard_imagenet", *arguments)
    assert again.returncode == 0, again.stderr
    assert "finished before; nothing to do" in again.stdout
    other = refusal("shard_imagenet", *arguments, "--quality", "50")
    assert "finished set of another quality (90, not 50)" in other
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == written


def test_a_set_that_another_job_finished_meanwhile_is_left_alone(
    images: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def finished(root: Path, log: Callable[[str], None]) -> JobLock:
        shutil.copytree(whole, root, dirs_exist_ok=True)
        return JobLock(root, log)

    monkeypatch.setattr("jobs.shard_imagenet.JobLock", finished)
    config = ShardConfig(str(tmp_path / "same"), str(images), samples_per_shard=PER_SHARD)
    main(config)
    assert "finished before; nothing to do" in capsys.readouterr().out
    with pytest.raises(ShardSetError, match=r"holds a finished set of another seed \(0, not 1\)"):
        main(dataclasses.replace(config, output=str(tmp_path / "other"), seed=1))
    assert contents(tmp_path / "same") == contents(whole)


def test_progress_in_a_log_is_a_line_now_and_then_and_one_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    log, now = io.StringIO(), [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    with Progress(100, "images", stream=log) as progress:
        progress.advance(50, worked=False)
        for _ in range(4):
            now[0] += 5.0
            progress.advance(10, note="1 set aside")
        now[0] += 1.0
        progress.advance(10)
        assert progress.rate == pytest.approx(50 / 21)
    assert log.getvalue().splitlines() == [
        "70 of 100 images, 2.00 images/s, 00:15 left, 1 set aside",
        "90 of 100 images, 2.00 images/s, 00:05 left, 1 set aside",
        "100 of 100 images, 2.38 images/s, 00:00 left",
    ]


def test_a_log_does_not_say_the_end_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    log, now = io.StringIO(), [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    with Progress(10, "images", stream=log) as progress:
        now[0] = 20.0
        progress.advance(10)
        now[0] = 40.0
    assert log.getvalue().splitlines() == ["10 of 10 images, 0.50 images/s, 00:00 left"]
