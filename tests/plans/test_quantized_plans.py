"""Plans on a backbone in 4 bits, alone and beside a LoRA. On the CPU."""

import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import FAMILIES

from latent_trl import PlanBanditConfig, PlanBanditTrainer, PlanConfig, PlanModel, PlanSpaceConfig, PlanSpaceTrainer
from latent_trl.models.backbone import Backbone

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (`pip install bitsandbytes`)")
CONFIG = PlanConfig(num_plans=3, depth=1, rank=2, init_std=0.5)


@pytest.fixture(scope="module", params=["llama", "llava"])
def base(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny = FAMILIES[request.param](hidden_size=64, intermediate_size=128)
    tiny.model.generation_config.eos_token_id = list(range(10, 140))
    tiny.model.save_pretrained(folder)
    return request.param, folder, tiny


def four_bits(base):
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, BitsAndBytesConfig

    family, folder, _ = base
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["lm_head", "model.vision_tower", "model.multi_modal_projector"],
    )
    auto = AutoModelForCausalLM if family == "llama" else AutoModelForImageTextToText
    model = auto.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    # On a CPU it turns off bitsandbytes' packing, which rounds, so that PEFT's passes are over the same weights.
    return Backbone(model).model


def packed(model) -> list[str]:
    return [name for name, tensor in model.named_parameters() if tensor.dtype == torch.uint8]


@torch.no_grad()
def test_a_plan_is_what_peft_makes_of_it_in_four_bits(base, tmp_path):
    _, _, tiny = base
    model = PlanModel(four_bits(base), CONFIG)
    assert packed(model) and {p.dtype for p in model.plans.parameters()} == {torch.float32}
    model.save_pretrained(tmp_path)
    with model.plans.active(torch.tensor([2, 2, 2])):
        found = model.backbone(**tiny.inputs).logits
    alone = PeftModel.from_pretrained(four_bits(base), str(tmp_path / "plan_02")).eval()
    torch.testing.assert_close(found, alone(**tiny.inputs).logits, atol=1e-4, rtol=1e-4)
    again = PlanModel.from_pretrained(tmp_path, backbone=four_bits(base))
    options = {"plan_ids": [0, 1, 2], "eos_token_id": []}
    assert torch.equal(again.generate(**tiny.inputs, **options), model.generate(**tiny.inputs, **options))


@torch.no_grad()
def test_plans_stand_beside_a_lora_of_a_backbone_in_four_bits(base, tmp_path):
    _, _, tiny = base
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["o_proj", "q_proj"], r=2, init_lora_weights=False)
    model = PlanModel(get_peft_model(four_bits(base), config), CONFIG)
    model.save_pretrained(tmp_path)
    with model.plans.active(torch.tensor([1, 1, 1])):
        found = model.backbone(**tiny.inputs).logits
    both = PeftModel.from_pretrained(four_bits(base), str(tmp_path / "adapter")).eval()
    both.load_adapter(str(tmp_path / "plan_01"), "plan")
    both.base_model.set_adapter(["default", "plan"])
    torch.testing.assert_close(found, both(**tiny.inputs).logits, atol=1e-4, rtol=1e-4)
    again = PlanModel.from_pretrained(tmp_path, backbone=four_bits(base))
    assert torch.equal(again.generate(**tiny.inputs, plan_ids=1), model.generate(**tiny.inputs, plan_ids=1))


@pytest.mark.parametrize("lora", [False, True])
def test_plans_are_learned_and_chosen_in_four_bits(base, tmp_path, lora):
    _, _, tiny = base
    backbone = four_bits(base)
    if lora:
        backbone = get_peft_model(backbone, LoraConfig(target_modules=["o_proj"], r=2, init_lora_weights=False))
    model = PlanModel(backbone, CONFIG)
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": f"what {i}"}]} for i in range(6)])
    quiet = {"use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "max_completion_length": 4, "max_steps": 2}
    args = PlanSpaceConfig(
        str(tmp_path / "space"), branch_min_prob=0.003, answers_per_prompt=3, eval_strategy="no", **quiet
    )
    space = PlanSpaceTrainer(model, args, rows, None, tiny.processor)
    space.train()
    args = PlanBanditConfig(str(tmp_path / "bandit"), num_iterations=1, rollout_prompts=4, **quiet)
    bandit = PlanBanditTrainer(
        model, lambda completions, **_: [float(len(one[0]["content"])) for one in completions], args, rows,
        processing_class=tiny.processor,
    )  # fmt: skip
    bandit.train()
    losses = [row["loss"] for trainer in (space, bandit) for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 4 and all(map(math.isfinite, losses))
    changed = {name for name, tensor in model.named_parameters() if not torch.equal(tensor, before[name])}
    assert changed and not [name for name in changed if name.startswith("backbone")]
    assert {name.split(".")[0] for name in changed} == {"plans", "chooser"}
