"""Scores a rollout under a policy: log-probabilities and entropies of its codes, and values of its states."""

from dataclasses import dataclass
from typing import Any

import torch

from ...data.prompts import PromptEncoder
from ...generation.action_law import ActionLaw
from ...generation.output import trunk_positions
from ...models.backbone import DecoderCall
from ...models.latent_action_model import LatentActionModel
from ...models.policy import LatentActionPolicy
from .groups import has_groups, policy_over_groups
from .rollout import Rollout


@dataclass
class CodeScores:
    """
    Args:
        log_probs (`torch.Tensor`): `[B, C]` of the codes, under the law that they were sampled from, float32.
        entropies (`torch.Tensor`): `[B, C]` of that law, in nats.
        values (`torch.Tensor`, *optional*): `[B, C]` of the states, where the model has a value head.
        aux_loss (`torch.Tensor`, *optional*): Load-balancing loss of a mixture-of-experts backbone that is trained.
    """

    log_probs: torch.Tensor
    entropies: torch.Tensor
    values: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None


@dataclass
class PolicyPass:
    """
    An objective of [`LatentActionModel`]'s forward, so that wrappers (DDP, FSDP) see the pass: logits, values and
    auxiliary loss of a rollout.

    Args:
        encoder (`PromptEncoder`): Makes the visual inputs where the backbone is run again.
        reference (`LatentActionPolicy`, *optional*): A policy to run over the model's states in place of its own.
        detach_values (`bool`, defaults to `False`): Whether the value's gradient ends at the value head.
        aux_loss (`bool`, defaults to `False`): Whether the backbone's load-balancing loss is wanted.
    """

    encoder: PromptEncoder
    reference: LatentActionPolicy | None = None
    detach_values: bool = False
    aux_loss: bool = False

    def __call__(self, model: LatentActionModel, rollout: Rollout) -> tuple[torch.Tensor, torch.Tensor | None, Any]:
        model.require("policy")
        policy = self.reference if self.reference is not None else model.policy
        length = rollout.action_ids.shape[1]
        device = rollout.action_ids.device
        # The last token's state chooses nothing.
        mask = torch.cat([rollout.prompt_mask, rollout.completion_mask], dim=1)[:, :-1]
        aux_loss = None
        if rollout.context_states is not None:
            states, positions = rollout.context_states.to(device), trunk_positions(rollout.position_ids, device)
        else:
            states, positions, aux_loss = encode(model, rollout, mask, self.encoder, self.aux_loss)
        if rollout.context_states is not None and has_groups(rollout.prompt_index):
            logits, features = policy_over_groups(policy, states, mask, positions, rollout.prompt_index, length)
        else:
            logits, features = policy(states, mask, positions, keep_last=length, return_features=True)
        values = None
        if self.reference is None and model.value_head is not None:
            values = model.value_head(features.detach() if self.detach_values else features)
        return logits, values, aux_loss


def encode(
    model: LatentActionModel, rollout: Rollout, mask: torch.Tensor, encoder: PromptEncoder, aux_loss: bool = False
):
    """Context states `[B, P+C-1, d]`, their position ids, and the auxiliary loss, by a pass of the backbone."""
    call = backbone_pass(model, rollout, mask, encoder, aux_loss)
    ids = torch.cat([rollout.prompt_ids, rollout.completion_ids], dim=1)[:, :-1]
    return model.context_states(call.states, model.has_image(ids)), call.position_ids, call.aux_loss


def backbone_pass(
    model: LatentActionModel, rollout: Rollout, mask: torch.Tensor, encoder: PromptEncoder, aux_loss: bool = False
) -> DecoderCall:
    """The backbone over the rollout's texts but for their last tokens, without its vocabulary head. `mask`
    `[B, P+C-1]` is of their tokens."""
    ids = torch.cat([rollout.prompt_ids, rollout.completion_ids], dim=1)[:, :-1]
    width, device = rollout.prompt_ids.shape[1], ids.device
    inputs = encoder.collate(rollout.prompts)
    inputs = {name: value.to(device) for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    for name in {name for prompt in rollout.prompts for name in prompt.fields}:
        # One entry a token of the prompt, and zeros, for text, in the completion.
        value, inputs[name] = inputs[name], torch.zeros_like(ids)
        inputs[name][:, width - value.shape[1] : width] = value
    if "token_type_ids" in inputs:
        # A backbone may read a prompt both ways: a completion is read forward alone.
        inputs["completion_mask"] = torch.ones_like(ids)
        inputs["completion_mask"][:, :width] = 0
    return model.backbone_view.encode(ids, mask, with_aux_loss=aux_loss, **inputs)


def score(
    model: Any,
    rollout: Rollout,
    law: ActionLaw,
    encoder: PromptEncoder,
    reference: LatentActionPolicy | None = None,
    detach_values: bool = False,
    aux_loss: bool = False,
) -> CodeScores:
    """
    Scores the codes of a rollout.

    Args:
        model (`LatentActionModel`): Or a wrapper of one.
        rollout (`Rollout`): The codes, and the states that chose them where they are kept.
        law (`ActionLaw`): The law that was sampled from.
        encoder, reference, detach_values, aux_loss: As [`PolicyPass`] takes them.
    """
    objective = PolicyPass(encoder, reference, detach_values, aux_loss)
    logits, values, aux = model(objective=objective, batch=rollout).loss
    log_probs, entropies = law.score(logits, rollout.action_ids, rollout.action_support)
    return CodeScores(log_probs, entropies, values, aux)


@torch.no_grad()
def score_in_parts(
    model: Any, rollout: Rollout, law: ActionLaw, encoder: PromptEncoder, rows: int, **options: Any
) -> CodeScores:
    """[`score`] without gradient, `rows` rows of the batch at a time."""
    parts = [
        score(model, rollout.rows(start, start + rows), law, encoder, **options)
        for start in range(0, len(rollout.action_ids), rows)
    ]
    values = None if parts[0].values is None else torch.cat([part.values for part in parts])
    log_probs, entropies = (torch.cat([getattr(part, k) for part in parts]) for k in ("log_probs", "entropies"))
    return CodeScores(log_probs, entropies, values)
