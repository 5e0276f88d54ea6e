"""Every command on plans: what it answers, what it refuses, and what it says of other models."""

import io
import json
import re
from pathlib import Path

import pytest

from latent_trl.commands.main import main

QUESTIONS = "latent_trl.data.shapes:shape_questions"
POCKET = str(Path(__file__).parents[2] / "model_cards" / "pocket-vlm")
QUIET = ["--use_cpu", "true", "--disable_tqdm", "true", "--save_strategy", "no"]


def asked(folder, picture, *words):
    return [str(folder), "--prompt", "what color is it?", "--image", picture, "--max-new-tokens", "5", *words]


def test_generate_answers_under_the_chosen_plan_a_named_one_and_all(plans, picture, capsys):
    def replies(*words, folder="chooser"):
        assert main(["generate", *asked(plans / folder, picture, "--json", *words)]) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    every = replies("--all-plans")
    assert [reply["plan"] for reply in every] == [0, 1, 2] and all(0 < reply["value"] < 1 for reply in every)
    assert len({reply["text"] for reply in every}) > 1
    assert all("".join(reply["tokens"]).startswith(reply["text"][:1]) for reply in every)
    assert replies("--plan", "1") == every[1:2]
    assert replies() == [max(every, key=lambda reply: reply["value"])]
    bare = replies("--plan=2", folder="bare")
    assert bare == [{name: value for name, value in every[2].items() if name != "value"}]


def test_generate_finds_the_plan_that_a_reward_likes(plans, picture, capsys):
    rewards = ["--reward-funcs", "length", "--reward-kwargs", '{"length": {"target": 1}}']
    for count, folder in ((3, "bare"), (2, "chooser")):
        words = asked(plans / folder, picture, "--json", "--best-of", str(count), *rewards)
        assert main(["generate", *words]) == 0
        (line,) = capsys.readouterr().out.splitlines()
        assert json.loads(line)["reward"] <= 1
    assert main(["generate", *asked(plans / "bare", picture, "--best-of", "2", *rewards)]) == 1
    assert "No chooser has been trained" in capsys.readouterr().err
    assert main(["generate", *asked(plans / "bare", picture, "--best-of", "4", *rewards)]) == 1
    assert "`--best-of` is 4, and there are 3 plans" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, said",
    [
        (["--greedy"], "`--greedy` is for codes a token, and"),
        (["--temperature", "1.0"], "`--temperature` is for codes"),
        (["--top_k=0"], "`--top-k` is for codes"),
        (["--seed", "0"], "`--seed` is for codes"),
        (["--force", "1,2"], "`--force` is for codes"),
        (["-n", "2"], "`--samples` is for codes"),
        (["--tree", "4", "--reward-funcs", "length"], "`--tree` is for codes"),
        (["--all-plans", "--plan", "1"], "--all-plans is not for --plan"),
    ],
)
def test_options_of_codes_are_refused_whatever_their_value(plans, picture, words, said, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["generate", *asked(plans / "chooser", picture, *words)])
    assert stop.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize("command", ["generate", "chat", "evaluate"])
def test_options_of_plans_are_refused_for_codes(checkpoint, command, capsys):
    words = {"generate": ["--prompt", "hi"], "chat": [], "evaluate": [QUESTIONS, "--limit", "2"]}[command]
    with pytest.raises(SystemExit) as stop:
        main([command, checkpoint, *words, "--plan", "1"])
    assert stop.value.code == 2 and "`--plan` is for plans, and" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, said",
    [([], "No chooser has been trained, so a plan must be named"), (["--plan", "3"], "Plans are 0 to 2, got 3")],
)
def test_generate_says_which_plans_there_are(plans, picture, words, said, capsys):
    assert main(["generate", *asked(plans / "bare", picture, *words)]) == 1
    assert said in capsys.readouterr().err


def test_chat_holds_a_plan_and_shows_all(plans, picture):
    from rich.console import Console

    from latent_trl.commands.chat import parse
    from latent_trl.commands.plan_chat import PlanChat
    from latent_trl.commands.plan_replies import load_plan_answerer

    out = io.StringIO()
    args = parse([str(plans / "chooser"), "--max-new-tokens", "6"])
    chat = PlanChat(load_plan_answerer(args, "latent-trl chat"), Console(file=out, width=200))
    assert chat.hear("/plans") and "there is no answer yet" in out.getvalue()
    assert chat.hear(f"/image {picture}") and chat.hear("what color is it?")
    chosen = chat.last
    other = (chosen.plan + 1) % 3
    assert chat.hear(f"/plan {other}") and chat.last.plan == other
    assert [m["role"] for m in chat.messages] == ["user", "assistant"]
    assert chat.messages[-1]["content"] == chat.last.text and len(chat.images) == 1
    before = len(out.getvalue())
    assert chat.hear("/plans")
    shown = out.getvalue()[before:]
    assert re.findall(r"^(>| ) plan (\d)", shown, re.MULTILINE) == [
        (">" if k == other else " ", str(k)) for k in (0, 1, 2)
    ]
    assert chosen.text in shown
    assert chat.hear("what shape is it?") and chat.last.plan == other
    assert chat.hear("/plan") and chat.plan is None
    for line, said in (("/plan 3", "plans are 0 to 2"), ("/codes", "no command /codes"), ("/help", "/plans ")):
        assert chat.hear(line) and said in out.getvalue()
    assert chat.hear("/new") and chat.messages == [] and not chat.hear("/quit")


def test_chat_without_a_chooser_says_which_plan_it_holds(plans, monkeypatch, capsys):
    lines = iter(["hello", "/plan", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert main(["chat", str(plans / "bare"), "--max-new-tokens", "3"]) == 0
    said = capsys.readouterr().out
    assert "plan 0 is held" in said and "3 plans." in said and "/plan N holds a plan" in said


def test_evaluate_measures_the_chosen_plans_and_the_best_of_all(plans, tmp_path):
    path = tmp_path / "figures.json"
    words = [str(plans / "chooser"), QUESTIONS, "--limit", "12", "--reward-funcs", "exact_match", "length"]
    words += ["--reward-kwargs", '{"length": {"target": 2}}', "--max-new-tokens", "5", "--batch-size", "5"]
    assert main(["evaluate", *words, "--code-ceiling", "--image-ablation", "--output", str(path)]) == 0
    found = json.loads(path.read_text())
    figures = found["figures"]
    for name in ("exact_match", "length"):
        best = figures[f"reward/{name}, best plan"]["estimate"]
        (single,) = [f["estimate"] for n, f in figures.items() if n.startswith(f"reward/{name}, plan ")]
        random = figures[f"reward/{name}, random plan"]["estimate"]
        assert random <= single + 1e-9 <= best + 2e-9
        assert figures[f"reward/{name}"]["estimate"] <= best + 1e-9
        assert figures[f"reward/{name}, backbone"]["count"] == 12
    assert [found["all_plans"][i][plan] for i, plan in enumerate(found["plans"])] == found["answers"]
    assert "reward/exact_match, gain by the picture" in figures and len(found["swapped"]) == 12
    assert figures["plans/used"] == len(set(found["plans"]))


def test_evaluate_under_one_plan_needs_no_chooser(plans, tmp_path):
    words = ["evaluate", str(plans / "bare"), QUESTIONS, "--limit", "4", "--max-new-tokens", "3"]
    assert main([*words, "--plan", "2", "--output", str(tmp_path / "a.json")]) == 0
    assert json.loads((tmp_path / "a.json").read_text())["plans"] == [2] * 4


@pytest.mark.parametrize(
    "folder, words, said",
    [
        ("bare", [], "No chooser has been trained: give `--plan N`, or `--code-ceiling`"),
        ("bare", ["--plan", "3"], "Plans are 0 to 2, got 3"),
        ("chooser", ["--code-ceiling", "2", "--reward-funcs", "exact_match"], "takes no number of steps for plans"),
        ("chooser", ["--samples", "2"], "`--samples` is not for plans, which"),
        ("chooser", ["--perplexity", "backbone"], "`--perplexity` is not for plans"),
        ("chooser", ["--seed", "0"], "`--seed` is not for plans"),
        ("chooser", ["--code-ceiling"], "--code-ceiling is of rewards: give --reward-funcs"),
    ],
)
def test_evaluate_refuses_what_plans_cannot_do(plans, folder, words, said, capsys):
    try:
        assert main(["evaluate", str(plans / folder), QUESTIONS, "--limit", "2", *words]) == 1
    except SystemExit as stop:
        assert stop.code == 2
    assert said in capsys.readouterr().err


def test_the_ceiling_of_codes_is_that_of_each_code_forced(checkpoint, tmp_path, picture, capsys):
    path = tmp_path / "figures.json"
    words = [checkpoint, QUESTIONS, "--limit", "3", "--reward-funcs", "length", "--max-new-tokens", "4"]
    words += ["--reward-kwargs", '{"length": {"target": 3}}', "--output", str(path)]
    assert main(["evaluate", *words, "--code-ceiling", "2"]) == 0
    figures = json.loads(path.read_text())["figures"]
    best = figures["reward/length, best code at one of the first 2 steps"]["estimate"]
    assert best >= figures["reward/length"]["estimate"]

    from latent_trl.commands.loading import load_model, load_processor
    from latent_trl.data.shapes import shape_questions
    from latent_trl.evaluation.answers import answer
    from latent_trl.evaluation.code_ceiling import forced_answers

    model, rows = load_model(checkpoint), shape_questions("test", 6)
    processor = load_processor(model)
    found = forced_answers(model, processor, rows, steps=2, max_new_tokens=4)
    assert [len(one.texts) for one in found] == [32] * 6
    greedy = answer(model, processor, rows, max_new_tokens=4)
    for own, of_prompt in zip(greedy.action_ids, found):
        assert [codes[0] for codes in of_prompt.action_ids[:16]] == list(range(16))
        assert [codes[1] for codes in of_prompt.action_ids[16:] if len(codes) > 1][:1] == [0]
        assert of_prompt.action_ids[own[0]] == own and all(codes[0] == own[0] for codes in of_prompt.action_ids[16:])


def test_the_atlas_shows_what_each_plan_says(plans, tmp_path):
    pytest.importorskip("jinja2")
    path = tmp_path / "atlas.html"
    words = [QUESTIONS, "--limit", "6", "--max-new-tokens", "4", "--forced-prompts", "2", "--output", str(path)]
    assert main(["atlas", str(plans / "chooser"), *words]) == 0
    page = path.read_text()
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert re.findall(r'id="plan-(\d+)"', page) == ["0", "1", "2"] and page.count('class="prompt"') == 2
    assert page.count("chip chosen") == 2 and "chosen for" in page and "NaN" not in page
    with pytest.raises(SystemExit):
        main(["atlas", str(plans / "chooser"), *words, "--seed", "1"])
    assert main(["atlas", str(plans / "bare"), *words]) == 0
    assert "chosen for" not in path.read_text()


def test_the_page_of_plans_shows_words_as_words(tmp_path):
    pytest.importorskip("jinja2")
    from latent_trl.evaluation.plan_atlas import PlanAtlas, PlanEntry, plan_example, write_plan_atlas

    bad = "<script>alert(1)</script>"
    example = plan_example({"prompt": bad}, [bad, "a", bad], bad, 1)
    assert example.answers == [(bad, [0, 2]), ("a", [1])]
    page = write_plan_atlas(
        PlanAtlas("<m>", bad, 1, 2.0, [PlanEntry(0, [(bad, 1)])], [example], {"<i>": 1.0}), tmp_path / "a.html"
    ).read_text()
    assert "<script>" not in page and "<m>" not in page and "<i>" not in page
    assert "the model holds one for" not in page
    switched = PlanAtlas("m", "d", 1, 2.0, [PlanEntry(0, [("a", 1)])], [], held="a segment that a learned switch ends")
    page = write_plan_atlas(switched, tmp_path / "b.html").read_text()
    assert "the model holds one for a segment that a learned switch ends" in page


def test_plans_are_learned_chosen_and_used_from_the_command_line(tmp_path, capsys):
    space, bandit = str(tmp_path / "space"), str(tmp_path / "bandit")
    shared = ["--dataset_name", "shapes", *QUIET, "--dataset_limit", "12", "--max-completion-length", "6"]
    config = tmp_path / "plans.yaml"
    config.write_text(f"kind: plans\nmodel_name_or_path: {POCKET}\nnum_plans: 4\nanswers-per-prompt: 3\n")
    words = ["--max_steps", "1", "--per_device_train_batch_size", "4", "--reward_funcs", "exact_match"]
    words += ["--output_dir", space, "--eval_steps", "1", "--branch_min_prob", "0.005"]
    assert main(["learn", "--config", str(config), *words, *shared]) == 0
    record = json.loads((tmp_path / "space" / "plan_config.json").read_text())
    assert record["num_plans"] == 4 and record["base_model_name_or_path"] == POCKET
    words = [
        "--model_name_or_path",
        space,
        "--reward_funcs",
        "exact_match",
        "--max_steps",
        "2",
        "--num_iterations",
        "1",
    ]
    words += ["--rollout_prompts", "4", "--eval_dataset_name", "shapes", "--output_dir", bandit]
    assert main(["bandit", *words, *shared]) == 0
    assert (tmp_path / "bandit" / "chooser.safetensors").is_file()
    assert main(["inspect", bandit]) == 0
    assert "4 of rank 4" in " ".join(capsys.readouterr().out.split())


def test_a_switch_is_learned_and_used_from_the_command_line(tmp_path, capsys, picture):
    space, found = str(tmp_path / "space"), str(tmp_path / "rloo")
    shared = ["--dataset_name", "shapes", *QUIET, "--dataset_limit", "12", "--max-completion-length", "6"]
    shared += ["--reward_funcs", "exact_match", "--eval_strategy", "no"]
    words = ["--model_name_or_path", POCKET, "--num_plans", "4", "--answers_per_prompt", "3", "--segment", "switch"]
    words += ["--max_steps", "1", "--per_device_train_batch_size", "4", "--branch_min_prob", "0.005"]
    assert main(["learn", "--kind", "plans", *words, "--output_dir", space, *shared]) == 0
    record = json.loads((tmp_path / "space" / "plan_config.json").read_text())
    assert record["segment"] == "switch" and record["segment_end_token_ids"]
    words = ["--model_name_or_path", space, "--max_steps", "2", "--num_iterations", "1", "--rollout_prompts", "4"]
    assert main(["bandit", *words, "--output_dir", found, *shared]) == 1
    assert "`segment='switch'`: a bandit estimates what plans are worth" in capsys.readouterr().err
    assert main(["rloo", *words, "--num_generations", "3", "--output_dir", found, *shared]) == 0
    capsys.readouterr()
    assert main(["generate", *asked(found, picture, "--json")]) == 0
    reply = json.loads(capsys.readouterr().out)
    assert len(reply["plans"]) == len(reply["segments"]) >= 1
    words = ["--reward-funcs", "exact_match", "--limit", "2", "--max-new-tokens", "4"]
    assert main(["evaluate", found, QUESTIONS, *words]) == 0


@pytest.mark.parametrize(
    "words, said",
    [
        (["learn", "--kind", "plan"], "`--kind` must be one of ['codes', 'plans'], got 'plan'"),
        (["learn", "--kind"], "`--kind` must be one of"),
        (["learn", "--kind", "plans", "--num_codes", "8"], "no option `--num_codes`"),
        (["learn", "--kind=plans", "--model_name_or_path", "m"], "`--dataset_name` is missing"),
        (["learn", "--num_plans", "8"], "no option `--num_plans`"),
        (["bandit", "--anchor_dataset_name", "chitchat"], "no option `--anchor_dataset_name`"),
        (["bandit", "--dataset_name", "d", "--model_name_or_path", "m", "--use_peft"], "`--use_peft` has nothing to"),
        (["demo", "--plans", "--rl-steps", "3"], "no option `--rl-steps`"),
        (["demo", "--plans", "--num-plans", "2"], "`num_plans` must be at least 5, got 2"),
    ],
)
def test_wrong_usage_of_training_is_one_line(words, said, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2 and said in capsys.readouterr().err


def test_training_says_what_a_folder_is(plans, checkpoint, tmp_path, capsys):
    shared = ["--dataset_name", "shapes", "--dataset_limit", "4", "--reward_funcs", "exact_match", *QUIET]
    for command, model, said in (
        (["bandit"], checkpoint, "is a model of codes a token, not of plans. `latent-trl learn --kind plans`"),
        (["bandit"], POCKET, "is a backbone without plans"),
        (["bandit"], str(plans / "bare" / "plan_01"), "is one plan, or another adapter of PEFT"),
        (["bandit"], "nowhere/at/all", "There is no model 'nowhere/at/all'"),
        (["learn", "--kind", "plans"], checkpoint, "holds codes a token. Plans are learned on a backbone"),
        (["learn", "--kind", "plans", "--num_plans", "5"], str(plans / "bare"), "{'num_plans': 5} cannot be changed"),
        (["grpo"], str(plans / "bare" / "plan_01"), "is no model. `latent-trl learn` makes latent actions"),
    ):
        assert main([*command, "--model_name_or_path", model, *shared, "--output_dir", str(tmp_path / "o")]) == 1
        assert said in capsys.readouterr().err, (command, said)
    words = ["--dataset_name", "chitchat", "--dataset_limit", "4", "--output_dir", str(tmp_path / "o")]
    assert main(["sft", "--model_name_or_path", str(plans / "bare"), *words]) == 1
    assert "holds plans, and this command is for codes a token. For plans there are" in capsys.readouterr().err
    assert main(["studio", str(plans / "bare")]) == 1
    assert "holds plans, and the studio shows codes a token. `latent-trl chat`" in capsys.readouterr().err
    (tmp_path / "rows.jsonl").write_text('{"prompt": "what?", "answer": "that."}\n')
    words = ["--dataset_name", str(tmp_path / "rows.jsonl"), "--model_name_or_path", POCKET]
    assert main(["learn", "--kind", "plans", *words, "--output_dir", str(tmp_path / "o")]) == 1
    assert (
        "is a file, which has no split 'test'. Give held-out prompts with `--eval_dataset_name`"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("given", ["words", "file"])
def test_rloo_has_one_estimator(plans, given, tmp_path, capsys):
    words = ["rloo", "--model_name_or_path", str(plans / "bare"), "--dataset_name", "shapes"]
    (tmp_path / "run.yaml").write_text("advantage_estimator: grpo\n")
    more = {"words": ["--advantage_estimator=grpo"], "file": ["--config", str(tmp_path / "run.yaml")]}[given]
    with pytest.raises(SystemExit) as stop:
        main([*words, *more])
    assert stop.value.code == 2 and "`--advantage_estimator` is that of `rloo`" in capsys.readouterr().err


@pytest.mark.parametrize("command, name", [("grpo", "PlanGRPO"), ("rloo", "PlanGRPO"), ("ppo", "PlanPPO")])
def test_policy_gradients_take_plans(plans, command, name, tmp_path, capsys):
    words = ["--model_name_or_path", str(plans / "bare"), "--dataset_name", "shapes", "--dataset_limit", "4"]
    words += ["--reward_funcs", "exact_match", "--max_steps", "2", "--num_iterations", "2", "--rollout_prompts", "4"]
    words += ["--num_generations", "2", "--max_completion_length", "4", "--output_dir", str(tmp_path / "out"), *QUIET]
    assert main([command, *words]) == 0
    assert (tmp_path / "out" / "chooser.safetensors").is_file()
    with pytest.raises(SystemExit):
        main([command, *words, "--action_temperature", "2"])
    assert "no option `--action_temperature`" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([command, *words[:2], "--help"])
    assert f"training, of {name}Config:" in capsys.readouterr().out


@pytest.mark.slow
def test_the_demo_of_plans_gains(tmp_path, capsys):
    words = ["--space-prompts", "100", "--space-steps", "40", "--rollouts", "512", "--test-prompts", "60"]
    assert main(["demo", "--plans", *words, "--output-dir", str(tmp_path)]) == 0
    reward = json.loads((tmp_path / "result.json").read_text())["reward"]
    print(reward)
    assert reward["after RL"] >= reward["backbone"] + 0.15
    assert 'id="plan-15"' in (tmp_path / "report.html").read_text()
    assert main(["inspect", str(tmp_path / "model")]) == 0


def test_a_check_of_a_backbone_names_it(plans, capsys):
    assert main(["check-backbone", str(plans / "bare")]) == 1
    assert "holds plans, and a backbone is asked for" in " ".join(capsys.readouterr().out.replace("│", " ").split())
