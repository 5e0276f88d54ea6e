"""Balanced assignment of a prompt's answers to plans, beside brute force."""

from itertools import permutations

import pytest
import torch

from latent_trl.plans.assignment import assign, sinkhorn


def scores(answers, plans, seed=0):
    return 2 * torch.randn(answers, plans, generator=torch.Generator().manual_seed(seed)) - 8


@pytest.mark.parametrize("answers, plans", [(3, 7), (5, 16), (4, 4), (6, 3), (1, 5)])
def test_every_plan_has_the_same_share_of_the_answers(answers, plans):
    transport = sinkhorn(scores(answers, plans), temperature=1.0, iterations=500)
    torch.testing.assert_close(transport.sum(dim=0), torch.ones(plans), atol=1e-5, rtol=0)
    torch.testing.assert_close(transport.sum(dim=1), torch.full((answers,), plans / answers), atol=1e-3, rtol=0)


def test_the_transport_plan_is_of_the_form_that_is_optimal():
    """Q = diag(u) exp(s / tau) diag(v): what is left of log Q - s / tau is a row's part and a column's."""
    own = scores(4, 6)
    rest = sinkhorn(own, 0.7, 500).log() - own / 0.7
    mixed = rest - rest.mean(dim=0) - rest.mean(dim=1, keepdim=True) + rest.mean()
    assert mixed.abs().max() < 1e-4


@pytest.mark.parametrize("seed", range(8))
def test_at_a_low_temperature_it_is_the_best_matching(seed):
    own = scores(5, 5, seed)
    best = max(permutations(range(5)), key=lambda order: sum(own[m, k].item() for k, m in enumerate(order)))
    assert sinkhorn(own, 0.05, 2000).argmax(dim=0).tolist() == list(best)


def test_what_an_answer_is_worth_to_all_plans_alike_does_not_matter():
    own = scores(5, 16)
    assert assign(own).tolist() == assign(own + 3 * torch.arange(5.0)[:, None]).tolist()
    assert len(set(assign(own).tolist())) == 5


def test_bad_scores_are_named():
    with pytest.raises(ValueError, match="finite matrix"):
        sinkhorn(torch.tensor([[0.0, float("nan")]]))
    with pytest.raises(ValueError, match="`temperature` must be above 0"):
        sinkhorn(scores(2, 2), 0.0)
