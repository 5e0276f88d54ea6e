"""Codes, states and positions stay with their tokens, however rows are cut, padded and split."""

import torch
from cases import cases
from hypothesis import given
from hypothesis import strategies as st
from latent_trl.trainer.rollout.repeated_prompts import copies_of_each

from latent_trl.generation.output import LatentActionGenerateOutput
from latent_trl.trainer.rollout.rollout import Rollout

LENGTHS = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 5)), min_size=1, max_size=4)


def mark(row: int, place: int) -> float:
    """A number that tells a row and a place in its text, prompt and completion without padding."""
    return 100.0 * (row + 1) + place


def generated(lengths, axes: int, states: bool, support: bool) -> LatentActionGenerateOutput:
    """What `generate` returns: prompts padded on the left, completions on the right; every value tells its place."""
    rows = len(lengths)
    width, longest = max(p for p, _ in lengths), max(c for _, c in lengths)
    total = width + longest
    place = torch.full((rows, total), -1.0)
    for row, (prompt, completion) in enumerate(lengths):
        for i in range(prompt + completion):
            place[row, width - prompt + i] = mark(row, i)
    codes = place[:, width:]
    before = place[:, : total - 1]
    positions = before.long() if axes == 0 else torch.stack([before.long() + 1000 * a for a in range(axes)], dim=1)
    return LatentActionGenerateOutput(
        sequences=place.long(),
        action_ids=codes.long(),
        action_log_probs=-codes,
        context_states=torch.stack([before, -before], dim=-1) if states else None,
        position_ids=positions if states else None,
        action_support=torch.stack([codes > 0, codes > 0, codes < 0], dim=-1) if support else None,
    )


@cases(80)
@given(LENGTHS, st.integers(0, 3), st.booleans(), st.booleans(), st.integers(1, 4), st.data())
def test_every_value_keeps_its_place(lengths, axes, states, support, multiple, data):
    prompts, completions = [p for p, _ in lengths], [c for _, c in lengths]
    rows = Rollout.of(generated(lengths, axes, states, support), prompts, completions)
    order = data.draw(st.permutations(range(len(rows))))
    batch = Rollout.padded([rows[i] for i in order], [prompts[i] for i in order], multiple)
    start = data.draw(st.integers(0, len(rows) - 1))
    part = Rollout.from_tensors(batch.tensors()).rows(start, len(rows))
    width = -(-max(prompts) // multiple) * multiple
    longest = -(-max(completions) // multiple) * multiple
    assert part.action_ids.shape == (len(rows) - start, longest)
    for b, row in enumerate(order[start:]):
        prompt, completion = lengths[row]
        for t in range(longest):
            inside = t < completion
            # Completion token t stands at place P + t, and was chosen from the state before it.
            assert part.action_ids[b, t] == (mark(row, prompt + t) if inside else 0)
            assert part.action_log_probs[b, t] == (-mark(row, prompt + t) if inside else 0)
            if support:
                assert part.action_support[b, t].tolist() == ([True, True, False] if inside else [True] * 3)
        if not states:
            assert part.context_states is None and part.position_ids is None
            continue
        assert part.context_states.shape == (len(rows) - start, width + longest - 1, 2)
        for i in range(prompt + completion - 1):
            at = width - prompt + i
            assert part.context_states[b, at].tolist() == [mark(row, i), -mark(row, i)]
            seen = part.position_ids[b, ..., at].flatten().tolist()
            assert seen == [int(mark(row, i)) + 1000 * a for a in range(max(axes, 1))]


@cases(80)
@given(st.lists(st.tuples(st.sampled_from(["a", "b", {"role": "user"}]), st.integers(1, 4)), min_size=1, max_size=5))
def test_copies_are_the_largest_number_that_all_prompts_have(runs):
    prompts = [prompt for prompt, count in runs for _ in range(count)]
    copies = copies_of_each(prompts)
    fitting = [
        n
        for n in range(1, len(prompts) + 1)
        if len(prompts) % n == 0
        and all(prompts[i + k] == prompts[i] for i in range(0, len(prompts), n) for k in range(n))
    ]
    assert copies == max(fitting)
