"""The coverage loss, against loops over every state, token and code."""

import pytest
import torch
from test_backbone_cloning import states_of, token_law
from test_latent_action_space_objective import learner

from latent_trl.models import spoken
from latent_trl.trainer.space.coverage import coverage_losses, own_codes


def by_hand(model, state, backbone_state, num_tokens, min_prob):
    """Tokens that count, the code that each gets, its cross-entropy under it, and whether the code says it."""
    law = token_law(model, backbone_state)
    tokens = sorted(range(len(law)), key=lambda token: -law[token].item())[:num_tokens]
    tokens = [token for i, token in enumerate(tokens) if i == 0 or law[token] >= min_prob]
    laws = [token_law(model, model.merge(state, code)) for code in model.codebook.weight]
    free, found = list(range(len(laws))), []
    for token in tokens:
        code = max(free, key=lambda k: laws[k][token].item())
        free.remove(code)
        found.append((token, code, -laws[code][token].log(), laws[code].argmax().item() == token))
    return found


@pytest.mark.parametrize("num_tokens, min_prob", [(6, 0.0), (6, 0.02), (1, 0.0), (40, 0.5)])
@pytest.mark.parametrize("chunk", [1, 10_000_000])
def test_losses_by_hand(chunk, num_tokens, min_prob, monkeypatch):
    monkeypatch.setattr(spoken, "CHUNK_VALUES", chunk)
    model, batch, _ = learner("inverse_dynamics")
    states, backbone_states = states_of(model, batch)
    losses, said = coverage_losses(model, states, backbone_states, num_tokens, min_prob)
    # No more tokens than there are codes.
    expected = [
        entry
        for state, backbone_state in zip(states, backbone_states)
        for entry in by_hand(model, state, backbone_state, min(num_tokens, model.config.num_codes), min_prob)
    ]
    torch.testing.assert_close(losses, torch.stack([entry[2] for entry in expected]), rtol=1e-4, atol=1e-5)
    assert said.tolist() == [entry[3] for entry in expected]
    if min_prob == 0.5:
        assert len(losses) < 2 * len(states)
    elif num_tokens > 1:
        assert len({entry[1] for entry in expected}) > 3


def test_each_token_takes_a_code_that_is_free():
    # Both tokens are likeliest under code 0; the first gets it.
    log_probs = torch.tensor([[[-1.0, -0.1], [-2.0, -3.0], [-3.0, -2.0]]])
    assert own_codes(log_probs).tolist() == [[0, 2]]
    every = own_codes(torch.randn(5, 4, 4, generator=torch.Generator().manual_seed(0)))
    assert every.sort(dim=1).values.tolist() == [[0, 1, 2, 3]] * 5


def test_it_trains_codebook_and_world_model_alone():
    model, batch, _ = learner("inverse_dynamics")
    states, backbone_states = states_of(model, batch)
    model.requires_grad_(True)
    losses, _ = coverage_losses(model, states, backbone_states, 4, 0.0)
    losses.mean().backward()
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert {"codebook", "world_model"} <= trained <= {"codebook", "world_model", "backbone"}


def test_no_position_gives_no_loss():
    model, batch, _ = learner("inverse_dynamics")
    states, backbone_states = states_of(model, batch)
    losses, said = coverage_losses(model, states[:0], backbone_states[:0], 4, 0.0)
    assert losses.shape == said.shape == (0,)


@pytest.mark.parametrize("stage", ["inverse_dynamics", "joint"])
def test_the_stages_count_it_and_log_how_much_is_covered(stage):
    model, batch, _ = learner(stage)
    found = {}
    for coef in (0.0, 0.5):
        _, _, objective = learner(stage, coverage_coef=coef)
        loss = objective(model, batch)
        found[coef] = loss.item(), objective.figures.drain()
    assert "codebook/coverage" not in found[0.0][1]
    assert 0 <= found[0.5][1]["codebook/coverage"] <= 1
    assert found[0.5][0] > found[0.0][0]


def test_learning_with_it_makes_codes_say_more():
    """A few steps on one batch: more of the backbone's likely tokens are some code's own."""
    model, batch, objective = learner("inverse_dynamics", coverage_coef=1.0)
    parts = [*model.codebook.parameters(), *model.world_model.parameters()]
    for p in parts:
        p.requires_grad_(True)
    optimizer = torch.optim.AdamW(parts, lr=1e-2)
    shares = []
    for _ in range(30):
        objective(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        shares.append(objective.figures.drain()["codebook/coverage"])
    assert sum(shares[-5:]) / 5 > sum(shares[:5]) / 5 + 0.2
