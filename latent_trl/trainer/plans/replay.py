"""All rollouts of a bandit so far: which plan was tried for which prompt, and its reward."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from ...checkpoint.files import read_json, read_tensors

REPLAY_FILE = "replay.json"
STATES_FILE = "replay_states.safetensors"


class Replay:
    """Rollouts, and the states of their prompts, which do not change."""

    def __init__(self):
        self.states: dict[int, torch.Tensor] = {}
        self.prompts: list[int] = []
        self.plans: list[int] = []
        self.rewards: list[float] = []

    def __len__(self) -> int:
        return len(self.rewards)

    def add(self, prompt: int, plan: int, reward: float) -> None:
        """A rollout of the prompt of that number, whose `states` `[P, F]` are known."""
        self.prompts.append(prompt)
        self.plans.append(plan)
        self.rewards.append(reward)

    def targets(self) -> torch.Tensor:
        """Rewards as probabilities: as they are in [0, 1]; else scaled by the least and the greatest so far."""
        rewards = torch.tensor(self.rewards)
        low, high = rewards.min(), rewards.max()
        if low >= 0 and high <= 1:
            return rewards
        return (rewards - low) / (high - low) if high > low else torch.full_like(rewards, 0.5)

    def batch(
        self, size: int, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Some rollouts, drawn without replacement.

        Returns:
            States `[N, P, F]`, padded on the left, their mask `[N, P]`, plans `[N]` and targets `[N]`.
        """
        places = torch.randperm(len(self), generator=generator)[:size].tolist()
        states, mask = padded_states([self.states[self.prompts[place]] for place in places])
        plans = torch.tensor([self.plans[place] for place in places])
        return states, mask, plans, self.targets()[places]

    def save(self, folder: str | Path) -> None:
        record = {"prompts": self.prompts, "plans": self.plans, "rewards": self.rewards}
        (Path(folder) / REPLAY_FILE).write_text(json.dumps(record) + "\n", encoding="utf-8")
        save_file(
            {str(prompt): states.contiguous() for prompt, states in self.states.items()}, Path(folder) / STATES_FILE
        )

    @classmethod
    def load(cls, folder: str | Path) -> "Replay":
        """Raises `CheckpointError` when the files are missing or damaged."""
        replay, record = cls(), read_json(Path(folder) / REPLAY_FILE)
        replay.prompts, replay.plans, replay.rewards = (record[name] for name in ("prompts", "plans", "rewards"))
        replay.states = {int(name): states for name, states in read_tensors(Path(folder) / STATES_FILE).items()}
        return replay


def padded_states(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """States `[P_i, F]` of prompts as `[N, P, F]`, padded on the left, and their mask `[N, P]`."""
    longest = max(map(len, rows))
    states = torch.stack([torch.nn.functional.pad(row, (0, 0, longest - len(row), 0)) for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return states, mask
