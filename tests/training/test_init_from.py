"""A run that begins with trained weights: of a checkpoint, a run or an file, with the same classes or others."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import boto3
import pytest
import torch
from safetensors.torch import load_file, save_file

from jobs import export
from jobs.training import checkpoint
from jobs.training.checkpoint import MODEL_FILE
from jobs.training.resume import initialize, resume
from jobs.training.run_state import CheckpointError, RunFingerprint, State
from jobs.training.worker import make_network
from model.progress import Progress
from model.recipe import Recipe
from model.schedule import Plateau
from model.training import Trainer, Worker
from tests.damage import flip_bit
from tests.model.test_training import IDENTITY, RECIPE, make_trainer
from tests.processes import run_here
from tests.ranks import run_ranks
from tests.runs import Run, command

FIVE = dataclasses.replace(IDENTITY, recipe=Recipe(seed=7), wnids=("a", "b", "c", "d", "e"))
ROW = {"top1_error": 0.5}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of an AlexNet of five classes, with one checkpoint, and beside it the same exported."""
    run = tmp_path_factory.mktemp("trained") / "run"
    (run / "checkpoint_0001_000000").mkdir(parents=True)
    progress = Progress(Plateau(0.001), epoch=1, history=[ROW])
    checkpoint.save_network(run / "checkpoint_0001_000000", make_network(FIVE), State(FIVE, progress))
    export.main(export.ExportConfig(str(run), run.parent / "exported.safetensors"))
    return run


@pytest.mark.parametrize("place", [".", "checkpoint_0001_000000", "../exported.safetensors"])
@pytest.mark.parametrize("classes", [5, 3])
def test_the_weights_are_taken_and_a_last_layer_of_other_classes_is_the_recipes(
    trained: Path, place: str, classes: int, capsys: pytest.CaptureFixture[str]
) -> None:
    own = dataclasses.replace(FIVE, recipe=Recipe(seed=8, hidden_bias=0.1), wnids=FIVE.wnids[:classes])
    network, drawn = make_network(own), make_network(own).state_dict()
    initialize(network, own, str(trained / place))
    theirs = load_file(trained / "checkpoint_0001_000000" / MODEL_FILE)
    for name, tensor in network.state_dict().items():
        assert tensor.equal(drawn[name] if name.startswith("fc8") and classes == 3 else theirs[name]), name
    assert not theirs["fc8.weight"][:3].equal(drawn["fc8.weight"][:3])
    (line,) = capsys.readouterr().out.splitlines()
    anew = "they tell 5 classes apart, the set has 3, so the last layer is made anew"
    assert line.startswith("starting with the weights of ")
    assert (anew in line) == (classes == 3)


@pytest.mark.parametrize("place", ["checkpoint_0001_000000", "../exported.safetensors"])
@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"groups": 2}, r"groups is 2 here and 1 there \(--groups 1\)"),
        ({"normalization": "caffe"}, r"normalization is caffe here and lrn there \(--normalization lrn\)"),
        (
            {"groups": 2, "normalization": "batch"},
            r"groups is 2 here and 1 there \(--groups 1\); normalization is batch here and lrn there",
        ),
    ],
)
def test_another_networks_weights_are_refused_by_what_differs(
    trained: Path, place: str, changed: dict[str, object], told: str
) -> None:
    own = dataclasses.replace(FIVE, recipe=dataclasses.replace(FIVE.recipe, **changed))  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=f"another network's: {told}"):
        initialize(torch.nn.Identity(), own, str(trained / place))


def test_what_holds_no_weights_is_refused(trained: Path, tmp_path: Path) -> None:
    network = torch.nn.Identity()
    with pytest.raises(CheckpointError, match="does not exist or is no folder"):
        initialize(network, FIVE, str(tmp_path / "none"))
    other = tmp_path / "other.safetensors"
    for told in ("No such file", "'__metadata__'", "header"):
        with pytest.raises(CheckpointError, match=rf"other\.safetensors is no file of jobs/export\.py \(.*{told}"):
            initialize(network, FIVE, str(other))
        if told == "No such file":
            save_file({"a": torch.zeros(1)}, other)
        else:
            other.write_bytes(b"\x80\x04}")  # How a pickle begins.
    save_file({"a": torch.zeros(1)}, other, {"recipe": json.dumps(dataclasses.asdict(FIVE.recipe))})
    with pytest.raises(CheckpointError, match="does not fit this network: a differ"):
        initialize(network, FIVE, str(other))


def save_small(folder: Path, first: int = 0) -> None:
    """A checkpoint of the small network whose parameters hold `first`, one more, and so on."""
    folder.mkdir()
    trainer = make_trainer()
    with torch.no_grad():
        for number, parameter in enumerate(trainer.network.parameters()):
            parameter.fill_(first + number)
    trainer.progress.epoch, trainer.progress.rate = 3, 0.7
    checkpoint.save(folder, trainer, IDENTITY)


def test_a_damaged_checkpoint_is_no_beginning_and_one_at_a_url_is(tmp_path: Path, s3: str) -> None:
    save_small(tmp_path / "checkpoint")
    bucket = boto3.client("s3", endpoint_url=f"http://{s3}")
    bucket.create_bucket(Bucket="runs")
    for path in (tmp_path / "checkpoint").iterdir():
        bucket.upload_file(str(path), "runs", f"a/checkpoint/{path.name}")
    network = make_trainer().network
    initialize(network, IDENTITY, f"s3://runs/a/checkpoint?region=us-east-1&scheme=http&endpoint_override={s3}")
    assert [float(parameter.detach().mean()) for parameter in network.parameters()] == [0, 1, 2, 3]
    flip_bit(tmp_path / "checkpoint" / MODEL_FILE, 500)
    with pytest.raises(CheckpointError, match="is damaged: its sha256 is not the one"):
        initialize(network, IDENTITY, str(tmp_path / "checkpoint"))


def begin(rank: int, world: int, folder: Path) -> None:
    """Each rank begins; only rank 0 can read the weights. A run that has a checkpoint then goes on with that."""
    for run, place in (("new", (0, 0)), ("old", (3, 0))):
        trainer = Trainer(make_trainer().network, RECIPE, Worker(rank, world, torch.device("cpu")))
        source = str(folder / ("source" if rank == 0 else "nowhere"))
        assert resume(str(folder / run), None, trainer, IDENTITY, source) == (run == "old")
        assert (trainer.progress.epoch, trainer.progress.step) == place
        assert trainer.progress.rate == (0.7 if run == "old" else None)
        assert not trainer.optimizer.state
        torch.save([parameter.detach() for parameter in trainer.network.parameters()], folder / f"{run}{rank}")


def test_rank_0_sends_the_weights_and_a_runs_own_checkpoint_comes_first(tmp_path: Path) -> None:
    for run in ("new", "old"):
        (tmp_path / run).mkdir()
    save_small(tmp_path / "old" / "checkpoint_0003_000000")
    save_small(tmp_path / "source", 10)
    run_ranks(2, tmp_path, begin, tmp_path)
    for rank in range(2):
        for run, first in (("new", 10), ("old", 0)):
            weights = torch.load(tmp_path / f"{run}{rank}", weights_only=True)
            assert [float(one.mean()) for one in weights] == list(range(first, first + 4))


def test_a_run_keeps_to_the_weights_that_it_began_with() -> None:
    def of(init_from: str | None) -> RunFingerprint:
        return dataclasses.replace(IDENTITY, init_from=init_from or "")

    assert of("a").differences(of("a")) == of("a").differences(of(None)) == of(None).differences(of(None)) == []
    cure = "(leave --init-from out)"
    assert of("a").differences(of("b")) == [f"the initial weights are b, were a {cure}"]
    assert of(None).differences(of("b")) == [f"the initial weights are b, were drawn by the recipe {cure}"]


def test_two_beginnings_exclude_each_other(tmp_path: Path) -> None:
    done = run_here("train", *command(tmp_path, "runs", 1, 1, "--init-from", "a", "--from-checkpoint", "b")[1:])
    assert done.returncode == 2
    assert "--init-from and --from-checkpoint exclude each other" in done.stderr


@pytest.mark.slow
def test_a_run_begins_with_another_runs_weights_and_says_so(pair: Path, shard_set: Path, tmp_path: Path) -> None:
    """At a rate of 0 they stay as they are."""
    newest = pair / "checkpoint_0002_000000"
    flags = ("--lr", 0, "--init-from", newest)
    run = Run(shard_set, str(tmp_path), 2, 1, *flags)
    run.wait_for(f"starting with the weights of {newest}")
    assert run.end() == 0, run.text
    saved = tmp_path / "run" / "checkpoint_0001_000000"
    assert (saved / MODEL_FILE).read_bytes() == (newest / MODEL_FILE).read_bytes()
    state = checkpoint.read_state(saved)
    assert (state.identity.init_from, state.progress.epoch) == (str(newest), 1)
    for more, told in ((flags, "is finished already"), (("--lr", 0), "is finished already")):
        done = run_here("train", *command(shard_set, str(tmp_path), 2, 1, *more)[1:])
        assert done.returncode == 0, done.stderr
        assert told in done.stdout
    done = run_here("train", *command(shard_set, str(tmp_path), 2, 1, "--lr", 0, "--init-from", pair)[1:])
    assert done.returncode == 1
    assert f"the initial weights are {pair}, were {newest} (leave --init-from out)" in done.stderr
