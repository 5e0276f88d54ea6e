"""The `latent-trl` command: finds the subcommand, which imports what it needs itself."""

import sys
import warnings
from importlib import import_module

from .launching import launch, split_launch_options

# Subcommand: (module, one line of help). Modules are imported when they are called, so that help is instant.
COMMANDS = {
    "demo": ("demo", "learn a latent action space and do RL over it on the pocket VLM, with a report"),
    "learn": ("learn", "learn a latent action space on a backbone: codes a token, or plans"),
    "sft": ("sft", "tune the backbone on a task, following codes"),
    "grpo": ("grpo", "GRPO, Dr.GRPO, DAPO and BNPO over codes"),
    "rloo": ("rloo", "RLOO over codes"),
    "ppo": ("ppo", "PPO over codes"),
    "distill": ("distill", "teach what a policy says to its backbone alone: a plain model"),
    "bandit": ("bandit", "RL over plans: which plan to hold for a prompt; grpo, rloo and ppo take plans too"),
    "generate": ("generate", "answer one prompt, with the codes or the plan behind the words"),
    "chat": ("chat", "talk to a model, see its codes or plans, and answer again with others"),
    "studio": ("studio", "a page in the browser: ask, see codes, and answer again from any token"),
    "serve": ("serve", "serve a model over HTTP: OpenAI's chat completions, with the codes"),
    "vllm-serve": ("vllm_serve", "serve rollouts on vLLM to trainers"),
    "evaluate": ("evaluate", "reward with intervals, diversity, use of codes, and whether pictures matter"),
    "atlas": ("atlas", "one HTML page that shows what each code or plan does"),
    "push": ("push", "upload a checkpoint to the Hub, in one commit, with a card"),
    "pull": ("pull", "download a checkpoint of the Hub into a folder, checked"),
    "inspect": ("inspect", "show what a checkpoint is, without loading its weights"),
    "plan": ("plan", "what fits on a GPU, phase by phase, and how long it takes, from a configuration alone"),
    "check-backbone": ("check_backbone", "try everything on a given backbone and print a table"),
    "env": ("env", "versions and devices, for bug reports"),
    "completion": ("completion", "a script that completes commands and options in the shell"),
}
# Those that accelerate can start on several processes.
TRAINING = ("learn", "sft", "grpo", "rloo", "ppo")


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "usage: latent-trl [--debug] COMMAND [OPTIONS]\n\ncommands:\n" + "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Runs a subcommand. Returns 0, 1 after an error (in one block; `--debug` for the traceback), 2 for bad usage."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    argv = [word for word in argv if word != "--debug"]
    if argv[:1] == ["help"]:
        argv = [*argv[1:2], "--help"]
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if argv[0] in ("-V", "--version"):
        from .. import __version__

        print(__version__)
        return 0
    if argv[0] not in COMMANDS:
        from difflib import get_close_matches

        near = get_close_matches(argv[0], COMMANDS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        print(f"latent-trl: no command {argv[0]!r}.{hint}\n\n{_usage()}", file=sys.stderr)
        return 2
    command = import_module(f"{__package__}.{COMMANDS[argv[0]][0]}")
    if not debug:
        # Names that transformers will change: nothing that whoever runs a command can do.
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    try:
        if argv[0] in TRAINING:
            options, rest = split_launch_options(argv[1:])
            if options:
                launch(argv[0], options, rest)
                return 0
        return command.main(argv[1:]) or 0
    except KeyboardInterrupt:
        print("\nlatent-trl: interrupted.", file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            raise
        from ..data.pieces import printable

        # It may quote a file, or a server.
        print(printable(f"\nlatent-trl {argv[0]}: {type(error).__name__}: {error}"), file=sys.stderr)
        return 1
