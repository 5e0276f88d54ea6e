"""
Trains the latent action models of the pocket VLM that are kept in `model_cards/`: one whose space is learned and whose
policy is cloned and tuned, and two that go on from it with GRPO and with PPO.

```bash
python examples/scripts/train_pocket_codebooks.py --output_dir model_cards
```
"""

import argparse
from dataclasses import replace
from pathlib import Path

from transformers.utils import logging

from latent_trl.commands.demo import BACKBONE, LEARNED, Demo, DemoSettings, find_folder
from latent_trl.commands.progress import progress_bars
from latent_trl.evaluation.intervals import bootstrap_interval
from latent_trl.hub.card import write_card
from latent_trl.hub.facts import CodebookReport, Evaluation, TrainingReport

DATASET = "easy-vqa questions of latent_trl.data.shapes"


def keep(demo: Demo, answers, folder: Path) -> None:
    """Saves the model with a card that says how it answers the held-out questions."""
    interval = bootstrap_interval(answers.rewards, seed=0)
    figure = Evaluation(
        dataset=DATASET,
        metric="exact_match",
        value=answers.mean_reward,
        low=interval.low,
        high=interval.high,
        interval="95 %, bootstrap over questions",
        note="greedy answers; python examples/scripts/train_pocket_codebooks.py",
    )
    report = TrainingReport.from_dict(demo.model.training_report)
    report.evaluation = [figure]
    report.codebook = CodebookReport.from_choices(
        answers.action_ids, demo.model.config.num_codes, answers.tokens, answers.texts
    )
    demo.model.training_report = report.to_dict()
    demo.model.config.base_model_name_or_path = BACKBONE.as_posix()
    demo.model.save_pretrained(folder)
    write_card(folder, license="apache-2.0", language="en")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("model_cards"))
    parser.add_argument("--work_dir", type=Path, default=Path("outputs") / "pocket-codebooks")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.set_verbosity_error()
    settings = DemoSettings(seed=args.seed, test_prompts=600)
    backbone = find_folder(BACKBONE)
    start = args.output_dir / LEARNED.name
    with progress_bars() as bars:
        demo = Demo(settings, backbone, args.work_dir, bars)
        demo.learn_space()
        demo.fine_tune()
        keep(demo, demo.evaluate("before RL"), start)
        for algorithm in ("grpo", "ppo"):
            demo = Demo(replace(settings, algorithm=algorithm), backbone, args.work_dir, bars)
            demo.load_learned(start)
            demo.reinforce()
            keep(demo, demo.evaluate(f"after {algorithm.upper()}"), args.output_dir / f"{LEARNED.name}-{algorithm}")


if __name__ == "__main__":
    main()
