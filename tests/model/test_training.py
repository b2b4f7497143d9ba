"""The loop: workers, micro-batches and interruptions change nothing of what is learned."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jobs.training import checkpoint
from jobs.training.run_state import RunFingerprint
from model.alexnet import AlexNet
from model.guards import DivergedError
from model.metrics import LabeledImages, Score
from model.recipe import Recipe
from model.training import StepAction, StoppedError, Trainer, Worker
from pipeline.images.rgb_stats import RgbStatistics
from tests.ranks import run_ranks

CPU = torch.device("cpu")
GLOBAL_BATCH = 3


@dataclasses.dataclass(frozen=True)
class Images:
    images: Tensor
    labels: Tensor


def global_batch() -> Images:
    generator = torch.Generator().manual_seed(0)
    images = 60 * torch.randn(GLOBAL_BATCH, 3, 227, 227, generator=generator)
    return Images(images, torch.randint(0, 10, (GLOBAL_BATCH,), generator=generator))


def one_step(micro_batch: int) -> dict[str, Tensor]:
    """The gradients of one step of AlexNet without dropout."""
    network = AlexNet(10, dropout=0.0)
    network.initialize(seed=1, hidden_bias=0.1)
    trainer = Trainer(network, Recipe(batch_size=GLOBAL_BATCH), Worker(0, 1, CPU))
    batch = global_batch()
    cuts = zip(batch.images.split(micro_batch), batch.labels.split(micro_batch), strict=True)
    trainer.step([Images(x, y) for x, y in cuts])
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def test_micro_batches_add_up() -> None:
    """`tests.training.test_loss_curve` has them in several workers."""
    whole = one_step(GLOBAL_BATCH)
    assert float(whole["fc8.weight"].abs().max()) > 1e-3
    for name, gradient in one_step(2).items():
        scale = float(whole[name].abs().max())
        torch.testing.assert_close(gradient, whole[name], rtol=0, atol=2e-5 * scale, msg=name)


class SmallData:
    """Five steps of four images an epoch, another order each time."""

    steps = 5

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self._images = torch.randn(20, 3, 4, 4, generator=generator)
        self._labels = torch.randint(0, 3, (20,), generator=generator)

    def training(self, epoch: int, first_step: int) -> Iterator[list[Images]]:
        order = torch.randperm(20, generator=torch.Generator().manual_seed(epoch))
        for step in range(first_step, self.steps):
            chosen = order[4 * step : 4 * step + 4]
            yield [Images(self._images[chosen], self._labels[chosen])]

    def validation(self) -> Iterator[Images]:
        yield Images(self._images, self._labels)


RECIPE = Recipe(batch_size=4, epochs=4, lr=0.05, seed=3)
STATISTICS = RgbStatistics(1, (0, 0, 0), (1, 1, 1), ((1, 0, 0),) * 3, (1, 1, 1), ((1, 0, 0),) * 3)
IDENTITY = RunFingerprint(RECIPE, "fingerprint", ("a", "b", "c"), STATISTICS)


def make_trainer(recipe: Recipe = RECIPE) -> Trainer:
    torch.manual_seed(11)
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 3))
    return Trainer(network, recipe, Worker(0, 1, CPU), log_every=2, checkpoint_every=2)


class Stopped(Exception):
    """A process that was killed."""


class Recorder:
    """Keeps checkpoints in folders, if there is one for them, and stops the run after so many."""

    def __init__(
        self,
        folder: Path | None,
        stop_after: int | None = None,
        identity: RunFingerprint = IDENTITY,
        wishes: dict[tuple[int, int], StepAction] | None = None,
        wishes_in_validation: dict[tuple[int, int], StepAction] | None = None,
    ) -> None:
        self.wishes = wishes or {}
        self.wishes_in_validation = wishes_in_validation or {}
        self.validated: list[int] = []
        self.identity = identity
        self.folder = folder
        self.stop_after = stop_after
        self.saved: list[Path] = []
        self.rows: list[dict[str, Any]] = []
        self.losses: list[float] = []
        self.warnings: list[str] = []

    def on_step_end(self, trainer: Trainer, batches: Sequence[LabeledImages], own_seconds: float) -> StepAction:
        return self.wishes.get((trainer.progress.epoch, trainer.progress.step), StepAction.NOTHING)

    def on_log(self, trainer: Trainer, score: Score, images_per_s: float, data_wait: float) -> None:
        assert 0 <= data_wait <= 1
        self.losses.append(score.loss)

    def on_epoch_end(self, trainer: Trainer, row: dict[str, Any]) -> None:
        self.rows.append({k: v for k, v in row.items() if "seconds" not in k})

    def on_validation_batch(self, trainer: Trainer) -> StepAction:
        self.validated.append(trainer.progress.epoch)
        place = trainer.progress.epoch, self.validated.count(trainer.progress.epoch)
        return self.wishes_in_validation.get(place, StepAction.NOTHING)

    def checkpoint(self, trainer: Trainer) -> None:
        if self.folder is None:
            return
        folder = self.folder / str(len(self.saved))
        folder.mkdir(parents=True)
        checkpoint.save(folder, trainer, self.identity)
        self.saved.append(folder)
        if len(self.saved) == self.stop_after:
            raise Stopped

    def on_warning(self, trainer: Trainer, warning: str) -> None:
        self.warnings.append(warning)


def weights(trainer: Trainer) -> list[Tensor]:
    return [p.detach().clone() for p in trainer.network.parameters()]


@pytest.mark.parametrize("stop_after", [1, 2, 3, 5, 8])
def test_a_resumed_run_ends_with_the_same_weights(tmp_path: Path, stop_after: int) -> None:
    whole, record = make_trainer(), Recorder(tmp_path / "whole")
    whole.fit(SmallData(), record)
    assert [row["epoch"] for row in record.rows] == [1, 2, 3, 4]
    assert len(record.saved) == 12

    stopped = Recorder(tmp_path / "stopped", stop_after)
    with pytest.raises(Stopped):
        make_trainer().fit(SmallData(), stopped)
    resumed, rest = make_trainer(), Recorder(tmp_path / "rest")
    torch.manual_seed(99)
    checkpoint.restore(stopped.saved[-1], resumed, IDENTITY)
    resumed.fit(SmallData(), rest)

    for a, b in zip(weights(whole), weights(resumed), strict=True):
        assert torch.equal(a, b)
    assert stopped.rows + rest.rows == record.rows


@pytest.mark.parametrize(("epoch", "step"), [(0, 1), (1, 3), (2, 5)])
def test_a_run_told_to_stop_leaves_a_checkpoint_and_ends_alike(tmp_path: Path, epoch: int, step: int) -> None:
    whole, record = make_trainer(), Recorder(tmp_path / "whole")
    whole.fit(SmallData(), record)
    stopped = Recorder(tmp_path / "stopped", wishes={(epoch, step): StepAction.STOP})
    with pytest.raises(StoppedError, match=f"after epoch {epoch}, step {step}"):
        make_trainer().fit(SmallData(), stopped)
    progress = checkpoint.read_state(stopped.saved[-1]).progress
    assert (progress.epoch, progress.step) == (epoch, step)

    resumed, rest = make_trainer(), Recorder(tmp_path / "rest")
    checkpoint.restore(stopped.saved[-1], resumed, IDENTITY)
    resumed.fit(SmallData(), rest)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(resumed), strict=True))
    # The sums of an epoch are added up in other parts.
    losses = [row["train_loss"] for row in stopped.rows + rest.rows]
    assert losses == pytest.approx([row["train_loss"] for row in record.rows], rel=1e-12)
    assert [row["val_loss"] for row in stopped.rows + rest.rows] == [row["val_loss"] for row in record.rows]


def test_a_checkpoint_by_the_clock_changes_nothing_of_what_is_learned(tmp_path: Path) -> None:
    whole = make_trainer()
    whole.fit(SmallData(), Recorder(tmp_path / "whole"))
    record = Recorder(tmp_path / "more", wishes={(1, 3): StepAction.CHECKPOINT, (2, 5): StepAction.CHECKPOINT})
    more = make_trainer()
    more.fit(SmallData(), record)
    places = [(p.epoch, p.step) for p in (checkpoint.read_state(folder).progress for folder in record.saved)]
    assert [place for place in places if place[0] == 1] == [(1, 0), (1, 2), (1, 3), (1, 4)]
    # At once, and not after the validation.
    assert [place for place in places if place[0] == 2] == [(2, 0), (2, 2), (2, 4), (2, 5)]
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(more), strict=True))


class ManyBatches(SmallData):
    """Validation in five batches."""

    def validation(self) -> Iterator[Images]:
        for images, labels in zip(self._images.split(4), self._labels.split(4), strict=True):
            yield Images(images, labels)


def test_a_stop_during_validation_is_followed_at_once_and_changes_no_decision(tmp_path: Path) -> None:
    """The same command validates again: the weights are the same, and so are all decisions of the schedule."""
    recipe = dataclasses.replace(RECIPE, epochs=500, patience=2)
    identity = dataclasses.replace(IDENTITY, recipe=recipe)

    def trainer() -> Trainer:
        # With a checkpoint at the stop and at the end alone.
        return Trainer(make_trainer().network, recipe, Worker(0, 1, CPU), checkpoint_epochs=recipe.epochs)

    whole, record = trainer(), Recorder(tmp_path / "whole", identity=identity)
    whole.fit(ManyBatches(), record)
    decisions = [row["epoch"] - 1 for row in record.rows if row["reason"]]
    assert len(decisions) == 4
    for epoch, batch in ((0, 1), (decisions[0], 5), (decisions[1] - 1, 3), (decisions[3], 2)):
        wish = {(epoch, batch): StepAction.STOP}
        stopped = Recorder(tmp_path / f"stopped{epoch}", identity=identity, wishes_in_validation=wish)
        with pytest.raises(StoppedError, match=f"after epoch {epoch}, step 5"):
            trainer().fit(ManyBatches(), stopped)
        assert stopped.validated.count(epoch) == batch
        (saved,) = stopped.saved
        progress = checkpoint.read_state(saved).progress
        assert (progress.epoch, progress.step, len(progress.history)) == (epoch, 5, epoch)
        resumed, rest = trainer(), Recorder(tmp_path / f"rest{epoch}", identity=identity)
        checkpoint.restore(saved, resumed, identity)
        resumed.fit(ManyBatches(), rest)
        assert stopped.rows + rest.rows == record.rows
        assert resumed.progress.schedule == whole.progress.schedule
        assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(resumed), strict=True))


def test_a_drain_during_validation_has_its_checkpoint_at_once_and_training_goes_on(tmp_path: Path) -> None:
    whole = make_trainer()
    whole.fit(ManyBatches(), Recorder(tmp_path / "whole"))
    record = Recorder(tmp_path / "drained", wishes_in_validation={(1, 2): StepAction.CHECKPOINT})
    trainer = make_trainer()
    trainer.fit(ManyBatches(), record)
    places = [(p.epoch, p.step) for p in (checkpoint.read_state(folder).progress for folder in record.saved)]
    assert [place for place in places if place[0] == 1] == [(1, 0), (1, 2), (1, 4), (1, 5)]
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(trainer), strict=True))


class UnevenData:
    """One of three workers' part of nine images a step; rank r validates in r + 1 batches."""

    steps = 2

    def __init__(self, rank: int) -> None:
        self._rank = rank
        generator = torch.Generator().manual_seed(rank)
        self._images = torch.randn(6, 3, 4, 4, generator=generator)
        self._labels = torch.randint(0, 3, (6,), generator=generator)

    def training(self, epoch: int, first_step: int) -> Iterator[list[Images]]:
        for step in range(first_step, self.steps):
            yield [Images(self._images[3 * step : 3 * step + 3], self._labels[3 * step : 3 * step + 3])]

    def validation(self) -> Iterator[Images]:
        size = 6 // (self._rank + 1)
        for images, labels in zip(self._images.split(size), self._labels.split(size), strict=True):
            yield Images(images, labels)


def stop_in_validation(rank: int, world: int, folder: Path) -> None:
    """Trains undisturbed, then with a stop after each of the first epoch's validation batches in turn."""
    recipe = dataclasses.replace(RECIPE, batch_size=9, epochs=2)
    identity = dataclasses.replace(IDENTITY, recipe=recipe)

    def trainer() -> Trainer:
        torch.manual_seed(5)
        layers = [nn.Flatten(), nn.Linear(48, 32), nn.BatchNorm1d(32, affine=False), nn.ReLU(), nn.Linear(32, 3)]
        return Trainer(nn.Sequential(*layers), recipe, Worker(rank, world, CPU))

    def kept(trainer: Trainer) -> list[Tensor]:
        return [tensor.clone() for tensor in trainer.network.state_dict().values()]

    whole, record = trainer(), Recorder(folder / f"whole{rank}", identity=identity)
    whole.fit(UnevenData(rank), record)
    for batch in (1, 2, 3):
        wish = {(0, batch): StepAction.STOP}
        stopped = Recorder(folder / f"stopped{rank}-{batch}", identity=identity, wishes_in_validation=wish)
        with pytest.raises(StoppedError, match="after epoch 0, step 2"):
            trainer().fit(UnevenData(rank), stopped)
        assert stopped.validated == [0] * batch
        resumed, rest = trainer(), Recorder(folder / f"rest{rank}-{batch}", identity=identity)
        # Each rank's own: the running statistics are those of all ranks already.
        checkpoint.restore(stopped.saved[-1], resumed, identity)
        resumed.fit(UnevenData(rank), rest)
        assert rest.rows == record.rows
        assert all(torch.equal(a, b) for a, b in zip(kept(whole), kept(resumed), strict=True))


def test_workers_with_other_numbers_of_validation_batches_stop_at_the_same_place(tmp_path: Path) -> None:
    run_ranks(3, tmp_path, stop_in_validation, tmp_path, timeout=timedelta(seconds=120))


def test_every_third_epoch_and_the_last_have_a_checkpoint(tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, epochs=7)
    torch.manual_seed(11)
    record = Recorder(tmp_path, identity=dataclasses.replace(IDENTITY, recipe=recipe))
    trainer = Trainer(make_trainer().network, recipe, Worker(0, 1, CPU), checkpoint_epochs=3)
    record.wishes = {(4, 2): StepAction.STOP}
    with pytest.raises(StoppedError):
        trainer.fit(SmallData(), record)
    record.wishes = {}
    trainer.fit(SmallData(), record)
    places = [(p.epoch, p.step) for p in (checkpoint.read_state(folder).progress for folder in record.saved)]
    assert places == [(3, 0), (4, 2), (6, 0), (7, 0)]
    assert len(record.rows) == 7


def test_an_epochs_row_counts_every_image(tmp_path: Path) -> None:
    trainer, record = make_trainer(), Recorder(tmp_path)
    trainer.fit(SmallData(), record)
    assert {(row["images"], row["val_images"]) for row in record.rows} == {(20, 20)}
    with torch.no_grad():
        trainer.network.eval()
        (batch,) = SmallData().validation()
        errors = trainer.network(batch.images).argmax(1) != batch.labels
    assert record.rows[-1]["top1_error"] == pytest.approx(float(errors.double().mean()))


def test_a_diverged_loss_stops_the_run_and_says_where(tmp_path: Path) -> None:
    trainer = make_trainer(dataclasses.replace(RECIPE, lr=1e30))
    with pytest.raises(DivergedError, match=r"epoch 1, steps \d to \d, at rate 1e\+30: start again with a lower --lr"):
        trainer.fit(SmallData(), Recorder(tmp_path))


@pytest.mark.parametrize(("rate", "cure"), [(1e-5, "with a lower --lr"), (1e-10, "so low a rate is not the cause; ")])
def test_a_lower_rate_is_advised_only_where_it_can_help(tmp_path: Path, rate: float, cure: str) -> None:
    trainer = make_trainer(dataclasses.replace(RECIPE, lr=rate))
    poison(trainer, 1, math.nan)
    with pytest.raises(DivergedError, match=f"at rate {rate:g}: .*{cure}"):
        trainer.fit(SmallData(), Recorder(tmp_path))


def poison(trainer: Trainer, after: int, value: float) -> None:
    """Makes the gradients of one step, counted from 1, that many times as large."""
    steps = 0

    def hook(*_: object) -> None:
        nonlocal steps
        steps += 1
        if steps == after:
            for parameter in trainer.network.parameters():
                assert parameter.grad is not None
                parameter.grad.mul_(value)

    trainer.optimizer.register_step_pre_hook(hook)


@pytest.mark.parametrize(
    ("value", "cause"),
    [
        (math.nan, "the gradient's norm became nan"),
        (math.inf, "the gradient's norm became (inf|nan)"),
        (1e6, "the gradient exploded: its norm became"),
    ],
)
def test_a_bad_gradient_stops_the_run_before_its_checkpoint(tmp_path: Path, value: float, cause: str) -> None:
    trainer, record = make_trainer(), Recorder(tmp_path)
    poison(trainer, 9, value)
    # Two steps a window: the ninth step is the fourth of the second epoch.
    with pytest.raises(DivergedError, match=cause + r".* in epoch 2, steps 3 to 4, at rate 0\.05"):
        trainer.fit(SmallData(), record)
    progress = checkpoint.read_state(record.saved[-1]).progress
    assert (progress.epoch, progress.step) == (1, 2)


def test_a_dead_network_is_said_once() -> None:
    trainer = make_trainer(dataclasses.replace(RECIPE, epochs=110, patience=110))
    for parameter in trainer.network.parameters():
        nn.init.zeros_(parameter)
        parameter.register_hook(torch.zeros_like)
    record = Recorder(None)
    trainer.fit(SmallData(), record)
    (warning,) = record.warnings
    assert "for 500 steps" in warning
    assert "ln(3) = 1.099" in warning
    alive = Recorder(None)
    make_trainer(dataclasses.replace(RECIPE, epochs=110, patience=110)).fit(SmallData(), alive)
    assert not alive.warnings


def test_a_plateau_run_resumed_within_a_patience_count_ends_alike(tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, epochs=500, patience=2)
    identity = dataclasses.replace(IDENTITY, recipe=recipe)
    whole, record = make_trainer(recipe), Recorder(tmp_path / "whole", identity=identity)
    whole.fit(SmallData(), record)
    assert whole.progress.schedule.stopped
    assert whole.progress.schedule.reductions == 3
    assert [bool(row["reason"]) for row in record.rows].count(True) == 4
    waiting = [f for f in record.saved if checkpoint.read_state(f).progress.schedule.bad_epochs == 1]
    assert len(waiting) >= 4
    for folder in (waiting[0], waiting[-1]):
        resumed = make_trainer(recipe)
        checkpoint.restore(folder, resumed, identity)
        done = resumed.progress.epoch
        rest = Recorder(None)
        resumed.fit(SmallData(), rest)
        assert rest.rows == record.rows[done:]
        assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(resumed), strict=True))
