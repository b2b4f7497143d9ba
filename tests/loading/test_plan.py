"""The plan against the paper's numbers, published random words and plain formulas."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.images.rgb_stats import RgbMoments, RgbStatistics
from pipeline.loading.philox import philox
from pipeline.loading.plan import TEN_CROPS, Plan, PlannedBatch, center_crops, color_matrix, merged, rank_slice
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


@pytest.mark.parametrize("world", [2, 3, 4, 7, 50])
def test_any_number_of_workers_shares_the_same_stream(world: int) -> None:
    plan = Plan(SAMPLES, 50, 5, np.eye(3))
    alone = joined(list(plan.epoch(2)))
    ranks = [list(plan.epoch(2, rank=rank, world=world)) for rank in range(world)]
    together = joined([ranks[rank][step] for step in range(plan.steps) for rank in range(world)])
    for whole, parts in zip(alone, together, strict=True):
        np.testing.assert_array_equal(whole, parts)


def test_a_resumed_epoch_goes_on_where_it_stopped() -> None:
    plan = Plan(SAMPLES, 64, 5, np.eye(3))
    for whole, rest in zip(joined(list(plan.epoch(1))[4:]), joined(list(plan.epoch(1, first_step=4))), strict=True):
        np.testing.assert_array_equal(whole, rest)


def test_draws_follow_a_sample_whatever_its_company() -> None:
    plan = Plan(SAMPLES, 64, 5, np.eye(3))
    together, alone = plan.augmentation(3, np.array([5, 17, 901])), plan.augmentation(3, np.array([17]))
    np.testing.assert_array_equal(together.crops[1], alone.crops[0])
    np.testing.assert_array_equal(together.shifts[1], alone.shifts[0])
    assert not np.array_equal(plan.augmentation(4, np.array([17])).shifts, alone.shifts)
    assert not np.array_equal(Plan(SAMPLES, 64, 6, np.eye(3)).augmentation(3, np.array([17])).shifts, alone.shifts)


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


def test_imagenets_eigenvalues_shift_by_about_five_levels() -> None:
    vectors = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))
    known = RgbStatistics(1, (0, 0, 0), (0, 0, 0), vectors, (0.2175, 0.0188, 0.0045), vectors)
    shifts = Plan(10_000, 1, 0, color_matrix(known)).augmentation(0, np.arange(10_000)).shifts
    assert 4.5 < np.linalg.norm(shifts, axis=1).std() * np.sqrt(1 / (1 - 2 / np.pi)) < 6.5


@pytest.mark.parametrize(("total", "world"), [(10, 3), (128, 7), (5, 5), (3, 8)])
def test_shares_are_even_and_whole(total: int, world: int) -> None:
    parts = [rank_slice(total, rank, world) for rank in range(world)]
    assert [i for part in parts for i in part] == list(range(total))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("reading", ["eigenvalue", "std"])
def test_color_jitter_is_the_same_to_the_last_bit_in_any_company(rgb: RgbStatistics, reading: str) -> None:
    """A matrix product of many rows may round each by their number."""
    plan = Plan(60_000, 1, 1, color_matrix(rgb, reading))
    together = plan.augmentation(0, np.arange(60_000)).shifts
    for start, size in ((0, 1), (7, 1), (500, 3), (1000, 128), (30_000, 1021), (59_999, 1)):
        alone = plan.augmentation(0, np.arange(start, start + size)).shifts
        assert alone.tobytes() == together[start : start + size].tobytes()


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


def test_a_batch_in_chunks_is_the_batch(rgb: RgbStatistics) -> None:
    (whole,) = Plan(50, 50, 1, color_matrix(rgb)).epoch(0)
    parts = list(whole.chunks(13))
    assert [len(part) for part in parts] == [13, 13, 13, 11]
    for one, two in zip(joined([whole]), joined(parts), strict=True):
        np.testing.assert_array_equal(one, two)


def test_batches_that_draw_alike_are_joined_up_to_a_limit(rgb: RgbStatistics) -> None:
    plan = Plan(50, 20, 1, color_matrix(rgb))
    planned = [part for epoch in range(2) for batch in plan.epoch(epoch) for part in batch.chunks(8)]
    assert [len(batch) for batch in planned] == [8, 8, 4] * 4
    joined = list(merged(planned, 16))
    # An epoch's batches in a row, never those of two epochs.
    assert [lengths for _, lengths in joined] == [[8, 8], [4, 8], [8, 4]] * 2
    assert [lengths for _, lengths in merged(planned, 5)] == [[8], [8], [4]] * 4
    parts = [part for batch, lengths in joined for part in np.split(batch.samples, np.cumsum(lengths)[:-1])]
    for part, batch in zip(parts, planned, strict=True):
        np.testing.assert_array_equal(part, batch.samples)
    for number, (batch, _) in enumerate(joined):
        drawn = plan.augmentation(number // 3, batch.samples)
        np.testing.assert_array_equal(batch.draw(batch.samples).shifts, drawn.shifts)


def test_a_set_smaller_than_a_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="--batch-size 100 or less"):
        Plan(100, 128, 0, np.eye(3))
