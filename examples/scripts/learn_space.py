"""
Learn a latent action space on a backbone: codebook, projector, both together, and the policy by cloning.

On a small model, on the CPU, in minutes:

    python examples/scripts/learn_space.py --config examples/configs/pocket_learn.yaml

On several GPUs, with images and with text:

    accelerate launch examples/scripts/learn_space.py \
        --model_name_or_path Qwen/Qwen2.5-VL-3B-Instruct --dtype bfloat16 \
        --dataset_name my_pairs.jsonl --text_dataset_name my_conversations.jsonl \
        --output_dir outputs/space --bf16 --per_device_train_batch_size 4 --gradient_accumulation_steps 4
"""

from transformers import AutoProcessor
from trl import ModelConfig, TrlParser, get_quantization_config

from latent_trl import LatentActionConfig, LatentActionModel, LatentActionSpaceConfig, LatentActionSpaceTrainer
from latent_trl.commands.arguments import LearnArguments
from latent_trl.models.checkpoint import load_backbone


def main(data_args: LearnArguments, args: LatentActionSpaceConfig, model_args: ModelConfig) -> None:
    backbone = load_backbone(
        model_args.model_name_or_path,
        dtype=model_args.dtype or "auto",
        quantization_config=get_quantization_config(model_args),
    )
    config = LatentActionConfig(**data_args.model_fields())
    trainer = LatentActionSpaceTrainer(
        LatentActionModel.from_backbone(backbone, config),
        args,
        data_args.rows("conversations"),
        text_dataset=data_args.text_rows(),
        processing_class=AutoProcessor.from_pretrained(model_args.model_name_or_path, padding_side="left"),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model(args.output_dir)
    if args.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    parser = TrlParser((LearnArguments, LatentActionSpaceConfig, ModelConfig))
    main(*parser.parse_args_and_config())
