"""A run that begins with trained weights: of a checkpoint or a run, with the same classes or others.

`test_checkpoint` has it on two ranks, `test_signals` as a whole run.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from jobs.training import checkpoint
from jobs.training.checkpoint import MODEL_FILE
from jobs.training.resume import initialize
from jobs.training.run_state import CheckpointError, State
from jobs.training.worker import make_network
from model.progress import Progress
from model.recipe import Recipe
from model.schedule import Plateau
from tests.damage import flip_bit
from tests.model.test_training import IDENTITY, make_trainer
from tests.shard_sets import s3_options

FIVE = dataclasses.replace(IDENTITY, recipe=Recipe(seed=7), wnids=("a", "b", "c", "d", "e"))
ROW = {"top1_error": 0.5}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of an AlexNet of five classes, with one checkpoint."""
    run = tmp_path_factory.mktemp("trained") / "run"
    (run / "checkpoint_0001_000000").mkdir(parents=True)
    progress = Progress(Plateau(0.001), epoch=1, history=[ROW])
    checkpoint.save_network(run / "checkpoint_0001_000000", make_network(FIVE), State(FIVE, progress))
    return run


@pytest.mark.slow
@pytest.mark.parametrize(("place", "classes"), [(".", 5), ("checkpoint_0001_000000", 3)])
def test_the_weights_are_taken_and_a_last_layer_of_other_classes_is_the_recipes(
    trained: Path, place: str, classes: int, capsys: pytest.CaptureFixture[str]
) -> None:
    own = dataclasses.replace(FIVE, recipe=Recipe(seed=8, hidden_bias=0.1), wnids=FIVE.wnids[:classes])
    network = make_network(own)
    drawn = {name: tensor.clone() for name, tensor in network.state_dict().items() if name.startswith("fc8")}
    initialize(network, own, str(trained / place))
    theirs = load_file(trained / "checkpoint_0001_000000" / MODEL_FILE)
    for name, tensor in network.state_dict().items():
        assert tensor.equal(drawn[name] if name in drawn and classes == 3 else theirs[name]), name
    assert not theirs["fc8.weight"][:3].equal(drawn["fc8.weight"][:3])
    (line,) = capsys.readouterr().out.splitlines()
    anew = "they tell 5 classes apart, the set has 3, so the last layer is made anew"
    assert line.startswith("starting with the weights of ")
    assert (anew in line) == (classes == 3)


def test_another_networks_weights_are_refused_by_what_differs(trained: Path) -> None:
    own = dataclasses.replace(FIVE, recipe=dataclasses.replace(FIVE.recipe, groups=2, normalization="caffe"))
    told = r"groups is 2 here and 1 there \(--groups 1\); normalization is caffe here and lrn there \(--normalization"
    with pytest.raises(CheckpointError, match=f"another network's: {told}"):
        initialize(torch.nn.Identity(), own, str(trained))


def test_what_holds_no_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist or is no folder"):
        initialize(torch.nn.Identity(), FIVE, str(tmp_path / "none"))
    checkpoint.save_network(tmp_path, torch.nn.Linear(1, 1), State(FIVE, Progress(Plateau(0.001))))
    with pytest.raises(CheckpointError, match="does not fit this network: bias, weight differ"):
        initialize(torch.nn.Identity(), FIVE, str(tmp_path))


def test_a_damaged_checkpoint_is_no_beginning_and_one_at_a_url_is(tmp_path: Path, s3: str, client: Any) -> None:
    source, trainer = tmp_path / "checkpoint", make_trainer()
    source.mkdir()
    with torch.no_grad():
        for parameter in trainer.network.parameters():
            parameter.fill_(5)
    checkpoint.save_network(source, trainer.network, State(IDENTITY, trainer.progress))
    for path in source.iterdir():
        client.upload_file(str(path), "runs", f"a/checkpoint/{path.name}")
    network = make_trainer().network
    initialize(network, IDENTITY, f"s3://runs/a/checkpoint{s3_options(s3)}")
    assert all(bool((parameter == 5).all()) for parameter in network.parameters())
    flip_bit(source / MODEL_FILE, 500)
    with pytest.raises(CheckpointError, match="is damaged: its sha256 is not the one"):
        initialize(network, IDENTITY, str(source))
