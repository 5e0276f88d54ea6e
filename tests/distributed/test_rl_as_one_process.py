"""RL on two processes give the weights of one process with the same rollouts."""

import sys
from pathlib import Path

import pytest
import torch
from accelerate import debug_launcher

sys.path[:0] = [str(Path(__file__).parent.parent / "trainer")]

from every_trainer import build, letters, logs  # noqa: E402

from latent_trl.generation.choice import ActionChoice  # noqa: E402

GLOBAL = ("reward", "reward_std", "entropy", "kl", "codebook/used", "codebook/perplexity", "ppo/value_loss")


def draw_alike(choice: ActionChoice, probs: torch.Tensor) -> torch.Tensor:
    """Codes by a number that depends on the sample's place in its group and on the step alone, on any process."""
    step = choice.__dict__.setdefault("drawn", 0)
    choice.drawn = step + 1
    copy = torch.arange(len(probs)) // (len(probs) // choice.copies)
    number = 0.05 + 0.9 * ((copy * 0.37 + step * 0.61) % 1.0)
    return (probs.cumsum(dim=-1) < number[:, None]).sum(dim=-1).clamp(max=probs.shape[1] - 1)


def train(kind: str, folder: str, rows: int) -> None:
    torch.set_num_threads(1)
    ActionChoice._draw = draw_alike
    ActionChoice._draw_together = lambda choice, probs, wanted: draw_alike(choice, probs)
    options = {"per_device_train_batch_size": rows, "steps_per_generation": 1, "save_strategy": "no"}
    # Without its large epsilon, Adam turns rounding errors of gradients near zero into whole steps.
    options |= {"adam_epsilon": 1e-3, "max_grad_norm": 0.5, "logging_steps": 1}
    trainer = build(kind, Path(folder), 6, reward=letters, **options)
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    trainer.train()
    moved = max((p.detach() - before[name]).abs().max().item() for name, p in trained.items())
    result = {"weights": {name: p.detach() for name, p in trained.items()}, "moved": moved, "logs": logs(trainer)}
    torch.save(result, Path(folder) / f"result_{trainer.accelerator.process_index}.pt")


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["ppo", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("grpo", "rloo"))])
def test_two_processes_are_one(kind, tmp_path):
    for name, rows, processes in (("one", 8, 1), ("two", 4, 2)):
        (tmp_path / name).mkdir()
        debug_launcher(train, (kind, str(tmp_path / name), rows), num_processes=processes)
    expected = torch.load(tmp_path / "one" / "result_0.pt", weights_only=True)
    assert expected["moved"] > 1e-3
    for rank in (0, 1):
        got = torch.load(tmp_path / "two" / f"result_{rank}.pt", weights_only=True)
        worst = max((got["weights"][name] - w).abs().max().item() for name, w in expected["weights"].items())
        assert worst < 1e-5, worst
    assert len(got["logs"]) == len(expected["logs"]) > 4
    for own, whole in zip(got["logs"], expected["logs"], strict=True):
        for name in set(GLOBAL) & set(whole):
            assert own[name] == pytest.approx(whole[name], abs=2e-4), name
