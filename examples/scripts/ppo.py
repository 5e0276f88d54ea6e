"""
PPO over the codes of a latent action model: a value head, and one sample per prompt is enough.

    python examples/scripts/ppo.py --config examples/configs/pocket_ppo.yaml

    accelerate launch examples/scripts/ppo.py \
        --model_name_or_path outputs/sft --dataset_name my_prompts.jsonl --reward_funcs my_rewards:score \
        --output_dir outputs/ppo --bf16 --max_completion_length 256 --num_generations 1 --kl_target 6

Put your own reward function in the place of `data_args.rewards()` below: it gets prompts, completions and every column
of the data set as lists, and returns one number for each completion.
"""

from trl import ModelConfig, TrlParser, get_quantization_config

from latent_trl import LatentActionModel, LatentActionPPOConfig, LatentActionPPOTrainer
from latent_trl.commands.arguments import RewardArguments


def main(data_args: RewardArguments, args: LatentActionPPOConfig, model_args: ModelConfig) -> None:
    model = LatentActionModel.from_pretrained(
        model_args.model_name_or_path,
        dtype=model_args.dtype or "auto",
        quantization_config=get_quantization_config(model_args),
    )
    trainer = LatentActionPPOTrainer(
        model,
        data_args.rewards(),
        args,
        train_dataset=data_args.rows("prompts"),
        eval_dataset=data_args.rows("prompts", "test") if args.eval_strategy != "no" else None,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model(args.output_dir)
    if args.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    parser = TrlParser((RewardArguments, LatentActionPPOConfig, ModelConfig))
    main(*parser.parse_args_and_config())
