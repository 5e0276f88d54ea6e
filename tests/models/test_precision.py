"""Backbones loaded in another precision than the one that a checkpoint was made in, and components beside them."""

import pytest
import torch
from tiny_models import FAMILIES, latent_config, perturb

from latent_trl import ActionLaw, CheckpointError, LatentActionModel
from latent_trl.models.checkpoint import load_backbone

PRECISIONS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(
    scope="module",
    params=[torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)],
    ids=str,
)
def kept(request, tmp_path_factory):
    """A folder with a backbone, the precision that it is kept in, and folders of checkpoints made in each precision."""
    root = tmp_path_factory.mktemp("kept")
    FAMILIES["gemma3"]().model.to(request.param).save_pretrained(root / "base")
    for made in PRECISIONS:
        torch.manual_seed(0)
        model = LatentActionModel.from_backbone(load_backbone(str(root / "base"), dtype=made), latent_config())
        perturb(model)
        model.save_pretrained(root / str(made))
    return root, request.param


def must_round_apart(kept_in, made, loaded) -> bool:
    """Bits that the one rounding took away cannot be had from the other's."""
    return kept_in == torch.float32 and {made, loaded} == {torch.float16, torch.bfloat16}


@pytest.mark.parametrize("made", PRECISIONS, ids=str)
@pytest.mark.parametrize("loaded", PRECISIONS, ids=str)
def test_a_checkpoint_fits_its_backbone_in_every_precision(kept, made, loaded):
    root, kept_in = kept
    if must_round_apart(kept_in, made, loaded):
        name = str(loaded).removeprefix("torch.")
        with pytest.raises(CheckpointError, match=f"it is in {name}, and float16 and bfloat16 round"):
            LatentActionModel.from_pretrained(root / str(made), dtype=loaded)
        loaded = torch.float32
    model = LatentActionModel.from_pretrained(root / str(made), dtype=loaded)
    assert model.backbone.dtype == loaded


@pytest.mark.parametrize("loaded", PRECISIONS, ids=str)
def test_another_backbone_is_refused_in_every_precision(kept, loaded):
    root, _ = kept
    other = load_backbone(str(root / "base"), dtype=loaded)
    with torch.no_grad():
        other.get_decoder().norm.weight[0] += 0.1
    with pytest.raises(CheckpointError, match="not those that the checkpoint was trained on"):
        LatentActionModel.from_pretrained(root / "torch.float32", backbone=other)


def test_a_checkpoint_of_one_fingerprint_still_loads(kept, tmp_path):
    root, _ = kept
    model = LatentActionModel.from_pretrained(root / "torch.float32", dtype=torch.float32)
    model.config.backbone_fingerprint_float16 = None
    model.save_pretrained(tmp_path)
    assert LatentActionModel.from_pretrained(tmp_path, dtype=torch.float32)


@pytest.mark.parametrize("loaded", PRECISIONS[1:], ids=str)
def test_float32_components_go_with_a_half_precision_backbone(kept, loaded):
    """A checkpoint made in float32, as a trainer leaves it, on a backbone in half precision."""
    root, _ = kept
    model = LatentActionModel.from_pretrained(root / "torch.float32", dtype=loaded)
    assert {p.dtype for p in model.policy.parameters()} == {torch.float32}
    tiny = FAMILIES["gemma3"]()
    inputs = {k: v.to(loaded) if v.is_floating_point() else v for k, v in tiny.inputs.items()}
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "return_dict_in_generate": True}
    torch.manual_seed(0)
    out = model.generate(**inputs, **options)
    with torch.no_grad():
        passed = model(**tiny.extended(inputs, out.sequences))
    log_probs, entropy = ActionLaw().score(passed.action_logits[:, -6:-1], out.action_ids)
    assert log_probs.dtype == entropy.dtype == out.action_log_probs.dtype == torch.float32
    assert torch.isfinite(passed.logits).all() and (log_probs - out.action_log_probs).abs().max() < 0.3
