"""Bootstrap intervals: against the normal theory, against brute force, and the same for the same seed."""

import itertools
import math

import numpy as np
import pytest

from latent_trl.evaluation import intervals
from latent_trl.evaluation.intervals import bootstrap_interval, paired_bootstrap


def test_the_interval_of_a_mean_is_that_of_normal_theory():
    values = np.random.default_rng(0).normal(5, 2, size=400)
    interval = bootstrap_interval(values, num_resamples=4000)
    error = values.std() / math.sqrt(len(values))
    assert interval.estimate == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert interval.high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)


def test_the_interval_is_the_quantiles_of_all_resamples():
    values = [1.0, 2.3, 4.1, 8.7, 15.9]
    means = np.array([np.mean(draw) for draw in itertools.product(values, repeat=5)])
    interval = bootstrap_interval(values, num_resamples=40_000, confidence=0.8)
    for end, share in ((interval.low, 0.1), (interval.high, 0.9)):
        assert (means < end - 1e-9).mean() - 0.01 <= share <= (means <= end + 1e-9).mean() + 0.01


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    generator = np.random.default_rng(1)
    hits = 0
    for trial in range(200):
        interval = bootstrap_interval(generator.exponential(size=50), num_resamples=400, confidence=0.9, seed=trial)
        hits += interval.low <= 1.0 <= interval.high
    assert 0.82 <= hits / 200 <= 0.95


def test_the_seed_decides_and_the_size_of_the_chunks_does_not_break_it(monkeypatch):
    values = np.random.default_rng(0).normal(size=20)
    state = np.random.get_state()[1].copy()
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    assert bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)
    assert (np.random.get_state()[1] == state).all()
    whole = bootstrap_interval(values, num_resamples=1001)
    monkeypatch.setattr(intervals, "CHUNK_ELEMENTS", 64)
    assert bootstrap_interval(values, num_resamples=1001).low == pytest.approx(whole.low, abs=0.05)


def test_any_statistic_will_do():
    assert bootstrap_interval([1.0, 2.0, 9.0], statistic=np.median).estimate == 2.0


def test_pairing_sees_a_small_difference_that_is_always_there():
    generator = np.random.default_rng(0)
    first = generator.normal(0, 10, size=50)
    second = first - 0.5 + generator.normal(0, 0.1, size=50)
    difference = paired_bootstrap(first, second, num_resamples=2000)
    assert difference.low > 0.4 and difference.high < 0.6 and difference.p_value < 0.01
    assert difference.estimate == pytest.approx((first - second).mean())
    assert difference.count == 50
    alone = bootstrap_interval(first, num_resamples=2000)
    assert alone.high - alone.low > 3


def test_pairing_agrees_with_the_interval_of_the_differences():
    first, second = np.random.default_rng(0).normal(size=(2, 40))
    difference, plain = paired_bootstrap(first, second, seed=5), bootstrap_interval(first - second, seed=5)
    assert (difference.low, difference.high) == pytest.approx((plain.low, plain.high))


def test_equal_systems_are_not_told_apart():
    difference = paired_bootstrap([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert (difference.estimate, difference.low, difference.high, difference.p_value) == (0, 0, 0, 1)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: bootstrap_interval([]), "`values` must be a list of at least one finite number"),
        (lambda: bootstrap_interval([1.0, math.nan]), "1 of them not finite"),
        (lambda: bootstrap_interval([1.0], confidence=95), "`confidence` must be between 0 and 1; got 95"),
        (lambda: bootstrap_interval([1.0], num_resamples=0), "`num_resamples` must be at least 1; got 0"),
        (lambda: paired_bootstrap([1.0], [1.0, 2.0]), "got 1 and 2 values"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
