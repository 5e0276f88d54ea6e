"""`latent-trl generate MODEL --prompt TEXT`: answers to one prompt, with the codes behind the words."""

import argparse
import json
import sys
from dataclasses import asdict

from .replies import add_sampling, codes


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="latent-trl generate", description="Answers one prompt. Each token is shown on the colour of its code."
    )
    parser.add_argument("model", help="folder or Hub id of latent actions")
    parser.add_argument("--prompt", help="the user's message (default: standard input)")
    parser.add_argument("--system", help="a system message before it")
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="a picture; may be repeated")
    parser.add_argument("-n", "--samples", type=int, default=1, help="answers (%(default)s)")
    parser.add_argument(
        "--force", type=codes, default=[], metavar="CODES", help="codes of the first steps: 5,-1,7; -1 leaves one free"
    )
    parser.add_argument("--plain", action="store_true", help="the text alone")
    parser.add_argument("--json", action="store_true", help="a JSON line an answer: text, tokens, action_ids, log_prob")
    add_sampling(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    from .replies import coloured, load_answerer, open_image

    images = [open_image(path) for path in args.image]
    prompt = sys.stdin.read().strip() if args.prompt is None else args.prompt
    if not prompt:
        raise ValueError("The prompt is empty. Pass `--prompt TEXT`, or text on standard input.")
    messages = [{"role": "system", "content": args.system}] if args.system else []
    answerer = load_answerer(args)
    replies = answerer([*messages, {"role": "user", "content": prompt}], images, args.samples, args.force)
    for reply in replies:
        if args.json:
            print(json.dumps(asdict(reply), ensure_ascii=False))
        elif args.plain:
            print(reply.text)
        else:
            from rich.console import Console

            Console().print(coloured(reply), soft_wrap=True)
    return 0
