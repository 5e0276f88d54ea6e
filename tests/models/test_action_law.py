import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_trl import ActionLaw

# No logits nearer to one another than float32 tells apart once they are divided by the temperature.
LOGITS = st.lists(st.floats(-8, 8, width=32).map(lambda x: round(x, 3)), min_size=1, max_size=9)


def brute_force(logits: list[float], law: ActionLaw) -> dict[int, float]:
    """Log-probabilities of the codes that stay, from the definition, in double precision."""
    scaled = [float(x) / law.temperature for x in logits]
    order = sorted(range(len(scaled)), key=lambda i: (-scaled[i], i))
    if law.top_k:
        order = order[: law.top_k]
    if law.top_p < 1:
        total = sum(math.exp(scaled[i] - scaled[order[0]]) for i in order)
        kept, mass = [], 0.0
        for i in order:
            kept.append(i)
            mass += math.exp(scaled[i] - scaled[order[0]]) / total
            if mass >= law.top_p:
                break
        order = kept
    total = sum(math.exp(scaled[i] - scaled[order[0]]) for i in order)
    return {i: scaled[i] - scaled[order[0]] - math.log(total) for i in order}


def mass_near(logits, law) -> bool:
    """Whether a cumulative probability lies so near top-p that rounding decides."""
    plain = brute_force(logits, ActionLaw(law.temperature, law.top_k))
    mass = 0.0
    for value in sorted(plain.values(), reverse=True):
        mass += math.exp(value)
        if abs(mass - law.top_p) < 1e-5:
            return True
    return False


@settings(max_examples=300, deadline=None)
@given(LOGITS, st.floats(0.05, 20), st.integers(0, 12), st.floats(0.01, 1.0))
def test_the_law_is_its_definition(logits, temperature, top_k, top_p):
    law = ActionLaw(temperature, top_k, top_p)
    if law.top_p < 1 and mass_near(logits, law):
        return
    want = brute_force(logits, law)
    tensor = torch.tensor(logits)
    support = law.support(tensor)
    log_probs = law.log_probs(tensor, support)
    kept = set(range(len(logits))) if support is None else set(support.nonzero().flatten().tolist())
    # Codes of equal logits may change places at the edge of the support.
    assert len(kept) == len(want)
    assert sorted(tensor[list(kept)].tolist()) == sorted(tensor[list(want)].tolist())
    for i in kept & set(want):
        assert log_probs[i].item() == pytest.approx(want[i], abs=1e-4)
    assert all(log_probs[i] == -torch.inf for i in range(len(logits)) if i not in kept)
    assert log_probs.exp().sum().item() == pytest.approx(1.0, abs=1e-4)


@settings(max_examples=100, deadline=None)
@given(LOGITS, st.floats(0.05, 20), st.integers(0, 12), st.floats(0.01, 1.0))
def test_scores_and_entropies_are_finite_and_right(logits, temperature, top_k, top_p):
    law = ActionLaw(temperature, top_k, top_p)
    tensor = torch.tensor(logits)
    support = law.support(tensor)
    ids = torch.arange(len(logits)) if support is None else support.nonzero().flatten()
    rows = tensor.expand(len(ids), -1)
    wide = None if support is None else support.expand(len(ids), -1)
    chosen, entropy = law.score(rows, ids, wide)
    assert torch.isfinite(chosen).all() and torch.isfinite(entropy).all()
    assert -1e-5 <= entropy[0].item() <= math.log(len(ids)) + 1e-5
    assert entropy[0].item() == pytest.approx(-(chosen.exp() * chosen).sum().item(), abs=1e-4)


def test_the_most_likely_code_always_stays():
    logits = torch.tensor([0.0, 0.0, 30.0, 0.0])
    for law in (ActionLaw(top_p=1e-6), ActionLaw(top_k=1), ActionLaw(0.01, 1, 1e-6)):
        assert law.support(logits).tolist() == [False, False, True, False]
        chosen, entropy = law.score(logits, torch.tensor(2), law.support(logits))
        assert chosen.item() == 0 and entropy.item() == 0


def test_a_law_that_leaves_nothing_out_has_no_support():
    assert ActionLaw().support(torch.randn(3, 4)) is None
    assert not ActionLaw(2.0).truncates and ActionLaw(top_k=1).truncates and ActionLaw(top_p=0.9).truncates


def test_top_k_beyond_the_codebook_keeps_all():
    assert ActionLaw(top_k=99).support(torch.randn(2, 5)).all()


def test_a_recorded_support_is_kept_when_the_logits_change():
    law = ActionLaw(top_k=2)
    old, new = torch.tensor([3.0, 2.0, 1.0]), torch.tensor([1.0, 2.0, 3.0])
    chosen, _ = law.score(new, torch.tensor(0), law.support(old))
    assert chosen.item() == pytest.approx(math.log(math.exp(1) / (math.exp(1) + math.exp(2))), abs=1e-5)


def test_gradients_are_finite_under_truncation():
    law = ActionLaw(0.5, 3, 0.8)
    logits = torch.randn(4, 8, requires_grad=True)
    support = law.support(logits)
    chosen, entropy = law.score(logits, support.float().argmax(-1), support)
    (chosen.sum() + entropy.sum()).backward()
    assert torch.isfinite(logits.grad).all()
    assert (logits.grad[~support] == 0).all()


def test_bfloat16_logits_are_scored_in_float32():
    chosen, entropy = ActionLaw(top_k=2).score(torch.randn(3, 4).bfloat16(), torch.zeros(3, dtype=torch.long))
    assert chosen.dtype == entropy.dtype == torch.float32


@pytest.mark.parametrize(
    "fields, match",
    [
        ({"temperature": 0.0}, "action_temperature"),
        ({"temperature": float("nan")}, "action_temperature"),
        ({"top_k": -1}, "action_top_k"),
        ({"top_p": 0.0}, "action_top_p"),
        ({"top_p": 1.1}, "action_top_p"),
    ],
)
def test_impossible_laws_are_refused(fields, match):
    with pytest.raises(ValueError, match=match):
        ActionLaw(**fields)
