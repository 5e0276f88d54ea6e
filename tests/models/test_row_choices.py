"""Rows whose codes are chosen in different ways in one batch get what they get alone."""

import pytest
import torch

from latent_trl.generation.action_law import ActionLaw
from latent_trl.generation.choice import ActionChoice
from latent_trl.generation.row_choices import RowChoices


@pytest.mark.parametrize("family", ["llama", "llava"])
def test_rows_of_one_batch_are_chosen_as_alone(make_latent, family):
    model, tiny = make_latent(family)
    codes = model.config.num_codes
    options = {"max_new_tokens": 6, "return_dict_in_generate": True}
    bias = torch.zeros(codes)
    bias[[0, 1]] = -torch.inf

    def ways():
        generator = torch.Generator().manual_seed(5)
        return [
            ([0], ActionChoice(ActionLaw(1.7, 5), generator=generator)),
            ([2], ActionChoice(do_sample=False, forced=torch.tensor([[3, -1, 2]]))),
            ([1], ActionChoice(do_sample=False, bias=bias)),
        ]

    together = model.generate(**tiny.inputs, action_choice=RowChoices(ways()), **options)
    forced = torch.full((3, 3), -1)
    forced[2] = torch.tensor([3, -1, 2])
    same = [
        model.generate(
            **tiny.inputs,
            action_choice=RowChoices([([0], ways()[0][1]), ([1, 2], ActionChoice(do_sample=False))]),
            **options,
        ),
        model.generate(**tiny.inputs, action_do_sample=False, action_bias=bias, **options),
        model.generate(**tiny.inputs, action_do_sample=False, forced_action_ids=forced, **options),
    ]
    for row, alone in enumerate(same):
        length = min(alone.action_ids.shape[1], together.action_ids.shape[1])
        assert torch.equal(alone.action_ids[row, :length], together.action_ids[row, :length])
        assert torch.allclose(alone.action_log_probs[row, :length], together.action_log_probs[row, :length], atol=1e-5)
    assert together.action_support is None


def test_a_row_without_finite_logits_leaves_the_others():
    logits = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    logits[1] = torch.nan
    choices = RowChoices([([0, 2], ActionChoice(do_sample=False)), ([1], ActionChoice(ActionLaw(0.5)))])
    action_ids, log_probs, _ = choices.choose(logits, 0)
    assert log_probs.isfinite().all() and choices.log_probs.isnan().tolist() == [False, True, False]
    assert action_ids[[0, 2]].tolist() == logits[[0, 2]].argmax(dim=-1).tolist()


def test_two_ways_of_choosing_are_refused(make_latent):
    model, tiny = make_latent("llama")
    choices = RowChoices([([0, 1, 2], ActionChoice())])
    with pytest.raises(ValueError, match="`action_choice` says how codes are chosen"):
        model.generate(**tiny.inputs, action_choice=choices, action_temperature=0.5)
