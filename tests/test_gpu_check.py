"""The comparison of the GPU's stream with the CPU's, with a CPU loader standing in for the GPU's: right, and wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs.gpu_check import GpuCheckError, check, compare
from pipeline.dataset import read_dataset
from pipeline.loader import Batch, Loader
from pipeline.plan import Plan, Views, colour_matrix
from pipeline.split_reader import SplitReader

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def loader(shard_set: Path) -> Loader:
    info = read_dataset(shard_set)
    return Loader(SplitReader(shard_set, info, "train"), info.rgb, 10, CPU, 2)


@pytest.fixture(scope="module")
def views(shard_set: Path) -> list[Views]:
    return list(Plan(45, 10, 1, colour_matrix(read_dataset(shard_set).rgb)).epoch(0))


@pytest.fixture(scope="module")
def batches(loader: Loader, views: list[Views]) -> list[Batch]:
    return list(loader.run(views))


def test_a_loader_agrees_with_another_and_is_timed(shard_set: Path) -> None:
    lines = check(shard_set, CPU, 8, 3, 1)
    assert [line.partition(":")[0] for line in lines[:3]] == ["training", "centre crop", "ten crops"]
    assert all(line.endswith("agrees") and "mean absolute difference 0.000" in line for line in lines[:3])
    assert all("images/s" in line for line in lines[3:])


def test_what_two_correct_decoders_may_differ_by_agrees(batches: list[Batch]) -> None:
    generator = torch.Generator().manual_seed(0)
    noisy = [
        dataclasses.replace(b, images=b.images + torch.randint(-1, 2, b.images.shape, generator=generator))
        for b in batches
    ]
    found = compare(batches, noisy)
    assert found.problems == ()
    assert found.images == 40
    assert found.mean == pytest.approx(2 / 3, abs=0.01)
    assert found.largest == pytest.approx(1.0, abs=1e-4)


def one_image(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[list[Batch]], list[Batch]]:
    """Changes one image [3, 227, 227] of the third batch."""

    def apply(batches: list[Batch]) -> list[Batch]:
        images = batches[2].images.clone()
        images[4] = change(images[4])
        return [*batches[:2], dataclasses.replace(batches[2], images=images), *batches[3:]]

    return apply


def spot(image: torch.Tensor) -> torch.Tensor:
    """A block of 16 x 16 damaged, as a lost part of a JPEG is: it is 0.5 % of the image."""
    image = image.clone()
    image[:, :16, :16] += 20
    return image


@pytest.mark.parametrize(
    ("flaw", "problem"),
    [
        (one_image(lambda image: image.roll(1, 2)), "beyond|mean"),
        (one_image(lambda image: image.flip(2)), "mean"),
        (one_image(lambda image: image.flip(0)), "mean"),
        (one_image(lambda image: image + 0.7), "mean difference in a channel"),
        (one_image(spot), "of its values differ by more than 5 levels"),
        (one_image(lambda image: image * torch.nan), "mean"),
        (lambda batches: batches[:-1], "ends"),
        (lambda batches: [], "ends"),
        (lambda batches: [dataclasses.replace(b, labels=b.labels.roll(1)) for b in batches], "labels differ"),
        (lambda batches: [dataclasses.replace(b, samples=np.roll(b.samples, 1)) for b in batches], "samples or"),
    ],
)
def test_pixels_labels_or_lengths_that_are_off_are_found(
    batches: list[Batch], flaw: Callable[[list[Batch]], list[Batch]], problem: str
) -> None:
    found = compare(batches, flaw(batches))
    assert len(found.problems) >= 1
    if "ends" not in problem and "labels" not in problem and "samples" not in problem:
        assert all("batch 2, sample " in text for text in found.problems)
    assert any(part in " ".join(found.problems) for part in problem.split("|"))


@pytest.mark.parametrize("flaw", ["window", "flip", "colour", "no colour"])
def test_a_plan_executed_wrongly_is_found(loader: Loader, views: list[Views], batches: list[Batch], flaw: str) -> None:
    wrong = {
        "window": [dataclasses.replace(v, crops=np.minimum(v.crops + 1, 29)) for v in views],
        "flip": [dataclasses.replace(v, flips=~v.flips) for v in views],
        "colour": [dataclasses.replace(v, shifts=-v.shifts) for v in views],
        "no colour": [dataclasses.replace(v, shifts=0 * v.shifts) for v in views],
    }[flaw]
    assert compare(batches, loader.run(wrong)).problems


def test_a_check_that_fails_says_where(shard_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Loader.run
    calls = iter(range(100))

    def shifted(self: Loader, views: list[Views]) -> object:
        off = next(calls) % 2 * 10.0  # Every other stream, the one in the GPU's place.
        return (dataclasses.replace(batch, images=batch.images + off) for batch in run(self, views))

    monkeypatch.setattr(Loader, "run", shifted)
    with pytest.raises(GpuCheckError, match=r"is not the CPU's: training, batch 0, sample .* levels of mean absolute"):
        check(shard_set, CPU, 8, 1, 1)
