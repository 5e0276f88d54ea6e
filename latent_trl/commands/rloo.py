"""`latent-trl rloo`: RLOO over the codes of a latent action model."""

from .training import run_reinforcement


def main(argv: list[str] | None = None) -> int:
    return run_reinforcement(argv, "rloo")
