"""An empty or sharded tensor is never written: whole ones are given, or saving is refused and leaves what was there."""

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from tiny_models import latent, latent_config

NAMES = ("policy.head.weight", "codebook.weight")


@pytest.fixture
def model():
    model, _ = latent("llama", latent_config(use_projector=False))
    model.tuned_backbone_tensors = ["model.norm.weight"]
    return model


@pytest.fixture
def adapted():
    model, _ = latent("llama", latent_config(use_projector=False))
    model.add_adapter(LoraConfig(r=2, init_lora_weights=False))
    return model


def gathered(model):
    """What `accelerator.get_state_dict` gives: other values than the model has, to tell them apart."""
    return {name: torch.full_like(tensor, 7.0) for name, tensor in model.state_dict().items()}


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def empty(model):
    """As ZeRO-3 leaves parameters on a process."""
    for parameter in model.parameters():
        parameter.data = torch.empty(0)


@pytest.mark.parametrize("kind", ["model", "adapted"])
def test_whole_tensors_are_written_though_the_own_ones_are_empty(kind, tmp_path, request):
    model = request.getfixturevalue(kind)
    whole = gathered(model)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    empty(model)
    model.save_pretrained(tmp_path, state_dict=whole)
    written = [path for path in tmp_path.rglob("*.safetensors")]
    assert len(written) == 5
    for path in written:
        for name, tensor in load_file(path).items():
            assert (tensor == 7.0).all() and tensor.numel() > 0, (path, name)
    assert (
        tuple(load_file(tmp_path / "policy" / "model.safetensors")["head.weight"].shape) == shapes["policy.head.weight"]
    )


@pytest.mark.parametrize("kind", ["model", "adapted"])
def test_empty_tensors_without_whole_ones_are_refused(kind, tmp_path, request):
    model = request.getfixturevalue(kind)
    model.save_pretrained(tmp_path)
    before = files(tmp_path)
    empty(model)
    with pytest.raises(ValueError, match="is empty. Pass `state_dict` with whole tensors"):
        model.save_pretrained(tmp_path)
    assert files(tmp_path) == before


WRONG = {"missing": lambda t: None, "empty": lambda t: t[:0], "shape": lambda t: t[:1]}
# Whether a backbone's tensor has the base model's shape is known when it is loaded.
NORM = "backbone.model.norm.weight"
PAIRS = [(name, said) for name in NAMES for said in WRONG] + [(NORM, "missing"), (NORM, "empty")]


@pytest.mark.parametrize("name, said", PAIRS)
def test_a_state_dict_that_is_not_whole_is_refused(model, name, said, tmp_path):
    model.save_pretrained(tmp_path)
    before, whole = files(tmp_path), gathered(model)
    part = WRONG[said](whole.pop(name))
    if part is not None:
        whole[name] = part
    with pytest.raises(ValueError, match=said):
        model.save_pretrained(tmp_path, state_dict=whole)
    assert files(tmp_path) == before


def test_a_part_of_the_adapter_that_is_missing_is_refused(adapted, tmp_path):
    whole = gathered(adapted)
    whole.pop(next(name for name in whole if "lora_B" in name))
    with pytest.raises(ValueError, match="of the adapter is missing"):
        adapted.save_pretrained(tmp_path, state_dict=whole)


def test_a_sharded_tensor_is_refused(model, tmp_path):
    """One process with a mesh of its own is enough for a DTensor."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    if not dist.is_available() or dist.is_initialized():
        pytest.skip("Processes are set up already, or cannot be.")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        whole = gathered(model)
        whole["codebook.weight"] = distribute_tensor(whole["codebook.weight"], mesh, [Shard(0)])
        with pytest.raises(ValueError, match="'weight' of the codebook is sharded"):
            model.save_pretrained(tmp_path / "model", state_dict=whole)
    finally:
        dist.destroy_process_group()
