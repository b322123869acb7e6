import itertools

import numpy as np
import pytest

from eggroll_rl.compare_stats import (
    curve_interval,
    first_reached,
    improvement_interval,
    in_words,
    iqm,
    iqm_interval,
    median_reached,
    on_grid,
    probability_of_improvement,
    resample,
)


def test_iqm_by_hand():
    assert iqm([1.0, 2.0, 3.0, 4.0]) == 2.5  # one run off each end
    assert iqm([-1000.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 9999.0]) == 3.5  # two off each end
    assert iqm([1.0, 5.0, 6.0]) == 4.0  # three quarters of a run are none: the mean
    assert iqm([1.0, 2.0, 4.0, 9.0, 100.0]) == 5.0  # one off each end
    np.testing.assert_array_equal(iqm([[0, 10], [1, 20], [2, 40], [9, 90]], axis=0), [1.5, 30])


def test_rliables_published_cases():
    # tests/rliable/metrics_test.py of google-research/rliable, runs x tasks.
    x = [[1, 2], [2, 2], [1, 1], [2, 1]]
    y = [[1, 1], [2, 2], [3, 3]]
    assert iqm(x) == 1.5 and iqm(y) == 2
    assert probability_of_improvement(np.transpose(x), np.transpose(y)) == pytest.approx(1 / 3)


def test_probability_of_improvement_by_hand():
    # 1 beats 0; 3 beats 0 and 2; 2 would tie.
    assert probability_of_improvement([[1, 3]], [[0, 2]]) == 3 / 4
    assert probability_of_improvement([[2]], [[2]]) == 0.5
    # The mean over tasks of 1 and 1/4, with unequal numbers of runs.
    assert probability_of_improvement([[5, 6, 7], [0, 1]], [[1], [0.5, 7]]) == (1 + 1 / 4) / 2


def test_it_is_the_mann_whitney_statistic():
    from scipy.stats import mannwhitneyu

    rng = np.random.default_rng(0)
    x, y = rng.integers(5, size=7), rng.integers(6, size=4)
    expected = mannwhitneyu(x, y).statistic / 28
    assert probability_of_improvement([x], [y]) == pytest.approx(expected)


def test_the_bootstrap_draws_runs_within_each_task():
    index = resample(np.random.default_rng(0), 4, 3, repetitions=5000)
    assert index.shape == (5000, 4, 3) and index.min() == 0 and index.max() == 3
    # Each run equally often, and the tasks independently of each other.
    np.testing.assert_allclose(np.bincount(index.ravel()) / index.size, 0.25, atol=0.005)
    assert abs(np.corrcoef(index[:, 0, 0], index[:, 0, 1])[0, 1]) < 0.05


def test_the_interval_is_that_of_all_resamples():
    # Three runs: the interquartile mean is the mean, and the 27 equally likely resamples can be listed.
    scores = np.array([[1.0], [2.0], [6.0]])
    means = [np.mean(drawn) for drawn in itertools.product(scores[:, 0], repeat=3)]
    low, high = iqm_interval(scores, confidence=0.8)
    np.testing.assert_allclose((low, high), np.percentile(means, [10, 90]), atol=0.34)
    assert iqm_interval(np.full((5, 2), 3.0)) == (3.0, 3.0)
    assert iqm_interval(scores) == iqm_interval(scores)  # no chance in it


def test_the_interval_agrees_with_scipys_bootstrap_of_several_samples():
    from scipy.stats import bootstrap

    rng = np.random.default_rng(1)
    scores = rng.normal(size=(8, 2)) + np.array([0, 10])

    def statistic(a, b, axis):
        return iqm(np.concatenate([a, b], axis=axis), axis=axis)

    theirs = bootstrap(
        (scores[:, 0], scores[:, 1]), statistic, method="percentile", n_resamples=5000, rng=np.random.default_rng(2)
    ).confidence_interval
    np.testing.assert_allclose(iqm_interval(scores), (theirs.low, theirs.high), atol=0.1)


def test_a_curves_interval_is_that_of_each_point():
    rng = np.random.default_rng(3)
    values = rng.normal(size=(6, 4))
    low, high = curve_interval(values)
    for point in range(4):
        # The same resamples of whole runs at every point.
        assert (low[point], high[point]) == pytest.approx(iqm_interval(values[:, [point]]))
    assert (low <= iqm(values, axis=0)).all() and (iqm(values, axis=0) <= high).all()


def test_improvement_interval():
    assert improvement_interval([[5, 6, 7], [1, 2]], [[1, 2, 3], [0]]) == (1.0, 1.0)
    low, high = improvement_interval([[1, 3, 5]], [[2, 4, 0]])
    assert 0 <= low < 0.66 < high <= 1


def test_time_to_threshold_is_where_it_was_seen():
    assert first_reached([0, 10, 20, 30], [0, 99, 100, 50], 100) == 20
    assert first_reached([0, 10], [0, 99], 100) is None
    assert median_reached([20, None, 10]) == 20
    assert median_reached([20, None, None]) is None
    assert median_reached([20, 10, 40]) == 20
    assert median_reached([20, None]) is None  # between a time and never


def test_curves_are_straight_between_evaluations_and_held_beyond():
    grid = np.array([0.0, 1.0, 4.0, 11.0, 26.0, 31.0, 99.0])
    np.testing.assert_array_equal(on_grid([1, 11, 31], [5, 105, 5], grid), [5, 5, 35, 105, 30, 5, 5])


def test_few_seeds_are_said_to_be_few():
    assert in_words(5) == "5 seeds"
    assert "which is few" in in_words(4) and "is their mean" not in in_words(4)
    assert "which is few" in in_words(3) and "is their mean" in in_words(3)
    assert in_words(1).startswith("1 seed,")
