"""The law that codes are drawn from, at the edges of its settings and of what logits can be."""

import math

import pytest
import torch
from cases import cases
from hypothesis import example, given
from hypothesis import strategies as st

from latent_trl.generation.action_law import ActionLaw

EDGES = st.sampled_from([0.0, 1e-30, -1e-30, 3e38, -3e38, -math.inf])
LOGITS = st.lists(st.floats(-5e4, 5e4, width=32) | EDGES, min_size=1, max_size=9)
LOGITS = LOGITS.filter(lambda logits: max(logits) > -math.inf)
TEMPERATURES = st.sampled_from([1e-6, 1e-3, 1.0, 1e3, 1e30]) | st.floats(1e-6, 1e6)
TOP_P = st.sampled_from([1e-30, 1e-6, 0.5, 1 - 1e-7, 1.0]) | st.floats(1e-9, 1.0)


@cases(150)
@given(LOGITS, TEMPERATURES, st.integers(0, 12), TOP_P)
@example([3e38, -3e38], 1e-6, 0, 1.0)
@example([0.0, -math.inf], 1.0, 0, 1.0)
def test_every_law_can_be_drawn_from_and_scored(logits, temperature, top_k, top_p):
    law, row = ActionLaw(temperature, top_k, top_p), torch.tensor(logits)
    support = law.support(row)
    best = row.max()
    if support is not None:
        assert support.any() and (row[support] == best).any()
        assert not top_k or int(support.sum()) <= top_k
        # Nothing outside is more likely than anything inside.
        assert support.all() or row[~support].max() <= row[support].min()
    log_probs = law.log_probs(row, support)
    probs = log_probs.exp()
    assert not log_probs.isnan().any() and probs.sum().item() == pytest.approx(1, abs=1e-4)
    assert support is None or not probs[~support].any()
    drawn = torch.multinomial(probs.expand(20, -1), 1).squeeze(-1)
    wide = None if support is None else support.expand(20, -1)
    chosen, entropy = law.score(row.expand(20, -1), drawn, wide)
    assert chosen.isfinite().all() and entropy.isfinite().all()
    kept = len(logits) if support is None else int(support.sum())
    assert -1e-4 <= entropy[0].item() <= math.log(kept) + 1e-4


@cases(60)
@given(st.lists(st.floats(-50, 50, width=32), min_size=2, max_size=9), st.integers(0, 4), TOP_P)
def test_gradients_are_finite(logits, top_k, top_p):
    law = ActionLaw(1e-2, top_k, top_p)
    row = torch.tensor([logits], requires_grad=True)
    support = law.support(row)
    chosen, entropy = law.score(row, row.argmax(-1), support)
    (chosen.sum() + entropy.sum()).backward()
    assert row.grad.isfinite().all()


@pytest.mark.parametrize("temperature", [0.0, 1e-7, 1e-300, math.inf, math.nan, -1.0])
def test_temperatures_that_leave_no_law(temperature):
    with pytest.raises(ValueError, match="`action_temperature` must be"):
        ActionLaw(temperature)
