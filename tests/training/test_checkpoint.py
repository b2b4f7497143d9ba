"""A run's checkpoint: data alone, of one run alone, whole or refused."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest
from torch import nn

from jobs.training import checkpoint
from jobs.training.checkpoint import DECODER_CURES, CheckpointError
from pipeline.loading.graph import decoder_name
from tests.model.test_training import IDENTITY, RECIPE, Recorder, SmallData, Stopped, make_trainer


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


@pytest.mark.parametrize("field", ["decoder", "precision"])
def test_a_state_of_an_unknown_decoder_or_precision_is_refused(saved: Path, field: str) -> None:
    value = json.loads((saved / "state.json").read_text())
    value["identity"][field] = "another"
    (saved / "state.json").write_text(json.dumps(value))
    with pytest.raises(CheckpointError, match="'another' is none of"):
        checkpoint.restore(saved, make_trainer(), IDENTITY)
    del value["identity"][field]
    (saved / "state.json").write_text(json.dumps(value))
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
def listed(saved: Path, tmp_path: Path) -> Path:
    """A run with one checkpoint, and Ray Train's list of it."""
    run = tmp_path / "run"
    shutil.copytree(saved, run / "checkpoint_0001")
    results = {"checkpoint_results": [{"checkpoint_dir_name": "checkpoint_0001"}], "latest_checkpoint_result": None}
    (run / checkpoint.RUN_FILE).write_text(json.dumps(results))
    return run


def test_a_list_that_is_just_written_is_read_again(listed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Train empties the file, then writes it: the first look finds nothing, the second a part, the third all."""
    path = listed / checkpoint.RUN_FILE
    whole = path.read_text()
    looks = iter([whole[: len(whole) // 2], whole])
    path.write_text("")
    monkeypatch.setattr(checkpoint.time, "sleep", lambda _: path.write_text(next(looks)))
    assert list(checkpoint.committed(str(listed))) == ["checkpoint_0001"]
    assert next(looks, None) is None


def test_of_a_list_that_stays_half_written_the_one_before_is_taken(
    listed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a full disk leaves it: whoever evaluates or reports then has the checkpoints before."""
    path = listed / checkpoint.RUN_FILE
    (listed / checkpoint.SPARE_FILE).write_text(path.read_text())
    path.write_text("")
    monkeypatch.setattr(checkpoint, "LIST_WAIT_S", 0.0)
    assert list(checkpoint.committed(str(listed))) == ["checkpoint_0001"]
    assert path.read_text() == ""


def test_a_list_that_stays_half_written_is_an_error_in_words(listed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = listed / checkpoint.RUN_FILE
    path.write_text(path.read_text()[:-1])
    monkeypatch.setattr(checkpoint, "LIST_WAIT_S", 0.0)
    with pytest.raises(CheckpointError, match=f"{checkpoint.RUN_FILE} is half written.*training command again"):
        checkpoint.committed(str(listed))
