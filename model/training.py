"""The training loop: epochs of steps over data that is handed in, on any number of workers.

A worker's loss is weighted by its part of the global batch, so the workers' averaged gradient is the global batch's
whatever the cut. Dropout is reseeded at each step from (seed, epoch, step, rank): there is no generator state to keep.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from model.guards import DivergedError, Window, dead_network, diverged, divergence, flat_steps
from model.metrics import LabeledImages, Score, batch_metrics, evaluate
from model.optimizer import make_optimizer, resume_rate, set_rate
from model.parallel import InFlightStepLimit, SharedStatistics, data_parallel, no_sync
from model.progress import Progress
from model.recipe import Recipe
from model.schedule import Plateau


class TrainingData(Protocol):
    """One worker's part of the data."""

    @property
    def steps(self) -> int:
        """Steps in an epoch."""

    def training(self, epoch: int, first_step: int) -> Iterator[Sequence[LabeledImages]]:
        """For each step from `first_step`, this worker's part of the global batch as one or more micro-batches."""

    def validation(self) -> Iterator[LabeledImages]:
        """This worker's part of the validation images, each exactly once over all workers."""


@dataclasses.dataclass(frozen=True)
class Worker:
    """Where this process stands among all."""

    rank: int
    world: int
    device: torch.device
    precision: torch.dtype = torch.float32
    """float32, or bfloat16 for autocast."""


class StepAction(enum.Enum):
    """What is to be done after a step."""

    NOTHING = enum.auto()
    CHECKPOINT = enum.auto()
    STOP = enum.auto()
    """Write a checkpoint and leave."""


class StoppedError(Exception):
    """Training was told to stop, on every worker alike; the checkpoint is written."""


class Observer(Protocol):
    """Who is told of progress; every worker calls it alike."""

    def on_step_end(self, trainer: Trainer, batches: Sequence[LabeledImages], own_seconds: float) -> StepAction:
        """After each step, with what it was trained on.

        Args:
            own_seconds: from asking for the data to the end of the forward pass, before any worker waits for another.

        Returns:
            what is due now; the same on every worker.
        """

    def on_log(self, trainer: Trainer, score: Score, images_per_s: float, data_wait: float) -> None:
        """After some steps: their mean score, all workers' rate, and the fraction of time spent waiting for data."""

    def on_epoch_end(self, trainer: Trainer, row: dict[str, Any]) -> None:
        """After an epoch and its validation; `row` is new in the history."""

    def on_validation_batch(self, trainer: Trainer) -> StepAction:
        """After each batch of a validation; returns what is due now, the same on every worker."""

    def checkpoint(self, trainer: Trainer) -> None:
        """When a checkpoint is due."""

    def on_warning(self, trainer: Trainer, warning: str) -> None:
        """When something looks wrong that does not stop training."""


class Trainer:
    """Trains one network by one recipe, on this worker and in step with the others.

    Args:
        network: on `worker.device` already.
        recipe: what to do.
        worker: who this is; with more than one worker, torch.distributed must be initialized.
        log_every: tell the observer every so many steps.
        checkpoint_every: checkpoint every so many steps within an epoch; 0 for only at its end.
    """

    def __init__(
        self,
        network: nn.Module,
        recipe: Recipe,
        worker: Worker,
        log_every: int = 20,
        checkpoint_every: int = 0,
    ) -> None:
        self.network = network
        self.recipe = recipe
        self.worker = worker
        self.optimizer = make_optimizer(network, recipe)
        self.progress = Progress(Plateau(recipe.lr))
        self._log_every = log_every
        self._checkpoint_every = checkpoint_every
        self._classes = 0
        self._forward_ended = 0.0
        self._in_flight = InFlightStepLimit(worker.device)
        self._parallel = data_parallel(network, worker.world, recipe.gradient_compression)
        self._statistics = SharedStatistics(network, worker.world)

    def fit(self, data: TrainingData, observer: Observer) -> None:
        """Trains from where `progress` stands until the schedule stops or the epochs are used up.

        Raises:
            DivergedError: if the loss or the gradient is not finite or explodes; on every worker alike.
            StoppedError: if the observer says so.
        """
        while not self.progress.finished:
            started, before = time.perf_counter(), self.progress.sums[0]
            self._train_epoch(data, observer)
            train = Score.of(torch.tensor(self.progress.sums, dtype=torch.float64))
            train_seconds = time.perf_counter() - started
            with self._autocast():
                sums = evaluate(self.network, self._watched(data.validation(), observer), self.worker.device)
            score = Score.of(self._all_reduce(sums))
            if not math.isfinite(score.loss):
                raise self._diverged(f"the validation loss became {score.loss}", data.steps, data.steps)
            row = self.progress.close_epoch(self.recipe, train, score)
            # Without what was trained before a stop, as its seconds are not known.
            row["images_in_train_seconds"], row["train_seconds"] = train.images - int(before), train_seconds
            row["seconds"] = time.perf_counter() - started
            observer.on_epoch_end(self, row)
            observer.checkpoint(self)

    def resume(self, progress: Progress) -> None:
        """Stands where `progress` says, once the network's and the optimizer's tensors are those of that moment."""
        self.progress = progress
        if progress.rate is not None:
            resume_rate(self.optimizer, progress.rate)

    def step(self, micro_batches: Sequence[LabeledImages]) -> Tensor:
        """One update from this worker's part of a global batch; float64 [4] of its sums, as `metrics.batch_metrics`."""
        self._seed()
        self.optimizer.zero_grad()
        sums = torch.zeros(4, dtype=torch.float64, device=self.worker.device)
        for number, batch in enumerate(micro_batches, start=1):
            # Gradients add up locally and are exchanged once, with the last micro-batch.
            with contextlib.nullcontext() if number == len(micro_batches) else no_sync(self._parallel):
                with self._autocast():
                    logits = self._parallel(batch.images)
                log_probabilities = F.log_softmax(logits.float(), dim=1)
                loss = F.nll_loss(log_probabilities, batch.labels, reduction="sum")
                self._forward_ended = time.perf_counter()
                # DDP averages over workers: times `world`, the average is the sum over the global batch.
                (loss * (self.worker.world / self.recipe.batch_size)).backward()
            sums += batch_metrics(log_probabilities.detach(), batch.labels)
            self._classes = log_probabilities.shape[1]
        self.optimizer.step()
        self._statistics.after_step()
        return sums

    def gradient_norm(self) -> Tensor:
        """The norm of the last step's gradient over all parameters, float32 [] on the device; nothing waits for it."""
        gradients = [p.grad for p in self.network.parameters() if p.grad is not None]
        return nn.utils.get_total_norm(gradients)

    def _train_epoch(self, data: TrainingData, observer: Observer) -> None:
        progress = self.progress
        self.network.train()
        recent = torch.zeros(4, dtype=torch.float64, device=self.worker.device)
        norm = torch.zeros((), device=self.worker.device)
        # Before the steps: one that explodes makes the weights as long as itself.
        weights = self._weight_norm()
        since, first, waited, highest = time.perf_counter(), progress.step, 0.0, 0.0
        steps = data.training(progress.epoch, progress.step)
        while progress.step < data.steps:
            asked = time.perf_counter()
            micro_batches = next(steps)
            waited += time.perf_counter() - asked
            progress.rate = self.recipe.rate(progress.schedule.lr, progress.epoch, progress.step, data.steps)
            set_rate(self.optimizer, progress.rate)
            highest = max(highest, progress.rate)
            recent += self.step(micro_batches)
            norm = torch.maximum(norm, self.gradient_norm())
            self._in_flight.after_step()
            progress.step += 1
            action = observer.on_step_end(self, micro_batches, self._forward_ended - asked)
            at_end = progress.step == data.steps
            by_count = self._checkpoint_every > 0 and progress.step % self._checkpoint_every == 0
            # The epoch's end has its own checkpoint, after the validation.
            if by_count and not at_end and action is StepAction.NOTHING:
                action = StepAction.CHECKPOINT
            due = action is not StepAction.NOTHING
            if at_end or due or progress.step % self._log_every == 0:
                score, window = self._window(recent, norm, weights, progress.step - first, highest)
                cause = divergence(window)
                if cause is not None:
                    raise self._diverged(cause, first + 1, progress.step)
                now = time.perf_counter()
                observer.on_log(self, score, score.images / (now - since), waited / (now - since))
                before, progress.flat_steps = progress.flat_steps, flat_steps(progress.flat_steps, window)
                warning = dead_network(before, progress.flat_steps, data.steps, window.classes)
                if warning is not None:
                    observer.on_warning(self, warning)
                recent.zero_()
                norm, weights = torch.zeros_like(norm), self._weight_norm()
                since, first, waited, highest = now, progress.step, 0.0, 0.0
                self._do(action, observer)

    def _watched(self, batches: Iterator[LabeledImages], observer: Observer) -> Iterator[LabeledImages]:
        """Yields this worker's validation batches. After each one, all workers do what is due.

        A run that stops here goes on with the same validation, as its checkpoint holds all steps of the epoch.
        """
        batch = next(batches, None)
        # Some workers may have a batch more than others.
        while self._all_reduce(torch.tensor(int(batch is not None))) > 0:
            if batch is not None:
                yield batch
            self._in_flight.after_step()
            self._do(observer.on_validation_batch(self), observer)
            batch = next(batches, None)

    def _do(self, action: StepAction, observer: Observer) -> None:
        if action is not StepAction.NOTHING:
            observer.checkpoint(self)
        if action is StepAction.STOP:
            raise StoppedError(f"after epoch {self.progress.epoch}, step {self.progress.step}")

    def _seed(self) -> None:
        """Seeds the generator that dropout draws from. torch.manual_seed seeds those of every device: over 260 us."""
        place = [self.recipe.seed, self.progress.epoch, self.progress.step, self.worker.rank]
        seed = int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0] >> np.uint64(1))
        if self.worker.device.type == "cuda":
            with torch.cuda.device(self.worker.device):
                torch.cuda.manual_seed(seed)
        else:
            torch.default_generator.manual_seed(seed)

    def _weight_norm(self) -> Tensor:
        return nn.utils.get_total_norm([p.detach() for p in self.network.parameters()])

    def _window(self, recent: Tensor, norm: Tensor, weights: Tensor, steps: int, rate: float) -> tuple[Score, Window]:
        """All workers' score over the last steps, which joins the epoch's sums, and what the guards look at.

        The norms ride on the one exchange that the score needs; they are the same on every worker already, as the
        gradients have been averaged, so that the exchange only makes sure.
        """
        total = self._all_reduce(torch.cat([recent, torch.stack([norm, weights]).double() / self.worker.world]))
        *sums, gradient_norm, weight_norm = total.tolist()
        self.progress.sums = [a + b for a, b in zip(self.progress.sums, sums, strict=True)]
        score = Score.of(total[:4])
        return score, Window(steps, score.loss, gradient_norm, weight_norm, rate, self._classes)

    def _diverged(self, cause: str, first: int, last: int) -> DivergedError:
        return diverged(cause, self.progress.epoch + 1, first, last, self.progress.rate or 0.0)

    def _all_reduce(self, sums: Tensor) -> Tensor:
        total = sums.clone()
        if self.worker.world > 1:
            distributed.all_reduce(total)
        return total

    def _autocast(self) -> torch.autocast:
        precision = self.worker.precision
        return torch.autocast(self.worker.device.type, precision, enabled=precision != torch.float32)
