"""Advantages, returns and what is made of them, against sums from their definitions in double precision."""

import math

import pytest
import torch
from cases import cases
from hypothesis import given
from hypothesis import strategies as st

from latent_trl.trainer.rollout.advantages import (
    clipped_value_errors,
    explained_variance,
    generalized_advantages,
    masked_mean,
    masked_variance,
    rewards_of_codes,
    whiten,
)
from latent_trl.trainer.rollout.dynamic_sampling import equal_groups, fresh_rows_needed, replacements_of

NUMBERS = st.floats(-20, 20, width=32)
SHARES = st.sampled_from([0.0, 1.0, 0.95]) | st.floats(0, 1)


@st.composite
def batches(draw, tensors: int):
    """Lengths of the completions, their mask, and tensors `[B, C]` with anything outside it."""
    width = draw(st.integers(1, 9))
    lengths = draw(st.lists(st.integers(0, width), min_size=1, max_size=4))
    mask = torch.tensor([[1.0] * n + [0.0] * (width - n) for n in lengths])
    drawn = []
    for _ in range(tensors):
        values = draw(st.lists(NUMBERS, min_size=len(lengths) * width, max_size=len(lengths) * width))
        outside = draw(st.sampled_from([0.0, 7.0, math.nan, math.inf]))
        drawn.append(torch.where(mask.bool(), torch.tensor(values).view(len(lengths), width), outside))
    return lengths, mask, drawn


@cases(60)
@given(batches(2), SHARES, SHARES)
def test_advantages_are_the_sums_of_their_definition(batch, gamma, gae_lambda):
    lengths, mask, (rewards, values) = batch
    advantages, returns = generalized_advantages(rewards, values, mask, gamma, gae_lambda)
    for b, n in enumerate(lengths):
        v = [*values[b, :n].double().tolist(), 0.0]
        r = rewards[b, :n].double().tolist()
        deltas = [r[t] + gamma * v[t + 1] - v[t] for t in range(n)]
        for t in range(n):
            wanted = sum((gamma * gae_lambda) ** (k - t) * deltas[k] for k in range(t, n))
            assert advantages[b, t].item() == pytest.approx(wanted, abs=2e-4)
            assert returns[b, t].item() == pytest.approx(wanted + v[t], abs=2e-4)
        assert not advantages[b, n:].any() and not returns[b, n:].any()


@cases(60)
@given(batches(1), st.lists(NUMBERS, min_size=4, max_size=4), st.floats(0, 2))
def test_rewards_lie_at_the_last_code(batch, given_rewards, coefficient):
    lengths, mask, (log_ratio,) = batch
    rewards = torch.tensor(given_rewards[: len(lengths)])
    per_code = rewards_of_codes(rewards, mask, log_ratio, coefficient)
    for b, n in enumerate(lengths):
        for t in range(mask.shape[1]):
            wanted = (rewards[b].item() if t == n - 1 else 0.0) - (coefficient * log_ratio[b, t].item() if t < n else 0)
            assert per_code[b, t].item() == pytest.approx(wanted, abs=1e-4)


@cases(60)
@given(batches(2))
def test_moments_are_of_the_codes_alone(batch):
    _, mask, (x, other) = batch
    inside = x[mask.bool()].double()
    mean = inside.mean().item() if len(inside) else 0.0
    assert masked_mean(x, mask).item() == pytest.approx(mean, abs=1e-4)
    variance = ((inside - mean) ** 2).mean().item() if len(inside) else 0.0
    assert masked_variance(x, mask).item() == pytest.approx(variance, rel=1e-3, abs=1e-3)
    white = whiten(x, mask)
    assert white.isfinite().all() and not white[~mask.bool()].any()
    if variance > 1e-2:
        assert white[mask.bool()].mean().abs() < 1e-3
        assert white[mask.bool()].var(unbiased=False).item() == pytest.approx(1, abs=1e-2)
        assert explained_variance(x, x, mask).item() == pytest.approx(1)
        assert explained_variance(other, x, mask).isfinite()


@cases(60)
@given(batches(3), st.none() | st.floats(0.01, 5))
def test_value_errors_are_the_larger_of_two(batch, clip_range):
    _, mask, (values, old, returns) = batch
    errors, clipped = clipped_value_errors(values, old, returns, clip_range)
    for v, o, r, error, moved in zip(*(x[mask.bool()].tolist() for x in (values, old, returns, errors, clipped))):
        near = v if clip_range is None else min(max(v, o - clip_range), o + clip_range)
        assert error == pytest.approx(max((v - r) ** 2, (near - r) ** 2), rel=1e-4, abs=1e-3)
        assert not moved or (near - r) ** 2 > (v - r) ** 2 - 1e-3


@cases(60)
@given(st.integers(1, 4), st.lists(st.sampled_from([0.0, 0.5, 1.0, math.nan]), min_size=1, max_size=16))
def test_equal_groups_are_those_without_two_different_rewards(size, rewards):
    rewards = rewards[: len(rewards) // size * size] or [0.0] * size
    found = equal_groups(torch.tensor(rewards), size).tolist()
    groups = [rewards[i : i + size] for i in range(0, len(rewards), size)]
    assert found == [len({r for r in group if r == r}) < 2 for group in groups]


@cases(60)
@given(st.data(), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
def test_replaced_groups_stay_on_their_process(data, processes, groups, size):
    """Each equal group gets at most one fresh one, from its own process, and no fresh one goes twice."""
    equal = torch.tensor(data.draw(st.lists(st.booleans(), min_size=processes * groups, max_size=processes * groups)))
    rows = groups * size
    fresh_rows = fresh_rows_needed(equal, rows, size)
    many = processes * fresh_rows // size
    fresh = torch.tensor(data.draw(st.lists(st.booleans(), min_size=many, max_size=many)), dtype=torch.bool)
    pairs = replacements_of(equal, fresh, rows, fresh_rows, size) if fresh_rows else []
    olds, news = [old for old, _ in pairs], [new for _, new in pairs]
    assert len(set(olds)) == len(olds) and len(set(news)) == len(news)
    for old, new in pairs:
        assert equal[old] and not fresh[new]
        assert old * size // rows == new * size // fresh_rows
    for process in range(processes):
        own = [old for old in olds if old // groups == process]
        good = int((~fresh[process * fresh_rows // size : (process + 1) * fresh_rows // size]).sum())
        assert len(own) == min(int(equal[process * groups : (process + 1) * groups].sum()), good)
