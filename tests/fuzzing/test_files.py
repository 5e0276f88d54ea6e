"""Files whose bytes were changed are refused as damaged, or hold exactly what is loaded from them."""

import json
import random

import pytest
import torch
from cases import cases
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load as load_tensors
from tiny_models import latent

from latent_trl.checkpoint.files import CheckpointError, read_config, read_json, read_tensors
from latent_trl.models.codebook import Codebook
from latent_trl.models.inverse_dynamics import InverseDynamicsModel
from latent_trl.trainer.run.manifest import MANIFEST_FILE, checkpoint_fault, write_manifest


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    latent("llava")[0].save_pretrained(folder)
    write_manifest(folder)
    return folder


def changed(data: bytes, seed: int, kind: str) -> bytes:
    """A file with some of its bytes turned over, cut off, put in, or moved; near the beginning more often."""
    generator = random.Random(seed)
    size = len(data) if generator.random() < 0.3 else min(len(data), 400)
    at, count = generator.randrange(size), generator.choice([1, 1, 2, 8, 200])
    if kind == "flip":
        out = bytearray(data)
        for _ in range(count):
            out[generator.randrange(size)] ^= 1 << generator.randrange(8)
        return bytes(out)
    if kind == "digit":
        out = bytearray(data)
        digits = [i for i, byte in enumerate(data[:size]) if 48 <= byte < 58]
        for i in generator.choices(digits, k=min(count, 4)) if digits else []:
            out[i] = generator.choice(b"0123456789-.eE")
        return bytes(out)
    return {
        "cut": data[:at],
        "remove": data[:at] + data[at + count :],
        "insert": data[:at] + generator.randbytes(count) + data[at:],
        "repeat": data[:at] + data[max(0, at - count) : at] + data[at:],
        "swap": data[at:] + data[:at],
    }[kind]


KINDS = st.sampled_from(["flip", "digit", "cut", "remove", "insert", "repeat", "swap"])
SEEDS = st.integers(0, 2**32)


@cases(120)
@given(st.sampled_from([Codebook, InverseDynamicsModel]), st.booleans(), KINDS, SEEDS)
def test_a_component_is_refused_or_loaded_exactly(checkpoint, tmp_path_factory, cls, weights, kind, seed):
    name = "model.safetensors" if weights else "config.json"
    source, folder = checkpoint / cls.folder_name, tmp_path_factory.mktemp("changed")
    for path in source.iterdir():
        data = path.read_bytes()
        (folder / path.name).write_bytes(changed(data, seed, kind) if path.name == name else data)
    try:
        component = cls.from_pretrained(folder)
    except CheckpointError as error:
        assert str(folder) in str(error) or "tensor" in str(error) or "holds" in str(error)
        return
    on_disk = load_tensors((folder / "model.safetensors").read_bytes())
    own = component.state_dict()
    assert own.keys() == on_disk.keys()
    for tensor_name, tensor in on_disk.items():
        assert tensor.shape == own[tensor_name].shape
        # Bits, so that NaN is equal to itself.
        same = tensor.to(own[tensor_name].dtype)
        assert torch.equal(same.nan_to_num(1.5), own[tensor_name].nan_to_num(1.5))
    assert json.loads((folder / "config.json").read_text())["component"] == cls.__name__


@cases(120)
@given(KINDS, SEEDS)
def test_the_record_of_a_model_is_refused_or_read(checkpoint, tmp_path_factory, kind, seed):
    folder = tmp_path_factory.mktemp("changed")
    data = (checkpoint / "latent_action_config.json").read_bytes()
    (folder / "latent_action_config.json").write_bytes(changed(data, seed, kind))
    try:
        config, names = read_config(folder)
    except CheckpointError:
        return
    assert isinstance(names, list) and config.text_config is not None


@cases(120)
@given(st.binary(max_size=200) | st.text(max_size=60).map(str.encode))
@example(b"[" * 100_000)
@example(b'{"a": NaN}')
def test_any_bytes_are_json_or_not(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("json") / "some.json"
    path.write_bytes(data)
    try:
        assert isinstance(read_json(path), dict)
    except CheckpointError:
        pass
    path.write_bytes(data)
    try:
        assert all(isinstance(tensor, torch.Tensor) for tensor in read_tensors(path).values())
    except CheckpointError:
        pass


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 10**6) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@cases(120)
@given(st.none() | JSON | st.dictionaries(st.just("files"), JSON, min_size=1), KINDS, SEEDS)
def test_a_list_of_files_that_was_changed_is_a_fault_and_no_error(checkpoint, tmp_path_factory, value, kind, seed):
    folder = tmp_path_factory.mktemp("changed")
    (folder / "some.bin").write_bytes(bytes(range(100)))
    write_manifest(folder)
    data = (folder / MANIFEST_FILE).read_bytes()
    new = changed(data, seed, kind) if value is None else json.dumps(value).encode()
    (folder / MANIFEST_FILE).write_bytes(new)
    fault = checkpoint_fault(folder)
    assert fault is None or isinstance(fault, str)
    try:
        described = json.loads(new)["files"]
    except (ValueError, TypeError, KeyError):
        described = None
    if described != json.loads(data)["files"]:
        assert fault is not None
