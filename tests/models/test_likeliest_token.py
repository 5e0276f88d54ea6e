"""Greedy answers take the token that the codes find the most likely between them."""

import math

import pytest
import torch
from test_ended_rows import COPIES, both, check_same, mixed_lengths
from tiny_models import latent

from latent_trl.generation.likeliest_token import BLOCK, codes_of_likeliest_tokens

CODES = 3 * BLOCK + 5


class Sayings:
    """What codes say, by a table `[R, K]`; counts what is read."""

    def __init__(self, table: torch.Tensor):
        self.table, self.read = table, torch.zeros_like(table)

    def __call__(self, rows, codes):
        self.read[rows[:, None], codes] += 1
        return self.table[rows[:, None], codes]


def by_hand(log_probs: list[float], tokens: list[int]) -> int:
    """The most likely code of the token of the largest sum."""
    masses: dict[int, float] = {}
    for log_prob, token in zip(log_probs, tokens, strict=True):
        masses[token] = masses.get(token, 0.0) + math.exp(log_prob)
    best = max(masses, key=lambda token: masses[token])
    return max((c for c in range(len(tokens)) if tokens[c] == best), key=lambda code: log_probs[code])


@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("tokens", [2, 5, 200])
def test_the_sums_over_all_codes_decide(spread, tokens):
    generator = torch.Generator().manual_seed(int(10 * spread) + tokens)
    log_probs = (spread * torch.randn(300, CODES, generator=generator)).log_softmax(-1)
    says = Sayings(torch.randint(0, tokens, (300, CODES), generator=generator))
    found = codes_of_likeliest_tokens(log_probs, says)
    wanted = [by_hand(*row) for row in zip(log_probs.tolist(), says.table.tolist(), strict=True)]
    assert found.tolist() == wanted
    assert says.read.max() <= 1
    # Otherwise this would tell nothing from the most likely code.
    assert tokens * spread > 200 or (found != log_probs.argmax(-1)).float().mean() > 0.05


def test_codes_are_read_until_the_token_is_certain():
    probs = torch.full((5, CODES), 1e-9)
    probs[0, 7] = 0.5  # as likely as all others together
    probs[1, : BLOCK + 1] = 1 / (BLOCK + 1)  # one token has all but one of a block
    probs[2, :] = 1 / CODES  # half of the codes say the same
    probs[3, 3:] = 0.25 / (CODES - 5)
    probs[3, 3:5] = torch.tensor([0.4, 0.35])  # the rest could still help the second
    probs[4] = torch.nan
    table = torch.arange(CODES).repeat(5, 1)
    table[1, :BLOCK], table[2, : 2 * BLOCK] = 100, 100
    says = Sayings(table)
    log_probs = (probs / probs.sum(-1, keepdim=True)).log()
    found = codes_of_likeliest_tokens(log_probs, says)
    assert found[[0, 3]].tolist() == [7, 3] and found[1] < BLOCK and found[2] < 2 * BLOCK
    assert says.read.sum(-1).tolist() == [0, BLOCK, 2 * BLOCK, 3 * BLOCK, 0]


def test_codes_that_cannot_be_taken_do_not_count():
    logits = torch.tensor([[2.0, 1.9, 1.9, 0.0], [-math.inf, 1.0, -math.inf, 0.0]])
    says = Sayings(torch.tensor([[0, 1, 1, 2], [0, 1, 0, 0]]))
    assert codes_of_likeliest_tokens(logits.log_softmax(-1), says).tolist() == [1, 1]
    logits[0, 2] = -math.inf
    assert codes_of_likeliest_tokens(logits.log_softmax(-1), says).tolist() == [0, 1]


# Gemma 2 caps the logits of its head, which is read through its own forward.
FAMILIES_READ = ["llama", "llava", "gemma2"]


def tried(model, inputs, beginnings, **options):
    """`generate` with every code `[B * K]` behind the codes `beginnings` `[B, n]` of each prompt, by forcing it."""
    codes, rows = model.config.num_codes, len(beginnings)
    last = torch.arange(codes).repeat(rows)[:, None]
    length = beginnings.shape[1] + 1
    return model.generate(
        **inputs,
        num_return_sequences=codes,
        forced_action_ids=torch.cat([beginnings.repeat_interleave(codes, dim=0), last], dim=1),
        max_new_tokens=length,
        min_new_tokens=length,
        return_dict_in_generate=True,
        **options,
    )


@pytest.mark.parametrize("family", FAMILIES_READ)
@pytest.mark.parametrize("kind", ["plain", "law", "bias", "end", "bad words", "begin", "suppressed"])
def test_generate_takes_what_trying_every_code_finds(family, kind):
    model, tiny = latent(family)
    codes, length = model.config.num_codes, tiny.inputs["input_ids"].shape[1]
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "action_do_sample": False, "return_dict_in_generate": True}
    likeliest = model.generate(**tiny.inputs, **options).sequences[0, length].item()
    bias = torch.randn(codes, generator=torch.Generator().manual_seed(0))
    bias[3] = -math.inf
    law, settings = {
        "plain": ({}, {}),
        # Of no meaning for what is the most likely.
        "law": ({"action_top_k": 3, "action_temperature": 3.0, "action_top_p": 0.5}, {}),
        "bias": ({}, {"action_bias": bias}),
        # Forbidden for all four tokens.
        "end": ({}, {"eos_token_id": likeliest}),
        "bad words": ({}, {"bad_words_ids": [[likeliest]]}),
        "begin": ({}, {"begin_suppress_tokens": [likeliest]}),
        "suppressed": ({}, {"suppress_tokens": [likeliest]}),
    }[kind]
    out = model.generate(**tiny.inputs, **options, **law, **settings)
    if kind in ("end", "bad words", "begin", "suppressed"):
        assert out.sequences[0, length] != likeliest
    differs = 0
    for step in range(4):
        found = tried(model, tiny.inputs, out.action_ids[:, :step], **settings)
        tokens = found.sequences[:, -1].unflatten(0, (-1, codes))
        # Of each code its own log-probability, 0 where it is banned.
        law = found.action_log_probs[:, -1].unflatten(0, (-1, codes))
        law = law.masked_fill(law == 0, -math.inf)
        assert torch.allclose(law.exp().sum(-1), torch.ones(len(law)), atol=1e-5)
        best = [by_hand(*row) for row in zip(law.tolist(), tokens.tolist(), strict=True)]
        assert out.action_ids[:, step].tolist() == best
        torch.testing.assert_close(out.action_log_probs[:, step], law[range(len(best)), best], atol=1e-4, rtol=0)
        assert torch.equal(out.sequences[:, step - 4], tokens[range(len(best)), best])
        differs += int((law.argmax(-1) != out.action_ids[:, step]).sum())
    assert differs


@pytest.mark.parametrize("family", FAMILIES_READ)
def test_rows_that_leave_change_nothing(family):
    """What codes say is read for the rows that are present alone."""
    model, tiny = latent(family)
    lengths = mixed_lengths(len(tiny.inputs["input_ids"]) * COPIES)
    check_same(*both(model, tiny.inputs, lengths, action_do_sample=False), lengths)


def test_codes_that_are_forced_are_not_read(monkeypatch):
    model, tiny = latent("llama")
    read, own = [], model.said_tokens
    monkeypatch.setattr(model, "said_tokens", lambda states, *args: read.append(len(states)) or own(states, *args))
    rows = len(tiny.inputs["input_ids"])
    forced = torch.zeros(rows, 3, dtype=torch.long)
    forced[1, 2] = -1
    model.generate(**tiny.inputs, max_new_tokens=4, min_new_tokens=4, action_do_sample=False, forced_action_ids=forced)
    # One row at the third step, all at the fourth; rows leave the reading once they are certain.
    assert read[0] == 1 and max(read) == rows


@pytest.fixture
def process_group(tmp_path):
    """A group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("family", FAMILIES_READ)
def test_processes_that_share_layers_read_the_head_equally_often(family, monkeypatch, process_group):
    """As many passes a token whatever the rows are, and the same answers."""
    model, tiny = latent(family)
    calls, own = [], model.said_tokens
    monkeypatch.setattr(model, "said_tokens", lambda *args, **kwargs: calls.append(1) or own(*args, **kwargs))
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "action_do_sample": False}
    alone = model.generate(**tiny.inputs, **options)
    forced = torch.zeros(len(alone), 4, dtype=torch.long)
    counts = []
    for more in ({}, {"forced_action_ids": forced}):
        calls.clear()
        together = model.generate(**tiny.inputs, **options, **more, synced_gpus=True)
        counts.append(len(calls))
        assert more or torch.equal(together, alone)
    assert counts == [4 * model.config.num_codes] * 2
