"""Learning, QLoRA and RL on a backbone in 4 bits: on the CPU, and on a GPU where there is one."""

import math

import pytest
import torch
from datasets import Dataset
from learning_runs import STAGES, build_sft, build_space, paired_rows, picture, text_rows, turn
from peft import LoraConfig
from tiny_models import FAMILIES, latent_config, perturb

from latent_trl import (
    LatentActionGRPOConfig,
    LatentActionGRPOTrainer,
    LatentActionModel,
    LatentActionPPOConfig,
    LatentActionPPOTrainer,
)

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (`pip install bitsandbytes`)")

IMAGES = (1, 0, 2)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# The kernels of the CPU want widths of a multiple of 32, which the tiny vision tower has not.
WHOLE = ["lm_head", "model.vision_tower", "model.multi_modal_projector"]
OPTIONS = {"max_new_tokens": 6, "min_new_tokens": 6, "action_do_sample": False}


@pytest.fixture(scope="module", params=["llava", pytest.param("llama", marks=pytest.mark.slow)])
def base(request, tmp_path_factory):
    """A family, and a folder with a backbone of it."""
    folder = tmp_path_factory.mktemp("base")
    FAMILIES[request.param](hidden_size=64, intermediate_size=128).model.save_pretrained(folder)
    return request.param, folder


def four_bits(base, device: str):
    """A tiny model whose backbone is in 4 bits, doubly quantised, and its example inputs."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, BitsAndBytesConfig

    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    family, folder = base
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=WHOLE,
    )
    auto = AutoModelForCausalLM if family == "llama" else AutoModelForImageTextToText
    tiny = FAMILIES[family](hidden_size=64, intermediate_size=128)
    tiny.model = auto.from_pretrained(folder, quantization_config=config, dtype=dtype, device_map=device)
    for inputs in (tiny.inputs, tiny.text_inputs):
        for name, value in inputs.items():
            inputs[name] = value.to(device, dtype if value.is_floating_point() else None)
    torch.manual_seed(4)
    return LatentActionModel.from_backbone(tiny.model, latent_config()).eval(), tiny


def tensors(model) -> dict[str, torch.Tensor]:
    """Values of all tensors, whatever precision they are made for training."""
    return {name: p.detach().cpu().float().clone() for name, p in model.named_parameters()}


def settings(device: str) -> dict:
    return {"use_cpu": device == "cpu", "bf16": device == "cuda", "logging_steps": 1}


def check_changed(before, after, *parts: str) -> None:
    names = {name for name in before if not torch.equal(before[name], after[name])}
    assert names and all(name.startswith(tuple(f"{part}." for part in parts)) for name in names), names
    assert all(any(name.startswith(f"{part}.") for name in names) for part in parts), names
    assert not any(name.startswith("backbone.") and ".lora_" not in name for name in names), names


def check_saving(trainer, model, tiny, folder, device: str) -> None:
    """`save_model` changes nothing, not by a bit; what it wrote says the same around the same backbone in 4 bits."""
    model.eval()
    want = model.generate(**tiny.inputs, **OPTIONS, return_dict_in_generate=True)
    trainer.save_model(str(folder))
    got = model.generate(**tiny.inputs, **OPTIONS, return_dict_in_generate=True)
    assert torch.equal(got.sequences, want.sequences)
    assert torch.equal(got.action_log_probs, want.action_log_probs)
    loaded = LatentActionModel.from_pretrained(folder, backbone=base_again(model, device))
    said = loaded.generate(**tiny.inputs, **OPTIONS, return_dict_in_generate=True)
    assert torch.equal(said.sequences, want.sequences)


def base_again(model, device: str):
    """The same base model once more, in 4 bits."""
    from latent_trl.models.checkpoint import load_backbone

    config = model.backbone.config
    return load_backbone(
        model.config.base_model_name_or_path,
        quantization_config=config.quantization_config,
        dtype=model.backbone.dtype,
        device_map=device,
    )


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_a_space_is_learned_on_four_bits(base, device, tmp_path):
    model, tiny = four_bits(base, device)
    vlm = base[0] == "llava"
    rows = {"paired": paired_rows(), "text": text_rows()} if vlm else {"paired": text_rows(), "text": None}
    options = {"save_strategy": "steps", "save_steps": 2, **rows, **settings(device)}
    stages = list(STAGES) if vlm else ["inverse_dynamics", "policy"]
    before = tensors(model)
    trainer = build_space(tmp_path / "run", base[0], model=model, stages=stages, **options)
    trainer.train()
    assert all(math.isfinite(row["loss"]) for row in trainer.history if "loss" in row)
    parts = [name for name in model.component_classes if getattr(model, name) is not None]
    check_changed(before, tensors(model), *parts)
    check_saving(trainer, model, tiny, tmp_path / "model", device)


@pytest.mark.parametrize("device", DEVICES)
def test_an_adapter_is_tuned_on_four_bits(base, device, tmp_path):
    model, tiny = four_bits(base, device)
    model.config.stage = "policy"
    perturb(model)
    rows = paired_rows() if base[0] == "llava" else text_rows()
    options = {"save_strategy": "steps", "save_steps": 2, **settings(device)}
    trainer = build_sft(tmp_path / "run", base[0], model=model, rows=rows, **options)
    before = tensors(model)
    trainer.train()
    check_changed(before, tensors(model), "backbone")
    check_saving(trainer, model, tiny, tmp_path / "model", device)


@pytest.mark.parametrize(
    "adapted", [pytest.param(False, marks=pytest.mark.slow, id="frozen"), pytest.param(True, id="adapted")]
)
@pytest.mark.parametrize("kind", ["grpo", "ppo"])
@pytest.mark.parametrize("device", DEVICES)
def test_a_policy_is_trained_on_four_bits(base, device, kind, adapted, tmp_path):
    model, tiny = four_bits(base, device)
    perturb(model)
    rows = [{"prompt": [turn("user", "what " * (1 + i) + str(i))]} for i in range(3)]
    if base[0] == "llava":
        rows = [{**row, "images": [picture(7 * i + k) for k in range(IMAGES[i])]} for i, row in enumerate(rows)]
    trainer_class, config_class = {
        "grpo": (LatentActionGRPOTrainer, LatentActionGRPOConfig),
        "ppo": (LatentActionPPOTrainer, LatentActionPPOConfig),
    }[kind]
    args = config_class(
        str(tmp_path / "run"),
        per_device_train_batch_size=6,
        num_generations=2,
        max_completion_length=5,
        learning_rate=1e-2,
        beta=0.1,
        max_steps=2,
        num_iterations=2,
        train_backbone=adapted,
        save_steps=1,
        disable_tqdm=True,
        **settings(device),
    )

    def turns(completions, **columns):
        return [float(i % 2) for i in range(len(completions))]

    trainer = trainer_class(
        model,
        turns,
        args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny.processor,
        peft_config=LoraConfig(r=4) if adapted else None,
    )
    before = tensors(model)
    trainer.train()
    check_changed(before, tensors(model), *trainer.trained_components, *(["backbone"] if adapted else []))
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    batch = trainer._generate_and_score_completions([row for row in trainer.train_dataset for _ in range(2)])
    mask = batch["completion_mask"].bool()
    tolerance = 1e-3 if device == "cpu" else 0.3
    sampled, scored = batch["sampling_per_token_logps"][mask], batch["old_per_token_logps"][mask]
    assert sampled.dtype == scored.dtype == torch.float32
    torch.testing.assert_close(scored, sampled, atol=tolerance, rtol=tolerance)
    check_saving(trainer, model, tiny, tmp_path / "model", device)


def test_gradients_reach_an_adapter_under_four_bits(base):
    """Against the same model with the same numbers in float32, after inference that packs the weights of a CPU."""
    model, tiny = four_bits(base, "cpu")
    perturb(model)
    model.add_adapter(LoraConfig(r=4, init_lora_weights=False))
    model.generate(**tiny.text_inputs, **OPTIONS)

    def gradients():
        model.train()
        for name, parameter in model.backbone.named_parameters():
            parameter.requires_grad_(".lora_" in name)
        model.train()
        model.zero_grad()
        states, _ = model.encode(**tiny.text_inputs)
        states[tiny.text_inputs["attention_mask"].bool()].square().sum().backward()
        found = {n: p.grad for n, p in model.backbone.named_parameters() if ".lora_" in n}
        return {n: g.clone() for n, g in found.items()}

    found = gradients()
    model.backbone.dequantize()
    assert torch.uint8 not in {p.dtype for p in model.parameters()}
    want = gradients()
    assert found.keys() == want.keys() and len(found) > 10
    for name, gradient in want.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-3, rtol=1e-3)
