"""Runs that are killed at random moments, the writing of a checkpoint among them, end as if they had not been."""

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
RUN = """
import sys
sys.path[:0] = [{tests!r}, {trainer!r}]
import torch
torch.set_num_threads(1)
from learning_runs import build_sft, build_space
kind, folder, resume = {kind!r}, {folder!r}, {resume!r}
options = dict(save_strategy="steps", save_steps=1, save_total_limit=2, logging_steps=2)
trainer = (build_space if kind == "space" else build_sft)(folder, **options)
print("ready", flush=True)
from pathlib import Path
if kind == "sft":
    from latent_trl.trainer.checkpoint_manifest import newest_whole_checkpoint
    resume = resume and newest_whole_checkpoint(folder) is not None
trainer.train(resume_from_checkpoint=resume)
torch.save({{n: p.detach() for n, p in trainer.model.named_parameters()}}, Path(folder) / "weights.pt")
"""


def start(kind: str, folder: Path, resume: bool) -> subprocess.Popen:
    code = RUN.format(
        tests=str(HERE.parent), trainer=str(HERE.parent / "trainer"), kind=kind, folder=str(folder), resume=resume
    )
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("kind, kills", [("space", 6), ("sft", 3)])
def test_a_killed_run_ends_with_the_same_weights(kind, kills, tmp_path):
    whole = start(kind, tmp_path / "whole", False)
    while whole.stdout.readline().strip() != "ready":
        assert whole.poll() is None
    begin = time.monotonic()
    assert whole.wait(timeout=120) == 0
    length = time.monotonic() - begin
    expected = torch.load(tmp_path / "whole" / "weights.pt", weights_only=True)
    generator = random.Random(0)
    folder, killed = tmp_path / "killed", 0
    while killed < kills:
        process = start(kind, folder, killed > 0)
        while process.stdout.readline().strip() != "ready":
            assert process.poll() is None
        time.sleep(generator.uniform(0.05, 0.5) * length)
        if process.poll() is not None:
            break
        process.kill()
        process.wait()
        killed += 1
    assert killed >= 1
    last = start(kind, folder, True)
    assert last.wait(timeout=120) == 0
    got = torch.load(folder / "weights.pt", weights_only=True)
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())
