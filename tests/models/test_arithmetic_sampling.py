"""Samples of a prompt that are drawn together: each alone has its law, and together they share it out evenly."""

import pytest
import torch
from tiny_models import latent

from latent_trl.generation.action_law import ActionLaw
from latent_trl.generation.arithmetic_sampling import ArithmeticSampler, even_points, random_orders
from latent_trl.generation.choice import ActionChoice

SIZE, K = 8, 5


def together(groups: int, seed: int, **options) -> ActionChoice:
    generator = torch.Generator().manual_seed(seed)
    return ActionChoice(copies=SIZE, arithmetic=True, generator=generator, **options)


def logits_of(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 1.5


def counts(codes: torch.Tensor, kinds: int) -> torch.Tensor:
    """How many samples of each group took each code `[groups, kinds]`; rows are tiles of all groups."""
    return torch.nn.functional.one_hot(codes.unflatten(0, (SIZE, -1)), kinds).sum(dim=0)


def test_each_sample_alone_has_the_law_of_its_sequence():
    groups = 4000
    choice, first, later = together(groups, 0), logits_of(1, K), logits_of(2, K, K)
    one, _, _ = choice.choose(first.expand(groups * SIZE, K), 0)
    two, _, _ = choice.choose(later[one], 1)
    three, _, _ = choice.choose(later[two], 2)
    law, step = first.softmax(-1), later.softmax(-1)
    wanted = (law[:, None, None] * step[:, :, None] * step[None]).flatten()
    # Samples of one group are not independent of each other, those of one place in it are.
    for place in range(SIZE):
        rows = slice(place * groups, (place + 1) * groups)
        found = torch.bincount((one[rows] * K + two[rows]) * K + three[rows], minlength=K**3)
        expected = wanted * groups
        often = expected > 5
        # Five deviations of a binomial count.
        deviation = (expected * (1 - wanted)).sqrt()
        assert ((found - expected).abs() < 5 * deviation)[often].all()
        assert found[~often].sum() < expected[~often].sum() + 5 * expected[~often].sum().sqrt()


@pytest.mark.parametrize("seed", range(5))
def test_a_group_shares_out_codes_and_their_sequences_evenly(seed):
    groups = 300
    choice, first, later = together(groups, seed), logits_of(seed, K), logits_of(seed + 9, K, K)
    one, _, _ = choice.choose(first.expand(groups * SIZE, K), 0)
    two, _, _ = choice.choose(later[one], 1)
    law = first.softmax(-1)
    pairs = (law[:, None] * later.softmax(-1)).flatten()
    for found, wanted in ((counts(one, K), law * SIZE), (counts(one * K + two, K * K), pairs * SIZE)):
        assert (found >= (wanted - 1e-4).floor()).all()
        assert (found <= (wanted + 1e-4).ceil()).all()
    # Without it they do not.
    free = ActionChoice(copies=SIZE, generator=torch.Generator().manual_seed(seed))
    alone, _, _ = free.choose(first.expand(groups * SIZE, K), 0)
    assert (counts(alone, K) > (law * SIZE).ceil()).any()


def test_a_forced_step_leaves_the_evenness_to_the_next():
    groups = 200
    forced = torch.full((groups * SIZE, 1), 3)
    choice, first, later = together(groups, 0, forced=forced), logits_of(1, K), logits_of(2, K)
    one, _, _ = choice.choose(first.expand(groups * SIZE, K), 0)
    assert (one == 3).all()
    two, _, _ = choice.choose(later.expand(groups * SIZE, K), 1)
    wanted = later.softmax(-1) * SIZE
    assert (counts(two, K) >= (wanted - 1e-4).floor()).all() and (counts(two, K) <= (wanted + 1e-4).ceil()).all()


@pytest.mark.parametrize("law", [ActionLaw(top_k=2), ActionLaw(top_p=0.5), ActionLaw(temperature=1e-6)])
def test_what_cannot_be_sampled_is_not_drawn(law):
    logits = logits_of(4, 1, K).expand(400 * SIZE, K)
    choice = together(400, 0, law=law)
    for step in range(3):
        action_ids, log_probs, _ = choice.choose(logits, step)
        support = law.log_probs(logits, law.support(logits)).exp() > 0
        assert support.gather(1, action_ids[:, None]).all()
        assert log_probs.isfinite().all()


def test_points_at_the_ends_of_rounded_sums_find_a_code():
    probs = torch.tensor([[0.0, 0.1, 0.2, 0.7 - 1e-6, 0.0]])
    for point, code in ((0.0, 1), (1 - 2**-24, 3), (0.0999, 1), (0.1001, 2)):
        sampler = ArithmeticSampler(torch.tensor([point]), 2)
        assert sampler.draw(probs, torch.arange(5)[None], torch.tensor([0])).item() == code
        assert 0 <= sampler.points.item() < 1


@pytest.mark.parametrize(
    "probs, ends, point, code",
    [
        ([0.5, 0.0, 0.5], [0.5, 0.5 + 2**-23, 1.0], 0.5, 2),
        ([0.5, 0.5, 0.0], [0.5, 1 - 2**-22, 1.0], 1 - 2**-23, 1),
        ([0.0, 1.0, 0.0], [2**-23, 1.0, 1 + 2**-22], 1 - 2**-24, 1),
    ],
)
def test_a_sum_that_grows_where_a_code_has_no_share_does_not_draw_it(monkeypatch, probs, ends, point, code):
    monkeypatch.setattr(torch.Tensor, "cumsum", lambda self, dim: torch.tensor([ends]))
    sampler = ArithmeticSampler(torch.tensor([point]), 2)
    assert sampler.draw(torch.tensor([probs]), torch.arange(3)[None], torch.tensor([0])).item() == code


def test_a_sample_is_alone_where_its_interval_is_narrower_than_the_points_distance():
    sampler = ArithmeticSampler(torch.tensor([0.1, 0.6, 0.8, 0.97]), 4)
    probs = torch.tensor([[0.5, 0.25, 0.2, 0.05]]).expand(4, 4)
    order = torch.arange(4).expand(4, 4)
    assert sampler.draw(probs, order, torch.full((4,), 9)).tolist() == [0, 1, 2, 3]
    assert sampler.alone.tolist() == [False, False, True, True]
    assert sampler.draw(probs, order, torch.tensor([3, 3, 1, 0])).tolist()[2:] == [1, 0]


def test_a_point_lies_in_the_share_of_its_code_in_the_order_of_the_step():
    order = torch.tensor([[2, 0, 3, 1]])
    sampler = ArithmeticSampler(torch.tensor([0.3]), 2)
    assert sampler.draw(torch.tensor([[0.5, 0.25, 0.2, 0.05]]), order, torch.tensor([0])).item() == 0
    # 0.3 is .1 behind the start of the second share of the order, which is .5 wide.
    torch.testing.assert_close(sampler.points, torch.tensor([0.2]))
    torch.testing.assert_close(sampler.width, torch.tensor([0.5]))


def test_every_order_is_as_likely():
    orders = random_orders(6000, 3, torch.Generator().manual_seed(0), "cpu")
    found = torch.bincount(orders[:, 0] * 3 + orders[:, 1], minlength=9)
    assert (orders.sort(dim=1).values == torch.arange(3)).all()
    # Five deviations of a binomial count.
    assert (found[found > 0] - 1000).abs().max() < 5 * 29 and (found > 0).sum() == 6


MANY, CODES = 4000, 128


def expected_gradient(logits: torch.Tensor, rewards: torch.Tensor, rounds: int, **options):
    """Mean `[K]` over many groups of the gradient in the logits that GRPO's advantages, not divided by the deviation,
    give for one code a sample, and the mean of its square."""
    total, square = torch.zeros(CODES, dtype=torch.float64), 0.0
    law, generator = logits.softmax(-1), torch.Generator().manual_seed(0)
    for _ in range(rounds):
        choice = ActionChoice(copies=SIZE, generator=generator, **options)
        codes, _, _ = choice.choose(logits.expand(MANY * SIZE, CODES), 0)
        gained = rewards[codes].unflatten(0, (SIZE, -1))
        advantages = (gained - gained.mean(dim=0)) / SIZE
        of_codes = torch.zeros(MANY, CODES).scatter_add_(1, codes.unflatten(0, (SIZE, -1)).T, advantages.T)
        gradients = of_codes - law * advantages.sum(dim=0)[:, None]
        total += gradients.double().sum(dim=0)
        square += gradients.pow(2).sum().item()
    return (total / (rounds * MANY)).float(), square / (rounds * MANY)


# With the least cosine: of an uneven law, some codes of which every group has, .9986 is what many groups come to; in a
# fixed order it is .97. Of a flat law it is .99996, and .96 or nothing.
LAWS = {
    "flat": (torch.zeros(CODES), 0.999),
    "uneven": (torch.randn(CODES, generator=torch.Generator().manual_seed(0)), 0.997),
}


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("reward", ["random", "periodic"])
def test_the_gradient_of_groups_drawn_together_points_where_the_exact_one_does(law, reward):
    (logits, least), codes = LAWS[law], torch.arange(CODES)
    if reward == "periodic":
        # Codes 1 / SIZE apart have equal rewards: in a fixed order a flat law learned nothing of them.
        rewards = (codes % (CODES // SIZE)).float() / (CODES // SIZE)
    else:
        rewards = torch.randn(CODES, generator=torch.Generator().manual_seed(1))
    probs = logits.softmax(-1)
    exact = probs * (rewards - (probs * rewards).sum())
    found, square = expected_gradient(logits, rewards, rounds=8, arithmetic=True)
    _, square_apart = expected_gradient(logits, rewards, rounds=2)
    assert torch.cosine_similarity(found, exact, dim=0) > least
    # Not at the price of more noise than independent samples have.
    assert square < 1.1 * square_apart


def test_points_are_even_within_groups_alone():
    """Two groups of one prompt are as groups of two prompts."""
    prompts = 3000
    choice = ActionChoice(copies=SIZE, arithmetic=True, generator=torch.Generator().manual_seed(3))
    codes, _, _ = choice.choose(torch.zeros(prompts * SIZE, CODES), 0)
    codes = codes.unflatten(0, (SIZE, prompts)).T
    assert (codes.sort(dim=-1).values.diff(dim=-1) > 0).all(), "equal codes within a group"
    values = codes.float()
    # Without an order of the codes, drawn as without putting back: 128 / 127 of what independent samples have.
    assert abs(values.var(dim=-1).mean() / values.flatten().var() - CODES / (CODES - 1)) < 0.03
    # Of two groups they agree as independent samples do.
    agree = (codes[::2, 0] == codes[1::2, 0]).float().mean().item()
    assert abs(agree - 1 / CODES) < 5 * (2 / CODES / prompts) ** 0.5


def test_points_are_even_and_move_together():
    points = even_points(1000, SIZE, torch.Generator().manual_seed(0), "cpu")
    torch.testing.assert_close(points.diff(dim=0) % 1, torch.full((SIZE - 1, 1000), 1 / SIZE))
    assert points.min() >= 0 and points.max() < 1
    assert (torch.histc(points[3], 10, 0, 1) - 100).abs().max() < 40


@pytest.fixture(scope="module")
def perturbed():
    return latent("llava")


def generated(model, inputs, **options):
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "return_dict_in_generate": True}
    return model.generate(**inputs, **settings, **options)


def test_generate_draws_the_first_codes_of_a_prompt_evenly(perturbed):
    model, tiny = perturbed
    torch.manual_seed(0)
    out = generated(model, tiny.inputs, num_return_sequences=SIZE, action_sampling="arithmetic")
    with torch.no_grad():
        law = model(**tiny.inputs, keep_last=1, return_logits=False).action_logits[:, -1].softmax(-1)
    first = out.action_ids[:, 0].unflatten(0, (-1, SIZE))
    found = torch.nn.functional.one_hot(first, law.shape[1]).sum(dim=1)
    assert (found <= (law * SIZE + 1e-3).ceil()).all() and (found >= (law * SIZE - 1e-3).floor()).all()


def test_one_sample_a_prompt_is_drawn_as_ever(perturbed):
    model, tiny = perturbed
    outs = []
    for sampling in ("independent", "arithmetic"):
        torch.manual_seed(0)
        outs.append(generated(model, tiny.inputs, action_sampling=sampling).action_ids)
    assert torch.equal(*outs)


def test_a_generator_decides_and_an_unknown_way_is_refused(perturbed):
    model, tiny = perturbed
    outs = []
    for seed in (5, 5, 6):
        generator = torch.Generator().manual_seed(seed)
        options = {"num_return_sequences": 4, "action_sampling": "arithmetic", "action_generator": generator}
        outs.append(generated(model, tiny.inputs, **options).action_ids)
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])
    with pytest.raises(ValueError, match="`action_sampling` must be one of .*'independent', 'arithmetic'.*got 'even'"):
        generated(model, tiny.inputs, action_sampling="even")
