"""The sample ledger: a digest of what each step was trained on, and the proof that every epoch used its plan once.

A run's folder holds `ledger/EPOCH_STEP.json`, one file from a checkpoint to the next, named by its first step:

    {"epoch": 0, "step": 40, "workers": 2, "digests": ["1f3c...", ...]}

Each worker digests the samples that its loader handed over, not those that it asked for; the workers' digests add up
to the global batch's, which therefore does not depend on their number. A resumed run drops the files that begin at its
checkpoint or later, as it drops the steps.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from pyarrow import fs as arrow_fs
from torch import distributed

from model.training import Worker
from pipeline.plan import Plan
from pipeline.storage import join, open_location, read_text

FOLDER = "ledger"
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class LedgerError(ValueError):
    """A ledger that is missing, damaged, or does not say what the plan says."""


def digest(first: int, samples: NDArray[np.int64]) -> int:
    """Digests samples (int64 [n]) at positions first, first + 1, ... of a global batch to 64 bits.

    Digests of the parts of a batch add up, modulo 2^64, to that of the whole; samples in another order give another.
    """
    return int(_terms(np.arange(first, first + len(samples)), samples).sum(dtype=np.uint64))


def _terms(positions: NDArray[np.int64], samples: NDArray[np.int64]) -> NDArray[np.uint64]:
    return _mix(_mix(positions.astype(np.uint64)) ^ samples.astype(np.uint64))


def _mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64 (Steele, Lea, Flood 2014, figure 16), which takes equal and neighbouring words far apart."""
    words = words + _GOLDEN
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


class Ledger:
    """Collects one worker's digests and, with the others', writes them; all workers call it alike.

    Args:
        run: the run's folder, a path or URL.
        worker: who this is; worker 0 writes.
    """

    def __init__(self, run: str, worker: Worker) -> None:
        self._filesystem, self._folder = open_location(join(run, FOLDER))
        self._worker = worker
        self._start = (0, 0)
        self._digests: list[int] = []

    def begin(self, epoch: int, step: int) -> None:
        """Starts before a step, counted from 0, and drops what an interrupted run wrote of it and of later ones."""
        self._start, self._digests = (epoch, step), []
        if self._worker.rank == 0:
            for path, start in _files(self._filesystem, self._folder):
                if start >= self._start:
                    self._filesystem.delete_file(path)

    def add(self, first: int, samples: NDArray[np.int64]) -> None:
        """Notes a step: this worker's samples (int64 [n]), the first of which is at position `first` of the batch."""
        self._digests.append(digest(first, samples))

    def flush(self, epoch: int, step: int) -> None:
        """Writes the steps since the last time; the next is `step`, counted from 0, of `epoch`.

        Raises:
            OSError: if the file cannot be written.
        """
        start, digests = self._start, self._digests
        self._start, self._digests = (epoch, step), []
        if not digests:
            return
        total = torch.from_numpy(np.array(digests, np.uint64).view(np.int64)).to(self._worker.device)
        if self._worker.world > 1:
            distributed.all_reduce(total)
        if self._worker.rank == 0:
            words = [f"{word:016x}" for word in total.cpu().numpy().view(np.uint64).tolist()]
            entry = {"epoch": start[0], "step": start[1], "workers": self._worker.world, "digests": words}
            self._filesystem.create_dir(self._folder, recursive=True)
            with self._filesystem.open_output_stream(f"{self._folder}/{start[0]:04d}_{start[1]:06d}.json") as stream:
                stream.write(json.dumps(entry).encode())


@dataclasses.dataclass(frozen=True)
class Proof:
    """What a ledger proves: each of these steps was trained on once, with the plan's samples in the plan's order."""

    epochs: int
    """Whole epochs."""
    steps: int
    """All steps, those of an unfinished last epoch included."""
    workers: tuple[int, ...]
    """The numbers of workers that did it, in the order of training."""


def prove(run: str, plan: Plan) -> Proof:
    """Checks the ledger of a run at a path or URL against its plan.

    Raises:
        LedgerError: naming the first step that is missing, repeated or was trained on other samples.
    """
    filesystem, folder = open_location(join(run, FOLDER))
    digests: dict[int, list[str]] = {}
    workers: list[int] = []
    for path, (epoch, step) in _files(filesystem, folder):
        entry = _read(filesystem, path)
        row = digests.setdefault(epoch, [])
        if len(row) != step or (step == 0 and epoch > 0 and len(digests.get(epoch - 1, [])) != plan.steps):
            what = "repeats" if len(row) > step else "misses"
            raise LedgerError(f"{path} begins at step {step + 1} of epoch {epoch + 1}, but the ledger {what} steps")
        row += entry["digests"]
        if workers[-1:] != [entry["workers"]]:
            workers.append(entry["workers"])
    if not digests:
        raise LedgerError(f"{folder} holds no ledger: the run has no checkpoint, or its ledger was removed")
    for epoch, row in digests.items():
        if len(row) > plan.steps:
            raise LedgerError(f"epoch {epoch + 1} has {len(row)} steps in {folder}, the plan has {plan.steps}")
        wanted = _planned(plan, epoch)
        wrong = [step for step, word in enumerate(row) if int(word, 16) != wanted[step]]
        if wrong:
            raise LedgerError(
                f"step {wrong[0] + 1} of epoch {epoch + 1} was trained on other samples than the plan's, or in another "
                f"order ({len(wrong)} such steps in the epoch)"
            )
    return Proof(
        sum(len(row) == plan.steps for row in digests.values()), sum(map(len, digests.values())), tuple(workers)
    )


def _planned(plan: Plan, epoch: int) -> list[int]:
    """The digest of each step's global batch by the plan, whose epoch must be a permutation."""
    order = plan.order(epoch)
    if not np.array_equal(np.bincount(order, minlength=plan.samples), np.ones(plan.samples)):
        raise LedgerError(f"the plan of epoch {epoch + 1} does not hold each sample once")
    batches = order[: plan.steps * plan.batch_size].reshape(plan.steps, plan.batch_size)
    positions = np.broadcast_to(np.arange(plan.batch_size), batches.shape)
    return [int(word) for word in _terms(positions, batches).sum(axis=1, dtype=np.uint64)]


def _files(filesystem: arrow_fs.FileSystem, folder: str) -> Iterator[tuple[str, tuple[int, int]]]:
    """The ledger's files in the order of training: path, (epoch, step) of the first step."""
    selector = arrow_fs.FileSelector(folder, allow_not_found=True)
    for info in sorted(filesystem.get_file_info(selector), key=lambda info: str(info.base_name)):
        epoch, _, step = info.base_name.removesuffix(".json").partition("_")
        if info.base_name.endswith(".json") and epoch.isdigit() and step.isdigit():
            yield info.path, (int(epoch), int(step))


def _read(filesystem: arrow_fs.FileSystem, path: str) -> dict:
    try:
        entry = json.loads(read_text(filesystem, path))
        return {"workers": int(entry["workers"]), "digests": [f"{int(word, 16):016x}" for word in entry["digests"]]}
    except (ValueError, KeyError, TypeError) as error:
        raise LedgerError(f"{path} is no file of a ledger: {error!r}") from error
