"""One cache, and nothing that makes the device wait for the host at each token."""

import pytest
import torch
from tiny_models import latent
from transformers import Cache

WAITS = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy", "nonzero")


@pytest.fixture(scope="module")
def perturbed():
    return latent("llava")


def test_one_cache_holds_backbone_and_policy(perturbed):
    model, tiny = perturbed
    for options in ({}, {"cache_implementation": "static"}):
        out = model.generate(**tiny.inputs, max_new_tokens=5, min_new_tokens=5, return_dict_in_generate=True, **options)
        cache = out.past_key_values
        assert isinstance(cache, Cache)
        assert len(cache.layers) == 3 + 2
        length = tiny.inputs["input_ids"].shape[1] + 4
        assert {int(cache.get_seq_length(i)) for i in range(5)} == {length}
        cache.reorder_cache(torch.tensor([2, 0, 1]))


def test_no_cache_is_kept_where_none_is_wanted(perturbed):
    model, tiny = perturbed
    out = model.generate(**tiny.inputs, max_new_tokens=3, use_cache=False, return_dict_in_generate=True)
    assert out.past_key_values is None


@pytest.mark.parametrize("padded", [False, True])
def test_the_host_does_not_wait_for_the_device_at_each_token(perturbed, monkeypatch, padded):
    """Counts the calls that read a tensor's value on the host, for 4 and for 14 tokens, against the backbone's own."""
    model, tiny = perturbed
    inputs = tiny.text_inputs if padded else {"input_ids": tiny.text_inputs["input_ids"][2:]}
    rows = len(inputs["input_ids"])
    counts = {"n": 0}
    for name in WAITS:
        original = getattr(torch.Tensor, name)

        def counting(self, *args, _original=original, **kwargs):
            counts["n"] += 1
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counting)

    def waits(generate, **options):
        """Of ten tokens."""
        found = []
        for length in (4, 14):
            counts["n"] = 0
            generate(**inputs, max_new_tokens=length, min_new_tokens=length, **options)
            found.append(counts["n"])
        return found[1] - found[0]

    stock = waits(tiny.model.generate, do_sample=False)
    assert stock >= 10, "the count must see the backbone's own test for the end of the text"
    # transformers looks for padding whenever it makes a mask for SDPA: once for the backbone, once for the policy.
    # Once in four tokens the host looks which rows have ended.
    allowed = stock + (10 if padded else 0) + 3
    assert waits(model.generate) <= allowed
    assert waits(model.generate, action_top_k=4, action_top_p=0.9) <= allowed
    assert waits(model.generate, action_bias=torch.zeros(16)) <= allowed
    assert waits(model.generate, forced_action_ids=torch.zeros(rows, 14, dtype=torch.long)) <= allowed
    assert waits(model.generate, output_context_states=True) <= allowed
    together = {"num_return_sequences": 4, "action_sampling": "arithmetic"}
    assert waits(model.generate, **together) <= allowed


def test_prompt_states_pass_the_policy_once(perturbed):
    model, tiny = perturbed
    seen = []
    handle = model.policy.register_forward_hook(lambda m, args, output: seen.append(args[0].shape[1]))
    model.generate(**tiny.inputs, max_new_tokens=5, min_new_tokens=5)
    handle.remove()
    assert seen == [tiny.inputs["input_ids"].shape[1], 1, 1, 1, 1]


def test_the_head_reads_one_position_a_token(perturbed):
    model, tiny = perturbed
    seen = []
    handle = model.get_output_embeddings().register_forward_hook(lambda m, args, out: seen.append(args[0].shape[1]))
    model.generate(**tiny.inputs, max_new_tokens=5, min_new_tokens=5)
    handle.remove()
    assert seen == [1] * 5
