"""`latent-trl demo --plans`: plans on the pocket VLM, learned and chosen, on two CPU cores, in minutes."""

import argparse
import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .arguments import CommandParser
from .demo import BACKBONE, find_folder


@dataclass
class PlanDemoSettings:
    """
    Sizes of the demo.

    Args:
        num_plans (`int`): K.
        space_prompts (`int`): Prompts that plans are learned from.
        space_steps (`int`): Steps of learning; it stops when the held-out ceiling is flat.
        rollouts (`int`): Of the bandit, in batches of 128.
        test_prompts (`int`): Held-out questions, at least 6: the kinds are balanced in multiples of 6.
        seed (`int`): Of everything that is drawn.
    """

    num_plans: int = 16
    space_prompts: int = 300
    space_steps: int = 80
    rollouts: int = 1024
    test_prompts: int = 120
    seed: int = 0

    def __post_init__(self):
        least = {"num_plans": 5, "test_prompts": 6, "seed": 0, "rollouts": 128, "space_prompts": 20}
        for name, value in asdict(self).items():
            if value < least.get(name, 1):
                raise ValueError(f"`{name}` must be at least {least.get(name, 1)}, got {value}.")


@dataclass
class PlanDemoResult:
    """What the demo measured: rewards of the backbone, of plans, and after RL; histories; seconds."""

    settings: dict[str, Any]
    reward: dict[str, float] = field(default_factory=dict)
    space_history: list[dict[str, Any]] = field(default_factory=list)
    rl_history: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


class PlanDemo:
    """
    The steps of the demo, each a method.

    Args:
        settings (`PlanDemoSettings`): Sizes.
        backbone (`Path`): Folder of the pocket VLM.
        output_dir (`Path`): Where checkpoints and the page go.
        bars: Of [`~latent_trl.commands.progress.progress_bars`].
    """

    def __init__(self, settings: PlanDemoSettings, backbone: Path, output_dir: Path, bars: Any):
        from transformers import AutoModelForImageTextToText, AutoProcessor, set_seed

        from ..data.shapes import shape_questions
        from ..plans.configuration import PlanConfig
        from ..plans.model import PlanModel
        from ..rewards.exact_match import ExactMatchReward

        set_seed(settings.seed)
        self.settings, self.output_dir, self.bars = settings, output_dir, bars
        self.processor = AutoProcessor.from_pretrained(backbone)
        model = AutoModelForImageTextToText.from_pretrained(backbone, dtype="float32")
        self.model = PlanModel(model, PlanConfig(num_plans=settings.num_plans, seed=settings.seed))
        self.reward = ExactMatchReward()
        self.test = shape_questions("test", settings.test_prompts, seed=settings.seed)
        self.result = PlanDemoResult(asdict(settings))
        self.trainer: Any = None

    def learn_space(self) -> None:
        """Plans from the backbone's alternatives to prompts of all kinds; no reward is read but by evaluations."""
        from ..data.shapes import shape_pairs, shape_questions
        from ..trainer.plans.space_config import PlanSpaceConfig
        from ..trainer.plans.space_trainer import PlanSpaceTrainer
        from .learn import PLAN_FIGURES

        s = self.settings
        pairs = shape_pairs("base", s.space_prompts, seed=s.seed)
        args = PlanSpaceConfig(
            str(self.output_dir / "space"), max_steps=s.space_steps, max_completion_length=24, **self._common()
        )
        self.trainer = PlanSpaceTrainer(
            self.model,
            args,
            [{"prompt": row["messages"][:-1], "images": row["images"]} for row in pairs],
            shape_questions("rl", 60, seed=s.seed + 1),
            self.processor,
            reward_funcs=self.reward,
        )
        self._train("Learn plans", PLAN_FIGURES)
        self.result.space_history = [row for row in self.trainer.state.log_history if "eval_ceiling" in row]

    def choose(self) -> None:
        """A bandit over the plans, on questions about other pictures, rewarded by their truth."""
        from ..data.shapes import shape_questions
        from ..trainer.plans.bandit_config import PlanBanditConfig
        from ..trainer.plans.bandit_trainer import PlanBanditTrainer
        from .bandit import FIGURES

        s = self.settings
        steps = s.rollouts // 128 * PlanBanditConfig.num_iterations
        args = PlanBanditConfig(
            str(self.output_dir / "bandit"), max_steps=steps, max_completion_length=12, **self._common()
        )
        rows = shape_questions("rl", seed=s.seed)
        self.trainer = PlanBanditTrainer(self.model, self.reward, args, rows, self.test, self.processor)
        self._train("RL over plans (bandit)", FIGURES)
        self.result.rl_history = [row for row in self.trainer.state.log_history if "reward" in row]
        figures = self.trainer.report.metrics()
        after = next(row for row in reversed(self.trainer.state.log_history) if "eval_reward" in row)
        self.result.reward = {
            "backbone": figures["backbone"],
            "random plan": figures["random_plan"],
            "one plan for all": figures["best_single_plan"],
            "after RL": after["eval_reward"],
            "best plan a prompt": figures["ceiling"],
        }

    def _common(self) -> dict[str, Any]:
        return {"seed": self.settings.seed, "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}

    def _train(self, name: str, figures: dict[str, str]) -> None:
        from .progress import BarCallback, draw_with

        start = time.perf_counter()
        draw_with(self.trainer, BarCallback(self.bars, lambda: name, figures)).train()
        self.result.seconds[name] = round(time.perf_counter() - start, 1)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = CommandParser(prog="latent-trl demo --plans", description=__doc__)
    parser.add_argument("--backbone", type=Path, help="folder of the VLM (default: model_cards/pocket-vlm)")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs") / "plan_demo")
    for name, default in asdict(PlanDemoSettings()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help="(%(default)s)")
    args = parser.parse_args(argv)
    try:
        args.settings = PlanDemoSettings(**{name: getattr(args, name) for name in asdict(PlanDemoSettings())})
    except ValueError as error:
        parser.error(str(error).rstrip("."))
    return args


def main(argv: list[str]) -> int:
    args = parse(argv)
    from rich.table import Table
    from transformers.utils import logging

    from ..data.reading import OpenedRows
    from ..evaluation.plan_atlas import write_plan_atlas
    from .plan_atlas import made_plan_atlas
    from .progress import console, progress_bars

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    backbone = find_folder(args.backbone or BACKBONE)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    with progress_bars() as bars:
        demo = PlanDemo(args.settings, backbone, args.output_dir, bars)
        demo.learn_space()
        demo.choose()
    demo.trainer.save_model(str(args.output_dir / "model"))
    result, trainer = demo.result, demo.trainer
    atlas = made_plan_atlas(
        trainer.report, OpenedRows(demo.test), trainer.chosen_plans, "the pocket VLM", "held-out questions", shown=12
    )
    page = write_plan_atlas(atlas, args.output_dir / "report.html")
    (args.output_dir / "result.json").write_text(json.dumps(asdict(result), indent=2) + "\n", encoding="utf-8")
    table = Table(title=f"Reward on {len(demo.test)} held-out questions (exact match)")
    table.add_column("answers")
    table.add_column("reward", justify="right")
    for name, value in result.reward.items():
        table.add_row(name, f"{value:.3f}")
    console.print(table)
    for what, place in (("Page", page), ("Plans", args.output_dir / "model")):
        console.print(f"{what + ':':<8}{place}", highlight=False, soft_wrap=True)
    console.print(f"{sum(result.seconds.values()):.0f} s in all", highlight=False)
    return 0
