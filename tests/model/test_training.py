"""The loop: workers, micro-batches and interruptions change nothing of what is learned."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jobs.training import checkpoint
from jobs.training.run_state import RunFingerprint, State
from model.metrics import LabeledImages, Score
from model.recipe import Recipe
from model.training import StepAction, StoppedError, Trainer, Worker
from pipeline.images.rgb_stats import RgbStatistics
from tests.ranks import run_ranks

CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True)
class Images:
    images: Tensor
    labels: Tensor


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


class Recorder:
    """Keeps checkpoints in folders, if there is one for them."""

    def __init__(
        self,
        folder: Path | None,
        identity: RunFingerprint = IDENTITY,
        wishes: dict[tuple[int, int], StepAction] | None = None,
        wishes_in_validation: dict[tuple[int, int], StepAction] | None = None,
    ) -> None:
        self.folder, self.identity = folder, identity
        self.wishes, self.wishes_in_validation = wishes or {}, wishes_in_validation or {}
        self.validated: list[int] = []
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
        checkpoint.save_tensors(folder, trainer)
        checkpoint.save_network(folder, trainer.network, State(self.identity, trainer.progress))
        self.saved.append(folder)

    def on_warning(self, trainer: Trainer, warning: str) -> None:
        self.warnings.append(warning)


class ManyBatches(SmallData):
    """Validation in batches of so many; of four, that is five."""

    def __init__(self, size: int = 4) -> None:
        super().__init__()
        self._size = size

    def validation(self) -> Iterator[Images]:
        for images, labels in zip(self._images.split(self._size), self._labels.split(self._size), strict=True):
            yield Images(images, labels)


def weights(trainer: Trainer) -> list[Tensor]:
    return [tensor.clone() for tensor in trainer.network.state_dict().values()]


def assert_same_weights(one: Trainer, other: Trainer) -> None:
    assert all(torch.equal(a, b) for a, b in zip(weights(one), weights(other), strict=True))


def places(record: Recorder) -> list[tuple[int, int]]:
    """Where the checkpoints were written: epochs and steps completed."""
    states = [checkpoint.read_state(folder).progress for folder in record.saved]
    return [(progress.epoch, progress.step) for progress in states]


def test_micro_batches_add_up() -> None:
    """`tests.training.test_loss_curve` has them in several workers."""
    (batch,) = SmallData().validation()

    def gradients(size: int) -> list[Tensor]:
        torch.manual_seed(11)
        trainer = Trainer(nn.Sequential(nn.Flatten(), nn.Linear(48, 3)), Recipe(batch_size=20), Worker(0, 1, CPU))
        cuts = zip(batch.images.split(size), batch.labels.split(size), strict=True)
        trainer.step([Images(x, y) for x, y in cuts])
        return [p.grad for p in trainer.network.parameters() if p.grad is not None]

    for whole, added in zip(gradients(20), gradients(7), strict=True):
        assert float(whole.abs().max()) > 1e-3
        torch.testing.assert_close(added, whole, rtol=1e-5, atol=1e-6)


def test_a_run_resumed_from_any_checkpoint_ends_with_the_same_weights(undisturbed: tuple[Trainer, Recorder]) -> None:
    whole, record = undisturbed
    for folder in record.saved:
        resumed, rest = make_trainer(), Recorder(None)
        torch.manual_seed(99)
        checkpoint.restore(folder, resumed, IDENTITY)
        done = resumed.progress.epoch
        resumed.fit(SmallData(), rest)
        assert_same_weights(whole, resumed)
        assert rest.rows == record.rows[done:]


@pytest.mark.parametrize(("epoch", "step"), [(0, 1), (1, 3), (2, 5)])
def test_a_run_told_to_stop_leaves_a_checkpoint_and_ends_alike(
    undisturbed: tuple[Trainer, Recorder], tmp_path: Path, epoch: int, step: int
) -> None:
    whole, record = undisturbed
    stopped = Recorder(tmp_path, wishes={(epoch, step): StepAction.STOP})
    with pytest.raises(StoppedError, match=f"after epoch {epoch}, step {step}"):
        make_trainer().fit(SmallData(), stopped)
    assert places(stopped)[-1] == (epoch, step)
    resumed, rest = make_trainer(), Recorder(None)
    checkpoint.restore(stopped.saved[-1], resumed, IDENTITY)
    resumed.fit(SmallData(), rest)
    assert_same_weights(whole, resumed)
    row = resumed.progress.history[epoch]
    assert (row["images"], row["images_in_train_seconds"]) == (20, 20 - 4 * step)
    # The sums of an epoch are added up in other parts.
    losses = [row["train_loss"] for row in stopped.rows + rest.rows]
    assert losses == pytest.approx([row["train_loss"] for row in record.rows], rel=1e-12)
    assert [row["val_loss"] for row in stopped.rows + rest.rows] == [row["val_loss"] for row in record.rows]


def test_a_checkpoint_at_any_moment_changes_nothing_of_what_is_learned(
    undisturbed: tuple[Trainer, Recorder], tmp_path: Path
) -> None:
    """By the clock after a step, or while a machine is drained, in a validation too: at once, and training goes on."""
    steps = {(1, 3): StepAction.CHECKPOINT, (2, 5): StepAction.CHECKPOINT}
    record = Recorder(tmp_path, wishes=steps, wishes_in_validation={(1, 2): StepAction.CHECKPOINT})
    more = make_trainer()
    more.fit(ManyBatches(), record)
    found = places(record)
    assert found[2:7] == [(1, 0), (1, 2), (1, 3), (1, 4), (1, 5)]
    assert found[7:11] == [(2, 0), (2, 2), (2, 4), (2, 5)]
    assert_same_weights(undisturbed[0], more)


def test_a_plateau_run_stopped_in_a_validation_ends_alike(tmp_path: Path) -> None:
    """It stops at once. The same command validates again: all decisions of the schedule are the same."""
    recipe = dataclasses.replace(RECIPE, epochs=500, patience=2)
    identity = dataclasses.replace(IDENTITY, recipe=recipe)

    def trainer() -> Trainer:
        return Trainer(make_trainer().network, recipe, Worker(0, 1, CPU))

    whole, record = trainer(), Recorder(None)
    whole.fit(ManyBatches(), record)
    schedule = whole.progress.schedule
    assert (schedule.reductions, schedule.stopped) == (3, True)
    decisions = [row["epoch"] - 1 for row in record.rows if row["reason"]]
    assert len(decisions) == 4
    for epoch, batch in ((decisions[0], 5), (decisions[3], 2)):
        wish = {(epoch, batch): StepAction.STOP}
        stopped = Recorder(tmp_path / str(epoch), identity=identity, wishes_in_validation=wish)
        with pytest.raises(StoppedError, match=f"after epoch {epoch}, step 5"):
            trainer().fit(ManyBatches(), stopped)
        assert stopped.validated.count(epoch) == batch
        saved = stopped.saved[-1]
        progress = checkpoint.read_state(saved).progress
        # In the midst of a patience count.
        assert (progress.epoch, progress.step, progress.schedule.bad_epochs) == (epoch, 5, 1)
        resumed, rest = trainer(), Recorder(None)
        checkpoint.restore(saved, resumed, identity)
        resumed.fit(ManyBatches(), rest)
        assert stopped.rows + rest.rows == record.rows
        assert resumed.progress.schedule == schedule
        assert_same_weights(whole, resumed)


def stop_and_resume(rank: int, world: int, folder: Path) -> None:
    """Trains undisturbed, and with a stop in the second epoch or after each of the first's validation batches.

    Rank r has r + 1 of these. Of three ranks' gradients and running statistics, the sum depends on their order.
    """
    recipe, data = dataclasses.replace(RECIPE, batch_size=12, epochs=2), ManyBatches(20 // (rank + 1) + 1)
    data._images, identity = data._images.roll(rank, 0), dataclasses.replace(IDENTITY, recipe=recipe)

    def trainer() -> Trainer:
        torch.manual_seed(5)
        layers = nn.Linear(48, 32), nn.BatchNorm1d(32, affine=False), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 3)
        return Trainer(nn.Sequential(nn.Flatten(), *layers), recipe, Worker(rank, world, CPU))

    whole, record = trainer(), Recorder(None)
    whole.fit(data, record)
    for batch in range(4):
        stopped = Recorder(folder / f"{rank}-{batch}", identity=identity)
        (stopped.wishes_in_validation if batch else stopped.wishes)[(0, batch) if batch else (1, 3)] = StepAction.STOP
        with pytest.raises(StoppedError):
            trainer().fit(data, stopped)
        assert places(stopped)[-1] == ((0, 5) if batch else (1, 3))
        assert stopped.validated == [0] * (batch or 3)
        resumed, rest = trainer(), Recorder(None)
        checkpoint.restore(stopped.saved[-1], resumed, identity)
        resumed.fit(data, rest)
        # The running statistics, too.
        assert_same_weights(whole, resumed)
        if batch:
            assert rest.rows == record.rows


def test_three_workers_stop_at_the_same_place_and_end_alike_with_batch_normalization(tmp_path: Path) -> None:
    run_ranks(3, tmp_path, stop_and_resume, tmp_path, timeout=timedelta(seconds=120))


def test_an_epochs_row_counts_every_image(undisturbed: tuple[Trainer, Recorder]) -> None:
    trainer, record = undisturbed
    assert {(row["images"], row["val_images"]) for row in record.rows} == {(20, 20)}
    with torch.no_grad():
        trainer.network.eval()
        (batch,) = SmallData().validation()
        errors = trainer.network(batch.images).argmax(1) != batch.labels
    assert record.rows[-1]["top1_error"] == pytest.approx(float(errors.double().mean()))
