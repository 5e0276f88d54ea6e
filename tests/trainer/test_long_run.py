"""A long run grows neither in memory nor in open files, and its logs stay as long as what is logged."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

STEPS = 1000
RUN = """
import os, sys, json
sys.path[:0] = {paths!r}
import torch
torch.set_num_threads(1)
from pathlib import Path
from every_trainer import build
from transformers import TrainerCallback

class Figures(TrainerCallback):
    rows = []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % 10 == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            kept = sum(len(values) for values in trainer._metrics["train"].values())
            table = sum(len(values) for values in trainer._logs["extra"].values())
            self.rows.append(
                {{
                    "step": state.global_step,
                    "resident": pages * os.sysconf("SC_PAGE_SIZE"),
                    "files": len(os.listdir("/proc/self/fd")),
                    "waiting": kept,
                    "table": table,
                    "logged": len(state.log_history),
                }}
            )

folder = Path({folder!r})
trainer = build("ppo", folder, {steps}, logging_steps=10, save_steps=100)
trainer.add_callback(Figures())
trainer.train()
(folder / "figures.json").write_text(json.dumps(Figures.rows))
"""


@pytest.mark.slow
def test_a_thousand_steps_of_ppo(tmp_path):
    here = Path(__file__).parent
    code = RUN.format(paths=[str(here.parent), str(here)], folder=str(tmp_path / "run"), steps=STEPS)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=1200)
    assert run.returncode == 0, run.stderr[-3000:]
    rows = json.loads((tmp_path / "run" / "figures.json").read_text())
    assert len(rows) == STEPS // 10
    half, last = rows[len(rows) // 2 - 1], rows[-1]
    growth = last["resident"] / half["resident"] - 1
    sizes = [os.path.getsize(tmp_path / "run" / f"checkpoint-{step}" / "trainer_state.json") for step in (900, 1000)]
    print(
        f"resident {half['resident'] / 2**20:.1f} to {last['resident'] / 2**20:.1f} MiB, {growth:+.2%}; files "
        f"{half['files']} to {last['files']}; bytes of state {sizes}"
    )
    assert growth < 0.02
    assert max(row["files"] for row in rows[50:]) <= max(row["files"] for row in rows[:50])
    # Metrics that wait for their log, and the table of completions, are of the last steps alone.
    assert max(row["waiting"] for row in rows[50:]) <= max(row["waiting"] for row in rows[:50])
    assert max(row["table"] for row in rows[50:]) <= max(row["table"] for row in rows[:50])
    # One row for each log.
    assert last["logged"] == STEPS // 10 - 1
    assert sizes[1] - sizes[0] < 30_000
