"""The comparison of shuffles: its figures against orders whose figures are known, and all of it on a small set."""

from __future__ import annotations

import numpy as np
import pytest

from tests.benchmarks.shuffle_quality import Quality, ShuffleConfig, compare


def test_figures_of_orders_that_are_known() -> None:
    # Four classes of three, in order; then one image of each in turn; then backwards; then one image for ever.
    in_order = Quality.of(np.arange(12), 3, 4)
    assert (in_order.correlation, in_order.mean_run, in_order.longest_run) == (pytest.approx(1.0), 3.0, 3.0)
    assert in_order.classes_in_batch == 2.0  # 0001 1122 2333
    dealt = Quality.of(np.arange(12).reshape(4, 3).T.ravel(), 3, 4)
    assert (dealt.mean_run, dealt.longest_run, dealt.classes_in_batch, dealt.seen) == (1.0, 1.0, 4.0, 12.0)
    assert Quality.of(np.arange(12)[::-1], 3, 4).correlation == pytest.approx(-1.0)
    assert Quality.of(np.zeros(12, np.int64), 3, 4).seen == 1.0


def test_the_plan_shuffles_as_a_permutation_does_and_a_buffer_does_not() -> None:
    config = ShuffleConfig(classes=20, per_class=60, per_tar=300, buffers=(60,))
    found = compare(config)
    plan, uniform = found["this plan"], found["a uniform permutation (expected)"]
    # A uniform permutation's correlation has standard deviation 1 / sqrt(n - 1), its runs the mean n / (1 + n - m).
    assert abs(plan.correlation) < 4 / np.sqrt(config.samples - 1)
    assert uniform.mean_run == pytest.approx(1200 / 1141, abs=0.005)
    assert plan.mean_run == pytest.approx(uniform.mean_run, abs=0.04)
    assert plan.classes_in_batch == pytest.approx(uniform.classes_in_batch, abs=0.2)
    assert plan.longest_run <= 6
    assert all(quality.seen == config.samples for quality in found.values())
    for name in ("DALI readers.webdataset, initial_fill 60", "webdataset .shuffle(60)"):
        assert found[name].correlation > 0.9
        assert found[name].classes_in_batch < 10 < plan.classes_in_batch
