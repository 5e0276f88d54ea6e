"""`latent-trl vllm-serve MODEL`: rollouts for trainers with `vllm_mode="server"`."""

import argparse
import os
from importlib.util import find_spec
from typing import Any

from .arguments import CommandParser, at_least

NEEDED = ("starlette", "uvicorn", "pydantic")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = CommandParser(
        prog="latent-trl vllm-serve",
        description="Serves rollouts on vLLM to trainers with `use_vllm=True` and `vllm_mode='server'`.",
        epilog="An API key is read from the environment variable LATENT_TRL_API_KEY, or from --api-key-file.",
    )
    parser.add_argument(
        "model", help="folder or Hub id of latent actions, or of plans: the one that the trainer begins with"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address (%(default)s); others than this need an API key")
    parser.add_argument("--port", type=at_least(0), default=8000, help="(%(default)s); 0 takes a free one")
    parser.add_argument("--api-key-file", metavar="FILE", help="holds the API key, which trainers send")
    parser.add_argument("--dtype", help="of the backbone, such as bfloat16; the trainer's own is best")
    parser.add_argument("--max-model-len", type=at_least(2), help="of a prompt with its completion (the model's own)")
    parser.add_argument(
        "--engine-options",
        metavar="JSON",
        help="""further arguments of vLLM's: '{"gpu_memory_utilization": 0.8}'; '{"max_loras": 64}' makes room for plans
        that `grow_plans` adds""",
    )
    return parser.parse_args(argv)


def served_codes(model: str, options: dict[str, Any]):
    """An engine over codes with its policy, as the server takes it, and its identity."""
    from ..models.policy import LatentActionPolicy
    from ..serving.rollout_engine import RolloutEngine
    from ..vllm.identity import identity_of_checkpoint
    from ..vllm.wire import PolicyFile
    from .loading import check_latent_actions

    check_latent_actions(model)
    from ..vllm.engine import LatentActionEngine

    engine = LatentActionEngine(model, **options)
    folder = engine.folders.checkpoint
    policy = PolicyFile.of(LatentActionPolicy.from_pretrained(folder, subfolder="policy"))
    return RolloutEngine(engine, policy.data), identity_of_checkpoint(folder)


def served_plans(model: str, options: dict[str, Any]):
    """The same over plans, which are the policy of their engine."""
    from ..checkpoint.files import resolve_folder
    from ..checkpoint.plan_files import PLAN_PATTERNS
    from ..plans.configuration import PlanConfig
    from ..plans.folder import stacked_plans
    from ..plans.plan_servers import identity_of_plans, policy_of_plans
    from ..serving.rollout_engine import RolloutEngine
    from .plan_loading import check_plans

    check_plans(model)
    from ..plans.lora_engine import engine_of_folder

    engine = engine_of_folder(model, **options)
    folder = resolve_folder(model, patterns=PLAN_PATTERNS)
    policy = policy_of_plans(stacked_plans(folder, PlanConfig.load(folder)))
    identity = identity_of_plans(folder) | {"slots": engine.slots, "max_model_len": engine.longest}
    return RolloutEngine(engine, policy.data, engine.slots), identity


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    missing = [package for package in NEEDED if find_spec(package) is None]
    if missing:
        raise ImportError(f"A server needs {', '.join(missing)}: pip install {' '.join(missing)}")
    if find_spec("vllm") is None:
        raise ImportError("`vllm-serve` needs vLLM: see docs/vllm.md.")

    from ..api_key import read_key
    from ..serving.server import allowed_hosts, make_rollout_server
    from .engines import engine_options
    from .plan_loading import is_plan_model

    key = read_key(args.api_key_file)
    allowed_hosts(args.host, key)
    serve = served_plans if is_plan_model(args.model) else served_codes
    # In this process: what ends it leaves nothing behind that holds the GPU's memory.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    options = engine_options(args, dtype=args.dtype, max_model_len=args.max_model_len)
    engine, identity = serve(args.model, options)
    ready = "Rollouts of {} are served at {}"
    server = make_rollout_server(
        engine,
        identity,
        args.host,
        args.port,
        key,
        lambda url: print(ready.format(args.model, url), flush=True),
    )
    server.run()
    return 0
