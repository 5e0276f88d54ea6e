"""Help is instant, because it imports neither torch nor TRL; wrong words are named with the right ones."""

import json
import shutil
import subprocess
import sys

import pytest
from terminal import Terminal

from latent_trl.commands import arguments, training_help
from latent_trl.commands.main import COMMANDS, main

PROBE = """
import contextlib, io, json, sys, time
start = time.perf_counter()
from latent_trl.commands.main import COMMANDS, main
shown = {}
for name in [None, *COMMANDS]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            main([name, "--help"] if name else ["--help"])
        except SystemExit as stop:
            assert not stop.code, (name, stop.code)
    shown[name or ""] = out.getvalue()
print(json.dumps({"shown": shown, "seconds": time.perf_counter() - start, "modules": sorted(sys.modules)}))
"""
TRAINING = {
    "learn": "LatentActionSpaceConfig",
    "sft": "LatentActionSFTConfig",
    "grpo": "LatentActionGRPOConfig",
    "ppo": "LatentActionPPOConfig",
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
