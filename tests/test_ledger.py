"""The sample ledger: what it accepts is each sample once, and what it must not accept it names."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs.ledger import FOLDER, Ledger, LedgerError, Proof, digest, prove
from model.training import Worker
from pipeline.plan import Plan, share

PLAN = Plan(23, 5, 7, np.zeros((3, 3)))


def by_hand(first: int, samples: list[int]) -> int:
    """The digest by Python's integers, as the header of jobs/ledger.py and SplitMix64's paper define it."""

    def mix(word: int) -> int:
        word = (word + 0x9E3779B97F4A7C15) % 2**64
        word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) % 2**64
        return word ^ (word >> 31)

    return sum(mix(mix(first + i) ^ sample) for i, sample in enumerate(samples)) % 2**64


def train(run: Path, first: tuple[int, int], last: tuple[int, int], every: int = 2) -> None:
    """One worker trains from one (epoch, step) up to another by the plan, with a checkpoint every so many steps."""
    ledger = Ledger(str(run), Worker(0, 1, torch.device("cpu")))
    ledger.begin(*first)
    epoch, step = first
    while (epoch, step) < last:
        views = next(PLAN.epoch(epoch, step))
        ledger.add(0, views.samples)
        step += 1
        if step == PLAN.steps:
            epoch, step = epoch + 1, 0
        if step % every == 0:
            ledger.flush(epoch, step)


def test_the_digest_is_what_its_definition_says() -> None:
    samples = np.array([4, 1, 1_281_166, 0])
    assert digest(3, samples) == by_hand(3, samples.tolist())
    assert digest(0, samples) != digest(0, samples[::-1].copy())


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_the_workers_digests_add_up_to_the_batchs(world: int) -> None:
    samples = np.arange(100, 105)
    parts = [share(5, rank, world) for rank in range(world)]
    total = sum(digest(part.start, samples[part.start : part.stop]) for part in parts) % 2**64
    assert total == digest(0, samples)


def test_a_run_by_the_plan_is_proved(tmp_path: Path) -> None:
    train(tmp_path, (0, 0), (3, 0))
    assert prove(str(tmp_path), PLAN) == Proof(3, 12, (1,))


def test_a_resumed_run_drops_what_happens_again(tmp_path: Path) -> None:
    train(tmp_path, (0, 0), (1, 4))
    train(tmp_path, (1, 2), (2, 2))
    assert prove(str(tmp_path), PLAN) == Proof(2, 10, (1,))
    train(tmp_path, (0, 0), (0, 2))
    assert prove(str(tmp_path), PLAN) == Proof(0, 2, (1,))


def test_a_half_written_file_of_steps_that_happen_again_does_no_harm(tmp_path: Path) -> None:
    train(tmp_path, (0, 0), (0, 2))
    (tmp_path / FOLDER / "0000_000002.json").write_text('{"epoch": 0, "st')
    with pytest.raises(LedgerError, match="is no file of a ledger"):
        prove(str(tmp_path), PLAN)
    train(tmp_path, (0, 2), (1, 0))
    assert prove(str(tmp_path), PLAN) == Proof(1, 4, (1,))


def change(run: Path, name: str, **values: object) -> None:
    path = run / FOLDER / name
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_what_is_not_the_plan_is_named(tmp_path: Path) -> None:
    train(tmp_path, (0, 0), (2, 0))
    entry = json.loads((tmp_path / FOLDER / "0001_000002.json").read_text())["digests"]
    change(tmp_path, "0001_000002.json", digests=entry[::-1])
    with pytest.raises(LedgerError, match=r"step 3 of epoch 2 was trained on other samples .* \(2 such steps"):
        prove(str(tmp_path), PLAN)
    change(tmp_path, "0001_000002.json", digests=[*entry, entry[0]])
    with pytest.raises(LedgerError, match="epoch 2 has 5 steps"):
        prove(str(tmp_path), PLAN)


def test_steps_that_are_missing_or_repeated_are_named(tmp_path: Path) -> None:
    train(tmp_path, (0, 0), (2, 0))
    middle = tmp_path / FOLDER / "0000_000002.json"
    text = middle.read_text()
    middle.unlink()
    with pytest.raises(LedgerError, match="begins at step 1 of epoch 2, but the ledger misses steps"):
        prove(str(tmp_path), PLAN)
    (tmp_path / FOLDER / "0000_000001.json").write_text(text)
    with pytest.raises(LedgerError, match="begins at step 2 of epoch 1, but the ledger repeats steps"):
        prove(str(tmp_path), PLAN)


def test_no_ledger_is_no_proof(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="holds no ledger"):
        prove(str(tmp_path), PLAN)
