"""Choices of plans that were made: where, which, and what the answer was worth."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from ...checkpoint.files import read_json, read_tensors
from ...plans.chooser import PromptStates
from .processes import process

REPLAY_FILE = "replay.json"
STATES_FILE = "replay_states_{rank}.safetensors"
# Before the names of states under plans in that file.
UNDER_PLANS = "plans/"
COLUMNS = ("prompts", "said", "plans", "rewards", "owners")


@dataclass
class Choices:
    """
    Some choices.

    Args:
        states (`torch.Tensor`), mask (`torch.Tensor`): `[M, P, F]` and `[M, P]`, what the chooser reads, padded on the
            left; once where several choices were made at the same states.
        rows (`torch.Tensor`): `[N]`, which of them each choice was made at.
        plans (`torch.Tensor`): `[N]`.
        places (`list[int]`): Their numbers.
        planned (`torch.Tensor`, *optional*): `[M, K, F]`, where the chooser reads plans.
    """

    states: torch.Tensor
    mask: torch.Tensor
    rows: torch.Tensor
    plans: torch.Tensor
    places: list[int]
    planned: torch.Tensor | None = None

    def to(self, device: torch.device | str) -> "Choices":
        """The same with its tensors on a device."""
        states, mask, rows, plans = (x.to(device) for x in (self.states, self.mask, self.rows, self.plans))
        planned = None if self.planned is None else self.planned.to(device)
        return Choices(states, mask, rows, plans, self.places, planned)

    def read(self, of_states: torch.Tensor) -> torch.Tensor:
        """What a network said of `states` `[M, ...]`, for each choice `[N, ...]`."""
        return of_states[self.rows]


class Replay:
    """
    Choices, a segment each, with the states of their prompts and of what had been said there. Backbones are causal, so
    those of a prompt are the same whatever follows. All processes have all choices; states are where they were read.
    """

    def __init__(self):
        self.states: dict[int, torch.Tensor] = {}
        self.said_states: dict[str, torch.Tensor] = {}
        # Of the last positions under each plan, `[K, F]`, where the chooser reads plans; by `place_key`.
        self.planned: dict[str, torch.Tensor] = {}
        self.prompts: list[int] = []
        self.said: list[str] = []
        self.plans: list[int] = []
        self.rewards: list[float] = []
        # The process that has the states of each.
        self.owners: list[int] = []
        # What a trainer notes of each choice besides, by name.
        self.notes: dict[str, list[float]] = {}
        # Updates that follow each other may read the same choices.
        self._last: Choices | None = None

    def __len__(self) -> int:
        return len(self.rewards)

    def add(self, prompt: int, plan: int, reward: float, said: str = "", owner: int = 0, **notes: float) -> None:
        """
        A choice for the prompt of that number, whose `states` `[P, F]` are known to the process `owner`; `said` is the
        key of `said_states` `[n, F]` where a segment starts behind the prompt.
        """
        self.prompts.append(prompt)
        self.said.append(said)
        self.plans.append(plan)
        self.rewards.append(reward)
        self.owners.append(owner)
        for name, value in notes.items():
            self.notes.setdefault(name, []).append(value)

    def start_batch(self) -> None:
        """Forgets what had been said where no choice that is kept was made."""
        self._last = None
        kept = dict.fromkeys(self.said)
        self.said_states = {name: states for name, states in self.said_states.items() if name in kept}
        self.planned = {name: states for name, states in self.planned.items() if name.isdigit() or name in kept}

    def clear_choices(self) -> None:
        """Forgets the choices; states stay."""
        for name in COLUMNS:
            setattr(self, name, [])
        self.notes, self._last = {}, None

    def noted(self, name: str, places: list[int]) -> torch.Tensor:
        """A note of some choices, `[N]`."""
        return torch.tensor(self.notes[name])[places]

    def targets(self) -> torch.Tensor:
        """Rewards as probabilities: as they are in [0, 1]; else scaled by the least and the greatest so far."""
        rewards = torch.tensor(self.rewards)
        low, high = rewards.min(), rewards.max()
        if low >= 0 and high <= 1:
            return rewards
        return (rewards - low) / (high - low) if high > low else torch.full_like(rewards, 0.5)

    def drawn(self, size: int, generator: torch.Generator) -> list[int]:
        """Numbers of some choices, drawn without replacement, in order."""
        return torch.randperm(len(self), generator=generator)[:size].sort().values.tolist()

    def own(self, places: list[int]) -> list[int]:
        """Those of some choices whose states this process has."""
        rank = process()[0]
        return [place for place in places if self.owners[place] == rank]

    def choices(self, places: list[int], device: torch.device | str = "cpu") -> Choices:
        """Choices of these numbers on a device. They stay there until others are asked for, or more are added."""
        if self._last is None or self._last.places != places:
            self._last = None
            self._last = self._gathered(places).to(device)
        return self._last

    def _gathered(self, places: list[int]) -> Choices:
        keys = [(self.prompts[place], self.said[place]) for place in places]
        numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
        states, mask, planned = padded_states([self.states_at(*key) for key in numbers])
        rows = torch.tensor([numbers[key] for key in keys])
        return Choices(states, mask, rows, torch.tensor([self.plans[place] for place in places]), places, planned)

    def keep(self, prompt: int, found: PromptStates, said: str = "", length: int = 0) -> None:
        """Keeps what the chooser read at a prompt, or where `length` tokens had been said behind it."""
        if not said:
            self.states[prompt] = found.states
        elif said not in self.said_states:
            self.said_states[said] = found.states[-length:].clone()
        if found.planned is not None:
            self.planned.setdefault(place_key(prompt, said), found.planned)

    def states_at(self, prompt: int, said: str = "") -> PromptStates:
        """What the chooser reads of a prompt and of what was said behind it."""
        states = self.states[prompt]
        whole = torch.cat([states, self.said_states[said]]) if said else states
        return PromptStates(whole, self.planned.get(place_key(prompt, said)))

    def save(self, folder: str | Path) -> None:
        """Writes the choices, which all processes have, and the states that this one has."""
        rank = process()[0]
        if rank == 0:
            record = {**{name: getattr(self, name) for name in COLUMNS}, "notes": self.notes}
            record["processes"] = process()[1]
            (Path(folder) / REPLAY_FILE).write_text(json.dumps(record) + "\n", encoding="utf-8")
        states = {str(prompt): states.contiguous() for prompt, states in self.states.items()}
        states |= {name: states.contiguous() for name, states in self.said_states.items()}
        states |= {UNDER_PLANS + name: states.contiguous() for name, states in self.planned.items()}
        save_file(states, Path(folder) / STATES_FILE.format(rank=rank))

    @classmethod
    def load(cls, folder: str | Path) -> "Replay":
        """
        What as many processes have written, or others: states are then shared out anew.

        Raises:
            CheckpointError: When files are missing or damaged.
        """
        replay, record, (rank, processes) = cls(), read_json(Path(folder) / REPLAY_FILE), process()
        for name in COLUMNS:
            setattr(replay, name, record[name])
        replay.owners = [owner % processes for owner in replay.owners]
        replay.notes = record["notes"]
        for writer in range(rank, record["processes"], processes):
            for name, states in read_tensors(Path(folder) / STATES_FILE.format(rank=writer)).items():
                if name.startswith(UNDER_PLANS):
                    replay.planned[name.removeprefix(UNDER_PLANS)] = states
                elif name.isdigit():
                    replay.states[int(name)] = states
                else:
                    replay.said_states[name] = states
        return replay


def said_key(prompt: int, said: list[int]) -> str:
    """The name of the beginning `said` of an answer to a prompt; of nothing it is empty."""
    return f"{prompt}:{','.join(map(str, said))}" if said else ""


def place_key(prompt: int, said: str) -> str:
    """The name of the place behind a prompt and the beginning `said` of an answer to it, as `said_key` names that."""
    return said or str(prompt)


def place_of(name: str) -> tuple[int, list[int]]:
    """The prompt, and the tokens behind it, of the name that `place_key` gave."""
    number, _, said = name.partition(":")
    return int(number), [int(token) for token in said.split(",")] if said else []


def padded_states(
    rows: list[PromptStates], device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """
    What the chooser reads of N prompts, on a device: states `[N, P, F]`, padded on the left, their mask `[N, P]`, and
    `[N, K, F]` under each plan, where it reads plans.
    """
    longest = max(len(row.states) for row in rows)
    states = torch.nn.utils.rnn.pad_sequence([row.states for row in rows], batch_first=True, padding_side="left")
    mask = torch.tensor([[0] * (longest - len(row.states)) + [1] * len(row.states) for row in rows])
    planned = [row.planned for row in rows if row.planned is not None]
    return states.to(device), mask.to(device), torch.stack(planned).to(device) if planned else None
