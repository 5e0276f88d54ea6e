"""A policy's law over tokens, taught to its backbone: exact, resumed exactly, and saved as a plain model."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from learning_runs import InterruptAt, Interrupted, tensors
from rl_models import prompts
from tiny_models import latent, latent_config
from transformers import AutoModelForCausalLM

from latent_trl import LatentActionDistillationConfig, LatentActionDistillationTrainer
from latent_trl.trainer.distillation import objective
from latent_trl.trainer.distillation.objective import divergence, teacher_law

ROOT = Path(__file__).parents[2]


def build(folder, family="llama", model=None, callback=None, rows=None, peft_config=None, **options):
    own, tiny = latent(family, latent_config(stage="policy", **({"use_projector": False} if family == "llama" else {})))
    defaults = {
        "use_cpu": True,
        "per_device_train_batch_size": 4,
        "max_completion_length": 6,
        "learning_rate": 1e-2,
        "max_steps": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    held_out = options.pop("eval_dataset", None)
    args = LatentActionDistillationConfig(str(folder), **{**defaults, **options})
    return LatentActionDistillationTrainer(
        model or own,
        args,
        rows or prompts(12),
        held_out,
        processing_class=tiny.processor,
        peft_config=peft_config,
        callbacks=None if callback is None else [callback],
    )


@pytest.mark.parametrize("family", ["llama", "llava", "gemma2"])
@pytest.mark.parametrize("teacher", ["mixture", "spoken"])
def test_the_law_is_that_of_brute_force(family, teacher):
    model, tiny = latent(family)
    states, _ = model.encode(**tiny.inputs)
    states, probs = states[:, -1], torch.rand(3, 16).softmax(dim=-1)
    never = model.config.vision_token_ids
    want = torch.zeros(3, model.backbone_view.text_config.vocab_size)
    for row in range(3):
        for code in range(16):
            logits = model.read(states[row, None, None], torch.tensor([[code]]))[0, 0].detach()
            if teacher == "mixture":
                want[row] += probs[row, code] * logits.softmax(dim=-1)
            else:
                logits[[token for token in never if token < len(logits)]] = -torch.inf
                want[row, logits.argmax()] += probs[row, code]
        want[row, [token for token in never if token < want.shape[1]]] = 0
        want[row] /= want[row].sum()
    torch.testing.assert_close(teacher_law(model, states, probs, teacher), want, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("size", [10**9, 600])
def test_divergence_and_its_gradient_are_exact_in_one_part_or_many(size, monkeypatch):
    monkeypatch.setattr(objective, "CHUNK_VALUES", size)
    model, _ = latent("llama")
    states = torch.randn(5, 32, requires_grad=True)
    wanted = torch.randn(5, model.backbone_view.text_config.vocab_size).mul(3).softmax(dim=-1)
    wanted[0] = F.one_hot(torch.tensor(7), wanted.shape[1])
    kl, same = divergence(model, states, wanted)
    (gradient,) = torch.autograd.grad(kl.sum(), states)
    said = model.backbone_view.logits(states[None])[0].log_softmax(dim=-1)
    want = F.kl_div(said, wanted, reduction="none").sum(dim=-1)
    torch.testing.assert_close(kl, want)
    torch.testing.assert_close(gradient, torch.autograd.grad(want.sum(), states)[0])
    assert torch.equal(same, (said.argmax(-1) == wanted.argmax(-1)).float())


@pytest.mark.parametrize("family", ["llama", "llava"])
def test_samples_and_their_states_are_the_policys(family, tmp_path):
    """The adapter, moved far away, has no part in them; the student's pass has it."""
    trainer = build(tmp_path, family)
    model, rows = trainer.model, [trainer.train_dataset[i] for i in range(4)]
    before = trainer.prepared({"rows": rows}, 0)["rollout"]
    first = trainer.losses(model, before)[0]
    with torch.no_grad():
        for name in model.adapter.trained:
            model.backbone.get_parameter(name).normal_()
    after = trainer.prepared({"rows": rows}, 0)["rollout"]
    for name in ("completion_ids", "action_ids", "context_states"):
        assert torch.equal(getattr(after, name), getattr(before, name)), name
    assert not torch.allclose(trainer.losses(model, after)[0], first)


@pytest.mark.parametrize(("teacher", "share"), [("spoken", 0.85), ("mixture", 0.7)])
def test_only_the_adapter_is_trained_and_the_divergence_falls(tmp_path, teacher, share):
    trainer = build(tmp_path, max_steps=25, eval_dataset=prompts(8), teacher=teacher)
    before, start = tensors(trainer.model), trainer.evaluate()["eval_loss"]
    trainer.train()
    after = tensors(trainer.model)
    assert {name for name in before if not torch.equal(before[name], after[name])} <= {
        f"backbone.{name}" for name in trainer.model.adapter.trained
    }
    assert trainer.evaluate()["eval_loss"] < share * start
    logged = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert len(logged) == 25


def test_samples_are_a_function_of_seed_and_step(tmp_path):
    trainer = build(tmp_path, eval_dataset=prompts(6))
    state, rows = torch.get_rng_state(), [trainer.eval_dataset[i] for i in range(6)]
    drawn = [trainer.prepared({"rows": rows}, place)["rollout"].action_ids for place in (0, 0, 1, None)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], drawn[3])
    assert torch.equal(torch.get_rng_state(), state)
    first, second = trainer.evaluate(), trainer.evaluate()
    assert first["eval_loss"] == second["eval_loss"] and 0 <= first["eval_agreement"] <= 1


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_resumed_run_goes_on_exactly(accumulated, tmp_path):
    options = {"gradient_accumulation_steps": accumulated, "save_strategy": "steps", "save_steps": 100}
    whole = build(tmp_path / "whole", **options)
    whole.train()
    with pytest.raises(Interrupted):
        build(tmp_path / "parts", callback=InterruptAt(None, 2), **options).train()
    resumed = build(tmp_path / "parts", **options)
    resumed.train(resume_from_checkpoint=True)
    want, got = tensors(whole.model), tensors(resumed.model)
    assert all(torch.equal(want[name], got[name]) for name in want)
    steps = [[log["loss"] for log in t.state.log_history if "loss" in log] for t in (whole, resumed)]
    assert steps[0] == steps[1]


def test_the_merged_folder_is_a_plain_model(tmp_path):
    trainer = build(tmp_path / "run", merge_adapter=True)
    trainer.train()
    trainer.save_model(str(tmp_path / "plain"))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype="float32").eval()
    assert not (tmp_path / "plain" / "latent_action_config.json").exists()
    inputs = latent("llama")[1].inputs
    with torch.no_grad():
        want = trainer.model.eval().backbone(**inputs).logits
        torch.testing.assert_close(plain(**inputs).logits, want, atol=1e-5, rtol=1e-4)
        with trainer.teacher() as model:
            assert not torch.allclose(model.backbone(**inputs).logits, want, atol=1e-2)
    # The trainer's own model still has its adapter.
    assert trainer.model.peft_backbone is not None


def test_the_adapter_alone_fits_the_base_model(tmp_path):
    from peft import PeftModel

    trainer = build(tmp_path / "run")
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    _, tiny = latent("llama")
    plain = PeftModel.from_pretrained(tiny.model, tmp_path / "adapter")
    with torch.no_grad():
        want = trainer.model.eval().backbone(**tiny.inputs).logits
        torch.testing.assert_close(plain(**tiny.inputs).logits, want, atol=1e-5, rtol=1e-4)


def test_a_tuned_backbone_is_merged_first(tmp_path):
    from peft import LoraConfig

    def tuned():
        model, _ = latent("llama", latent_config(stage="rl", use_projector=False))
        model.add_adapter(LoraConfig(r=2, init_lora_weights=False))
        return model

    with pytest.raises(ValueError, match="tuned itself, by SFT say.*Set `merge_adapter=True`"):
        build(tmp_path, model=tuned())
    torch.manual_seed(0)
    model = tuned()
    inputs = latent("llama")[1].inputs
    with torch.no_grad():
        want = model.backbone(**inputs).logits
        trainer = build(tmp_path, model=model, merge_adapter=True)
        with trainer.teacher() as teacher:
            torch.testing.assert_close(teacher.backbone(**inputs).logits, want, atol=1e-5, rtol=1e-4)


def test_what_cannot_be_done_is_named(tmp_path):
    model, _ = latent("llama", latent_config(stage="joint"))
    with pytest.raises(ValueError, match="only reached stage 'joint'"):
        build(tmp_path, model=model)
    with pytest.raises(ValueError, match="has the columns .'text'.; it needs `prompt`"):
        build(tmp_path, rows=[{"text": "a"}])
    with pytest.raises(ValueError, match="`teacher` must be one of"):
        build(tmp_path, teacher="both")
    with pytest.raises(ValueError, match="`action_temperature` must be positive"):
        build(tmp_path, action_temperature=0.0)
    with pytest.raises(ValueError, match="would push latent actions"):
        build(tmp_path, push_to_hub=True)
    with pytest.raises(TypeError, match="takes a `LatentActionDistillationConfig`"):
        from latent_trl import LatentActionSFTConfig

        LatentActionDistillationTrainer(latent("llama")[0], LatentActionSFTConfig(str(tmp_path), use_cpu=True))


def test_a_bad_row_is_skipped_and_listed(tmp_path):
    rows = [*list(prompts(6)), {"prompt": []}]
    trainer = build(tmp_path, rows=rows, on_bad_row="skip", max_steps=2)
    trainer.train()
    assert '"row": 6' in (tmp_path / "bad_rows.jsonl").read_text()


@pytest.mark.slow
def test_the_pocket_vlm_learns_what_its_policy_says(tmp_path):
    """A policy at temperature 0.3 says other things than its backbone. The figures are of 64 held-out prompts."""
    pytest.importorskip("easy_vqa")
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from latent_trl.data.shapes import shape_questions

    processor = AutoProcessor.from_pretrained(ROOT / "model_cards" / "pocket-vlm", padding_side="left")
    trainer = LatentActionDistillationTrainer(
        str(ROOT / "model_cards" / "pocket-vlm-latent-actions"),
        LatentActionDistillationConfig(
            str(tmp_path / "run"),
            action_temperature=0.3,
            max_completion_length=24,
            learning_rate=2e-3,
            max_steps=60,
            merge_adapter=True,
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=shape_questions("rl"),
        eval_dataset=shape_questions("test").select(range(64)),
        processing_class=processor,
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert before["eval_loss"] > 0.05 and after["eval_loss"] < 0.025
    assert after["eval_agreement"] > 0.96
    trainer.save_model(str(tmp_path / "plain"))
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "plain", dtype="float32").eval()
    rollout = trainer.prepared({"rows": [trainer.eval_dataset[i] for i in range(4)]}, None)["rollout"]
    inputs = trainer.reader.encoder.collate(rollout.prompts)
    with torch.no_grad():
        want = trainer.model.eval().backbone(**inputs).logits
        torch.testing.assert_close(plain(**inputs).logits, want, atol=1e-4, rtol=1e-4)
