"""Shaping rewards against their formulas and against TRL's own."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trl.rewards.other_rewards import get_repetition_penalty_reward, get_soft_overlong_punishment

from latent_trl.rewards.shaping import LengthReward, RepetitionPenalty, SoftOverlongPunishment

IDS = st.lists(st.lists(st.integers(0, 3), max_size=30), min_size=1, max_size=5)


def rewards(func, ids):
    return func(
        prompts=[""] * len(ids), completions=[""] * len(ids), completion_ids=ids, trainer_state=None, answer=None
    )


@pytest.mark.parametrize(
    "length, expected", [(0, 0), (80, 0), (85, -0.25), (90, -0.5), (100, -1), (101, -1), (500, -1)]
)
def test_overlong_punishment_is_a_slope_and_then_complete(length, expected):
    assert rewards(SoftOverlongPunishment(100, 20), [[1] * length]) == [expected]


@settings(deadline=None)
@given(IDS, st.integers(0, 20), st.integers(0, 10))
def test_overlong_punishment_equals_trls(ids, cache, margin):
    ours, trls = SoftOverlongPunishment(cache + margin, cache), get_soft_overlong_punishment(cache + margin, cache)
    assert rewards(ours, ids) == pytest.approx(trls(completion_ids=ids))


@settings(deadline=None)
@given(IDS, st.integers(1, 4), st.floats(-3, 0))
def test_repetition_penalty_equals_trls(ids, size, penalty):
    ours, trls = RepetitionPenalty(size, penalty), get_repetition_penalty_reward(size, penalty)
    assert rewards(ours, ids) == pytest.approx(trls(completion_ids=ids))


@pytest.mark.parametrize("length, expected", [(10, 0), (8, 0), (12, 0), (7, -0.1), (15, -0.3), (0, -0.8), (90, -1)])
def test_length_reward_follows_its_formula(length, expected):
    assert rewards(LengthReward(target=10, tolerance=2), [[1] * length]) == [pytest.approx(expected)]


def test_words_are_counted_in_plain_and_conversational_completions():
    completions = ["one two three", [{"role": "assistant", "content": [{"type": "text", "text": "one one one"}]}]]
    call = {"prompts": [""] * 2, "completions": completions}
    assert RepetitionPenalty(ngram_size=1, unit="words")(**call) == [0.0, pytest.approx(-2 / 3)]
    assert LengthReward(target=6, unit="words")(**call) == [-0.5, -0.5]
    assert SoftOverlongPunishment(4, 2, unit="words")(**call) == [-0.5, -0.5]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: SoftOverlongPunishment(10, 11), "`soft_punish_cache` must be between 0 and .*=10`; got 11"),
        (lambda: LengthReward(0), "`target` must be at least 1; got 0"),
        (lambda: LengthReward(1, -1), "`tolerance` must be at least 0; got -1"),
        (lambda: RepetitionPenalty(0), "`ngram_size` must be at least 1; got 0"),
        (lambda: RepetitionPenalty(max_penalty=1), "`max_penalty` must be at most 0; got 1"),
        (lambda: LengthReward(1, unit="bytes"), "`unit` must be one of .*got 'bytes'"),
        (lambda: LengthReward(1)(prompts=[""], completions=[""]), "needs `completion_ids`"),
    ],
)
def test_wrong_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
