"""Plans: which maps they change, that a batch of them is each alone, and that PEFT reads them as they are."""

import json

import pytest
import torch
from peft import PeftModel

from latent_trl.checkpoint.files import CheckpointError
from latent_trl.data.prompts import PromptEncoder
from latent_trl.models.backbone import Backbone
from latent_trl.plans.configuration import PlanConfig
from latent_trl.plans.model import PlanModel
from latent_trl.plans.scoring import log_likelihoods
from latent_trl.plans.targets import plan_targets

FAMILIES = ["llama", "gemma2", "gpt2", "llava", "qwen2_5_vl", "qwen3_vl"]
WRITERS = {
    "llama": ["self_attn.o_proj", "mlp.down_proj"],
    "gemma2": ["self_attn.o_proj", "mlp.down_proj"],
    "gpt2": ["attn.c_proj", "mlp.c_proj"],
    "phi": ["self_attn.dense", "mlp.fc2"],
    "cohere": ["self_attn.o_proj", "mlp.down_proj"],
    "llava": ["self_attn.o_proj", "mlp.down_proj"],
    "qwen2_5_vl": ["self_attn.o_proj", "mlp.down_proj"],
    "gemma3": ["self_attn.o_proj", "mlp.down_proj"],
}


def plan_model(tiny, **options):
    return PlanModel(tiny.model, PlanConfig(**{"num_plans": 3, "depth": 1, "rank": 2, "init_std": 0.5, **options}))


def logits(model, inputs, plan_ids):
    with model.plans.active(torch.tensor(plan_ids)), torch.no_grad():
        return model.backbone(**inputs).logits


@pytest.mark.parametrize("family", WRITERS)
def test_maps_that_write_to_the_residual_stream_are_found(make_tiny, family):
    names = plan_targets(Backbone(make_tiny(family).model), 1)
    ends = [name.split(".")[-2] + "." + name.split(".")[-1] for name in names]
    assert ends == WRITERS[family] * 2
    assert [int(name.split(".")[-3]) for name in names] == [1, 1, 2, 2]
    assert "vision" not in str(names)


def test_given_targets_are_ends_of_names(make_tiny):
    view = Backbone(make_tiny("llama").model)
    assert plan_targets(view, 2, ["q_proj", "mlp.up_proj"]) == [
        "model.layers.2.self_attn.q_proj",
        "model.layers.2.mlp.up_proj",
    ]
    with pytest.raises(ValueError, match=r"`target_modules=\['c_proj'\]`.*'o_proj'"):
        plan_targets(view, 2, ["c_proj"])


@pytest.mark.parametrize("depth", [-1, 3])
def test_a_depth_that_leaves_no_layer_is_named(make_tiny, depth):
    with pytest.raises(ValueError, match=f"`depth` must be in 0 ... 2.*got {depth}"):
        plan_targets(Backbone(make_tiny("llama").model), depth)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixed_batch_is_each_row_alone_and_what_peft_makes_of_a_plan(make_tiny, family, tmp_path):
    tiny = make_tiny(family)
    model, inputs = plan_model(tiny), tiny.inputs
    model.save_pretrained(tmp_path)
    mask = inputs["attention_mask"].bool()
    plain = model.backbone(**inputs).logits.detach()
    whole = [logits(model, inputs, [k] * len(mask)) for k in range(3)]
    mixed = logits(model, inputs, [2, 0, 1])
    for row, plan in enumerate((2, 0, 1)):
        torch.testing.assert_close(mixed[row][mask[row]], whole[plan][row][mask[row]], atol=1e-5, rtol=1e-5)
        assert (whole[plan] - plain)[mask].abs().max() > 0.05
    # Outside the block there is no plan.
    torch.testing.assert_close(model.backbone(**inputs).logits, plain, atol=0, rtol=0)
    for plan in range(3):
        alone = PeftModel.from_pretrained(make_tiny(family).model, str(tmp_path / f"plan_{plan:02d}")).eval()
        with torch.no_grad():
            torch.testing.assert_close(alone(**inputs).logits[mask], whole[plan][mask], atol=1e-5, rtol=1e-5)


def test_states_below_the_depth_carry_no_plan(tiny_llama):
    model = plan_model(tiny_llama, depth=2)
    inputs = tiny_llama.inputs
    with torch.no_grad():
        plain = model.backbone(**inputs, output_hidden_states=True).hidden_states
        with model.plans.active(torch.tensor([0, 1, 2])):
            planned = model.backbone(**inputs, output_hidden_states=True).hidden_states
    for layer in range(3):
        assert torch.equal(plain[layer], planned[layer])
    assert not torch.allclose(plain[3], planned[3], atol=1e-2)


@pytest.mark.parametrize("family", ["llama", "llava", "gemma3", "qwen2_5_vl"])
def test_greedy_answers_are_those_of_peft(make_tiny, family, tmp_path):
    tiny = make_tiny(family)
    model = plan_model(tiny)
    found = model.generate(**tiny.inputs, plan_ids=[1, 1, 1], max_new_tokens=8, eos_token_id=[])
    model.save_pretrained(tmp_path)
    backbone = make_tiny(family).model
    never = Backbone(backbone).vision_token_ids
    alone = PeftModel.from_pretrained(backbone, str(tmp_path / "plan_01")).eval()
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "eos_token_id": -1}
    expected = alone.generate(**tiny.inputs, **options, suppress_tokens=never or None)
    assert torch.equal(found, expected)
    assert not torch.equal(found, model.generate(**tiny.inputs, plan_ids=0, max_new_tokens=8, eos_token_id=[]))


@pytest.mark.parametrize("family", ["llama", "gpt2", "llava", "gemma3", "gemma2", "qwen2_5_vl", "qwen3_vl", "idefics3"])
def test_log_likelihoods_are_those_of_whole_sequences(make_tiny, family):
    from test_branching import picture_rows, text_rows

    tiny = make_tiny(family)
    model, encoder = plan_model(tiny), PromptEncoder(tiny.processor)
    rows = picture_rows() if model.view.vision_token_ids else text_rows()
    prompts = [encoder({"_row": i, **row}) for i, row in enumerate(rows)]
    answers = [[[20, 30, 2], [40]], [[50, 60, 70, 80]], [[21, 22], [23, 24, 25], [26]]]
    found = log_likelihoods(model, encoder, prompts, answers, batch_size=7)
    assert [tuple(scores.shape) for scores in found] == [(2, 3), (1, 3), (3, 3)]
    for prompt, own, scores in zip(prompts, answers, found):
        inputs = encoder.collate([prompt])
        for m, answer in enumerate(own):
            ids = torch.cat([inputs["input_ids"], torch.tensor([answer])], dim=1)
            grown = tiny.extended(inputs, ids)
            completion = torch.zeros_like(ids)
            completion[:, -len(answer) :] = 1
            for plan in range(3):
                whole = model(**grown, completion_mask=completion, plan_ids=torch.tensor([plan]))
                assert scores[m, plan].item() == pytest.approx(whole.sum().item(), abs=1e-4)


def test_only_plans_in_use_get_a_gradient(tiny_llama):
    model = plan_model(tiny_llama)
    inputs = {name: value[:2] for name, value in tiny_llama.inputs.items()}
    completion = torch.zeros_like(inputs["input_ids"])
    completion[:, -2:] = 1
    model(**inputs, completion_mask=completion, plan_ids=torch.tensor([0, 2])).sum().backward()
    for parameter in (*model.plans.lora_A, *model.plans.lora_B):
        assert [bool(row.abs().sum() > 0) for row in parameter.grad] == [True, False, True]
    assert all(parameter.grad is None for parameter in model.backbone.parameters())


def test_a_folder_gives_the_model_back(make_tiny, tmp_path):
    tiny = make_tiny("llama")
    model = plan_model(tiny)
    model.chooser_is_trained = True
    model.save_pretrained(tmp_path)
    again = PlanModel.from_pretrained(tmp_path, backbone=make_tiny("llama").model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert torch.equal(again.generate(**tiny.inputs), model.generate(**tiny.inputs))
    assert sorted(path.name for path in tmp_path.iterdir())[:2] == ["chooser.safetensors", "plan_00"]


def test_a_folder_holds_what_was_saved_last_alone(make_tiny, tmp_path):
    many = plan_model(make_tiny("llama"), num_plans=12)
    many.chooser_is_trained = True
    many.save_pretrained(tmp_path)
    plan_model(make_tiny("llama")).save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan_00", "plan_01", "plan_02", "plan_config.json"]


def test_plans_of_another_backbone_are_refused(make_tiny, tmp_path):
    plan_model(make_tiny("llama")).save_pretrained(tmp_path)
    other = make_tiny("llama").model
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.add_(1)
    with pytest.raises(CheckpointError, match="another backbone"):
        PlanModel.from_pretrained(tmp_path, backbone=other)


@pytest.mark.parametrize("fault", ["missing", "rank", "shape", "more", "nan", "record", "version"])
def test_damaged_folders_are_refused(make_tiny, tmp_path, fault):
    from safetensors.torch import load_file, save_file

    plan_model(make_tiny("llama")).save_pretrained(tmp_path)
    plan, record = tmp_path / "plan_02", tmp_path / "plan_config.json"
    weights = plan / "adapter_model.safetensors"
    tensors = load_file(weights)
    first = sorted(tensors)[0]
    if fault == "missing":
        weights.unlink()
    elif fault == "rank":
        adapter = json.loads((plan / "adapter_config.json").read_text())
        (plan / "adapter_config.json").write_text(json.dumps({**adapter, "r": 8}))
    elif fault == "shape":
        save_file({**tensors, first: tensors[first][:1].contiguous()}, weights)
    elif fault == "nan":
        save_file({**tensors, first: tensors[first] * torch.nan}, weights)
    elif fault == "more":
        save_file({**tensors, "other": tensors[first].clone()}, weights)
    else:
        changed = {"num_plans": 0} if fault == "record" else {"schema_version": 2}
        record.write_text(json.dumps({**json.loads(record.read_text()), **changed}))
    with pytest.raises(CheckpointError, match="plan_config.json" if fault == "record" else str(tmp_path)):
        PlanModel.from_pretrained(tmp_path, backbone=make_tiny("llama").model)


def test_a_model_that_a_folder_does_not_fit_stays_as_it_was(make_tiny, tmp_path):
    from safetensors.torch import load_file, save_file

    saved = plan_model(make_tiny("llama"), seed=1)
    saved.chooser_is_trained = True
    saved.save_pretrained(tmp_path)
    chooser = load_file(tmp_path / "chooser.safetensors")
    save_file({**chooser, "last.weight": chooser["last.weight"][:2].contiguous()}, tmp_path / "chooser.safetensors")
    model = plan_model(make_tiny("llama"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match="chooser.safetensors"):
        model.load_folder(tmp_path)
    assert not model.chooser_is_trained
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_of_a_repository_its_own_files_alone_are_asked_for_and_the_commit_of_the_base(make_tiny, tmp_path, monkeypatch):
    from fnmatch import fnmatch

    from latent_trl.checkpoint import files
    from latent_trl.plans import checkpoint as module

    tiny, asked = make_tiny("llama"), {}
    tiny.model.config._name_or_path = "someone/base"
    plan_model(tiny, base_model_revision="abc").save_pretrained(tmp_path)

    def fetched(repo_id, allow_patterns, **options):
        asked["patterns"] = allow_patterns
        return tmp_path

    def loaded(name, **options):
        asked["base"] = (name, options)
        return tiny.model

    monkeypatch.setattr(files, "fetch_snapshot", fetched)
    monkeypatch.setattr(module, "load_backbone", loaded)
    PlanModel.from_pretrained("someone/plans", dtype="float32")
    assert asked["base"] == ("someone/base", {"revision": "abc", "dtype": "float32"})
    wanted = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*") if path.suffix != ".md"}
    found = {
        name for name in [*wanted, "pytorch_model.bin", "model.py"] if any(fnmatch(name, p) for p in asked["patterns"])
    }
    assert wanted == found


@pytest.mark.parametrize("plan_ids", [3, -1, [0, 1], [0, 1, 5]])
def test_plans_that_there_are_not_are_named(tiny_llama, plan_ids):
    with pytest.raises(ValueError, match="`plan_ids` must be in 0 ... 2"):
        plan_model(tiny_llama).generate(**tiny_llama.inputs, plan_ids=plan_ids)


def test_without_a_chooser_a_plan_must_be_named(tiny_llama):
    with pytest.raises(ValueError, match="`plan_ids` must be given"):
        plan_model(tiny_llama).generate(**tiny_llama.inputs)


def test_prompts_that_cannot_be_continued_are_refused(make_tiny):
    tiny = make_tiny("gpt2")
    model = plan_model(tiny)
    limit, width = model.view.max_positions, int(tiny.inputs["attention_mask"].sum(dim=1).max())
    longest = limit - width + 1
    assert model.generate(**tiny.inputs, plan_ids=0, max_new_tokens=longest, eos_token_id=[]).shape[1] == limit + 1
    with pytest.raises(ValueError, match=f"may take {limit + 1} positions, and the backbone has {limit}"):
        model.generate(**tiny.inputs, plan_ids=0, max_new_tokens=longest + 1)
    with pytest.raises(ValueError, match="pad on the left"):
        model.generate(**{name: value.flip(1) for name, value in tiny.inputs.items()}, plan_ids=0)


def test_a_config_serves_two_backbones(make_tiny, tmp_path):
    config = PlanConfig(num_plans=2, rank=1)
    first = PlanModel(make_tiny("llama").model, config)
    second = PlanModel(make_tiny("llama", num_hidden_layers=5).model, config)
    assert (first.plan_config.depth, second.plan_config.depth, config.depth) == (1, 2, None)
    assert first.plan_config.backbone_fingerprint != second.plan_config.backbone_fingerprint
    second.save_pretrained(tmp_path)
    PlanModel.from_pretrained(tmp_path, backbone=make_tiny("llama", num_hidden_layers=5).model)


@pytest.mark.parametrize("family", ["llama", "gpt2", "llava", "qwen2_5_vl"])
def test_a_plan_stands_beside_a_lora_as_pefts_own_do(make_tiny, family, tmp_path):
    tiny = make_tiny(family)
    model = plan_model(with_lora(tiny))
    assert model.plans.targets == plan_model(make_tiny(family)).plans.targets
    model.save_pretrained(tmp_path)
    mask = tiny.inputs["attention_mask"].bool()
    found = logits(model, tiny.inputs, [2, 0, 1])
    peft = PeftModel.from_pretrained(make_tiny(family).model, str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        lora = peft(**tiny.inputs).logits
        for row, plan in enumerate((2, 0, 1)):
            peft.load_adapter(str(tmp_path / f"plan_{plan:02d}"), f"plan_{plan}")
            peft.base_model.set_adapter(["default", f"plan_{plan}"])
            together = peft(**tiny.inputs).logits
            torch.testing.assert_close(found[row][mask[row]], together[row][mask[row]], atol=1e-5, rtol=1e-5)
    assert (lora - make_tiny(family).model(**tiny.inputs).logits)[mask].abs().max() > 1e-3
    assert (lora - found)[mask].abs().max() > 1e-2


def with_lora(tiny, seed=0, **options):
    """A tiny model whose backbone carries a LoRA that does something, on layers with plans and on others."""
    from types import SimpleNamespace

    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False, **options)
    torch.manual_seed(seed)
    return SimpleNamespace(model=get_peft_model(tiny.model, config), inputs=tiny.inputs)


def test_the_lora_below_the_plans_comes_and_goes_with_them(make_tiny, tmp_path):
    tiny = make_tiny("llama")
    model = plan_model(with_lora(tiny))
    model.save_pretrained(tmp_path)
    want = model.generate(**tiny.inputs, plan_ids=1)
    again = PlanModel.from_pretrained(tmp_path, backbone=make_tiny("llama").model)
    assert torch.equal(again.generate(**tiny.inputs, plan_ids=1), want)
    same = PlanModel.from_pretrained(tmp_path, backbone=with_lora(make_tiny("llama")).model)
    assert torch.equal(same.generate(**tiny.inputs, plan_ids=1), want)
    with pytest.raises(CheckpointError, match="learned beside another LoRA"):
        PlanModel.from_pretrained(tmp_path, backbone=with_lora(make_tiny("llama"), seed=1).model)
    with pytest.raises(CheckpointError, match="plans of a backbone with a LoRA, and this model is without"):
        plan_model(make_tiny("llama")).load_folder(tmp_path)
    plan_model(make_tiny("llama")).save_pretrained(tmp_path / "plain")
    with pytest.raises(CheckpointError, match="plans of a backbone without a LoRA, and this model is with"):
        PlanModel.from_pretrained(tmp_path / "plain", backbone=with_lora(make_tiny("llama")).model)
    plan_model(make_tiny("llama")).save_pretrained(tmp_path)
    assert not (tmp_path / "adapter").exists()


def test_an_adapter_that_cannot_be_saved_with_the_plans_is_refused(make_tiny):
    from peft import IA3Config, LoraConfig, get_peft_model, inject_adapter_in_model

    config = LoraConfig(target_modules=["q_proj"])
    with pytest.raises(ValueError, match="adapter of PEFT. Merge"):
        PlanModel(inject_adapter_in_model(config, make_tiny("llama").model))
    several = get_peft_model(make_tiny("llama").model, config)
    several.add_adapter("other", config)
    with pytest.raises(ValueError, match=r"carries the adapters \['default', 'other'\].*Merge"):
        PlanModel(several)
    other = IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    with pytest.raises(ValueError, match="IA3.*beside a LoRA alone. Merge"):
        PlanModel(get_peft_model(make_tiny("llama").model, other))


@pytest.mark.parametrize("option", [{"num_plans": 1}, {"rank": 0}, {"init_std": 0.0}, {"chooser_size": 0}])
def test_a_config_out_of_range_is_named(option):
    with pytest.raises(ValueError, match=f"`{next(iter(option))}` must be"):
        PlanConfig(**option)


@pytest.mark.parametrize("family", ["llama", "llava"])
def test_padding_does_not_change_what_the_chooser_says(make_tiny, family):
    tiny = make_tiny(family, images=(1, 1, 1)) if family == "llava" else make_tiny(family)
    model = plan_model(tiny)
    together = model.plan_logits(**tiny.inputs)
    assert together.shape == (3, 3) and together.dtype == torch.float32
    for row in range(3):
        mask = tiny.inputs["attention_mask"][row].bool()
        alone = {name: value[row : row + 1] for name, value in tiny.inputs.items()}
        alone |= {name: tiny.inputs[name][row : row + 1, mask] for name in ("input_ids", "attention_mask")}
        torch.testing.assert_close(model.plan_logits(**alone)[0], together[row], atol=1e-5, rtol=1e-4)
