import pytest
import torch
from tiny_models import FAMILIES

from latent_trl.commands.check_backbone import check_backbone, main


def failed(results):
    return [(check, detail) for check, ok, detail in results if not ok]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_passes_on_text(family):
    results = check_backbone(FAMILIES[family]().model)
    assert not failed(results), failed(results)
    assert len(results) == 9


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "idefics3", "gemma3", "paligemma"])
def test_a_batch_with_images_can_be_tried(family):
    tiny = FAMILIES[family]()
    assert not failed(check_backbone(tiny.model, tiny.inputs))


def test_the_backbone_is_left_as_it_was():
    model = FAMILIES["llama"]().model.train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    check_backbone(model)
    assert torch.equal(torch.rand(1), expected)
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert not model.model._forward_hooks and not model.model._forward_pre_hooks


def test_a_checkpoints_own_way_to_decode_is_not_taken_for_a_fault():
    tiny = FAMILIES["llama"]()
    tiny.model.generation_config.update(repetition_penalty=3.0, do_sample=True, temperature=0.1)
    assert not failed(check_backbone(tiny.model))
    assert tiny.model.generation_config.repetition_penalty == 3.0


def test_what_fails_is_named():
    model = FAMILIES["llama"]().model
    results = check_backbone(model.model)
    assert failed(results)[0][0] == "its parts are found" and "no output embedding" in failed(results)[0][1]
    head = model.lm_head.forward
    calls = []

    def unsteady(states):
        calls.append(1)
        return head(states) + len(calls) % 3 * torch.arange(states.shape[1] * 272).view(states.shape[1], 272)

    model.lm_head.forward = unsteady
    assert failed(check_backbone(model))


def test_the_command_prints_a_table_and_returns_a_status(tmp_path, capsys):
    FAMILIES["llama"]().model.save_pretrained(tmp_path / "base")
    assert main([str(tmp_path / "base")]) == 0
    printed = capsys.readouterr().out
    assert "rollouts are scored" in printed and "LlamaForCausalLM" in printed
    assert main([str(tmp_path / "base"), "--dtype", "bfloat16", "--attn-implementation", "eager"]) == 0
    assert main([str(tmp_path / "nowhere")]) == 1
    assert "no" in capsys.readouterr().out
