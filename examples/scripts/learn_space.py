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

from dataclasses import dataclass, field

from datasets import load_dataset
from transformers import AutoProcessor
from trl import ModelConfig, ScriptArguments, TrlParser, get_quantization_config

from latent_trl import LatentActionConfig, LatentActionModel, LatentActionSpaceConfig, LatentActionSpaceTrainer
from latent_trl.data.shapes import chitchat, shape_pairs
from latent_trl.models.checkpoint import load_backbone


@dataclass
class LearnArguments(ScriptArguments):
    text_dataset_name: str | None = field(default=None, metadata={"help": "conversations without images"})
    num_codes: int = field(default=128, metadata={"help": "K, the number of latent actions"})
    policy_layers: int = field(default=8, metadata={"help": "decoder layers of the policy"})
    inverse_dynamics_layers: int = field(default=4, metadata={"help": "decoder layers of the inverse dynamics model"})
    gumbel_temperature: float = field(default=2.0, metadata={"help": "of the straight-through choice"})


def load_rows(name: str, split: str):
    """`shapes` and `chitchat` are the small data sets of the package; a file, or an id of the Hub."""
    if name == "shapes":
        return shape_pairs("base", limit=1500)
    if name == "chitchat":
        return chitchat(limit=1500)
    if name.endswith((".json", ".jsonl")):
        return load_dataset("json", data_files=name, split="train")
    return load_dataset(name, split=split)


def main(script_args: LearnArguments, args: LatentActionSpaceConfig, model_args: ModelConfig) -> None:
    backbone = load_backbone(
        model_args.model_name_or_path,
        dtype=model_args.dtype or "auto",
        quantization_config=get_quantization_config(model_args),
    )
    config = LatentActionConfig(
        num_codes=script_args.num_codes,
        policy_decoder={"num_hidden_layers": script_args.policy_layers},
        inverse_dynamics_decoder={"num_hidden_layers": script_args.inverse_dynamics_layers},
        gumbel_temperature=script_args.gumbel_temperature,
    )
    text_dataset = None
    if script_args.text_dataset_name:
        text_dataset = load_rows(script_args.text_dataset_name, script_args.dataset_train_split)
    trainer = LatentActionSpaceTrainer(
        LatentActionModel.from_backbone(backbone, config),
        args,
        load_rows(script_args.dataset_name, script_args.dataset_train_split),
        text_dataset=text_dataset,
        processing_class=AutoProcessor.from_pretrained(model_args.model_name_or_path, padding_side="left"),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model(args.output_dir)
    if args.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    parser = TrlParser((LearnArguments, LatentActionSpaceConfig, ModelConfig))
    main(*parser.parse_args_and_config())
