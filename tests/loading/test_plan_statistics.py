"""The plan's draws against the distributions that the paper names, at a stated power.

The seed is fixed, so each test passes always or never. A statistic z counts as wrong beyond CRITICAL = 5 standard
deviations of its distribution under the right draws: a false alarm has probability 6e-7 for one, and there are about
300. A flaw that moves its mean to 8 is then found with probability Phi(8 - 5) = 0.9987: with N = 180,000 images, a mean
of alpha off by 8 / sqrt(N) = 1.9 % of its deviation, a deviation off by 1.3 %, a correlation of 0.019 between any two
draws, a flip probability of 0.509, all windows off by 4.8 % (chi-square), or one of the 900 by 64 % (of a count of
about 200, six deviations, since there are 900).
"""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.loading.plan import Plan

N = 180_000
CRITICAL = 5.0
CELL_CRITICAL = 6.0
POSITIONS = 30
BINS = 8
# The edges of eight equally likely intervals of a standard normal variable.
EDGES = np.array([NormalDist().inv_cdf(i / BINS) for i in range(1, BINS)])
# With the identity as color matrix, the plan's shifts are alpha itself.
PLAN = Plan(N, 1, 20_121_203, np.eye(3))
Draws = dict[str, NDArray[np.float64]]


def draws(epoch: int) -> Draws:
    """Every draw of one epoch's images, by name, each [N]."""
    drawn = PLAN.augmentation(epoch, np.arange(N))
    columns = np.column_stack([drawn.crops, drawn.flips, drawn.shifts]).astype(np.float64)
    return dict(zip(("top", "left", "flip", "alpha1", "alpha2", "alpha3"), columns.T, strict=True))


@pytest.fixture(scope="module")
def first() -> Draws:
    return draws(0)


def mean_z(values: NDArray[np.float64], mean: float, std: float) -> float:
    """How far the mean is off, in its standard deviations; `mean` and `std` are the right distribution's."""
    return float((values.mean() - mean) / (std / np.sqrt(len(values))))


def uniform_z(cells: NDArray[np.int64], count: int) -> float:
    """Chi-square of cell numbers (each equally likely of `count`), made normal as Wilson and Hilferty (1931) do."""
    found, expected = np.bincount(cells, minlength=count), len(cells) / count
    assert len(found) == count, "a cell beyond the last"
    spread = 2 / (9 * (count - 1))
    reduced = float(((found - expected) ** 2 / expected).sum()) / (count - 1)
    return float((reduced ** (1 / 3) - (1 - spread)) / np.sqrt(spread))


def binned(name: str, values: NDArray[np.float64]) -> tuple[NDArray[np.int64], int]:
    """A draw as one of k equally likely cells: a window's row or column, a flip, or an eighth of the normal."""
    if name.startswith("alpha"):
        return np.searchsorted(EDGES, values / 0.1), BINS
    return values.astype(np.int64), POSITIONS if name in ("top", "left") else 2


def joint_z(one: tuple[NDArray[np.int64], int], other: tuple[NDArray[np.int64], int]) -> float:
    """Chi-square of two draws' pairs, all equally likely if both are uniform and independent."""
    return uniform_z(one[0] * other[1] + other[0], one[1] * other[1])


def dependence_z(name: str, values: NDArray[np.float64], other: str, others: NDArray[np.float64]) -> float:
    """Two draws' correlation or their pairs' chi-square, whichever is worse: the latter sees more kinds.

    The correlation of n independent pairs, times sqrt(n), is standard normal.
    """
    correlation = float(np.corrcoef(values, others)[0, 1] * np.sqrt(len(values)))
    return max(abs(correlation), abs(joint_z(binned(name, values), binned(other, others))))


@pytest.mark.paper
def test_alpha_has_the_papers_mean_and_deviation_and_is_normal(first: Draws) -> None:
    for alpha in (first["alpha1"], first["alpha2"], first["alpha3"]):
        assert abs(mean_z(alpha, 0.0, 0.1)) < CRITICAL
        # Of a standard normal's square, the variance is 2.
        assert abs(mean_z((alpha / 0.1) ** 2, 1.0, np.sqrt(2))) < CRITICAL
        assert abs(uniform_z(*binned("alpha", alpha))) < CRITICAL
        # As fine as float32: a coarse uniform number, say of a byte, has the right moments too.
        assert len(np.unique(alpha)) > 0.98 * N
        # Beyond three deviations lie 0.27 %: a clipped or coarse tail is not seen by mean and variance.
        tail = 2 * NormalDist().cdf(-3)
        assert abs(mean_z((np.abs(alpha) > 0.3).astype(np.float64), tail, np.sqrt(tail * (1 - tail)))) < CRITICAL


@pytest.mark.paper
def test_windows_are_uniform_over_all_positions_and_flips_are_fair(first: Draws) -> None:
    windows = (first["top"] * POSITIONS + first["left"]).astype(np.int64)
    assert abs(uniform_z(windows, POSITIONS**2)) < CRITICAL
    expected = N / POSITIONS**2
    assert np.abs(np.bincount(windows) - expected).max() / np.sqrt(expected) < CELL_CRITICAL
    for side in ("top", "left"):
        assert abs(uniform_z(*binned(side, first[side]))) < CRITICAL
    assert abs(mean_z(first["flip"], 0.5, 0.5)) < CRITICAL


def test_draws_of_an_image_of_its_neighbors_and_of_another_epoch_are_independent(first: Draws) -> None:
    second = draws(1)
    for one, values in first.items():
        for distance in (1, 2, 128):
            assert dependence_z(one, values[:-distance], one, values[distance:]) < CRITICAL, (one, distance)
        for other, others in first.items():
            assert one == other or dependence_z(one, values, other, others) < CRITICAL, (one, other)
            assert dependence_z(one, values, other, second[other]) < CRITICAL, (one, other)
    # Three at once: pairs can be independent while the three are not.
    alphas = [binned(f"alpha{i}", first[f"alpha{i}"])[0] for i in (1, 2, 3)]
    assert abs(uniform_z(alphas[0] * 64 + alphas[1] * 8 + alphas[2], 512)) < CRITICAL


def spearman_z(one: NDArray[np.int64], other: NDArray[np.int64]) -> float:
    """Spearman's correlation of two permutations times sqrt(n - 1): standard normal if they are independent."""
    return float(np.corrcoef(one, other)[0, 1] * np.sqrt(len(one) - 1))


def test_an_order_is_uniform_and_independent_of_the_last_epochs_and_of_the_draws(first: Draws) -> None:
    orders = [PLAN.order(epoch) for epoch in range(3)]
    # Where each sample comes: in the source, and in each epoch.
    places = [np.arange(N), *map(np.argsort, orders)]
    cells, size = 20, N // 20
    for number, place in enumerate(places):
        np.testing.assert_array_equal(np.sort(place), np.arange(N))
        for other in places[:number]:
            assert abs(spearman_z(place, other)) < CRITICAL
            assert abs(joint_z((other // size, cells), (place // size, cells))) < CRITICAL
    for order in orders:
        # Of a uniform permutation, the number of rises has mean (n - 1) / 2 and variance (n + 1) / 12.
        rises = np.count_nonzero(np.diff(order) > 0)
        assert abs(rises - (N - 1) / 2) / np.sqrt((N + 1) / 12) < CRITICAL
        # Neighbors of the source that stay neighbors: Poisson, with mean and variance 2.
        assert np.count_nonzero(np.abs(np.diff(order)) == 1) < 2 + CRITICAL * np.sqrt(2)
    for name, values in first.items():
        assert abs(joint_z((places[1] // size, cells), binned(name, values))) < CRITICAL, name
