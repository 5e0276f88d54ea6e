"""Cloning the policy from the backbone's own next tokens, against loops over every code and token."""

import pytest
import torch
from learning_runs import build_space
from test_latent_action_space_objective import learner, rows_of
from torch.utils._python_dispatch import TorchDispatchMode

from latent_trl.models import spoken
from latent_trl.models.spoken import chunk_size, next_token_entropy, spoken_tokens
from latent_trl.trainer.space import objective as latent_action_space_objective
from latent_trl.trainer.space.backbone_cloning import (
    MIXTURE_STEPS,
    backbone_codes,
    surest_codes,
)
from latent_trl.trainer.space.objective import LEAST_UNCERTAINTY, LatentActionSpaceObjective
from latent_trl.trainer.space.observation import observe


def token_law(model, merged):
    return model.backbone_view.logits(merged[None, None])[0, 0].float().softmax(-1)


def codes_by_hand(model, state, backbone_state):
    """Lists of each code's token and wanted probability, and the backbone's probability of all said tokens."""
    laws = [token_law(model, model.merge(state, code)) for code in model.codebook.weight]
    tokens = [law.argmax().item() for law in laws]
    backbone = token_law(model, backbone_state)
    said = [0.0] * len(tokens)
    for token in set(tokens):
        surest = max((k for k in range(len(tokens)) if tokens[k] == token), key=lambda k: laws[k][token].item())
        said[surest] = backbone[token].item()
    wanted = [1 / len(tokens)] * len(tokens)
    for _ in range(MIXTURE_STEPS):
        new = list(said)
        for token, prob in enumerate(backbone.tolist()):
            if token not in tokens:
                mixture = sum(w * law[token].item() for w, law in zip(wanted, laws))
                for k, law in enumerate(laws):
                    new[k] += prob * wanted[k] * law[token].item() / mixture
        wanted = new
    return tokens, wanted, sum(said)


@torch.no_grad()
def states_of(model, batch, count=6):
    call = model.backbone_view.encode(batch["input_ids"], batch["attention_mask"], **batch["vision"])
    states = model.context_states(call.states, model.has_image(batch["input_ids"]))
    places = list(rows_of(batch))[::5][:count] + list(rows_of(batch))[-2:]
    return torch.stack([states[place] for place in places]), torch.stack([call.states[place] for place in places])


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 10_000_000])
def test_wanted_codes_by_hand(chunk, monkeypatch):
    monkeypatch.setattr(spoken, "CHUNK_VALUES", chunk)
    model, batch, _ = learner("policy")
    states, backbone_states = states_of(model, batch)
    probs = torch.rand(len(states), len(model.codebook.weight)).softmax(dim=-1)
    wanted, kl, reachable = backbone_codes(model, states, backbone_states, probs)
    tokens, sureness = spoken_tokens(model, states)
    surest = surest_codes(tokens, sureness)
    some_differ = False
    for i, (state, backbone_state) in enumerate(zip(states, backbone_states)):
        expected_tokens, expected, total = codes_by_hand(model, state, backbone_state)
        assert tokens[i].tolist() == expected_tokens
        torch.testing.assert_close(wanted[i], torch.tensor(expected), rtol=1e-4, atol=1e-6)
        assert reachable[i].item() == pytest.approx(total, rel=1e-4)
        for k, token in enumerate(expected_tokens):
            same = [other for other in range(len(expected_tokens)) if expected_tokens[other] == token]
            assert surest[i, k].item() == max(same, key=lambda other: sureness[i, other].item())
        some_differ |= 1 < len(set(expected_tokens)) < len(expected_tokens)
        law = token_law(model, backbone_state)
        mixture = sum(
            p * token_law(model, model.merge(state, code)) for p, code in zip(probs[i], model.codebook.weight)
        )
        assert kl[i].item() == pytest.approx((law * (law / mixture).log()).sum().item(), rel=1e-3, abs=1e-6)
        entropy = next_token_entropy(model, backbone_state[None]).item()
        assert entropy == pytest.approx(-(law * law.log()).sum().item(), rel=1e-4)
    # Else the case would not tell one rule from another.
    assert some_differ


@torch.no_grad()
def test_the_mixture_of_the_wanted_codes_is_close_to_the_backbone():
    """Closer than if only the tokens that some code says counted."""
    model, batch, _ = learner("policy")
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=0.5)
    states, backbone_states = states_of(model, batch)
    even = torch.full((len(states), len(model.codebook.weight)), 1 / len(model.codebook.weight))
    wanted, _, reachable = backbone_codes(model, states, backbone_states, even)
    tokens, sureness = spoken_tokens(model, states)
    surest = surest_codes(tokens, sureness)
    laws = [
        torch.stack([token_law(model, model.merge(state, code)) for code in model.codebook.weight]) for state in states
    ]
    laws = torch.stack(laws)
    backbone = torch.stack([token_law(model, state) for state in backbone_states])

    def kl(codes):
        return (backbone * (backbone / torch.einsum("mk,mkv->mv", codes, laws)).log()).sum(dim=-1).mean()

    said = backbone.gather(1, tokens) * (surest == torch.arange(tokens.shape[1]))
    assert (reachable < 0.9).any()
    assert kl(wanted) < 0.75 * kl(said / said.sum(dim=-1, keepdim=True))
    torch.testing.assert_close(wanted.sum(dim=-1), torch.ones(len(wanted)))


@pytest.mark.parametrize("cpu_chunk", [1, 2_000, 10_000_000])
def test_a_cpu_s_chunks_change_nothing_and_are_no_larger_than_memory_allows(cpu_chunk, monkeypatch):
    model, batch, _ = learner("policy")
    states, _ = states_of(model, batch)
    cpu, other = torch.device("cpu"), torch.device("cuda")
    whole = spoken_tokens(model, states)
    monkeypatch.setattr(spoken, "CPU_CHUNK_VALUES", cpu_chunk)
    for got, expected in zip(spoken_tokens(model, states), whole, strict=True):
        torch.testing.assert_close(got, expected)
    vocabulary = model.backbone_view.text_config.vocab_size
    assert chunk_size(model, 3, cpu) == max(1, cpu_chunk // (3 * vocabulary))
    monkeypatch.setattr(spoken, "CHUNK_VALUES", 5 * 3 * vocabulary)
    assert chunk_size(model, 3, cpu) <= chunk_size(model, 3, other) == 5


def test_the_surest_of_equals_is_the_first_alone():
    """An untrained world model's codes all say the same, equally surely."""
    tokens = torch.tensor([[5, 3, 5, 3, 5], [7, 7, 7, 7, 7]])
    sureness = torch.tensor([[0.2, 0.9, 0.4, 0.9, 0.4], [0.1, 0.1, 0.1, 0.1, 0.1]])
    assert surest_codes(tokens, sureness).tolist() == [[2, 1, 2, 1, 2], [0, 0, 0, 0, 0]]


def test_memory_does_not_grow_with_the_square_of_the_codes(monkeypatch):
    class Largest(TorchDispatchMode):
        values = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, torch.Tensor):
                    self.values = max(self.values, tensor.numel())
            return out

    def largest(num_codes):
        model, batch, objective = learner("policy", num_codes=num_codes)
        with Largest() as seen:
            objective(model, batch)
        return seen.values

    monkeypatch.setattr(spoken, "CHUNK_VALUES", 1)
    monkeypatch.setattr(latent_action_space_objective, "CLONING_POSITIONS", 10_000)
    assert largest(512) < 5 * largest(128)


@torch.no_grad()
def test_cloning_loss_and_figures_at_all_positions_by_hand(monkeypatch):
    monkeypatch.setattr(latent_action_space_objective, "CLONING_POSITIONS", 10_000)
    model, batch, objective = learner("policy")
    loss = objective(model, batch).item()
    figures = objective.figures.drain()
    call = model.backbone_view.encode(batch["input_ids"], batch["attention_mask"], **batch["vision"])
    states = model.context_states(call.states, model.has_image(batch["input_ids"]))
    log_probs = model.policy(states, batch["attention_mask"], call.position_ids).log_softmax(-1)
    sums, kls, totals = {True: [], False: []}, [], []
    for b, t in rows_of(batch):
        tokens, wanted, total = codes_by_hand(model, states[b, t], call.states[b, t])
        sums[bool(batch["has_image"][b])].append(-sum(w * p.item() for w, p in zip(wanted, log_probs[b, t])))
        laws = torch.stack([token_law(model, model.merge(states[b, t], code)) for code in model.codebook.weight])
        backbone = token_law(model, call.states[b, t])
        kls.append((backbone * (backbone / (log_probs[b, t].exp() @ laws)).log()).sum().item())
        totals.append(total)
    assert loss == pytest.approx(sum(sum(values) / len(values) for values in sums.values()), rel=1e-4)
    assert figures["policy/backbone_kl"] == pytest.approx(sum(kls) / len(kls), rel=1e-3)
    assert figures["policy/reachable"] == pytest.approx(sum(totals) / len(totals), rel=1e-4)


@torch.no_grad()
def test_positions_are_drawn_where_the_backbone_is_unsure(monkeypatch):
    """With one position a row, as often as its share of the entropies, each raised a little."""
    model, batch, objective = learner("policy")
    observation = observe(model, batch)
    mask = batch["loss_mask"][:, 1:]
    torch.manual_seed(0)
    entropies = torch.rand(int(mask.sum())) ** 4
    monkeypatch.setattr(latent_action_space_objective, "next_token_entropy", lambda model, states: entropies)
    times, draws = torch.zeros(mask.shape), 400
    for step in range(draws):
        objective.step = step
        drawn = objective._draw_uncertain(model, observation, mask, 1)
        assert not (drawn & ~mask).any()
        times += drawn
    assert torch.equal(objective._draw_uncertain(model, observation, mask, 1), drawn)
    shares = torch.zeros(mask.shape)
    shares[mask] = entropies + LEAST_UNCERTAINTY
    shares = shares / shares.sum(dim=1, keepdim=True)
    error = (shares * (1 - shares) / draws).sqrt()
    assert ((times / draws - shares).abs() <= 4 * error).all()


@torch.no_grad()
def test_no_more_positions_than_there_are():
    model, batch, objective = learner("policy")
    mask = batch["loss_mask"][:, 1:].clone()
    mask[0] = False
    mask[1, mask[1].nonzero()[1:]] = False
    drawn = objective._draw_uncertain(model, observe(model, batch), mask, 3)
    assert drawn.sum(dim=1).tolist() == [0, 1, *mask[2:].sum(dim=1).clamp(max=3).tolist()]


def test_a_batch_without_positions_changes_nothing():
    model, batch, objective = learner("policy")
    batch["loss_mask"] = torch.zeros_like(batch["loss_mask"])
    loss = objective(model, batch)
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is None or not p.grad.any() for p in model.policy.parameters())


def test_learning_brings_the_policy_to_the_backbone(tmp_path, monkeypatch):
    trainer = build_space(
        tmp_path, stages=["inverse_dynamics", "policy"], policy_max_steps=60, policy_learning_rate=1e-2
    )
    # The law of a backbone of random weights is almost even.
    torch.nn.init.normal_(trainer.model.get_output_embeddings().weight, std=1.0)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(7)])

    @torch.no_grad()
    def kl():
        with monkeypatch.context() as patch:
            patch.setattr(latent_action_space_objective, "CLONING_POSITIONS", 10_000)
            objective = LatentActionSpaceObjective("policy")
            objective(trainer.model, batch)
        return objective.figures.drain()["policy/backbone_kl"]

    trainer.args.stages = ["inverse_dynamics"]
    trainer.train()
    before = kl()
    trainer.args.stages = ["inverse_dynamics", "policy"]
    trainer.train(resume_from_checkpoint=True)
    # A little below one half.
    assert kl() < 0.75 * before


def test_a_target_that_there_is_not(tmp_path):
    with pytest.raises(ValueError, match="`cloning_target` must be one of"):
        build_space(tmp_path, cloning_target="tokens")
