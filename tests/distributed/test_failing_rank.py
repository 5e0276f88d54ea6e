"""A reward function that raises on one process ends all of them with its error, and the last checkpoint is whole."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate import debug_launcher

sys.path[:0] = [str(Path(__file__).parent.parent / "trainer")]

from every_trainer import build, letters  # noqa: E402

from latent_trl.rewards.calling import RewardError  # noqa: E402
from latent_trl.trainer.run.manifest import checkpoint_fault, newest_whole_checkpoint  # noqa: E402

TESTS = Path(__file__).parent.parent


def failing(trainer_state, completions, **columns):
    """Raises on the second process, at the third rollout batch."""
    if torch.distributed.get_rank() == 1 and trainer_state.global_step == 4:
        raise ConnectionError("the judge is gone")
    return letters(completions)


def build_failing(kind: str, folder: str):
    torch.set_num_threads(1)
    options = {"steps_per_generation": 1, "save_total_limit": None}
    return build(kind, Path(folder), 8, reward=failing, **options)


def train(kind: str, folder: str) -> None:
    trainer = build_failing(kind, folder)
    try:
        trainer.train()
    except RewardError as error:
        record = f"{time.time()} {error}"
        (Path(folder) / f"error_{trainer.accelerator.process_index}.txt").write_text(record)


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["ppo", pytest.param("grpo", marks=pytest.mark.slow)])
def test_all_processes_end_with_the_error_of_one(kind, tmp_path):
    debug_launcher(train, (kind, str(tmp_path)), num_processes=2)
    times, errors = zip(*((tmp_path / f"error_{rank}.txt").read_text().split(" ", 1) for rank in (0, 1)))
    own = "The reward function 'failing' raised ConnectionError: the judge is gone on sample 0 of 4 (prompt "
    assert errors[1].startswith(own) and errors[0] == f"On process 1: {errors[1]}"
    assert abs(float(times[0]) - float(times[1])) < 30
    last = newest_whole_checkpoint(tmp_path)
    assert last.endswith("checkpoint-4") and checkpoint_fault(last) is None


@pytest.mark.slow
@pytest.mark.distributed
def test_a_launched_run_ends_with_the_error(tmp_path):
    """Through `accelerate launch`, as users start it."""
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys\nsys.path[:0] = [{str(TESTS)!r}, {str(Path(__file__).parent)!r}]\n"
        "from test_failing_rank import build_failing\n"
        f"trainer = build_failing('grpo', {str(tmp_path / 'run')!r})\n"
        "try:\n    trainer.train()\nfinally:\n    import time; print('ended at', time.time(), flush=True)\n"
    )
    config = TESTS.parent / "examples" / "accelerate_configs" / "cpu" / "multi_gpu.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), str(script)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    ended = [float(line.split()[-1]) for line in run.stdout.splitlines() if line.startswith("ended at")]
    # The launcher may end the second process before it has spoken.
    assert run.returncode != 0 and ended and time.time() - min(ended) < 30
    assert "The reward function 'failing' raised ConnectionError: the judge is gone" in run.stderr + run.stdout
    assert newest_whole_checkpoint(tmp_path / "run").endswith("checkpoint-4")
