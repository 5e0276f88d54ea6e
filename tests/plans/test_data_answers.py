"""Plans from the answers of a data set: what is read of rows, who learns what, and that styles become plans."""

import math

import pytest
import torch
from datasets import Dataset
from PIL import Image
from test_branching import picture_rows
from test_plan_trainers import llama, losses, space_args
from tiny_models import make_tokenizer

from latent_trl import PlanConfig, PlanModel, PlanSpaceTrainer
from latent_trl.data.prompts import PromptEncoder
from latent_trl.data.rows import RowError
from latent_trl.plans.assignment import sinkhorn
from latent_trl.plans.data_answers import data_answers
from latent_trl.plans.scoring import log_likelihoods
from latent_trl.trainer.plans.space_trainer import assigned_pairs

END = 2


def answers_of(rows, column="answer", processor=None, length=20):
    encoder = PromptEncoder(processor or make_tokenizer())
    return data_answers(encoder, [{"_row": i, **row} for i, row in enumerate(rows)], column, [END], length)


def test_rows_of_a_prompt_share_their_answers():
    rows = [
        {"prompt": "what?", "answer": "this"},
        {"prompt": "who?", "answer": ["me", " me ", "you"]},
        {"prompt": "what?", "answer": ["that", "this"]},
    ]
    found = answers_of(rows)
    assert [[one.text for one in own] for own in found] == [["this", "that"], ["me", "you"], ["this", "that"]]
    tokenizer = make_tokenizer()
    for own in found:
        for one in own:
            assert one.token_ids[-1] == END and one.ended
            assert tokenizer.decode(one.token_ids, skip_special_tokens=True).strip() == one.text


def test_answers_of_conversations_end_where_the_template_ends_a_turn():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }} {{ m['content'] }}{{ eos_token }} behind{% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}"
    )
    rows = [{"prompt": [{"role": "user", "content": "what?"}], "completion": [{"role": "assistant", "content": "it"}]}]
    ((one,),) = answers_of(rows, "completion", tokenizer)
    assert one.text == "it" and one.token_ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(one.token_ids).endswith(tokenizer.eos_token) and "behind" not in tokenizer.decode(
        one.token_ids
    )


def test_long_answers_have_not_ended():
    ((short, long),) = answers_of([{"prompt": "what?", "answer": ["a", "a b c d e f g h i j k"]}], length=5)
    assert short.ended and not long.ended


def test_the_same_question_of_two_pictures_is_two_prompts(make_tiny):
    tiny = make_tiny("llava")
    prompt = [{"role": "user", "content": "what?"}]
    pictures = [Image.new("RGB", (16, 16), (40, 90 * i, 20)) for i in range(2)]
    rows = [{"prompt": prompt, "images": [picture], "answer": f"{i}"} for i, picture in enumerate(pictures)]
    found = answers_of(rows, processor=tiny.processor)
    assert [[one.text for one in own] for own in found] == [["0"], ["1"]]


@pytest.mark.parametrize("value", [None, "", [], ["a", " "], [1], 3, ["a", None]])
def test_rows_without_answers_are_named(value):
    with pytest.raises(RowError, match="Row 1: `answer` must be a text, or a list of texts"):
        answers_of([{"prompt": "what?", "answer": "a"}, {"prompt": "what?", "answer": value}])


def test_answers_of_prompts_with_one_are_shared_out_among_the_plans():
    torch.manual_seed(0)
    scores = [torch.randn(1, 3) for _ in range(6)] + [torch.randn(2, 3)]
    found = assigned_pairs(scores, 0.3)
    assert sorted(found[:3], key=lambda one: one[2]) == found[:3] and [one[0] for one in found[:3]] == [6] * 3
    single = found[3:]
    assert [(row, m) for row, m, _ in single] == [(row, 0) for row in range(6)]
    # By hand: each answer's column of the transport plan is a law over plans, which have two answers each.
    law = sinkhorn(torch.cat(scores[:6]).T, 0.3)
    torch.testing.assert_close(law.sum(dim=0), torch.ones(6))
    torch.testing.assert_close(law.sum(dim=1), torch.full((3,), 2.0), atol=1e-3, rtol=0)
    assert [plan for _, _, plan in single] == law.argmax(dim=0).tolist()
    # How likely an answer is under all plans alike does not matter.
    assert assigned_pairs([one + 5 * row for row, one in enumerate(scores)], 0.3) == found


WAYS = ["aa", "bb", "cc", "dd"]


def learned(folder, rows, batch):
    torch.manual_seed(0)
    tiny = llama(num_hidden_layers=2)
    tiny.model.generation_config.eos_token_id = END
    model = PlanModel(tiny.model, PlanConfig(num_plans=4, depth=0, rank=8))
    options = {"max_steps": 60, "per_device_train_batch_size": batch, "learning_rate": 5e-2, "logging_steps": 5}
    args = space_args(folder, **options, answers_column="answer", answers_per_prompt=4, eval_strategy="no")
    trainer = PlanSpaceTrainer(model, args, Dataset.from_list(rows), None, make_tokenizer())
    trainer.train()
    gains = [row["assignment/gain"] for row in trainer.state.log_history if "assignment/gain" in row]
    assert gains[-1] > gains[0] + 3
    return trainer


def test_plans_say_all_the_ways_in_which_the_data_answer(tmp_path):
    trainer = learned(tmp_path, [{"prompt": f"what {i}", "answer": WAYS} for i in range(24)], 6)
    figures = trainer.evaluate(Dataset.from_list([{"prompt": f"what {i}", "answer": WAYS} for i in range(100, 108)]))
    assert figures["eval_coverage"] > 0.8


def test_of_data_with_one_answer_a_prompt_each_plan_learns_one_way(tmp_path):
    trainer = learned(tmp_path, [{"prompt": f"what {i}", "answer": WAYS[i % 4]} for i in range(96)], 24)
    rows = [{"_row": i, "prompt": f"what {i}", "answer": WAYS} for i in range(100, 108)]
    answers = [[one.token_ids for one in own] for own in data_answers(trainer.encoder, rows, "answer", [END], 6)]
    scores = log_likelihoods(trainer.model, trainer.encoder, [trainer.encoder(row) for row in rows], answers)
    best = torch.stack(scores).argmax(dim=2)
    # A way of answering has a plan of its own, the same for every prompt.
    assert (best == best.mode(dim=0).values).float().mean() > 0.9
    assert len(set(best.mode(dim=0).values.tolist())) == 4


def test_pictures_and_text_alone_are_learned_from_together(tmp_path, make_tiny):
    tiny = make_tiny("llava")
    rows = [{**row, "answer": [f"{i}", "both"]} for i, row in enumerate(picture_rows())]
    rows += [{"prompt": [{"role": "user", "content": "hello"}], "images": [], "answer": ["hi", "both", "ho"]}]
    model = PlanModel(tiny.model, PlanConfig(num_plans=3, depth=1))
    args = space_args(tmp_path, max_steps=2, max_completion_length=12, answers_column="answer")
    trainer = PlanSpaceTrainer(model, args, rows, rows, tiny.processor)
    trainer.train()
    assert all(math.isfinite(loss) for loss in losses(trainer)) and len(losses(trainer)) == 2


@pytest.mark.parametrize(
    "rows, options, message",
    [
        ([{"prompt": "a", "answer": "b"}], {"answers_column": "gold"}, "`train_dataset` has the columns"),
        ([{"prompt": "a", "answer": "b"}] * 4, {}, "4 plans, and the alternatives to all prompts have 1 different"),
        (
            [{"prompt": "a", "answer": "b"}] * 4,
            {"max_completion_length": 1},
            "no answer of at most `max_completion_length=1` tokens that is not empty. Raise it.$",
        ),
    ],
)
def test_data_that_teach_no_plans_are_refused_before_learning(tmp_path, rows, options, message):
    options = {"answers_column": "answer", **options, "eval_strategy": "no"}
    backbone = llama(num_hidden_layers=2).model
    backbone.generation_config.eos_token_id = END
    model = PlanModel(backbone, PlanConfig(num_plans=4, depth=1))
    with pytest.raises(ValueError, match=message):
        PlanSpaceTrainer(model, space_args(tmp_path, **options), rows, None, make_tokenizer()).train()
