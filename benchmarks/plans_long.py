"""
A plan for each sentence beside one for the whole answer, where an answer is worth something only if all of it is right.
With `switch` a learned switch ends segments of the space of sentences.

    python benchmarks/plans_long.py --segments answer sentence --arms bandit "bandit, T = 0.3" grpo ppo --tokens
    python benchmarks/plans_long.py --segments sentence switch --arms grpo ppo
    python benchmarks/plans_long.py --size reduced

The backbone is the pocket VLM, taught to describe a picture in three sentences: its shape, its colour, its size. Its
teacher errs as the annotator of `latent_trl/data/shapes.py` does, in each sentence by itself: triangles, four colours
and medium sizes are misnamed in two of three cases. The backbone so describes about a fifth of the pictures rightly.
The reward is 1 where all three words are right, and else 0. Figures are of test pictures that no learning saw.
"""

import argparse
import json
import random
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments, set_seed

sys.path[:0] = [str(Path(__file__).parent / "reproduction")]

from matrix import SIZES  # noqa: E402
from plans import ARMS, ROOT, changed, forget  # noqa: E402

from latent_trl import PlanConfig, PlanModel, PlanSpaceConfig, PlanSpaceTrainer  # noqa: E402
from latent_trl.data.collator import LatentActionDataCollator  # noqa: E402
from latent_trl.data.mixing import MixedRows, MixedRowsCollator  # noqa: E402
from latent_trl.data.shapes import COLOURS, CONFUSED_WITH, ERROR_RATE, SHAPES, shape_pairs  # noqa: E402
from latent_trl.rewards.calling import RewardCaller  # noqa: E402
from latent_trl.trainer.plans.report import report_plans  # noqa: E402

REQUEST = "describe the picture in three sentences."
ASPECTS = ("shape", "colour", "size")
WORDINGS = {
    "shape": ("it is a {}.", "i see a {}."),
    "colour": ("the color is {}.", "it is drawn in {}."),
    "size": ("it looks {}.", "the shape is {}."),
}
SIZE_WORDS = ("small", "medium", "big")
MISNAMED = {**CONFUSED_WITH, "medium": "small"}
LONGEST = 28
FLUENT = re.compile(
    " ".join(
        "(?:" + "|".join(re.escape(one).replace(r"\{\}", f"(?:{'|'.join(words)})") for one in WORDINGS[aspect]) + ")"
        for aspect, words in zip(ASPECTS, (SHAPES, COLOURS, SIZE_WORDS), strict=True)
    )
)


def pictures(split: str, limit: int, seed: int) -> list[dict[str, Any]]:
    """Pictures with what is true of them, found in the descriptions of `shape_pairs`."""
    found = []
    for row in shape_pairs(split, 6 * limit, seed):
        messages = row["messages"]
        if len(messages) == 2 and "true or false" not in messages[0]["content"] and len(found) < limit:
            words = re.findall("[a-z]+", messages[1]["content"])
            truth = {
                aspect: next((word for word in words if word in every), None)
                for aspect, every in zip(ASPECTS, (SHAPES, COLOURS, SIZE_WORDS), strict=True)
            }
            if None not in truth.values():
                found.append({"images": row["images"], "prompt": [{"role": "user", "content": REQUEST}], **truth})
    return found


def told(picture: dict[str, Any], generator: random.Random) -> str:
    """What the teacher says of a picture."""
    sentences = []
    for aspect in ASPECTS:
        word = picture[aspect]
        if word in MISNAMED and generator.random() < ERROR_RATE:
            word = MISNAMED[word]
        sentences.append(generator.choices(WORDINGS[aspect], (3, 2))[0].format(word))
    return " ".join(sentences)


def all_right(completions, shape, colour, size, **columns) -> list[float]:
    """1 where a description names shape, colour and size as they are, and nothing else."""
    found = []
    for said, *truth in zip(completions, shape, colour, size, strict=True):
        text = said if isinstance(said, str) else said[-1]["content"]
        known = [word for word in re.findall("[a-z]+", text) if word in (*SHAPES, *COLOURS, *SIZE_WORDS)]
        found.append(float(known == truth))
    return found


def is_fluent(text: str) -> bool:
    """Whether a text is three sentences of the teacher's, right or wrong."""
    return FLUENT.fullmatch(text.strip()) is not None


def backbone_folder(args: argparse.Namespace) -> Path:
    """The backbone, taught where it is not there."""
    folder, source = args.output_dir / "backbone", SIZES["pocket"].backbone
    if (folder / "config.json").is_file():
        return folder
    set_seed(0)
    generator = random.Random(0)
    model = AutoModelForImageTextToText.from_pretrained(source, dtype="float32")
    processor = AutoProcessor.from_pretrained(source)
    model.model.vision_tower.requires_grad_(False)
    plain = MixedRowsCollator(LatentActionDataCollator(processor, vision_token_ids=[model.config.image_token_index]))

    def collate(rows):
        batch = plain(rows)
        labels = batch["input_ids"].masked_fill(~batch["loss_mask"], -100)
        return {k: batch[k] for k in ("input_ids", "attention_mask")} | batch["vision"] | {"labels": labels}

    rows = [
        {
            "messages": [*row["prompt"], {"role": "assistant", "content": told(row, generator)}],
            "images": row["images"],
        }
        for row in pictures("base", 1500, 1) * 3
    ]
    training = TrainingArguments(
        str(folder / "run"),
        max_steps=args.backbone_steps,
        per_device_train_batch_size=32,
        learning_rate=5e-4,
        lr_scheduler_type="cosine",
        remove_unused_columns=False,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    Trainer(model, training, data_collator=collate, train_dataset=MixedRows(rows)).train()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def learned_space(segment: str, args: argparse.Namespace) -> tuple[PlanSpaceTrainer, float]:
    """A space of plans for whole answers or sentences, learned where it is not there, and the seconds that it took."""
    if segment == "switch":
        # Its space is that of sentences.
        trainer, spent = learned_space("sentence", args)
        trainer.model = changed(trainer.model, segment=segment)
        return trainer, spent
    folder = args.output_dir / segment
    where = backbone_folder(args)
    backbone = AutoModelForImageTextToText.from_pretrained(where, dtype="float32")
    kept = (folder / "model").is_dir()
    if not kept:
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped
    trainer = PlanSpaceTrainer(
        PlanModel.from_pretrained(folder / "model", backbone=backbone)
        if kept
        else PlanModel(backbone, PlanConfig(num_plans=args.plans, segment=segment)),
        PlanSpaceConfig(
            str(folder / "space"),
            max_steps=args.space_steps,
            max_completion_length=LONGEST,
            save_strategy="no",
            early_stopping_patience=None,
            eval_steps=args.space_steps,
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=pictures("base", args.prompts, 2),
        eval_dataset=pictures("rl", 24, 3),
        processing_class=AutoProcessor.from_pretrained(where),
        reward_funcs=all_right,
    )
    if kept:
        return trainer, float("nan")
    before = time.process_time()
    trainer.train()
    spent = time.process_time() - before
    trainer.save_model(str(folder / "model"))
    return trainer, spent


def reinforced(arm: str, space: PlanSpaceTrainer, args: argparse.Namespace, seed: int, folder: Path) -> dict[str, Any]:
    """The curve of the reward on test pictures, and how many answers are whole sentences at its end."""
    trainer_class, config_class, options = ARMS[arm]
    model, test = space.model, pictures("test", args.pictures, 0)
    forget(model, seed)
    size = config_class.rollout_prompts * config_class.num_generations
    steps = args.rollouts // size * config_class.num_iterations
    trainer = trainer_class(
        model,
        all_right,
        config_class(
            str(folder),
            max_steps=steps,
            max_completion_length=LONGEST,
            eval_strategy="steps",
            eval_steps=max(512 // size, 1) * config_class.num_iterations,
            save_strategy="no",
            measure_ceiling=False,
            seed=seed,
            use_cpu=True,
            disable_tqdm=True,
            logging_steps=1000,
            **options,
        ),
        train_dataset=pictures("rl", args.rl_pictures, 1),
        eval_dataset=test,
        processing_class=space.encoder.processing_class,
    )
    trainer.train()
    points = {
        round(row["step"] / config_class.num_iterations) * size: round(row["eval_reward"], 4)
        for row in trainer.state.log_history
        if "eval_reward" in row
    }
    spoken = trainer.spoken([trainer.encoder(row) for row in test], trainer.best_plans)
    texts = [trainer.encoder.encoder.tokenizer.decode(a.token_ids, skip_special_tokens=True) for a in spoken]
    return {"curve": points, "fluent": sum(map(is_fluent, texts)) / len(texts), "said": texts[:4]}


def tokens(args: argparse.Namespace, seed: int, folder: Path) -> dict[str, Any]:
    """TRL's GRPO on the backbone's own tokens, as `benchmarks/reproduction` trains it at its size `pocket`."""
    from arms import TokenSpeaker
    from trl import GRPOConfig, GRPOTrainer

    set_seed(seed)
    where, test = backbone_folder(args), pictures("test", args.pictures, 0)
    model = AutoModelForImageTextToText.from_pretrained(where, dtype="float32").requires_grad_(False)
    processor = AutoProcessor.from_pretrained(where)
    for part in model.get_decoder().layers[-2:]:
        part.requires_grad_(True)
    speaker, points = TokenSpeaker(model, processor), {}
    from datasets import Dataset

    trainer = GRPOTrainer(
        model=model,
        reward_funcs=all_right,
        args=GRPOConfig(
            str(folder),
            max_steps=args.rollouts // 128 * args.token_updates,
            num_iterations=args.token_updates,
            learning_rate=3e-4,
            lr_scheduler_type="constant",
            per_device_train_batch_size=128,
            num_generations=8,
            max_completion_length=LONGEST,
            beta=0.0,
            loss_type="grpo",
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            logging_steps=1000,
            seed=seed,
        ),
        train_dataset=Dataset.from_list(pictures("rl", args.rl_pictures, 1)),
        processing_class=processor,
    )
    trainer.train()
    columns = {aspect: [row[aspect] for row in test] for aspect in ASPECTS}
    texts = speaker.say(test, tokens=LONGEST)
    points[args.rollouts] = sum(all_right(texts, **columns)) / len(test)
    return {"curve": points, "fluent": sum(map(is_fluent, texts)) / len(texts), "said": texts[:4]}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["full", "reduced"], default="full")
    parser.add_argument("--segments", nargs="+", default=["answer", "sentence"])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=["bandit"])
    parser.add_argument("--reads_plans", action="store_true", help="the chooser reads plans (chooser_reads_plans)")
    parser.add_argument("--tokens", action="store_true", help="also RL over tokens")
    parser.add_argument("--token_updates", type=int, default=1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--plans", type=int, default=16)
    parser.add_argument("--prompts", type=int, default=150, help="pictures that a space is learned from")
    parser.add_argument("--backbone_steps", type=int, default=150)
    parser.add_argument("--space_steps", type=int, default=60)
    parser.add_argument("--rollouts", type=int, default=2048)
    parser.add_argument("--rl_pictures", type=int, default=200)
    parser.add_argument("--pictures", type=int, default=100, help="test pictures")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "outputs" / "plans-long")
    args = parser.parse_args(arguments)
    if args.size == "reduced":
        args.space_steps, args.rollouts, args.pictures = 20, 512, 40
    if "switch" in args.segments and any(arm.startswith("bandit") for arm in args.arms):
        parser.error("A bandit does not learn a switch: take `--arms grpo ppo`.")
    torch.set_num_threads(1)
    test, found = pictures("test", args.pictures, 0), {}
    for segment in args.segments:
        folder = args.output_dir / segment
        space, seconds = learned_space(segment, args)
        if args.reads_plans:
            space.model = changed(space.model, chooser_reads_plans=True)
        report = report_plans(
            space.model,
            space.encoder,
            test,
            LONGEST,
            space.ends,
            reward=RewardCaller(all_right),
            is_fluent=is_fluent,
        )
        found[segment] = {"space_seconds": seconds, **report.metrics()}
        print(json.dumps({segment: found[segment]}, indent=1), flush=True)
        for arm in args.arms:
            for seed in args.seeds:
                key = f"{segment}, {arm}, seed {seed}"
                found[key] = reinforced(arm, space, args, seed, folder / f"{arm}-{seed}")
                print(json.dumps({key: found[key]}), flush=True)
    for seed in args.seeds if args.tokens else []:
        key = f"tokens, {args.token_updates} updates, seed {seed}"
        found[key] = tokens(args, seed, args.output_dir / f"tokens-{seed}")
        print(json.dumps({key: found[key]}), flush=True)
    (args.output_dir / "figures.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


if __name__ == "__main__":
    main()
