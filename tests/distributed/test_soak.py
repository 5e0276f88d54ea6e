"""A soak: runs of the command line, killed at random, on a file system of their own, with a judge that misbehaves."""

import gzip
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path[:0] = [str(Path(__file__).parent.parent / "rewards")]

from judge_server import JudgeServer, Reply, aspects, shown  # noqa: E402

from latent_trl.trainer.run.manifest import checkpoint_fault, newest_whole_checkpoint  # noqa: E402

POCKET = Path(__file__).parents[2] / "model_cards" / "pocket-vlm"
MINUTES = float(os.environ.get("LATENT_TRL_SOAK_MINUTES", "30"))
STEPS, SAVED = 32, 4
# Times that a run is killed before it is let to end.
KILLS = 3
COMMANDS = ("learn", "sft", "grpo", "ppo", "rloo")
LEFTOVERS = (".saving-", ".saved-", "_push-", ".trial", "checkpoint-is-incomplete")
ENDS = {signal.SIGKILL: (-9,), signal.SIGTERM: (143, -15), signal.SIGINT: (130, -2)}


class Misbehaving:
    """
    A judge whose scores follow from the request. Some requests it never answers well, so that they are never scored;
    others fail at first, in turn, and are scored when they are repeated.
    """

    def __init__(self):
        self.seen: set[bytes] = set()

    def __call__(self, request, count) -> Reply:
        digest = hashlib.sha256("".join(shown(request)).encode()).digest()
        score = {name: 1 + digest[i] % 10 for i, name in enumerate(aspects(request))}
        good = Reply(json.dumps({"first": score, "second": dict.fromkeys(score, 5)}))
        if "tomato" in str(request):
            return good
        never = (
            Reply("Who knows?"),
            Reply(status=307, headers={"Location": "http://127.0.0.1:9/"}),
            Reply(body=gzip.compress(bytes(2**20)), headers={"Content-Encoding": "gzip"}),
            Reply(body=b"\xff" * 100, headers={"Content-Type": "application/json; charset=rot13"}),
            Reply(endless=2**25),
        )
        if digest[-1] < 16:
            return never[digest[-1] % len(never)]
        at_first = (
            Reply(status=500),
            Reply(status=429, headers={"Retry-After": "0"}),
            Reply("x", cut=True),
            Reply(body="<html>Bad gateway</html>", status=502),
        )
        if 80 <= digest[-1] < 90:
            return Reply(good.content, delay=0.5)
        if digest[-1] < 80 and digest not in self.seen:
            self.seen.add(digest)
            return at_first[digest[-2] % len(at_first)]
        return good


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    pytest.importorskip("easy_vqa")
    from tiny_models import latent_config, perturb
    from transformers import AutoModelForImageTextToText

    from latent_trl import LatentActionModel

    torch.manual_seed(0)
    made = LatentActionModel.from_backbone(AutoModelForImageTextToText.from_pretrained(POCKET), latent_config())
    perturb(made, std=0.05)
    made.config.stage = "policy"
    folder = tmp_path_factory.mktemp("soak") / "model"
    made.save_pretrained(folder)
    return folder


@pytest.fixture
def disk(tmp_path):
    """A folder that is a mount point, where that can be made."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", str(folder)]
    mounted = shutil.which("mount") is not None and not subprocess.run(mount, capture_output=True).returncode
    yield folder
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)


def command(model: Path, folder: Path, url: str, name: str) -> list[str]:
    options = {
        "model_name_or_path": model,
        "dataset_name": "shapes",
        "dataset_limit": 24,
        "output_dir": folder,
        "save_steps": SAVED,
        "save_total_limit": 2,
        "logging_steps": 2,
        "per_device_train_batch_size": 4,
        "use_cpu": "true",
        "bf16": "false",
        "disable_tqdm": "true",
        "report_to": "none",
    }
    if name == "learn":
        rates = {f"{stage}_learning_rate": 1e-2 for stage in ("inverse_dynamics", "policy")}
        steps = dict.fromkeys(("inverse_dynamics_max_steps", "policy_max_steps"), STEPS // 2)
        options |= {**rates, **steps, "save_strategy": "steps"}
    else:
        options |= {"max_steps": STEPS, "learning_rate": 1e-2}
    if name in ("grpo", "ppo", "rloo"):
        judge = {"model": "m", "base_url": url, "reference_column": "answer", "retry_delay": 0.01, "timeout": 30}
        options |= {"reward_funcs": "judge", "reward_kwargs": json.dumps({"judge": judge})}
        options |= {"steps_per_generation": 2, "max_completion_length": 4}
        if name != "ppo":
            options["num_generations"] = 2
    words = [str(word) for option, value in options.items() for word in (f"--{option}", value)]
    stages = ["--stages", "inverse_dynamics", "policy"] if name == "learn" else []
    resume = ["--resume_from_checkpoint", "true"] if begun(folder) else []
    return [sys.executable, "-m", "latent_trl", name, *words, *stages, *resume]


def begun(folder: Path) -> bool:
    """Whether a run has left something to go on from: in its folder, or in those of its stages."""
    folders = [folder, *folder.glob("[0-9]-*")]
    return (folder / "stages.json").exists() or any(newest_whole_checkpoint(one) for one in folders)


def run(words: list[str], log: Path, kill: tuple[signal.Signals, int, float] | None = None) -> int:
    """Exit code of a process; one to be killed is sent a signal some seconds after so many lines of its log."""
    with open(log, "wb") as output:
        process = subprocess.Popen(words, stdout=output, stderr=output)
        if kill is not None:
            number, lines, seconds = kill
            while process.poll() is None and log.read_bytes().count(b"'loss'") < lines:
                time.sleep(0.02)
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                process.send_signal(number)
        return process.wait(600)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted([*folder.glob("*/model.safetensors"), *folder.glob("adapter/*.safetensors")])
    files += sorted(folder.glob("[0-9]-*/*/model.safetensors"))
    return {f"{path.relative_to(folder)}.{name}": t for path in files for name, t in load_file(path).items()}


@pytest.mark.soak
def test_runs_that_are_killed_at_random_end_as_if_they_had_not_been(model, disk, tmp_path):
    end, generator = time.monotonic() + 60 * MINUTES, random.Random(0)
    kills = ended = 0
    for round_ in range(1_000):
        name = COMMANDS[round_ % len(COMMANDS)]
        server = JudgeServer()
        server.respond = Misbehaving()
        log = tmp_path / f"{round_}.log"
        begin = time.monotonic()
        assert run(command(model, tmp_path / "whole", server.url, name), log) == 0, log.read_text()[-3000:]
        seconds = time.monotonic() - begin
        # The mount point itself: each run begins with an empty one.
        for path in disk.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for attempt in range(100):
            last = attempt == KILLS or time.monotonic() > end
            number = generator.choice(list(ENDS))
            kill = None if last else (number, generator.randrange(5), generator.uniform(0, 2))
            server.respond = Misbehaving()
            code = run(command(model, disk, server.url, name), log, kill)
            kills += code != 0
            assert code in (0, *(ENDS[number] if kill else ())), (code, log.read_text()[-3000:])
            if code == 0:
                break
        ended += 1
        wanted, got = tensors(tmp_path / "whole"), tensors(disk)
        assert (
            wanted
            and got.keys() == wanted.keys()
            and all(torch.equal(got[name], tensor) for name, tensor in wanted.items())
        )
        assert not [path for path in disk.rglob("*") if path.name.startswith(LEFTOVERS) or path.suffix == ".partial"]
        checkpoints = list(disk.rglob("checkpoint-*"))
        assert 0 < len(checkpoints) <= (4 if name == "learn" else 2)
        assert all(checkpoint_fault(path) is None for path in checkpoints)
        print(f"{name}: {attempt + 1} processes, {seconds:.0f} s unkilled", flush=True)
        shutil.rmtree(tmp_path / "whole")
        server.close()
        if time.monotonic() > end:
            break
    print(f"{ended} runs, {kills} of their processes killed")
    assert kills > 0 or MINUTES < 5
