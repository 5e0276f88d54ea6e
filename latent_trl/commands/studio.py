"""`latent-trl studio MODEL`: a window on the codes in the browser."""

import argparse

from .arguments import CommandParser, at_least


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = CommandParser(
        prog="latent-trl studio",
        description="Opens a page on this machine: ask about a picture, see each token on the colour of its code, and "
        "answer again from any token with another code; the codebook's map; batches of prompts with rewards. Needs the "
        "extra `studio` (Gradio).",
    )
    parser.add_argument("model", help="folder or Hub id of latent actions")
    parser.add_argument("--beside", metavar="MODEL", help="a second model, such as the one before RL, asked the same")
    parser.add_argument(
        "--reward-funcs",
        nargs="+",
        default=["exact_match"],
        metavar="NAME",
        help="that may be chosen for a batch, as for `latent-trl grpo` (exact_match)",
    )
    parser.add_argument("--reward-kwargs", help="as for `latent-trl grpo`")
    parser.add_argument("--image-root", metavar="FOLDER", help="the only folder from which rows may name image files")
    parser.add_argument("--backbone", help="folder or Hub id of the backbone, where the checkpoint's own is not right")
    parser.add_argument("--dtype", help="of the backbone, such as bfloat16")
    parser.add_argument("--max-new-tokens", type=at_least(1), default=128, help="(%(default)s)")
    parser.add_argument("--host", default="127.0.0.1", help="(%(default)s)")
    parser.add_argument("--port", type=at_least(0), default=7860, help="(%(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    from pathlib import Path

    from transformers.utils import logging

    from .plan_loading import is_plan_model

    for name in filter(None, (args.model, args.beside)):
        if is_plan_model(name):
            raise ValueError(
                f"{name!r} holds plans, and the studio shows codes a token. `latent-trl chat` has `/plans` for what "
                "every plan answers, and `latent-trl atlas` draws a page of them."
            )
    try:
        from ..studio.app import STYLE, build
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise ImportError("`latent-trl studio` needs Gradio: `pip install gradio`, or the extra `studio`.") from error
    from ..data.reading import OpenedRows
    from ..studio.explorer import Explorer
    from .arguments import as_dict
    from .loading import load_model, load_processor, load_rewards
    from .rows import load_rows

    logging.set_verbosity_error()
    explorers = {}
    for name in filter(None, (args.model, args.beside)):
        model = load_model(name, args.backbone, dtype=args.dtype)
        explorers[Path(name).name] = Explorer(model, load_processor(model, args.backbone), args.max_new_tokens)
    if args.beside and len(explorers) < 2:
        raise ValueError(f"`--beside` names the same model, {args.beside!r}.")
    functions = load_rewards(args.reward_funcs, as_dict("reward_kwargs", args.reward_kwargs))
    rewards = dict(zip(args.reward_funcs, functions, strict=True))

    def read(file: str) -> OpenedRows:
        return OpenedRows(load_rows(file, purpose="prompts"), args.image_root, "file")

    app = build(explorers, rewards=rewards, read=read)
    app.launch(server_name=args.host, server_port=args.port or None, show_error=True, css=STYLE)
    return 0
