"""`latent-trl completion`: a line for the shell's start file that completes commands and options."""

import argparse

from .arguments import CommandParser

SCRIPT = """\
if [ -n "$ZSH_VERSION" ]; then
  autoload -U +X compinit bashcompinit
  command -v compdef >/dev/null || compinit -u
  bashcompinit
fi
_latent_trl() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}"
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W "{commands}" -- "$word"))
  elif [[ "$word" == -* ]]; then
    local options="$(latent-trl "${{COMP_WORDS[1]}}" --help 2>/dev/null | grep -oE -- '--[a-zA-Z_-]+' | sort -u)"
    COMPREPLY=($(compgen -W "$options" -- "$word"))
  else
    COMPREPLY=($(compgen -f -- "$word"))
  fi
}}
complete -o filenames -F _latent_trl latent-trl"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = CommandParser(
        prog="latent-trl completion",
        description='Prints a completion script for bash and zsh: eval "$(latent-trl completion)".',
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    parse(argv)
    from .main import COMMANDS

    print(SCRIPT.format(commands=" ".join(COMMANDS)))
    return 0
