"""
Plans under rewards that can be gamed: does RL over them fall, as RL over tokens does?

    python benchmarks/plans.py --size pocket --spaces 0 1 2        # learns the spaces
    python benchmarks/plans_gameable.py --spaces 0 1 2 --proxies attributes learned embedding length
    python benchmarks/plans_gameable.py --size reduced

Requests, proxies and gold are those of `benchmarks/overoptimisation`.
Tokens are given 5 120 rollouts there, and plans four times as many here. One setting for all proxies. Figures are of
test pictures: of the plans that are chosen, and of plans drawn from the softmax of the chooser's logits.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

sys.path[:0] = [str(Path(__file__).parent / name) for name in ("", "reproduction", "overoptimisation")]

from arms import TokenSpeaker  # noqa: E402
from plans import DESCRIPTION_TOKENS, ROOT, forget, learned_space  # noqa: E402
from proxies import PROXIES, WORDS, gold, proxy, requests, whole  # noqa: E402

from latent_trl import PlanBanditConfig, PlanBanditTrainer  # noqa: E402


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
        copies = [row for row in rows for _ in range(plans)]
        columns = {name: [row[name] for row in copies] for name in (*WORDS, "reference")}
        asked = [row["prompt"] for row in copies]
        self.figures = {
            "proxy": torch.tensor(reward(prompts=asked, completions=texts, **columns), dtype=torch.float).view(
                -1, plans
            ),
            "gold": torch.tensor(gold(texts, **columns)).view(-1, plans),
            "whole": torch.tensor([float(whole(text)) for text in texts]).view(-1, plans),
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
    parser.add_argument("--proxies", nargs="+", choices=PROXIES, default=["attributes", "length"])
    parser.add_argument("--rollouts", type=int, default=20_480)
    parser.add_argument("--output_dir", type=Path, default=ROOT / "outputs" / "plans")
    args = parser.parse_args(arguments)
    if args.size == "reduced":
        args.rollouts = 2048
    torch.set_num_threads(1)
    of_space = argparse.Namespace(plans=16, prompts=300, space_steps=80, questions=300, validation=60)

    train, test, found = requests("rl", 0), requests("test", 0)[:120], {}
    for space in args.spaces:
        model, processor, _ = learned_space("pocket", space, of_space, args.output_dir / f"pocket-{space}")
        say = TokenSpeaker(model.backbone, processor).say
        for name in args.proxies:
            reward = proxy(name, say)
            for seed in args.seeds:
                forget(model, seed)
                trainer = PlanBanditTrainer(
                    model,
                    reward,
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
                watched = Watched(trainer, test, reward, 8)
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
