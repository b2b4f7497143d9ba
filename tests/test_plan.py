"""The plan against the paper's numbers, published random words and plain formulas."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.philox import philox
from pipeline.plan import Plan, Views, centre_views, colour_matrix, share, ten_crop_views
from pipeline.rgb_stats import RgbMoments, RgbStatistics
from tests.photographs import photograph

SAMPLES = 1000


@pytest.fixture(scope="module")
def rgb() -> RgbStatistics:
    return RgbStatistics.of(RgbMoments.of(photograph(0, 300, 200)))


def joined(parts: list[Views]) -> tuple[np.ndarray, ...]:
    return tuple(np.concatenate([getattr(p, f) for p in parts]) for f in ("samples", "crops", "flips", "shifts"))


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
    seen = [np.concatenate([views.samples for views in plan.epoch(epoch)]) for epoch in range(3)]
    for samples in seen:
        assert len(samples) == plan.steps * 64 == 960
        assert len(np.unique(samples)) == 960
        assert samples.min() >= 0
        assert samples.max() < SAMPLES
    assert plan.left_out == 40
    tails = [set(range(SAMPLES)) - set(samples.tolist()) for samples in seen]
    assert tails[0] != tails[1] != tails[2]


def test_an_order_is_a_shuffle() -> None:
    order = Plan(100_000, 1, 0, np.eye(3)).order(0)
    np.testing.assert_array_equal(np.sort(order), np.arange(100_000))
    # Of two independent orders, the correlation has standard deviation 1 / sqrt(n) = 0.0032.
    assert abs(np.corrcoef(order, np.arange(100_000))[0, 1]) < 0.013


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
    together, alone = plan.views(3, np.array([5, 17, 901])), plan.views(3, np.array([17]))
    np.testing.assert_array_equal(together.crops[1], alone.crops[0])
    np.testing.assert_array_equal(together.shifts[1], alone.shifts[0])
    assert not np.array_equal(plan.views(4, np.array([17])).shifts, alone.shifts)
    assert not np.array_equal(Plan(SAMPLES, 64, 6, np.eye(3)).views(3, np.array([17])).shifts, alone.shifts)


@pytest.mark.paper
def test_crops_are_uniform_and_flips_fair() -> None:
    views = Plan(90_000, 1, 1, np.eye(3)).views(0, np.arange(90_000))
    cells = np.bincount(views.crops[:, 0] * 30 + views.crops[:, 1], minlength=900)
    assert len(cells) == 900
    # Chi-square with 899 degrees of freedom: mean 899, standard deviation 42.
    assert abs(((cells - 100) ** 2 / 100).sum() - 899) < 4 * 42
    assert abs(views.flips.mean() - 0.5) < 4 * 0.5 / 300
    assert abs(np.corrcoef(views.flips, views.crops[:, 0])[0, 1]) < 4 / 300


@pytest.mark.paper
def test_alpha_is_normal_with_standard_deviation_a_tenth() -> None:
    alpha = Plan(90_000, 1, 1, np.eye(3)).views(0, np.arange(90_000)).shifts.astype(np.float64) / 0.1
    assert np.abs(alpha.mean(axis=0)).max() < 4 / 300
    np.testing.assert_allclose(alpha.std(axis=0), 1.0, atol=4 / np.sqrt(2 * 90_000))
    np.testing.assert_allclose((alpha**4).mean(axis=0), 3.0, atol=4 * np.sqrt(96 / 90_000))
    correlation = np.corrcoef(alpha.T) - np.eye(3)
    assert np.abs(correlation).max() < 4 / 300


@pytest.mark.paper
def test_the_colour_shift_is_the_papers_formula(rgb: RgbStatistics) -> None:
    samples = np.arange(20)
    alpha = Plan(20, 1, 1, np.eye(3)).views(0, samples).shifts.astype(np.float64)
    shifts = Plan(20, 1, 1, colour_matrix(rgb)).views(0, samples).shifts
    doubled = Plan(20, 1, 1, colour_matrix(rgb, "std")).views(0, samples).shifts
    p, values = np.array(rgb.eigenvectors), np.array(rgb.eigenvalues)
    for i in samples:
        expected = 255.0 * sum(p[:, j] * alpha[i, j] * values[j] for j in range(3))
        np.testing.assert_allclose(shifts[i], expected, rtol=1e-5, atol=1e-6)
        by_source = 255.0 * sum(p[:, j] * alpha[i, j] * np.sqrt(values[j]) for j in range(3))
        np.testing.assert_allclose(doubled[i], by_source, rtol=1e-5, atol=1e-6)
    assert not colour_matrix(rgb, "none").any()
    with pytest.raises(ValueError, match="eigenvalue, std, none"):
        colour_matrix(rgb, "stdev")


def test_imagenets_eigenvalues_shift_by_about_five_levels() -> None:
    vectors = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))
    known = RgbStatistics(1, (0, 0, 0), (0, 0, 0), vectors, (0.2175, 0.0188, 0.0045), vectors)
    shifts = Plan(10_000, 1, 0, colour_matrix(known)).views(0, np.arange(10_000)).shifts
    assert 4.5 < np.linalg.norm(shifts, axis=1).std() * np.sqrt(1 / (1 - 2 / np.pi)) < 6.5


@pytest.mark.parametrize(("total", "world"), [(10, 3), (128, 7), (5, 5), (3, 8)])
def test_shares_are_even_and_whole(total: int, world: int) -> None:
    parts = [share(total, rank, world) for rank in range(world)]
    assert [i for part in parts for i in part] == list(range(total))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.paper
def test_test_views() -> None:
    centre = centre_views(np.array([4, 9]))
    np.testing.assert_array_equal(centre.crops, [[14, 14], [14, 14]])
    ten = ten_crop_views(np.array([4, 9]))
    assert ten.samples.tolist() == [4] * 10 + [9] * 10
    views = {
        (int(top), int(left), bool(flip)) for (top, left), flip in zip(ten.crops[:10], ten.flips[:10], strict=True)
    }
    corners = [(0, 0), (0, 29), (29, 0), (29, 29), (14, 14)]
    assert views == {(top, left, flip) for top, left in corners for flip in (False, True)}
    assert not ten.shifts.any()


def test_a_set_smaller_than_a_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="--batch-size 100 or less"):
        Plan(100, 128, 0, np.eye(3))
