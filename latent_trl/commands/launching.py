"""`--accelerate_config` of the training commands, as TRL's have it: the command starts itself through accelerate."""

from typing import Any

# Options of `accelerate launch` that a training command takes, each with a value.
LAUNCH_OPTIONS = (
    *("--accelerate_config", "--num_processes", "--num_machines", "--machine_rank"),
    *("--main_process_ip", "--main_process_port"),
)


def split_launch_options(argv: list[str]) -> tuple[list[str], list[str]]:
    """The options of the launch, and all others in their order. Raises `ValueError` for one without a value."""
    launch: list[str] = []
    rest: list[str] = []
    words = [part for word in argv for part in (word.split("=", 1) if _name(word) in LAUNCH_OPTIONS else [word])]
    place = 0
    while place < len(words):
        name = _name(words[place])
        if name not in LAUNCH_OPTIONS:
            rest.append(words[place])
            place += 1
            continue
        if place + 1 == len(words) or words[place + 1].startswith("--"):
            raise ValueError(f"`{name}` needs a value.")
        launch += [name, words[place + 1]]
        place += 2
    return launch, rest


def _name(word: str) -> str:
    head = word.split("=", 1)[0]
    return head.replace("-", "_").replace("__", "--", 1) if head.startswith("--") else head


def launch(command: str, options: list[str], argv: list[str]) -> None:
    """
    Starts `latent-trl COMMAND` on the processes that `options` ask for.

    Args:
        command (`str`): Such as `grpo`.
        options (`list[str]`): As [`split_launch_options`] gives them; a configuration is a file, or one of TRL's names
            (`fsdp2`, `zero2`, `zero3`, `multi_gpu`, ...).
        argv (`list[str]`): The command's own.

    Raises:
        ValueError: For a configuration that there is not.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from trl.cli.accelerate_config import resolve_accelerate_config_argument

    words = [*resolve_accelerate_config_argument(options), "--module", "latent_trl", command, *argv]
    arguments: Any = launch_command_parser().parse_args(words)
    launch_command(arguments)
