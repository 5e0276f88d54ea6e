"""A loss is the mean over the whole update: however its rows are split into batches, the update is the same."""

import pytest
import torch
from learning_runs import STAGES, build_sft, build_space, picture, tensors, turn
from tiny_models import latent_config
from transformers import TrainerCallback

from latent_trl.trainer.sft.trainer import guided_losses

LENGTHS = (1, 9, 3, 24, 2, 14, 5, 30)
# Plain steps of a size that shows: Adam would make steps of one size of gradients of any.
PLAIN = {"optim": "sgd", "max_grad_norm": 0.0, "train_sampling_strategy": "sequential", "logging_steps": 1}
SPLITS = ((4, 1), (1, 4))


def paired(count: int = 8, images=(1, 0, 2, 1, 0, 1)) -> list[dict]:
    return [
        {
            "messages": [turn("user", f"what is {i}?"), turn("assistant", "ab" * LENGTHS[i])],
            "images": [picture(10 * i + k) for k in range(images[i % len(images)])],
        }
        for i in range(count)
    ]


def texts(count: int = 8) -> list[dict]:
    return [{"messages": [turn("user", "say"), turn("assistant", "cde" * LENGTHS[-1 - i])]} for i in range(count)]


def split(rows: int, batches: int) -> dict:
    return {"per_device_train_batch_size": rows, "gradient_accumulation_steps": batches, **PLAIN}


def run(trainer):
    """What a run changed, and what it logged."""
    before = tensors(trainer.model)
    trainer.train()
    after = tensors(trainer.model)
    history = getattr(trainer, "history", None) or trainer.state.log_history
    return {name: after[name] - before[name] for name in before}, [row for row in history if "loss" in row]


def assert_same(got, expected, tolerance: float = 1e-5):
    (changes, logs), (wanted, wanted_logs) = got, expected
    moved = sum(tensor.double().square().sum() for tensor in wanted.values()).sqrt()
    apart = sum((changes[name].double() - wanted[name].double()).square().sum() for name in wanted).sqrt()
    assert moved > 1e-4
    assert apart / moved < tolerance, (apart / moved).item()
    assert [row["loss"] for row in logs] == pytest.approx([row["loss"] for row in wanted_logs], rel=1e-4)
    return moved


SPACES = {
    "inverse_dynamics": {"inverse_dynamics_learning_rate": 0.3},
    "inverse_dynamics, balance": {"inverse_dynamics_learning_rate": 0.3, "balance_coef": 2.0},
    "inverse_dynamics, coverage": {"inverse_dynamics_learning_rate": 0.3, "coverage_coef": 0.5},
    "projector": {"projector_learning_rate": 1e-2},
    "joint": {"joint_learning_rate": 0.3, "cycle_coef": 1e-4},
    "joint, balance and coverage": {"joint_learning_rate": 0.3, "balance_coef": 1.0, "coverage_coef": 0.2},
    "policy": {"policy_learning_rate": 0.3},
    "policy, inferred": {"policy_learning_rate": 0.3, "cloning_target": "inferred"},
}


@pytest.mark.parametrize("case", SPACES)
def test_a_stage_s_update_does_not_depend_on_the_split(case, tmp_path):
    stage = case.split(",")[0]
    options = {"balance_coef": 0.0, "stages": [stage], f"{stage}_max_steps": 2, **SPACES[case]}
    config = latent_config(stage="none" if stage == "inverse_dynamics" else "inverse_dynamics")
    runs = []
    for rows, batches in (*SPLITS, (2, 2)) if case.startswith("joint,") else SPLITS:
        trainer = build_space(
            tmp_path / f"{rows}", config=config, paired=paired(), text=texts(), **split(rows, batches), **options
        )
        torch.nn.init.normal_(trainer.model.get_output_embeddings().weight, std=0.3)
        runs.append(run(trainer))
    for other in runs[1:]:
        assert_same(other, runs[0])


@pytest.mark.parametrize("guidance", ["inferred", "policy"])
def test_sft_s_update_does_not_depend_on_the_split(guidance, tmp_path):
    options = {"rows": paired(), "guidance": guidance, "max_steps": 2, "learning_rate": 0.1}
    options |= {"trained_layers": ["lm_head"], "lr_scheduler_type": "constant", "warmup_steps": 0}
    runs = [run(build_sft(tmp_path / f"{rows}", **split(rows, batches), **options)) for rows, batches in SPLITS]
    for other in runs[1:]:
        assert_same(other, runs[0])


class KeepWeights(TrainerCallback):
    def __init__(self):
        self.weights = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights.append(model.backbone.get_output_embeddings().weight.detach().clone())


def test_the_last_window_of_an_epoch_is_divided_by_its_own_positions(tmp_path):
    """Six rows one by one in windows of four: the second update is of two rows."""
    keep, rate = KeepWeights(), 0.1
    options = {"rows": paired(6), "max_steps": -1, "num_train_epochs": 1, "learning_rate": rate}
    options |= {"trained_layers": ["lm_head"], "lr_scheduler_type": "constant", "warmup_steps": 0}
    trainer = build_sft(tmp_path, callback=keep, **split(1, 4), **options)
    trainer.train()
    first, second = keep.weights
    weight = trainer.model.backbone.get_output_embeddings().weight
    with torch.no_grad():
        weight.copy_(first)
    batches = [trainer.data_collator([trainer.train_dataset[i]]) for i in (4, 5)]
    losses = torch.cat([guided_losses(trainer.model, batch)[0] for batch in batches])
    assert len(losses) > 30
    (gradient,) = torch.autograd.grad(losses.mean(), weight)
    torch.testing.assert_close(second - first, -rate * gradient, rtol=1e-4, atol=1e-7)
    logged = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert logged[1] == pytest.approx(losses.mean().item(), rel=1e-5)


def test_the_last_window_of_an_epoch_in_learning_the_space(tmp_path):
    """Six rows in batches of 4 and 2, and one by one in windows of four."""
    options = {"stages": ["inverse_dynamics"], "inverse_dynamics_max_steps": -1, "num_train_epochs": 1}
    runs = [
        run(build_space(tmp_path / f"{rows}", paired=paired(6), text=None, **split(rows, batches), **options))
        for rows, batches in ((4, 1), (1, 4))
    ]
    assert len(runs[0][1]) == 2
    assert_same(runs[1], runs[0])


@pytest.mark.parametrize("stage", STAGES)
def test_the_backbone_reads_a_batch_once_however_it_is_split(stage, tmp_path):
    """Looking ahead keeps the states; a row with an image is read a second time without it."""
    counts = {}
    for rows, batches in SPLITS:
        config = latent_config(stage="none" if stage == "inverse_dynamics" else "inverse_dynamics")
        trainer = build_space(
            tmp_path / f"{rows}", config=config, paired=paired(4), text=texts(4), stages=[stage],
            **{f"{stage}_max_steps": 1}, **split(rows, batches),
        )  # fmt: skip
        read = []
        trainer.model.backbone_view.decoder.register_forward_hook(
            lambda module, args, kwargs, output, read=read: read.append(len(output.last_hidden_state)),
            with_kwargs=True,
        )
        trainer.train()
        counts[rows] = sum(read)
    assert counts[1] == counts[4] > 0
