"""The plan's draws against the distributions that the paper names, at a stated power.

The seed is fixed, so each test passes always or never. A statistic z counts as wrong beyond CRITICAL = 5 standard
deviations of its distribution under the right draws: a false alarm has probability 6e-7 for one, and there are about
300. A flaw that moves the statistic's mean to 8 is then found with probability Phi(8 - 5) = 0.9987. With N = 180,000
images that is, for example,
    a mean of alpha that is off by 8 / sqrt(N) = 1.9 % of its standard deviation,
    a standard deviation that is off by 8 / sqrt(2 N) = 1.3 %,
    a correlation of 8 / sqrt(N) = 0.019 between any two draws,
    a flip probability of 0.5 +- 4 / sqrt(N) = 0.509 or 0.491,
    all windows off by 4.8 % (alternately more and less), or one of the 900 by 64 %.
The last two follow from chi-square, to which a flaw adds N sum((p - p0)^2 / p0), and from a single window's count of
about 200, which is wrong beyond 6 of its deviations, since there are 900. `test_a_flaw_of_the_stated_size_is_found`
plants these flaws and others, twenty times each.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import NormalDist

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.loading.plan import Plan

N = 180_000
CRITICAL = 5.0
CELL_CRITICAL = 6.0
FOUND = 8.0  # Where a flaw moves a statistic's mean, to be found with probability 0.9987.
POSITIONS = 30
BINS = 8
# The edges of eight equally likely intervals of a standard normal variable.
EDGES = np.array([NormalDist().inv_cdf(i / BINS) for i in range(1, BINS)])
# With the identity as color matrix, the plan's shifts are alpha itself.
PLAN = Plan(N, 1, 20_121_203, np.eye(3))


def draws(epoch: int) -> dict[str, NDArray[np.float64]]:
    """Every draw of one epoch's images, by name, each [N]."""
    drawn = PLAN.augmentation(epoch, np.arange(N))
    columns = np.column_stack([drawn.crops, drawn.flips, drawn.shifts]).astype(np.float64)
    return dict(zip(("top", "left", "flip", "alpha1", "alpha2", "alpha3"), columns.T, strict=True))


@pytest.fixture(scope="module")
def first() -> dict[str, NDArray[np.float64]]:
    return draws(0)


@pytest.fixture(scope="module")
def second() -> dict[str, NDArray[np.float64]]:
    return draws(1)


def mean_z(values: NDArray[np.float64], mean: float, std: float) -> float:
    """How far the mean is off, in its standard deviations; `mean` and `std` are the right distribution's."""
    return float((values.mean() - mean) / (std / np.sqrt(len(values))))


def variance_z(alpha: NDArray[np.float64], std: float) -> float:
    """The same for the variance of normal values with mean 0: mean square / std^2 has variance 2 / n."""
    return float(((alpha / std) ** 2).mean() - 1) * np.sqrt(len(alpha) / 2)


def uniform_z(cells: NDArray[np.int64], count: int) -> float:
    """Chi-square of cell numbers (each equally likely of `count`), made normal as Wilson and Hilferty (1931) do."""
    found = np.bincount(cells, minlength=count)
    assert len(found) == count, "a cell beyond the last"
    expected = len(cells) / count
    return chi_square_z(float(((found - expected) ** 2 / expected).sum()), count - 1)


def chi_square_z(value: float, freedom: int) -> float:
    spread = 2 / (9 * freedom)
    return float(((value / freedom) ** (1 / 3) - (1 - spread)) / np.sqrt(spread))


def worst_cell_z(cells: NDArray[np.int64], count: int) -> float:
    """The cell whose count is furthest from its mean, in standard deviations."""
    expected = len(cells) / count
    return float(np.abs(np.bincount(cells, minlength=count) - expected).max() / np.sqrt(expected))


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
def test_alpha_has_the_papers_mean_and_deviation_and_is_normal(first: dict[str, NDArray[np.float64]]) -> None:
    for i in (1, 2, 3):
        alpha = first[f"alpha{i}"]
        assert abs(mean_z(alpha, 0.0, 0.1)) < CRITICAL
        assert abs(variance_z(alpha, 0.1)) < CRITICAL
        assert abs(uniform_z(*binned("alpha", alpha))) < CRITICAL
        # As fine as float32: a coarse uniform number, say of a byte, has the right moments too.
        assert len(np.unique(alpha)) > 0.98 * N
        # Beyond three deviations lie 0.27 %: a clipped or coarse tail is not seen by mean and variance.
        tail = 2 * NormalDist().cdf(-3)
        assert abs(mean_z((np.abs(alpha) > 0.3).astype(np.float64), tail, np.sqrt(tail * (1 - tail)))) < CRITICAL


@pytest.mark.paper
def test_windows_are_uniform_over_all_positions_and_flips_are_fair(first: dict[str, NDArray[np.float64]]) -> None:
    windows = (first["top"] * POSITIONS + first["left"]).astype(np.int64)
    assert abs(uniform_z(windows, POSITIONS**2)) < CRITICAL
    assert worst_cell_z(windows, POSITIONS**2) < CELL_CRITICAL
    for side in ("top", "left"):
        assert abs(uniform_z(*binned(side, first[side]))) < CRITICAL
    assert abs(mean_z(first["flip"], 0.5, 0.5)) < CRITICAL


def test_an_images_draws_are_independent_of_each_other(first: dict[str, NDArray[np.float64]]) -> None:
    names = sorted(first)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            assert dependence_z(one, first[one], other, first[other]) < CRITICAL, (one, other)
    # Three at once: pairs can be independent while the three are not.
    alphas = [binned(f"alpha{i}", first[f"alpha{i}"])[0] for i in (1, 2, 3)]
    assert abs(uniform_z(alphas[0] * 64 + alphas[1] * 8 + alphas[2], 512)) < CRITICAL
    quarters = [np.minimum(first[side] // 8, 3).astype(np.int64) for side in ("top", "left")]
    counted = np.bincount(quarters[0] * 8 + quarters[1] * 2 + first["flip"].astype(np.int64), minlength=32)
    share = np.array([8, 8, 8, 6]) / POSITIONS
    expected = N * np.repeat(np.outer(share, share).ravel(), 2) / 2
    assert abs(chi_square_z(float(((counted - expected) ** 2 / expected).sum()), 31)) < CRITICAL


@pytest.mark.parametrize("distance", [1, 2, 128])
def test_neighboring_images_draw_independently(first: dict[str, NDArray[np.float64]], distance: int) -> None:
    for name, values in first.items():
        assert dependence_z(name, values[:-distance], name, values[distance:]) < CRITICAL, name


def test_epochs_draw_independently(
    first: dict[str, NDArray[np.float64]], second: dict[str, NDArray[np.float64]]
) -> None:
    for name, values in first.items():
        for other, later in second.items():
            assert dependence_z(name, values, other, later) < CRITICAL, (name, other)


def test_an_order_is_uniform_and_independent_of_the_last_epochs_and_of_the_draws(
    first: dict[str, NDArray[np.float64]],
) -> None:
    orders = [PLAN.order(epoch) for epoch in range(3)]
    places = [np.argsort(order) for order in orders]  # Where each sample comes.
    cells, size = 20, N // 20
    source = np.arange(N) // size
    for epoch, place in enumerate(places):
        np.testing.assert_array_equal(np.sort(orders[epoch]), np.arange(N))
        assert abs(spearman_z(place, np.arange(N))) < CRITICAL
        assert abs(joint_z((source, cells), (place // size, cells))) < CRITICAL
        # Of a uniform permutation, the number of rises has mean (n - 1) / 2 and variance (n + 1) / 12.
        rises = np.count_nonzero(np.diff(orders[epoch]) > 0)
        assert abs(rises - (N - 1) / 2) / np.sqrt((N + 1) / 12) < CRITICAL
        # Neighbors of the source that stay neighbors: Poisson, with mean and variance 2.
        assert np.count_nonzero(np.abs(np.diff(orders[epoch])) == 1) < 2 + CRITICAL * np.sqrt(2)
        for other in places[:epoch]:
            assert abs(spearman_z(place, other)) < CRITICAL
            assert abs(joint_z((other // size, cells), (place // size, cells))) < CRITICAL
    for name, values in first.items():
        assert abs(joint_z((places[0] // size, cells), binned(name, values))) < CRITICAL, name


def spearman_z(one: NDArray[np.int64], other: NDArray[np.int64]) -> float:
    """Spearman's correlation of two permutations times sqrt(n - 1): standard normal if they are independent."""
    return float(np.corrcoef(one, other)[0, 1] * np.sqrt(len(one) - 1))


def test_an_order_sorts_the_words_of_all_samples_at_once() -> None:
    """Samples on both sides of every border between pieces come in the order of their words, computed one by one."""
    count, seed, epoch = 70_001, 5, 9
    keys = []
    for sample in [*range(50), *range(32_760, 32_780), *range(65_530, 65_545), 70_000]:
        keys.append((philox_by_hand((sample, 0, epoch, 0), seed), sample))
    order = Plan(count, 1, seed, np.eye(3)).order(epoch)
    place = np.argsort(order)
    expected = [sample for _, sample in sorted(keys)]
    assert sorted((sample for _, sample in keys), key=lambda sample: int(place[sample])) == expected


def philox_by_hand(counter: tuple[int, int, int, int], seed: int) -> int:
    """The first two words of Philox4x32-10 as one number, in Python's integers after Salmon et al., section 3.3."""
    c, key = list(counter), [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        first, second = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [
            (second >> 32) ^ c[1] ^ key[0],
            second & 0xFFFFFFFF,
            (first >> 32) ^ c[3] ^ key[1],
            first & 0xFFFFFFFF,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c[0] << 32 | c[1]


def normal(generator: np.random.Generator) -> NDArray[np.float64]:
    """N values of the right distribution of alpha."""
    return 0.1 * generator.standard_normal(N)


def rolled(generator: np.random.Generator, relative: NDArray[np.float64]) -> NDArray[np.int64]:
    """N cell numbers with these relative probabilities."""
    return generator.choice(len(relative), N, p=relative / relative.sum())


def mean_off(generator: np.random.Generator) -> float:
    return mean_z(normal(generator) + 0.1 * FOUND / np.sqrt(N), 0.0, 0.1)


def deviation_off(generator: np.random.Generator) -> float:
    return variance_z(normal(generator) * (1 + FOUND / np.sqrt(2 * N)), 0.1)


def not_normal(generator: np.random.Generator) -> float:
    """Right mean and variance, but uniform."""
    return uniform_z(*binned("alpha", generator.uniform(-1, 1, N) * 0.1 * np.sqrt(3)))


def neighbors_correlated(generator: np.random.Generator) -> float:
    values, strength = normal(generator), FOUND / np.sqrt(N)
    later = strength * values[:-1] + np.sqrt(1 - strength**2) * values[1:]
    return dependence_z("alpha1", values[:-1], "alpha1", later)


def same_size_other_sign(generator: np.random.Generator) -> float:
    """Dependent without any correlation, as two numbers from one radius of Box-Muller's would be."""
    values = normal(generator)
    return dependence_z("alpha1", values, "alpha2", values * generator.choice([-1.0, 1.0], N))


def unfair_flip(generator: np.random.Generator) -> float:
    return mean_z((generator.random(N) < 0.5 - FOUND / 2 / np.sqrt(N)).astype(np.float64), 0.5, 0.5)


def windows_alternate(generator: np.random.Generator) -> float:
    return uniform_z(rolled(generator, np.where(np.arange(POSITIONS**2) % 2 == 0, 1.048, 0.952)), POSITIONS**2)


def one_window_often(generator: np.random.Generator) -> float:
    """In the measure of CRITICAL, as the others."""
    return worst_cell_z(rolled(generator, np.r_[1.64, np.ones(899)]), POSITIONS**2) * CRITICAL / CELL_CRITICAL


def edges_at_half(generator: np.random.Generator) -> float:
    """Rounding uniform numbers in [0, 29], as a first attempt at a random window would."""
    return uniform_z(np.rint(generator.uniform(0, POSITIONS - 1, N)).astype(np.int64), POSITIONS)


def last_row_never(generator: np.random.Generator) -> float:
    return uniform_z(generator.integers(0, POSITIONS - 1, N), POSITIONS)


def flip_follows_row(generator: np.random.Generator) -> float:
    """One word for both: each is right for itself."""
    rows = generator.integers(0, POSITIONS, N)
    return joint_z((rows, POSITIONS), (rows // (POSITIONS // 2), 2))


def epochs_alike(generator: np.random.Generator) -> float:
    return spearman_z(*[generator.permutation(N)] * 2)


@pytest.mark.parametrize(
    "flaw",
    [
        mean_off,
        deviation_off,
        not_normal,
        neighbors_correlated,
        same_size_other_sign,
        unfair_flip,
        windows_alternate,
        one_window_often,
        edges_at_half,
        last_row_never,
        flip_follows_row,
        epochs_alike,
    ],
)
def test_a_flaw_of_the_stated_size_is_found(flaw: Callable[[np.random.Generator], float]) -> None:
    found = sum(abs(flaw(np.random.default_rng(seed))) > CRITICAL for seed in range(20))
    assert found >= 19  # Of twenty, each with probability 0.9987 or more.
