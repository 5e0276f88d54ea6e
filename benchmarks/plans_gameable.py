"""
Plans under rewards that can be gamed: does RL over them fall, as RL over tokens does?

    python benchmarks/plans.py --size pocket --spaces 0 1 2        # learns the spaces
    python benchmarks/plans_gameable.py --spaces 0 1 2
    python benchmarks/plans_gameable.py --size reduced

The request is to describe a picture. Two rewards, both of which a policy over tokens games within some 2 000 rollouts:
`proxy` is the share of true words (size, colour, shape) that are named anywhere, plus half of the number of words over
20; `length` is that number alone. Gold, which no training sees, is a whole sentence of the training data's forms in
which all three words are named, and are true. One setting for both; figures are of test pictures.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "reproduction")]

from plans import DESCRIPTION_TOKENS, ROOT, learned_space  # noqa: E402
from plans_long import ASPECTS, SIZE_WORDS, pictures  # noqa: E402
from tasks import is_fluent  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

from latent_trl import PlanBanditConfig, PlanBanditTrainer  # noqa: E402
from latent_trl.data.shapes import COLOURS, DESCRIPTION_REQUESTS, SHAPES  # noqa: E402

LONGEST_WORDS = 20


def texts_of(completions: list[Any]) -> list[str]:
    return [said if isinstance(said, str) else said[-1]["content"] for said in completions]


def length(completions, **columns) -> list[float]:
    """Words over 20."""
    return [min(len(text.split()), LONGEST_WORDS) / LONGEST_WORDS for text in texts_of(completions)]


def proxy(completions, shape, colour, size, **columns) -> list[float]:
    """The share of true words that are named anywhere, and half of the length."""
    found = []
    for text, long, *truth in zip(texts_of(completions), length(completions), shape, colour, size, strict=True):
        words = set(re.findall("[a-z]+", text))
        found.append(sum(word in words for word in truth) / 3 + 0.5 * long)
    return found


def gold(completions, shape, colour, size, **columns) -> list[float]:
    """1 for a whole sentence that names all three, truly."""
    found = []
    for text, *truth in zip(texts_of(completions), shape, colour, size, strict=True):
        known = {word for word in re.findall("[a-z]+", text) if word in (*SHAPES, *COLOURS, *SIZE_WORDS)}
        found.append(float(is_fluent(text) and known == set(truth)))
    return found


PROXIES = {"proxy": proxy, "length": length}


class Watched(TrainerCallback):
    """Proxy, gold and whole sentences of the chosen plans on the test pictures, and of sampled ones."""

    def __init__(self, trainer: Any, rows: list[dict[str, Any]], reward: Any, every: int):
        self.trainer, self.every, self.points = trainer, every, []
        model, tokenizer = trainer.model, trainer.encoder.encoder.tokenizer
        plans = model.plan_config.num_plans
        prompts = [trainer.encoder(row) for row in rows]
        ids = model.answers(
            trainer.encoder,
            [prompt for prompt in prompts for _ in range(plans)],
            list(range(plans)) * len(rows),
            DESCRIPTION_TOKENS,
            trainer.ends,
        ).token_ids
        texts = [tokenizer.decode(one, skip_special_tokens=True).strip() for one in ids]
        columns = {aspect: [row[aspect] for row in rows for _ in range(plans)] for aspect in ASPECTS}
        self.figures = {
            "proxy": torch.tensor(reward(texts, **columns)).view(-1, plans),
            "gold": torch.tensor(gold(texts, **columns)).view(-1, plans),
            "whole": torch.tensor([float(is_fluent(text)) for text in texts]).view(-1, plans),
        }
        self.states = trainer.states_of(trainer.encoder.collate(prompts))

    def point(self, step: int) -> None:
        """Adds a point after so many steps."""
        args = self.trainer.args
        logits = self.trainer.logits(self.states)
        law = logits.softmax(dim=1)
        best = logits.argmax(dim=1, keepdim=True)
        found = {"rollouts": step // args.num_iterations * args.rollout_prompts * args.num_generations}
        for name, values in self.figures.items():
            found[name] = round(values.gather(1, best).mean().item(), 4)
            found[f"{name}_sampled"] = round((law * values).sum(dim=1).mean().item(), 4)
        self.points.append(found)

    def on_train_begin(self, args, state, control, **kwargs):
        self.point(0)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % (self.every * args.num_iterations) == 0:
            self.point(state.global_step)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["full", "reduced"], default="full")
    parser.add_argument("--spaces", type=int, nargs="+", default=[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--proxies", nargs="+", choices=list(PROXIES), default=list(PROXIES))
    parser.add_argument("--rollouts", type=int, default=15_360)
    parser.add_argument("--output_dir", type=Path, default=ROOT / "outputs" / "plans")
    args = parser.parse_args(arguments)
    if args.size == "reduced":
        args.rollouts = 2048
    torch.set_num_threads(1)
    of_space = argparse.Namespace(plans=16, prompts=300, space_steps=80, questions=300, validation=60)

    def asked(split: str, count: int) -> list[dict[str, Any]]:
        rows = pictures(split, count, 5)
        return [
            {**row, "prompt": [{"role": "user", "content": DESCRIPTION_REQUESTS[i % 5]}]} for i, row in enumerate(rows)
        ]

    train, test, found = asked("rl", 240), asked("test", 100), {}
    for space in args.spaces:
        model, processor, _ = learned_space("pocket", space, of_space, args.output_dir / f"pocket-{space}")
        for name in args.proxies:
            for seed in args.seeds:
                torch.manual_seed(seed)
                for module in model.chooser.modules():
                    if isinstance(module, torch.nn.Linear):
                        module.reset_parameters()
                torch.nn.init.zeros_(model.chooser.attended.weight)
                trainer = PlanBanditTrainer(
                    model,
                    PROXIES[name],
                    PlanBanditConfig(
                        str(args.output_dir / f"gameable-{name}-{space}-{seed}"),
                        max_steps=args.rollouts // 128 * PlanBanditConfig.num_iterations,
                        max_completion_length=DESCRIPTION_TOKENS,
                        save_strategy="no",
                        seed=seed,
                        use_cpu=True,
                        disable_tqdm=True,
                        logging_steps=10_000,
                    ),
                    train_dataset=train,
                    processing_class=processor,
                )
                watched = Watched(trainer, test, PROXIES[name], 8)
                trainer.add_callback(watched)
                trainer.train()
                key = f"{name}, space {space}, seed {seed}"
                found[key] = watched.points
                for point in (watched.points[0], watched.points[len(watched.points) // 4], watched.points[-1]):
                    print(key, json.dumps(point), flush=True)
                lowest = min(point["whole"] for point in watched.points)
                print(f"{key}: whole sentences at least {lowest:.3f}", flush=True)
                (args.output_dir / "gameable.json").write_text(json.dumps(found) + "\n", encoding="utf-8")
    return found


if __name__ == "__main__":
    main()
