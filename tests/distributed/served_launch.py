"""Server processes and launched trainers, for tests of both together."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

TESTS = Path(__file__).parents[1]
ADDRESS = re.compile(r".* served at (http://127\.0\.0\.1:\d+)\n")


def environment() -> dict[str, str]:
    """That of this process, from which the package and the tests are found."""
    paths = [str(TESTS.parent), str(TESTS), str(TESTS / "serving"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


class ServerProcess:
    """
    A server in a process of its own, which may be killed and begun again at its address.

    Args:
        words (`list[str]`): Its command, to which `--port PORT` is added.
    """

    def __init__(self, words: list[str]):
        self.words, self.port, self.url = words, 0, ""
        self.begin()

    def begin(self) -> None:
        words = [sys.executable, *self.words, "--port", str(self.port)]
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment())

    def wait(self) -> "ServerProcess":
        """Until it listens."""
        found = None
        while found is None:
            line = self.process.stdout.readline()
            assert line, f"The server ended with {self.process.wait()}."
            found = ADDRESS.fullmatch(line)
        self.url = found[1]
        self.port = int(self.url.rpartition(":")[2])
        return self

    def kill(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait(60)


def launch(model: str, output: Path, servers: list[ServerProcess]) -> subprocess.Popen:
    """Two processes of `served_run.py`."""
    output.mkdir(exist_ok=True)
    config = TESTS.parent / "examples" / "accelerate_configs" / "cpu" / "multi_gpu.yaml"
    words = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(config),
        "--main_process_port",
        "0",
    ]
    words += [str(TESTS / "distributed" / "served_run.py"), model, str(output), *(server.url for server in servers)]
    own = {**environment(), "ACCELERATE_USE_CPU": "true"}
    log = (output / "log.txt").open("w")
    return subprocess.Popen(words, env=own, stdout=log, stderr=subprocess.STDOUT)


def ended(run: subprocess.Popen, output: Path, seconds: float) -> list[dict]:
    """What the two processes of a run ended with."""
    code = run.wait(seconds)
    assert code == 0, (output / "log.txt").read_text()[-4000:]
    return [torch.load(output / f"result_{rank}.pt", weights_only=True) for rank in (0, 1)]


def kill_and_bring_back(
    model: str, folder: Path, servers: list[ServerProcess], seconds: float
) -> dict[str, list[dict]]:
    """
    Two runs: one whose servers stay, and one whose second server is killed while a rollout batch may be under way, and
    is there again before the last.

    Returns:
        What the processes of each run ended with, by `whole` and `killed`.
    """
    whole = ended(launch(model, folder / "whole", servers), folder / "whole", seconds)
    output = folder / "killed"
    output.mkdir()
    (output / "hold-5").touch()
    run = launch(model, output, servers)
    until = time.monotonic() + seconds
    for number in (1, 5):
        while not (output / f"step-{number}").exists():
            assert time.monotonic() < until and run.poll() is None, (output / "log.txt").read_text()[-4000:]
            time.sleep(0.02)
        if number == 1:
            # The second rollout batch is next.
            servers[1].kill()
            servers[1].begin()
    servers[1].wait()
    (output / "hold-5").unlink()
    killed = ended(run, output, seconds)
    log = (output / "log.txt").read_text()
    assert f"The rollout server {servers[1].url} failed: " in log
    assert f"The rollout server {servers[1].url} is back, and has the policy." in log
    return {"whole": whole, "killed": killed}


def worst_difference(one: dict, other: dict) -> float:
    """The largest between the weights of two processes."""
    return max((other["weights"][name] - value).abs().max().item() for name, value in one["weights"].items())
