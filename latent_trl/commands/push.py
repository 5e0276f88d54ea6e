"""`latent-trl push FOLDER REPO`: a checkpoint folder to the Hub, in one commit, with a card."""

import argparse
from pathlib import Path

from .arguments import CommandParser


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = CommandParser(
        prog="latent-trl push",
        description="Uploads a checkpoint in one commit. The token is that of HF_TOKEN or of `hf auth login`.",
    )
    parser.add_argument("folder", help="checkpoint, as `save_pretrained` leaves it")
    parser.add_argument("repo", help="user/name; made if it does not exist")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", help="branch; made if it does not exist")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request")
    parser.add_argument("--message", help="of the commit")
    parser.add_argument("--license", help="licence id for a new card")
    parser.add_argument("--keep-card", action="store_true", help="leave the repository's card as it is")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    from ..hub.card import CARD_FILE, write_card
    from ..hub.push import check_publishable, push_folder

    check_publishable(args.folder)
    if not (Path(args.folder) / CARD_FILE).is_file():
        write_card(args.folder, repo_id=args.repo, license=args.license)
    commit = push_folder(
        args.folder,
        args.repo,
        private=args.private or None,
        revision=args.revision,
        create_pr=args.create_pr,
        commit_message=args.message,
        keep_card=args.keep_card,
    )
    print(commit.pr_url or commit.commit_url)
    return 0
