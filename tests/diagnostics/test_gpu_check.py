"""The comparison of the GPU's stream with the CPU's, with a CPU loader standing in for the GPU's: right, and wrong."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from jobs.diagnostics.gpu_check import DecodedOnHost, GpuCheckError, check, compare, equal, trained_alike
from model.recipe import RECIPES
from model.training import Trainer, Worker
from pipeline.dataset.info import read_dataset
from pipeline.dataset.split_reader import SplitReader
from pipeline.loading.loader import Batch, Loader
from pipeline.loading.plan import Plan, PlannedBatch, color_matrix

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def loader(shard_set: Path) -> Loader:
    info = read_dataset(shard_set)
    return Loader(SplitReader(shard_set, info, "train"), info.rgb, 10, CPU, 2)


@pytest.fixture(scope="module")
def planned(shard_set: Path) -> list[PlannedBatch]:
    return list(Plan(45, 10, 1, color_matrix(read_dataset(shard_set).rgb)).epoch(0))


@pytest.fixture(scope="module")
def batches(loader: Loader, planned: list[PlannedBatch]) -> list[Batch]:
    return list(loader.run(planned))


def make_trainer(scale: float = 1.0) -> Trainer:
    """Of a network that trains in no time."""
    linear = nn.Linear(48, 3)
    nn.init.constant_(linear.weight, 0.01 * scale)
    nn.init.zeros_(linear.bias)
    network = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), linear)
    return Trainer(network, RECIPES["default"], Worker(0, 1, CPU))


def test_two_trainings_are_compared_to_the_last_bit(batches: list[Batch]) -> None:
    assert trained_alike(make_trainer, batches, 5) == ""
    scales = iter((1.0, 1.0 + 2**-20))
    found = trained_alike(lambda: make_trainer(next(scales)), batches, 5)
    assert found.startswith("after 5 steps, 4 of 4 tensors differ: 2.weight, 2.bias, ")


@pytest.mark.slow
def test_a_loader_agrees_with_another(shard_set: Path) -> None:
    found = check(shard_set, CPU, make_trainer, 20, 2, 1, memory_batches=20)
    *exact, decoded = found.agreements
    assert len(exact) == 4
    assert all(one.found == "equal, bit for bit" for one in exact)
    assert "mean absolute difference 0.000" in decoded.found
    found.check_problems(CPU)
    assert found.host_mb_grown < 100
    assert "memory over 20 batches" in found.lines()[-1]


def test_equality_is_of_every_bit_and_blind_to_cuts_and_to_who_decodes(
    shard_set: Path, loader: Loader, planned: list[PlannedBatch], batches: list[Batch]
) -> None:
    assert equal(batches, loader.run([part for batch in planned for part in batch.chunks(3)])) == ""
    on_host = DecodedOnHost(SplitReader(shard_set, info := read_dataset(shard_set), "train"))
    assert equal(batches, Loader(on_host, info.rgb, 10, CPU, 1).run(planned)) == ""
    changed = batches[2].images.clone()
    changed[4, 1, 5, 6] = torch.nextafter(changed[4, 1, 5, 6], torch.tensor(torch.inf))
    other = [*batches[:2], dataclasses.replace(batches[2], images=changed), *batches[3:]]
    assert equal(batches, other).startswith(f"image 24, sample {batches[2].samples[4]}: 1 values differ, by up to ")


def test_other_labels_samples_or_lengths_are_found(batches: list[Batch]) -> None:
    first, *rest = batches
    for name in ("label", "sample"):
        other = dataclasses.replace(first, **{f"{name}s": getattr(first, f"{name}s") + 1})
        assert f"image 0 is of {name}" in equal(batches, [other, *rest])
        assert compare(batches, [other, *rest]).problems == ("batch 0: samples or labels differ",)
    assert equal(batches, batches[:-1]) == "one stream has 30 images and the other has more"
    assert "one stream ends" in compare(batches, batches[:-1]).problems[0]
    assert "one stream ends" in compare(batches, []).problems[0]


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
    assert max(found.worst) < 0.7


def spot(image: torch.Tensor) -> torch.Tensor:
    """A block of 16 x 16 damaged, as a lost part of a JPEG is: it is 0.5 % of the image."""
    image = image.clone()
    image[:, :16, :16] += 20
    return image


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda image: image.roll(1, 2), "of its values differ by more than 5 levels"),
        (lambda image: image + 0.7, "mean difference in a channel"),
        (spot, "of its values differ by more than 5 levels"),
        (lambda image: image * torch.nan, "levels of mean absolute difference"),
    ],
)
def test_an_image_that_is_off_is_found(
    batches: list[Batch], change: Callable[[torch.Tensor], torch.Tensor], problem: str
) -> None:
    images = batches[2].images.clone()
    images[4] = change(images[4])
    found = compare(batches, [*batches[:2], dataclasses.replace(batches[2], images=images), *batches[3:]])
    assert problem in " ".join(found.problems)
    assert all(f"batch 2, sample {batches[2].samples[4]}: " in text for text in found.problems)


@pytest.mark.slow
def test_a_check_that_fails_says_where(shard_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Loader.run
    calls = iter((0, 0, 1, 0, 0, 1, 0, 1, 1))  # Memory; JPEGs; two sizes' first; pixels; ten crops; two sizes' second.

    def shifted(self: Loader, planned: list[PlannedBatch]) -> object:
        off = 10.0 * next(calls)
        return (dataclasses.replace(batch, images=batch.images + off) for batch in run(self, planned))

    monkeypatch.setattr(Loader, "run", shifted)
    scales = itertools.count(1.0)
    found = check(shard_set, CPU, lambda: make_trainer(next(scales)), 10, 1, 1, memory_batches=10)
    with pytest.raises(GpuCheckError, match=r"cannot be relied on: training and .*: image 0, sample .* differ"):
        found.check_problems(CPU)
    assert all(one.problems for one in found.agreements)
    assert "levels of mean absolute" in found.agreements[-1].problems[0]
