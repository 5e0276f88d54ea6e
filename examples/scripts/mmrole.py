"""
MMRole end to end: SFT on characters' replies, GRPO over codes, judged evaluation in and out of distribution, report.

    accelerate launch examples/scripts/mmrole.py --config examples/configs/mmrole.yaml

The first stage starts from `model_name_or_path`, a learned latent action space, and each later one from the one before.
To run stages apart, as DeepSpeed and FSDP need it:

    python examples/scripts/mmrole.py --config examples/configs/mmrole.yaml \
        --stages evaluate --model_name_or_path outputs/mmrole/rl

The reward is the judge's ratio, or any of `latent-trl grpo`: `--reward_funcs embedding_similarity --reward_kwargs
'{"embedding_similarity": {"embedder": "sentence-transformers/all-MiniLM-L6-v2"}}'`.
"""

from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState
from transformers import AutoProcessor
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from latent_trl import (
    LatentActionGRPOConfig,
    LatentActionGRPOTrainer,
    LatentActionModel,
    LatentActionSFTConfig,
    LatentActionSFTTrainer,
)
from latent_trl.commands.arguments import as_dict
from latent_trl.commands.loading import load_rewards
from latent_trl.data.mmrole import SOURCE, mmrole
from latent_trl.evaluation.json_files import write_json
from latent_trl.evaluation.judge_protocol import judge_model
from latent_trl.evaluation.perplexity import answer_perplexity, text_perplexity
from latent_trl.rewards.judge import JudgeReward

STAGES = ("sft", "rl", "evaluate")


@dataclass
class TaskArguments:
    dataset_name: str = field(default=SOURCE, metadata={"help": "Hub id, or folder of the same layout"})
    dialogues: str = field(default="comment", metadata={"help": "comment, human-role or inter-role"})
    profile: str = field(default="detailed", metadata={"help": "detailed or condensed"})
    eval_splits: list[str] = field(
        default_factory=lambda: ["test", "official", "ood"], metadata={"help": "to evaluate"}
    )
    reward_funcs: list[str] = field(default_factory=lambda: ["judge"], metadata={"help": "as of `latent-trl grpo`"})
    reward_kwargs: str | None = field(default=None, metadata={"help": "as of `latent-trl grpo`, JSON"})
    coco_folder: str | None = field(default=None, metadata={"help": "COCO's train2017, if not in the data's images/"})
    skip_unusable: bool = field(default=False, metadata={"help": "leave out dialogues without picture, profile, reply"})
    limit: int | None = field(default=None, metadata={"help": "the first so many dialogues of each split"})
    stages: list[str] = field(default_factory=lambda: list(STAGES), metadata={"help": "of sft, rl, evaluate"})
    judge_kwargs: str | None = field(default=None, metadata={"help": "options of JudgeReward, JSON"})
    sft_kwargs: str | None = field(default=None, metadata={"help": "options of LatentActionSFTConfig, JSON"})
    processor_kwargs: str | None = field(default=None, metadata={"help": "options of the backbone's processor, JSON"})
    generations: int = field(default=3, metadata={"help": "answers a prompt in the evaluation"})


def load(name: str | Path, model_args: ModelConfig, task: TaskArguments, is_trainable: bool = False):
    """Model and processor."""
    model = LatentActionModel.from_pretrained(
        str(name),
        is_trainable=is_trainable,
        dtype=model_args.dtype or "auto",
        quantization_config=get_quantization_config(model_args),
    )
    options = as_dict("processor_kwargs", task.processor_kwargs) or {}
    return model, AutoProcessor.from_pretrained(model.config.base_model_name_or_path, padding_side="left", **options)


def rows(split: str, task: TaskArguments):
    options = {"coco_folder": task.coco_folder, "skip_unusable": task.skip_unusable, "limit": task.limit}
    return mmrole(split, task.dataset_name, task.dialogues, task.profile, **options)


def sft(start: str, output: Path, task: TaskArguments, model_args: ModelConfig) -> None:
    model, processor = load(start, model_args, task, is_trainable=True)
    args = LatentActionSFTConfig(str(output), **(as_dict("sft_kwargs", task.sft_kwargs) or {}))
    peft_config = get_peft_config(model_args)
    trainer = LatentActionSFTTrainer(model, args, rows("sft", task), None, processor, peft_config)
    trainer.train()
    trainer.save_model(str(output))
    trainer.accelerator.wait_for_everyone()  # the next stage reads what one process writes


def rl(start: str, output: Path, task: TaskArguments, model_args: ModelConfig, args, judge: JudgeReward) -> None:
    model, processor = load(start, model_args, task)
    options = as_dict("reward_kwargs", task.reward_kwargs) or {}
    rewards = [
        judge if name == "judge" else load_rewards([name], {k: v for k, v in options.items() if k == name})[0]
        for name in task.reward_funcs
    ]
    args.output_dir = str(output)
    trainer = LatentActionGRPOTrainer(model, rewards, args, train_dataset=rows("rl", task), processing_class=processor)
    trainer.train()
    trainer.save_model(str(output))
    trainer.accelerator.wait_for_everyone()  # the next stage reads what one process writes


def evaluate(start: str, output: Path, task: TaskArguments, model_args: ModelConfig, args, judge: JudgeReward) -> None:
    model, processor = load(start, model_args, task)
    model.to(PartialState().device)
    lines = ["| split | prompts | ratio [95 %] | perplexity of references | of answers |", "|---|---|---|---|---|"]
    for split in task.eval_splits:
        prompts = rows(split, task)
        found = judge_model(
            model,
            processor,
            prompts,
            judge,
            num_generations=task.generations,
            max_new_tokens=args.max_completion_length,
            batch_size=args.per_device_eval_batch_size,
            seed=args.seed,
        )
        references = text_perplexity(model, processor, prompts).interval()
        answers = answer_perplexity(model, processor, prompts, found.generations[0]).interval()
        figures = {"judged": found, "reference_perplexity": references, "answer_perplexity": answers}
        write_json(figures, output / f"{split}.json")
        print(f"{split}: ratio {found.report}; perplexity of references {references}, of answers {answers}")
        lines.append(f"| {split} | {len(prompts)} | {found.report.interval} | {references} | {answers} |")
    (output / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main(task: TaskArguments, args: LatentActionGRPOConfig, model_args: ModelConfig) -> None:
    unknown = set(task.stages) - set(STAGES)
    if unknown or not task.stages:
        raise ValueError(f"`stages` must be some of {STAGES}, got {task.stages}.")
    root, start = Path(args.output_dir), model_args.model_name_or_path
    judge = None
    if {"rl", "evaluate"} & set(task.stages):
        judge = JudgeReward(**{"template": "mmrole", **(as_dict("judge_kwargs", task.judge_kwargs) or {})})
        judge.check()
    if "sft" in task.stages:
        sft(start, root / "sft", task, model_args)
        start = str(root / "sft")
    if "rl" in task.stages:
        rl(start, root / "rl", task, model_args, args, judge)
        start = str(root / "rl")
    if "evaluate" in task.stages and PartialState().is_main_process:
        evaluate(start, root / "evaluation", task, model_args, args, judge)


if __name__ == "__main__":
    parser = TrlParser((TaskArguments, LatentActionGRPOConfig, ModelConfig))
    main(*parser.parse_args_and_config())
