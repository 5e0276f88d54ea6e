"""Importance weights of rollouts that another engine sampled, by hand."""

import math

import pytest
import torch

from latent_trl.trainer.rollout.importance import difference_figures, importance_ratio


def test_weights_are_truncated_or_masked():
    old, sampled = torch.tensor([[0.0, -1.0, -2.0]]), torch.tensor([[-1.0, -1.0, 5.0]])
    mask = torch.tensor([[1, 1, 0]])
    ratios = {m: importance_ratio(old, sampled, mask, m, None, 2.0).tolist() for m in ("token_truncate", "token_mask")}
    assert ratios == {"token_truncate": [[2.0, 1.0, 1.0]], "token_mask": [[0.0, 1.0, 1.0]]}
    assert importance_ratio(old, sampled, mask, "sequence_truncate", None, 3.0).item() == pytest.approx(math.e)
    assert importance_ratio(old, sampled, mask, "sequence_mask", None, 2.0).tolist() == [[0.0]]
    with pytest.raises(ValueError, match="vllm_importance_sampling_mode"):
        importance_ratio(old, sampled, mask, "token")


def test_lower_bounds_hold_too():
    old, sampled, mask = torch.tensor([[-2.0, 0.0]]), torch.zeros(1, 2), torch.ones(1, 2)
    assert importance_ratio(old, sampled, mask, "token_truncate", 0.5, None).tolist() == [[0.5, 1.0]]
    assert importance_ratio(old, sampled, mask, "token_mask", 0.5, None).tolist() == [[0.0, 1.0]]
    assert importance_ratio(old, sampled, mask, "token_mask").tolist() == [[pytest.approx(math.exp(-2)), 1.0]]


def test_figures_are_of_the_codes_that_count():
    old, sampled = torch.tensor([[0.0, -1.0, 9.0]]), torch.tensor([[-0.5, -1.0, 0.0]])
    mask = torch.tensor([[1, 1, 0]])
    found = difference_figures(old, sampled, importance_ratio(old, sampled, mask, "token_truncate"), mask)
    assert found["sampling/log_prob_difference"] == (pytest.approx(0.25), 2.0)
    assert found["sampling/log_prob_difference_max"] == (pytest.approx(0.5), 1.0)
    assert found["sampling/importance_sampling_ratio/max"] == (pytest.approx(math.exp(0.5)), 1.0)
    assert difference_figures(old, sampled, old, torch.zeros(1, 3)) == {}
