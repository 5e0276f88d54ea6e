"""DAPO's dynamic sampling: groups of equal rewards give way to other prompts' groups."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from tiny_models import latent, latent_config

from latent_trl import LatentActionGRPOConfig, LatentActionGRPOTrainer
from latent_trl.trainer.rollout.dynamic_sampling import (
    draw_prompts,
    equal_groups,
    fresh_rows_needed,
    prompt_key,
    replacements_of,
)
from latent_trl.trainer.rollout.rollout import Rollout

COMMON = {
    "use_cpu": True,
    "bf16": False,
    "per_device_train_batch_size": 8,
    "num_generations": 2,
    "max_completion_length": 5,
    "logging_steps": 1,
    "learning_rate": 1e-2,
    "beta": 0.1,
    "num_iterations": 2,
    "save_strategy": "no",
    "disable_tqdm": True,
    "dynamic_sampling_rounds": 6,
}


def test_equal_groups():
    nan = torch.nan
    rewards = torch.tensor([1.0, 1.0, 0.0, 1.0, nan, 1.0, nan, nan, 0.3, 0.3 + 1e-9])
    assert equal_groups(rewards, 2).tolist() == [True, False, True, True, True]


def test_replacements_stay_on_their_process():
    equal = torch.tensor([True, False, True, True])
    fresh = torch.tensor([False, True, False, False])
    # Two processes with two groups each, and two fresh groups each.
    assert replacements_of(equal, fresh, rows=4, fresh_rows=4, group_size=2) == [(0, 0), (2, 2), (3, 3)]
    assert fresh_rows_needed(equal, rows=4, group_size=2) == 4
    # Groups that lie across processes give way to the group in the same place.
    assert replacements_of(equal, fresh, rows=3, fresh_rows=3, group_size=4) == [(0, 0), (2, 2), (3, 3)]
    assert fresh_rows_needed(equal, rows=3, group_size=4) == 3


def test_drawn_prompts_are_others_while_there_are_others():
    data = [{"prompt": str(i)} for i in range(6)]
    seen = {prompt_key({"prompt": text}) for text in "012"}
    drawn = draw_prompts(data, 3, seen, seed=0)
    assert {row["prompt"] for row in drawn} == {"3", "4", "5"}
    assert len(draw_prompts(data, 5, seen, seed=0)) == 5
    assert [r["prompt"] for r in draw_prompts(data[:1], 3, seen, seed=0)] == ["0"] * 3


class CountingRows:
    """Map-style rows that ask one question about different pictures, and count how many were read."""

    def __init__(self, count: int):
        self.count, self.read = count, 0

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        self.read += 1
        return {"prompt": [{"role": "user", "content": "what"}], "images": [image(index)]}


@pytest.mark.parametrize("name", ["images", "image"])
def test_prompts_are_told_apart_by_their_pictures(name):
    def row(picture):
        return {"prompt": "what", name: [picture] if name == "images" else picture}

    assert prompt_key(row(image(1))) == prompt_key(row(image(1)))
    assert prompt_key(row(image(1))) != prompt_key(row(image(2)))
    assert prompt_key(row(image(1))) != prompt_key(row(image(1).resize((8, 32))))
    assert prompt_key(row(image(1))) != prompt_key(row(image(1).convert("L")))
    assert prompt_key({**row(image(1)), "answer": 1}) == prompt_key({**row(image(1)), "answer": 2})


def test_one_question_about_many_pictures_reads_a_bounded_number_of_rows():
    data = CountingRows(2000)
    seen = {prompt_key(data[i]) for i in range(4)}
    data.read = 0
    drawn = draw_prompts(data, 4, seen, seed=0)
    assert len({prompt_key(row) for row in drawn}) == 4 and not seen & {prompt_key(row) for row in drawn}
    assert data.read <= 8
    # Where all rows are the same prompt, too, no more are read than could be needed.
    same = CountingRows(2000)
    same.__class__ = type("Same", (CountingRows,), {"__getitem__": lambda self, i: CountingRows.__getitem__(self, 0)})
    assert len(draw_prompts(same, 4, {prompt_key(same[0])}, seed=0)) == 4
    assert same.read <= 1 + 5


def image(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (16, 16, 3), dtype=np.uint8))


def rows(family: str) -> list[dict]:
    """Every other prompt is one whose rewards are always equal; lengths differ, and images where there are any."""
    return [
        {
            "prompt": [{"role": "user", "content": "what " * (1 + i % 5) + str(i)}],
            "dead": i % 2 == 0,
            **({"images": [image(i)] * (1 + i % 2)} if family != "llama" else {}),
        }
        for i in range(24)
    ]


def reward(completions, dead, log_extra, **columns):
    log_extra("dead", [int(d) for d in dead])
    return [0.5 if d else float(i % 2) for i, d in enumerate(dead)]


def build(folder, family, **options):
    model, tiny = latent(family, latent_config(use_projector=False) if family == "llama" else None)
    trainer = LatentActionGRPOTrainer(
        model,
        reward,
        LatentActionGRPOConfig(str(folder), **{**COMMON, **options}),
        train_dataset=Dataset.from_list(rows(family)),
        processing_class=tiny.processor,
    )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer


@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("family", ["llama", "llava", "qwen2_5_vl"])
def test_equal_groups_give_way_to_others(tmp_path, family, reuse):
    trainer = build(tmp_path, family, reuse_context_states=reuse)
    torch.manual_seed(0)
    batch = trainer._generate_and_score_completions([rows(family)[i] for i in (0, 0, 2, 2, 5, 5, 4, 4)])
    metrics = trainer._metrics["train"]
    assert metrics["dynamic_sampling/equal_groups_before"] == [0.75]
    assert metrics["dynamic_sampling/equal_groups_left"] == [0.0]
    assert metrics["dynamic_sampling/replaced_groups"] == [3]
    assert (batch["advantages"].abs() > 0.1).all()
    # Metrics and the table of completions speak of the batch that is learned from, once.
    assert metrics["reward"] == [0.5] and len(metrics["completions/mean_length"]) == 1
    assert list(trainer._logs["extra"]["dead"]) == [0] * 8
    # What the replaced rows carry belongs to them: their codes are scored as they were sampled.
    mask = batch["completion_mask"].bool()
    sampled = batch["sampling_per_token_logps"]
    for name in ("old_per_token_logps", "ref_per_token_logps"):
        torch.testing.assert_close(batch[name][mask], sampled[mask], atol=5e-5, rtol=5e-5)
    trainer._compute_loss(trainer.model, batch).backward()
    scored = trainer.score(trainer.model, Rollout.from_batch(batch))
    torch.testing.assert_close(scored.log_probs[mask], sampled[mask], atol=5e-5, rtol=5e-5)


def test_tokens_of_all_rounds_are_counted(tmp_path):
    trainer = build(tmp_path, "llama")
    trainer._generate_and_score_completions([rows("llama")[i] for i in (0, 0, 2, 2, 5, 5, 4, 4)])
    counted = trainer.state.num_input_tokens_seen
    quiet = build(tmp_path, "llama", dynamic_sampling_rounds=0)
    quiet._generate_and_score_completions([rows("llama")[i] for i in (0, 0, 2, 2, 5, 5, 4, 4)])
    assert counted > 1.5 * quiet.state.num_input_tokens_seen
    assert trainer._metrics["train"]["num_tokens"] == [counted]


def test_rounds_end_when_there_is_nothing_better(tmp_path):
    trainer = build(tmp_path, "llama", dynamic_sampling_rounds=2)
    trainer.train_dataset = trainer.train_dataset.filter(lambda row: row["dead"])
    batch = trainer._generate_and_score_completions([rows("llama")[i] for i in (0, 0, 2, 2, 6, 6, 4, 4)])
    assert trainer._metrics["train"]["dynamic_sampling/rounds"] == [2]
    assert trainer._metrics["train"]["dynamic_sampling/equal_groups_left"] == [1.0]
    assert (batch["advantages"] == 0).all()


def test_a_run_with_dynamic_sampling_is_a_function_of_its_seed(tmp_path):
    logs = []
    for name in ("one", "two"):
        trainer = build(tmp_path / name, "llava", max_steps=4)
        trainer.train()
        logs.append([{k: v for k, v in log.items() if "time" not in k} for log in trainer.state.log_history[:-1]])
    assert logs[0] == logs[1]
    assert all(log["dynamic_sampling/equal_groups_left"] == 0 for log in logs[0] if "reward" in log)


def test_streamed_data_are_refused(tmp_path):
    model, tiny = latent("llama", latent_config(use_projector=False))
    with pytest.raises(ValueError, match="`dynamic_sampling_rounds` draws prompts at random"):
        LatentActionGRPOTrainer(
            model,
            reward,
            LatentActionGRPOConfig(str(tmp_path), max_steps=1, **COMMON),
            train_dataset=Dataset.from_list(rows("llama")).to_iterable_dataset(),
            processing_class=tiny.processor,
        )
