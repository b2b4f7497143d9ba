"""A run's checkpoint: data alone, of one run alone, whole or refused."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.training import checkpoint
from jobs.training.checkpoint import MODEL_FILE, OPTIMIZER_FILE
from jobs.training.resume import resume
from jobs.training.run_state import STATE_FILE, CheckpointError, DamagedError, State
from jobs.training.run_storage import local_checkpoint
from model.progress import Progress
from model.training import Trainer, Worker
from pipeline.loading.graph import GpuDecoder, decoder_name
from pipeline.storage import remote
from pipeline.storage.locations import join
from tests.damage import flip_bit
from tests.model.test_training import IDENTITY, RECIPE, Recorder, SmallData, make_trainer
from tests.ranks import run_ranks

FILES = (MODEL_FILE, OPTIMIZER_FILE, STATE_FILE)
NEWEST, BEFORE = "checkpoint_0003_000000", "checkpoint_0002_000000"


@pytest.fixture
def saved(undisturbed: tuple[Trainer, Recorder]) -> Path:
    """A checkpoint of the first epoch's end."""
    return undisturbed[1].saved[2]


def test_a_checkpoint_holds_no_code_and_its_state_survives_json(saved: Path) -> None:
    assert sorted(path.name for path in saved.iterdir()) == ["model.safetensors", "optimizer.safetensors", "state.json"]
    state = checkpoint.read_state(saved)
    assert (state.progress.epoch, state.progress.step, len(state.progress.history)) == (1, 0, 1)
    assert state.identity == IDENTITY
    # With a field that older checkpoints have.
    assert Progress.from_json(state.progress.to_json() | {"best_error": 0.5}) == state.progress


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"recipe": dataclasses.replace(RECIPE, lr=0.1, groups=2)},
            r"lr is 0\.1, was 0\.05; groups is 2, was 1\. Use another",
        ),
        ({"dataset": "other"}, "the shard set is other, was fingerprint"),
        ({"precision": "bfloat16"}, r"the precision is bfloat16, was float32 \(--precision float32\)"),
        ({"init_from": "b"}, r"the initial weights are b, were drawn by the recipe \(leave --init-from out\)"),
    ],
)
def test_another_runs_checkpoint_is_refused_by_what_differs(saved: Path, change: dict[str, Any], told: str) -> None:
    with pytest.raises(CheckpointError, match=told):
        checkpoint.restore(saved, make_trainer(), dataclasses.replace(IDENTITY, **change))


@pytest.mark.parametrize(
    ("pixels", "gpu", "kind", "cure"),
    [
        (False, False, "cuda", "--no-gpus, or --stage DIR --stage-as pixels on GPUs"),
        (True, True, "cuda", "--no-gpus, or --stage DIR --stage-as pixels on GPUs"),
        (False, True, "cuda", "--gpus --gpu-decoder cuda --stage-as jpeg"),
        (False, True, "hardware", "--gpus --gpu-decoder hardware --stage-as jpeg"),
    ],
)
def test_a_checkpoint_of_another_decoder_is_refused_with_what_brings_the_first_back(
    pixels: bool, gpu: bool, kind: GpuDecoder, cure: str
) -> None:
    """Only a GPU's own decoder gives other pixels: a CPU's are those of a cache of pixels."""
    was = dataclasses.replace(IDENTITY, decoder=decoder_name(pixels, gpu, kind))
    (told,) = was.differences(dataclasses.replace(IDENTITY, decoder="another"))
    assert told == f"the JPEG decoder is another, was {was.decoder} ({cure})"


def test_where_a_runs_first_weights_are_from_may_be_left_out() -> None:
    begun = dataclasses.replace(IDENTITY, init_from="a")
    assert begun.differences(begun) == begun.differences(IDENTITY) == []


def test_a_longer_run_may_continue_a_finished_one(undisturbed: tuple[Trainer, Recorder], tmp_path: Path) -> None:
    longer = dataclasses.replace(RECIPE, epochs=5)
    trainer, rest = make_trainer(longer), Recorder(tmp_path)
    checkpoint.restore(undisturbed[1].saved[-1], trainer, dataclasses.replace(IDENTITY, recipe=longer))
    trainer.fit(SmallData(), rest)
    assert [row["epoch"] for row in rest.rows] == [5]


@pytest.fixture
def run(undisturbed: tuple[Trainer, Recorder], tmp_path: Path) -> Path:
    """A run with the last checkpoints of one of four epochs: each of the second and third epoch."""
    for folder in undisturbed[1].saved[3:9]:
        progress = checkpoint.read_state(folder).progress
        shutil.copytree(folder, tmp_path / "run" / f"checkpoint_{progress.epoch:04d}_{progress.step:06d}")
    return tmp_path / "run"


def place(run: Path) -> tuple[int, int]:
    """Where a trainer is that goes on with a run."""
    trainer = make_trainer()
    assert resume(str(run), None, trainer, IDENTITY)
    return trainer.progress.epoch, trainer.progress.step


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [0.1, 0.5, 0.999, "cut", "gone"])
def test_damage_of_any_file_is_found_and_the_checkpoint_before_is_taken(
    run: Path, name: str, damage: float | str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A flipped bit, a file that ends in the middle, or none."""
    assert place(run) == (3, 0)
    path = run / NEWEST / name
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        flip_bit(path, int(float(damage) * path.stat().st_size))
    with pytest.raises(DamagedError, match=name):
        checkpoint.restore(path.parent, make_trainer(), IDENTITY)
    assert place(run) == (2, 4)
    # From now on it is none: what is written next is the newest, and the best is one of the others.
    assert list(checkpoint.committed(str(run)))[-1] == "checkpoint_0002_000004"
    with local_checkpoint(str(run)) as (location, _):
        assert location == str(run / BEFORE)
    # A folder without a state is one that was not finished.
    told = "".join(capsys.readouterr())
    assert (str(path) in told) == ((name, damage) != (STATE_FILE, "gone"))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(("code", "folder"), [(errno.EIO, NEWEST), (errno.EIO, ""), (errno.ESTALE, NEWEST)])
def test_one_unreadable_file_is_damage_and_a_storage_that_is_away_is_not(
    run: Path, name: str, code: int, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Path.read_bytes

    def read_bytes(path: Path) -> bytes:
        if folder in str(path) and path.name == name:
            raise OSError(code, os.strerror(code), str(path))
        return whole(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    if (code, folder) == (errno.EIO, NEWEST):
        assert place(run) == (2, 4)
        assert list(checkpoint.committed(str(run)))[-1] == "checkpoint_0002_000004"
    else:
        with pytest.raises(OSError, match=os.strerror(code)):
            place(run)


@pytest.mark.parametrize("name", [MODEL_FILE, STATE_FILE])
@pytest.mark.parametrize("unreadable", [False, True])
def test_where_the_best_checkpoint_is_damaged_the_next_best_is_taken(
    run: Path, name: str, unreadable: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By all that take a run's best: evaluation, the export, the report, --init-from."""
    whole, damaged = Path.read_bytes, set()

    def read_bytes(path: Path) -> bytes:
        if unreadable and path in damaged:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return whole(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    for place in (NEWEST, BEFORE):  # The better of the two first.
        with local_checkpoint(str(run)) as (location, folder):
            assert location == str(folder) == str(run / place)
        damaged.add(run / place / name)
        flip_bit(run / place / name, 1000)
        capsys.readouterr()
        with contextlib.suppress(CheckpointError), local_checkpoint(str(run)):
            pass
        assert str(run / place) in capsys.readouterr().err
    with pytest.raises(CheckpointError, match=r"finished epoch|epoch's end"), local_checkpoint(str(run)):
        pass


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


def test_a_run_that_another_tool_copied_to_googles_store_is_found(run: Path, gcs: str) -> None:
    """No object stands for its folders."""
    url = f"gs://anonymous@bucket/run?scheme=http&endpoint_override={gcs}"
    for name in FILES:
        remote.write(join(url, NEWEST, name), (run / NEWEST / name).read_bytes())
    trainer = make_trainer()
    assert resume(url, None, trainer, IDENTITY)
    assert trainer.progress.epoch == 3


def test_a_new_run_begins_at_a_chosen_checkpoint_and_goes_on_with_its_own(run: Path, tmp_path: Path) -> None:
    new, trainer = tmp_path / "new", make_trainer()
    new.mkdir()
    assert resume(str(new), str(run / "checkpoint_0002_000002"), trainer, IDENTITY)
    assert (trainer.progress.epoch, trainer.progress.step) == (2, 2)
    shutil.copytree(run / "checkpoint_0002_000004", new / "checkpoint_0002_000004")
    assert resume(str(new), str(run / "checkpoint_0002_000002"), trainer, IDENTITY)
    assert (trainer.progress.epoch, trainer.progress.step) == (2, 4)


def test_the_newest_two_and_the_best_stay(run: Path) -> None:
    states = {}
    for epoch, error in enumerate((0.5, 0.25, 0.25, 0.75), 1):
        for step in (0, 2):
            progress = checkpoint.read_state(run / BEFORE).progress
            progress.epoch, progress.step = epoch, step
            progress.history[-1]["top1_error"] = error
            states[f"{epoch}-{step}"] = State(IDENTITY, progress)
    assert checkpoint.best(states) == "2-0"
    assert set(states) - set(checkpoint.superfluous(states, 2)) == {"2-0", "3-0", "4-0", "4-2"}
    assert set(states) - set(checkpoint.superfluous(states, 1)) == {"2-0", "4-0", "4-2"}
    # The newest count among the best, so no more than two stay where the newest are the best.
    first = dict(list(states.items())[:3])
    assert set(first) - set(checkpoint.superfluous(first, 1)) == {"1-2", "2-0"}


def begin(rank: int, world: int, run: str, folder: Path) -> None:
    """Each rank resumes a run, and begins one with given weights; rank 1 sees neither, as with reads that go wrong."""
    for kind, place in (("old", run), ("new", str(folder / "empty"))):
        trainer = Trainer(make_trainer().network, RECIPE, Worker(rank, world, torch.device("cpu")))
        with torch.no_grad():
            for parameter in trainer.network.parameters():
                parameter.fill_(rank)
        place, source = (place, f"{run}/{BEFORE}") if rank == 0 else (str(folder / "nowhere"), "nothing")
        assert resume(place, None, trainer, IDENTITY, source) == (kind == "old")
        saved = folder / f"{kind}{rank}"
        saved.mkdir()
        checkpoint.save_tensors(saved, trainer)
        checkpoint.save_network(saved, trainer.network, State(IDENTITY, trainer.progress))


def test_all_ranks_have_what_rank_0_read_and_a_runs_own_checkpoint_comes_before_given_weights(
    run: Path, tmp_path: Path
) -> None:
    run_ranks(2, tmp_path, begin, str(run), tmp_path)
    for rank in range(2):
        old, new = tmp_path / f"old{rank}", tmp_path / f"new{rank}"
        assert [(old / name).read_bytes() == (run / NEWEST / name).read_bytes() for name in FILES] == [True] * 3
        assert (new / MODEL_FILE).read_bytes() == (run / BEFORE / MODEL_FILE).read_bytes()
        begun = checkpoint.read_state(new)
        assert (begun.progress.epoch, begun.progress.rate) == (0, None)
        assert checkpoint.load_tensors(new, OPTIMIZER_FILE, begun) == {}
