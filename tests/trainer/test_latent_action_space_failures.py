"""What goes wrong in learning is found at once, named, and nothing that was saved is lost."""

import logging
import re

import pytest
import torch
from datasets import Dataset
from learning_runs import build_sft, build_space, changed, paired_rows, tensors, text_rows
from tiny_models import latent, latent_config

from latent_trl import LatentActionSpaceConfig
from latent_trl.trainer.run.component_training import load_components
from latent_trl.trainer.run.manifest import checkpoint_fault
from latent_trl.trainer.space import trainer as space_trainer

STEPS = {"save_strategy": "steps", "save_steps": 1, "logging_steps": 1}


@pytest.mark.parametrize("stage", ["joint", "policy"])
def test_a_stage_before_the_one_that_it_needs(stage, tmp_path):
    message = f"Stage '{stage}' needs stage 'inverse_dynamics' .* reached 'none'. Put 'inverse_dynamics' before it"
    with pytest.raises(ValueError, match=message):
        build_space(tmp_path, stages=[stage])
    with pytest.raises(ValueError, match=message):
        build_space(tmp_path, stages=["projector", stage])


def test_the_projector_alone_does_not_count_as_more(tmp_path):
    trainer = build_space(tmp_path, stages=["projector"])
    trainer.train()
    assert trainer.model.config.stage == "none"
    with pytest.raises(ValueError, match="needs stage 'inverse_dynamics'"):
        build_space(tmp_path / "next", model=trainer.model, stages=["policy"])


def test_stages_and_their_order():
    with pytest.raises(ValueError, match=r"`stages` must be among .* got \['sft'\]"):
        LatentActionSpaceConfig("unused", stages=["sft"])
    for stages in (["policy", "joint"], ["joint", "joint"]):
        with pytest.raises(ValueError, match="each once"):
            LatentActionSpaceConfig("unused", stages=stages)
    with pytest.raises(ValueError, match="`stages` must be among"):
        LatentActionSpaceConfig("unused", stages=[])


def test_no_projector_is_found_before_any_work(tmp_path):
    with pytest.raises(ValueError, match="which this model has not .*Leave it out of `stages`"):
        build_space(tmp_path, "llama", latent_config(use_projector=False), paired=text_rows())


def test_sft_under_inferred_codes_needs_the_model_that_infers_them(tmp_path):
    model, _ = latent("llava", latent_config(stage="policy"))
    model.inverse_dynamics = None
    with pytest.raises(ValueError, match="`guidance='inferred'` needs .* `guidance='policy'`"):
        build_sft(tmp_path, model=model)
    build_sft(tmp_path, model=model, guidance="policy")


def test_sft_before_cloning(tmp_path):
    model = build_space(tmp_path).model
    with pytest.raises(ValueError, match="has only reached stage 'none'. Run `LatentActionSpaceTrainer` up to"):
        build_sft(tmp_path, model=model)


@pytest.mark.parametrize(
    "rows, message",
    [
        (None, "`train_dataset` must be given"),
        ([], "training data set is empty|it needs `messages`"),
        ([{"text": "a"}], r"`train_dataset` has the columns \['text'\]; it needs `messages`, or"),
        (Dataset.from_dict({"prompt": ["a"]}), r"has the columns \['prompt'\]"),
        (iter([]), "which has no length"),
    ],
)
def test_data_without_the_columns(rows, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        build_space(tmp_path, paired=rows)
    with pytest.raises(ValueError, match=message):
        build_sft(tmp_path, rows=rows)


def test_a_bad_row_is_named_in_the_middle_of_a_run(tmp_path):
    text = [*text_rows(3), {"messages": [{"role": "user", "content": "a"}]}]
    with pytest.raises(ValueError, match="Row 3 of the text-only data: no assistant message"):
        build_space(tmp_path, text=text, train_sampling_strategy="sequential").train()


def test_projector_without_any_image(tmp_path):
    with pytest.raises(ValueError, match="no row up to step 2 has an image. Give paired data"):
        build_space(tmp_path, paired=paired_rows(4, (0,)), stages=["projector"]).train()


def poison(trainer, stage: str | None, step: int, value: float = float("nan")):
    """Makes the loss of a step not finite."""
    compute = trainer.model.forward

    def forward(*args, **kwargs):
        output = compute(*args, **kwargs)
        if trainer.state.global_step == step and getattr(trainer, "stage", None) == stage:
            output.loss = output.loss * value
        return output

    trainer.model.forward = forward


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(value, tmp_path):
    trainer = build_space(tmp_path, **STEPS)
    poison(trainer, "joint", 2, value)
    message = "The loss became (nan|-?inf) in stage 'joint' at step 2. .*checkpoint-2', is whole"
    with pytest.raises(FloatingPointError, match=message):
        trainer.train()
    last = tmp_path / "3-joint" / "checkpoint-2"
    assert checkpoint_fault(last) is None
    again = build_space(tmp_path, **STEPS)
    load_components(again.model, last)
    assert all(t.isfinite().all() for t in tensors(again.model).values())
    again.train(resume_from_checkpoint=True)
    assert again.model.config.stage == "policy"


def test_without_a_checkpoint_the_error_says_so(tmp_path):
    trainer = build_sft(tmp_path)
    poison(trainer, None, 1)
    with pytest.raises(
        FloatingPointError, match=f"at step 1. .*No checkpoint was written to '{re.escape(str(tmp_path))}'"
    ):
        trainer.train()


@pytest.mark.parametrize("build", [build_space, build_sft])
def test_a_gradient_that_is_not_finite_changes_nothing(build, tmp_path):
    trainer = build(tmp_path, **STEPS)
    compute = trainer.compute_loss

    def spoilt(*args, **kwargs):
        loss = compute(*args, **kwargs)
        if trainer.state.global_step == 1:
            # The root of zero: finite, and its derivative is not.
            loss = loss + (loss - loss).abs().sqrt()
        return loss

    trainer.compute_loss = spoilt
    seen = []
    step = type(trainer)._get_grad_norm

    def norm(model, grad_norm=None):
        seen.append(tensors(trainer.model))
        return step(trainer, model, grad_norm)

    trainer._get_grad_norm = norm
    with pytest.raises(
        FloatingPointError, match="The gradient became nan .*at step 1. .*The last checkpoint, .*checkpoint-1"
    ):
        trainer.train()
    assert changed(seen[-1], tensors(trainer.model)) == set()


def alarms(caplog) -> str:
    return " ".join(r.message for r in caplog.records if "Codebook alarm" in r.message)


def test_codes_too_small_to_be_seen_raise_the_alarm_of_blindness(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    config = latent_config(codebook_std=1e-4)
    options = {"stages": ["inverse_dynamics"], "inverse_dynamics_max_steps": 30, "inverse_dynamics_learning_rate": 1e-5}
    trainer = build_space(tmp_path, config=config, balance_coef=1.0, **options)
    trainer.train()
    assert "code-blindness" in alarms(caplog) and "Raise `codebook_std` to the scale of the states" in alarms(caplog)
    assert trainer.history[-2]["codebook/used"] > 2
    assert alarms(caplog).count("code-blindness") == 1


def test_collapse_raises_an_alarm(tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.WARNING)
    # More than there are codes.
    monkeypatch.setattr(space_trainer, "MIN_PERPLEXITY", 16.5)
    trainer = build_space(tmp_path, stages=["inverse_dynamics"], inverse_dynamics_max_steps=24)
    trainer.train()
    assert "collapse" in alarms(caplog) and "Raise `balance_coef` or `gumbel_temperature`" in alarms(caplog)


def test_healthy_codes_raise_none(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    options = {"stages": ["inverse_dynamics"], "inverse_dynamics_max_steps": 60, "paired": paired_rows(8)}
    trainer = build_space(tmp_path, balance_coef=0.2, **options)
    trainer.train()
    last = [row for row in trainer.history if "codebook/used" in row][-1]
    assert last["world_model/ce_gap_random_action"] > 0.05 and "blindness" not in alarms(caplog)
    assert torch.isfinite(torch.tensor(last["loss"]))
