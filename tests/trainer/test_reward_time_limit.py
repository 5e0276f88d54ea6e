"""A reward function that never returns ends a run with its name, and nothing wrong is learned or saved."""

import asyncio
import threading
import time

import pytest
import torch
from datasets import Dataset
from rl_models import target_problem
from tiny_models import llama, make_tokenizer

from latent_trl import (
    LatentActionGRPOConfig,
    LatentActionGRPOTrainer,
    LatentActionPPOConfig,
    LatentActionPPOTrainer,
    PlanBanditConfig,
    PlanBanditTrainer,
    PlanConfig,
    PlanModel,
    PlanSpaceConfig,
    PlanSpaceTrainer,
)
from latent_trl.evaluation.answers import score_answers
from latent_trl.rewards.calling import RewardCaller, RewardError
from latent_trl.trainer.run.manifest import newest_whole_checkpoint

ROWS = [{"note": i} for i in range(2)]
SAMPLES = (ROWS, ["a", "b"], ["x", "y"], [[1], [2]])
released = threading.Event()


def hangs(completions, **columns):
    released.wait(60)
    return [0.0] * len(completions)


async def waits(completions, **columns):
    await asyncio.sleep(60)


async def blocks(completions, **columns):
    released.wait(60)
    return [0.0] * len(completions)


async def refuses_to_be_cancelled(completions, **columns):
    end = time.monotonic() + 60
    while time.monotonic() < end and not released.is_set():
        try:
            await asyncio.sleep(0.05)
        except asyncio.CancelledError:
            continue


def yields(completions, **columns):
    for _ in completions:
        released.wait(60)
        yield 0.0


def counts(completions, **columns):
    return [float(len(text)) for text in completions]


@pytest.fixture(autouse=True)
def left_behind():
    """What a test leaves behind ends with it."""
    released.clear()
    yield
    released.set()


@pytest.mark.parametrize("function", [hangs, waits, blocks, refuses_to_be_cancelled, yields])
def test_a_function_that_does_not_return_is_named_and_the_next_call_works(function):
    call = RewardCaller([counts, function], timeout=0.3)
    begin = time.monotonic()
    with pytest.raises(
        RewardError, match=rf"'{function.__name__}' has not returned within 0.3 s \(`timeout`\) on a ba"
    ):
        call.score(*SAMPLES)
    assert time.monotonic() - begin < 5
    assert RewardCaller([counts, async_counts], timeout=5).score(*SAMPLES) == [[1.0, 1.0], [2.0, 2.0]]


async def async_counts(completions, **columns):
    await asyncio.sleep(0)
    return [2.0 * len(text) for text in completions]


def test_only_the_one_that_is_late_is_named():
    with pytest.raises(RewardError, match="'waits' has not returned"):
        RewardCaller([async_counts, waits], timeout=0.3).score(*SAMPLES)


def test_a_time_out_of_the_function_s_own_is_its_error():
    def gives_up(**columns):
        raise TimeoutError("the socket")

    async def gives_up_later(**columns):
        raise TimeoutError("the socket")

    for function in (gives_up, gives_up_later):
        with pytest.raises(RewardError, match="raised TimeoutError: the socket"):
            RewardCaller(function, timeout=5).score(*SAMPLES)


def test_within_its_time_a_function_runs_as_without_a_limit():
    seen = {}

    def looks(completions, **columns):
        seen[threading.current_thread() is threading.main_thread()] = torch.is_grad_enabled()
        return [torch.tensor(1.0)] * len(completions)

    with torch.no_grad():
        assert RewardCaller(looks, timeout=60).score(*SAMPLES) == RewardCaller(looks).score(*SAMPLES)
    assert seen == {True: False, False: False}

    def raises(**columns):
        raise KeyError("x")

    for limit in (None, 60):
        with pytest.raises(RewardError, match="raised KeyError: 'x' on sample 0 of 2"):
            RewardCaller(raises, timeout=limit).score(*SAMPLES)


def test_a_limit_is_given_to_answers_and_searches_with_the_caller():
    with pytest.raises(RewardError, match="'hangs' has not returned within 0.2 s"):
        rows = [{"prompt": "a"}, {"prompt": "b"}]
        score_answers(RewardCaller(hangs, timeout=0.2), rows, ["x", "y"], [[1], [2]])


@pytest.mark.parametrize("seconds", [0, -1.0, float("nan")])
def test_a_limit_that_is_none(seconds):
    with pytest.raises(ValueError, match="`timeout` must be above 0 seconds"):
        RewardCaller(counts, timeout=seconds)
    for config in (LatentActionGRPOConfig, PlanBanditConfig, PlanSpaceConfig):
        with pytest.raises(ValueError, match="`reward_timeout` must be above 0 seconds"):
            config("unused", use_cpu=True, reward_timeout=seconds)


class HangsLater:
    __name__ = "hangs_later"

    def __init__(self, after: int):
        self.left = after

    def __call__(self, completions, **columns):
        self.left -= 1
        if self.left < 0:
            released.wait(60)
        return [float(len(set(str(completion)))) for completion in completions]


@pytest.mark.parametrize("kind", ["grpo", "ppo"])
def test_a_run_ends_with_the_step_and_goes_on_from_its_last_checkpoint(kind, tmp_path):
    options = {"use_cpu": True, "bf16": False, "disable_tqdm": True, "per_device_train_batch_size": 8}
    options |= {"max_completion_length": 1, "max_steps": 4, "save_steps": 1, "logging_steps": 1, "reward_timeout": 20}
    options |= {"num_iterations": 1, "steps_per_generation": 1}

    def trainer(folder, reward, **changed):
        model, tokenizer, _ = target_problem()
        if kind == "grpo":
            make, args = LatentActionGRPOTrainer, LatentActionGRPOConfig(folder, num_generations=4, **options | changed)
        else:
            make, args = LatentActionPPOTrainer, LatentActionPPOConfig(folder, **options | changed)
        rows = Dataset.from_list([{"prompt": "1 a"}, {"prompt": "2 b"}] * 8)
        return make(model, reward, args, train_dataset=rows, processing_class=tokenizer)

    whole = trainer(str(tmp_path / "whole"), HangsLater(100))
    whole.train()
    hung = trainer(str(tmp_path / "hung"), HangsLater(2), reward_timeout=0.5)
    with pytest.raises(
        RewardError, match=r"'hangs_later' has not returned within 0.5 s \(`reward_timeout`\) at step 2"
    ):
        hung.train()
    assert newest_whole_checkpoint(tmp_path / "hung").endswith("checkpoint-2")
    assert not (tmp_path / "hung" / "checkpoint-3").exists()
    again = trainer(str(tmp_path / "hung"), HangsLater(100))
    again.train(resume_from_checkpoint=True)
    expected = whole.model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.model.state_dict().items())


@pytest.mark.parametrize("kind", ["space", "bandit"])
def test_the_trainers_of_plans_have_it(kind, tmp_path):
    tiny = llama(num_hidden_layers=2)
    tiny.model.generation_config.eos_token_id = list(range(2, 140))
    model = PlanModel(tiny.model, PlanConfig(num_plans=4, depth=1, rank=2))
    shared = {"use_cpu": True, "disable_tqdm": True, "reward_timeout": 0.3, "max_steps": 2, "max_completion_length": 6}
    rows = Dataset.from_list([{"prompt": f"what {i}"} for i in range(8)])
    if kind == "space":
        args = PlanSpaceConfig(str(tmp_path), branch_min_prob=0.005, answers_per_prompt=3, **shared)
        trainer = PlanSpaceTrainer(model, args, rows, rows, make_tokenizer(), reward_funcs=hangs)
        run = trainer.evaluate
    else:
        args = PlanBanditConfig(str(tmp_path), rollout_prompts=2, **shared)
        run = PlanBanditTrainer(model, hangs, args, rows, None, make_tokenizer()).train
    with pytest.raises(RewardError, match=r"'hangs' has not returned within 0.3 s \(`reward_timeout`\)"):
        run()
