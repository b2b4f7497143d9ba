"""The sharding command as a user runs it: on Ray, and given wrong things. `test_shard_kills` kills it."""

from __future__ import annotations

import dataclasses
import io
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.cli.command import run
from jobs.cli.progress import Progress
from jobs.shard_imagenet import ShardConfig, main
from jobs.verify_shards import VerifyConfig, VerifyError
from jobs.verify_shards import main as verify
from pipeline.dataset.info import read_dataset
from pipeline.sharding.shards import BadImageError
from tests.photographs import write_source
from tests.processes import outside_clusters, run_here
from tests.raylets import raylets
from tests.shard_sets import contents

JOBS = Path(__file__).resolve().parents[2] / "jobs"
DEADLINE_S = 300


def failure(done: subprocess.CompletedProcess[str]) -> str:
    """The one line a failed command left on stderr, progress aside."""
    assert done.returncode == 1, done.stderr
    lines = [line for line in done.stderr.splitlines() if " images/s, " not in line]
    assert len(lines) == 1, done.stderr
    return lines[0]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("job") / "images", images=20)


@pytest.fixture(scope="module")
def uninterrupted(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The set as two workers make it in one go, a shard for each two images."""
    output = tmp_path_factory.mktemp("job") / "uninterrupted"
    job = [sys.executable, JOBS / "shard_imagenet.py", "--source", images, "--output", output]
    done = subprocess.run(
        [*map(str, job), "--workers", "2", "--samples-per-shard", "2"],
        env={**outside_clusters(), "PYTHONPATH": str(JOBS.parent)},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
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
def test_verify_names_a_damaged_shard_and_only_mends_it(
    images: Path, uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = Path(shutil.copytree(uninterrupted, tmp_path / "out"))
    config = VerifyConfig(str(output), decode=True, workers=1)
    verify(config)
    assert capsys.readouterr().out.splitlines() == [
        "OK train: 54 images in 27 shards, 18 to 18 of each of 3 classes, all decoded",
        "OK val: 6 images in 3 shards, 2 to 2 of each of 3 classes, all decoded",
    ]
    tar = output / "train" / "train-000003.tar"
    data = bytearray(tar.read_bytes())
    data[9000] ^= 1
    tar.write_bytes(data)
    with pytest.raises(VerifyError, match=f"^{output} has "):
        verify(config)
    said = capsys.readouterr().out
    assert "OK val" in said
    assert "OK train" not in said
    faults = [line for line in said.splitlines() if line.startswith("FAULT")]
    assert all(line.startswith("FAULT train-000003") for line in faults)
    cures = [line for line in said.splitlines() if "rm " in line]
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
def test_bad_images_fail_or_are_set_aside_as_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_source(tmp_path / "images", images=3, longest=280)
    (source / "n1" / "n1_0.JPEG").write_bytes(b"no image")
    config = ShardConfig(str(tmp_path / "out"), str(source), workers=1, max_bad_fraction=0.2)
    with pytest.raises(BadImageError, match=r"n1_0.JPEG: it is no image in a known format; replace or remove"):
        main(dataclasses.replace(config, on_bad_image="fail"))
    main(config)
    assert "images set aside: 1, listed in" in capsys.readouterr().out
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
