"""Rows whose text has ended leave the batch of `generate`: nothing else changes, and mixed lengths take less time."""

import functools
import time

import pytest
import torch
from tiny_models import EOS, FAMILIES, HIDDEN, PAD, latent
from transformers import LogitsProcessor, StoppingCriteria

COPIES = 4
LONGEST = 20


class EndsAt(LogitsProcessor):
    """Rows `[B]` end at their length, and not before."""

    def __init__(self, lengths: torch.Tensor, width: int):
        self.lengths, self.width = lengths, width

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, EOS] = -torch.inf
        ends = self.lengths == input_ids.shape[1] - self.width + 1
        scores[ends] = -torch.inf
        scores[ends, EOS] = 0
        return scores


@pytest.fixture
def rows_seen(monkeypatch):
    """`rows_seen(model)`: rows of each call of the text model."""

    def watch(model):
        seen = []
        handle = model.get_decoder().register_forward_hook(
            lambda module, args, output: seen.append(len(output.last_hidden_state))
        )
        handles.append(handle)
        return seen

    handles = []
    yield watch
    for handle in handles:
        handle.remove()


def both(model, inputs, lengths, copies=COPIES, **options):
    """The same texts with all rows kept, and with rows leaving; `lengths` prompt by prompt."""
    width = inputs["input_ids"].shape[1]
    in_tiles = lengths.unflatten(0, (-1, copies)).T.flatten()
    found = []
    for keep in (True, False):
        torch.manual_seed(3)
        found.append(
            model.generate(
                **inputs,
                max_new_tokens=LONGEST,
                num_return_sequences=copies,
                eos_token_id=EOS,
                logits_processor=[EndsAt(in_tiles, width)],
                output_context_states=True,
                output_cache=keep,
                return_dict_in_generate=True,
                **options,
            )
        )
    return found


def mixed_lengths(rows: int) -> torch.Tensor:
    return torch.tensor([2 + (i * 5) % 17 for i in range(rows)])


def check_same(kept, left, lengths):
    """Up to the ends of the texts; sums over fewer rows are rounded in another order."""
    count = kept.action_ids.shape[1]
    mask = torch.arange(count) < lengths[:, None]
    assert torch.equal(left.sequences, kept.sequences)
    assert torch.equal(left.action_ids[mask], kept.action_ids[mask])
    torch.testing.assert_close(left.action_log_probs[mask], kept.action_log_probs[mask], atol=1e-5, rtol=1e-5)
    if kept.action_support is not None:
        assert torch.equal(left.action_support[mask], kept.action_support[mask])
    # The code of token i is chosen from the state of position P-1+i.
    before = torch.ones(len(mask), kept.context_states.shape[1] - count, dtype=torch.bool)
    read = torch.cat([before, mask], dim=1)
    torch.testing.assert_close(left.context_states[read], kept.context_states[read], atol=2e-5, rtol=1e-4)
    if kept.position_ids is not None:
        assert torch.equal(left.position_ids.movedim(-1, 1)[read], kept.position_ids.movedim(-1, 1)[read])
    assert kept.cache is not None and left.cache is None


@pytest.mark.parametrize(
    ("family", "kind"), [*((name, "inputs") for name in FAMILIES), *((n, "text_inputs") for n in ("llava", "qwen3_vl"))]
)
def test_what_is_said_is_the_same(family, kind, rows_seen):
    model, tiny = latent(family)
    inputs = getattr(tiny, kind)
    lengths = mixed_lengths(len(inputs["input_ids"]) * COPIES)
    seen = rows_seen(model)
    kept, left = both(model, inputs, lengths)
    check_same(kept, left, lengths)
    calls = len(seen) // 2
    assert set(seen[1:calls]) == {len(lengths)}
    assert seen[-1] < len(lengths) / 3 and seen[calls + 1 :] == sorted(seen[calls + 1 :], reverse=True)


@pytest.mark.parametrize(
    "options",
    [
        {"action_sampling": "arithmetic"},
        {"action_do_sample": False},
        {"action_temperature": 0.7, "action_top_k": 5},
        {"action_top_p": 0.8, "action_bias": torch.tensor([-torch.inf, *[0.5] * 15])},
        {"forced_action_ids": torch.arange(12 * 15).view(12, 15) % 17 - 1},
        {"forced_action_ids": torch.arange(12 * 15).view(12, 15) % 17 - 1, "action_sampling": "arithmetic"},
        {"cache_implementation": "static"},
        {"repetition_penalty": 1.3},
        {"output_logits": True, "output_scores": True},
    ],
    ids=str,
)
def test_it_is_the_same_under_every_law(options, rows_seen):
    model, tiny = latent("qwen2_5_vl")
    lengths = mixed_lengths(3 * COPIES)
    seen = rows_seen(model)
    kept, left = both(model, tiny.inputs, lengths, **options)
    check_same(kept, left, lengths)
    assert seen[-1] < len(lengths)


def test_a_generator_of_its_own_draws_the_same(rows_seen):
    model, tiny = latent("llama")
    lengths = mixed_lengths(3 * COPIES)
    found = [
        both(model, tiny.inputs, lengths, action_generator=torch.Generator().manual_seed(seed))[1] for seed in (5, 5, 6)
    ]
    assert torch.equal(found[0].sequences, found[1].sequences)
    assert not torch.equal(found[0].sequences, found[2].sequences)


@pytest.mark.parametrize("copies", [1, 3])
def test_samples_alone_and_several(copies, rows_seen):
    model, tiny = latent("llava")
    lengths = torch.tensor([3, 20, 5] * copies)
    seen = rows_seen(model)
    kept, left = both(model, tiny.inputs, lengths, copies=copies)
    check_same(kept, left, lengths)
    assert seen[-1] == copies


@pytest.mark.parametrize(
    ("family", "options"),
    [
        # Sliding windows of a static cache, and no cache at all.
        ("gemma2", {"cache_implementation": "static"}),
        ("llama", {"use_cache": False}),
        ("llama", {"eos_token_id": None}),
    ],
    ids=str,
)
def test_rows_stay_where_they_cannot_leave(family, options, rows_seen):
    model, tiny = latent(family)
    rows = len(tiny.inputs["input_ids"])
    seen = rows_seen(model)
    settings = {"max_new_tokens": 12, "eos_token_id": list(range(8, 200)), **options}
    texts = []
    for keep in (True, False):
        torch.manual_seed(0)
        output = model.generate(**tiny.inputs, **settings, output_cache=keep, return_dict_in_generate=True)
        texts.append(output.sequences)
    assert torch.equal(*texts)
    assert set(seen) == {rows}


def test_a_cache_that_was_passed_holds_all_rows():
    from transformers import DynamicCache

    model, tiny = latent("llama")
    cache = DynamicCache(config=tiny.model.config)
    model.generate(**tiny.inputs, past_key_values=cache, max_new_tokens=16, eos_token_id=list(range(16, 200)))
    assert all(len(layer.keys) == 3 for layer in cache.layers)


def test_a_row_that_the_callers_own_criterion_ends_leaves_too(rows_seen):
    class FirstRowsStop(StoppingCriteria):
        calls = 0

        def __call__(self, input_ids, scores, **kwargs):
            self.calls += 1
            return torch.arange(len(input_ids)) < self.calls

    model, tiny = latent("llama")
    seen, texts = rows_seen(model), []
    for keep in (True, False):
        torch.manual_seed(0)
        criterion = FirstRowsStop()
        output = model.generate(
            **tiny.inputs,
            max_new_tokens=12,
            min_new_tokens=12,
            num_return_sequences=4,
            stopping_criteria=[criterion],
            output_cache=keep,
            return_dict_in_generate=True,
        )
        texts.append(output.sequences)
        assert criterion.calls == 12
    assert torch.equal(*texts)
    assert (texts[0] == PAD).any() and seen[-1] < 12


def test_an_unknown_tensor_of_as_many_rows_keeps_them(monkeypatch, rows_seen):
    """It might belong to the rows, and nothing says how."""
    model, tiny = latent("llama")
    prepare = tiny.model.prepare_inputs_for_generation

    @functools.wraps(prepare)
    def with_another(*args, **kwargs):
        return {**prepare(*args, **kwargs), "extra": torch.zeros(12)}

    monkeypatch.setattr(tiny.model, "prepare_inputs_for_generation", with_another)
    seen = rows_seen(model)
    lengths = mixed_lengths(12)
    both(model, tiny.inputs, lengths)
    assert set(seen) == {3, 12}


@pytest.mark.slow
def test_mixed_lengths_take_less_time():
    """Processor time of one thread, for 64 texts of 8 to 128 tokens; alternating, the best of three."""
    model, tiny = latent("llama", hidden_size=16 * HIDDEN, intermediate_size=1024)
    ids = tiny.inputs["input_ids"][-1:].repeat(16, 1)
    lengths = torch.linspace(8, 128, 64).round().long()
    seconds = {True: [], False: []}
    for _ in range(3):
        for keep in seconds:
            start = time.process_time()
            model.generate(
                ids,
                max_new_tokens=128,
                num_return_sequences=4,
                eos_token_id=EOS,
                logits_processor=[EndsAt(lengths, ids.shape[1])],
                output_cache=keep,
                return_dict_in_generate=True,
            )
            seconds[keep].append(time.process_time() - start)
    assert min(seconds[True]) >= 1.3 * min(seconds[False])
