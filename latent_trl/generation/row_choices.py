"""Rows of one batch whose codes are chosen in different ways: by their own laws, bans, forced codes and seeds."""

from dataclasses import dataclass, field

import torch

from .choice import ActionChoice
from .likeliest_token import Says, of_some


@dataclass
class RowChoices:
    """
    Several [`ActionChoice`] for the rows of one batch. To be passed to `generate` as `action_choice`.

    Args:
        parts (`list[tuple[list[int], ActionChoice]]`): Rows and how their codes are chosen; each row is in one part.
            With several samples a prompt, rows are all prompts for the first sample of each, then for the second. The
            tensors of a choice count its own rows, and its `copies` is 1.
        action_ids (`torch.Tensor`), log_probs (`torch.Tensor`): `[B]`, what was chosen last; log-probabilities as they
            came, not finite where the policy's are not. What `generate` calls at each token may read them.
    """

    parts: list[tuple[list[int], ActionChoice]]
    action_ids: torch.Tensor = field(init=False)
    log_probs: torch.Tensor = field(init=False)
    copies: int = field(init=False, default=1)
    forced: torch.Tensor | None = field(init=False, default=None)

    @property
    def greedy(self) -> bool:
        """Whether some rows ask what codes say."""
        return any(choice.greedy for _, choice in self.parts)

    def choose(
        self, logits: torch.Tensor, step: int, says: Says | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, None]:
        """Codes `[B]` and their log-probabilities `[B]`, as [`ActionChoice.choose`]; supports are not kept."""
        self.action_ids = torch.empty(len(logits), dtype=torch.long, device=logits.device)
        self.log_probs = torch.empty(len(logits), device=logits.device)
        for rows, choice in self.parts:
            of_rows = None
            if says is not None and choice.greedy:
                of_rows = of_some(says, torch.tensor(rows, device=logits.device))
            self.action_ids[rows], self.log_probs[rows], _ = choice.choose(logits[rows], step, of_rows)
        # A row without finite probabilities is for the caller to end; the others go on.
        return self.action_ids, self.log_probs.nan_to_num(), None
