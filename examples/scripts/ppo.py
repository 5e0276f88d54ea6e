"""
PPO over the codes of a latent action model: a value head, and one sample per prompt is enough.

    python examples/scripts/ppo.py --config examples/configs/pocket_ppo.yaml

    accelerate launch examples/scripts/ppo.py \
        --model_name_or_path outputs/sft --dataset_name my_prompts.jsonl \
        --output_dir outputs/ppo --bf16 --max_completion_length 256 --num_generations 1 --kl_target 6

Put your own reward function in the place of `reward` below: it gets prompts, completions and every column of the data
set as lists, and returns one number for each completion.
"""

from datasets import load_dataset
from trl import ModelConfig, ScriptArguments, TrlParser, get_quantization_config

from latent_trl import LatentActionModel, LatentActionPPOConfig, LatentActionPPOTrainer
from latent_trl.data.shapes import shape_questions
from latent_trl.rewards.exact_match import ExactMatchReward

reward = ExactMatchReward()


def load_rows(name: str, split: str):
    """`shapes` is the small data set of the package; a file, or an id of the Hub."""
    if name == "shapes":
        return shape_questions("rl" if split == "train" else split)
    if name.endswith((".json", ".jsonl")):
        return load_dataset("json", data_files=name, split="train")
    return load_dataset(name, split=split)


def main(script_args: ScriptArguments, args: LatentActionPPOConfig, model_args: ModelConfig) -> None:
    model = LatentActionModel.from_pretrained(
        model_args.model_name_or_path,
        dtype=model_args.dtype or "auto",
        quantization_config=get_quantization_config(model_args),
    )
    eval_dataset = None
    if args.eval_strategy != "no":
        eval_dataset = load_rows(script_args.dataset_name, script_args.dataset_test_split)
    trainer = LatentActionPPOTrainer(
        model,
        reward,
        args,
        train_dataset=load_rows(script_args.dataset_name, script_args.dataset_train_split),
        eval_dataset=eval_dataset,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model(args.output_dir)
    if args.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    parser = TrlParser((ScriptArguments, LatentActionPPOConfig, ModelConfig))
    main(*parser.parse_args_and_config())
