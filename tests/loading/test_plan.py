"""The plan against the paper's numbers, published random words and plain formulas."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from pipeline.images.rgb_stats import RgbMoments, RgbStatistics
from pipeline.loading.philox import philox
from pipeline.loading.plan import TEN_CROPS, Plan, PlannedBatch, center_crops, color_matrix
from tests.photographs import photograph

SAMPLES = 1000


@pytest.fixture(scope="module")
def rgb() -> RgbStatistics:
    return RgbStatistics.of(RgbMoments.of(photograph(0, 300, 200)))


def joined(parts: list[PlannedBatch]) -> tuple[np.ndarray, ...]:
    drawn = [part.draw(part.samples) for part in parts]
    draws = [np.concatenate([getattr(one, field) for one in drawn]) for field in ("crops", "flips", "shifts")]
    return np.concatenate([part.samples for part in parts]), *draws


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # From Random123's kat_vectors, philox4x32 with 10 rounds.
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_words(counter: tuple[int, ...], key: int, words: tuple[int, ...]) -> None:
    found = philox(np.array([counter[0]]), (counter[1], counter[2], counter[3]), key)
    assert tuple(found[:, 0].tolist()) == words


def test_an_epoch_visits_each_sample_once_but_for_its_tail() -> None:
    plan = Plan(SAMPLES, 64, 3, np.eye(3))
    seen = [np.concatenate([planned.samples for planned in plan.epoch(epoch)]) for epoch in range(3)]
    for samples in seen:
        assert len(samples) == plan.steps * 64 == 960
        assert len(np.unique(samples)) == 960
        assert samples.min() >= 0
        assert samples.max() < SAMPLES
    assert plan.dropped == 40
    tails = [set(range(SAMPLES)) - set(samples.tolist()) for samples in seen]
    assert tails[0] != tails[1] != tails[2]


@pytest.mark.parametrize("world", [1, 2, 3, 7, 50])
def test_any_number_of_workers_shares_the_same_stream_from_any_step_on(world: int) -> None:
    plan = Plan(SAMPLES, 50, 5, np.eye(3))
    for first_step in (0, 4):
        alone = joined(list(plan.epoch(2))[first_step:])
        ranks = [plan.epoch(2, first_step, rank, world) for rank in range(world)]
        together = joined([part for parts in zip(*ranks, strict=True) for part in parts])
        for whole, parts in zip(alone, together, strict=True):
            np.testing.assert_array_equal(whole, parts)


@pytest.mark.parametrize("reading", ["eigenvalue", "std"])
def test_draws_follow_a_sample_to_the_last_bit_whatever_its_company(rgb: RgbStatistics, reading: str) -> None:
    """A matrix product of many rows may round each by their number."""
    plan = Plan(60_000, 1, 1, color_matrix(rgb, reading))
    together = plan.augmentation(3, np.arange(60_000))
    for start, size in ((0, 1), (7, 1), (500, 3), (1000, 128), (30_000, 1021), (59_999, 1)):
        alone = plan.augmentation(3, np.arange(start, start + size))
        for one, whole in (
            (alone.crops, together.crops),
            (alone.flips, together.flips),
            (alone.shifts, together.shifts),
        ):
            assert one.tobytes() == whole[start : start + size].tobytes()
    for other in (plan.augmentation(4, np.arange(9)), dataclasses.replace(plan, seed=6).augmentation(3, np.arange(9))):
        assert not np.isin(other.shifts, together.shifts[:9]).any()


def test_an_order_sorts_the_words_of_all_samples_at_once() -> None:
    """Samples on both sides of every border between pieces come in the order of their words, computed one by one."""
    samples = [*range(50), *range(32_760, 32_780), *range(65_530, 65_545), 70_000]
    words = [philox(np.array([sample]), (0, 9, 0), 5)[:, 0].tolist() for sample in samples]
    expected = [sample for _, sample in sorted(zip(words, samples, strict=True))]
    place = np.argsort(Plan(70_001, 1, 5, np.eye(3)).order(9))
    assert sorted(samples, key=lambda sample: int(place[sample])) == expected


@pytest.mark.paper
def test_the_color_shift_is_the_papers_formula(rgb: RgbStatistics) -> None:
    samples = np.arange(20)
    alpha = Plan(20, 1, 1, np.eye(3)).augmentation(0, samples).shifts.astype(np.float64)
    shifts = Plan(20, 1, 1, color_matrix(rgb)).augmentation(0, samples).shifts
    doubled = Plan(20, 1, 1, color_matrix(rgb, "std")).augmentation(0, samples).shifts
    p, values = np.array(rgb.eigenvectors), np.array(rgb.eigenvalues)
    for i in samples:
        expected = 255.0 * sum(p[:, j] * alpha[i, j] * values[j] for j in range(3))
        np.testing.assert_allclose(shifts[i], expected, rtol=1e-5, atol=1e-6)
        by_source = 255.0 * sum(p[:, j] * alpha[i, j] * np.sqrt(values[j]) for j in range(3))
        np.testing.assert_allclose(doubled[i], by_source, rtol=1e-5, atol=1e-6)
    assert not color_matrix(rgb, "none").any()
    with pytest.raises(ValueError, match="eigenvalue, std, none"):
        color_matrix(rgb, "stdev")


@pytest.mark.paper
def test_test_crops() -> None:
    center = center_crops(np.array([4, 9]))
    assert center.samples.tolist() == [4, 9]
    drawn = center.draw(center.samples)
    np.testing.assert_array_equal(drawn.crops, [[14, 14], [14, 14]])
    assert not drawn.flips.any()
    assert not drawn.shifts.any()
    corners = [(0, 0), (0, 29), (29, 0), (29, 29), (14, 14)]
    assert set(TEN_CROPS) == {(top, left, flip) for top, left in corners for flip in (False, True)}
    assert len(TEN_CROPS) == 10


def test_a_set_smaller_than_a_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="--batch-size 100 or less"):
        Plan(100, 128, 0, np.eye(3))
