"""The policy over completions of which some share a prompt, whose states are passed once."""

import inspect
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.masking_utils import create_masks_for_generate

from ...models.policy import LatentActionPolicy

# Up to so many states of one prompt and its completions, their attention to each other costs less than a second pass.
PACKED_STATES = 4096


def has_groups(prompt_index: torch.Tensor | None) -> bool:
    """Whether some rows share a prompt."""
    return prompt_index is not None and len(set(prompt_index.tolist())) < len(prompt_index)


def policy_over_groups(
    policy: LatentActionPolicy,
    states: torch.Tensor,
    attention_mask: torch.Tensor,
    position_ids: torch.Tensor | None,
    prompt_index: torch.Tensor,
    length: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The policy over completions of which some share a prompt, which is passed once.

    Args:
        policy (`LatentActionPolicy`): The policy.
        states (`torch.Tensor`): `[B, P+C-1, d]`; rows of one prompt have the same first P.
        attention_mask (`torch.Tensor`), position_ids (`torch.Tensor`, *optional*): Of all states.
        prompt_index (`torch.Tensor`): `[B]`, which prompt is whose.
        length (`int`): C.

    Returns:
        Logits `[B, C, K]` and features `[B, C, hidden_size]` of the positions that chose the completion's codes.
    """
    decoder = policy.decoder_stack.decoder
    layers = {type(layer) for layer in DynamicCache(config=decoder.config).layers}
    if not layers <= {DynamicLayer, DynamicSlidingWindowLayer}:
        return policy(states, attention_mask, position_ids, keep_last=length, return_features=True)
    groups = PromptGroups.of(prompt_index, states.device)
    packed_length = states.shape[1] + (groups.rows.shape[1] - 1) * (length - 1)
    if layers == {DynamicLayer} and takes_packed(decoder) and launches_dominate(states.device, packed_length):
        return policy_over_packed(policy, states, attention_mask, position_ids, groups, length)
    if policy.training and checkpoints_activations(decoder):
        return policy(states, attention_mask, position_ids, keep_last=length, return_features=True)
    return policy_after_prompts(policy, states, attention_mask, position_ids, groups, length)


def checkpoints_activations(decoder) -> bool:
    """Whether a layer's activations are computed anew. transformers' own name for it differs between its releases."""
    return any(getattr(module, "gradient_checkpointing", False) for module in decoder.modules())


def takes_packed(decoder) -> bool:
    """Whether a text model of full attention takes masks and positions as they are given, not by place (ALiBi)."""
    config = decoder.config
    takes_positions = "position_ids" in inspect.signature(decoder.forward).parameters
    return takes_positions and config._attn_implementation in ("sdpa", "eager") and not getattr(config, "alibi", False)


def launches_dominate(device: torch.device, packed_length: int) -> bool:
    """Whether one pass over more pairs of states is cheaper than two passes: on an accelerator, for short texts."""
    return device.type != "cpu" and packed_length <= PACKED_STATES


@dataclass
class PromptGroups:
    """
    The N prompts of a batch, and whose they are.

    Args:
        of_row (`torch.Tensor`): `[B]`, the prompt of each row.
        place (`torch.Tensor`): `[B]`, which of its prompt's rows it is.
        rows (`torch.Tensor`): `[N, G]`, the rows of each prompt; the first of them once more where there are fewer.
        counts (`torch.Tensor`): `[N]`, how many there are.
    """

    of_row: torch.Tensor
    place: torch.Tensor
    rows: torch.Tensor
    counts: torch.Tensor

    @classmethod
    def of(cls, prompt_index: torch.Tensor, device: torch.device) -> "PromptGroups":
        members: dict[int, list[int]] = {}
        place, of_row = [], []
        for row, prompt in enumerate(prompt_index.tolist()):
            group = members.setdefault(prompt, [])
            of_row.append(list(members).index(prompt))
            place.append(len(group))
            group.append(row)
        most = max(map(len, members.values()))
        rows = [group + group[:1] * (most - len(group)) for group in members.values()]
        counts = [len(group) for group in members.values()]
        return cls(*(torch.tensor(x, device=device) for x in (of_row, place, rows, counts)))


def policy_after_prompts(policy, states, attention_mask, position_ids, groups: PromptGroups, length: int):
    """Arguments and results of [`policy_over_groups`], in two passes: the prompts' keys and values are copied for the
    rows of their groups; gradients flow through the copies."""
    first, of_row = groups.rows[:, 0], groups.of_row
    width = states.shape[1] - length + 1
    cache = DynamicCache(config=policy.decoder_stack.decoder.config)
    logits, features = policy(
        states[first, :width],
        attention_mask[first, :width],
        None if position_ids is None else position_ids.index_select(-2, first)[..., :width],
        past_key_values=cache,
        keep_last=1,
        return_features=True,
    )
    logits, features = logits[of_row], features[of_row]
    if length == 1:
        return logits, features
    for layer in cache.layers:
        layer.batch_select_indices(of_row)
    later = policy(
        states[:, width:],
        attention_mask,
        None if position_ids is None else position_ids[..., width:],
        past_key_values=cache,
        return_features=True,
    )
    return torch.cat([logits, later[0]], dim=1), torch.cat([features, later[1]], dim=1)


def policy_over_packed(policy, states, attention_mask, position_ids, groups: PromptGroups, length: int):
    """Arguments and results of [`policy_over_groups`], in one pass: a prompt and all its completions stand behind each
    other, and a completion sees the prompt and itself. Half the launches of two passes, more pairs of states."""
    device, most = states.device, groups.rows.shape[1]
    width, tail = states.shape[1] - length + 1, length - 1
    first = groups.rows[:, 0]

    def packed(tensor: torch.Tensor) -> torch.Tensor:
        """`[..., B, P+C-1, x]` as `[..., N, P+G(C-1), x]`."""
        rows = tensor[..., groups.rows, width:, :].flatten(-3, -2)
        return torch.cat([tensor[..., first, :width, :], rows], dim=-2)

    if position_ids is None:
        position_ids = torch.arange(states.shape[1], device=device).expand(states.shape[:2])
    # Rows that only fill up a group are seen by nobody.
    there = torch.arange(most, device=device) < groups.counts[:, None]
    mask = packed(attention_mask[..., None])[..., 0].bool()
    mask[:, width:] &= there.repeat_interleave(tail, dim=1)
    completion = F.pad(torch.arange(1, most + 1, device=device).repeat_interleave(tail), (width, 0))

    def may_see(batch, head, query, key):
        return (completion[key] == 0) | (completion[key] == completion[query])

    together = packed(states)
    decoder_config = policy.decoder_stack.decoder.config
    logits, features = policy(
        together,
        create_masks_for_generate(decoder_config, together, mask, None, and_mask_function=may_see),
        packed(position_ids[..., None])[..., 0],
        keep_last=1 + most * tail,
        return_features=True,
    )

    def by_row(tensor: torch.Tensor) -> torch.Tensor:
        later = tensor[:, 1:].unflatten(1, (most, tail))[groups.of_row, groups.place]
        return torch.cat([tensor[groups.of_row, :1], later], dim=1)

    return by_row(logits), by_row(features)
