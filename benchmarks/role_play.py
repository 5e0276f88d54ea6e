"""
Role-play without pictures: opening questions to MMRole's characters, the reward, and gold that RL does not see.

Prompts name the character, describe it by the first sentences of its condensed profile, and ask for a short answer. The
reward is the similarity to the reference by one embedder. Gold is of other kinds: the similarity by another embedder,
and whether the answer can be told to be that character's. Both are learned from replies of other dialogues.
"""

import json
import math
import random
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

INSTRUCTION = "You are {name}. {description} Stay in character, and answer in one or two short sentences."
DESCRIPTION_WORDS = 40
QUESTION_WORDS = (8, 40)
REFERENCE_WORDS = (15, 70)
SPLIT_SEED = 0
EMBEDDER_TEXTS = 4000
STOP_WORDS = frozenset(
    "a an and are as at be been but by can do for from had has have he her his how i if in into is it its like me my "
    "no not of on one or our out she so some than that the their them then there these they this those to too up us "
    "was we what when which who will with would you your".split()
)


@dataclass(frozen=True)
class RolePlay:
    """
    Args:
        learn (`list[dict]`): Prompts for latent actions to be learned from, without references.
        rl (`list[dict]`): For RL, with `reference`.
        validation (`list[dict]`), test (`list[dict]`): The same, held out.
        recognise (`Recogniser`), embed (`OtherEmbedder`): Gold, learned from dialogues that are in none of these.
    """

    learn: list[dict[str, Any]]
    rl: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    test: list[dict[str, Any]]
    recognise: "Recogniser"
    embed: "OtherEmbedder"

    @classmethod
    def load(cls, folder: Path, learn: int, rl: int, validation: int, test: int, turns: int = 1) -> "RolePlay":
        """
        Args:
            folder (`Path`): MMRole's `dialogues` and `profiles`.
            learn, rl, validation, test (`int`): Dialogues of each split.
            turns (`int`, defaults to `1`): Questions in a prompt; what was said before stands in it.
        """
        rows = dialogues(folder, turns)
        random.Random(SPLIT_SEED).shuffle(rows)
        sizes, parts, start = (test, validation, rl, learn), [], 0
        if sum(sizes) > len(rows):
            raise SystemExit(f"{folder} has {len(rows)} dialogues of this form, and {sum(sizes)} are asked for.")
        for size in sizes:
            parts.append(rows[start : start + size])
            start += size
        held_out, checked, rewarded, free = parts
        free = [{"prompt": row["prompt"]} for row in free]
        others = other_replies(folder)
        every = [text for texts in others.values() for text in texts]
        random.Random(SPLIT_SEED).shuffle(every)
        return cls(free, rewarded, checked, held_out, Recogniser(others), OtherEmbedder(every[:EMBEDDER_TEXTS]))


def is_english(text: str) -> bool:
    return not any("\u4e00" <= letter <= "\u9fff" for letter in text)


def description(profile: str, words: int = DESCRIPTION_WORDS) -> str:
    """The first sentences of a condensed profile, of about so many words in all."""
    text = " ".join(line.strip() for line in profile.splitlines() if line.strip() and not line.startswith("#"))
    found: list[str] = []
    for sentence in re.split(r"(?<=[.!?])\s+", text.replace("**", "")):
        found.append(sentence)
        if sum(len(one.split()) for one in found) >= words // 2:
            break
    return " ".join(" ".join(found).split()[:words])


def dialogues(folder: Path, turns: int = 1) -> list[dict[str, Any]]:
    """English dialogues between a human and a character: `prompt`, `reference` and `character`."""
    profiles = json.loads((folder / "profiles" / "in-distribution" / "profiles.json").read_text(encoding="utf-8"))
    rows = []
    for path in sorted((folder / "dialogues" / "in-distribution" / "human-role").glob("*.json")):
        for dialogue in json.loads(path.read_text(encoding="utf-8")):
            said = dialogue["conversations"][: 2 * turns]
            if len(said) < 2 * turns or not all(is_english(turn["value"]) for turn in said):
                continue
            name = said[1]["role"]
            last, reference = said[-2]["value"], said[-1]["value"]
            if name not in profiles or not _fits(last, QUESTION_WORDS) or not _fits(reference, REFERENCE_WORDS):
                continue
            system = INSTRUCTION.format(name=name, description=description(profiles[name]))
            roles = ("user", "assistant")
            prompt = [{"role": roles[i % 2], "content": turn["value"]} for i, turn in enumerate(said[:-1])]
            prompt.insert(0, {"role": "system", "content": system})
            rows.append({"prompt": prompt, "reference": reference, "character": name})
    return rows


def _fits(text: str, bounds: tuple[int, int]) -> bool:
    return bounds[0] <= len(text.split()) <= bounds[1]


def other_replies(folder: Path) -> dict[str, list[str]]:
    """What characters say to each other and of pictures, by character: dialogues that no prompt is of."""
    found: dict[str, list[str]] = {}
    for kind in ("inter-role", "comment"):
        for path in sorted((folder / "dialogues" / "in-distribution" / kind).glob("*.json")):
            for dialogue in json.loads(path.read_text(encoding="utf-8")):
                for turn in dialogue["conversations"]:
                    name = turn.get("role", turn.get("from"))
                    if name != "human" and is_english(turn["value"]):
                        found.setdefault(name, []).append(turn["value"])
    return found


def words(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


class Recogniser:
    """
    Tells whose reply it is: multinomial naive Bayes over words.

    Args:
        replies (`dict[str, list[str]]`): Replies of each character.
        least (`int`, defaults to `20`): Characters with fewer replies are not known.
    """

    def __init__(self, replies: dict[str, list[str]], least: int = 20):
        counts = {
            name: Counter(w for t in texts for w in words(t)) for name, texts in replies.items() if len(texts) >= least
        }
        self.vocabulary = set().union(*counts.values()) if counts else set()
        self.log_probs = {}
        for name, own in counts.items():
            total = own.total() + len(self.vocabulary)
            self.log_probs[name] = {w: math.log((own[w] + 1) / total) for w in self.vocabulary}

    def reciprocal_rank(self, text: str, character: str) -> float:
        """1 where the reply is likeliest to be the character's, 1/2 where one other is likelier, and so on."""
        said = [w for w in words(text) if w in self.vocabulary]
        if character not in self.log_probs or not said:
            return 0.0
        scores = {name: sum(own[w] for w in said) for name, own in self.log_probs.items()}
        return 1 / sum(score >= scores[character] for score in scores.values())


class OtherEmbedder:
    """
    Latent semantic analysis of other dialogues' replies: another embedder than the reward's.

    Args:
        replies (`list[str]`): Texts to learn from.
        size (`int`, defaults to `100`): Of an embedding.
    """

    def __init__(self, replies: list[str], size: int = 100):
        kept = [self.content(text) for text in replies]
        documents = Counter(word for text in kept for word in set(text))
        self.number = {word: i for i, word in enumerate(sorted(w for w, n in documents.items() if n >= 3))}
        self.weight = torch.tensor([math.log(len(kept) / documents[word]) for word in self.number])
        table = torch.stack([self.weighted(text) for text in kept])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.directions = torch.svd_lowrank(table, q=min(size, *table.shape))[2]

    @staticmethod
    def content(text: str) -> list[str]:
        return [word for word in words(text) if word not in STOP_WORDS]

    def weighted(self, content: list[str]) -> torch.Tensor:
        counts = torch.zeros(len(self.number))
        for word in content:
            if word in self.number:
                counts[self.number[word]] += 1
        return torch.nn.functional.normalize(counts.log1p() * self.weight, dim=0)

    def __call__(self, texts: list[str]) -> torch.Tensor:
        """Unit vectors `[N, size]`; zero for a text of unknown words."""
        embeddings = torch.stack([self.weighted(self.content(text)) for text in texts]) @ self.directions
        return torch.nn.functional.normalize(embeddings, dim=1)


def gold(task: RolePlay, rows: list[dict[str, Any]], texts: list[str]) -> dict[str, list[float]]:
    """What RL does not see, of an answer to each row."""
    references = task.embed([row["reference"] for row in rows])
    return {
        "similar": (task.embed(texts) * references).sum(dim=1).tolist(),
        "recognised": [
            task.recognise.reciprocal_rank(text, row["character"]) for row, text in zip(rows, texts, strict=True)
        ],
    }
