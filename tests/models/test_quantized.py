"""A backbone in 4 bits, with components that stay as they are. On the CPU."""

import pytest
import torch
from tiny_models import FAMILIES, latent_config, perturb

from latent_trl import ActionLaw, LatentActionModel

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (`pip install bitsandbytes`)")


def four_bits():
    from transformers import BitsAndBytesConfig

    # The kernels on the CPU want widths of a multiple of 32, which the tiny vision tower has not.
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["lm_head", "model.vision_tower", "model.multi_modal_projector"],
    )


@pytest.fixture(scope="module", params=["llama", "llava"])
def quantized(request, tmp_path_factory):
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    folder = tmp_path_factory.mktemp("base")
    tiny = FAMILIES[request.param](hidden_size=64, intermediate_size=128)
    tiny.model.save_pretrained(folder)
    auto = AutoModelForCausalLM if request.param == "llama" else AutoModelForImageTextToText
    tiny.model = auto.from_pretrained(folder, quantization_config=four_bits(), dtype=torch.float32)
    torch.manual_seed(0)
    return LatentActionModel.from_backbone(tiny.model, latent_config()).eval(), tiny, folder


def test_the_backbone_is_quantized_and_the_components_are_not(quantized):
    model, _, _ = quantized
    packed = {name for name, p in model.named_parameters() if p.dtype == torch.uint8}
    assert packed and all(name.startswith("backbone.") for name in packed)
    for name in model.component_classes:
        if getattr(model, name) is not None:
            assert {p.dtype for p in getattr(model, name).parameters()} == {torch.float32}


def test_generation_parity_and_scores_hold_in_four_bits(quantized):
    model, tiny, _ = quantized
    options = {"max_new_tokens": 6, "min_new_tokens": 6}
    banned = model.config.vision_token_ids or None
    want = tiny.model.generate(**tiny.inputs, do_sample=False, suppress_tokens=banned, **options)
    model.world_model = None
    torch.manual_seed(0)
    model.new_component("world_model")
    if model.projector is not None:
        model.new_component("projector")
    assert torch.equal(model.generate(**tiny.inputs, **options), want)
    perturb(model)
    out = model.generate(**tiny.inputs, **options, return_dict_in_generate=True)
    with torch.no_grad():
        passed = model(**tiny.extended(tiny.inputs, out.sequences), return_logits=False)
    log_probs, _ = ActionLaw().score(passed.action_logits[:, -7:-1], out.action_ids)
    assert (log_probs - out.action_log_probs).abs().max() < 1e-3


def test_components_save_and_load_around_a_quantized_backbone(quantized, tmp_path):
    model, tiny, folder = quantized
    model.save_pretrained(tmp_path)
    loaded = LatentActionModel.from_pretrained(tmp_path, quantization_config=four_bits(), dtype=torch.float32)
    assert loaded.backbone.is_quantized
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "action_do_sample": False}
    assert torch.equal(loaded.generate(**tiny.inputs, **options), model.generate(**tiny.inputs, **options))


def test_a_policy_learns_through_a_quantized_backbone(quantized):
    model, tiny, _ = quantized
    out = model(**tiny.inputs, action_ids=torch.zeros_like(tiny.inputs["input_ids"]))
    (out.logits.logsumexp(-1).sum() + out.action_logits[..., 0].sum()).backward()
    assert all(p.grad is not None for p in model.world_model.parameters())
    assert all(p.grad is not None for p in model.policy.parameters())
    model.zero_grad()


def test_an_adapter_goes_on_a_quantized_backbone(tmp_path):
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM

    tiny = FAMILIES["llama"](hidden_size=64, intermediate_size=128)
    tiny.model.save_pretrained(tmp_path / "base")
    backbone = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=four_bits())
    model = LatentActionModel.from_backbone(backbone, latent_config())
    model.add_adapter(LoraConfig(r=4, init_lora_weights=False))
    model.eval()
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "action_do_sample": False}
    want = model.generate(**tiny.inputs, **options)
    model.save_pretrained(tmp_path / "model")
    assert torch.equal(model.generate(**tiny.inputs, **options), want), "saving must not change the model"
    loaded = LatentActionModel.from_pretrained(tmp_path / "model", quantization_config=four_bits())
    assert torch.equal(loaded.generate(**tiny.inputs, **options), want)


def test_components_learned_on_four_bits_load_on_the_whole_model(quantized, tmp_path):
    model, _, folder = quantized
    model.save_pretrained(tmp_path)
    loaded = LatentActionModel.from_pretrained(tmp_path)
    assert torch.uint8 not in {p.dtype for p in loaded.parameters()}
    assert torch.equal(loaded.codebook.weight, model.codebook.weight)


def test_components_learned_on_the_whole_model_load_on_four_bits(quantized, tmp_path):
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    _, tiny, folder = quantized
    auto = AutoModelForCausalLM if "pixel_values" not in tiny.inputs else AutoModelForImageTextToText
    whole = LatentActionModel.from_backbone(auto.from_pretrained(folder), latent_config())
    assert whole.config.backbone_fingerprint
    whole.save_pretrained(tmp_path)
    loaded = LatentActionModel.from_pretrained(tmp_path, quantization_config=four_bits(), dtype=torch.float32)
    loaded.generate(**tiny.inputs, max_new_tokens=2)
