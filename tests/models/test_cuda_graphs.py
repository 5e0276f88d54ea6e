"""
Replayed decoding steps against plain ones. Without a GPU a recording is stood in for by the function itself, run anew
on the recording's own input buffers: all but the device's part is then the real thing.
"""

from functools import partial

import pytest
import torch
from tiny_models import FAMILIES, latent
from transformers import DynamicCache

from latent_trl.generation import cuda_graphs
from latent_trl.generation import generate as generation
from latent_trl.generation import rollout_hook as rollout
from latent_trl.generation.choice import ActionChoice
from latent_trl.generation.cuda_graphs import CUDAGraphRecording, GraphedCall

SLOW = pytest.mark.slow
QUICK = ("llama", "llava", "qwen2_5_vl", "gpt2", "idefics3")


class StandIn:
    """A recording that runs its function when it is replayed, as a graph runs its kernels."""

    made: list["StandIn"] = []

    def __init__(self, function):
        self.function = function
        self.replays = 0
        StandIn.made.append(self)

    def replay(self):
        self.replays += 1
        return self.function()


@pytest.fixture
def stand_in(monkeypatch):
    """Recordings that need no GPU. Gives the list of those that were made."""
    StandIn.made = []
    monkeypatch.setattr(rollout, "GraphedCall", partial(GraphedCall, record=StandIn))
    monkeypatch.setattr(generation, "obstacle", lambda *args: None)
    return StandIn.made


def test_the_second_call_of_a_layout_is_recorded_and_later_ones_replayed():
    seen = []

    def function(x, scale, there=None):
        seen.append(x)
        return {"out": x * scale, "there": there}

    call, marker = GraphedCall(function, record=StandIn), object()
    inputs = [torch.full((2,), float(i)) for i in range(4)]
    outputs = [call(x, 3, there=marker) for x in inputs]
    assert [o["out"].tolist() for o in outputs] == [[0, 0], [3, 3], [6, 6], [9, 9]]
    assert all(o["there"] is marker for o in outputs)
    assert call.replays == 3
    assert seen[0] is inputs[0] and seen[1] is seen[2] is seen[3], "replays read the recording's own buffer"
    assert outputs[1]["out"] is not outputs[2]["out"], "an output outlives the next replay"


@pytest.mark.parametrize(
    "other", [(torch.zeros(3), 3), (torch.zeros(2, dtype=torch.long), 3), (torch.zeros(2), 4), (torch.zeros(2), None)]
)
def test_another_layout_is_run_as_it_is(other):
    call = GraphedCall(lambda x, scale: x + 1, record=StandIn)
    for _ in range(3):
        call(torch.zeros(2), 3)
    assert call.replays == 2
    torch.testing.assert_close(call(*other), other[0] + 1)
    assert call.replays == 2
    call(torch.zeros(2), 3)
    assert call.replays == 2, "its own first call is not replayed either"


def test_a_modules_forward_is_put_back():
    module = torch.nn.Linear(2, 2)
    with GraphedCall(module.forward, record=StandIn).instead_of_forward(module):
        assert isinstance(module.forward, GraphedCall)
    assert "forward" not in vars(module)
    own = module.forward = lambda x: x
    with pytest.raises(KeyError), GraphedCall(own).instead_of_forward(module):
        raise KeyError
    assert module.forward is own


def generate(model, inputs, seed=0, **options):
    torch.manual_seed(seed)
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "return_dict_in_generate": True}
    return model.generate(**inputs, output_context_states=True, **{**settings, **options})


def check_equal(ours, theirs, mask, tolerance=1e-5):
    assert torch.equal(ours.action_ids, theirs.action_ids)
    assert torch.equal(ours.sequences, theirs.sequences)
    torch.testing.assert_close(ours.action_log_probs, theirs.action_log_probs, atol=tolerance, rtol=tolerance)
    length = theirs.context_states.shape[1]
    shown = torch.cat([mask, mask.new_ones(len(mask), length)], dim=1)[:, :length].bool()
    torch.testing.assert_close(
        ours.context_states[shown], theirs.context_states[shown], atol=tolerance * 10, rtol=tolerance * 10
    )
    if theirs.position_ids is not None:
        assert torch.equal(ours.position_ids, theirs.position_ids)


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("family", [f if f in QUICK else pytest.param(f, marks=SLOW) for f in FAMILIES])
def test_replayed_steps_are_the_plain_ones(stand_in, family, copies):
    """Rows padded on the left, with images and without, one or several samples a prompt; codes, texts, states."""
    model, tiny = latent(family)
    layers = cuda_graphs.StaticCache(config=model.backbone_view.text_config, max_cache_len=1).layers
    if any(type(layer) is not cuda_graphs.StaticLayer for layer in layers) or not tiny.model._can_compile_fullgraph:
        pytest.skip("not for this family: see `obstacle`")
    for inputs in {id(i): i for i in (tiny.inputs, tiny.text_inputs)}.values():
        stand_in.clear()
        options = {"num_return_sequences": copies, "action_temperature": 1.3, "action_top_k": 8}
        ours = generate(model, inputs, cuda_graphs=True, **options)
        # Of 8 tokens one is of the prefill, and one the first of its layout; text model and policy.
        assert [recording.replays for recording in stand_in] == [6, 6]
        theirs = generate(model, inputs, cuda_graphs=False, **options)
        assert len(stand_in) == 2
        check_equal(ours, theirs, inputs["attention_mask"].repeat_interleave(copies, dim=0))
        assert len(ours.action_ids.unique()) > 2


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("family", ["llama", "qwen2_5_vl", "idefics3"])
def test_replayed_steps_without_padding(stand_in, family, copies):
    """transformers then leaves out the prefill's mask; a step's must still hide what the cache has no text for yet."""
    model, tiny = latent(family)
    inputs = {"input_ids": tiny.text_inputs["input_ids"][2:]}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    assert tiny.text_inputs["attention_mask"][2].all()
    found = [generate(model, inputs, cuda_graphs=on, num_return_sequences=copies) for on in (True, False)]
    check_equal(*found, inputs["attention_mask"].repeat_interleave(copies, dim=0))


def test_replayed_steps_with_eager_attention(stand_in):
    """The text model's mask is then one of numbers, and the policy, which keeps SDPA, gets its own."""
    model, tiny = latent("llama")
    tiny.model.set_attn_implementation("eager")
    ours, theirs = (generate(model, tiny.inputs, cuda_graphs=on) for on in (True, False))
    assert len(stand_in) == 2
    check_equal(ours, theirs, tiny.inputs["attention_mask"])


def test_replayed_steps_under_autocast(stand_in):
    """A float32 policy then has float32 keys, turned by positions, and bfloat16 values."""
    model, tiny = latent("qwen2_5_vl")
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (generate(model, tiny.inputs, cuda_graphs=on, num_return_sequences=2) for on in (True, False))
    assert len(stand_in) == 2
    check_equal(ours, theirs, tiny.inputs["attention_mask"].repeat_interleave(2, dim=0), tolerance=1e-2)


def test_bias_and_forced_codes_and_end_of_text_work_with_replays(stand_in):
    model, tiny = latent("llama")
    forced = torch.tensor([[1, -1, 3, -1, 5]] * 3)
    bias = torch.zeros(16)
    bias[7] = -torch.inf
    end = int(generate(model, tiny.inputs, cuda_graphs=False).sequences[0, -4])
    options = {"forced_action_ids": forced, "action_bias": bias, "min_new_tokens": 0, "eos_token_id": end}
    ours, theirs = (generate(model, tiny.inputs, cuda_graphs=on, max_new_tokens=20, **options) for on in (True, False))
    check_equal(ours, theirs, tiny.inputs["attention_mask"])
    assert (ours.action_ids[:, 0] == 1).all() and not (ours.action_ids == 7).any()


def test_the_default_leaves_short_texts_alone(stand_in):
    model, tiny = latent("llama")
    generate(model, tiny.inputs, max_new_tokens=15)
    assert not stand_in
    generate(model, tiny.inputs, max_new_tokens=16)
    assert len(stand_in) == 2
    stand_in.clear()
    generate(model, tiny.inputs, max_new_tokens=None, max_length=tiny.inputs["input_ids"].shape[1] + 16)
    assert len(stand_in) == 2


def test_what_stands_in_the_way_is_named():
    model, tiny = latent("llama")
    with pytest.raises(ValueError, match="`cuda_graphs=True` cannot be had: the model is on 'cpu'"):
        model.generate(**tiny.inputs, max_new_tokens=4, cuda_graphs=True)
    model.generate(**tiny.inputs, max_new_tokens=40)
    assert model.generation_config.cache_implementation is None


@pytest.mark.parametrize(
    "change, text",
    [
        ({"cache": DynamicCache()}, "leave out `past_key_values`"),
        ({"cache_implementation": "quantized"}, "`cache_implementation`"),
        ({"use_cache": False}, "`use_cache`"),
        ({"_can_compile_fullgraph": False}, "depends on values"),
        ({"hf_device_map": {"a": 0, "b": 1}}, "several devices"),
        ({"attention": "flash_attention_2"}, "attention 'flash_attention_2' is not one of"),
        ({"sliding_window": 4, "layer_types": ["sliding_attention"] * 3}, "the whole text"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_obstacles(monkeypatch, change, text):
    model, tiny = latent("llama")
    backbone, config = tiny.model, model.backbone_view.text_config
    configs = [config, model.policy.decoder_stack.decoder.config]
    monkeypatch.setattr(type(backbone), "device", torch.device("cuda"))
    arguments = {"cache": None, "cache_implementation": None, "use_cache": True}
    assert cuda_graphs.obstacle(backbone, configs, **arguments) is None
    for name, value in change.items():
        if name in arguments:
            arguments[name] = value
        elif name == "attention":
            monkeypatch.setattr(model.get_decoder().config, "_attn_implementation_internal", value)
        elif name in ("sliding_window", "layer_types"):
            # Of the policy alone; the backbone's are as good a reason.
            monkeypatch.setattr(configs[1], name, value[:2] if name == "layer_types" else value, raising=False)
        else:
            monkeypatch.setattr(backbone, name, value, raising=False)
    assert text in cuda_graphs.obstacle(backbone, configs, **arguments)


def test_codes_are_drawn_as_torch_draws_them():
    probs = torch.rand(64, 16, generator=torch.Generator().manual_seed(1)).softmax(dim=-1)
    own = ActionChoice(generator=torch.Generator().manual_seed(2))._draw(probs)
    assert torch.equal(own, torch.multinomial(probs, 1, generator=torch.Generator().manual_seed(2))[:, 0])
    torch.manual_seed(3)
    own = ActionChoice()._draw(probs)
    torch.manual_seed(3)
    assert torch.equal(own, torch.multinomial(probs, 1)[:, 0])


def test_probabilities_that_are_not_finite_are_an_error():
    model, tiny = latent("llama")
    with torch.no_grad():
        model.policy.head.weight[3] = torch.nan
    with pytest.raises(FloatingPointError, match="No code could be drawn"):
        model.generate(**tiny.inputs, max_new_tokens=4)


@pytest.mark.gpu
@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_replayed_steps_on_a_gpu_are_the_plain_ones(monkeypatch, family, copies):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    model, tiny = latent(family)
    model.to("cuda")
    made = []
    monkeypatch.setattr(
        rollout, "GraphedCall", partial(GraphedCall, record=lambda f: made.append(1) or CUDAGraphRecording(f))
    )
    config = model.backbone_view.text_config
    policy_config = model.policy.decoder_stack.decoder.config
    trouble = cuda_graphs.obstacle(tiny.model, [config, policy_config], None, None, True)
    for inputs in {id(i): i for i in (tiny.inputs, tiny.text_inputs)}.values():
        made.clear()
        inputs = {k: v.to("cuda") for k, v in inputs.items()}
        options = {"num_return_sequences": copies, "max_new_tokens": 20, "min_new_tokens": 20}
        ours = generate(model, inputs, **options)
        assert len(made) == (0 if trouble else 2), trouble
        # Kernels differ with the length of the cache, so that now and then a draw or a token may: the codes are forced.
        theirs = generate(model, inputs, cuda_graphs=False, forced_action_ids=ours.action_ids, **options)
        check_equal(ours, theirs, inputs["attention_mask"].repeat_interleave(copies, dim=0), tolerance=1e-3)


@pytest.mark.gpu
def test_the_gpu_draws_codes_as_torch_draws_them():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05], device="cuda").repeat(100_000, 1)
    torch.manual_seed(3)
    shares = torch.bincount(ActionChoice()._draw(probs), minlength=4) / len(probs)
    # Five standard errors of the largest share.
    torch.testing.assert_close(shares, probs[0], atol=5 * (0.25 / len(probs)) ** 0.5, rtol=0)
