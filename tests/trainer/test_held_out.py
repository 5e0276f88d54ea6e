"""Held-out figures are means over all positions of a set, whatever its batches, and choose the best model."""

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import debug_launcher
from learning_runs import STAGES, InterruptAt, Interrupted, build_sft, build_space, changed, logs, tensors
from test_backbone_cloning import token_law
from test_latent_action_space_objective import rows_of
from test_update_means import paired, texts
from tiny_models import latent, latent_config

from latent_trl import LatentActionSpaceConfig
from latent_trl.checkpoint.files import read_tensors
from latent_trl.trainer.sft.trainer import guided_loss
from latent_trl.trainer.space.evaluation import HELD_OUT_FIGURES, MEASURED, HeldOutFigures
from latent_trl.trainer.space.observation import observe

EVAL = {"eval_dataset": paired(5), "per_device_eval_batch_size": 2}


def figures(metrics: dict) -> dict:
    """What does not tell the time."""
    clocks = ("runtime", "per_second", "preparation_time")
    return {k: v for k, v in metrics.items() if k != "epoch" and not k.endswith(clocks)}


def whole_batch(trainer):
    rows = trainer.eval_dataset
    return trainer.data_collator([rows[i] for i in range(len(rows))])


@torch.no_grad()
def test_figures_by_hand(tmp_path):
    """With two batches of two rows and one of one."""
    model, _ = latent("llava", latent_config(stage="policy"))
    trainer = build_space(tmp_path, model=model, stages=["policy"], seed=3, **EVAL)
    torch.nn.init.normal_(trainer.model.get_output_embeddings().weight, std=1.0)
    metrics = trainer.evaluate()
    batch = whole_batch(trainer)
    ids, attention_mask = batch["input_ids"], batch["attention_mask"]
    states, position_ids = model.encode(ids, attention_mask, **batch["vision"])
    backbone_states = observe(model, batch).states
    inferred = model.infer(states, ids, attention_mask, position_ids).argmax(-1)
    probs = model.policy(states, attention_mask, position_ids).softmax(-1)
    found = {"ce": [], "ce_no_action": [], "ce_random_action": [], "backbone_kl": []}
    for b, t in rows_of(batch):
        own = ids[b][attention_mask[b].bool()]
        random = np.random.default_rng([3, *own.tolist()]).integers(model.config.num_codes, size=len(own))[t]
        laws = torch.stack([token_law(model, model.merge(states[b, t], code)) for code in model.codebook.weight])
        backbone, target = token_law(model, backbone_states[b, t]), ids[b, t + 1]
        found["ce"].append(-laws[inferred[b, t], target].log())
        found["ce_no_action"].append(-backbone[target].log())
        found["ce_random_action"].append(-laws[random, target].log())
        found["backbone_kl"].append((backbone * (backbone / (probs[b, t] @ laws)).log()).sum())
    assert len(found["ce"]) > 60 and metrics["eval_policy/backbone_kl"] > 0.1
    for name, values in found.items():
        group = "policy" if name == "backbone_kl" else "world_model"
        assert metrics[f"eval_{group}/{name}"] == pytest.approx(torch.stack(values).mean().item(), rel=1e-4), name
    assert metrics["eval_loss"] == metrics["eval_policy/cloning_loss"]


@pytest.mark.parametrize("stage", STAGES)
def test_neither_the_batches_nor_the_order_change_them(stage, tmp_path):
    model, _ = latent("llava", latent_config(stage="policy"))
    rows = [*paired(5), *texts(3)]
    trainer = build_space(tmp_path, model=model, stages=[stage], eval_dataset=rows)
    found = []
    for size, dataset in ((1, rows), (3, rows[::-1]), (64, rows)):
        trainer.args.per_device_eval_batch_size = size
        found.append(figures(trainer.evaluate(dataset)))
    assert {f"eval_{name}" for name in (*MEASURED[stage], "loss")} == set(found[0])
    assert found[0] == pytest.approx(found[1], rel=1e-4) and found[0] == pytest.approx(found[2], rel=1e-4)
    before = tensors(trainer.model)
    assert figures(trainer.evaluate(rows)) == found[2]
    assert changed(before, tensors(trainer.model)) == set()


def test_a_figure_that_a_set_has_no_position_for_is_left_out(tmp_path):
    trainer = build_space(tmp_path, config=latent_config(stage="inverse_dynamics"), stages=["joint"])
    found = {name: set(figures(trainer.evaluate(rows))) for name, rows in (("pairs", paired(1)), ("text", texts(1)))}
    assert found["pairs"] ^ found["text"] == {"eval_projector/nll", "eval_projector/cycle"}
    with torch.no_grad():
        sums = HeldOutFigures("policy")(trainer.model, trainer.collate(texts(2)))
    trainer.model.inverse_dynamics = None
    with torch.no_grad():
        without = HeldOutFigures("policy")(trainer.model, trainer.collate(texts(2)))
    place = MEASURED["policy"].index("world_model/ce")
    assert sums[:, place].any() and not without[:, place].any()


@pytest.mark.parametrize("guidance", ["inferred", "policy"])
def test_sft_s_loss_is_the_mean_over_tokens(guidance, tmp_path):
    """Rows of unlike lengths, the last batch short."""
    trainer = build_sft(tmp_path, guidance=guidance, **EVAL)
    loss = trainer.evaluate()["eval_loss"]
    with torch.no_grad():
        whole = guided_loss(trainer.model.eval(), whole_batch(trainer), guidance).item()
    assert loss == pytest.approx(whole, rel=1e-5)
    assert trainer.evaluate(paired(5))["eval_loss"] == loss


@pytest.mark.parametrize("build", [build_space, build_sft])
def test_several_sets_under_their_names(build, tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 2, "eval_dataset": {"one": paired(3), "two": texts(2)}}
    if build is build_space:
        options |= {"stages": ["inverse_dynamics"], "metric_for_best_model": "two_world_model/ce"}
    trainer = build(tmp_path, **options)
    metrics = trainer.evaluate()
    assert {"eval_one_loss", "eval_two_loss"} <= set(metrics)
    assert metrics["eval_one_loss"] == pytest.approx(trainer.evaluate(paired(3))["eval_loss"])
    assert {"eval_three_loss"} <= set(trainer.evaluate({"three": texts(1)}))
    trainer.train()
    history = trainer.history if build is build_space else trainer.state.log_history
    assert [row["step"] for row in history if "eval_two_loss" in row][-2:] == [2, 4]


@pytest.mark.parametrize("strategy", ["no", "steps"])
def test_each_stage_is_evaluated_at_its_end_once(strategy, tmp_path):
    trainer = build_space(tmp_path, eval_strategy=strategy, eval_steps=2, **EVAL)
    trainer.train()
    for stage in STAGES:
        rows = [row for row in trainer.history if row["stage"] == stage and "eval_loss" in row]
        assert [row["step"] for row in rows] == ([4] if strategy == "no" else [2, 4])
        assert {f"eval_{name}" for name in MEASURED[stage] if name != "projector/cycle"} <= set(rows[-1])
    assert figures(trainer.evaluate()) == pytest.approx(figures({k: v for k, v in rows[-1].items() if "eval_" in k}))
    reached = build_space(tmp_path / "loaded", model=trainer.model, stages=["policy"], **EVAL)
    assert "eval_policy/backbone_kl" in reached.evaluate()


def test_learning_lowers_the_held_out_cross_entropy(tmp_path):
    options = {"stages": ["inverse_dynamics"], "inverse_dynamics_max_steps": 40, "eval_dataset": paired(4)}
    trainer = build_space(tmp_path, paired=paired(8), balance_coef=0.02, **options)
    before = trainer.evaluate()
    # Nothing depends on the code before anything is learned.
    assert before["eval_world_model/ce"] == pytest.approx(before["eval_world_model/ce_no_action"], rel=1e-5)
    trainer.train()
    after = trainer.history[-1]
    assert after["eval_world_model/ce"] < 0.9 * before["eval_world_model/ce"]
    assert after["eval_world_model/ce_random_action"] > after["eval_world_model/ce"] + 0.05
    assert after["eval_world_model/ce_no_action"] == pytest.approx(before["eval_world_model/ce_no_action"])


@pytest.mark.parametrize("metric", [None, "world_model/ce", "eval_world_model/ce_no_action"])
def test_the_best_model_is_loaded_at_the_end(metric, tmp_path):
    """At a rate at which the last is not the best; no action never changes, so that the first stays the best."""
    trainer = build_space(
        tmp_path,
        stages=["inverse_dynamics"],
        inverse_dynamics_learning_rate=0.2,
        inverse_dynamics_max_steps=6,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model=metric,
        **EVAL,
    )
    assert trainer.args.greater_is_better is False
    trainer.train()
    name = "eval_" + (metric or "loss").removeprefix("eval_")
    rows = [row for row in trainer.history if "eval_loss" in row]
    best = min(rows[:-1], key=lambda row: row[name])
    assert len(rows) == 7 and best["step"] < 6
    assert rows[-1]["eval_loss"] == pytest.approx(best["eval_loss"], rel=1e-5)
    saved = read_tensors(
        tmp_path / "1-inverse_dynamics" / f"checkpoint-{best['step']}" / "codebook" / "model.safetensors"
    )
    assert torch.equal(trainer.model.codebook.weight.detach(), saved["weight"])


def test_a_metric_that_a_stage_does_not_change_is_refused(tmp_path):
    options = {"eval_strategy": "epoch", **EVAL}
    with pytest.raises(ValueError, match="'world_model/ce'` is not a figure that stage 'projector' changes; those are"):
        build_space(tmp_path, metric_for_best_model="world_model/ce", **options)
    with pytest.raises(ValueError, match="stage 'policy' changes.*'loss' is one of each"):
        build_space(tmp_path, stages=["inverse_dynamics", "policy"], metric_for_best_model="world_model/ce", **options)
    for stage, names in HELD_OUT_FIGURES.items():
        config = latent_config(stage="none" if stage == "inverse_dynamics" else "inverse_dynamics")
        for name in names:
            args = build_space(tmp_path, config=config, stages=[stage], metric_for_best_model=name, **options).args
            assert args.greater_is_better == (name == "policy/reachable")
    assert LatentActionSpaceConfig("unused", metric_for_best_model="loss", greater_is_better=True).greater_is_better


def test_sets_that_cannot_be_read_are_named(tmp_path):
    for build in (build_space, build_sft):
        with pytest.raises(ValueError, match=r"`eval_dataset\['b'\]` has the columns \['text'\]"):
            build(tmp_path, eval_dataset={"a": paired(1), "b": [{"text": "x"}]})
        with pytest.raises(ValueError, match="`eval_dataset` is a generator, which has no length"):
            build(tmp_path, eval_dataset=(row for row in paired(2)))
        with pytest.raises(ValueError, match="it needs `messages`|is empty"):
            build(tmp_path, eval_dataset=[])


def test_an_interrupted_run_evaluates_the_same(tmp_path):
    options = {"stages": list(STAGES[:3]), "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", **EVAL}
    options |= {"save_steps": 100, "logging_steps": 3}
    whole = build_space(tmp_path / "whole", **options)
    whole.train()
    with pytest.raises(Interrupted):
        build_space(tmp_path / "cut", callback=InterruptAt("joint", 2), **options).train()
    resumed = build_space(tmp_path / "cut", **options)
    resumed.train(resume_from_checkpoint=True)
    assert changed(tensors(whole.model), tensors(resumed.model)) == set()
    assert [figures(row) for row in logs(resumed.history)] == [figures(row) for row in logs(whole.history)]


def evaluate(folder: str) -> None:
    torch.set_num_threads(1)
    for build, options in (
        (build_space, {"config": latent_config(stage="policy"), "stages": ["policy"]}),
        (build_sft, {}),
    ):
        trainer = build(f"{folder}/{build.__name__}", eval_dataset=[*paired(5), *texts(2)], **EVAL_SIZE, **options)
        metrics = figures(trainer.evaluate())
        torch.save(metrics, Path(folder) / f"{build.__name__}_{trainer.accelerator.process_index}.pt")


EVAL_SIZE = {"per_device_eval_batch_size": 2}


@pytest.mark.distributed
def test_two_processes_evaluate_as_one(tmp_path):
    """Seven rows: one process's last batch is filled up with rows that do not count."""
    (tmp_path / "two").mkdir()
    (tmp_path / "one").mkdir()
    debug_launcher(evaluate, (str(tmp_path / "two"),), num_processes=2)
    debug_launcher(evaluate, (str(tmp_path / "one"),), num_processes=1)
    for name in ("build_space", "build_sft"):
        expected = torch.load(tmp_path / "one" / f"{name}_0.pt", weights_only=False)
        assert "eval_loss" in expected
        for rank in (0, 1):
            got = torch.load(tmp_path / "two" / f"{name}_{rank}.pt", weights_only=False)
            assert got == pytest.approx(expected, rel=1e-4, abs=1e-6)
