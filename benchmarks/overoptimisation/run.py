"""
What happens when the reward can be gamed: RL over codes beside RL over tokens, under three proxies of what is wanted.

    python benchmarks/overoptimisation/run.py --size reduced     # minutes on two cores
    python benchmarks/overoptimisation/run.py --size pocket      # hours

Proxy and gold are measured along each run, greedy and sampled. A run *falls* at the first point from which on its
sampled gold is below its start. Its *best gold* is that of the greedy answers at the point that is best on validation
pictures. Every run leaves a file in `--output_dir`; a run that is there is not done again.
"""

import argparse
import contextlib
import io
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "reproduction")]

from transformers import TrainerCallback  # noqa: E402

TOKENS_LONG = 24
PROXIES = ("attributes", "learned", "embedding")


@dataclass(frozen=True)
class Arm:
    """
    How a policy is trained.

    Args:
        name (`str`): In tables.
        kind (`str`): `tokens` or `codes`.
        options (`dict`): Of the trainer.
        algorithm (`str`): `grpo`, `rloo` or `ppo`, over codes.
    """

    name: str
    kind: str
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    algorithm: str = "grpo"


@dataclass(frozen=True)
class Size:
    """`steps` are of tokens; codes get `factor` times as many. `first` are the arms of the comparison."""

    seeds: tuple[int, ...]
    proxies: tuple[str, ...]
    tokens: tuple[str, ...]
    codes: tuple[str, ...]
    steps: int = 40
    factor: int = 4
    points: int = 8
    questions: int = 120
    validation: int = 60


# A KL that weighs nothing is logged, and changes nothing.
NO_KL = {"beta": 1e-9}
TOKENS = {
    f"tokens, {rate}, {name}": Arm(f"tokens, {rate}, {name}", "tokens", {"learning_rate": float(rate), **options})
    for rate in ("1e-4", "3e-4")
    for name, options in (("no KL", NO_KL), ("KL 0.1", {"beta": 0.1}), ("KL 0.5", {"beta": 0.5}))
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "no KL": ("grpo", NO_KL),
    "default": ("grpo", {}),
    "KL 0.5": ("grpo", {"beta": 0.5}),
    "anchor 0.1": ("grpo", {"anchor_coef": 0.1}),
    "anchor 1": ("grpo", {"anchor_coef": 1.0}),
    "rloo": ("rloo", {}),
    "ppo": ("ppo", {"num_iterations": 2, "value_learning_rate": 1e-3}),
}
CODES = {
    f"codes, {name}": Arm(f"codes, {name}", "codes", {"learning_rate": 3e-4, **options}, algorithm)
    for name, (algorithm, options) in VARIANTS.items()
}
ARMS = TOKENS | CODES
SIZES = {
    "reduced": Size((0,), PROXIES, ("tokens, 3e-4, no KL", "tokens, 3e-4, KL 0.5"), ("codes, KL 0.5",), 24),
    "pocket": Size((0, 1, 2), PROXIES, tuple(TOKENS), tuple(CODES)),
    "quick": Size((0,), ("attributes",), ("tokens, 3e-4, no KL",), ("codes, default",), 2, 2, 2, 12, 12),
}


@dataclass(frozen=True)
class Run:
    arm: str
    proxy: str
    seed: int

    @property
    def key(self) -> str:
        return f"{self.proxy} {self.arm} {self.seed}"


class Frontier(TrainerCallback):
    """Proxy and gold of greedy answers and of samples, at points along a run."""

    def __init__(self, speaker, reward, size: Size, every: int, updates: int):
        from proxies import requests

        rows = requests("test")
        self.validation, self.test = rows[: size.validation], rows[size.validation : size.validation + size.questions]
        self.speaker, self.reward, self.every, self.updates = speaker, reward, every, updates
        self.points: list[dict[str, Any]] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.take(0, state)

    def on_step_end(self, args, state, control, **kwargs):
        rollouts, left = divmod(state.global_step, self.updates)
        if left == 0 and (rollouts % self.every == 0 or state.global_step == state.max_steps):
            self.take(rollouts, state)

    def take(self, rollouts: int, state) -> None:
        import torch
        from proxies import WORDS, gold, whole

        training = self.speaker.model.training
        rows = self.validation + self.test
        columns = {name: [row[name] for row in rows] for name in (*WORDS, "reference")}
        point: dict[str, Any] = {"rollouts": rollouts * 128}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for law, temperature in (("greedy", None), ("sampled", 1.0)):
                texts = self.speaker.say(rows, temperature, TOKENS_LONG)
                point[law] = {
                    "gold": gold(texts, **columns),
                    "proxy": self.reward(prompts=None, completions=texts, **columns),
                    "whole": [float(whole(text)) for text in texts],
                    "texts": texts[:3],
                }
        kl = [entry["kl"] for entry in state.log_history if "kl" in entry]
        point["kl"] = kl[-1] if kl else 0.0
        self.points.append(point)
        self.speaker.model.train(training)


def learn_space(folder: Path, seed: int, quick: bool) -> Path:
    """The latent action space of a seed, learned once."""
    from arms import learn
    from matrix import SIZES as LEARNING
    from matrix import SPACES, Cell

    model = folder / "spaces" / str(seed) / "model"
    if not model.is_dir():
        size = LEARNING["reduced" if quick else "pocket"]
        with contextlib.redirect_stdout(io.StringIO()):
            learn(Cell("space", "learn", seed, dict(SPACES["space"])), size, model.parent)
    return model


def train(run: Run, size: Size, folder: Path, quick: bool) -> dict[str, Any]:
    import torch
    from arms import CodeSpeaker, TokenSpeaker, described, load_backbone, load_processor, quiet, small_talk
    from datasets import Dataset, Features, Image, List, Value
    from matrix import SIZES as LEARNING
    from proxies import proxy, requests
    from transformers import set_seed
    from trl import GRPOConfig, GRPOTrainer

    import latent_trl
    from latent_trl.data.shapes import shape_pairs

    torch.set_num_threads(1)
    arm, common = ARMS[run.arm], LEARNING["pocket"]
    processor = load_processor(common)
    reward = proxy(run.proxy, TokenSpeaker(load_backbone(common), processor).say)
    set_seed(run.seed)
    message = {"role": Value("string"), "content": Value("string")}
    texts = {name: Value("string") for name in ("reference", "colour", "shape", "size")}
    features = Features({"prompt": List(message), "images": List(Image()), **texts})
    rows = Dataset.from_list(requests("rl", run.seed), features=features)
    steps = size.steps * (size.factor if arm.kind == "codes" else 1)
    updates = arm.options.get("num_iterations", 1)
    options = {
        "output_dir": str(folder / "work" / run.key),
        "max_steps": steps * updates,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 128,
        "num_generations": 8,
        "max_completion_length": TOKENS_LONG,
        "logging_steps": 1,
        "bf16": False,
        "gradient_checkpointing": False,
        "seed": run.seed,
        **quiet(common),
        **arm.options,
    }
    every = max(1, steps // size.points)
    if arm.kind == "tokens":
        model = load_backbone(common)
        model.requires_grad_(False)
        for layer in model.get_decoder().layers[-2:]:
            layer.requires_grad_(True)
        frontier = Frontier(TokenSpeaker(model, processor), reward, size, every, updates)
        GRPOTrainer(
            model, reward, GRPOConfig(**options), rows, processing_class=processor, callbacks=[frontier]
        ).train()
        return {"points": frontier.points}
    model = latent_trl.LatentActionModel.from_pretrained(
        learn_space(folder, run.seed, quick), backbone=load_backbone(common)
    )
    frontier = Frontier(CodeSpeaker(model, processor), reward, size, every, updates)
    name = f"LatentAction{arm.algorithm.upper()}"
    held = None
    if "anchor_coef" in arm.options:
        captions = described(shape_pairs("base", 600, run.seed))
        held = list(small_talk(len(captions), run.seed, 240)) + captions
    trainer = getattr(latent_trl, f"{name}Trainer")(
        model,
        reward,
        getattr(latent_trl, f"{name}Config")(**options),
        train_dataset=rows,
        processing_class=processor,
        callbacks=[frontier],
        anchor_dataset=held,
    )
    trainer.train()
    return {"points": frontier.points}


def do(run: Run, size: Size, folder: Path, quick: bool) -> None:
    path = folder / "runs" / f"{run.key}.json"
    if path.is_file():
        return
    with contextlib.redirect_stdout(io.StringIO()):
        found = train(run, size, folder, quick)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**asdict(run), **found}), encoding="utf-8")


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def fall(points: list[dict[str, Any]]) -> int | None:
    """Rollouts after which the sampled gold is below its start and stays there; `None` where it does not fall."""
    golds = [mean(point["sampled"]["gold"]) for point in points]
    at = None
    for point, value in zip(points, golds):
        if value >= golds[0]:
            at = None
        elif at is None:
            at = point["rollouts"]
    return at


def best(points: list[dict[str, Any]], validation: int) -> dict[str, Any]:
    """The point whose greedy answers are the best on the validation pictures."""
    return max(points, key=lambda point: mean(point["greedy"]["gold"][:validation]))


def summary(folder: Path, size: Size) -> dict[str, Any]:
    """The figures of all runs, and the comparison of the best arm of each kind."""
    from latent_trl.evaluation.intervals import paired_bootstrap

    runs = {}
    for arm in (*size.tokens, *size.codes):
        for proxy in size.proxies:
            for seed in size.seeds:
                path = folder / "runs" / f"{Run(arm, proxy, seed).key}.json"
                if path.is_file():
                    runs[arm, proxy, seed] = json.loads(path.read_text(encoding="utf-8"))["points"]
    arms = {}
    for arm in {name: None for name, *_ in runs}:
        own = [points for (name, *_), points in runs.items() if name == arm]
        tops = [best(points, size.validation) for points in own]
        arms[arm] = {
            "best_gold": mean([mean(top["greedy"]["gold"][size.validation :]) for top in tops]),
            "best_gold_validation": mean([mean(top["greedy"]["gold"][: size.validation]) for top in tops]),
            "last_gold_sampled": mean([mean(points[-1]["sampled"]["gold"]) for points in own]),
            "last_whole_sampled": mean([mean(points[-1]["sampled"]["whole"]) for points in own]),
            "rollouts_to_fall": [fall(points) for points in own],
            "rollouts": own[0][-1]["rollouts"],
            "questions": [value for top in tops for value in top["greedy"]["gold"][size.validation :]],
        }
    chosen = {
        kind: max((a for a in names if a in arms), key=lambda a: arms[a]["best_gold_validation"])
        for kind, names in (("tokens", size.tokens), ("codes", size.codes))
    }
    tokens, codes = arms[chosen["tokens"]], arms[chosen["codes"]]
    interval = paired_bootstrap(codes["questions"], tokens["questions"])
    return {
        "best_gold_codes": codes["best_gold"],
        "best_gold_tokens": tokens["best_gold"],
        "difference": interval.estimate,
        "interval": [interval.low, interval.high],
        "rollouts_to_fall_codes": codes["rollouts_to_fall"],
        "rollouts_to_fall_tokens": tokens["rollouts_to_fall"],
        "chosen": chosen,
        "arms": {name: {k: v for k, v in arm.items() if k != "questions"} for name, arm in arms.items()},
        "frontier": {
            " | ".join(map(str, key)): [
                {
                    "rollouts": point["rollouts"],
                    "kl": point["kl"],
                    **{
                        f"{law}_{name}": mean(point[law][name])
                        for law in ("greedy", "sampled")
                        for name in ("gold", "proxy", "whole")
                    },
                }
                for point in points
            ]
            for key, points in runs.items()
        },
    }


def show(found: dict[str, Any]) -> str:
    lines = [
        "| arm | best gold | sampled gold, end | whole sentences, end | falls after rollouts | of |",
        "|" + "---|" * 6,
    ]
    for name, arm in found["arms"].items():
        falls = ", ".join("never" if at is None else f"{at:,}" for at in arm["rollouts_to_fall"])
        figures = [f"{arm[key]:.3f}" for key in ("best_gold", "last_gold_sampled", "last_whole_sampled")]
        lines.append(f"| {name} | {' | '.join(figures)} | {falls} | {arm['rollouts']:,} |")
    low, high = found["interval"]
    lines += [
        "",
        f"best gold: codes ({found['chosen']['codes']}) {found['best_gold_codes']:.3f}, tokens "
        f"({found['chosen']['tokens']}) {found['best_gold_tokens']:.3f}, difference {found['difference']:+.3f} "
        f"[{low:+.3f}, {high:+.3f}]",
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="reduced")
    parser.add_argument("--output_dir", type=Path)
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, one core each")
    parser.add_argument("--arms", nargs="+", choices=sorted(ARMS), help="only these")
    parser.add_argument("--proxies", nargs="+", choices=PROXIES, help="only these")
    parser.add_argument("--seeds", nargs="+", type=int, help="only these")
    options = parser.parse_args(arguments)
    size, quick = SIZES[options.size], options.size != "pocket"
    folder = options.output_dir or Path("outputs") / f"overoptimisation-{options.size}"
    arms = options.arms or [*size.codes, *size.tokens]
    seeds = options.seeds or size.seeds
    runs = [Run(arm, proxy, seed) for seed in seeds for proxy in options.proxies or size.proxies for arm in arms]
    for seed in seeds:
        learn_space(folder, seed, quick)
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        for future in [pool.submit(do, run, size, folder, quick) for run in runs]:
            future.result()
    found = summary(folder, size)
    (folder / "summary.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    print(show(found))
    return found


if __name__ == "__main__":
    main()
