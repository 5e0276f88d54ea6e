"""Losses and figures of learning, against sums written out by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from learning_runs import build_space, paired_rows, text_rows

from latent_trl.data.collator import LatentActionDataCollator
from latent_trl.models.cross_entropy import mean_part
from latent_trl.trainer.sft.trainer import guided_loss
from latent_trl.trainer.space import objective as latent_action_space_objective
from latent_trl.trainer.space.figures import distinct_next_tokens, mutual_information
from latent_trl.trainer.space.objective import BALANCE_TEMPERATURE, PROJECTION_COEF, LatentActionSpaceObjective
from latent_trl.trainer.space.observation import context, observe


def learner(stage: str, **options):
    """A perturbed model, a batch of rows with 1, 2 and 0 images, and the objective."""
    from tiny_models import latent, latent_config

    of_model = {name: options.pop(name) for name in ("num_codes", "use_projector") if name in options}
    model, tiny = latent("llava", latent_config(**{"num_codes": 16, **of_model}))
    collate = LatentActionDataCollator(
        tiny.processor,
        vision_token_ids=model.config.vision_token_ids,
        assistant_only=options.pop("assistant_only", True),
    )
    batch = collate([*paired_rows(2), *text_rows(2)])
    return model, batch, LatentActionSpaceObjective(stage, **options)


def rows_of(batch):
    """Positions t and rows b whose next token counts, one by one."""
    for b in range(len(batch["input_ids"])):
        for t in range(batch["input_ids"].shape[1] - 1):
            if batch["loss_mask"][b, t + 1]:
                yield b, t


@torch.no_grad()
@pytest.mark.parametrize("assistant_only", [True, False])
def test_cloning_loss_is_the_sum_over_the_marked_positions(assistant_only):
    model, batch, objective = learner("policy", assistant_only=assistant_only, cloning_target="inferred")
    states, positions = model.encode(batch["input_ids"], batch["attention_mask"], **batch["vision"])
    wanted = model.infer(states, batch["input_ids"], batch["attention_mask"], positions).argmax(-1)
    log_probs = model.policy(states, batch["attention_mask"], positions).log_softmax(-1)
    sums = {True: [], False: []}
    for b, t in rows_of(batch):
        sums[bool(batch["has_image"][b])].append(-log_probs[b, t, wanted[b, t]].item())
    expected = sum(sum(values) / len(values) for values in sums.values())
    assert objective(model, batch).item() == pytest.approx(expected, rel=1e-5)
    count = sum(map(len, sums.values()))
    assert count == int(batch["loss_mask"][:, 1:].sum())
    figures = objective.figures.drain()
    assert figures["policy/cloning_loss"] == pytest.approx(sum(map(sum, sums.values())) / count, rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("assistant_only", [True, False])
@pytest.mark.parametrize("guidance", ["inferred", "policy"])
def test_sft_loss_is_the_sum_over_the_marked_positions(assistant_only, guidance):
    model, batch, _ = learner("policy", assistant_only=assistant_only)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    codes = None
    if guidance == "inferred":
        states, positions = model.encode(ids, mask, **batch["vision"])
        codes = model.infer(states, ids, mask, positions).argmax(-1)
        codes = torch.cat([codes, codes[:, -1:]], dim=1)
    output = model(input_ids=ids, attention_mask=mask, action_ids=codes, **batch["vision"])
    log_probs = output.logits.log_softmax(-1)
    values = [-log_probs[b, t, batch["input_ids"][b, t + 1]].item() for b, t in rows_of(batch)]
    assert guided_loss(model, batch, guidance).item() == pytest.approx(sum(values) / len(values), rel=1e-5)


@torch.no_grad()
def test_action_loss_and_figures():
    model, batch, objective = learner("inverse_dynamics", entropy_coef=0.3, balance_coef=0.7, seed=5)
    loss = objective(model, batch).item()
    figures = objective.figures.drain()
    states, positions = model.encode(batch["input_ids"], batch["attention_mask"], **batch["vision"])
    backbone_states = observe(model, batch).states
    logits = model.infer(states, batch["input_ids"], batch["attention_mask"], positions)
    probs = logits.softmax(-1)
    terms, entropies, marginal, sharp = {True: [], False: []}, [], 0.0, 0.0
    codes, tokens, ces, plain = [], [], [], []
    for b in range(4):
        mask = batch["loss_mask"][b, 1:]
        generator = objective._random(states.device, 0, b)
        noisy, ids = model.codebook.straight_through(logits[b][mask], model.config.gumbel_temperature, generator)
        for i, t in enumerate(mask.nonzero().flatten().tolist()):
            target = batch["input_ids"][b, t + 1].item()

            def ce(code, s=states[b, t], alone=backbone_states[b, t], target=target):
                merged = alone if code is None else model.merge(s, code)
                return -model.backbone_view.logits(merged[None, None])[0, 0].log_softmax(-1)[target].item()

            entropy = -sum(p * math.log(p) for p in probs[b, t].tolist())
            entropies.append(entropy)
            terms[bool(batch["has_image"][b])].append(ce(noisy[i]) - 0.3 * entropy)
            marginal = marginal + probs[b, t]
            sharp = sharp + (logits[b, t] / BALANCE_TEMPERATURE).softmax(-1)
            codes.append(probs[b, t].argmax().item())
            tokens.append(target)
            ces.append(ce(model.codebook.weight[codes[-1]]))
            plain.append(ce(None))
    spread, balance = (-sum(p * math.log(p) for p in (total / len(codes)).tolist()) for total in (marginal, sharp))
    expected = sum(sum(v) / len(v) for v in terms.values()) - 0.7 * balance
    assert loss == pytest.approx(expected, rel=1e-4)
    mean = sum(ces) / len(ces)
    usage = [codes.count(k) / len(codes) for k in set(codes)]
    by_hand = {
        "world_model/ce": mean,
        "world_model/ce_gap_no_action": sum(plain) / len(plain) - mean,
        "codebook/marginal_entropy": spread,
        "codebook/conditional_entropy": sum(entropies) / len(entropies),
        "codebook/used": len(set(codes)),
        "codebook/perplexity": math.exp(-sum(p * math.log(p) for p in usage)),
        "codebook/mutual_information": information(codes, tokens),
    }
    for name, value in by_hand.items():
        assert figures[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    assert objective.figures.drain() == {}


def information(codes, tokens) -> float:
    n, total = len(codes), 0.0
    for pair in set(zip(codes, tokens)):
        p = sum(q == pair for q in zip(codes, tokens)) / n
        total += p * math.log(p / (codes.count(pair[0]) / n) / (tokens.count(pair[1]) / n))
    return total


def test_mutual_information_of_known_cases():
    codes = torch.tensor([0, 1, 2, 3] * 5)
    assert mutual_information(codes, codes * 7, 4).item() == pytest.approx(math.log(4), rel=1e-5)
    assert mutual_information(codes, torch.zeros_like(codes), 4).item() == pytest.approx(0, abs=1e-6)
    assert mutual_information(codes, torch.tensor([0, 0, 1, 1] * 5), 8).item() == pytest.approx(math.log(2), rel=1e-5)


@torch.no_grad()
def test_distinct_next_tokens_counts_arg_maxima():
    model, batch, _ = learner("policy")
    states, _ = model.encode(batch["input_ids"], batch["attention_mask"], **batch["vision"])
    for state in states[0, :3]:
        ids = {
            model.backbone_view.logits(model.merge(state, code)[None, None]).argmax().item()
            for code in model.codebook.weight
        }
        assert distinct_next_tokens(model, state[None]).tolist() == [len(ids)]
    model.codebook.weight.zero_()
    assert distinct_next_tokens(model, states[0, :2]).tolist() == [1, 1]


@torch.no_grad()
def test_projector_losses():
    model, batch, objective = learner("joint", cycle_coef=1.0)
    objective.figures.start(16, torch.device("cpu"))
    projection = objective._projector_loss(model, batch, observe(model, batch), objective.whole_update([batch]))
    view, image = model.backbone_view, batch["has_image"]
    with_image = view.encode(batch["input_ids"], batch["attention_mask"], **batch["vision"])
    without = view.encode(batch["input_ids"], batch["attention_mask"], position_ids=with_image.position_ids)

    def nll(mean, log_variance, y):
        return ((mean - y) ** 2 * torch.exp(-log_variance) + log_variance).sum().item()

    paired, cycle = [], []
    to_image, to_text = model.projector.to_image, model.projector.to_text
    for b, t in batch["token_mask"].nonzero().tolist():
        text, seen = without.states[b, t], with_image.states[b, t]
        if image[b]:
            paired.append(nll(*to_image.distribution(text), seen) + nll(*to_text.distribution(seen), text))
        else:
            cycle.append(nll(*to_text.distribution(to_image(text)), text))
    figures = objective.figures.drain()
    assert figures["projector/nll"] == pytest.approx(sum(paired) / len(paired), rel=1e-4)
    assert figures["projector/cycle"] == pytest.approx(sum(cycle) / len(cycle), rel=1e-4)
    expected = PROJECTION_COEF * sum(paired) / len(paired) + sum(cycle) / len(cycle)
    assert projection.item() == pytest.approx(expected, rel=1e-4)


@torch.no_grad()
def test_without_a_projector_the_joint_loss_is_the_cross_entropy_of_both_kinds():
    model, batch, objective = learner("joint", use_projector=False, entropy_coef=0.0, balance_coef=0.0)
    loss = objective(model, batch)
    states = model.backbone_view.encode(batch["input_ids"], batch["attention_mask"], **batch["vision"]).states
    mask = batch["loss_mask"][:, 1:]
    logits = model.infer(states, batch["input_ids"], batch["attention_mask"])[mask]
    merged = model.merge(states[:, :-1][mask], objective._choose(model, logits, mask))
    losses = F.cross_entropy(model.backbone_view.logits(merged), batch["input_ids"][:, 1:][mask], reduction="none")
    image = batch["has_image"][:, None].expand_as(mask)[mask]
    assert 0 < image.sum() < len(image)
    assert loss.item() == pytest.approx((losses[image].mean() + losses[~image].mean()).item(), rel=1e-4)
    assert not {name for name in objective.figures.drain() if name.startswith("projector/")}


@torch.no_grad()
def test_text_rows_pass_the_same_function_in_learning_scoring_and_generating():
    """P of the state, whichever way it is reached, and whatever stands beside the row in its batch."""
    model, batch, _ = learner("policy")
    learned = context(model, observe(model, batch))
    scored, _ = model.encode(batch["input_ids"], batch["attention_mask"], **batch["vision"])
    assert torch.equal(learned, scored)
    row = 2
    n = int(batch["attention_mask"][row].sum())
    ids = batch["input_ids"][row : row + 1, :n]
    assert not batch["has_image"][row]
    raw = model.backbone_view.encode(ids, None).states
    assert not torch.allclose(raw, model.projector(raw), atol=1e-3)
    prompt = n - 4
    forced = model(input_ids=ids).action_ids[:, prompt - 1 : -1]
    output = model.generate(
        input_ids=ids[:, :prompt],
        max_new_tokens=4,
        return_dict_in_generate=True,
        output_context_states=True,
        action_do_sample=False,
        do_sample=False,
    )
    generated = output.context_states
    assert torch.allclose(generated[:, :prompt], model.projector(raw)[:, :prompt], atol=1e-5)
    assert torch.allclose(learned[row, :prompt], generated[0, :prompt], atol=1e-5)
    assert output.action_ids[0, 0] == forced[0, 0]


def test_mean_over_processes():
    """Two processes' averages of their parts, and of the gradients, are the mean of one with all the values."""
    values = torch.randn(7)
    whole = values.clone().requires_grad_()
    expected = mean_part(whole)
    expected.backward()
    assert expected.item() == pytest.approx(values.mean().item(), rel=1e-6)
    own = [values[part].clone().requires_grad_() for part in (slice(0, 2), slice(2, 7))]
    loss = sum(mean_part(v, torch.tensor(7 / 2)) for v in own) / 2
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    assert torch.allclose(torch.cat([v.grad for v in own]), whole.grad)
    nothing = mean_part(own[0][:0])
    assert nothing.item() == 0 and nothing.requires_grad


def test_noise_belongs_to_a_row_and_a_step():
    objective = LatentActionSpaceObjective("joint", seed=3, kinds=2)
    draw = lambda o, *place: torch.rand(4, generator=o._random(torch.device("cpu"), *place)).tolist()  # noqa: E731
    assert draw(objective, 0, 1) == draw(objective, 0, 1) != draw(objective, 1, 1)
    first = draw(objective, 0, 1)
    objective.step = 1
    assert draw(objective, 0, 1) != first


@pytest.mark.parametrize("strategy, expected", [("steps", [2, 4]), ("epoch", [1, 2, 3, 4, 5])])
def test_other_codes_are_read_on_logged_steps_alone(strategy, expected, tmp_path, monkeypatch):
    trainer = build_space(
        tmp_path,
        stages=["inverse_dynamics"],
        inverse_dynamics_max_steps=5,
        logging_steps=2,
        logging_strategy=strategy,
    )
    measured = []

    def count(model, states):
        measured.append(trainer.state.global_step + 1)
        return distinct_next_tokens(model, states)

    monkeypatch.setattr(latent_action_space_objective, "distinct_next_tokens", count)
    trainer.train()
    assert measured == expected
    rows = [row for row in trainer.history if "loss" in row]
    assert rows and all("world_model/ce_gap_random_action" in row for row in rows)
