"""What a file may hold: finite floats of the shapes that its configuration says, found before memory is taken."""

import json
import os
import resource
import time

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tiny_models import latent

from latent_trl import CheckpointError, Codebook, LatentActionModel, LatentActionPolicy
from latent_trl.checkpoint import files
from latent_trl.checkpoint.configuration import check_counts
from latent_trl.checkpoint.peft_record import plain_fields
from latent_trl.commands.main import main as command_line
from latent_trl.hub.pull import inspect
from latent_trl.models.checkpoint import load_backbone


@pytest.fixture(scope="module")
def model():
    return latent("llava")[0]


@pytest.fixture
def saved(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(scope="module")
def adapted_files(tmp_path_factory):
    model, _ = latent("llava")
    torch.manual_seed(3)
    model.add_adapter(LoraConfig(r=4, lora_alpha=8, init_lora_weights=False))
    folder = tmp_path_factory.mktemp("adapted")
    model.save_pretrained(folder)
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def adapted(adapted_files, tmp_path):
    for name, content in adapted_files.items():
        (tmp_path / "model" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "model" / name).write_bytes(content)
    return tmp_path / "model"


def edit(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change(path, function):
    save_file({name: function(tensor).contiguous() for name, tensor in load_file(path).items()}, path)


@pytest.fixture
def cheap():
    """The block takes little time and memory."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000
    assert time.monotonic() - start < 30


WRONG = {
    "NaN": lambda t: t.fill_(float("nan")),
    "infinity": lambda t: torch.where(torch.arange(t.numel()).view(t.shape) == 3, torch.inf, t),
    "bool": lambda t: t > 0,
    "int": lambda t: (t * 9).long(),
    "complex": lambda t: t.to(torch.complex64),
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "nothing": lambda t: t[:0],
}


@pytest.mark.parametrize("wrong", WRONG)
def test_tensors_that_are_no_weights(saved, model, wrong):
    change(saved / "codebook" / "model.safetensors", WRONG[wrong])
    for load in (Codebook.from_pretrained, lambda f: LatentActionModel.from_pretrained(f, backbone=model.backbone)):
        with pytest.raises(CheckpointError, match="infinite or NaN|is of dtype|no elements"):
            load(saved)


def test_an_adapter_of_nan(adapted):
    change(adapted / "adapter" / "adapter_model.safetensors", WRONG["NaN"])
    with pytest.raises(CheckpointError, match="infinite or NaN"):
        LatentActionModel.from_pretrained(adapted, backbone=latent("llava")[0].backbone)


@pytest.mark.parametrize(
    "text, said",
    [
        ({"vocab_size": 3_000_000_000}, "`vocab_size` must be 1"),
        ({"num_hidden_layers": 9_000}, "9,000 layers cannot have"),
        ({"num_hidden_layers": 20_000}, "`num_hidden_layers` must be at most 10,000"),
        ({"num_hidden_layers": 10**10}, "`num_hidden_layers` must be at most 10,000"),
        ({"intermediate_size": 1 << 40}, "shape|cannot be used"),
        ({"num_labels": 10**9}, "`num_labels` must be at most 10,000"),
        ({"model_type": "qwen2_moe", "num_experts": 10**9}, "`num_experts` must be at most 20,000"),
        ({"part": {"num_labels": 10**9}}, "`num_labels` must be at most 10,000"),
    ],
)
def test_a_component_that_asks_for_more_than_its_file_has(saved, cheap, text, said):
    path = saved / "policy" / "config.json"
    config = json.loads(path.read_text())
    edit(path, text_config={**config["text_config"], **text})
    with pytest.raises(CheckpointError, match=said):
        LatentActionPolicy.from_pretrained(saved)


def test_a_record_with_more_layers_than_any_model_has(saved, model, cheap):
    path = saved / "latent_action_config.json"
    config = json.loads(path.read_text())
    text_config = {**config["text_config"], "num_hidden_layers": 10**10}
    for values, name in (({"text_config": text_config}, "num_hidden_layers"), ({"num_labels": 10**9}, "num_labels")):
        path.write_text(json.dumps({**config, **values}))
        with pytest.raises(CheckpointError, match=f"`{name}` must be at most 10,000"):
            LatentActionModel.from_pretrained(saved, backbone=model.backbone)


def test_what_is_counted_in_other_units_has_no_such_limit():
    """As large as families of transformers have them."""
    counts = {
        "vocab_size_per_layer_input": 262_144,
        "moe_shared_expert_intermediate_size": 30_000,
        "n_positions": 10**6,
    }
    check_counts({"label2id": {"headland": 20_000}})
    check_counts({**counts, "num_experts": 16_384, "head_dim": 16_384, "max_position_embeddings": 10**7})


@pytest.mark.parametrize("values", [{"num_labels": 10**9}, {"num_hidden_layers": 10**9}])
def test_the_configuration_of_a_backbone_is_looked_at_before_it_is_made(tmp_path, values, cheap):
    latent("llava")[0].backbone.config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    edit(tmp_path / "config.json", **values, text_config={**config["text_config"], **values})
    with pytest.raises(ValueError, match="must be at most 10,000"):
        load_backbone(str(tmp_path))
    assert command_line(["plan", str(tmp_path)]) == 1


@pytest.mark.parametrize(
    "part, values",
    [
        ("projector", {"residual": 1}),
        ("projector", {"residual": "no"}),
        ("projector", {"residual": None}),
        ("codebook", {"num_codes": 16.0}),
        ("codebook", {"hidden_size": "32"}),
        ("world_model", {"intermediate_size": True}),
        ("world_model", {"read_out": ["residual"]}),
        ("policy", {"hidden_size": 32.0}),
    ],
)
def test_values_of_a_component_are_of_their_types(saved, model, part, values):
    edit(saved / part / "config.json", **values)
    with pytest.raises(CheckpointError, match=f"`{next(iter(values))}` must be of type"):
        LatentActionModel.from_pretrained(saved, backbone=model.backbone)


@pytest.mark.parametrize("name", ["codebook/config.json", "latent_action_config.json"])
def test_a_key_that_is_there_twice(saved, model, name):
    text = (saved / name).read_text().rstrip()
    (saved / name).write_text(text[:-1] + ', "num_codes": 16}')
    with pytest.raises(CheckpointError, match="'num_codes' is there twice"):
        LatentActionModel.from_pretrained(saved, backbone=model.backbone)


def test_values_that_a_dtype_cannot_hold(saved, adapted):
    path = saved / "codebook" / "model.safetensors"
    change(path, lambda t: t.double() + 1e30)
    assert Codebook.from_pretrained(saved, dtype=torch.float32).weight.isfinite().all()
    with pytest.raises(CheckpointError, match="has values that torch.float16 cannot hold"):
        Codebook.from_pretrained(saved, dtype=torch.float16)
    change(adapted / "adapter" / "adapter_model.safetensors", lambda t: t.double() + 1e300)
    backbone = latent("llava")[0].backbone
    before = list(dict(backbone.named_parameters()))
    with pytest.raises(CheckpointError, match="has values that torch.float32 cannot hold"):
        LatentActionModel.from_pretrained(adapted, backbone=backbone)
    assert list(dict(backbone.named_parameters())) == before


def test_tables_that_are_in_no_file(saved, cheap):
    """GPT-2's masks are as large as the square of its positions, and are saved nowhere."""
    from transformers import GPT2Config

    gpt = GPT2Config(vocab_size=1, n_embd=32, n_layer=1, n_head=2, n_positions=16, eos_token_id=None, bos_token_id=None)
    LatentActionPolicy(gpt, 32, 16).save_pretrained(saved / "policy")
    LatentActionPolicy.from_pretrained(saved / "policy")
    path = saved / "policy" / "config.json"
    config = json.loads(path.read_text())
    edit(path, text_config={**config["text_config"], "n_positions": 10**6})
    with pytest.raises(CheckpointError):
        LatentActionPolicy.from_pretrained(saved / "policy")


def test_more_tensors_than_any_model_has(saved, cheap, monkeypatch):
    monkeypatch.setattr(files, "MAX_HEADER_BYTES", 10_000)
    save_file({f"t{i}": torch.zeros(1) for i in range(2_000)}, saved / "codebook" / "model.safetensors")
    for look in (Codebook.from_pretrained, inspect):
        with pytest.raises(CheckpointError, match="lists tensors in .* bytes, at most 10,000"):
            look(saved)


@pytest.mark.parametrize("name", ["codebook/model.safetensors", "codebook/config.json", "latent_action_config.json"])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(saved, model, name, cheap):
    (saved / name).unlink()
    os.mkfifo(saved / name)
    with pytest.raises(CheckpointError, match="missing"):
        LatentActionModel.from_pretrained(saved, backbone=model.backbone)
    try:
        inspect(saved)
    except CheckpointError:
        pass


def test_integers_of_five_thousand_digits(saved, model):
    path = saved / "codebook" / "config.json"
    path.write_text(path.read_text().replace('"num_codes": 16', f'"num_codes": {"9" * 5000}'))
    with pytest.raises(CheckpointError, match="is not JSON"):
        LatentActionModel.from_pretrained(saved, backbone=model.backbone)


BASES = ["/nowhere/at/all", "./nowhere", "~/nowhere", "a b", "../x", "x" * 500, "a/b/c", "é/ü"]


@pytest.mark.parametrize("base", BASES)
def test_a_base_model_that_is_no_folder_and_no_id(saved, base):
    edit(saved / "latent_action_config.json", base_model_name_or_path=base)
    with pytest.raises(CheckpointError, match="The base model .* is no"):
        LatentActionModel.from_pretrained(saved)


def test_a_field_of_tomorrow_loads_the_file_of_today(tmp_path):
    class Tomorrow(Codebook):
        config_keys = ("num_codes", "hidden_size", "shape")

        def __init__(self, num_codes, hidden_size, shape="round"):
            super().__init__(num_codes, hidden_size)
            self.shape = shape

    Tomorrow.__name__ = "Codebook"
    Codebook(4, 8).save_pretrained(tmp_path)
    assert Tomorrow.from_pretrained(tmp_path).shape == "round"
    Tomorrow(4, 8, "square").save_pretrained(tmp_path)
    assert Tomorrow.from_pretrained(tmp_path).shape == "square"
    with pytest.raises(CheckpointError, match="expected the keys"):
        Codebook.from_pretrained(tmp_path)


@pytest.mark.parametrize("part", ["adapter", "codebook"])
def test_a_folder_that_is_a_link_out(adapted, tmp_path, part):
    (adapted / part).rename(tmp_path / "outside")
    (adapted / part).symlink_to(tmp_path / "outside")
    for look in (lambda f: LatentActionModel.from_pretrained(f, backbone=latent("llava")[0].backbone), inspect):
        with pytest.raises(CheckpointError, match="outside"):
            look(adapted)


@pytest.mark.parametrize(
    "values, said",
    [
        ({"r": 300_000}, "rank 300000 is not from 1 to 4096"),
        ({"r": -1}, "rank -1"),
        ({"r": "4"}, "`r` has '4'"),
        ({"r": True}, "`r` has True"),
        ({"rank_pattern": {"(a+)+$": 4}}, "is not a plain name"),
        ({"rank_pattern": {"q_proj": 300_000}}, "rank 300000"),
        ({"alpha_pattern": {"q_proj": "x"}}, "must hold numbers"),
        ({"init_lora_weights": "pissa"}, "`init_lora_weights='pissa'` belongs to a backbone"),
        ({"init_lora_weights": "olora"}, "belongs to a backbone"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "belongs to a backbone"),
        ({"layer_replication": [[0, 9]]}, "are no plain fields"),
        ({"megatron_config": {"a": 1}}, "are no plain fields"),
        ({"peft_type": "PROMPT_TUNING"}, "must be 'LORA' or one of"),
        ({"peft_type": "LOHA"}, "are no fields of LoHaConfig"),
        ({"trainable_token_indices": ["x"]}, "must hold token ids"),
        ({"peft_type": None}, "must be 'LORA'"),
        ({"modules_to_save": ["(a|a)*b"]}, "is not a plain name"),
        ({"modules_to_save": ["lm_head"]}, "do not fit"),
        ({"bias": "all"}, "do not fit|cannot be used"),
        ({"use_dora": True}, "do not fit"),
    ],
)
def test_an_adapter_with_fields_that_are_not_plain(adapted, values, said, cheap):
    backbone = latent("llava")[0].backbone.requires_grad_(True)
    before = {name: (t.detach().clone(), t.requires_grad) for name, t in backbone.named_parameters()}
    edit(adapted / "adapter" / "adapter_config.json", **values)
    with pytest.raises(CheckpointError, match=said):
        LatentActionModel.from_pretrained(adapted, backbone=backbone)
    after = dict(backbone.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n], t) and after[n].requires_grad == grad for n, (t, grad) in before.items())


@pytest.mark.parametrize(
    "values",
    [{"target_modules": r"(a|.*)*x?.*proj"}, {"target_modules": ["."]}, {"exclude_modules": "(.*)*vision"}, {}],
)
def test_the_layers_of_an_adapter_are_those_of_its_tensors(adapted, values, cheap):
    """No expression of the file is matched."""
    whole = LatentActionModel.from_pretrained(adapted, backbone=latent("llava")[0].backbone)
    edit(adapted / "adapter" / "adapter_config.json", **values)
    loaded = LatentActionModel.from_pretrained(adapted, backbone=latent("llava")[0].backbone)
    wanted = dict(whole.backbone.named_parameters())
    assert {n for n, _ in loaded.backbone.named_parameters()} == wanted.keys()
    assert all(torch.equal(p, wanted[name]) for name, p in loaded.backbone.named_parameters())


def test_an_adapter_of_wide_tensors_is_compared_before_layers_are_made(adapted, cheap):
    path = adapted / "adapter" / "adapter_model.safetensors"
    change(path, lambda t: torch.zeros(4096, 1) if t.shape[0] == 4 else t)
    edit(adapted / "adapter" / "adapter_config.json", r=4096)
    with pytest.raises(CheckpointError, match="has shape .4096, 1., where the layer has size"):
        LatentActionModel.from_pretrained(adapted, backbone=latent("llava")[0].backbone)


def test_an_odd_adapter_record(adapted):
    for content in ("[]", "{}", '"x"', '{"peft_type": "LORA"}', '{"peft_type": ["LORA"], "r": {}}'):
        (adapted / "adapter" / "adapter_config.json").write_text(content)
        with pytest.raises(CheckpointError):
            LatentActionModel.from_pretrained(adapted, backbone=latent("llava")[0].backbone)


@pytest.mark.parametrize(
    "record, said",
    [
        ({"target_modules": "(a|.*)*proj"}, "`target_modules` has .* cannot be used"),
        ({"target_modules": "q_proj"}, "must be a list of names"),
        ({"r": 300_000}, "`r` has 300000"),
        ({"rank_pattern": {"(a+)+$": 4}}, "`rank_pattern` has"),
        ({"target_modules": ["q_proj"] * 200_000}, "`target_modules` has"),
    ],
)
def test_records_of_other_adapters_hold_plain_values_alone(record, said, tmp_path):
    from peft import LoHaConfig

    plain = {"peft_type": "LOHA", "r": 4, "target_modules": ["q_proj"]}
    assert plain_fields(plain, LoHaConfig, tmp_path) == {"r": 4, "target_modules": ["q_proj"]}
    with pytest.raises(CheckpointError, match=said):
        plain_fields({**plain, **record}, LoHaConfig, tmp_path)
