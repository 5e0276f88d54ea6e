"""A reward function changes nothing but its own rewards."""

import asyncio
import os
import random
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from latent_trl.commands.arguments import as_dict
from latent_trl.commands.loading import load_rewards
from latent_trl.rewards import guard
from latent_trl.rewards.calling import RewardCaller
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
