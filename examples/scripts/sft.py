"""
Tune the backbone on a task with LoRA while it follows codes.

    python examples/scripts/sft.py --config examples/configs/pocket_sft.yaml

    accelerate launch examples/scripts/sft.py \
        --model_name_or_path outputs/space --dataset_name my_conversations.jsonl \
        --output_dir outputs/sft --bf16 --use_peft --lora_r 16 --per_device_train_batch_size 4
"""

from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from latent_trl import LatentActionModel, LatentActionSFTConfig, LatentActionSFTTrainer
from latent_trl.commands.arguments import DataArguments


def main(data_args: DataArguments, args: LatentActionSFTConfig, model_args: ModelConfig) -> None:
    model = LatentActionModel.from_pretrained(
        model_args.model_name_or_path,
        is_trainable=True,
        dtype=model_args.dtype or "auto",
        quantization_config=get_quantization_config(model_args),
    )
    trainer = LatentActionSFTTrainer(
        model,
        args,
        data_args.rows("conversations"),
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model(args.output_dir)
    if args.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    parser = TrlParser((DataArguments, LatentActionSFTConfig, ModelConfig))
    main(*parser.parse_args_and_config())
