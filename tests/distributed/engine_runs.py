"""Small runs of every trainer, pictures and text mixed, and what they end with."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from torch.distributed.tensor import DTensor
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, TrainerCallback
from trl.models import unwrap_model_for_generation

sys.path[:0] = [str(Path(__file__).parent.parent / "trainer")]

import learning_runs  # noqa: E402
from learning_runs import build_sft, build_space, paired_rows, picture, text_rows, turn  # noqa: E402
from tiny_models import FAMILIES, latent, latent_config, perturb  # noqa: E402

import latent_trl  # noqa: E402
from latent_trl import LatentActionModel  # noqa: E402
from latent_trl.data.prompts import PromptEncoder  # noqa: E402
from latent_trl.generation.choice import ActionChoice  # noqa: E402
from latent_trl.trainer.run.engines import engine_record  # noqa: E402

RL = ("grpo", "rloo", "ppo")
# Rows of different lengths; the second process's share of some batches is text alone, so are whole batches.
IMAGES = (1, 0, 2, 0, 0, 1, 0, 0)
# Without its large epsilon, Adam turns rounding errors of gradients near zero into whole steps.
EXACT = {"adam_epsilon": 1e-3, "max_grad_norm": 0.5, "logging_steps": 1}
SAVES = {"save_strategy": "steps", "save_steps": 3, "save_total_limit": 1}


def draw_alike(choice: ActionChoice, probs: torch.Tensor) -> torch.Tensor:
    """Codes by a number that depends on the sample's place in its group and on the step alone, on any process."""
    step = choice.__dict__.setdefault("drawn", 0)
    choice.drawn = step + 1
    copy = torch.arange(len(probs)) // (len(probs) // choice.copies)
    number = 0.05 + 0.9 * ((copy * 0.37 + step * 0.61) % 1.0)
    return (probs.cumsum(dim=-1) < number[:, None]).sum(dim=-1).clamp(max=probs.shape[1] - 1)


def letters(completions, **columns):
    return [float(len(set(str(completion)))) for completion in completions]


def prompt_rows(count: int = 16) -> Dataset:
    """Prompts with 0, 1 and 2 pictures."""
    rows = []
    for i in range(count):
        pictures = [picture(10 * i + k) for k in range(IMAGES[i % len(IMAGES)])]
        rows.append({"prompt": [turn("user", "what " * (1 + i % 3) + f"is {i}?")], "images": pictures})
    return Dataset.from_list(rows)


def four_bits(folder: str) -> tuple[Any, Any]:
    """A model whose text model is in 4 bits, and the [`TinyModel`] of its kind."""
    tiny = FAMILIES["llava"](hidden_size=64, intermediate_size=128)
    own = Path(folder) / "backbone"
    # The first process alone writes.
    tiny.model.save_pretrained(own)
    torch.distributed.barrier()
    # The kernels of the CPU want widths of a multiple of 32, which the tiny vision tower has not.
    skipped = ["lm_head", "model.vision_tower", "model.multi_modal_projector"]
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=skipped,
    )
    backbone = AutoModelForImageTextToText.from_pretrained(own, quantization_config=config, dtype=torch.float32)
    torch.manual_seed(4)
    model = LatentActionModel.from_backbone(backbone, latent_config()).eval()
    perturb(model)
    return model, tiny


def build(kind: str, tuned: str, folder: str, rows: int, family: str = "llava", **options: Any):
    """
    A trainer with `rows` rows a process and batch.

    Args:
        kind (`str`): `"space"`, `"sft"`, `"grpo"`, `"rloo"` or `"ppo"`.
        tuned (`str`): What of the backbone is trained: `"frozen"`, `"lora"`, `"layers"` or `"vision"`.
    """
    adapter = LoraConfig(r=2, lora_alpha=4, init_lora_weights=False) if tuned == "lora" else None
    options = {**EXACT, **SAVES, "per_device_train_batch_size": rows, **options}
    if kind in ("space", "sft"):
        options = {"train_sampling_strategy": "sequential", **options}
    if kind == "space":
        steps = {f"{stage}_max_steps": options.pop("max_steps", 4) for stage in learning_runs.STAGES}
        data = {"paired": paired_rows(16, IMAGES), "text": text_rows(16)}
        return build_space(folder, family=family, **data, **steps, **options)
    if kind == "sft":
        if tuned == "layers":
            options["trained_layers"] = ["model.language_model.layers.2", "lm_head"]
        elif tuned == "vision":
            options["trained_layers"] = ["model.vision_tower", "model.multi_modal_projector"]
        return build_sft(folder, family=family, rows=paired_rows(16, IMAGES), peft_config=adapter, **options)
    torch.manual_seed(0)
    model, tiny = four_bits(folder) if options.pop("four_bits", False) else latent(family, latent_config())
    name = f"LatentAction{kind.upper()}"
    options = {
        "use_cpu": True,
        "bf16": False,
        "steps_per_generation": 1,
        "num_iterations": 2,
        "max_completion_length": 5,
        "learning_rate": 1e-2,
        "beta": 0.05,
        "disable_tqdm": True,
        "max_steps": 4,
        "train_backbone": adapter is not None,
        "num_generations": 1 if kind == "ppo" else 2,
        **options,
    }
    anchor = text_rows(32) if "anchor_coef" in options else None
    args = getattr(latent_trl, f"{name}Config")(str(folder), **options)
    data = {"train_dataset": prompt_rows(), "anchor_dataset": anchor}
    return getattr(latent_trl, f"{name}Trainer")(
        model, letters, args, processing_class=tiny.processor, peft_config=adapter, **data
    )


def whole_weights(trainer: Any) -> dict[str, torch.Tensor]:
    """Trained and frozen tensors, gathered; empty on all processes but the first."""
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    else:
        weights = trainer.accelerator.unwrap_model(trainer.model).state_dict()
    return {name: tensor.detach().clone() for name, tensor in (weights or {}).items()}


def greedy(model: Any, processing_class: Any) -> torch.Tensor:
    """Greedy answers to prompts with and without a picture."""
    encoder = PromptEncoder(processing_class)
    batch = encoder.collate([encoder({"_row": i, **row}) for i, row in enumerate(prompt_rows(3))])
    return model.generate(**batch, max_new_tokens=6, action_do_sample=False)


def end_early(trainer: Any) -> None:
    """Lets half of the tokens end a completion, so that processes generate for different numbers of steps."""
    ends = list(range(10, len(trainer._tokenizer), 2))
    trainer.eos_token_ids = trainer.generation_config.eos_token_id = [*trainer.eos_token_ids, *ends]


class KillAt(TrainerCallback):
    """Kills the last process at a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step and args.process_index == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def train(kind: str, tuned: str, folder: str, rows: int, options: dict[str, Any], resume: str | None = None) -> None:
    """
    Trains, saves, and leaves in `result.pt` what the run ended with.

    Args:
        options (`dict`): Of the trainer; `early_ends` lets completions end at different lengths, `killed_at` kills the
            last process at a step, and `evaluated` answers an evaluation set in the end.
    """
    options = dict(options)
    early_ends, killed_at = options.pop("early_ends", False), options.pop("killed_at", None)
    evaluated = options.pop("evaluated", False)
    ActionChoice._draw = draw_alike
    ActionChoice._draw_together = lambda choice, probs, wanted: draw_alike(choice, probs)
    Path(folder).mkdir(parents=True, exist_ok=True)
    trainer = build(kind, tuned, folder, rows, **options)
    if early_ends:
        end_early(trainer)
    if killed_at is not None:
        trainer.add_callback(KillAt(killed_at))
    trainer.train(resume_from_checkpoint=resume)
    history = getattr(trainer, "history", None) or trainer.state.log_history
    result = {
        "weights": whole_weights(trainer),
        "logs": [{k: v for k, v in row.items() if k != "step_time"} for row in learning_runs.logs(history)],
        "engine": engine_record(trainer)["engine"],
        "sharded": is_sharded(trainer),
    }
    if evaluated:
        result["evaluation"] = trainer.evaluate(prompt_rows(6))
    # All processes answer the same prompts.
    with unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator) as model:
        result["answers"] = greedy(model, trainer.processing_class)
    trainer.save_model(str(Path(folder) / "saved"))
    if trainer.accelerator.is_main_process:
        torch.save(result, Path(folder) / "result.pt")


def is_sharded(trainer: Any) -> bool:
    """Whether this process holds a part alone of some tensors."""
    parameters = trainer.accelerator.unwrap_model(trainer.model).parameters()
    return any(isinstance(p, DTensor) or "ds_numel" in vars(p) for p in parameters)
