"""Codes, states and positions stay with their tokens, however rows are cut, padded and split."""

from dataclasses import dataclass

import torch
from cases import cases
from hypothesis import given
from hypothesis import strategies as st

from latent_trl.trainer.rollout.prompts import groups_of
from latent_trl.trainer.rollout.rollout import Rollout, Sample

LENGTHS = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 5)), min_size=1, max_size=4)
CPU = torch.device("cpu")


@dataclass
class Prompt:
    ids: list[int]


def mark(row: int, place: int) -> int:
    """A number that tells a row and a place in its text, prompt and completion without padding."""
    return 100 * (row + 1) + place


def sample(row: int, prompt: int, completion: int, axes: int, states: bool, support: bool) -> Sample:
    """What a source gives; every value tells its place."""
    places = torch.tensor([float(mark(row, i)) for i in range(prompt + completion)])
    codes, before = places[prompt:], places[:-1]
    positions = before.long() if axes == 0 else torch.stack([before.long() + 1000 * a for a in range(axes)])
    return Sample(
        row={},
        prompt=Prompt(places[:prompt].long().tolist()),
        completion_ids=codes.long().tolist(),
        action_ids=codes.long(),
        action_log_probs=-codes,
        action_support=torch.stack([codes > 0, codes > 0, codes < 0], dim=-1) if support else None,
        context_states=torch.stack([before, -before], dim=-1) if states else None,
        position_ids=positions if states else None,
    )


@cases(80)
@given(LENGTHS, st.integers(0, 3), st.booleans(), st.booleans(), st.integers(1, 4), st.data())
def test_every_value_keeps_its_place(lengths, axes, states, support, multiple, data):
    samples = [sample(row, *length, axes, states, support) for row, length in enumerate(lengths)]
    order = data.draw(st.permutations(range(len(samples))))
    rollout = Rollout.of([samples[i] for i in order], 0, CPU, multiple)
    rollout.num_items_in_batch = torch.tensor(1)
    start = data.draw(st.integers(0, len(samples) - 1))
    part = Rollout.from_batch(rollout.to_batch()).rows(start, len(samples))
    width = -(-max(p for p, _ in lengths) // multiple) * multiple
    longest = -(-max(c for _, c in lengths) // multiple) * multiple
    assert part.action_ids.shape == (len(samples) - start, longest)
    assert (part.prompts is None) == states
    for b, row in enumerate(order[start:]):
        prompt, completion = lengths[row]
        text = [*part.prompt_ids[b].tolist(), *part.completion_ids[b].tolist()]
        whole = (
            [0] * (width - prompt) + [mark(row, i) for i in range(prompt + completion)] + [0] * (longest - completion)
        )
        assert text == whole
        masks = torch.cat([part.prompt_mask[b], part.completion_mask[b]]).tolist()
        assert masks == [int(token > 0) for token in whole]
        for t in range(longest):
            inside = t < completion
            # Completion token t stands at place P + t, and was chosen from the state before it.
            assert part.action_ids[b, t] == (mark(row, prompt + t) if inside else 0)
            assert part.sampling_per_token_logps[b, t] == (-mark(row, prompt + t) if inside else 0)
            if support:
                assert part.action_support[b, t].tolist() == ([True, True, False] if inside else [True] * 3)
        if not states:
            assert part.context_states is None and part.position_ids is None
            continue
        assert part.context_states.shape == (len(samples) - start, width + longest - 1, 2)
        for i in range(prompt + completion - 1):
            at = width - prompt + i
            assert part.context_states[b, at].tolist() == [mark(row, i), -mark(row, i)]
            seen = part.position_ids[b, ..., at].flatten().tolist()
            assert seen == [mark(row, i) + 1000 * a for a in range(max(axes, 1))]


@cases(80)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.data())
def test_groups_are_those_of_their_places_on_every_process(size, groups, processes, data):
    """Each row is answered as often as it was there, in its order, and no call goes over the end of a group."""
    total = size * groups * processes
    texts = data.draw(st.lists(st.sampled_from("ab"), min_size=groups * processes, max_size=groups * processes))
    batch = [{"prompt": text, "group": i} for i, text in enumerate(texts) for _ in range(size)]
    rows = total // processes
    for process in range(processes):
        own = batch[process * rows : (process + 1) * rows]
        parts, copies = groups_of(own, process * rows, size)
        assert [part["group"] for part in parts for _ in range(copies)] == [row["group"] for row in own]
        assert copies <= size
