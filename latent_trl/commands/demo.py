"""`latent-trl demo`: the whole method on the pocket VLM, on two CPU cores, in minutes."""

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .arguments import CommandParser

BACKBONE = Path("model_cards") / "pocket-vlm"
LEARNED = Path("model_cards") / "pocket-vlm-latent-actions"


@dataclass
class DemoSettings:
    """
    Sizes of the demo; the defaults are those that the README's figures were measured with.

    Args:
        pairs (`int`), texts (`int`): Rows of image–text pairs and of text-only conversations to learn from.
        space_steps, projector_steps, joint_steps, cloning_steps, sft_steps, rl_steps (`int`): Steps of each part.
        prompts_per_step (`int`), num_generations (`int`): RL: prompts, and samples of each, in one step.
        action_temperature (`float`): RL: temperature of the codes.
        rl_learning_rate (`float`): RL: of the policy.
        test_prompts (`int`): Held-out questions, at least 6: the kinds are balanced in multiples of 6.
        algorithm (`str`): `"grpo"` or `"ppo"`.
        seed (`int`): Of everything that is drawn.
        num_codes (`int`): K; 1 is a control.
        balance_coef (`float`): Learning: weight of the term that evens out the usage of codes.
    """

    pairs: int = 1500
    texts: int = 1500
    space_steps: int = 150
    projector_steps: int = 40
    joint_steps: int = 60
    cloning_steps: int = 150
    sft_steps: int = 30
    rl_steps: int = 30
    prompts_per_step: int = 16
    num_generations: int = 8
    action_temperature: float = 1.0
    rl_learning_rate: float = 5e-4
    test_prompts: int = 300
    algorithm: str = "grpo"
    seed: int = 0
    num_codes: int = 128
    balance_coef: float = 0.1

    def __post_init__(self):
        least = {"test_prompts": 6, "num_generations": 2, "seed": 0}
        for name, value in asdict(self).items():
            if isinstance(value, int) and value < least.get(name, 1):
                raise ValueError(f"`{name}` must be at least {least.get(name, 1)}, got {value}.")
            if isinstance(value, float) and value < 0:
                raise ValueError(f"`{name}` must not be negative, got {value}.")
        if self.algorithm not in ("grpo", "ppo"):
            raise ValueError(f"`algorithm` must be 'grpo' or 'ppo', got {self.algorithm!r}.")


@dataclass
class DemoResult:
    """What the demo measured: rewards before and after RL, histories, answers, codes."""

    settings: dict[str, Any]
    reward: dict[str, float] = field(default_factory=dict)
    reward_by_kind: dict[str, dict[str, float]] = field(default_factory=dict)
    codebook: dict[str, float] = field(default_factory=dict)
    space_history: list[dict[str, Any]] = field(default_factory=list)
    rl_history: list[dict[str, Any]] = field(default_factory=list)
    examples: list[dict[str, Any]] = field(default_factory=list)
    code_counts: list[int] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


def find_folder(relative: Path) -> Path:
    """A folder of the repository, looked for in the current directory and beside the package."""
    for root in (Path(), Path(__file__).resolve().parents[2]):
        if (root / relative).is_dir():
            return root / relative
    raise FileNotFoundError(
        f"{str(relative)!r} is neither in the current directory nor beside the package. Run the demo from a clone of "
        "the repository, or pass `--backbone FOLDER`."
    )


class Demo:
    """
    The steps of the demo, each a method.

    Args:
        settings (`DemoSettings`): Sizes.
        backbone (`Path`): Folder of the pocket VLM.
        output_dir (`Path`): Where checkpoints and the report go.
        bars: Of [`progress_bars`].
    """

    def __init__(self, settings: DemoSettings, backbone: Path, output_dir: Path, bars):
        from transformers import AutoModelForImageTextToText, AutoProcessor, set_seed

        from ..data.shapes import shape_questions
        from ..rewards.exact_match import ExactMatchReward

        set_seed(settings.seed)
        self.settings, self.output_dir, self.bars = settings, output_dir, bars
        self.processor = AutoProcessor.from_pretrained(backbone)
        self.backbone = AutoModelForImageTextToText.from_pretrained(backbone, dtype="float32")
        self.reward = ExactMatchReward()
        self.test = shape_questions("test", settings.test_prompts, seed=settings.seed)
        self.result = DemoResult(asdict(settings))
        self.model: Any = None

    def load_learned(self, folder: Path) -> None:
        """A model whose space, policy and SFT were done before, by `examples/scripts/train_pocket_codebooks.py`."""
        from ..models.latent_action_model import LatentActionModel

        self.model = LatentActionModel.from_pretrained(folder, backbone=self.backbone)
        runs = self.model.training_report.get("runs", [])
        self.result.settings["num_codes"] = self.settings.num_codes = self.model.config.num_codes
        self.result.space_history = [row for run in runs for row in run["history"] if "stage" in row]
        self._keep_health()

    def _keep_health(self) -> None:
        """The last figures on the codebook while learning."""
        rows = [row for row in self.result.space_history if "codebook/used" in row]
        figures = rows[-1] if rows else {}
        self.result.codebook = {k: v for k, v in figures.items() if k.startswith(("codebook/", "world_model/"))}

    def timed(self, name: str, step, *args):
        start = time.perf_counter()
        value = step(*args)
        self.result.seconds[name] = round(time.perf_counter() - start, 1)
        return value

    def learn_space(self) -> None:
        """Stages 1 to 4: the codebook from pairs and text, and the policy by cloning."""
        from ..checkpoint.configuration import LatentActionConfig
        from ..data.shapes import chitchat, shape_pairs
        from ..models.latent_action_model import LatentActionModel
        from ..trainer.space.config import LatentActionSpaceConfig
        from ..trainer.space.trainer import LatentActionSpaceTrainer
        from .progress import BarCallback, draw_with

        s = self.settings
        config = LatentActionConfig(
            num_codes=s.num_codes,
            allow_single_code=s.num_codes == 1,
            inverse_dynamics_decoder={"num_hidden_layers": 2},
            policy_decoder={"num_hidden_layers": 2},
            gumbel_temperature=1.0,
        )
        self.model = LatentActionModel.from_backbone(self.backbone, config)
        args = LatentActionSpaceConfig(
            output_dir=str(self.output_dir / "space"),
            inverse_dynamics_max_steps=s.space_steps,
            projector_max_steps=s.projector_steps,
            joint_max_steps=s.joint_steps,
            policy_max_steps=s.cloning_steps,
            inverse_dynamics_learning_rate=3e-3,
            joint_learning_rate=1e-3,
            policy_learning_rate=1e-3,
            balance_coef=s.balance_coef,
            per_device_train_batch_size=16,
            max_length=96,
            logging_steps=5,
            save_strategy="no",
            seed=s.seed,
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        trainer = LatentActionSpaceTrainer(
            self.model,
            args,
            shape_pairs("base", s.pairs, seed=s.seed),
            text_dataset=chitchat(s.texts, seed=s.seed),
            processing_class=self.processor,
        )
        figures = {
            "world_model/ce": "CE",
            "codebook/used": "codes",
            "codebook/perplexity": "perplexity",
            "projector/nll": "nll",
            "policy/backbone_kl": "KL to the backbone",
        }
        draw_with(trainer, BarCallback(self.bars, lambda: f"Learn: {trainer.stage}", figures)).train()
        self.result.space_history = trainer.history
        self._keep_health()

    def fine_tune(self) -> None:
        """Stage 5: a short SFT with LoRA, following inferred codes."""
        from ..data.shapes import shape_pairs
        from ..trainer.sft.config import LatentActionSFTConfig
        from ..trainer.sft.trainer import LatentActionSFTTrainer
        from .progress import BarCallback, draw_with

        s = self.settings
        args = LatentActionSFTConfig(
            output_dir=str(self.output_dir / "sft"),
            max_steps=s.sft_steps,
            learning_rate=2e-4,
            per_device_train_batch_size=24,
            logging_steps=5,
            save_strategy="no",
            seed=s.seed,
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        trainer = LatentActionSFTTrainer(
            self.model, args, shape_pairs("base", s.pairs, seed=s.seed + 1), processing_class=self.processor
        )
        draw_with(trainer, BarCallback(self.bars, lambda: "Fine-tune (SFT, LoRA)", {"loss": "loss"})).train()

    def reinforce(self) -> None:
        """RL over codes, on questions about other pictures, rewarded by their truth."""
        from ..data.shapes import shape_questions
        from .progress import BarCallback, draw_with
        from .training import RL_FIGURES

        s = self.settings
        common: dict[str, Any] = dict(
            output_dir=str(self.output_dir / s.algorithm),
            max_steps=s.rl_steps,
            learning_rate=s.rl_learning_rate,
            per_device_train_batch_size=s.prompts_per_step * s.num_generations,
            num_generations=s.num_generations,
            max_completion_length=12,
            action_temperature=s.action_temperature,
            logging_steps=1,
            save_strategy="no",
            seed=s.seed,
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        if s.algorithm == "ppo":
            from ..trainer.ppo.config import LatentActionPPOConfig
            from ..trainer.ppo.trainer import LatentActionPPOTrainer

            # Two updates of each rollout: half the rate, twice the steps.
            common |= dict(max_steps=2 * s.rl_steps, learning_rate=s.rl_learning_rate / 2, num_iterations=2)
            args: Any = LatentActionPPOConfig(value_learning_rate=1e-3, **common)
            trainer_class: Any = LatentActionPPOTrainer
        else:
            from ..trainer.grpo.config import LatentActionGRPOConfig
            from ..trainer.grpo.trainer import LatentActionGRPOTrainer

            trainer_class, args = LatentActionGRPOTrainer, LatentActionGRPOConfig(**common)
        trainer = trainer_class(
            self.model,
            self.reward,
            args,
            train_dataset=shape_questions("rl", seed=s.seed),
            processing_class=self.processor,
        )
        name = f"RL over codes ({s.algorithm.upper()})"
        draw_with(trainer, BarCallback(self.bars, lambda: name, RL_FIGURES)).train()
        self.result.rl_history = [row for row in trainer.state.log_history if "reward" in row]

    def evaluate(self, when: str, **generate_kwargs):
        """Arg-max codes on the held-out questions."""
        from ..evaluation.answers import answer

        task = self.bars.add_task(f"Evaluate {when}", total=len(self.test), figures="")
        answers = answer(
            self.model,
            self.processor,
            self.test,
            self.reward,
            max_new_tokens=12,
            progress=lambda done: self.bars.update(task, completed=done),
            **generate_kwargs,
        )
        self.bars.update(task, figures=f"reward {answers.mean_reward:.3f}")
        self.result.reward[when] = answers.mean_reward
        self.result.reward_by_kind[when] = answers.mean_by(self.test["kind"])
        return answers

    def keep_examples(self, before, after, count: int = 9) -> None:
        """Pictures with both answers and their codes: changed ones first."""
        changed = [i for i in range(len(self.test)) if before.rewards[i] != after.rewards[i]]
        same = [i for i in range(len(self.test)) if before.rewards[i] == after.rewards[i]]
        for i in (changed[: count - 2] + same)[:count]:
            row = self.test[i]
            self.result.examples.append(
                {
                    "image": row["images"][0],
                    "question": row["prompt"][-1]["content"],
                    "truth": row["answer"],
                    "before": list(zip(before.tokens[i], before.action_ids[i])),
                    "after": list(zip(after.tokens[i], after.action_ids[i])),
                    "reward_before": before.rewards[i],
                    "reward_after": after.rewards[i],
                }
            )
        counts = [0] * self.settings.num_codes
        for codes in after.action_ids:
            for code in codes:
                counts[code] += 1
        self.result.code_counts = counts

    def run(self, learned: Path | None = None) -> DemoResult:
        """Everything, or RL alone from a model that was learned before."""
        if learned is None:
            self.timed("learn", self.learn_space)
            self.timed("sft", self.fine_tune)
        else:
            self.timed("load", self.load_learned, learned)
        before = self.timed("evaluate", self.evaluate, "before RL")
        self.timed("rl", self.reinforce)
        after = self.evaluate("after RL")
        self.keep_examples(before, after)
        return self.result


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = CommandParser(prog="latent-trl demo", description=__doc__)
    parser.add_argument("--backbone", type=Path, help="folder of the VLM (default: model_cards/pocket-vlm)")
    parser.add_argument(
        "--from-pretrained",
        type=Path,
        nargs="?",
        const=LEARNED,
        help="start RL from a learned model (default folder: %(const)s)",
    )
    parser.add_argument("--output-dir", type=Path, default=Path("outputs") / "demo")
    parser.add_argument("--plans", action="store_true", help="plans in place of codes; see `demo --plans --help`")
    for name, default in asdict(DemoSettings()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default, help="(%(default)s)")
    args = parser.parse_args(argv)
    try:
        args.settings = DemoSettings(**{name: getattr(args, name) for name in asdict(DemoSettings())})
    except ValueError as error:
        parser.error(str(error).rstrip("."))
    return args


def main(argv: list[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if "--plans" in argv:
        from .plan_demo import main as plan_demo

        return plan_demo([word for word in argv if word != "--plans"])
    args = parse(argv)
    settings = args.settings
    start = time.perf_counter()

    from transformers.utils import logging

    from ..evaluation.report import write_report
    from .progress import console, progress_bars

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    backbone = find_folder(args.backbone or BACKBONE)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    with progress_bars() as bars:
        demo = Demo(settings, backbone, args.output_dir, bars)
        result = demo.run(find_folder(args.from_pretrained) if args.from_pretrained else None)
    demo.model.save_pretrained(args.output_dir / "model")
    result.seconds["total"] = round(time.perf_counter() - start, 1)
    report = write_report(result, args.output_dir / "report.html")
    figures = {k: v for k, v in asdict(result).items() if k != "examples"}
    (args.output_dir / "result.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    console.print(summary_table(result))
    for name, value in (("Report", report), ("Model", args.output_dir / "model")):
        console.print(f"{name + ':':<8}{value}", highlight=False, soft_wrap=True)
    console.print(f"{result.seconds['total']:.0f} s in all", highlight=False)
    return 0


def summary_table(result: DemoResult):
    """The rewards before and after, as a terminal table."""
    from rich.table import Table

    table = Table(title="Reward on held-out questions (exact match, greedy answers)")
    table.add_column("questions")
    for when in result.reward:
        table.add_column(when, justify="right")
    table.add_column("gain", justify="right")
    first, last = list(result.reward)[0], list(result.reward)[-1]
    for kind in result.reward_by_kind[first]:
        values = [result.reward_by_kind[when][kind] for when in result.reward]
        table.add_row(kind, *[f"{v:.3f}" for v in values], f"{values[-1] - values[0]:+.3f}")
    table.add_row(
        "all",
        *[f"{result.reward[when]:.3f}" for when in result.reward],
        f"{result.reward[last] - result.reward[first]:+.3f}",
        style="bold",
    )
    used = sum(count > 0 for count in result.code_counts)
    table.caption = f"{used} of {len(result.code_counts)} codes in use in these answers"
    return table
