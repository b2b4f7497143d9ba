"""Real faults while a real run trains: nothing is lost but the steps since the last checkpoint.

Each ends with the weights of a run that was never disturbed, bit for bit, having seen each image once an epoch.
"""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest

from jobs.training import checkpoint
from tests.damage import flip_bit, flip_in_the_middle, own_copy, places
from tests.processes import below, listening
from tests.runs import Run, assert_alike, last, plan, tracebacks, undisturbed
from tests.shard_sets import s3_options

PROMPT_S = 300  # Of a busy machine; a worker that waits for another would wait 10 minutes.


@pytest.mark.slow
def test_a_failing_worker_a_killed_command_a_corrupt_image_and_a_damaged_checkpoint_change_nothing(
    pair: Path, shard_set: Path, tmp_path: Path
) -> None:
    run, notes, shards = tmp_path / "run", tmp_path / "notes", own_copy(shard_set, tmp_path / "shards")
    (tmp_path / "notes.fault").touch()
    killed = Run(shards, str(tmp_path), 2, 2, notes=notes)
    # A failure that is no damage costs the steps since the last checkpoint, and one of --max-failures.
    killed.wait_for("failure 1 of at most 4: rank 1: ")
    assert "out of memory" in killed.lines[-1]
    killed.wait_for(" step ")
    while len(checkpoint.committed(str(run))) < 2:
        killed.wait_for(" step ")
    # The kernel's own table of a Ray that a command starts for itself, and of training in it.
    addresses = listening(killed.process.pid)
    os.killpg(killed.process.pid, signal.SIGKILL)
    killed.end()
    # The GCS, the raylet's two, the controller, the two ranks' and their Gloo's, and the store's.
    assert len(addresses) >= 9
    # 127.x.y.z, little-endian; as IPv4, or mapped into IPv6.
    assert [a for a in addresses if not re.fullmatch(r"(0{16}FFFF0000)?[0-9A-F]{6}7F", a)] == []
    assert last(str(run)) < (2, 0)

    # The last image of the second epoch now decodes to other pixels.
    bad = places(shards, "train")[plan(shards).order(1)[-1]]
    flip_in_the_middle(bad)
    second = Run(shards, str(tmp_path), 2, 2, notes=notes)
    second.wait_for("continuing after epoch ")
    met = time.monotonic()
    assert second.end() == 1, second.text
    assert time.monotonic() - met < PROMPT_S
    # One line, no second attempt, and no step of that image's batch.
    (line,) = [line for line in second.lines if f"{bad.key} of " in line]
    assert line == second.lines[-1]
    assert line.startswith(f"error: train image {bad.key} of {bad.shard}: it is not what was written: ")
    repair = f"rm {shards}/train/{bad.shard}.* && python jobs/shard_imagenet.py --source IMAGES --output {shards}"
    assert line.endswith(f"{repair}\n")
    assert not tracebacks(second.lines)
    assert second.text.count("continuing after") == 1
    assert "epoch 2/2 step 5/" not in second.text
    flip_in_the_middle(bad)

    (_, before), (name, _) = list(checkpoint.committed(str(run)).items())[-2:]
    newest = run / name / "model.safetensors"
    flip_bit(newest, newest.stat().st_size // 2)
    # From decoded pixels now: what a stage holds must not matter.
    stage = ["--stage", tmp_path / "disk", "--stage-as", "pixels"]
    third = Run(shards, str(tmp_path), 2, 2, *stage, checkpoint_every=0, notes=notes)
    third.wait_for(f"warning: {newest} is damaged: its sha256 is not the one in state.json; taking the checkpoint")
    third.wait_for(f"continuing after epoch {before.progress.epoch}, step {before.progress.step}, with")
    assert third.end() == 0, third.text
    assert "of pixels" in third.text
    # Ray Train's actors that look after clusters would complain, for want of a dashboard or of their own accord.
    assert "PlacementGroupCleaner" not in third.text
    assert "PreemptionWatcher" not in third.text
    assert_alike(pair, str(run), shards, 2, 2, notes)


@pytest.mark.long
def test_a_killed_worker_a_hanging_one_and_a_killed_controller_change_nothing(
    pair: Path, shard_set: Path, tmp_path: Path
) -> None:
    notes = tmp_path / "notes"
    first = Run(shard_set, str(tmp_path), 2, 2, notes=notes, RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S="6")
    first.wait_for("epoch 1/2 step 3/5")
    os.kill(first.worker(), signal.SIGKILL)
    first.wait_for("failure 1 of at most 4: rank ")
    assert "starting again from the last checkpoint" in first.lines[-1]
    first.wait_for("epoch 1/2 step 4/5")
    os.kill(first.worker(), signal.SIGSTOP)
    first.wait_for("failure 2 of at most 4: rank ")
    assert "WorkerHealthCheckTimeoutError: A worker health check has been hanging for" in first.lines[-1]
    first.wait_for("epoch 2/2 step 1/5")
    # As the kernel ends the controller when memory is short.
    begun = len(first.lines)
    controllers = [pid for pid, line in below(first.process.pid).items() if "TrainController" in line]
    os.kill(controllers[0], signal.SIGKILL)
    assert first.end() == 1, first.text
    assert first.lines[-1].startswith("error: Ray Train's controller died ("), first.text
    assert first.lines[-1].endswith("; the same command continues from the last checkpoint\n")
    assert not tracebacks(first.lines[begun:])

    second = Run(shard_set, str(tmp_path), 2, 2, notes=notes)
    second.wait_for("continuing after epoch ")
    assert second.end() == 0, second.text
    assert_alike(pair, str(tmp_path / "run"), shard_set, 2, 2, notes)


@pytest.mark.long
def test_a_run_on_s3_is_stopped_resumed_finished_and_known_again(shard_set: Path, tmp_path: Path, s3: str) -> None:
    alone = undisturbed(shard_set, tmp_path / "alone", 1, 1)
    storage, run = (f"s3://runs/{place}{s3_options(s3)}" for place in ("here", "here/run"))
    first = Run(shard_set, storage, 1, 1, notes=tmp_path / "notes")
    first.wait_for("epoch 1/1 step 1/5")
    os.kill(first.worker(), signal.SIGTERM)
    assert first.end() == 1, first.text
    assert "SIGTERM to rank 0 on" in first.text
    epoch, step = last(run)
    assert f"error: stopped after epoch {epoch}, step {step}, with a checkpoint" in first.lines[-1]

    second = Run(shard_set, storage, 1, 1, notes=tmp_path / "notes")
    assert second.end() == 0, second.text
    assert f"continuing after epoch {epoch}, step {step}" in second.text
    assert_alike(alone, run, shard_set, 1, 1, tmp_path / "notes")

    again = Run(shard_set, storage, 1, 1)
    assert again.end() == 0, again.text
    assert "the run run is finished already" in again.text
