"""`--accelerate_config` of the training commands: what is accelerate's, what is the command's, and what is started."""

import pytest

from latent_trl.commands import launching, main

MODEL = ["--model_name_or_path", "m"]


@pytest.mark.parametrize(
    "argv, options, rest",
    [
        (["--accelerate_config", "fsdp2", *MODEL], ["--accelerate_config", "fsdp2"], MODEL),
        (["--accelerate-config=a.yaml", *MODEL], ["--accelerate_config", "a.yaml"], MODEL),
        ([*MODEL, "--num-processes", "4"], ["--num_processes", "4"], MODEL),
        (["--num_generations", "4", "--config=x"], [], ["--num_generations", "4", "--config=x"]),
    ],
)
def test_options_of_the_launch_are_told_apart(argv, options, rest):
    assert launching.split_launch_options(argv) == (options, rest)


@pytest.mark.parametrize("argv", [["--accelerate_config"], ["--accelerate_config", "--num_processes", "2"]])
def test_an_option_without_a_value_is_named(argv, capsys):
    assert main.main(["grpo", *argv]) == 1
    assert "`--accelerate_config` needs a value." in capsys.readouterr().err


def test_a_configuration_that_there_is_not_is_named(capsys):
    assert main.main(["sft", "--accelerate_config", "fsdp9", *MODEL]) == 1
    assert "fsdp9" in capsys.readouterr().err


@pytest.mark.parametrize("command", main.TRAINING)
def test_a_command_starts_itself_through_accelerate(command, monkeypatch):
    import accelerate.commands.launch as accelerate_launch

    started = []
    monkeypatch.setattr(accelerate_launch, "launch_command", started.append)
    assert main.main([command, *MODEL, "--accelerate_config", "fsdp2", "--num_processes", "2"]) == 0
    (arguments,) = started
    assert arguments.config_file.endswith("fsdp2.yaml") and arguments.num_processes == 2 and arguments.module
    assert [arguments.training_script, *arguments.training_script_args] == ["latent_trl", command, *MODEL]
