"""Engine and `generate` choose the same codes and say the same tokens, for one family after another."""

import pytest
from exact import FAMILIES, LENGTH, measured, prompts, same_rows, tiny
from tiny_models import EOS

# A fast part, of unlike kinds: grouped heads, normed heads, soft caps and windows, parallel blocks, experts.
FAST = ("llama", "qwen3", "gemma2", "gpt_neox")


@pytest.mark.parametrize("family", [f if f in FAST else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES])
def test_greedy_answers_are_those_of_generate(family, engine):
    model = tiny(family)
    answers = engine(model).generate(prompts(), max_new_tokens=LENGTH, action_do_sample=False, stop_token_ids=[EOS])
    found = measured(model, answers)
    # Where rows differ, it is by a near-tie.
    assert found.log_prob < 1e-3 and found.token < 1e-3 and found.code < 1e-3, found
    assert same_rows(model, answers) >= 0.99
