"""The policy's law over tokens, and how far the backbone's own head is from it."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from ...data.prompts import PromptEncoder
from ...generation.action_law import ActionLaw
from ...models.cross_entropy import CHUNK_VALUES
from ...models.latent_action_model import LatentActionModel
from ...models.spoken import chunk_size, mixture_law, spoken_laws
from ..rollout.rollout import Rollout
from ..rollout.scoring import PolicyPass, backbone_pass


@torch.no_grad()
def teacher_law(model: LatentActionModel, states: torch.Tensor, probs: torch.Tensor, teacher: str) -> torch.Tensor:
    """
    Probabilities `[M, V]` of the next tokens of a policy, in float32.

    Args:
        model (`LatentActionModel`): With codebook and world model.
        states (`torch.Tensor`): `[M, d]` context states.
        probs (`torch.Tensor`): `[M, K]`, the policy's distribution over codes.
        teacher (`str`): `"mixture"`: what each code thinks of all tokens; `"spoken"`: its likeliest token alone.
    """
    parts = []
    size = chunk_size(model, model.config.num_codes, states.device)
    never = torch.tensor(model.config.vision_token_ids, dtype=torch.long, device=states.device)
    for part, of_codes in zip(states.split(size), probs.split(size), strict=True):
        said, sureness, laws = spoken_laws(model, part)
        if teacher == "mixture":
            law = mixture_law(laws, sureness, of_codes)
            # Placeholders of pictures are never generated.
            law.index_fill_(1, never[never < law.shape[1]], 0.0)
            parts.append(law / law.sum(dim=1, keepdim=True))
        else:
            if len(never):
                said = laws.index_fill_(2, never[never < laws.shape[2]], 0.0).argmax(dim=-1)
            parts.append(torch.zeros_like(laws[:, 0]).scatter_add_(1, said, of_codes))
    return torch.cat(parts)


@dataclass
class DistillationLosses:
    """
    An objective of [`LatentActionModel`]'s forward, so that wrappers (DDP, FSDP) see the pass.

    Args:
        encoder (`PromptEncoder`): Makes the visual inputs of prompts.
        law (`ActionLaw`): Of the codes.
        teacher (`str`): As [`teacher_law`] takes it.
    """

    encoder: PromptEncoder
    law: ActionLaw
    teacher: str

    def __call__(self, model: LatentActionModel, rollout: Rollout) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Args:
            model (`LatentActionModel`): Whose backbone, adapter and all, is taught.
            rollout (`Rollout`): Samples with their context states, which the backbone without the adapter gave, and
                with their prompts.

        Returns:
            KL(policy ‖ backbone) in nats `[M]` of each token of the completions, whether both think the same token the
            likeliest `[M]`, and the boolean mask `[B, C]` of the tokens.
        """
        mask, width = rollout.completion_mask.bool(), rollout.prompt_ids.shape[1]
        with torch.no_grad():
            logits, _, _ = PolicyPass(self.encoder)(model, rollout)
            probs = self.law.log_probs(logits[mask], self.law.support(logits[mask])).exp()
            assert rollout.context_states is not None, "the samples carry the states of the backbone without adapter"
            states = rollout.context_states[:, width - 1 :][mask].to(logits.device)
            wanted = teacher_law(model, states, probs, self.teacher)
        attention_mask = torch.cat([rollout.prompt_mask, rollout.completion_mask], dim=1)[:, :-1]
        call = backbone_pass(model, rollout, attention_mask, self.encoder)
        kl, same = divergence(model, call.states[:, width - 1 :][mask], wanted)
        return kl, same, mask


def divergence(
    model: LatentActionModel, states: torch.Tensor, wanted: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(`wanted` ‖ what the head says) `[M]` at the backbone's `states` `[M, d]`, for laws `wanted` `[M, V]`, and
    whether their likeliest tokens are the same. Logits are made again in the backward pass where they are many."""

    def of_part(part: torch.Tensor, law: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        log_probs = F.log_softmax(model.backbone_view.logits(part[None])[0].float(), dim=-1)
        kl = torch.special.xlogy(law, law).sum(dim=-1) - (law * log_probs).sum(dim=-1)
        return kl, (log_probs.argmax(dim=-1) == law.argmax(dim=-1)).float()

    size = max(1, CHUNK_VALUES // wanted.shape[1])
    if len(wanted) <= size:
        return of_part(states, wanted)
    parts = [
        checkpoint(of_part, part, law, use_reentrant=False)
        for part, law in zip(states.split(size), wanted.split(size), strict=True)
    ]
    kl, same = map(torch.cat, zip(*parts, strict=True))
    return kl, same
