"""What a long run meets under the engines: uneven ends and batches, a killed process, other data, wrong launches."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from engine_runs import build, train
from engines import DEEPSPEED, has_deepspeed, launch

from latent_trl.trainer.run.manifest import checkpoint_fault, newest_whole_checkpoint

TIMED = re.compile("runtime|per_second|step_time|epoch")
needs_deepspeed = pytest.mark.skipif(not has_deepspeed(), reason="DeepSpeed is not installed")
ENGINES = ["fsdp2", *(pytest.param(engine, marks=needs_deepspeed) for engine in DEEPSPEED)]
# What a run is compared with: one process with the rows of both, or two of DDP where draws belong to a process.
CASES = {
    # Completions of 1 to 5 codes: a process that is done has to wait.
    "early ends": ("grpo", "frozen", 2, {"early_ends": True}, {"early_ends": True}),
    # Batches of one row, of unlike length, with and without a picture.
    "sft in parts": ("sft", "lora", 1, {"gradient_accumulation_steps": 2}, {}),
    "ppo in parts": (
        *("ppo", "lora", 1, {"gradient_accumulation_steps": 2, "steps_per_generation": 2, "early_ends": True}),
        {"early_ends": True},
    ),
    # A vision tower whose gradient one process alone would have.
    "vision": ("sft", "vision", 2, {}, {}),
    "anchor": ("grpo", "frozen", 2, {"anchor_coef": 0.5}, None),
    # The 4-bit layers stay whole under FSDP2, as accelerate says, and are sharded as bytes by ZeRO-3.
    "4 bits": ("grpo", "lora", 2, {"four_bits": True}, None),
    # Greedy answers read the head until they are certain, each process those of its own rows; and the six rows fill
    # one batch of two processes and a half, so that one of them has rows that do not count.
    "evaluation": (
        *("grpo", "frozen", 2, {"early_ends": True, "evaluated": True, "per_device_eval_batch_size": 2}),
        {"early_ends": True, "evaluated": True, "per_device_eval_batch_size": 4},
    ),
    "dynamic sampling": ("grpo", "frozen", 2, {"dynamic_sampling_rounds": 2, "early_ends": True}, None),
}


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    ended = {}

    def run(name: str) -> dict:
        if name == "4 bits":
            pytest.importorskip("bitsandbytes")
        if name not in ended:
            kind, tuned, rows, options, of_one = CASES[name]
            folder = tmp_path_factory.mktemp(name.replace(" ", "-"))
            if of_one is None:
                launch("ddp", train, kind, tuned, str(folder), rows, options)
            else:
                launch(None, train, kind, tuned, str(folder), 4, of_one)
            ended[name] = torch.load(folder / "result.pt", weights_only=True)
        return ended[name]

    return run


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("engine", ENGINES)
def test_what_a_run_meets_changes_nothing(engine, name, expected, tmp_path):
    kind, tuned, rows, options, _ = CASES[name]
    launch(engine, train, kind, tuned, str(tmp_path), rows, options)
    got, wanted = torch.load(tmp_path / "result.pt", weights_only=True), expected(name)
    # What bitsandbytes keeps beside a layer is no part of ZeRO-3's.
    kept = {n: tensor for n, tensor in wanted["weights"].items() if ".base_layer." not in n}
    worst = max((got["weights"][n] - tensor).abs().max().item() for n, tensor in kept.items())
    print(f"{engine} {name}: {worst:.1e}")
    assert worst < 1e-5
    lengths = [row["completions/mean_length"] for row in got["logs"] if "completions/mean_length" in row]
    assert options.get("early_ends") is None or (lengths and max(lengths) < 5)
    if "evaluation" in wanted:
        figures = [{k: v for k, v in of["evaluation"].items() if not TIMED.search(k)} for of in (got, wanted)]
        assert figures[0] == pytest.approx(figures[1], abs=1e-4)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("engine", ENGINES)
def test_a_killed_process_leaves_a_checkpoint_to_go_on_from(engine, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    launch(engine, train, "grpo", "lora", str(whole), 2, {})
    with pytest.raises(Exception, match="SIGKILL|terminated|Connection"):
        launch(engine, train, "grpo", "lora", str(killed), 2, {"killed_at": 3})
    assert not (killed / "result.pt").exists()
    last = newest_whole_checkpoint(killed)
    assert Path(last).name == "checkpoint-3" and checkpoint_fault(last) is None
    launch(engine, train, "grpo", "lora", str(killed), 2, {}, last)
    got, wanted = (torch.load(folder / "result.pt", weights_only=True) for folder in (killed, whole))
    assert all(torch.equal(got["weights"][name], tensor) for name, tensor in wanted["weights"].items())
    assert got["logs"] == wanted["logs"]


def attempt(kind: str, folder: str, options: dict, resume: str | None = None) -> None:
    """Leaves the error with which a run cannot begin."""
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    Path(folder).mkdir(parents=True, exist_ok=True)
    try:
        build(kind, "frozen" if kind != "sft" else "lora", folder, 2, **options).train(resume_from_checkpoint=resume)
    except ValueError as error:
        (Path(folder) / f"error_{rank}.txt").write_text(str(error))


def errors(folder: Path) -> list[str]:
    return [(folder / f"error_{rank}.txt").read_text() for rank in (0, 1)]


@pytest.mark.distributed
def test_an_engine_that_accelerate_leaves_out_is_named(tmp_path):
    """accelerate makes DDP of FSDP2 on the CPU."""
    launch("fsdp2", attempt, "grpo", str(tmp_path), {}, on_the_cpu=False)
    for error in errors(tmp_path):
        assert error.startswith("The launcher's configuration asks for FSDP, and accelerate made MULTI_CPU of it")


@pytest.mark.slow
@pytest.mark.distributed
@needs_deepspeed
def test_deepspeed_refuses_what_it_would_do_otherwise(tmp_path):
    cases = {
        "value_warmup_steps": ("zero2", "ppo", {"value_warmup_steps": 1}),
        "on_nonfinite": ("zero2", "grpo", {"on_nonfinite": "skip"}),
        "ds3_gather_for_generation": ("zero3", "grpo", {"ds3_gather_for_generation": False}),
    }
    for name, (engine, kind, options) in cases.items():
        launch(engine, attempt, kind, str(tmp_path / name), options)
        assert all(name in error for error in errors(tmp_path / name))


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("engine", ENGINES)
def test_a_checkpoint_of_another_engine_is_refused(engine, tmp_path):
    launch(engine, train, "sft", "lora", str(tmp_path / "run"), 2, {"save_total_limit": None})
    checkpoint = str(tmp_path / "run" / "checkpoint-3")
    launch("ddp", attempt, "sft", str(tmp_path / "again"), {}, checkpoint)
    for error in errors(tmp_path / "again"):
        assert "was written under" in error and "2 under one process or DDP" in error


@pytest.mark.slow
@pytest.mark.distributed
def test_sft_of_two_processes_is_gone_on_with_by_one(tmp_path):
    """The optimizer's moments are the same on both, and the rows of an update too."""
    launch(None, train, "sft", "lora", str(tmp_path / "one"), 4, {})
    launch("ddp", train, "sft", "lora", str(tmp_path / "two"), 2, {"save_total_limit": None})
    shutil.rmtree(tmp_path / "two" / "saved")
    launch(None, train, "sft", "lora", str(tmp_path / "two"), 4, {}, str(tmp_path / "two" / "checkpoint-3"))
    got, wanted = (torch.load(tmp_path / name / "result.pt", weights_only=True) for name in ("two", "one"))
    worst = max((got["weights"][name] - tensor).abs().max().item() for name, tensor in wanted["weights"].items())
    assert worst < 1e-6
