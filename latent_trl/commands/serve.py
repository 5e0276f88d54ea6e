"""`latent-trl serve MODEL`: OpenAI's chat completions over HTTP."""

import argparse
from importlib.util import find_spec
from pathlib import Path

from .arguments import CommandParser, above_zero, at_least
from .engines import ENGINES, engine_options, named_engine, refuse_backbone

NEEDED = ("starlette", "uvicorn", "pydantic", "prometheus_client")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = CommandParser(
        prog="latent-trl serve",
        description="Serves a model: OpenAI's chat completions, with the codes or plans behind the words.",
        epilog="An API key is read from the environment variable LATENT_TRL_API_KEY, or from --api-key-file.",
    )
    parser.add_argument("model", help="folder or Hub id of latent actions, or of plans")
    parser.add_argument(
        "--engine", choices=ENGINES, help="vLLM, or the model's own `generate` (default: vllm where it is installed)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address (%(default)s); others than this need an API key")
    parser.add_argument("--port", type=at_least(0), default=8000, help="(%(default)s); 0 takes a free one")
    parser.add_argument("--served-model-name", metavar="NAME", help="as requests give it (default: the folder's or id)")
    parser.add_argument("--api-key-file", metavar="FILE", help="holds the API key, which clients send")
    parser.add_argument("--backbone", help="folder or Hub id of the backbone, where the checkpoint's own is not right")
    parser.add_argument("--dtype", help="of the backbone, such as bfloat16")
    parser.add_argument(
        "--engine-options", metavar="JSON", help="""further arguments of vLLM's: '{"gpu_memory_utilization": 0.8}'"""
    )
    limits = parser.add_argument_group("limits")
    limits.add_argument("--max-batch-size", type=at_least(1), default=32, help="answers made at once (%(default)s)")
    limits.add_argument("--max-completion-length", type=at_least(1), default=1024, help="of an answer (%(default)s)")
    limits.add_argument("--max-model-len", type=at_least(2), help="of a conversation with its answer (the model's own)")
    limits.add_argument(
        "--max-requests", type=at_least(1), default=256, help="at once, waiting ones included (%(default)s)"
    )
    limits.add_argument(
        "--timeout", type=above_zero, default=300.0, metavar="SECONDS", help="of a request (%(default)s)"
    )
    limits.add_argument("--max-images", type=at_least(0), default=8, help="pictures of a request (%(default)s)")
    limits.add_argument("--max-pixels", type=at_least(1), default=25_000_000, help="of a picture (%(default)s)")
    return parser.parse_args(argv)


def chosen_engine(name: str | None) -> str:
    """
    The engine of that name, by default vLLM where it is installed.

    Raises:
        ImportError: When what it needs is not installed.
    """
    missing = [package for package in NEEDED if find_spec(package) is None]
    if missing:
        raise ImportError(f"Serving needs {', '.join(missing)}: pip install {' '.join(missing)}")
    return named_engine(name) if name else ("transformers" if find_spec("vllm") is None else "vllm")


def make_engine(args: argparse.Namespace):
    """The engine that the options ask for, with the model in it."""
    from .arguments import as_dict
    from .loading import check_latent_actions, load_model, load_processor
    from .plan_loading import check_plans, is_plan_model, load_plans

    has_plans = is_plan_model(args.model)
    name, options = chosen_engine(args.engine), as_dict("engine_options", args.engine_options) or {}
    sizes = {"max_batch_size": args.max_batch_size, "max_completion_length": args.max_completion_length}
    if args.max_model_len is not None:
        sizes["max_model_len"] = args.max_model_len
    if name == "vllm":
        refuse_backbone(args)
        options = engine_options(args, **sizes, dtype=args.dtype)
        if has_plans:
            from ..serving.vllm_plan_engine import VLLMPlanEngine

            check_plans(args.model)
            return VLLMPlanEngine(args.model, **options)
        from ..serving.vllm_engine import VLLMEngine

        check_latent_actions(args.model)
        return VLLMEngine(args.model, **options)
    if options:
        raise ValueError(f"`--engine-options` are vLLM's, and the engine is `transformers`: {sorted(options)}.")
    from transformers.utils import logging

    logging.set_verbosity_error()
    if has_plans:
        from ..serving.plan_engine import TransformersPlanEngine

        plans = load_plans(args.model, args.backbone, dtype=args.dtype)
        return TransformersPlanEngine(plans, load_processor(plans, args.backbone), **sizes)
    from ..serving.transformers_engine import TransformersEngine

    model = load_model(args.model, args.backbone, dtype=args.dtype)
    return TransformersEngine(model, load_processor(model, args.backbone), **sizes)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    chosen_engine(args.engine)

    from ..api_key import read_key
    from ..serving.chat_request import RequestLimits
    from ..serving.server import make_server

    key = read_key(args.api_key_file)
    folder = Path(args.model).expanduser()
    name = args.served_model_name or (folder.resolve().name if folder.is_dir() else args.model)
    server = make_server(
        make_engine(args),
        name,
        args.host,
        args.port,
        key,
        lambda url: print(f"{name} is served at {url}", flush=True),
        limits=RequestLimits(max_images=args.max_images, max_pixels=args.max_pixels),
        max_requests=args.max_requests,
        timeout=args.timeout,
    )
    server.run()
    return 0
