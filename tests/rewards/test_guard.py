"""A reward function changes nothing but its own rewards."""

import asyncio
import os
import random
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
import pytest
import torch

from latent_trl.commands.arguments import as_dict
from latent_trl.commands.loading import load_rewards
from latent_trl.rewards import guard
from latent_trl.rewards.calling import RewardCaller, RewardError
from latent_trl.rewards.exact_match import ExactMatchReward

ROWS = [{"note": ["a", {"b": [1]}]}, {"note": ["c", {"d": [2]}]}]
PROMPTS = [[{"role": "user", "content": [{"type": "text", "text": "x"}]}]] * 2
COMPLETIONS = [[{"role": "assistant", "content": "a"}], [{"role": "assistant", "content": "b"}]]
IDS = [[1, 2], [3]]


def spoil(prompts, completions, completion_ids, note, **columns):
    completions[0][0]["content"] = "changed"
    prompts[0][0]["content"][0]["text"] = "changed"
    completion_ids[0].clear()
    note[0][1]["b"].append(2)
    note.clear()
    for values in (prompts, completions, completion_ids):
        values.pop()
    return [0.0, 0.0]


def lengths(completions, completion_ids, note, **columns):
    assert note == [row["note"] for row in ROWS] and len(completions) == 2
    return [float(len(ids)) + len(completion[0]["content"]) for ids, completion in zip(completion_ids, completions)]


def test_lists_that_one_function_changes_are_whole_for_the_others():
    before = repr((ROWS, PROMPTS, COMPLETIONS, IDS))
    call = RewardCaller([spoil, lengths])
    assert call.score(ROWS, PROMPTS, COMPLETIONS, IDS) == [[0.0, 0.0], [3.0, 2.0]]
    assert repr((ROWS, PROMPTS, COMPLETIONS, IDS)) == before


def drawn():
    return random.random(), np.random.rand(), torch.rand(1).item()


def seeds(completions, **columns):
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    return [random.random() + torch.rand(1).item() for _ in completions]


async def seeds_later(completions, **columns):
    await asyncio.sleep(0)
    return seeds(completions)


@pytest.mark.parametrize("function", [seeds, seeds_later])
def test_a_function_that_seeds_the_generators_leaves_them_as_they_were(function):
    for _ in range(2):
        drawn()
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    wanted = drawn()
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    RewardCaller(function).score(ROWS, PROMPTS, COMPLETIONS, IDS)
    assert drawn() == wanted


def test_the_working_directory_is_put_back(tmp_path):
    before = os.getcwd()

    def leaves(completions, **columns):
        os.chdir(tmp_path)
        return [1.0] * len(completions)

    def fails(completions, **columns):
        os.chdir(tmp_path)
        raise RuntimeError

    for function in (leaves, fails):
        try:
            RewardCaller(function).score(ROWS, PROMPTS, COMPLETIONS, IDS)
        except ValueError:
            pass
        assert os.getcwd() == before


def test_one_name_of_a_reward_stands_alone():
    (reward,) = load_rewards("exact_match")
    assert isinstance(reward, ExactMatchReward)


@pytest.mark.parametrize(
    "text",
    [
        '{"judge": {"api_key": "K-1234-secret"',
        "K-1234-secret",
        '["K-1234-secret"]',
        '"K-1234-secret"',
        "{'a': K-1234-secret}",
    ],
)
def test_options_of_rewards_that_cannot_be_read_are_not_quoted(text):
    with pytest.raises(ValueError, match="`reward_kwargs` must be a JSON object") as error:
        as_dict("reward_kwargs", text)
    assert "1234" not in str(error.value)


def test_the_command_does_not_quote_them_either():
    words = ["grpo", "--model_name_or_path", "m", "--dataset_name", "shapes", "--reward_funcs", "judge"]
    words += ["--reward_kwargs", '{"judge": {"api_key": "K-1234-secret"']
    done = subprocess.run([sys.executable, "-m", "latent_trl", *words], capture_output=True, text=True, timeout=300)
    assert done.returncode and "1234" not in done.stdout + done.stderr and "`reward_kwargs`" in done.stderr


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_function_that_does_not_return_is_named(monkeypatch, asynchronous):
    said = []
    monkeypatch.setattr(guard, "SLOW_AFTER", 0.1)
    monkeypatch.setattr(guard.logger, "warning", said.append)

    def slow(completions, **columns):
        time.sleep(0.35)
        return [1.0] * len(completions)

    async def slow_later(completions, **columns):
        await asyncio.sleep(0.35)
        return [1.0] * len(completions)

    def quick(completions, **columns):
        return [1.0] * len(completions)

    RewardCaller([quick, slow_later if asynchronous else slow]).score(ROWS, PROMPTS, COMPLETIONS, IDS)
    assert said and all("'slow_later'" in text if asynchronous else "'slow'" in text for text in said)
    time.sleep(0.3)
    assert len(said) <= 4


def settings():
    found = (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads(), torch.get_default_device())
    found += (torch.get_deterministic_debug_mode(), torch.is_anomaly_enabled(), sys.getrecursionlimit(), os.getcwd())
    # A default device that is set, if only to the CPU, is a mode that every call passes.
    found += (torch._C._len_torch_function_stack(),)
    return found, signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT), drawn_without_trace()


def drawn_without_trace():
    return random.getstate()[1][:3], np.random.get_state()[1][:3].tolist(), torch.get_rng_state()[:99].tolist()


def removed_directory():
    folder = tempfile.mkdtemp()
    os.chdir(folder)
    os.rmdir(folder)


CHANGES = {
    "dtype": lambda: torch.set_default_dtype(torch.float64),
    "gradients": lambda: torch.set_grad_enabled(False),
    "threads": lambda: torch.set_num_threads(torch.get_num_threads() + 3),
    "device": lambda: torch.set_default_device("meta"),
    "deterministic": lambda: torch.use_deterministic_algorithms(True),
    "anomalies": lambda: torch.autograd.set_detect_anomaly(True),
    "recursion": lambda: sys.setrecursionlimit(10_000),
    "SIGTERM": lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN),
    "SIGINT": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    "a directory that is gone": removed_directory,
}


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_what_a_run_relies_on_is_put_back(change, raises):
    def changes(completions, **columns):
        CHANGES[change]()
        return [1 / 0 if raises else 0.0] * len(completions)

    before = settings()
    call = RewardCaller(changes)
    if raises:
        with pytest.raises(RewardError, match="ZeroDivisionError"):
            call.score(ROWS, PROMPTS, COMPLETIONS, IDS)
    else:
        assert call.score(ROWS, PROMPTS, COMPLETIONS, IDS) == [[0.0, 0.0]]
    assert settings() == before


def test_the_own_directory_that_a_reward_removes_is_named(monkeypatch, tmp_path):
    told = []
    monkeypatch.setattr(guard.logger, "warning_once", told.append)
    (tmp_path / "own").mkdir()
    monkeypatch.chdir(tmp_path / "own")

    def removes(completions, **columns):
        os.rmdir(tmp_path / "own")
        return [0.0] * len(completions)

    assert RewardCaller(removes).score(ROWS, PROMPTS, COMPLETIONS, IDS) == [[0.0, 0.0]]
    assert len(told) == 1 and "which is gone" in told[0]


def test_environment_variables_that_change_are_named(monkeypatch):
    told = []
    monkeypatch.setattr(guard.logger, "warning_once", told.append)
    monkeypatch.setenv("SOME_VARIABLE", "1")

    def changes(completions, **columns):
        os.environ["SOME_VARIABLE"] = "2"
        return [0.0] * len(completions)

    RewardCaller(changes).score(ROWS, PROMPTS, COMPLETIONS, IDS)
    assert len(told) == 1 and "['SOME_VARIABLE']" in told[0]


LEAVING = {
    "SystemExit": SystemExit(0),
    "GeneratorExit": GeneratorExit(),
    "CancelledError": asyncio.CancelledError(),
    "BaseException": BaseException("x"),
}


@pytest.mark.parametrize("timeout", [None, 20])
@pytest.mark.parametrize("kind", ["plain", "async"])
@pytest.mark.parametrize("name", LEAVING)
def test_a_function_that_wants_to_end_the_process_is_named(name, kind, timeout):
    def leaves(completions, **columns):
        raise LEAVING[name]

    async def leaves_later(completions, **columns):
        raise LEAVING[name]

    call = RewardCaller(leaves if kind == "plain" else leaves_later, timeout=timeout)
    with pytest.raises(RewardError, match=f"leaves.*raised {name}"):
        call.score(ROWS, PROMPTS, COMPLETIONS, IDS)

    async def later(completions, **columns):
        return [1.0] * len(completions)

    # The loop of async functions is still there.
    assert RewardCaller(later).score(ROWS, PROMPTS, COMPLETIONS, IDS) == [[1.0, 1.0]]


class Nameless:
    def __repr__(self):
        raise RuntimeError("x")


@pytest.mark.parametrize(
    "value",
    [torch.ones(2, device="meta"), torch.ones(2).to_sparse(), [Nameless()] * 2, Nameless()],
    ids=["meta", "sparse", "in a list", "alone"],
)
def test_what_has_no_numbers_is_named(value):
    with pytest.raises(RewardError, match="returned|must return"):
        RewardCaller(lambda completions, **columns: value).score(ROWS, PROMPTS, COMPLETIONS, IDS)
