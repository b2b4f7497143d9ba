"""The sharding command as a user runs it: on Ray, and given wrong things. `test_shard_kills` kills it."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.cli.command import run
from jobs.cli.progress import Progress
from jobs.shard_imagenet import ShardConfig, main
from pipeline.dataset.info import read_dataset
from tests.photographs import write_source
from tests.processes import run_here
from tests.raylets import raylets
from tests.shard_sets import contents

JOBS = Path(__file__).resolve().parents[2] / "jobs"
DEADLINE_S = 300


def call(job: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs jobs/JOB.py, in the cluster that RAY_ADDRESS names or in a Ray of its own."""
    command = [sys.executable, str(JOBS / f"{job}.py"), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(JOBS.parent)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=DEADLINE_S, check=False)


def shard(source: Path, output: Path, *more: object) -> subprocess.CompletedProcess[str]:
    return call("shard_imagenet", "--source", source, "--output", output, *more)


def failure(done: subprocess.CompletedProcess[str]) -> str:
    """The one line a failed command left on stderr, progress aside."""
    assert done.returncode == 1, done.stderr
    lines = [line for line in done.stderr.splitlines() if " images/s, " not in line]
    assert len(lines) == 1, done.stderr
    return lines[0]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("job") / "images", images=20, longest=900)


@pytest.fixture(scope="module")
def uninterrupted(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The set as two workers make it in one go, a shard for each two images."""
    output = tmp_path_factory.mktemp("job") / "uninterrupted"
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        done = shard(images, output, "--workers", "2", "--samples-per-shard", "2")
    assert done.returncode == 0, done.stderr
    assert "train: 54 images, 27 shards" in done.stdout
    assert "images set aside: 0" in done.stdout
    assert "RGB PCA eigenvalues" in done.stdout
    return output


@pytest.fixture(scope="module")
def joined() -> Iterator[None]:
    """A Ray that commands join. Starting one of their own is most of their time."""
    with raylets(1, cpus=2):
        yield


@pytest.mark.slow
def test_a_second_run_does_nothing_and_other_settings_are_refused(images: Path, uninterrupted: Path) -> None:
    written = {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*")}
    arguments = ["--source", images, "--output", uninterrupted, "--samples-per-shard", "2"]
    again = run_here("shard_imagenet", *arguments)
    assert again.returncode == 0, again.stderr
    assert "finished before; nothing to do" in again.stdout
    other = failure(run_here("shard_imagenet", *arguments, "--quality", "50"))
    assert "finished set of another quality (90, not 50)" in other
    assert {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*")} == written


@pytest.mark.slow
@pytest.mark.usefixtures("joined")
def test_verify_names_a_damaged_shard_and_only_mends_it(images: Path, uninterrupted: Path, tmp_path: Path) -> None:
    output = Path(shutil.copytree(uninterrupted, tmp_path / "out"))
    arguments = ["--data", output, "--decode", "--workers", 1]
    right = call("verify_shards", *arguments)
    assert right.returncode == 0, right.stderr
    assert right.stdout.splitlines() == [
        "OK train: 54 images in 27 shards, 18 to 18 of each of 3 classes, all decoded",
        "OK val: 6 images in 3 shards, 2 to 2 of each of 3 classes, all decoded",
    ]
    tar = output / "train" / "train-000003.tar"
    data = bytearray(tar.read_bytes())
    data[9000] ^= 1
    tar.write_bytes(data)
    wrong = call("verify_shards", *arguments)
    assert failure(wrong).startswith(f"error: {output} has ")
    assert "OK val" in wrong.stdout
    assert "OK train" not in wrong.stdout
    faults = [line for line in wrong.stdout.splitlines() if line.startswith("FAULT")]
    assert all(line.startswith("FAULT train-000003") for line in faults)
    cures = [line for line in wrong.stdout.splitlines() if "rm " in line]
    assert len(cures) == 1
    # The commands as they are printed, with the user's images for IMAGES.
    command = "rm " + cures[0].partition(": rm ")[2].replace("IMAGES", str(images))
    command = command.replace("python jobs/", f"{sys.executable} {JOBS}/")
    kept = {path: path.stat().st_mtime_ns for path in output.rglob("*.tar") if path != tar}
    mended = subprocess.run(command, shell=True, capture_output=True, text=True, check=False, timeout=600)
    assert mended.returncode == 0, mended.stderr
    assert contents(output) == contents(uninterrupted)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


@pytest.mark.slow
@pytest.mark.usefixtures("joined")
def test_bad_images_fail_or_are_set_aside_as_asked(tmp_path: Path) -> None:
    source = write_source(tmp_path / "images", images=3, longest=280)
    (source / "n1" / "n1_0.JPEG").write_bytes(b"no image")
    strict = failure(shard(source, tmp_path / "out", "--workers", "1", "--on-bad-image", "fail"))
    assert "n1_0.JPEG: it is no image in a known format; replace or remove the image" in strict
    done = shard(source, tmp_path / "out", "--workers", "1", "--max-bad-fraction", "0.2")
    assert done.returncode == 0, done.stderr
    assert "images set aside: 1, listed in" in done.stdout
    assert read_dataset(tmp_path / "out").set_aside == 1


def test_a_missing_source_ends_in_one_line(tmp_path: Path) -> None:
    message = failure(run_here("shard_imagenet", "--source", tmp_path / "missing", "--output", tmp_path / "out"))
    assert message.startswith(
        f"error: {tmp_path / 'missing'} does not exist: give --source a folder of class folders, "
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--on-bad-image", "perhaps"), "--on-bad-image"),
        (("--quality", "200"), "--quality 200 must lie between 1 and 95"),
        (("--workers", "0"), "--workers 0 must be at least 1"),
    ],
)
def test_wrong_usage_is_status_2(
    more: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["shard_imagenet.py", "--source", "missing", "--output", "out", *more])
    with pytest.raises(SystemExit) as ended:
        run(ShardConfig, main)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_progress_in_a_log_is_a_line_now_and_then_and_one_at_the_end() -> None:
    log, now = io.StringIO(), [0.0]
    with Progress(100, "images", stream=log, clock=lambda: now[0]) as progress:
        progress.advance(50, worked=False)
        for _ in range(4):
            now[0] += 5.0
            progress.advance(10, note="1 set aside")
        now[0] += 1.0
        progress.advance(10)
    assert log.getvalue().splitlines() == [
        "70 of 100 images, 2.0 images/s, 0:00:15 left, 1 set aside",
        "90 of 100 images, 2.0 images/s, 0:00:05 left, 1 set aside",
        "100 of 100 images, 2.4 images/s, 0:00:00 left",
    ]
