"""Runs jobs/train.py with workers that note what each step was trained on, and tells whether that was the plan.

    python tests/observer.py NOTES --data SHARDS ...

All workers append to the file NOTES: a line for each of their steps, and one for each checkpoint. If there is a file
NOTES.fault, rank 1 removes it and has its DALI fail once, as where memory is short, for what it decodes third.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast
from unittest import mock

from nvidia import dali
from ray.train import get_context

from jobs import train
from jobs.cli.command import run
from jobs.training.config import TrainConfig
from jobs.training.worker import Reporter, train_worker
from model.metrics import LabeledImages
from model.training import StepAction, Trainer
from pipeline.loading.loader import Batch
from pipeline.loading.plan import Plan


def observed(notes: str) -> Callable[[TrainConfig], dict[str, Any]]:
    """`train_worker`, noting. Ray sends it to the workers by value, as it is defined in `__main__`."""

    def train_observed(config: TrainConfig) -> dict[str, Any]:
        trained, write = Reporter.on_step_end, Reporter.checkpoint
        first, worker = True, uuid.uuid4().hex

        def note(trainer: Trainer, **more: object) -> None:
            place = {"epoch": trainer.progress.epoch, "step": trainer.progress.step}
            with open(notes, "a") as file:
                file.write(json.dumps(place | more) + "\n")

        def note_step(
            self: Reporter, trainer: Trainer, batches: Sequence[LabeledImages], own_seconds: float
        ) -> StepAction:
            nonlocal first
            samples = [sample for batch in batches for sample in cast(Batch, batch).samples.tolist()]
            rank, world = trainer.worker.rank, trainer.worker.world
            note(trainer, worker=worker, first=first, rank=rank, world=world, samples=samples)
            first = False
            return trained(self, trainer, batches, own_seconds)

        def note_checkpoint(self: Reporter, trainer: Trainer) -> None:
            note(trainer)
            write(self, trainer)

        decode, calls = dali.Pipeline.run, itertools.count(1)

        def fail_once(self: dali.Pipeline, *arguments: object) -> object:
            if next(calls) == 3 and get_context().get_world_rank() == 1 and os.path.exists(f"{notes}.fault"):
                os.remove(f"{notes}.fault")
                raise RuntimeError("CUDA runtime API error cudaErrorMemoryAllocation (2): out of memory")
            return decode(self, *arguments)

        with (
            mock.patch.multiple(Reporter, on_step_end=note_step, checkpoint=note_checkpoint),
            mock.patch.object(dali.Pipeline, "run", fail_once),
        ):
            return train_worker(config)

    return train_observed


def assert_trained_once(notes: Path, plan: Plan, steps: int) -> list[int]:
    """Each of a run's steps was trained on the plan's samples in the plan's order, once.

    Those that a fault undid do not count, nor what a worker on a host that was cut off notes after others took over.

    Returns:
        the number of workers, and each to which it changed.
    """
    trained: dict[int, dict[tuple[int, int], list[int]]] = {}
    checkpoints = {0}
    workers: dict[int, str] = {}
    began = 0, 0
    for line in notes.read_text().splitlines():
        note = json.loads(line)
        done = note["epoch"] * plan.steps + note["step"]
        if "samples" not in note:
            checkpoints.add(done)
            continue
        if note["first"] and began != (done, note["world"]):
            workers, began = {}, (done, note["world"])
        if note["first"]:
            workers[note["rank"]] = note["worker"]
        elif note["worker"] not in workers.values():
            continue
        assert not note["first"] or done - 1 in checkpoints, f"a worker began after step {done - 1}, no checkpoint"
        # A worker that begins again undoes all that came after its checkpoint.
        trained = {step: parts for step, parts in trained.items() if step <= done}
        same = {part: samples for part, samples in trained.get(done, {}).items() if part[1] == note["world"]}
        trained[done] = same | {(note["rank"], note["world"]): note["samples"]}
    assert sorted(trained) == list(range(1, steps + 1))
    worlds: list[int] = []
    for done, parts in trained.items():
        epoch, step = divmod(done - 1, plan.steps)
        world = max(parts)[1]
        batch = [sample for rank in range(world) for sample in parts[rank, world]]
        wanted = plan.order(epoch)[step * plan.batch_size : (step + 1) * plan.batch_size].tolist()
        assert batch == wanted, f"step {step + 1} of epoch {epoch + 1}"
        worlds += [world] if worlds[-1:] != [world] else []
    return worlds


if __name__ == "__main__":
    with mock.patch.object(train, "train_worker", observed(sys.argv.pop(1))):
        run(TrainConfig, train.main)
