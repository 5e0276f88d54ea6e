"""Help is instant, because it imports neither torch nor TRL; wrong words are named with the right ones."""

import inspect
import json
import re
import shutil
import subprocess
import sys
from dataclasses import fields

import pytest
from terminal import Terminal

from latent_trl import LatentActionConfig
from latent_trl.commands import arguments, plan, training_help
from latent_trl.commands.main import COMMANDS, main

PROBE = """
import contextlib, io, json, sys, time
start = time.perf_counter()
from latent_trl.commands.main import COMMANDS, main
shown = {}
for name in [None, *COMMANDS, "learn --kind plans", "demo --plans"]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            main([*name.split(), "--help"] if name else ["--help"])
        except SystemExit as stop:
            assert not stop.code, (name, stop.code)
    shown[name or ""] = out.getvalue()
print(json.dumps({"shown": shown, "seconds": time.perf_counter() - start, "modules": sorted(sys.modules)}))
"""
TRAINING = {
    "learn": "LatentActionSpaceConfig",
    "sft": "LatentActionSFTConfig",
    "distill": "LatentActionDistillationConfig",
    "grpo": "LatentActionGRPOConfig",
    "rloo": "LatentActionRLOOConfig",
    "ppo": "LatentActionPPOConfig",
    "learn --kind plans": "PlanSpaceConfig",
    "bandit": "PlanBanditConfig",
}


@pytest.fixture(scope="module")
def probe():
    return json.loads(subprocess.run([sys.executable, "-c", PROBE], check=True, capture_output=True).stdout)


def test_help_imports_nothing_heavy(probe):
    assert not {"torch", "transformers", "trl", "datasets"} & set(probe["modules"])
    assert probe["seconds"] < 2


def test_every_command_has_help(probe):
    for name in COMMANDS:
        assert name in probe["shown"][""] and "usage:" in probe["shown"][name]


@pytest.mark.parametrize("command", TRAINING)
def test_help_of_training_has_every_own_option(probe, command):
    names = [option.name for option in training_help.config_options(TRAINING[command])]
    assert len(names) > 8
    assert not [name for name in names if f"--{name}" not in probe["shown"][command].split()]


@pytest.mark.parametrize("command", TRAINING)
def test_help_begins_with_what_everyone_sets_and_has_no_option_twice(probe, command):
    shown = probe["shown"][command]
    _, common, *_ = re.split(r"^(?:what most runs set|model and data|training, of \w+):$", shown, flags=re.MULTILINE)
    first = re.findall(r"^  --(\w+)", common, re.MULTILINE)
    assert 9 <= len(first) <= 12 and first[:2] == ["model_name_or_path", "dataset_name"]
    assert not [line for line in common.splitlines() if re.fullmatch(r"  --\w+", line)]
    every = re.findall(r"^  --(\w+)", shown, re.MULTILINE)
    assert len(every) == len(set(every))
    assert "default_factory" not in shown and max(map(len, shown.splitlines())) <= 90


@pytest.mark.parametrize("command", TRAINING)
def test_help_says_the_defaults_that_hold(probe, command):
    from dataclasses import fields

    import latent_trl

    defaults = {f.name: f.default for f in fields(getattr(latent_trl, TRAINING[command]))}
    entries = [" ".join(entry.split()) for entry in probe["shown"][command].split("\n  --")[1:]]
    said = {entry.split()[0]: re.search(r"\(default: ([^)]*)\)", entry) for entry in entries}
    assert sum(match is not None for match in said.values()) > 8
    for name, match in said.items():
        if match is not None and name in defaults and name != "output_dir":
            assert str(defaults[name]) == match[1], name


def test_the_meaning_of_an_option_is_the_first_sentence_of_its_docstring():
    docstring = """
    What it is.

    Args:
        a_rate (`float`, defaults to `1e-4`), b_rate (`float`, defaults to
        `1e-3`), c_rate:
            The paper's. More of it.
        mode (`str`, *optional*): What, as in `x.y`. Or not.
    """
    found = training_help.field_meanings(inspect.cleandoc(docstring))
    assert found == {
        "a_rate": "The paper's",
        "b_rate": "The paper's",
        "c_rate": "The paper's",
        "mode": "What, as in `x.y`",
    }


def test_an_unknown_command_is_named_with_the_nearest(capsys):
    assert main(["genrate"]) == 2
    assert "Did you mean 'generate'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, said",
    [
        (["--lerning_rate", "1"], "no option `--lerning_rate`. Did you mean `--learning_rate`?"),
        (["--reward_func", "exact_match"], "Did you mean `--reward_funcs`?"),
        (["--config"], "`--config` needs the name of a YAML file"),
        (["--config", "nowhere.yaml"], "there is no configuration file 'nowhere.yaml'"),
        (["--max-stps", "1"], "no option `--max-stps`. Did you mean `--max_steps`?"),
        (["--model", "x"], "Did you mean `--model_name_or_path`?"),
        (["--lr=1"], "Did you mean `--learning_rate`?"),
        (["outputs/space"], "'outputs/space' stands alone"),
        (["--learning_rate", "fast"], "invalid float value: 'fast'"),
        (["--dataset_name", "x"], "`--model_name_or_path` is missing"),
        ([], "`--dataset_name` is missing"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(words, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["grpo", *words])
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("latent-trl grpo: ")]
    assert len(lines) == 1 and said in lines[0]


@pytest.mark.parametrize(
    "text, said",
    [
        ("num_genrations: 4\n", "has the key `num_genrations`, which is no option. Did you mean `num_generations`?"),
        ("lr: 4\n", "Did you mean `learning_rate`?"),
        ("save_strategy: no\n", '`save_strategy` is a word that YAML reads as false: put it in quotes, such as "no"'),
        ("env: x\n", "`env` must hold `NAME: value` lines"),
        ("- a\n- b\n", "must hold `key: value` lines, got list"),
        ("a: [\n", "is not YAML"),
    ],
)
def test_a_wrong_configuration_file_says_what_is_wrong(text, said, capsys, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(SystemExit) as stop:
        main(["grpo", f"--config={path}"])
    assert stop.value.code == 2 and said in capsys.readouterr().err


def test_flags_win_over_the_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "num_codes: 32\ndataset_name: a\nmodel_name_or_path: m\njoint_learning_rate: 1e-3\nstages: [joint]\n"
    )
    given, config, model = arguments.parse_training(
        ["--config", str(path), "--num_codes", "64", "--policy_decoder", '{"num_hidden_layers": 2}'],
        "latent-trl learn",
        arguments.LearnArguments,
        "LatentActionSpaceConfig",
    )
    assert (given.num_codes, given.dataset_name, model.model_name_or_path) == (64, "a", "m")
    assert config.joint_learning_rate == 1e-3 and config.stages == ["joint"]
    assert config.output_dir == "outputs/learn"
    assert given.model_fields()["policy_decoder"] == {"num_hidden_layers": 2}
    assert "dataset_name" not in given.model_fields()


def test_a_file_may_have_dashes_and_a_single_value_of_a_list(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("dataset-name: a\nmodel-name-or-path: m\nreward_funcs: exact_match\nlearning-rate: 3e-4\n")
    words = ["--config", str(path), "--max-steps", "3", "--num_generations=4"]
    given, config, model = arguments.parse_training(
        words, "latent-trl grpo", arguments.RewardArguments, "LatentActionGRPOConfig"
    )
    assert (given.dataset_name, model.model_name_or_path, given.reward_funcs) == ("a", "m", ["exact_match"])
    assert (config.learning_rate, config.max_steps, config.num_generations) == (3e-4, 3, 4)


def test_default_layers_are_said_and_counted_as_they_are_made():
    made, counted = LatentActionConfig(), plan.parse(["somewhere"])
    for part in ("policy", "inverse_dynamics"):
        layers = getattr(made, f"{part}_decoder")["num_hidden_layers"]
        said = {one.name: one.metadata["help"] for one in fields(arguments.LearnArguments) if one.metadata}
        assert getattr(counted, f"{part}_layers") == layers
        assert said[f"{part}_layers"].endswith(f"; {layers} if not given")


def test_layers_are_a_number_or_part_of_the_decoder_not_both():
    given = arguments.LearnArguments(policy_layers=3, policy_decoder='{"hidden_size": 64}')
    assert given.model_fields()["policy_decoder"] == {"hidden_size": 64, "num_hidden_layers": 3}
    assert given.model_fields()["inverse_dynamics_decoder"] is None
    with pytest.raises(ValueError, match="`policy_layers` and the `num_hidden_layers` of `policy_decoder`"):
        arguments.LearnArguments(policy_layers=3, policy_decoder='{"num_hidden_layers": 2}').model_fields()


@pytest.mark.parametrize(
    "words, said",
    [
        (["demo", "--test-prompts", "5"], "`test_prompts` must be at least 6, got 5"),
        (["demo", "--test_prompts=5"], "`test_prompts` must be at least 6, got 5"),
        (["demo", "--num-generations", "1"], "`num_generations` must be at least 2, got 1"),
        (["demo", "--rl-steps", "0"], "`rl_steps` must be at least 1, got 0"),
        (["demo", "--algorithm", "dpo"], "`algorithm` must be 'grpo' or 'ppo', got 'dpo'"),
        (["demo", "--prompts", "5"], "no option `--prompts`. Did you mean"),
        (["evaluate", "m", "d", "--limit", "0"], "--limit: must be at least 1, got 0"),
        (["evaluate", "m", "d", "--reward_fncs", "x"], "Did you mean `--reward-funcs`?"),
        (["atlas", "m", "d", "--batch_size", "0"], "--batch-size: must be at least 1, got 0"),
        (["generate", "m", "hello"], "'hello' stands alone"),
        (["generate", "m", "--max_new_tokens", "0"], "--max-new-tokens: must be at least 1, got 0"),
        (["chat", "m", "--temprature", "1"], "Did you mean `--temperature`?"),
        (["distill", "m", "d", "--output", "a", "--output_dir=b"], "`--output` and `--output_dir` are the same"),
        (["evaluate", "m", "d", "--reward-timeout", "nan"], "--reward-timeout: must be a number above 0, got nan"),
    ],
)
def test_other_commands_name_what_is_wrong_in_one_line(words, said, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"latent-trl {words[0]}: ") and said in line


def test_help_is_a_command_too(capsys):
    with pytest.raises(SystemExit):
        main(["help", "atlas"])
    assert "usage: latent-trl atlas" in capsys.readouterr().out


def test_bash_completes_commands_and_options():
    script = (
        'eval "$(python -m latent_trl completion)"; latent-trl() { python -m latent_trl "$@"; }\n'
        'COMP_WORDS=(latent-trl che); COMP_CWORD=1; _latent_trl; echo "${COMPREPLY[@]}"\n'
        'COMP_WORDS=(latent-trl grpo --action_te); COMP_CWORD=2; _latent_trl; echo "${COMPREPLY[@]}"\n'
    )
    python = f'python() {{ {sys.executable} "$@"; }}\n'
    said = subprocess.run(["bash", "-c", python + script], capture_output=True, text=True, check=True).stdout
    assert said.split() == ["check-backbone", "--action_temperature"]


@pytest.mark.skipif(shutil.which("zsh") is None, reason="needs zsh")
def test_zsh_completes_commands_and_options(tmp_path):
    """In a real pseudo-terminal: what the tab key writes."""
    terminal = Terminal(["zsh", "-f", "-i"], HOME=str(tmp_path), ZDOTDIR=str(tmp_path), PS1="READY> ")
    terminal.until(b"READY> ")
    terminal.type(
        f'latent-trl() {{ {sys.executable} -m latent_trl "$@" }}; eval "$(latent-trl completion)"; echo DO""NE'
    )
    terminal.until(b"DONE(.|\n)*READY> ")
    terminal.write("latent-trl che\t")
    terminal.until(b"ck-backbone")
    terminal.write("\x15latent-trl grpo --action_te\t")
    terminal.until(b"mperature")
    terminal.write("\x15")
    terminal.type("exit")
    assert terminal.process.wait(timeout=30) == 0


def test_a_command_leaves_out_what_transformers_says_of_its_own_names(monkeypatch):
    import warnings

    def warns(argv):
        warnings.warn_explicit("`a` is now `b`.", FutureWarning, "modeling_utils.py", 1, "transformers.modeling_utils")
        warnings.warn_explicit("look here", UserWarning, "modeling_utils.py", 2, "transformers.modeling_utils")

    monkeypatch.setattr("latent_trl.commands.env.main", warns)
    for words, told in ((["env"], ["look here"]), (["--debug", "env"], ["`a` is now `b`.", "look here"])):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert main(words) == 0
        assert [str(one.message) for one in caught] == told
