"""
What happens when the reward can be gamed: RL over codes beside RL over tokens, under three proxies of what is wanted.

    python benchmarks/overoptimisation/run.py --size reduced     # minutes on two cores
    python benchmarks/overoptimisation/run.py --size pocket      # hours

    python benchmarks/overoptimisation/run.py --arms "codes, guard" --proxies my_rewards:helpfulness --data_seed 7

Proxy and gold are measured along each run, greedy and sampled. A run *falls* at the first point from which on its
sampled gold is below its start; whether its end is below by more than the error of the questions is said beside. Its
*best gold* is that of the greedy answers at the point that is best on validation pictures. Every run leaves a file in
`--output_dir`; a run that is there is not done again.
"""

import argparse
import contextlib
import io
import json
import os
import re
import shutil
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

from proxies import PROXIES  # noqa: E402
from report import plot, show, summary  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

TOKENS_LONG = 24
# Between the seeds of data sets: training runs of one data seed have seeds of their own.
OTHER = 1000


@dataclass(frozen=True)
class Arm:
    """
    How a policy is trained.

    Args:
        name (`str`): In tables.
        kind (`str`): `tokens` or `codes`.
        options (`dict`): Of the trainer.
        algorithm (`str`): `grpo`, `rloo` or `ppo`, over codes.
        lora (`int`): Rank of a LoRA that is trained over tokens, in the place of the last two layers; 0 for none.
    """

    name: str
    kind: str
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    algorithm: str = "grpo"
    lora: int = 0


@dataclass(frozen=True)
class Size:
    """
    `steps` of 128 rollouts are of tokens; codes get `factor` times as many. `points` of a run are measured beside its
    start, with `questions` that are reported and `validation` that choose. `space` is the size at which
    `benchmarks/reproduction` learns the latent action space.
    """

    seeds: tuple[int, ...]
    proxies: tuple[str, ...]
    tokens: tuple[str, ...]
    codes: tuple[str, ...]
    steps: int = 40
    factor: int = 4
    points: int = 8
    questions: int = 120
    validation: int = 60
    space: str = "pocket"


# A KL that weighs nothing is logged, and changes nothing.
NO_KL = {"beta": 1e-9}
TOKENS = {
    f"tokens, {rate}, {name}": Arm(f"tokens, {rate}, {name}", "tokens", {"learning_rate": float(rate), **options})
    for rate in ("1e-4", "3e-4")
    for name, options in (("no KL", NO_KL), ("KL 0.1", {"beta": 0.1}), ("KL 0.5", {"beta": 0.5}))
}
for name, options in (("no KL", NO_KL), ("KL 0.5", {"beta": 0.5})):
    named = f"tokens, LoRA, 1e-3, {name}"
    TOKENS[named] = Arm(named, "tokens", {"learning_rate": 1e-3, **options}, lora=16)
PPO = {"num_iterations": 2, "value_learning_rate": 1e-3}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "no KL": ("grpo", NO_KL),
    "default": ("grpo", {}),
    "KL 0.5": ("grpo", {"beta": 0.5}),
    "guard": ("grpo", {"language_guard": True}),
    "anchor 0.1": ("grpo", {"anchor_coef": 0.1}),
    "anchor 1": ("grpo", {"anchor_coef": 1.0}),
    "rloo": ("rloo", {"num_generations": 8}),
    "ppo": ("ppo", PPO),
    "rloo, guard": ("rloo", {"num_generations": 8, "language_guard": True}),
    "ppo, guard": ("ppo", {**PPO, "language_guard": True}),
}
CODES = {
    f"codes, {name}": Arm(f"codes, {name}", "codes", {"learning_rate": 3e-4, **options}, algorithm)
    for name, (algorithm, options) in VARIANTS.items()
}
for name in ("no KL", "KL 0.5", "guard"):
    options = {"learning_rate": 1e-3, **VARIANTS[name][1]}
    CODES[f"codes, 1e-3, {name}"] = Arm(f"codes, 1e-3, {name}", "codes", options)
ARMS = TOKENS | CODES
COMPARED = ("tokens, 3e-4, no KL", "tokens, 3e-4, KL 0.5")
SIZES = {
    "reduced": Size((0,), PROXIES, COMPARED, ("codes, guard",), 12, 4, 4, 80, 40, "reduced"),
    "pocket": Size((0, 1, 2), PROXIES, tuple(TOKENS), tuple(CODES)),
    "quick": Size((0,), ("attributes",), COMPARED[:1], ("codes, guard",), 2, 2, 2, 12, 12, "reduced"),
}


@dataclass(frozen=True)
class Run:
    arm: str
    proxy: str
    seed: int
    data_seed: int = 0

    @property
    def key(self) -> str:
        data = f" data {self.data_seed}" if self.data_seed else ""
        return f"{self.proxy} {self.arm} {self.seed}{data}".replace(":", ".")


class Frontier(TrainerCallback):
    """Proxy and gold of greedy answers and of samples, at points along a run."""

    def __init__(self, speaker, reward, rows: list[dict[str, Any]], size: Size, every: int, updates: int):
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


def learn_space(folder: Path, seed: int, space: str) -> Path:
    """The latent action space of a seed, learned once."""
    from arms import learn
    from matrix import SIZES as LEARNING
    from matrix import SPACES, Cell

    model = folder / "spaces" / str(seed) / "model"
    if not model.is_dir():
        shutil.rmtree(model.parent, ignore_errors=True)  # of a run that was stopped
        with contextlib.redirect_stdout(io.StringIO()):
            learn(Cell("space", "learn", seed, dict(SPACES["space"])), LEARNING[space], model.parent)
    return model


def train(run: Run, size: Size, folder: Path) -> dict[str, Any]:
    import torch
    from arms import CodeSpeaker, TokenSpeaker, described, load_backbone, load_processor, quiet, small_talk
    from datasets import Dataset, Features, Image, List, Value
    from matrix import SIZES as LEARNING
    from peft import LoraConfig
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
    rows = Dataset.from_list(requests("rl", run.seed + OTHER * run.data_seed), features=features)
    asked = requests("test", run.data_seed)
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
        adapter = None
        if arm.lora:
            layers = re.escape(next(name for name, part in model.named_modules() if part is model.get_decoder().layers))
            adapter = LoraConfig(r=arm.lora, lora_alpha=2 * arm.lora, target_modules=rf"{layers}\..*_proj")
        for layer in model.get_decoder().layers[-2:] if adapter is None else ():
            layer.requires_grad_(True)
        frontier = Frontier(TokenSpeaker(model, processor), reward, asked, size, every, updates)
        GRPOTrainer(
            model,
            reward,
            GRPOConfig(**options),
            rows,
            processing_class=processor,
            callbacks=[frontier],
            peft_config=adapter,
        ).train()
        return {"points": frontier.points}
    model = latent_trl.LatentActionModel.from_pretrained(
        learn_space(folder, run.seed, size.space), backbone=load_backbone(common)
    )
    frontier = Frontier(CodeSpeaker(model, processor), reward, asked, size, every, updates)
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


def do(run: Run, size: Size, folder: Path) -> None:
    path = folder / "runs" / f"{run.key}.json"
    if path.is_file():
        return
    with contextlib.redirect_stdout(io.StringIO()):
        found = train(run, size, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**asdict(run), **found}), encoding="utf-8")


def finished(folder: Path, runs: list[Run]) -> dict[tuple, list[dict[str, Any]]]:
    """The points of the runs that have left a file, by arm, proxy and seed."""
    paths = {(run.arm, run.proxy, run.seed): folder / "runs" / f"{run.key}.json" for run in runs}
    return {
        key: json.loads(path.read_text(encoding="utf-8"))["points"] for key, path in paths.items() if path.is_file()
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="reduced")
    parser.add_argument("--output_dir", type=Path)
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, one core each")
    parser.add_argument("--arms", nargs="+", choices=sorted(ARMS), help="only these")
    parser.add_argument("--proxies", nargs="+", help="other ones: names, or `module:function` of a reward function")
    parser.add_argument("--seeds", nargs="+", type=int, help="other ones")
    parser.add_argument(
        "--data_seed", type=int, default=0, help="other pictures and words, in training and in the test"
    )
    parser.add_argument("--plot", type=Path, help="draw the frontier here")
    options = parser.parse_args(arguments)
    size = SIZES[options.size]
    folder = options.output_dir or Path("outputs") / f"overoptimisation-{options.size}"
    arms, proxies = options.arms or [*size.codes, *size.tokens], options.proxies or size.proxies
    seeds = options.seeds or size.seeds
    runs = [
        Run(arm, proxy, seed, options.data_seed)
        # The longest runs begin first.
        for arm in sorted(arms, key=lambda name: ARMS[name].kind)
        for seed in seeds
        for proxy in proxies
    ]
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        for future in [pool.submit(learn_space, folder, seed, size.space) for seed in seeds]:
            future.result()
        for future in [pool.submit(do, run, size, folder) for run in runs]:
            future.result()
    found = summary(finished(folder, runs), {name: arm.kind for name, arm in ARMS.items()}, size.validation)
    (folder / "summary.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    print(show(found))
    if options.plot:
        plot(found, options.plot)
    return found


if __name__ == "__main__":
    main()
