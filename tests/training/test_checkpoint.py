"""A run's checkpoint: data alone, of one run alone, whole or refused."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from jobs.training import checkpoint
from jobs.training.checkpoint import MODEL_FILE, OPTIMIZER_FILE
from jobs.training.resume import resume
from jobs.training.run_state import DECODER_CURES, STATE_FILE, CheckpointError, DamagedError, State
from jobs.training.run_storage import local_checkpoint
from model.training import Trainer, Worker
from pipeline.loading.graph import decoder_name
from tests.damage import flip_bit, resealed
from tests.model.test_training import IDENTITY, RECIPE, Recorder, SmallData, Stopped, make_trainer
from tests.ranks import run_ranks


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    record = Recorder(tmp_path, stop_after=3)
    with pytest.raises(Stopped):
        make_trainer().fit(SmallData(), record)
    return record.saved[-1]


def test_a_checkpoint_holds_no_code(saved: Path) -> None:
    assert sorted(path.name for path in saved.iterdir()) == ["model.safetensors", "optimizer.safetensors", "state.json"]


def test_another_runs_checkpoint_is_refused_by_name(saved: Path) -> None:
    recipe = dataclasses.replace(RECIPE, lr=0.1, groups=2)
    with pytest.raises(CheckpointError, match=r"lr is 0\.1, was 0\.05; groups is 2, was 1\. Use another --name"):
        checkpoint.restore(saved, make_trainer(recipe), dataclasses.replace(IDENTITY, recipe=recipe))
    with pytest.raises(CheckpointError, match="the shard set is other, was fingerprint"):
        checkpoint.restore(saved, make_trainer(), dataclasses.replace(IDENTITY, dataset="other"))


def test_another_decoder_or_precision_is_refused_with_what_brings_the_first_back(saved: Path) -> None:
    """Either would change what is learned without a word."""
    on_gpu = dataclasses.replace(IDENTITY, decoder="nvjpeg-cuda", precision="bfloat16")
    with pytest.raises(CheckpointError) as found:
        checkpoint.restore(saved, make_trainer(), on_gpu)
    assert "the JPEG decoder is nvjpeg-cuda, was libjpeg-turbo (--no-gpus, or " in str(found.value)
    assert "the precision is bfloat16, was float32 (--precision float32)" in str(found.value)


@pytest.mark.parametrize(
    ("pixels", "gpu", "name"),
    [(False, False, "libjpeg-turbo"), (True, True, "libjpeg-turbo"), (False, True, "nvjpeg-hardware")],
)
def test_every_decoder_has_a_cure(pixels: bool, gpu: bool, name: str) -> None:
    assert decoder_name(pixels, gpu, "hardware") == name
    assert name in DECODER_CURES


@pytest.mark.parametrize("was_on_gpu", [False, True])
@pytest.mark.parametrize("is_on_gpu", [False, True])
@pytest.mark.parametrize(
    ("was", "now"), [("jpeg", "pixels"), ("pixels", "jpeg"), ("jpeg", "jpeg"), ("pixels", "pixels")]
)
def test_another_kind_of_stage_is_refused_where_its_pixels_differ(
    was: str, now: str, was_on_gpu: bool, is_on_gpu: bool
) -> None:
    """Only a GPU's own decoder gives others: a CPU's are those of a cache of pixels."""
    first, second = (
        dataclasses.replace(IDENTITY, decoder=decoder_name(kind == "pixels", gpu))
        for kind, gpu in ((was, was_on_gpu), (now, is_on_gpu))
    )
    by_gpu = [kind == "jpeg" and gpu for kind, gpu in ((was, was_on_gpu), (now, is_on_gpu))]
    found = first.differences(second)
    assert bool(found) == (by_gpu[0] != by_gpu[1])
    if found:
        cure = "--gpus --gpu-decoder cuda --stage-as jpeg" if by_gpu[0] else "--stage DIR --stage-as pixels on GPUs"
        assert found[0].startswith("the JPEG decoder is ")
        assert cure in found[0]


@pytest.mark.parametrize("field", ["decoder", "precision"])
def test_a_state_of_an_unknown_decoder_or_precision_is_refused(saved: Path, field: str) -> None:
    value = json.loads((saved / "state.json").read_text())
    value["identity"][field] = "another"
    (saved / "state.json").write_text(resealed(value))
    with pytest.raises(CheckpointError, match="'another' is none of"):
        checkpoint.restore(saved, make_trainer(), IDENTITY)
    del value["identity"][field]
    (saved / "state.json").write_text(resealed(value))
    with pytest.raises(CheckpointError, match=field):
        checkpoint.restore(saved, make_trainer(), IDENTITY)


def test_a_longer_run_may_continue_a_finished_one(tmp_path: Path) -> None:
    record = Recorder(tmp_path / "a")
    make_trainer().fit(SmallData(), record)
    longer = dataclasses.replace(RECIPE, epochs=5)
    trainer, rest = make_trainer(longer), Recorder(tmp_path / "b")
    checkpoint.restore(record.saved[-1], trainer, dataclasses.replace(IDENTITY, recipe=longer))
    trainer.fit(SmallData(), rest)
    assert [row["epoch"] for row in rest.rows] == [5]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_refused(saved: Path, name: str) -> None:
    path = saved / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=name):
        checkpoint.restore(saved, make_trainer(), IDENTITY)
    path.unlink()
    with pytest.raises(CheckpointError, match=name):
        checkpoint.restore(saved, make_trainer(), IDENTITY)


def test_another_networks_weights_are_refused(saved: Path) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 4))
    with pytest.raises(CheckpointError, match=r"does not fit this network: 4\.weight, 4\.bias"):
        checkpoint.load_network(saved, network)


def test_a_state_survives_json(saved: Path) -> None:
    progress = checkpoint.read_state(saved).progress
    assert (progress.epoch, progress.step) == (1, 0)
    assert math.isfinite(progress.history[0]["val_loss"])
    assert checkpoint.read_state(saved).identity == IDENTITY


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with the last checkpoints of one of four epochs: each of the second and third epoch."""
    record = Recorder(tmp_path / "record")
    make_trainer().fit(SmallData(), record)
    for folder in record.saved[3:9]:
        progress = checkpoint.read_state(folder).progress
        shutil.copytree(folder, tmp_path / "run" / f"checkpoint_{progress.epoch:04d}_{progress.step:06d}")
    return tmp_path / "run"


def place(run: Path) -> tuple[int, int]:
    """Where a trainer is that goes on with a run."""
    trainer = make_trainer()
    assert resume(str(run), None, trainer, IDENTITY)
    return trainer.progress.epoch, trainer.progress.step


@pytest.mark.parametrize("name", [MODEL_FILE, OPTIMIZER_FILE, STATE_FILE])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.999])
def test_a_flipped_bit_in_any_file_is_found_and_the_checkpoint_before_is_taken(
    run: Path, name: str, part: float, capsys: pytest.CaptureFixture[str]
) -> None:
    assert place(run) == (3, 0)
    path = run / "checkpoint_0003_000000" / name
    flip_bit(path, int(part * path.stat().st_size))
    with pytest.raises(DamagedError, match=name):
        checkpoint.restore(path.parent, make_trainer(), IDENTITY)
    assert place(run) == (2, 4)
    if name != STATE_FILE:
        assert f"{path} is damaged: its sha256 is not the one in state.json; taking the checkpoint before it" in (
            capsys.readouterr().out
        )
    # From now on it is none: what is written next is the newest, and the best is one of the others.
    assert list(checkpoint.committed(str(run)))[-1] == "checkpoint_0002_000004"
    with local_checkpoint(str(run)) as (location, _):
        assert location == str(run / "checkpoint_0002_000000")


@pytest.mark.parametrize("name", [f"checkpoint_{epoch:04d}_{step:06d}" for epoch, step in [(1, 2), (2, 0), (3, 0)]])
@pytest.mark.parametrize("files", [(), (STATE_FILE,), (MODEL_FILE,), (MODEL_FILE, OPTIMIZER_FILE, STATE_FILE)])
def test_a_checkpoint_removed_by_hand_leaves_the_others(run: Path, name: str, files: tuple[str, ...]) -> None:
    """Its folder, or some of what is in it."""
    for file in files:
        (run / name / file).unlink()
    if not files:
        shutil.rmtree(run / name)
    assert place(run) == ((2, 4) if name == "checkpoint_0003_000000" else (3, 0))
    with local_checkpoint(str(run)) as (_, folder):
        assert checkpoint.read_state(folder).progress.step == 0


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_anew(run: Path) -> None:
    for path in run.glob(f"*/{MODEL_FILE}"):
        flip_bit(path, path.stat().st_size // 2)
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"no checkpoint of .* is whole: .*Use another --name"):
            place(run)
    for path in run.glob(f"*/{STATE_FILE}"):
        path.write_text("{")
    with pytest.raises(CheckpointError, match=r"no checkpoint of .* is whole: .*Use another --name"):
        checkpoint.committed(str(run))


def test_a_damaged_state_is_said_and_the_others_are_used(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run / "checkpoint_0002_000002" / STATE_FILE
    flip_bit(path, path.stat().st_size // 2)
    assert len(checkpoint.committed(str(run))) == 5
    assert f"warning: left out: {path} is no state.json of this program" in capsys.readouterr().err


def test_a_new_run_begins_at_a_chosen_checkpoint_and_goes_on_with_its_own(run: Path, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    for _ in range(2):
        trainer = make_trainer()
        assert resume(str(tmp_path / "new"), str(run / "checkpoint_0002_000002"), trainer, IDENTITY)
        assert (trainer.progress.epoch, trainer.progress.step) == (2, 2)
    shutil.copytree(run / "checkpoint_0002_000004", tmp_path / "new" / "checkpoint_0002_000004")
    assert resume(str(tmp_path / "new"), str(run / "checkpoint_0002_000002"), trainer, IDENTITY)
    assert (trainer.progress.epoch, trainer.progress.step) == (2, 4)


def test_the_newest_two_and_the_best_stay(run: Path) -> None:
    errors = {1: 0.5, 2: 0.25, 3: 0.25, 4: 0.75}
    states = {}
    for epoch in range(1, 5):
        for step in (0, 2):
            progress = checkpoint.read_state(run / "checkpoint_0002_000000").progress
            progress.epoch, progress.step = epoch, step
            progress.history[-1]["top1_error"] = errors[epoch]
            states[f"{epoch}-{step}"] = State(IDENTITY, progress)
    gone = set(checkpoint.superfluous(states, 2))
    assert set(states) - gone == {"2-0", "3-0", "4-0", "4-2"}
    assert checkpoint.best(states) == "2-0"
    assert set(states) - set(checkpoint.superfluous(states, 1)) == {"2-0", "4-0", "4-2"}


def shared(rank: int, world: int, run: str, folder: Path) -> None:
    """Each rank resumes; rank 1 sees a folder without checkpoints, as with a read that goes wrong."""
    trainer = Trainer(make_trainer().network, RECIPE, Worker(rank, world, torch.device("cpu")))
    with torch.no_grad():
        for parameter in trainer.network.parameters():
            parameter.fill_(rank)
    assert resume(run if rank == 0 else str(folder / "nowhere"), None, trainer, IDENTITY)
    checkpoint.save(folder / str(rank), trainer, IDENTITY)


def test_all_ranks_go_on_with_what_rank_0_read(run: Path, tmp_path: Path) -> None:
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
    run_ranks(2, tmp_path, shared, str(run), tmp_path)
    for name in (MODEL_FILE, OPTIMIZER_FILE, STATE_FILE):
        written = (run / "checkpoint_0003_000000" / name).read_bytes()
        assert [(tmp_path / str(rank) / name).read_bytes() == written for rank in range(2)] == [True, True]
