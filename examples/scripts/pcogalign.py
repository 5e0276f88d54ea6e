"""
PCogAlignBench end to end: SFT on reference answers, GRPO over codes with a judge, evaluation on both location sets.

The published data has no reference answers: make them first, with examples/scripts/pcogalign_references.py.

    accelerate launch examples/scripts/pcogalign.py --config examples/configs/pcogalign.yaml

The first stage starts from `model_name_or_path`, a learned latent action space, and each later one from the one before.
To run stages apart, as DeepSpeed and FSDP need it:

    python examples/scripts/pcogalign.py --config examples/configs/pcogalign.yaml \
        --stages evaluate --model_name_or_path outputs/pcogalign/rl
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
from latent_trl.data.pcogalign import SOURCE, pcogalign
from latent_trl.evaluation.json_files import write_json
from latent_trl.evaluation.judge_protocol import judge_model
from latent_trl.evaluation.perplexity import answer_perplexity, text_perplexity
from latent_trl.rewards.judge import JudgeReward

STAGES = ("sft", "rl", "evaluate")


@dataclass
class TaskArguments:
    dataset_name: str = field(default=SOURCE, metadata={"help": "Hub id, or folder of the same layout"})
    references: str | None = field(default=None, metadata={"help": "folder of the reference answers"})
    location_set: str = field(default="LS1", metadata={"help": "LS1 or LS2: what is trained on; the other is OOD"})
    limit: int | None = field(default=None, metadata={"help": "the first so many rows of each split"})
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
    return pcogalign(split, task.dataset_name, task.references, task.location_set, task.limit)


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
    args.output_dir = str(output)
    trainer = LatentActionGRPOTrainer(model, judge, args, train_dataset=rows("rl", task), processing_class=processor)
    trainer.train()
    trainer.save_model(str(output))
    trainer.accelerator.wait_for_everyone()  # the next stage reads what one process writes


def evaluate(start: str, output: Path, task: TaskArguments, model_args: ModelConfig, args, judge: JudgeReward) -> None:
    model, processor = load(start, model_args, task)
    model.to(PartialState().device)
    for split in ("test", "ood"):
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


def main(task: TaskArguments, args: LatentActionGRPOConfig, model_args: ModelConfig) -> None:
    unknown = set(task.stages) - set(STAGES)
    if unknown or not task.stages:
        raise ValueError(f"`stages` must be some of {STAGES}, got {task.stages}.")
    root, start = Path(args.output_dir), model_args.model_name_or_path
    judge = None
    if {"rl", "evaluate"} & set(task.stages):
        judge = JudgeReward(**{"template": "pcogalign", **(as_dict("judge_kwargs", task.judge_kwargs) or {})})
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
