"""
What holds for every family of backbones: each test builds a tiny random model of the family from its configuration.
The package itself knows no family: the last test looks for their names in it.
"""

import re
from pathlib import Path

import pytest
import torch
from tiny_models import (
    FAMILIES,
    HIDDEN,
    TEXT_FAMILIES,
    VLM_FAMILIES,
    build,
    latent,
    latent_config,
    perturb,
    text_batch,
)
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.utils import is_flash_attn_2_available

import latent_trl
from latent_trl import ActionLaw, LatentActionModel
from latent_trl.models.backbone import Backbone
from latent_trl.models.checkpoint import load_backbone

SLOW = pytest.mark.slow
FEW = ("llama", "gemma2", "gpt2", "qwen2_5_vl", "gemma3", "idefics3")
every = pytest.mark.parametrize("family", FAMILIES)
# The quick tests take some families, the slow ones the rest.
most = pytest.mark.parametrize("family", [f if f in FEW else pytest.param(f, marks=SLOW) for f in FAMILIES])


def both(tiny):
    return (tiny.inputs, tiny.text_inputs) if tiny.inputs is not tiny.text_inputs else (tiny.inputs,)


def check_parity(model, tiny, **options):
    """Greedy text of an untrained head against the backbone's own."""
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, **options}
    for inputs in both(tiny):
        want = tiny.model.generate(
            **inputs, do_sample=False, suppress_tokens=model.config.vision_token_ids or None, **settings
        )
        assert torch.equal(model.generate(**inputs, **settings), want)


def check_rollout(model, tiny, tolerance=1e-4, **options):
    """Recorded log-probabilities and states against a fresh pass."""
    torch.manual_seed(0)
    law = ActionLaw(1.3, 8, 0.95)
    for inputs in both(tiny):
        out = model.generate(
            **inputs,
            max_new_tokens=8,
            min_new_tokens=8,
            action_temperature=1.3,
            action_top_k=8,
            action_top_p=0.95,
            return_dict_in_generate=True,
            output_context_states=True,
            **options,
        )
        whole = tiny.extended(inputs, out.sequences)
        with torch.no_grad():
            passed = model(**whole, return_logits=False)
        log_probs, _ = law.score(passed.action_logits[:, -9:-1], out.action_ids, out.action_support)
        assert (log_probs - out.action_log_probs).abs().max() < tolerance
        shown = whole["attention_mask"][:, :-1].bool()
        difference = (passed.context_states[:, :-1] - out.context_states)[shown].abs().max()
        assert difference < tolerance * passed.context_states.abs().max()
        assert len(out.action_ids.unique()) > 2


@every
def test_an_untrained_head_generates_the_backbones_greedy_text(family):
    check_parity(*latent(family, perturbed=False))


@every
def test_rollouts_are_scored_as_they_were_taken(family):
    check_rollout(*latent(family))


@most
@pytest.mark.parametrize("options", [{"cache_implementation": "static"}, {"use_cache": False}], ids=str)
def test_rollouts_with_other_caches_are_scored_as_they_were_taken(family, options):
    check_rollout(*latent(family), **options)


@every
def test_rollouts_while_training_are_scored_as_they_were_taken(family):
    """No dropout in the backbone, which is frozen, and none in the policy."""
    model, tiny = latent(family)
    model.train()
    out = model.generate(**tiny.text_inputs, max_new_tokens=5, min_new_tokens=5, return_dict_in_generate=True)
    with torch.no_grad():
        passed = model(**tiny.extended(tiny.text_inputs, out.sequences), return_logits=False)
    log_probs, _ = ActionLaw().score(passed.action_logits[:, -6:-1], out.action_ids)
    assert (log_probs - out.action_log_probs).abs().max() < 1e-4


@every
def test_several_samples_share_a_prompt(family):
    model, tiny = latent(family)
    out = model.generate(
        **tiny.inputs, max_new_tokens=5, min_new_tokens=5, num_return_sequences=2, return_dict_in_generate=True
    )
    for i in range(2):
        with torch.no_grad():
            passed = model(**tiny.extended(tiny.inputs, out.sequences[i::2]), return_logits=False)
        log_probs, _ = ActionLaw().score(passed.action_logits[:, -6:-1], out.action_ids[i::2])
        assert (log_probs - out.action_log_probs[i::2]).abs().max() < 1e-4


@most
def test_a_saved_model_generates_the_same(family, tmp_path):
    model, tiny = latent(family)
    model.save_pretrained(tmp_path)
    loaded = LatentActionModel.from_pretrained(tmp_path, backbone=FAMILIES[family]().model)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "action_do_sample": False}
    assert torch.equal(loaded.generate(**tiny.inputs, **options), model.generate(**tiny.inputs, **options))


@most
def test_the_other_kind_of_embedding_tying_works(family, tmp_path):
    tied = not bool(FAMILIES[family]().model.config.tie_word_embeddings)
    model, tiny = latent(family, perturbed=False, tie_word_embeddings=tied)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (embedding.data_ptr() == head.data_ptr()) == tied
    check_parity(model, tiny)
    perturb(model)
    check_rollout(model, tiny)
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "backbone").exists()


@most
def test_a_backbone_may_have_fewer_layers_than_the_heads(family):
    config = latent_config(inverse_dynamics_decoder={"num_hidden_layers": 2}, policy_decoder={"num_hidden_layers": 3})
    check_rollout(*latent(family, config, num_hidden_layers=1))


@most
def test_decoders_may_be_smaller_than_the_backbone(family):
    small = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2}
    model, tiny = latent(family, latent_config(inverse_dynamics_decoder=small, policy_decoder=small))
    assert model.policy.decoder_stack.hidden_size == model.inverse_dynamics.decoder_stack.hidden_size == 16
    assert model.policy.hidden_size == HIDDEN
    check_rollout(model, tiny)
    check_parity(*latent(family, latent_config(policy_decoder=small), perturbed=False))


@every
def test_a_policy_may_start_from_the_backbones_last_layers(family):
    model, tiny = latent(family, latent_config(policy_init="last_layers"), perturbed=False)
    own = dict(model.policy.decoder_stack.decoder.named_parameters())
    source = dict(model.get_decoder().named_parameters())
    layers = {int(m.group(1)) for name in own if (m := re.search(r"\.(\d+)\.", f".{name}"))}
    assert layers == {0, 1}
    compared = 0
    for name, parameter in own.items():
        match = re.search(r"(?<=\.)\d+(?=\.)", f".{name}")
        if match:
            twin = re.sub(r"(^|\.)(\d+)\.", lambda m: f"{m.group(1)}{int(m.group(2)) + 1}.", name, count=1)
            assert torch.equal(parameter, source[twin]), name
            compared += 1
    assert compared
    check_parity(model, tiny)


@most
def test_bfloat16_backbones_have_bfloat16_components(family):
    tiny = FAMILIES[family]()
    tiny.model.to(torch.bfloat16)
    model = LatentActionModel.from_backbone(tiny.model, latent_config())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in tiny.inputs.items()}
    options = {"max_new_tokens": 6, "min_new_tokens": 6}
    banned = model.config.vision_token_ids or None
    want = tiny.model.generate(**inputs, do_sample=False, suppress_tokens=banned, **options)
    assert torch.equal(model.generate(**inputs, **options), want)
    perturb(model)
    out = model.generate(**inputs, **options, return_dict_in_generate=True)
    with torch.no_grad():
        passed = model(**tiny.extended(inputs, out.sequences))
    log_probs, _ = ActionLaw().score(passed.action_logits[:, -7:-1], out.action_ids)
    assert passed.action_logits.dtype == log_probs.dtype == torch.float32
    assert torch.isfinite(passed.logits).all()
    assert (log_probs - out.action_log_probs).abs().max() < 0.3


@most
def test_checkpointing_gives_the_same_policy_gradients(family):
    model, tiny = latent(family)
    model.policy.train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.zero_grad()
        states, position_ids = model.encode(**tiny.inputs)
        logits = model.policy(states.detach(), tiny.inputs["attention_mask"], position_ids)
        logits[:, -1].log_softmax(-1)[:, 0].sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.policy.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() == {name for name, _ in model.policy.named_parameters()}
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-6, rtol=1e-4)


@most
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_implementations_agree(family, attention):
    tiny = FAMILIES[family]()
    if attention == "sdpa" and not tiny.model.get_decoder()._supports_sdpa:
        pytest.skip("transformers has no SDPA for this family")
    capped = getattr(tiny.model.config, "attn_logit_softcapping", None)
    if attention == "eager" and capped and tiny.model.get_decoder()._supports_sdpa:
        pytest.skip("the reference's SDPA leaves the cap on attention scores out (Gemma 2, transformers 5.20)")
    tiny.model.set_attn_implementation(attention)
    torch.manual_seed(4)
    model = LatentActionModel.from_backbone(tiny.model, latent_config()).eval()
    check_parity(model, tiny)
    perturb(model)
    check_rollout(model, tiny)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "action_do_sample": False, "return_dict_in_generate": True}
    reference, _ = latent(family)
    ours, theirs = model.generate(**tiny.inputs, **options), reference.generate(**tiny.inputs, **options)
    assert torch.equal(ours.action_ids, theirs.action_ids)


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "llava", "qwen2_5_vl"])
def test_flash_attention_agrees_with_sdpa(family):
    """In bfloat16, which the kernels want; log-probabilities of the same codes within its rounding."""
    if not torch.cuda.is_available() or not is_flash_attn_2_available():
        pytest.skip("needs a CUDA device and flash-attn")
    found = {}
    for attention in ("sdpa", "flash_attention_2"):
        tiny = FAMILIES[family](num_hidden_layers=2)
        tiny.model.to("cuda", torch.bfloat16)
        tiny.model.set_attn_implementation(attention)
        torch.manual_seed(4)
        model = LatentActionModel.from_backbone(tiny.model, latent_config()).eval()
        perturb(model)
        inputs = {k: v.to("cuda", torch.bfloat16 if v.is_floating_point() else None) for k, v in tiny.inputs.items()}
        out = found.get("sdpa") or model.generate(
            **inputs, max_new_tokens=6, min_new_tokens=6, return_dict_in_generate=True
        )
        with torch.no_grad():
            passed = model(**tiny.extended(inputs, out.sequences), return_logits=False)
        log_probs, _ = ActionLaw().score(passed.action_logits[:, -7:-1], out.action_ids)
        assert (log_probs - out.action_log_probs).abs().max() < 0.3
        found[attention] = out


@every
def test_only_components_train_and_gradients_reach_them(family):
    model, tiny = latent(family)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and not any(name.startswith("backbone.") for name in trained)
    out = model(**tiny.inputs, action_ids=torch.zeros_like(tiny.inputs["input_ids"]))
    out.logits.float().logsumexp(-1).sum().backward()
    assert model.codebook.weight.grad.abs().sum() > 0
    assert all(p.grad is not None for p in model.world_model.parameters())
    assert all(p.grad is None for p in model.backbone.parameters())


@pytest.mark.parametrize("read_out", ["subtract", "last_block"])
@most
def test_the_final_norm_is_found(family, read_out):
    model, tiny = latent(family, latent_config(read_out=read_out))
    states, _ = model.encode(**tiny.inputs)
    norm = model.backbone_view.final_norm
    assert norm is not None and "norm" in type(norm).__name__.lower()
    check_rollout(model, tiny)


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_text_backbones_have_no_placeholders_and_no_projector(family):
    model, tiny = latent(family)
    assert model.config.vision_token_ids == [] and model.projector is None
    assert not model.has_image(tiny.inputs["input_ids"]).any()


@pytest.mark.parametrize("family", VLM_FAMILIES)
def test_images_are_told_from_text(family):
    model, tiny = latent(family)
    assert 3 in model.config.vision_token_ids and model.projector is not None
    seen = model.has_image(tiny.inputs["input_ids"])
    assert seen[:, -1].tolist() == [True, False, True] and seen.shape == tiny.inputs["input_ids"].shape
    assert not model.has_image(tiny.text_inputs["input_ids"]).any()


@every
def test_the_scale_of_the_codes_is_the_states(family):
    model, tiny = latent(family)
    states, _ = model.encode(**tiny.text_inputs)
    rms = states[tiny.text_inputs["attention_mask"].bool()].pow(2).mean().sqrt().item()
    assert 0.3 < model.config.codebook_std / rms < 3


def test_models_without_a_head_or_of_another_library_are_refused():
    with pytest.raises(ValueError, match="no output embedding"):
        LatentActionModel.from_backbone(FAMILIES["llama"]().model.model)
    with pytest.raises(TypeError, match="PreTrainedModel"):
        LatentActionModel.from_backbone(torch.nn.Linear(2, 2))


def test_no_file_of_the_package_names_a_family():
    """
    Names inside a Hub id, `"user/model"`, are examples of what to type and not cases. One name is that of the plain
    decoder, which is the same for every family.
    """
    names = re.compile(
        r"qwen|llava|gemma|idefics|smolvlm|internvl|pixtral|mistral|llama|gpt-?2|granite|cohere", re.IGNORECASE
    )
    hub_id = re.compile(r"[\"`'][\w.-]+/[\w.-]+[\"`']")
    root = Path(latent_trl.__file__).parent
    found = [
        f"{path.relative_to(root)}:{number}: {line.strip()}"
        for path in sorted(root.rglob("*.py"))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if names.search(hub_id.sub("", line)) and not line.startswith("PLAIN_DECODER = ")
    ]
    assert not found, found


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_text_longer_than_the_positions_is_refused_before_it_is_generated(family):
    model, tiny = latent(family)
    length = tiny.text_inputs["input_ids"].shape[1]
    assert model.backbone_view.max_positions == (256 if family == "gpt2" else None)
    if family == "gpt2":
        room = 256 - length + 1
        assert model.generate(**tiny.text_inputs, max_new_tokens=room, min_new_tokens=room).shape[1] == 257
        with pytest.raises(ValueError, match="positions for 256"):
            model.generate(**tiny.text_inputs, max_new_tokens=room + 1)


@pytest.mark.parametrize("family", ["llama", "paligemma", "gemma3"])
def test_decoder_layers_see_nothing_later_without_padding(family):
    """Of a backbone that reads its prompt both ways too."""
    model, _ = latent(family)
    states = torch.randn(2, 6, HIDDEN)
    for stack in (model.policy.decoder_stack, model.inverse_dynamics.decoder_stack):
        with torch.no_grad():
            torch.testing.assert_close(stack(states)[:, :4], stack(states[:, :4]), atol=1e-5, rtol=1e-5)


def test_a_backbone_whose_layers_cannot_stand_alone_gets_plain_ones(caplog, tmp_path):
    """These layers do not run with a static cache. What the user asks for still raises."""
    config = BloomConfig(vocab_size=272, hidden_size=HIDDEN, n_layer=2, n_head=4, pad_token_id=0)
    backbone = build(BloomForCausalLM, config)
    with caplog.at_level("WARNING"):
        model = LatentActionModel.from_backbone(backbone, latent_config()).eval()
    assert model.config.decoder_kind == "plain" and "decoder_kind='plain'" in caplog.text
    perturb(model)
    model.save_pretrained(tmp_path)
    loaded = LatentActionModel.from_pretrained(tmp_path, backbone=backbone)
    assert loaded.config.decoder_kind == "plain"
    inputs = text_batch()
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "action_do_sample": False}
    assert torch.equal(loaded.generate(**inputs, **options), model.generate(**inputs, **options))
    with pytest.raises(ValueError, match="not a field"):
        LatentActionModel.from_backbone(backbone, latent_config(policy_decoder={"no_such_field": 1}))
    with pytest.raises(RuntimeError):
        LatentActionModel.from_backbone(backbone, latent_config(decoder_kind="backbone"))


def test_plain_layers_can_be_asked_for():
    model, tiny = latent("qwen2_vl", latent_config(decoder_kind="plain"))
    assert type(model.policy.decoder_stack.decoder).__name__ != type(model.get_decoder()).__name__
    check_rollout(model, tiny)


def test_the_head_of_a_model_that_calls_its_text_model_directly_reads_states():
    fields = {"hidden_size": HIDDEN, "word_embed_proj_dim": HIDDEN, "ffn_dim": 48, "num_attention_heads": 4}
    config = OPTConfig(vocab_size=272, num_hidden_layers=2, max_position_embeddings=64, **fields)
    view = Backbone(build(OPTForCausalLM, config))
    assert view.max_positions == 64
    states = torch.randn(1, 3, HIDDEN)
    with torch.no_grad():
        assert torch.allclose(view.logits(states), view.model.get_output_embeddings()(states), atol=1e-5)


def test_a_model_of_another_type_is_refused_by_its_type(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "unheard_of", "auto_map": {"AutoConfig": "x.Y"}}')
    with pytest.raises(ValueError, match="'unheard_of'.*from_backbone"):
        load_backbone(str(tmp_path))
    encoder_decoder = T5Config(vocab_size=272, d_model=HIDDEN, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    with pytest.raises(ValueError, match="encoder-decoder"):
        Backbone(build(T5ForConditionalGeneration, encoder_decoder))
