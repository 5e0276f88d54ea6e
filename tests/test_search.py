"""Best of N and the tree search: what they find, what they count, what they tell the reward function."""

import itertools
import math

import pytest
import torch
from PIL import Image
from tiny_models import latent

from latent_trl.data.prompts import encode_prompts
from latent_trl.search import Candidate, SearchResult, best_of_n, tree_search

CODES = 16


@pytest.fixture(scope="module")
def tiny():
    model, tiny = latent("llava")
    return model, tiny.processor


def rows(count=3):
    """Prompts with and without a picture, and a column for the reward."""
    found = []
    for i in range(count):
        images = [Image.new("RGB", (32, 32), (80 * i % 256, 0, 90))] if i % 2 else []
        parts = [{"type": "image"}] * len(images) + [{"type": "text", "text": "abc"[i % 3] * (i + 2)}]
        found.append({"prompt": [{"role": "user", "content": parts}], "images": images, "target": i})
    return found


def length(completions, **columns):
    return [float(len(completion[0]["content"])) for completion in completions]


def answers(results: list[SearchResult]) -> list[list[list[int]]]:
    return [[candidate.token_ids for candidate in result.candidates] for result in results]


def test_best_of_n_keeps_the_best_of_what_it_sampled(tiny):
    model, processor = tiny

    def search(seed, batch_size=64):
        generator = torch.Generator().manual_seed(seed)
        options = {"n": 6, "max_new_tokens": 4, "batch_size": batch_size, "action_generator": generator}
        return best_of_n(model, processor, rows(), length, **options)

    results = search(0)
    assert [len(result.candidates) for result in results] == [6, 6, 6]
    for result in results:
        assert result.best.reward == max(len(candidate.text) for candidate in result.candidates)
        assert result.decoded_tokens == sum(len(candidate.token_ids) for candidate in result.candidates)
        assert all(candidate.log_prob < 0 for candidate in result.candidates)
    assert answers(search(0)) == answers(results) != answers(search(1))


def test_the_tree_holds_every_answer_once_and_each_comes_back_from_its_codes(tiny):
    """Against all pairs of codes: with the full width nothing is missed, and nothing is found twice."""
    model, processor = tiny
    (result,) = tree_search(model, processor, rows(1), length, n=CODES**2, max_new_tokens=2, width=CODES)
    pairs = torch.tensor(list(itertools.product(range(CODES), repeat=2)))
    inputs = {k: v.repeat(len(pairs), *[1] * (v.ndim - 1)) for k, v in encode_prompts(processor, rows(1)).items()}
    options = {"max_new_tokens": 2, "action_do_sample": False, "return_dict_in_generate": True}
    output = model.generate(**inputs, forced_action_ids=pairs, **options)
    start = inputs["input_ids"].shape[1]
    every = {tuple(ids) for ids in output.sequences[:, start:].tolist()}
    assert model.generation_config.eos_token_id not in {token for ids in every for token in ids}
    found = [tuple(candidate.token_ids) for candidate in result.candidates]
    assert len(every) > 3 and len(found) == len(set(found)) and set(found) == every
    by_codes = {tuple(codes): tuple(ids) for codes, ids in zip(pairs.tolist(), output.sequences[:, start:].tolist())}
    assert all(by_codes[tuple(candidate.action_ids)] == tuple(candidate.token_ids) for candidate in result.candidates)


def test_the_tree_begins_with_the_most_likely_codes_and_goes_on_where_it_stopped(tiny):
    model, processor = tiny
    few, many = (tree_search(model, processor, rows(), length, n=n, max_new_tokens=4) for n in (2, 5))
    assert [found[:2] for found in answers(many)] == answers(few)
    inputs = encode_prompts(processor, rows())
    greedy = model.generate(**inputs, max_new_tokens=4, action_do_sample=False)[:, inputs["input_ids"].shape[1] :]
    for ids, result in zip(greedy.tolist(), many, strict=True):
        first = result.candidates[0].token_ids
        assert ids[: len(first)] == first


def test_the_tree_takes_the_most_probable_first_token_next(tiny):
    """With one token an answer, the order is that of the summed probabilities of the codes that emit it."""
    model, processor = tiny
    (result,) = tree_search(model, processor, rows(1), length, n=CODES, max_new_tokens=1, width=CODES)
    inputs = encode_prompts(processor, rows(1))
    every = {k: v.repeat(CODES, *[1] * (v.ndim - 1)) for k, v in inputs.items()}
    tokens = model.generate(**every, forced_action_ids=torch.arange(CODES)[:, None], max_new_tokens=1)[:, -1]
    with torch.no_grad():
        probs = model(**inputs, return_logits=False).action_logits[0, -1].softmax(-1)
    mass = {token: probs[tokens == token].sum().item() for token in set(tokens.tolist())}
    found = [candidate.token_ids[0] for candidate in result.candidates]
    assert sorted(found) == sorted(mass) and found[0] == tokens[probs.argmax()]
    assert all(mass[a] > mass[b] - 1e-5 for a, b in itertools.pairwise(found[1:]))


def test_a_reward_draws_the_search_to_what_it_likes(tiny):
    model, processor = tiny
    (plain,) = tree_search(model, processor, rows(1), length, n=24, max_new_tokens=4)
    first = plain.candidates[0].token_ids[0]
    liked = next(c for c in plain.candidates if c.token_ids[0] != first and len(c.text) > 2)

    def begins(completions, **columns):
        return [float(completion[0]["content"].startswith(liked.text[0])) for completion in completions]

    def search(weight):
        (result,) = tree_search(model, processor, rows(1), begins, n=24, max_new_tokens=4, reward_weight=weight)
        return result.candidates

    drawn = search(1e6)
    rewards = [candidate.reward for candidate in drawn]
    assert rewards[0] == 0.0
    found = rewards.index(1.0)
    # Branches of an answer keep the codes that led to it.
    assert drawn[found + 1].token_ids[0] == drawn[found].token_ids[0]
    assert sum(rewards) > sum(candidate.reward for candidate in search(0.0))


def test_banned_codes_stay_away(tiny):
    model, processor = tiny
    bias = torch.zeros(CODES)
    bias[:8] = -math.inf
    options = {"n": 6, "max_new_tokens": 3, "action_bias": bias}
    for search in (best_of_n, tree_search):
        for result in search(model, processor, rows(), length, **options):
            assert all(code >= 8 for candidate in result.candidates for code in candidate.action_ids)


@pytest.mark.parametrize("search", [best_of_n, tree_search])
def test_the_reward_function_sees_each_text_once_with_its_columns(tiny, search):
    model, processor = tiny
    seen = []

    async def reward(prompts, completions, completion_ids, target, images, **columns):
        rewarded = zip(prompts, completions, completion_ids, target, images, strict=True)
        for prompt, completion, ids, number, pictures in rewarded:
            text = processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
            assert text == completion[0]["content"]
            assert prompt == rows()[number]["prompt"] and len(pictures) == number % 2
            seen.append((number, completion[0]["content"]))
        return [float(number) for number in target]

    results = search(model, processor, rows(), reward, n=8, max_new_tokens=2, batch_size=8)
    assert len(seen) == len(set(seen)) == sum(result.num_scored for result in results)
    assert [result.best.reward for result in results] == [0.0, 1.0, 2.0]


def test_the_model_stays_in_its_mode(tiny):
    model, processor = tiny
    model.train()
    tree_search(model, processor, rows(1), length, n=1, max_new_tokens=2)
    assert model.training
    model.eval()


def test_an_answer_without_a_reward_is_never_preferred():
    unsure, worst = Candidate("a", [1], [0], -0.1, None), Candidate("b", [2], [1], -3.0, -5.0)
    assert SearchResult([unsure, worst]).best is worst
    assert SearchResult([unsure]).best is unsure
    equal = Candidate("c", [3], [2], -1.0, -5.0)
    assert SearchResult([unsure, worst, equal]).best is equal


@pytest.mark.parametrize(
    "search, options, said",
    [
        (best_of_n, {"n": 0}, "`n` must be at least 1, got 0"),
        (best_of_n, {"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        (best_of_n, {"action_do_sample": False}, "same answer each time"),
        (best_of_n, {"num_return_sequences": 2}, "`num_return_sequences` is what the search itself decides"),
        (tree_search, {"width": 0}, "`width` must be at least 1, got 0"),
        (tree_search, {"action_temperature": 2.0}, "`action_temperature` is what the search itself decides"),
        (tree_search, {"forced_action_ids": torch.zeros(1, 1)}, "`forced_action_ids` is what"),
    ],
)
def test_what_makes_no_sense_is_refused(tiny, search, options, said):
    with pytest.raises(ValueError, match=said):
        search(*tiny, rows(1), length, **options)


@pytest.mark.parametrize(
    "rewards, said", [([math.nan], "returned nan for"), ([1.0, 2.0], "returned 2 rewards for 1 completions")]
)
def test_a_reward_that_is_no_number_stops_the_search(tiny, rewards, said):
    with pytest.raises(ValueError, match=said):
        tree_search(*tiny, rows(1), lambda **columns: rewards, n=2, max_new_tokens=2)


def test_rewards_that_cannot_say_are_kept_as_such(tiny):
    (result,) = tree_search(*tiny, rows(1), lambda **columns: [None], n=2, max_new_tokens=2)
    assert [candidate.reward for candidate in result.candidates] == [None, None]
