"""Best of N and the tree search: what they find, what they count, what they tell the reward function."""

import itertools
import math

import pytest
import torch
from PIL import Image
from tiny_models import latent
from transformers import GenerationConfig, LogitsProcessorList

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
    assert sorted(found) == sorted(mass)
    assert all(mass[a] > mass[b] - 1e-5 for a, b in itertools.pairwise(found))


@pytest.mark.parametrize("width", [1, 2, 3])
def test_a_narrow_tree_has_what_its_codes_say_and_the_greedy_answer(tiny, width):
    """The most likely token may be that of many unlikely codes, none of which is among the most likely."""
    model, processor = tiny
    outside = 0
    for row in rows():
        (result,) = tree_search(model, processor, [row], length, n=CODES, max_new_tokens=1, width=width)
        inputs = encode_prompts(processor, [row])
        every = {k: v.repeat(CODES, *[1] * (v.ndim - 1)) for k, v in inputs.items()}
        tokens = model.generate(**every, forced_action_ids=torch.arange(CODES)[:, None], max_new_tokens=1)[:, -1]
        greedy = model.generate(**inputs, action_do_sample=False, max_new_tokens=1)[0, -1].item()
        with torch.no_grad():
            likeliest = model(**inputs, return_logits=False).action_logits[0, -1].topk(width).indices
        looked_at = set(tokens[likeliest].tolist())
        found = [candidate.token_ids[0] for candidate in result.candidates]
        assert found[0] == greedy and set(found) == looked_at | {greedy} and len(set(found)) == len(found)
        outside += greedy not in looked_at
    assert outside or width > 1


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


class EveryAnswer:
    """All answers to a prompt, by trying every code in every place, and the search in them written out."""

    def __init__(self, model, processor, length, ends, bias=None, **options):
        self.model, self.length, self.ends, self.options = model, length, ends, options
        self.bias = torch.zeros(CODES) if bias is None else bias
        self.prompt = encode_prompts(processor, rows(1))["input_ids"]
        self.steps = {}

    def step(self, beginning):
        """The log-probability of each code behind these tokens, and the token that it emits."""
        if beginning not in self.steps:
            ids = torch.cat([self.prompt, torch.tensor([beginning], dtype=torch.long)], dim=1)
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            codes = torch.arange(CODES)[:, None]
            emitted = self.model.generate(
                **inputs, **self.options, max_new_tokens=1, forced_action_ids=codes, num_return_sequences=CODES
            )[:, -1]
            with torch.no_grad():
                logits = self.model(**inputs, return_logits=False).action_logits[0, -1] + self.bias
            self.steps[beginning] = logits.log_softmax(-1).tolist(), emitted.tolist()
        return self.steps[beginning]

    def tokens(self, beginning):
        """For each next token its probability, and its most likely code."""
        found = {}
        for log_prob, code, token in sorted(
            zip(*self.step(beginning)[:1], range(CODES), self.step(beginning)[1]), reverse=True
        ):
            if log_prob > -math.inf:
                total, first = found.get(token, (0.0, code))
                found[token] = (total + math.exp(log_prob), first)
        return found

    def ended(self, ids):
        return len(ids) == self.length or (len(ids) > 0 and ids[-1] in self.ends)

    def answers(self, beginning=(), prob=1.0):
        """Every answer, and the sum of the probabilities of the codes that give it."""
        if self.ended(beginning):
            return {beginning: prob}
        found = {}
        for token, (of_token, _) in self.tokens(beginning).items():
            found |= self.answers((*beginning, token), prob * of_token)
        return found

    def search(self, n):
        """Best-first: answers with their codes and the probability of these, in order."""
        found, branches = [], [(1.0, (), ())]
        while branches and len(found) < n:
            branches.sort(key=lambda branch: branch[0])
            prob, ids, codes = branches.pop()
            while not self.ended(ids):
                options = self.tokens(ids)
                best = max(options, key=lambda token: options[token][0])
                for token, (of_token, code) in options.items():
                    if token != best:
                        branches.append((prob * of_token, (*ids, token), (*codes, code)))
                of_token, code = options[best]
                prob, ids, codes = prob * of_token, (*ids, best), (*codes, code)
            log_prob = sum(self.step(ids[:i])[0][code] for i, code in enumerate(codes))
            found.append((list(ids), list(codes), log_prob))
        return found


def two_tokens(tiny):
    """The first tokens of the two likeliest answers that go on behind them."""
    (result,) = tree_search(*tiny, rows(1), length, n=8, max_new_tokens=3, width=CODES)
    return list(dict.fromkeys(candidate.token_ids[0] for candidate in result.candidates))[:2]


@pytest.mark.parametrize("kind", ["plain", "ends", "ends of a config", "bias", "suppressed"])
def test_the_tree_finds_what_trying_every_code_finds_in_the_same_order(tiny, kind):
    model, processor = tiny
    first, second = two_tokens(tiny)
    bias = torch.randn(CODES, generator=torch.Generator().manual_seed(0))
    bias[3] = -math.inf
    options, generation = {
        "plain": ({}, {}),
        "ends": ({"eos_token_id": [first, 0]}, {}),
        "ends of a config": ({"generation_config": GenerationConfig(eos_token_id=second)}, {}),
        "bias": ({"action_bias": bias}, {}),
        "suppressed": ({"suppress_tokens": [first]}, {"suppress_tokens": [first]}),
    }[kind]
    own = model.generation_config.eos_token_id
    ends = {"ends": {first, 0}, "ends of a config": {second}}.get(kind, {own, processor.tokenizer.eos_token_id})
    for steps, n in ((2, 60), (3, 8)):
        every = EveryAnswer(model, processor, steps, ends, options.get("action_bias"), **generation)
        everything = every.answers()
        assert sum(everything.values()) == pytest.approx(1.0, abs=1e-4)
        assert "ends" not in kind or any(len(ids) < steps for ids in everything)
        # With a second prompt, whose answers are longer, what ends is padded.
        searched = tree_search(model, processor, rows(2), length, n=n, max_new_tokens=steps, width=CODES, **options)
        candidates, wanted = searched[0].candidates, every.search(n)
        found = [(candidate.token_ids, candidate.action_ids) for candidate in candidates]
        assert found == [(ids, codes) for ids, codes, _ in wanted]
        log_probs = [candidate.log_prob for candidate in candidates]
        assert log_probs == pytest.approx([log_prob for _, _, log_prob in wanted], abs=1e-3)
        if n > len(everything):
            assert len(found) == len(everything) and {tuple(ids) for ids, _ in found} == set(everything)
    assert steps == 3 and 8 < len(everything)


@pytest.mark.parametrize("search", [best_of_n, tree_search])
def test_nothing_stands_behind_the_end_of_an_answer(tiny, search):
    first, second = two_tokens(tiny)
    for result in search(*tiny, rows(), length, n=12, max_new_tokens=4, eos_token_id=[first, second]):
        assert len(result.candidates) <= 12
        for candidate in result.candidates:
            assert len(candidate.token_ids) == len(candidate.action_ids)
            assert not {first, second} & set(candidate.token_ids[:-1])


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 3.0},
        {"no_repeat_ngram_size": 2},
        {"bad_words_ids": [[5]]},
        {"min_new_tokens": 2},
        {"logits_processor": LogitsProcessorList([lambda ids, scores: scores])},
        {"stopping_criteria": [lambda ids, scores: True]},
        {"generation_config": GenerationConfig(repetition_penalty=3.0)},
        {"generation_config": GenerationConfig(max_new_tokens=2)},
    ],
)
def test_what_changes_the_tokens_of_codes_is_refused_by_the_tree_by_name(tiny, options):
    (name,) = options
    name = next(iter(options[name].to_diff_dict())) if name == "generation_config" else name
    with pytest.raises(ValueError, match=f"`{name}=.*cannot tell its branches. Leave it out, or use `best_of_n`"):
        tree_search(*tiny, rows(1), length, **options)


def test_what_asks_for_nothing_is_not_refused(tiny):
    options = {"repetition_penalty": 1.0, "min_new_tokens": None, "bad_words_ids": None, "use_cache": True}
    assert tree_search(*tiny, rows(1), length, n=1, max_new_tokens=2, **options)


class FreshRows:
    """A data set that makes its rows anew, so that their ids are used again."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        return {"prompt": "ab"[i % 2] * 3, "target": float(i)}


@pytest.mark.parametrize("search", [best_of_n, tree_search])
def test_each_row_has_its_own_rewards(tiny, search):
    """Two prompts, many rows: a reward of another row is another number."""

    def target(completions, target, **columns):
        return target

    results = search(*tiny, FreshRows(60), target, n=2, max_new_tokens=2, batch_size=4)
    assert [result.best.reward for result in results] == [float(i) for i in range(60)]
    assert {candidate.reward for candidate in results[7].candidates} == {7.0}


def test_plain_prompts_have_plain_completions(tiny):
    def plain(prompts, completions, **columns):
        return [float(isinstance(prompt, str) and isinstance(text, str)) for prompt, text in zip(prompts, completions)]

    (result,) = tree_search(*tiny, [{"prompt": "abc"}], plain, n=2, max_new_tokens=2)
    assert [candidate.reward for candidate in result.candidates] == [1.0, 1.0]


@pytest.mark.parametrize("search", [best_of_n, tree_search])
def test_pictures_are_processed_once(tiny, search, monkeypatch):
    model, processor = tiny
    calls = []
    kind = type(processor.image_processor)
    process = kind.__call__

    def counted(self, *args, **options):
        calls.append(args)
        return process(self, *args, **options)

    monkeypatch.setattr(kind, "__call__", counted)
    search(model, processor, rows(2)[1:], length, n=4, max_new_tokens=3)
    once = len(calls)
    search(model, processor, rows(2)[1:], length, n=1, max_new_tokens=3)
    assert len(calls) - once == once > 0


def test_a_penalty_of_the_checkpoint_changes_nothing(tiny, monkeypatch):
    def found():
        return answers(tree_search(*tiny, rows(2), length, n=6, max_new_tokens=4))

    plain = found()
    monkeypatch.setattr(tiny[0].generation_config, "repetition_penalty", 3.0)
    assert found() == plain
