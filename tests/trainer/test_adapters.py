"""PEFT decides what an adapter trains, and what was trained is saved, loaded and merged."""

import copy

import peft
import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from rl_models import prompts
from safetensors.torch import load_file, save_file
from tiny_models import latent, latent_config, llama, make_tokenizer

from latent_trl import (
    LatentActionGRPOConfig,
    LatentActionGRPOTrainer,
    LatentActionModel,
    LatentActionSFTConfig,
    LatentActionSFTTrainer,
)
from latent_trl.checkpoint.files import CheckpointError
from latent_trl.trainer.run.component_training import load_components

LAYERS = ["q_proj", "v_proj"]
# They are in all prompts.
TOKENS = make_tokenizer().convert_tokens_to_ids(["a", "t"])
CONFIGS = {
    "lora": lambda: peft.LoraConfig(r=4, target_modules=LAYERS),
    "dora": lambda: peft.LoraConfig(r=4, target_modules=LAYERS, use_dora=True),
    "lora with an embedding": lambda: peft.LoraConfig(r=4, target_modules=LAYERS, modules_to_save=["embed_tokens"]),
    "lora with tokens": lambda: peft.LoraConfig(r=4, target_modules=LAYERS, trainable_token_indices=TOKENS),
    "tokens alone": lambda: peft.TrainableTokensConfig(token_indices=TOKENS, target_modules=["embed_tokens"]),
    "ia3": lambda: peft.IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[]),
    "loha": lambda: peft.LoHaConfig(r=4, target_modules=LAYERS),
    "lokr": lambda: peft.LoKrConfig(r=4, target_modules=LAYERS),
    "vera": lambda: peft.VeraConfig(r=4, target_modules=["q_proj", "o_proj"]),
    "layer norms": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"]),
}
SHARED = {"use_cpu": True, "bf16": False, "max_steps": 2, "save_strategy": "no", "disable_tqdm": True}


def sft(folder, model, tiny, **options):
    rows = [{"role": "user", "content": "go"}, {"role": "assistant", "content": "a(b)"}]
    args = LatentActionSFTConfig(str(folder), learning_rate=1e-2, **SHARED)
    data = Dataset.from_list([{"messages": rows}] * 32)
    return LatentActionSFTTrainer(model, args, data, processing_class=tiny.processor, **options)


def grpo(folder, model, tiny, peft_config=None, **options):
    args = LatentActionGRPOConfig(
        str(folder),
        **{
            **SHARED,
            "train_backbone": True,
            "learning_rate": 1e-2,
            "per_device_train_batch_size": 4,
            "num_generations": 4,
            "max_completion_length": 6,
            "num_iterations": 2,
            **options,
        },
    )
    return LatentActionGRPOTrainer(
        model,
        lambda completions, **columns: [float(i % 2) for i in range(len(completions))],
        args,
        train_dataset=prompts(8),
        processing_class=tiny.processor,
        peft_config=peft_config,
    )


MAKE = {"sft": sft, "grpo": grpo}


def build():
    model, tiny = latent("llama", latent_config(use_projector=False))
    model.config.stage = "policy"
    return model, tiny


def states(model, tiny) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model.encode(**tiny.processor("what a tat", return_tensors="pt"))[0]


def reloaded(model, folder, **options) -> LatentActionModel:
    model.save_pretrained(folder)
    return LatentActionModel.from_pretrained(folder, backbone=llama().model, **options)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", MAKE)
def test_what_peft_trains_is_trained_saved_and_loaded(kind, name, tmp_path):
    theirs = get_peft_model(llama().model, CONFIGS[name]()).get_base_model()
    wanted = {n for n, p in theirs.named_parameters() if p.requires_grad}
    model, tiny = build()
    before = states(model, tiny)
    trainer = MAKE[kind](tmp_path / "run", model, tiny, peft_config=CONFIGS[name]())
    own = dict(model.backbone.named_parameters())
    assert {n for n, p in own.items() if p.requires_grad} == wanted
    first = {n: p.detach().clone() for n, p in own.items()}
    trainer.train()
    changed = {n for n, p in own.items() if not torch.equal(p, first[n])}
    assert changed and changed <= wanted
    # Each part of the adapter learns; of its tensors some start at a place from which a gradient is zero.
    assert {n.split(".")[0] for n in changed} == {n.split(".")[0] for n in wanted}
    assert not torch.allclose(states(model, tiny), before, atol=1e-6)
    loaded = reloaded(model, tmp_path / "saved")
    torch.testing.assert_close(states(loaded, tiny), states(model, tiny))
    assert not any(p.requires_grad for p in loaded.parameters() if p in set(loaded.backbone.parameters()))
    further = reloaded(model, tmp_path / "saved", is_trainable=True)
    assert {n for n, p in further.backbone.named_parameters() if p.requires_grad} == wanted
    MAKE[kind](tmp_path / "more", further, tiny)
    assert {n for n, p in further.backbone.named_parameters() if p.requires_grad} == wanted


@pytest.mark.parametrize("name", CONFIGS)
def test_a_backbone_with_an_adapter_is_known_as_the_same(name):
    model, _ = build()
    model.add_adapter(CONFIGS[name]())
    assert model.backbone_view.fingerprint() == model.config.backbone_fingerprint


@pytest.mark.parametrize("name", ["lora", "dora", "lora with an embedding", "lora with tokens", "ia3", "loha"])
def test_a_merged_adapter_is_saved(name, tmp_path):
    model, tiny = build()
    sft(tmp_path / "run", model, tiny, peft_config=CONFIGS[name]()).train()
    before = states(model, tiny)
    model.peft_backbone.merge_and_unload()
    assert model.peft_backbone is None
    torch.testing.assert_close(states(model, tiny), before, atol=1e-5, rtol=1e-4)
    loaded = reloaded(model, tmp_path / "saved")
    assert loaded.peft_backbone is None
    torch.testing.assert_close(states(loaded, tiny), before, atol=1e-5, rtol=1e-4)
    # A second adapter on top is saved beside what the first one left.
    grpo(tmp_path / "rl", loaded, tiny, peft_config=CONFIGS["lora"]()).train()
    again = reloaded(loaded, tmp_path / "again")
    torch.testing.assert_close(states(again, tiny), states(loaded, tiny))
    assert not torch.allclose(states(again, tiny), before, atol=1e-5)


def test_a_merge_that_parts_tied_tensors_is_refused_before_anything_is_written(tmp_path):
    model, tiny = latent("llama", latent_config(use_projector=False), tie_word_embeddings=True)
    model.add_adapter(peft.LoraConfig(r=4, target_modules=LAYERS, modules_to_save=["lm_head"]))
    model.peft_backbone.merge_and_unload()
    with pytest.raises(ValueError, match="one tensor in the base model"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_second_adapter_is_refused_with_advice_that_works():
    model, _ = build()
    model.add_adapter(CONFIGS["lora"]())
    with pytest.raises(ValueError, match="model.peft_backbone.merge_and_unload()"):
        model.add_adapter(CONFIGS["lora"]())
    model.peft_backbone.merge_and_unload()
    model.add_adapter(CONFIGS["ia3"]())


def test_loras_start_follows_the_seed(tmp_path):
    def start(kind, seed, disturbed):
        torch.manual_seed(disturbed)
        model, tiny = build()
        args = {"peft_config": CONFIGS["lora"]()}
        if kind == "grpo":
            grpo(tmp_path, model, tiny, seed=seed, **args)
        return {n: p for n, p in model.backbone.named_parameters() if "lora_A" in n}

    one, same, other = start("grpo", 7, 1), start("grpo", 7, 2), start("grpo", 8, 1)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "config",
    [
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
        peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
        peft.AdaptionPromptConfig(adapter_len=2, adapter_layers=1),
    ],
    ids=lambda config: type(config).__name__,
)
@pytest.mark.parametrize("kind", MAKE)
def test_methods_that_adapt_no_layer_are_refused_by_name(kind, config, tmp_path):
    model, tiny = build()
    with pytest.raises(ValueError, match=type(config).__name__):
        MAKE[kind](tmp_path, model, tiny, peft_config=copy.deepcopy(config))


@pytest.mark.parametrize(
    "options", [{"target_modules": ["lm_head", "q_proj"]}, {"target_modules": LAYERS, "modules_to_save": ["lm_head"]}]
)
def test_rl_refuses_to_adapt_the_head_which_chooses_no_code(options, tmp_path):
    model, tiny = build()
    with pytest.raises(ValueError, match="head, on which no probability of a code depends"):
        grpo(tmp_path, model, tiny, peft_config=peft.LoraConfig(r=4, **options))


def test_rl_refuses_trained_biases_where_the_backbone_before_rl_is_needed(tmp_path):
    config = peft.LoraConfig(r=4, target_modules=LAYERS, bias="all")
    model, tiny = latent("qwen2", latent_config(use_projector=False))
    with pytest.raises(ValueError, match="bias='none'"):
        grpo(tmp_path, model, tiny, peft_config=copy.deepcopy(config))
    model, tiny = latent("qwen2", latent_config(use_projector=False))
    grpo(tmp_path, model, tiny, peft_config=copy.deepcopy(config), beta=0.0)
    assert any(n.endswith(".bias") and p.requires_grad for n, p in model.backbone.named_parameters())


def test_only_a_config_of_peft_is_an_adapter():
    with pytest.raises(TypeError, match="must be a `peft.PeftConfig`, got dict"):
        build()[0].add_adapter({"r": 4})


@pytest.mark.parametrize("kind", MAKE)
def test_an_adapter_that_could_not_be_loaded_again_is_refused(kind, tmp_path):
    model, tiny = build()
    config = peft.OFTConfig(oft_block_size=4, target_modules=LAYERS, use_cayley_neumann=False)
    with pytest.raises(ValueError, match="OFTConfig, whose adapter could not be loaded again"):
        MAKE[kind](tmp_path, model, tiny, peft_config=config)


@pytest.mark.parametrize(
    "config",
    [
        lambda: peft.LoraConfig(target_modules=LAYERS, init_lora_weights="pissa"),
        lambda: peft.LoraConfig(target_modules=LAYERS, init_lora_weights="olora"),
        lambda: peft.LoraConfig(target_modules=LAYERS, layer_replication=[(0, 2), (1, 2)]),
        lambda: peft.LoraConfig(target_modules=LAYERS, rank_pattern={".*q_proj": 2}),
        lambda: peft.LoraConfig(target_modules=LAYERS, r=5000),
        lambda: peft.IA3Config(target_modules=r".*k_proj", feedforward_modules=[]),
    ],
)
def test_options_of_an_adapter_that_could_not_be_loaded_again_are_refused(config):
    model, _ = build()
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match="`peft_config`, whose adapter could not be loaded again"):
        model.add_adapter(config())
    after = dict(model.named_parameters())
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("fault", ["another rank", "nan in the adapter", "nan in a component"])
def test_a_checkpoint_that_cannot_be_resumed_leaves_the_model_as_it_was(fault, tmp_path):
    model, tiny = build()
    trained = sft(tmp_path / "run", model, tiny, peft_config=CONFIGS["lora"]())
    trained.save_model(tmp_path / "saved")
    name = "policy/model.safetensors" if fault == "nan in a component" else "adapter/adapter_model.safetensors"
    if fault != "another rank":
        tensors = load_file(tmp_path / "saved" / name)
        first = next(iter(tensors))
        save_file({**tensors, first: tensors[first] * torch.nan}, tmp_path / "saved" / name)
    other, _ = build()
    # Whatever is copied before the fault is met is to be seen.
    with torch.no_grad():
        for component in (other.policy, other.codebook, other.world_model):
            for parameter in component.parameters():
                parameter.add_(1)
    other.add_adapter(peft.LoraConfig(r=2 if fault == "another rank" else 4, target_modules=LAYERS))
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(CheckpointError, match="differ" if fault == "another rank" else "infinite or NaN"):
        load_components(other, tmp_path / "saved")
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, before[name]), name
