"""An untrained head leaves the backbone's own greedy text as it is."""

import pytest
import torch
from tiny_models import latent, latent_config

LENGTH = 12


def stock(model, tiny, inputs, **options):
    """The backbone's own greedy text, with the same ban of vision placeholders."""
    banned = model.config.vision_token_ids or None
    return tiny.model.generate(
        **inputs, max_new_tokens=LENGTH, min_new_tokens=LENGTH, do_sample=False, suppress_tokens=banned, **options
    )


@pytest.fixture(scope="module", params=["llava", "qwen2_5_vl", "llama"])
def fresh(request):
    return latent(request.param, perturbed=False)


@pytest.mark.parametrize("kind", ["inputs", "text_inputs"])
def test_untrained_head_generates_the_backbones_greedy_text(fresh, kind):
    model, tiny = fresh
    inputs = getattr(tiny, kind)
    assert (inputs["attention_mask"] == 0).any(), "the batch must have padding"
    got = model.generate(**inputs, max_new_tokens=LENGTH, min_new_tokens=LENGTH)
    want = stock(model, tiny, inputs)
    assert torch.equal(got, want)
    assert len(want[:, inputs["input_ids"].shape[1] :].unique()) > 8


def test_parity_holds_row_by_row_without_padding(fresh):
    model, tiny = fresh
    if "pixel_values" in tiny.inputs:
        _, tiny = latent(tiny.model.config.model_type, perturbed=False, images=(1,))
    row = {name: value[:1] if name in ("input_ids", "attention_mask") else value for name, value in tiny.inputs.items()}
    keep = row["attention_mask"][0].bool()
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        if name in row:
            row[name] = row[name][:1, keep]
    got = model.generate(**row, max_new_tokens=LENGTH, min_new_tokens=LENGTH)
    assert torch.equal(got, stock(model, tiny, row))


@pytest.mark.parametrize(
    "options", [{"cache_implementation": "static"}, {"use_cache": False}, {"repetition_penalty": 1.5}], ids=str
)
def test_parity_holds_with_other_caches_and_processors(fresh, options):
    model, tiny = fresh
    got = model.generate(**tiny.inputs, max_new_tokens=LENGTH, min_new_tokens=LENGTH, **options)
    assert torch.equal(got, stock(model, tiny, tiny.inputs, **options))


def test_logits_of_an_untrained_head_are_the_backbones(fresh):
    model, tiny = fresh
    with torch.no_grad():
        out = model(**tiny.inputs)
        want = tiny.model(**tiny.inputs).logits
    shown = tiny.inputs["attention_mask"].bool()
    torch.testing.assert_close(out.logits[shown], want[shown], atol=1e-5, rtol=1e-5)


def test_end_of_sequence_pads_the_finished_rows_as_the_backbone_does(fresh):
    model, tiny = fresh
    want = stock(model, tiny, tiny.inputs)
    width = tiny.inputs["input_ids"].shape[1]
    stop = int(want[0, width + 3])
    options = {"max_new_tokens": LENGTH, "eos_token_id": stop}
    banned = model.config.vision_token_ids or None
    got = model.generate(**tiny.inputs, return_dict_in_generate=True, **options)
    want = tiny.model.generate(**tiny.inputs, do_sample=False, suppress_tokens=banned, **options)
    assert torch.equal(got.sequences, want)
    assert got.action_ids.shape == got.action_log_probs.shape == (len(want), want.shape[1] - width)


@pytest.mark.parametrize("read_out", ["subtract", "last_block"])
def test_other_read_outs_generate(read_out):
    model, tiny = latent("llava", latent_config(read_out=read_out))
    out = model.generate(**tiny.inputs, max_new_tokens=4, return_dict_in_generate=True)
    with torch.no_grad():
        logits = model(**tiny.inputs).logits
    assert out.action_ids.shape == (3, 4)
    assert torch.isfinite(logits).all()
