"""GAE, returns, whitening and PPO's losses against plain sums in float64."""

import math

import pytest
import torch

from latent_trl.trainer.rollout.advantages import (
    AdaptiveKLController,
    clipped_value_errors,
    explained_variance,
    generalized_advantages,
    k3_divergence,
    masked_mean,
    masked_variance,
    rewards_of_codes,
    whiten,
)

LENGTHS = [7, 1, 4, 0, 9]
WIDTH = 9


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)

    def draw():
        return torch.randn(len(LENGTHS), WIDTH, generator=generator)

    mask = (torch.arange(WIDTH) < torch.tensor(LENGTHS)[:, None]).float()
    rewards = torch.randn(len(LENGTHS), generator=generator)
    # What stands in the padding must not matter.
    return {"mask": mask, "rewards": rewards, "values": draw(), "log_ratio": 0.1 * draw(), "old": draw()}


def brute_rewards(batch, kl_coef):
    """r_t = R at the last code, less kl_coef times the log ratio."""
    table = []
    for row, length in enumerate(LENGTHS):
        codes = [0.0] * WIDTH
        for t in range(length):
            codes[t] = -kl_coef * batch["log_ratio"][row, t].item()
            if t == length - 1:
                codes[t] += batch["rewards"][row].item()
        table.append(codes)
    return table


def brute_advantages(rewards, values, gamma, lam):
    """A_t = sum over l of (gamma lam)^l delta_{t+l}, each sum written out."""
    table = []
    for row, length in enumerate(LENGTHS):
        v = [values[row][t].item() if t < length else 0.0 for t in range(WIDTH + 1)] if length else [0.0] * (WIDTH + 1)
        advantages = [0.0] * WIDTH
        for t in range(length):
            for later in range(t, length):
                delta = rewards[row][later] + gamma * v[later + 1] - v[later]
                advantages[t] += (gamma * lam) ** (later - t) * delta
        table.append(advantages)
    return table


def close(tensor, table):
    expected = torch.tensor(table, dtype=torch.float64)
    torch.testing.assert_close(tensor.double(), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0)])
@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
def test_advantages_and_returns_are_the_plain_sums(batch, gamma, lam, kl_coef):
    values = torch.nn.functional.pad(batch["values"], (0, 1))
    rewards = brute_rewards(batch, kl_coef)
    got = rewards_of_codes(batch["rewards"], batch["mask"], batch["log_ratio"], kl_coef)
    close(got, rewards)
    advantages, returns = generalized_advantages(got, batch["values"], batch["mask"], gamma, lam)
    expected = brute_advantages(rewards, values, gamma, lam)
    close(advantages, expected)
    kept = [[values[r][t].item() * (t < n) for t in range(WIDTH)] for r, n in enumerate(LENGTHS)]
    close(returns, [[a + v for a, v in zip(one, other)] for one, other in zip(expected, kept)])


def test_lambda_one_gives_the_reward_to_go(batch):
    per_code = rewards_of_codes(batch["rewards"], batch["mask"])
    _, returns = generalized_advantages(per_code, batch["values"], batch["mask"], gamma=1.0, gae_lambda=1.0)
    expected = [[batch["rewards"][r].item() if t < n else 0.0 for t in range(WIDTH)] for r, n in enumerate(LENGTHS)]
    close(returns, expected)


def valid(tensor):
    return [tensor[row, t].item() for row, length in enumerate(LENGTHS) for t in range(length)]


def test_whitening_is_the_plain_sums(batch):
    x = valid(batch["values"])
    mean = sum(x) / len(x)
    variance = sum((value - mean) ** 2 for value in x) / len(x)
    assert masked_mean(batch["values"], batch["mask"]).item() == pytest.approx(mean, abs=1e-6)
    assert masked_variance(batch["values"], batch["mask"]).item() == pytest.approx(variance, abs=1e-6)
    got = whiten(batch["values"], batch["mask"])
    close(torch.tensor(valid(got)), [(value - mean) / math.sqrt(variance + 1e-8) for value in x])
    assert (got[batch["mask"] == 0] == 0).all()


def test_whitening_is_over_all_processes(batch):
    """Two processes that sum over each other see the moments of both."""
    whole = whiten(batch["values"], batch["mask"])
    parts = [slice(0, 2), slice(2, 5)]
    sums: list[torch.Tensor] = []

    def moments(reduce):
        return [whiten(batch["values"][part], batch["mask"][part], reduce) for part in parts]

    moments(lambda tensor: sums.append(tensor) or tensor)
    count = len(sums) // 2
    # The mean needs no other sum; with it known, the variance's sums can be taken.
    means = sums[0] + sums[count]
    variance_sums: list[torch.Tensor] = []
    calls = {"n": 0}

    def with_mean(tensor):
        calls["n"] += 1
        if (calls["n"] - 1) % count == count - 1:
            variance_sums.append(tensor)
            return tensor
        return means

    moments(with_mean)
    total = sum(variance_sums)
    calls["n"] = 0

    def full(tensor):
        calls["n"] += 1
        return total if (calls["n"] - 1) % count == count - 1 else means

    torch.testing.assert_close(torch.cat(moments(full)), whole, atol=1e-6, rtol=1e-6)


def test_whitening_equal_advantages_gives_zero_not_nan():
    assert (whiten(torch.full((2, 3), 0.7), torch.ones(2, 3)).abs() < 1e-3).all()
    assert (whiten(torch.full((1, 1), 5.0), torch.ones(1, 1)) == 0).all()
    assert (whiten(torch.randn(2, 3), torch.zeros(2, 3)) == 0).all()


@pytest.mark.parametrize("clip_range", [0.2, 0.01, None])
def test_value_errors_are_the_plain_sums(batch, clip_range):
    values, old, returns = batch["values"], batch["old"], batch["log_ratio"] * 10
    errors, clipped = clipped_value_errors(values, old, returns, clip_range)
    for row in range(len(LENGTHS)):
        for t in range(WIDTH):
            v, o, r = values[row, t].item(), old[row, t].item(), returns[row, t].item()
            near = v if clip_range is None else o + min(max(v - o, -clip_range), clip_range)
            assert errors[row, t].item() == pytest.approx(max((v - r) ** 2, (near - r) ** 2), rel=1e-6, abs=1e-6)
            assert clipped[row, t].item() == ((near - r) ** 2 > (v - r) ** 2 + 1e-9)


def test_explained_variance(batch):
    values, returns, mask = batch["values"], batch["old"], batch["mask"]
    r, u = valid(returns), valid(returns - values)

    def variance(x):
        return sum((value - sum(x) / len(x)) ** 2 for value in x) / len(x)

    got = explained_variance(values, returns, mask).item()
    assert got == pytest.approx(1 - variance(u) / variance(r), abs=1e-6)
    assert explained_variance(returns, returns, mask).item() == 1.0
    assert math.isnan(explained_variance(values, torch.ones_like(returns), mask).item())


def test_k3_divergence(batch):
    one, other = batch["values"], batch["old"]
    got = k3_divergence(one, other)
    ratio = (other - one).double()
    close(got, (ratio.exp() - ratio - 1).tolist())
    assert (got >= 0).all()


def test_adaptive_coefficient_is_zieglers():
    controller = AdaptiveKLController(target=6.0, horizon=1000)
    assert controller.next(0.1, kl=6.0, completions=100) == pytest.approx(0.1)
    assert controller.next(0.1, kl=6.6, completions=100) == pytest.approx(0.1 * (1 + 0.1 * 0.1))
    assert controller.next(0.1, kl=600.0, completions=100) == pytest.approx(0.1 * (1 + 0.2 * 0.1))
    assert controller.next(0.1, kl=0.0, completions=100) == pytest.approx(0.1 * (1 - 0.2 * 0.1))


def test_half_precision_inputs_are_worked_on_in_float32(batch):
    half = {k: v.bfloat16() for k, v in batch.items()}
    advantages, returns = generalized_advantages(half["log_ratio"], half["values"], half["mask"])
    assert advantages.dtype == returns.dtype == whiten(half["values"], half["mask"]).dtype == torch.float32
