"""
Tune the backbone on a task with LoRA while it follows codes.

    python examples/scripts/sft.py --config examples/configs/pocket_sft.yaml

    accelerate launch examples/scripts/sft.py \
        --model_name_or_path outputs/space --dataset_name my_conversations.jsonl \
        --output_dir outputs/sft --bf16 --use_peft --lora_r 16 --per_device_train_batch_size 4
"""

from datasets import load_dataset
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from latent_trl import LatentActionModel, LatentActionSFTConfig, LatentActionSFTTrainer
from latent_trl.data.shapes import shape_pairs


def load_rows(name: str, split: str):
    """`shapes` is the small data set of the package; a file, or an id of the Hub."""
    if name == "shapes":
        return shape_pairs("base", limit=1500)
    if name.endswith((".json", ".jsonl")):
        return load_dataset("json", data_files=name, split="train")
    return load_dataset(name, split=split)


def main(script_args: ScriptArguments, args: LatentActionSFTConfig, model_args: ModelConfig) -> None:
    model = LatentActionModel.from_pretrained(
        model_args.model_name_or_path,
        is_trainable=True,
        dtype=model_args.dtype or "auto",
        quantization_config=get_quantization_config(model_args),
    )
    trainer = LatentActionSFTTrainer(
        model,
        args,
        load_rows(script_args.dataset_name, script_args.dataset_train_split),
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model(args.output_dir)
    if args.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    parser = TrlParser((ScriptArguments, LatentActionSFTConfig, ModelConfig))
    main(*parser.parse_args_and_config())
