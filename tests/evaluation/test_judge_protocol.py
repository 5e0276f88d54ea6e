"""The judge protocol on judgements worked out by hand."""

import math

import pytest

from latent_trl.evaluation.judge_protocol import (
    compare_judge_reports,
    judge_model,
    run_judge_protocol,
    sample_keys,
    summarize_judgements,
)
from latent_trl.rewards.judge_template import Judgement


def judgement(*ratios, reference=4.0):
    aspects = ["wit", "tone"][: len(ratios)]
    answer = {aspect: ratio * reference for aspect, ratio in zip(aspects, ratios, strict=True)}
    return Judgement(answer, dict.fromkeys(aspects, reference))


class WrittenJudge:
    """Grades by a table, and remembers what it was asked."""

    def __init__(self, table):
        self.table = table
        self.asked = []

    async def score(self, prompts, completions, references, images=None):
        self.asked.append((prompts, completions, references, images))
        return [self.table[completion] for completion in completions]


def test_means_run_over_aspects_samples_and_generations():
    judgements = [
        [judgement(1.0, 0.5), judgement(0.5, 0.5)],
        [judgement(1.0, 1.0), judgement(1.5, 0.5)],
    ]
    report = summarize_judgements(["a", "b"], judgements)
    assert report.generations == pytest.approx([0.625, 1.0])
    assert report.mean == pytest.approx(0.8125)
    assert report.std == pytest.approx(0.375 / math.sqrt(2))
    assert report.aspects == pytest.approx({"wit": 1.0, "tone": 0.625})
    assert report.samples == pytest.approx({"a": 0.875, "b": 0.75})
    wit, tone = report.aspect_intervals["wit"], report.aspect_intervals["tone"]
    assert (wit.low, wit.estimate, wit.high, wit.count) == pytest.approx((1.0, 1.0, 1.0, 2))
    assert (tone.low, tone.estimate, tone.high) == pytest.approx((0.5, 0.625, 0.75))
    assert report.interval.estimate == pytest.approx(0.8125)
    assert (report.interval.low, report.interval.high) == pytest.approx((0.75, 0.875))
    assert (report.num_samples, report.num_judged, report.num_unscored) == (2, 4, 0)
    assert str(report) == "0.812 ± 0.265 (0.812 [0.750, 0.875], 2 samples)"


def test_the_value_of_an_answer_is_the_mean_of_ratios_where_the_reward_is_the_ratio_of_sums():
    uneven = Judgement({"wit": 8.0, "tone": 4.0}, {"wit": 4.0, "tone": 8.0})
    assert uneven.ratio == 1.0
    assert summarize_judgements(["a"], [[uneven]]).mean == 1.25


def test_what_was_not_scored_is_left_out_and_counted():
    judgements = [[judgement(1.0), None, None], [judgement(0.5), judgement(2.0), None]]
    report = summarize_judgements(["a", "b", "c"], judgements)
    assert report.generations == pytest.approx([1.0, 1.25])
    assert report.samples == pytest.approx({"a": 0.75, "b": 2.0})
    assert report.aspects == pytest.approx({"wit": 3.5 / 3})
    assert (report.num_samples, report.num_judged, report.num_unscored) == (3, 3, 3)
    assert "3 samples, 3 not scored" in str(report)


def test_a_generation_without_any_score_is_no_zero():
    report = summarize_judgements(["a"], [[judgement(1.5)], [None]])
    assert report.mean == 1.5 and math.isnan(report.std) and math.isnan(report.generations[1])
    assert "nan" not in str(report) and str(report).startswith("1.500 (")


def test_a_judge_is_asked_for_every_generation():
    judge = WrittenJudge({"good": judgement(1.5), "bad": judgement(0.5)})
    report = run_judge_protocol(
        judge,
        keys=["a", "b"],
        prompts=["p", "q"],
        generations=[["good", "bad"], ["good", "good"], ["bad", "bad"]],
        references=["r", "s"],
        images=[["x"], []],
    )
    assert report.generations == [1.0, 1.5, 0.5]
    assert report.mean == 1.0 and report.std == pytest.approx(0.5)
    assert judge.asked[1] == (["p", "q"], ["good", "good"], ["r", "s"], [["x"], []])
    assert len(judge.asked) == 3


def test_systems_are_compared_on_the_samples_that_both_have():
    first = summarize_judgements(["a", "b", "c"], [[judgement(1.0), judgement(2.0), None]])
    second = summarize_judgements(["c", "b", "a"], [[judgement(9.0), judgement(1.5), judgement(0.5)]])
    difference = compare_judge_reports(first, second)
    assert difference.estimate == pytest.approx(0.5) and difference.count == 2
    assert (difference.low, difference.high) == pytest.approx((0.5, 0.5))
    with pytest.raises(ValueError, match="no sample key in common"):
        compare_judge_reports(first, summarize_judgements(["z"], [[judgement(1.0)]]))


def test_keys_must_be_unique():
    for call in (
        lambda keys: summarize_judgements(keys, [[judgement(1.0)] * 3]),
        lambda keys: run_judge_protocol(WrittenJudge({}), keys, [""] * 3, [[""] * 3], [""] * 3),
    ):
        with pytest.raises(ValueError, match=r"`keys` must be unique.*got 3, repeated: \['a'\]"):
            call(["a", "b", "a"])


def test_lists_of_the_wrong_length_are_named():
    with pytest.raises(ValueError, match=r"`generations\[1\]` must have an entry for each of the 2 `keys`; got 1"):
        run_judge_protocol(WrittenJudge({}), ["a", "b"], ["", ""], [["", ""], [""]], ["", ""])
    with pytest.raises(ValueError, match=r"each of the 2 `keys`; got \[2, 1\]"):
        summarize_judgements(["a", "b"], [[None, None], [None]])
    with pytest.raises(ValueError, match="None of the 2 `judgements` was scored"):
        summarize_judgements(["a", "b"], [[None, None]])


class LengthJudge(WrittenJudge):
    """A reply is worth its length over that of the reference."""

    reference_column = "gold"

    async def score(self, prompts, completions, references, images=None):
        self.asked.append((prompts, completions, references, images))
        return [judgement(len(c) / len(r)) for c, r in zip(completions, references)]


def test_a_model_answers_n_times_under_the_law_asked_for():
    from datasets import Dataset
    from tiny_models import latent

    model, tiny = latent("llama")
    prompts = [[{"role": "user", "content": word}] for word in ("one", "two", "three")]
    rows = Dataset.from_dict({"prompt": prompts, "gold": ["abcd"] * 3, "id": [7, 8, 9]})
    options = {"num_generations": 2, "max_new_tokens": 6, "action_top_k": 64}
    seen = []
    judge = LengthJudge({})
    found = judge_model(model, tiny.processor, rows, judge, action_temperature=5.0, progress=seen.append, **options)
    assert found.keys == ["7", "8", "9"] and seen[-1] == 6
    assert [asked[1] for asked in judge.asked] == found.generations and len(found.generations[0]) == 3
    assert found.generations[0] != found.generations[1]
    assert judge.asked[0][2:] == (["abcd"] * 3, None)
    lengths = [[len(text) / 4 for text in texts] for texts in found.generations]
    assert found.report.generations == pytest.approx([sum(row) / 3 for row in lengths])
    again = judge_model(model, tiny.processor, rows, LengthJudge({}), action_temperature=5.0, **options)
    assert again.generations == found.generations
    cold = judge_model(model, tiny.processor, rows, LengthJudge({}), action_temperature=1e-4, **options)
    assert cold.generations[0] == cold.generations[1] and cold.report.std == 0
    with pytest.raises(ValueError, match="The judge reads the column 'gold'; `rows` has"):
        judge_model(model, tiny.processor, rows.remove_columns("gold"), judge)
    with pytest.raises(ValueError, match="`num_generations` must be at least 1, got 0"):
        judge_model(model, tiny.processor, rows, judge, num_generations=0)


def test_keys_come_from_a_column_or_the_rows_number():
    from datasets import Dataset

    rows = Dataset.from_dict({"prompt": ["a", "b"], "place": ["x", "y"], "same": ["x", "x"]})
    assert sample_keys(rows) == ["0", "1"]
    assert sample_keys(rows, "place") == ["x", "y"]
    assert sample_keys(rows.rename_column("place", "key")) == ["x", "y"]
    with pytest.raises(ValueError, match=r"repeated: \['x'\]"):
        sample_keys(rows, "same")
    with pytest.raises(ValueError, match="`column` must be one of .* got 'none'"):
        sample_keys(rows, "none")
