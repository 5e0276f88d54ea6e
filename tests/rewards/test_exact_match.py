import pytest

from latent_trl.data.shapes import ANSWERS
from latent_trl.rewards.exact_match import ExactMatchReward


@pytest.mark.parametrize(
    ("completion", "answer", "score"),
    [
        ("it is red.", "red", 1.0),
        ("Red", "red", 1.0),
        ("red, red.", "red", 1.0),
        ("a triangle.", "triangle", 1.0),
        ("no, it is not.", "no", 1.0),
        ("it is blue.", "red", 0.0),
        ("red or blue.", "red", 0.0),
        ("a red circle.", "red", 0.0),
        ("yes, it is red.", "yes", 0.0),
        ("it is not.", "no", 0.0),
        ("reddish.", "red", 0.0),
        ("", "red", 0.0),
        ("well i would have to say that it is red.", "red", 0.0),
    ],
)
def test_only_a_short_answer_with_the_one_right_candidate_scores(completion, answer, score):
    reward = ExactMatchReward()
    assert reward(prompts=[None], completions=[completion], answer=[answer]) == [score]
    conversation = [{"role": "assistant", "content": completion}]
    assert reward(prompts=[None], completions=[conversation], answer=[answer]) == [score]
    parts = [{"role": "assistant", "content": [{"type": "text", "text": completion}]}]
    assert reward(prompts=[None], completions=[parts], answer=[answer]) == [score]


def test_listing_all_candidates_never_scores():
    reward = ExactMatchReward(max_words=100)
    listing = " ".join(ANSWERS)
    assert sum(reward(prompts=None, completions=[listing] * len(ANSWERS), answer=list(ANSWERS))) == 0


def test_candidates_can_be_chosen():
    reward = ExactMatchReward(candidates=["cat", "dog"], max_words=2)
    scores = reward(prompts=None, completions=["a red cat", "a cat", "dog"], answer=["cat", "cat", "cat"])
    assert scores == [0.0, 1.0, 0.0]


def test_further_columns_are_accepted_and_the_reward_has_a_name():
    reward = ExactMatchReward()
    assert reward.__name__ == "exact_match"
    assert reward(prompts=["?"], completions=["yes."], answer=["yes"], kind=["yes_no"], images=[None]) == [1.0]


def test_what_could_never_score_is_refused():
    with pytest.raises(ValueError, match="`answer` must be one of"):
        ExactMatchReward()(prompts=None, completions=["purple."], answer=["purple"])
    with pytest.raises(ValueError, match="single words"):
        ExactMatchReward(candidates=["light blue", "red"])
