"""Decisions of a learned switch in rollouts: drawn behind each token, kept, and learned from."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ...checkpoint.files import read_json, read_tensors
from ...plans.model import PlanModel
from ...plans.segments import PlannedAnswer
from ...plans.switch import switch_log_probs
from .choosing import RolloutChoices
from .processes import process
from .replay import REPLAY_FILE

SWITCH_STATES_FILE = "replay_switch_{rank}.safetensors"
# Draws of a batch differ from those of its segments' plans, which are numbered from the batch in steps of 500 000.
FIRST_DRAW = 250_000


@dataclass
class SwitchDecisions:
    """
    Decisions whose states this process has.

    Args:
        states (`torch.Tensor`): `[D, d]`, of tokens, below all plans.
        behind_sentence (`torch.Tensor`), ended (`torch.Tensor`): `[D]`, whether the token ends a sentence, and whether
            the segment was ended behind it.
        log_probs (`torch.Tensor`): `[D]`, at the rollout.
        advantages (`torch.Tensor`), weights (`torch.Tensor`): `[D]`, of the decision, and of its rollout.
        total (`torch.Tensor`): `[1]`, the number of decisions of all processes.
    """

    states: torch.Tensor
    behind_sentence: torch.Tensor
    ended: torch.Tensor
    log_probs: torch.Tensor
    advantages: torch.Tensor
    weights: torch.Tensor
    total: torch.Tensor

    def to(self, device: torch.device | str) -> "SwitchDecisions":
        return SwitchDecisions(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})

    def save(self, folder: str | Path) -> None:
        tensors = {field.name: getattr(self, field.name).cpu().contiguous() for field in fields(self)}
        save_file(tensors, Path(folder) / SWITCH_STATES_FILE.format(rank=process()[0]))

    @classmethod
    def load(cls, folder: str | Path) -> "SwitchDecisions":
        """
        What as many processes have written, or others: decisions are shared out as states of choices are.

        Raises:
            CheckpointError: When files are missing or damaged.
        """
        (rank, processes), writers = process(), read_json(Path(folder) / REPLAY_FILE)["processes"]
        # A process for which there is none has no decisions, and knows how many there are.
        own = list(range(rank, writers, processes))
        parts = [read_tensors(Path(folder) / SWITCH_STATES_FILE.format(rank=writer)) for writer in own or [0]]
        joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0] if name != "total"}
        if not own:
            joined = {name: values[:0] for name, values in joined.items()}
        return cls(**joined, total=parts[0]["total"])


class RolloutSwitch:
    """
    Draws for the rollouts of [`~latent_trl.trainer.plans.choosing.RolloutChoices`] whether their segments end. What is
    drawn for a rollout depends on its place in the batch of all processes and on the place of the token alone.

    Args:
        trainer (`PlanRLTrainer`): Whose switch it is.
        choices (`RolloutChoices`): Of the plans.
    """

    def __init__(self, trainer: Any, choices: RolloutChoices):
        self.model, self.first = trainer.model, choices.first
        shape = (choices.count, trainer.args.max_completion_length)
        self.draws = torch.rand(shape, generator=trainer.generator(choices.batch + FIRST_DRAW, 0))
        self.rollouts: list[int] = []
        self.segments: list[int] = []
        self._made: list[tuple[torch.Tensor, ...]] = []

    def __call__(
        self, rows: list[int], answers: list[PlannedAnswer], said: list[list[int]], states: torch.Tensor
    ) -> torch.Tensor:
        rollouts = [self.first + row for row in rows]
        behind_sentence = self.model.behind_sentence(said)
        logits = self.model.chooser.switch(states, behind_sentence.to(states.device)).cpu()
        places = [len(answer.token_ids) + len(own) - 1 for answer, own in zip(answers, said, strict=True)]
        ended = self.draws[rollouts, places] < logits.sigmoid()
        self.rollouts += rollouts
        self.segments += [len(answer.plans) for answer in answers]
        self._made.append((states.cpu(), behind_sentence, ended, switch_log_probs(logits, ended)))
        return ended

    def decisions(
        self, advantages: dict[tuple[int, int], float], weights: dict[int, float], total: int
    ) -> SwitchDecisions:
        """
        The decisions of rollouts that have an advantage.

        Args:
            advantages (`dict`): Of decisions, by the numbers of their rollout and segment.
            weights (`dict`): Of rollouts, by their number.
            total (`int`): How many decisions all processes have made in rollouts that have an advantage.
        """
        kept = [i for i, key in enumerate(zip(self.rollouts, self.segments, strict=True)) if key in advantages]
        if not kept:
            no, size = torch.zeros(0), self.model.view.hidden_size
            return SwitchDecisions(no.view(0, size), no.bool(), no.bool(), no, no, no, torch.tensor([total]))
        states, behind_sentence, ended, log_probs = (torch.cat(part)[kept] for part in zip(*self._made, strict=True))
        of_kept = [(self.rollouts[i], self.segments[i]) for i in kept]
        return SwitchDecisions(
            states,
            behind_sentence,
            ended,
            log_probs,
            torch.tensor([advantages[key] for key in of_kept]),
            torch.tensor([weights[rollout] for rollout, _ in of_kept]),
            torch.tensor([total]),
        )


def switch_laws(model: PlanModel, decisions: SwitchDecisions) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities `[D]` of decisions as the switch is, and the entropies `[D]` of their laws in nats."""
    logits = model.chooser.switch(decisions.states, decisions.behind_sentence)
    chance = logits.detach().sigmoid()
    return switch_log_probs(logits, decisions.ended), torch.special.entr(chance) + torch.special.entr(1 - chance)
