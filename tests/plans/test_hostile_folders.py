"""Folders of plans that mean harm: refused with the documented error before memory is taken or the backbone touched."""

import json
import os
import resource
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import llama

from latent_trl import CheckpointError, PlanConfig, PlanModel

CHOOSER, PLAN, LORA = "chooser.safetensors", "plan_01", "adapter"
WEIGHTS = {CHOOSER: CHOOSER, PLAN: f"{PLAN}/adapter_model.safetensors", LORA: f"{LORA}/adapter_model.safetensors"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plans")
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = PlanModel(get_peft_model(llama().model, lora), PlanConfig(num_plans=3, depth=1, rank=2, init_std=0.5))
    model.chooser_is_trained = True
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(files, tmp_path):
    shutil.copytree(files, tmp_path / "plans")
    return tmp_path / "plans"


def edit(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def refused(folder, match=None, error=CheckpointError):
    """It is refused, for little memory, and the backbone is as it was."""
    backbone = llama().model.requires_grad_(True)
    before = {name: (p.detach().clone(), p.requires_grad) for name, p in backbone.named_parameters()}
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(error, match=match):
        PlanModel.from_pretrained(folder, backbone=backbone)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 200_000
    after = dict(backbone.named_parameters())
    assert after.keys() == before.keys() and not any(m._forward_hooks for m in backbone.modules())
    assert all(torch.equal(after[n], t) and after[n].requires_grad == grad for n, (t, grad) in before.items())


HUGE = 10**30
FIELDS = {
    "num_plans": [10**9, -1, 3.0, "3", True, None, [3], HUGE, 2, 4, 9_999],
    "rank": [10**9, -1, 2.0, "2", True, None, 4096, 1],
    "depth": [10**9, -1, 1.0, "1", True, [1], 2],
    "chooser_size": [10**9, -4, 8.0, "8", True, None, 4096],
    "chooser_layers": [10**9, -4, 2.0, "8", True, None, 1],
    "init_std": ["x", float("nan"), float("inf"), -1, 0, True, None, [], HUGE, {}],
    "seed": ["x", HUGE, -1, 1.5, None, [], True],
    "segment": ["x", 0, -1, True, 1.5, None, [], {}, HUGE],
    "segment_end_token_ids": ["abc", [1.5], [-1], {"a": 1}, [[1]], 5, [HUGE], [True], ["x"]],
    "vision_token_ids": ["abc", [1.5], [-1], {"a": 1}, [[1]], 5, [HUGE], ["x"]],
    "target_modules": ["abc", [1], ["(a+)+$"], ["."], {}, {"a": 1}, [""], 3, ["q_proj"], []],
    "base_model_name_or_path": [3, [], {"a": 1}, True, 1.5],
    "base_model_revision": [3, [], {"a": 1}, True],
    "backbone_fingerprint": [3, [], {"a": 1}, True, "x"],
    "has_adapter": [False, "x", 1, [], None, {}],
    "schema_version": [2, True, 1.0, "1", None, HUGE],
}


@pytest.mark.parametrize("name", FIELDS)
def test_a_record_with_a_value_that_cannot_be_used(folder, name):
    kept = (folder / "plan_config.json").read_text()
    for value in FIELDS[name]:
        edit(folder / "plan_config.json", **{name: value})
        refused(folder)
        (folder / "plan_config.json").write_text(kept)


@pytest.mark.parametrize("text", ['{"rank": 7, "rank": 2}', "[" * 100_000, '{"a":' * 50_000 + "1" + "}" * 50_000, "[]"])
def test_a_record_that_is_no_plain_object(folder, text):
    (folder / "plan_config.json").write_text(text)
    refused(folder, "plan_config.json")


NO_WEIGHTS = {
    "NaN": lambda t: t * float("nan"),
    "infinity": lambda t: t / 0,
    "int": lambda t: t.int(),
    "bool": lambda t: t > 0,
    "complex": lambda t: t.to(torch.complex64),
    "float8": lambda t: t.to(torch.float8_e5m2),
    "nothing": lambda t: t[:0],
    "flat": lambda t: t.flatten()[:-1],
    "deeper": lambda t: t[None],
    "beyond float32": lambda t: t.double() + 1e300,
}


@pytest.mark.parametrize("part", WEIGHTS)
@pytest.mark.parametrize("wrong", NO_WEIGHTS)
def test_tensors_that_are_no_weights(folder, part, wrong):
    path = folder / WEIGHTS[part]
    save_file({name: NO_WEIGHTS[wrong](tensor).contiguous() for name, tensor in load_file(path).items()}, path)
    refused(folder)


@pytest.mark.parametrize(
    "values",
    [
        *({"r": r} for r in (3, "2", 2.0, True, 300_000)),
        *({name: True} for name in ("use_rslora", "use_dora", "lora_bias")),
        {"lora_alpha": 4},
        {"bias": "all"},
        {"peft_type": "IA3"},
        {"peft_type": None},
        {"rank_pattern": {"o_proj": 1}},
        {"alpha_pattern": {"o_proj": 64}},
        {"modules_to_save": ["lm_head"]},
        {"layer_replication": [[0, 1]]},
        {"init_lora_weights": "pissa"},
        {"trainable_token_indices": [1]},
        {"unknown": {"x": 1}},
    ],
)
def test_the_record_of_a_plan_that_would_make_it_something_else(folder, values):
    edit(folder / PLAN / "adapter_config.json", **values)
    refused(folder, PLAN)


@pytest.mark.parametrize(
    "name", [PLAN, CHOOSER, LORA, WEIGHTS[PLAN], f"{PLAN}/adapter_config.json", "plan_config.json"]
)
def test_links_out_of_the_folder(folder, tmp_path, name):
    shutil.move(folder / name, tmp_path / "outside")
    (folder / name).symlink_to(tmp_path / "outside")
    refused(folder, "outside")
    if name == LORA:
        given = get_peft_model(llama().model, LoraConfig(r=2, target_modules=["q_proj"]))
        with pytest.raises(CheckpointError, match="outside"):
            PlanModel.from_pretrained(folder, backbone=given)


@pytest.mark.parametrize("name", [CHOOSER, WEIGHTS[PLAN], WEIGHTS[LORA], f"{PLAN}/adapter_config.json"])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "loop", "nothing", "half"])
def test_what_stands_in_the_place_of_a_file(folder, name, kind):
    path = folder / name
    content = path.read_bytes()
    path.unlink()
    {
        "pipe": lambda: os.mkfifo(path),
        "device": lambda: path.symlink_to("/dev/zero"),
        "folder": path.mkdir,
        "loop": lambda: path.symlink_to(path.name),
        "nothing": path.touch,
        "half": lambda: path.write_bytes(content[: len(content) // 2]),
    }[kind]()
    refused(folder, path.name)


def test_the_engine_is_given_no_folder_that_a_link_leads_to(folder, tmp_path):
    pytest.importorskip("vllm")
    from latent_trl.plans.engine import plan_requests

    shutil.move(folder / PLAN, tmp_path / "outside")
    (folder / PLAN).symlink_to(tmp_path / "outside")
    with pytest.raises(CheckpointError, match="outside"):
        plan_requests(folder)
