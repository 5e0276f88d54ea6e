"""Progress is lines in a pipe, and bars that 90 columns hold in a terminal."""

import io
import re

import pytest
from rich.console import Console

from latent_trl.commands import progress


@pytest.fixture
def piped(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=out, width=80))
    return out


def run(bars) -> None:
    for name, total in (("Learn: joint", 3), ("Evaluate", 2)):
        task = bars.add_task(name, total=total, figures="")
        for step in range(1, total + 1):
            bars.update(task, completed=step)
        bars.update(task, figures="CE 0.118  codes 112")


def test_a_pipe_gets_a_line_at_the_end_of_each_job(piped):
    with progress.progress_bars() as bars:
        run(bars)
    shown = r"\d+ s  CE 0\.118  codes 112\n"
    assert re.fullmatch(f"Learn: joint  3/3  {shown}Evaluate  2/2  {shown}", piped.getvalue())


def test_a_pipe_gets_lines_while_a_job_goes_on(piped, monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    with progress.progress_bars() as bars:
        run(bars)
    lines = piped.getvalue().splitlines()
    shown = [["Learn: joint", f"{n}/3"] for n in (1, 2, 3)] + [["Evaluate", f"{n}/2"] for n in (1, 2)]
    assert [line.split("  ")[:2] for line in lines] == shown


def test_what_is_logged_after_training_is_no_job(piped):
    from types import SimpleNamespace

    with progress.progress_bars() as bars:
        callback = progress.BarCallback(bars, lambda: "Learn", {"eval_reward": "eval"})
        state = SimpleNamespace(max_steps=1, global_step=1)
        callback.on_train_begin(None, state, None)
        callback.on_step_end(None, state, None)
        callback.on_train_end(None, state, None)
        callback.on_log(None, state, None, logs={"eval_reward": 1.0})
    assert len(piped.getvalue().splitlines()) == 1


def test_ninety_columns_hold_every_bar(monkeypatch):
    from latent_trl.commands.training import RL_FIGURES

    figures = {
        "Learn: inverse_dynamics": "CE 0.0793  codes 112  perplexity 82.9",
        "Learn: policy": "KL to the backbone 0.0397",
        "RL over codes (GRPO)": "  ".join(f"{name} 0.0123" for name in RL_FIGURES.values()),
    }
    out = io.StringIO()
    console = Console(file=out, width=90, force_terminal=True, color_system=None)
    monkeypatch.setattr(progress, "console", console)
    with progress.progress_bars() as bars:
        for name, shown in figures.items():
            bars.add_task(name, total=1000, completed=1000, figures=shown)
    last = out.getvalue()
    assert "…" not in last
    for name, shown in figures.items():
        assert name in last and shown in last


def test_a_command_prints_progress_into_a_pipe(checkpoint, tmp_path, piped, monkeypatch):
    from latent_trl.commands.main import main

    words = ["sft", "--model_name_or_path", checkpoint, "--dataset_name", "shapes", "--dataset_limit", "8"]
    words += ["--max_steps", "2", "--per_device_train_batch_size", "4", "--save_strategy", "no", "--use_cpu", "true"]
    words += ["--disable_tqdm", "false"]
    assert main([*words, "--logging_steps", "1", "--output_dir", str(tmp_path / "o")]) == 0
    assert re.search(r"Fine-tune \(SFT\)  2/2  \d+ s  loss [\d.]+\nThe model is in ", piped.getvalue())
