"""`latent-trl pull REPO [FOLDER]`: a checkpoint of the Hub into a folder, whole and checked."""

import argparse

from .arguments import CommandParser


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = CommandParser(
        prog="latent-trl pull",
        description="Downloads a checkpoint, checks it, and puts it in place in one step. Nothing in it is executed.",
    )
    parser.add_argument("repo", help="user/name")
    parser.add_argument("folder", nargs="?", help="where to (default: the repository's name)")
    parser.add_argument("--revision", help="branch, tag, commit or refs/pr/N")
    parser.add_argument("--components", nargs="+", metavar="NAME", help="only these, such as: codebook projector")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    from ..hub.pull import pull_folder

    folder = args.folder or args.repo.split("/")[-1]
    sha = pull_folder(args.repo, folder, components=args.components, revision=args.revision)
    print(f"{args.repo} at {sha} is in {folder}")
    return 0
