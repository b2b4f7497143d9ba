"""What the observer of real runs accepts is each of the plan's samples once, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.loading.plan import Plan
from tests.observer import assert_trained_once

PLAN = Plan(23, 5, 7, np.zeros((3, 3)))


def notes(world: int, first: int, last: int, checkpoint: int) -> list[dict[str, Any]]:
    """Of workers who train steps `first` to `last`, counted from 1, and write one checkpoint."""
    lines: list[dict[str, Any]] = []
    for done in range(first, last + 1):
        epoch, step = divmod(done - 1, PLAN.steps)
        place = {"epoch": epoch, "step": step + 1}
        for rank, (planned, *_) in enumerate(PLAN.epoch(epoch, step, rank, world) for rank in range(world)):
            samples = planned.samples.tolist()
            who = {"worker": f"{rank} from {first}", "first": done == first, "rank": rank, "world": world}
            lines.append({**place, **who, "samples": samples})
        lines += [place] * (done == checkpoint)
    return lines


def prove(path: Path, lines: list[dict[str, Any]], steps: int) -> list[int]:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return assert_trained_once(path, PLAN, steps)


def test_a_run_that_was_resumed_by_fewer_workers_is_proved(tmp_path: Path) -> None:
    # Of the last step, a fault left one worker's note.
    lines = [*notes(3, 1, 7, 5)[:-2], *notes(2, 6, 9, 9)]
    assert prove(tmp_path / "notes", lines, 9) == [3, 2]


def test_a_worker_that_was_given_up_and_wakes_later_undoes_nothing(tmp_path: Path) -> None:
    late = notes(3, 1, 7, 5)[-1]
    for world in (2, 3):
        taken_over = notes(world, 6, 9, 9)
        assert prove(tmp_path / "notes", [*notes(3, 1, 7, 5)[:-1], *taken_over, late], 9) == list(
            dict.fromkeys((3, world))
        )


def test_what_is_not_the_plan_is_refused(tmp_path: Path) -> None:
    path, lines = tmp_path / "notes", notes(2, 1, 9, 5)
    assert prove(path, lines, 9) == [2]
    for wrong in (
        lines[:-2],
        [*lines[:6], *lines[8:]],
        [*lines[:-1], lines[-1] | {"samples": lines[-1]["samples"][::-1]}],
        [*lines, *notes(2, 7, 9, 9)],
    ):
        with pytest.raises(AssertionError):
            prove(path, wrong, 9)
