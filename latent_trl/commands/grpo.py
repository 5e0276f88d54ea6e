"""`latent-trl grpo`: GRPO and its variants over the codes of a latent action model."""

from .training import run_reinforcement


def main(argv: list[str] | None = None) -> int:
    return run_reinforcement(argv, "grpo")
