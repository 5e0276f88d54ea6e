"""Long runs, long completions and long streams grow neither in memory nor in open files."""

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


OTHERS = """
import os, sys, json
sys.path[:0] = {paths!r}
import torch
torch.set_num_threads(1)
from pathlib import Path
from datasets import Dataset, IterableDataset
from every_trainer import letters
from tiny_models import latent, latent_config
from transformers import TrainerCallback
from latent_trl import LatentActionGRPOConfig, LatentActionGRPOTrainer

drawn, figures = [], []

def stream():
    for i in range(100_000):
        drawn.append(i)
        yield {{"prompt": f"what is {{i}}? " + "x" * 200}}

class Figures(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        length = max(len(ids) for ids in trainer._logs["extra"]["completion_ids"])
        figures.append({{"resident": pages * os.sysconf("SC_PAGE_SIZE"), "length": length, "drawn": len(drawn)}})

shared = {{"use_cpu": True, "bf16": False, "disable_tqdm": True, "save_strategy": "no", "report_to": "none"}}
if {kind!r} == "stream":
    rows = IterableDataset.from_generator(stream)
    positions, options = 512, {{"max_steps": 200, "max_completion_length": 2, "num_generations": 2}}
else:
    rows = Dataset.from_list([{{"prompt": f"say {{i}}"}} for i in range(64)])
    positions, options = 2304, {{"max_steps": 8, "max_completion_length": 2048, "num_generations": 2}}
options |= {{"per_device_train_batch_size": 2, "steps_per_generation": 1, "logging_steps": 1}}
model, tiny = latent("llama", latent_config(use_projector=False), max_position_embeddings=positions)
# Nothing ends an answer before its longest.
tiny.model.generation_config.eos_token_id = model.generation_config.eos_token_id = None
tokenizer = tiny.processor
args = LatentActionGRPOConfig({folder!r}, **options, **shared)
trainer = LatentActionGRPOTrainer(model, letters, args, train_dataset=rows, processing_class=tokenizer)
trainer.add_callback(Figures())
trainer.train()
Path({folder!r}, "figures.json").write_text(json.dumps(figures))
"""


def long_run(kind: str, folder: Path) -> list[dict]:
    here = Path(__file__).parent
    folder.mkdir()
    code = OTHERS.format(paths=[str(here.parent), str(here)], folder=str(folder), kind=kind)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=1200)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads((folder / "figures.json").read_text())


@pytest.mark.slow
def test_completions_of_two_thousand_tokens(tmp_path):
    """A step needs what it needs, and gives it back."""
    rows = long_run("long", tmp_path / "run")
    resident = [row["resident"] / 2**20 for row in rows]
    print(f"resident after each step, MiB: {[round(value) for value in resident]}; longest {rows[-1]['length']} tokens")
    assert max(row["length"] for row in rows) > 1_500
    assert max(resident[4:]) < 1.1 * max(resident[:4])


@pytest.mark.slow
def test_a_stream_of_a_hundred_thousand_rows(tmp_path):
    """Rows are drawn as they are needed, and none is kept."""
    rows = long_run("stream", tmp_path / "run")
    assert len(rows) == 200
    middle, last = rows[99], rows[-1]
    growth = last["resident"] / middle["resident"] - 1
    print(
        f"resident {middle['resident'] / 2**20:.1f} MiB after 100 steps, {last['resident'] / 2**20:.1f} after 200 "
        f"({growth:+.2%}); {last['drawn']} of 100,000 rows drawn"
    )
    assert growth < 0.02
    # A buffer of the shuffle, and a row for each group of two.
    assert last["drawn"] < 5_000
