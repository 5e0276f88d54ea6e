"""Calls of several threads on one model give what they give one after the other; a model can be copied."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny_models import latent
from transformers.generation.streamers import BaseStreamer

THREADS = 4


@pytest.fixture(scope="module", params=["llava", "qwen2_5_vl"])
def perturbed(request):
    return latent(request.param)


def run(model, inputs, seed: int, **options):
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "return_dict_in_generate": True}
    generator = torch.Generator().manual_seed(seed)
    return model.generate(**inputs, action_generator=generator, **settings, **options)


def same(one, other) -> bool:
    return torch.equal(one.sequences, other.sequences) and torch.equal(one.action_log_probs, other.action_log_probs)


class Pause(BaseStreamer):
    """Gives other threads their turn at each token."""

    def put(self, value):
        threading.Event().wait(0.005)

    def end(self):
        pass


def in_threads(function, count: int = THREADS):
    """Results of `function(i)`, all begun at once."""
    barrier = threading.Barrier(count)

    def begin(i):
        barrier.wait()
        return function(i)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(begin, range(count)))


def inputs_of(tiny, i):
    """Of two shapes, with images and without."""
    return tiny.inputs if i % 2 else {k: v[:2] for k, v in tiny.text_inputs.items()}


@pytest.mark.parametrize("options", [{}, {"num_return_sequences": 3, "action_sampling": "arithmetic"}], ids=str)
def test_threads_that_generate_at_once_get_what_they_get_alone(perturbed, options):
    model, tiny = perturbed
    wanted = [run(model, inputs_of(tiny, i), seed=i, **options) for i in range(THREADS)]

    def generate(i):
        row = {"streamer": Pause()} if not options and i == 0 else {}
        inputs = {k: v[:1] for k, v in inputs_of(tiny, i).items()} if row else inputs_of(tiny, i)
        return run(model, inputs, seed=i, **row, **options)

    if not options:
        wanted[0] = run(model, {k: v[:1] for k, v in inputs_of(tiny, 0).items()}, seed=0)
    for _ in range(3):
        found = in_threads(generate)
        assert all(same(one, other) for one, other in zip(found, wanted, strict=True))
    assert not model.get_decoder()._forward_hooks and not model.backbone.base_model._forward_pre_hooks


@torch.no_grad()
def test_a_pass_beside_a_thread_that_generates_gets_its_own_states(perturbed):
    model, tiny = perturbed
    wanted = run(model, tiny.inputs, seed=0)
    states, _ = model.encode(**tiny.text_inputs)

    def either(i):
        if i % 2:
            return [model.encode(**tiny.text_inputs)[0] for _ in range(5)]
        return run(model, tiny.inputs, seed=0)

    found = in_threads(either)
    assert all(same(out, wanted) for out in found[::2])
    assert all(torch.equal(other, states) for outs in found[1::2] for other in outs)


def test_what_generate_calls_cannot_call_the_model(perturbed):
    model, tiny = perturbed
    inputs = {"input_ids": tiny.text_inputs["input_ids"][2:]}
    wanted = run(model, inputs, seed=0)

    class Calls(Pause):
        def put(self, value):
            model.encode(inputs["input_ids"])

    with pytest.raises(RuntimeError, match="called while it generates"):
        run(model, inputs, seed=0, streamer=Calls())
    assert same(run(model, inputs, seed=0), wanted)


def test_a_model_can_be_copied_before_and_after_it_generates(perturbed):
    model, tiny = perturbed
    wanted = run(model, tiny.inputs, seed=0)
    copied = copy.deepcopy(model)
    assert same(run(copied, tiny.inputs, seed=0), wanted)
    assert copied.backbone_view.model is copied.backbone and copied.backbone is not model.backbone
    # The copy stands alone: what changes it leaves the other as it is.
    with torch.no_grad():
        copied.policy.head.weight.zero_()
    assert same(run(model, tiny.inputs, seed=0), wanted)
    assert not same(run(copy.deepcopy(copied), tiny.inputs, seed=0), wanted)
