"""Learning and SFT on two processes give the weights of one process with the same batches."""

from pathlib import Path

import pytest
import torch
from accelerate import debug_launcher
from tiny_models import latent_config

STEPS = {f"{stage}_max_steps": 3 for stage in ("inverse_dynamics", "projector", "joint", "policy")}
# Rows of different lengths; the second process's share of some batches is text alone, so are whole batches.
IMAGES = (1, 0, 2, 0, 0, 1, 0, 0)


def train(kind: str, folder: str, rows: int, options: dict) -> None:
    torch.set_num_threads(1)
    import sys

    sys.path.insert(0, str(Path(__file__).parent.parent / "trainer"))
    from learning_runs import build_sft, build_space, paired_rows, text_rows

    shared = {"per_device_train_batch_size": rows, "train_sampling_strategy": "sequential", "logging_steps": 1}
    # Without its large epsilon, Adam turns rounding errors of gradients near zero, which differ between machines, into
    # whole steps.
    shared |= {"max_grad_norm": 0.5, "adam_epsilon": 1e-3, **options}
    # Epochs' ends would repeat rows: as many rows as the steps take.
    if kind == "space":
        trainer = build_space(folder, paired=paired_rows(16, IMAGES), text=text_rows(16), **STEPS, **shared)
    else:
        trainer = build_sft(folder, rows=paired_rows(16, IMAGES), **shared)
    trainer.train()
    history = trainer.history if kind == "space" else trainer.state.log_history
    weights = {name: p.detach() for name, p in trainer.model.named_parameters()}
    result = {"weights": weights, "losses": [row["loss"] for row in history if "loss" in row], "history": history}
    torch.save(result, Path(folder) / f"result_{trainer.accelerator.process_index}.pt")


def compare(kind: str, folder: Path, batches: int = 1, **options) -> None:
    """Updates of 4 rows, on two processes in so many `batches` each, and on one in a single batch."""
    two_options = {"gradient_accumulation_steps": batches, **options}
    debug_launcher(train, (kind, str(folder / "two"), 2 // batches, two_options), num_processes=2)
    one, two = folder / "one", folder / "two"
    debug_launcher(train, (kind, str(one), 4, options), num_processes=1)
    expected = torch.load(one / "result_0.pt", weights_only=True)
    for rank in (0, 1):
        got = torch.load(two / f"result_{rank}.pt", weights_only=True)
        worst = max((got["weights"][n] - w).abs().max().item() for n, w in expected["weights"].items())
        assert worst < 1e-5, worst
    assert torch.allclose(torch.tensor(got["losses"]), torch.tensor(expected["losses"]), atol=1e-4)
    assert len(got["losses"]) == len(expected["losses"])
    for own, whole in zip(got["history"], expected["history"], strict=True):
        for name in ("world_model/ce_sampled", "projector/nll", "projector/cycle", "policy/cloning_accuracy"):
            assert own.get(name) == pytest.approx(whole.get(name), abs=2e-4), name
        assert own.get("codebook/used") == whole.get("codebook/used")


@pytest.mark.distributed
def test_learning_on_two_processes_is_learning_on_one(tmp_path):
    """A batch without any image on one process among them: nobody waits for it."""
    compare("space", tmp_path)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("kind, options", [("space", {"coverage_coef": 0.2}), ("sft", {})])
def test_accumulated_batches_on_two_processes_are_one_batch_on_one(kind, options, tmp_path):
    compare(kind, tmp_path, batches=2, **options)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"trained_layers": ["model.language_model.layers.2", "model.vision_tower", "lm_head"]},
    ],
)
def test_sft_on_two_processes_is_sft_on_one(options, tmp_path):
    compare("sft", tmp_path, **options)


def fail_on_one_rank(folder: str) -> None:
    torch.set_num_threads(1)
    import sys

    sys.path.insert(0, str(Path(__file__).parent.parent / "trainer"))
    from learning_runs import build_space

    trainer = build_space(
        folder, config=latent_config(), stages=["inverse_dynamics"], save_strategy="steps", save_steps=1
    )
    if trainer.accelerator.process_index == 1:
        objective_class = type(trainer)._begin

        def begin(stage):
            objective_class(trainer, stage)
            call = trainer.objective.__call__

            def poisoned(model, batch, update=None):
                return call(model, batch, update) * (float("nan") if trainer.state.global_step == 2 else 1.0)

            trainer.objective = _Wrapped(trainer.objective, poisoned)

        trainer._begin = begin
    try:
        trainer.train()
    except FloatingPointError as error:
        (Path(folder) / f"error_{trainer.accelerator.process_index}.txt").write_text(str(error))


class _Wrapped:
    def __init__(self, objective, call):
        self.__dict__.update(objective=objective, call=call)

    def __getattr__(self, name):
        return getattr(self.objective, name)

    def __setattr__(self, name, value):
        setattr(self.objective, name, value)

    def __call__(self, model, batch, update=None):
        return self.call(model, batch, update)


@pytest.mark.distributed
@pytest.mark.slow
def test_nan_on_one_process_stops_all(tmp_path):
    debug_launcher(fail_on_one_rank, (str(tmp_path),), num_processes=2)
    assert (
        "infinite or NaN on another process in stage 'inverse_dynamics' at step 2"
        in (tmp_path / "error_0.txt").read_text()
    )
    error = (tmp_path / "error_1.txt").read_text()
    assert "became nan in stage 'inverse_dynamics' at step 2" in error and "checkpoint-2', is whole" in error.replace(
        '"', "'"
    )
