"""Figures of an evaluation are means over its rows, however they fall into batches and processes."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import debug_launcher
from every_trainer import build
from rl_models import prompts

from latent_trl import ActionLaw

ROWS = 5
SHARED = ("eval_loss", "eval_reward", "eval_rewards/of_prompt/mean", "eval_kl", "eval_entropy")
SHARED += ("eval_completions/mean_length", "eval_completions/clipped_ratio", "eval_mine")


def of_prompt(prompts, log_metric, **columns):
    """The number of the prompt, squared."""
    numbers = [float(prompt.split()[-1]) ** 2 for prompt in prompts]
    log_metric("mine", 1.0)
    return numbers


def evaluate(folder, kind: str, rows: int, count: int = ROWS, **options) -> tuple:
    """Figures of an evaluation by a policy that has moved from its reference, and the trainer."""
    options = {"per_device_eval_batch_size": rows, "loss_type": "grpo", "eval_strategy": "no", **options}
    if kind == "ppo":
        options["loss_type"] = "dapo"
    trainer = build(kind, Path(folder), 1, reward=of_prompt, **options)
    trainer.eval_dataset = prompts(count)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.model.policy.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    returned = trainer.evaluate()
    return {**trainer.state.log_history[-1], **returned}, trainer


@pytest.mark.parametrize("kind", ["grpo", "rloo", "ppo"])
def test_a_short_last_batch_counts_by_its_rows(kind, tmp_path):
    """Five rows by two and by five."""
    short, _ = evaluate(tmp_path, kind, 2)
    whole, _ = evaluate(tmp_path, kind, 5)
    assert short["eval_reward"] == pytest.approx(sum(i**2 for i in range(ROWS)) / ROWS)
    for name in set(SHARED) & whole.keys():
        assert short[name] == pytest.approx(whole[name], rel=1e-4, abs=1e-6), name
    # One answer a prompt has nothing to be compared with in RLOO.
    assert abs(whole["eval_loss"]) > 1e-6 or kind == "rloo"
    assert {"eval_loss", "eval_entropy", "eval_kl"} <= whole.keys()


@pytest.mark.parametrize("kind", ["grpo", "ppo"])
def test_the_loss_is_the_mean_of_rows_evaluated_alone(kind, tmp_path):
    if kind == "grpo":
        alone, _ = evaluate(tmp_path, kind, 1)
        whole, _ = evaluate(tmp_path, kind, 5)
        assert alone["eval_loss"] == pytest.approx(whole["eval_loss"], rel=1e-4)
    else:
        # PPO's is a mean over codes; advantages are whitened over a batch, which is left out here.
        found = [evaluate(tmp_path, kind, rows, whiten_advantages=False)[0]["eval_loss"] for rows in (1, 2, 5)]
        assert found == pytest.approx([found[0]] * 3, rel=1e-4)


def test_a_greedy_evaluation_answers_each_prompt_once(tmp_path):
    for sample, copies in ((False, 1), (True, 2)):
        _, trainer = evaluate(tmp_path, "grpo", 2, eval_action_do_sample=sample)
        generated = []
        generate = trainer.model.generate

        def counted(*args, generate=generate, generated=generated, **kwargs):
            output = generate(*args, **kwargs)
            generated.append(len(output.sequences))
            return output

        trainer.model.generate = counted
        trainer.evaluate()
        assert sum(generated) == ROWS * copies


def test_an_evaluation_is_of_its_own_rows_alone(tmp_path):
    """A second evaluation says what the first said, whatever was in between."""
    first, trainer = evaluate(tmp_path, "grpo", 2)
    again = trainer.evaluate()
    assert again["eval_loss"] == pytest.approx(first["eval_loss"], rel=1e-6)
    assert trainer.state.log_history[-1]["eval_reward"] == pytest.approx(first["eval_reward"])


@pytest.mark.parametrize("kind", ["grpo", "ppo"])
def test_a_greedy_evaluation_is_the_same_whatever_the_law_of_rollouts(kind, tmp_path):
    """The law is for sampling: neither answers nor their scores are of it."""
    plain, _ = evaluate(tmp_path, kind, 5)
    other, trainer = evaluate(tmp_path, kind, 5, action_temperature=2.5, action_top_k=3, action_top_p=0.9)
    for name in set(SHARED) & plain.keys():
        assert other[name] == pytest.approx(plain[name], rel=1e-5, abs=1e-7), name
    trainer.model.train()
    assert trainer.law == ActionLaw(2.5, 3, 0.9)


def evaluate_on_two(kind: str, folder: str, count: int) -> None:
    torch.set_num_threads(1)
    figures, trainer = evaluate(folder, kind, 2, count)
    (Path(folder) / f"{trainer.accelerator.process_index}.json").write_text(json.dumps(figures))


@pytest.mark.distributed
@pytest.mark.parametrize("count", [5, 6, 7])
@pytest.mark.parametrize("kind", ["grpo", "ppo", "rloo"])
def test_rows_that_fill_up_the_last_batch_are_not_counted(kind, count, tmp_path):
    """Over two processes of two, of five rows three are answered twice; of six two, both on the second process, and
    of seven one."""
    debug_launcher(evaluate_on_two, (kind, str(tmp_path), count), num_processes=2)
    whole, _ = evaluate(tmp_path, kind, 4, count)
    for rank in (0, 1):
        figures = json.loads((tmp_path / f"{rank}.json").read_text())
        assert figures["eval_reward"] == pytest.approx(sum(i**2 for i in range(count)) / count)
        for name in {*SHARED, "eval_codebook/used", "eval_codebook/perplexity"} & whole.keys():
            # Advantages of PPO are whitened over a batch, and so is its loss. TRL's mean entropy of single actions, as
            # RLOO's completions are, takes no mask.
            if (kind, name) not in (("ppo", "eval_loss"), ("rloo", "eval_entropy")):
                assert figures[name] == pytest.approx(whole[name], rel=1e-3, abs=1e-6), name
