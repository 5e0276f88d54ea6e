"""How likely answers are under all plans: a prompt is read once below the depth, and so is each answer."""

import torch
from transformers import DynamicCache

from ..data.prompts import EncodedPrompt, PromptEncoder
from .model import PlanModel
from .prompt_cache import PromptCache, next_logits
from .shared_layers import given_lower, record_lower, repeated_call


@torch.no_grad()
def log_likelihoods(
    model: PlanModel,
    encoder: PromptEncoder,
    prompts: list[EncodedPrompt],
    answers: list[list[list[int]]],
    batch_size: int = 512,
) -> list[torch.Tensor]:
    """
    Log-likelihoods of some answers to each prompt under each plan.

    Args:
        model (`PlanModel`): The plans.
        encoder (`PromptEncoder`): Makes inputs of prompts.
        prompts (`list[EncodedPrompt]`): B of them.
        answers (`list[list[list[int]]]`): Tokens of M answers to each; M may differ.
        batch_size (`int`, defaults to `512`): Rows of one pass.

    Returns:
        `list[torch.Tensor]`: `[M, K]` of each prompt, in nats, float32, on the CPU.
    """
    plans = model.plan_config.num_plans
    at_once = max(1, batch_size // plans)
    found = []
    for prompt, own in zip(prompts, answers, strict=True):
        inputs = {name: value.to(model.device) for name, value in encoder.collate([prompt]).items()}
        plain, planned = _read(model, inputs)
        # Answers of like length stand together, so that little is padding.
        order = sorted(range(len(own)), key=lambda m: len(own[m]))
        scores = torch.zeros(len(own), plans)
        for start in range(0, len(own), at_once):
            some = order[start : start + at_once]
            scores[some] = _score(model, plain, planned, [own[m] for m in some]).cpu()
        found.append(scores)
    return found


def _read(model: PlanModel, inputs: dict[str, torch.Tensor]) -> tuple[PromptCache, PromptCache]:
    """A prompt as it is without a plan, one row, and under each plan, K rows."""
    view, depth, plans = model.view, model.depth, model.plan_config.num_plans
    with record_lower(view, depth) as lower:
        plain = PromptCache.encode(view, inputs)
    cache = DynamicCache(config=view.text_config)
    states = lower.states.repeat_interleave(plans, dim=0)
    with (
        view.record() as calls,
        model.plans.active(torch.arange(plans)),
        given_lower(view, depth, states, lower.in_tuples),
    ):
        view.decoder(**repeated_call(lower, plans, cache))
    copies = plain.rows(torch.zeros(plans, dtype=torch.long))
    cache.layers[:depth] = copies.cache.layers[:depth]
    planned = PromptCache(view, cache, calls[-1].states[:, -1:], copies.attention_mask, copies.position_ids)
    return plain, planned


def _score(model: PlanModel, plain: PromptCache, planned: PromptCache, answers: list[list[int]]) -> torch.Tensor:
    """`[M, K]` of M answers to one prompt."""
    plans, count, longest = model.plan_config.num_plans, len(answers), max(map(len, answers))
    ids = torch.tensor([[*answer, *[0] * (longest - len(answer))] for answer in answers], device=model.device)
    mask = torch.tensor([[1] * len(a) + [0] * (longest - len(a)) for a in answers], device=model.device).bool()
    states = planned.states.repeat(count, 1, 1)
    if longest > 1:
        with record_lower(model.view, model.depth) as lower:
            plain.rows(torch.zeros(count, dtype=torch.long)).extend(ids[:, :-1])
        rows = planned.rows(torch.arange(plans).repeat(count))
        below = lower.states.repeat_interleave(plans, dim=0)
        with (
            model.plans.active(torch.arange(plans).repeat(count)),
            given_lower(model.view, model.depth, below, lower.in_tuples),
        ):
            later = rows.extend(ids[:, :-1].repeat_interleave(plans, dim=0))
        states = torch.cat([states, later], dim=1)
    log_probs = next_logits(model.view, states).log_softmax(dim=-1)
    taken = log_probs.gather(-1, ids.repeat_interleave(plans, dim=0)[..., None])[..., 0]
    total = (taken * mask.repeat_interleave(plans, dim=0)).nan_to_num(0.0, neginf=-torch.inf).sum(dim=1)
    return total.view(count, plans)
