"""`latent-trl generate MODEL --prompt TEXT`: answers to one prompt, with the codes behind the words."""

import argparse
import json
import sys
from dataclasses import asdict

from .arguments import CommandParser, as_dict, at_least, refuse_given
from .engines import OF_ENGINES, add_engine, check_engine
from .replies import OF_PLANS, Answerer, Reply, add_sampling, codes


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = CommandParser(
        prog="latent-trl generate",
        description="Answers one prompt. Each token is shown on the colour of its code, or the answer on its plan's.",
    )
    parser.add_argument("model", help="folder or Hub id of latent actions")
    parser.add_argument("--prompt", help="the user's message (default: standard input)")
    parser.add_argument("--system", help="a system message before it")
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="a picture; may be repeated")
    parser.add_argument("-n", "--samples", type=at_least(1), default=1, help="answers (%(default)s)")
    parser.add_argument(
        "--force", type=codes, default=[], metavar="CODES", help="codes of the first steps: 5,-1,7; -1 leaves one free"
    )
    parser.add_argument("--all-plans", action="store_true", help="an answer under each plan")
    parser.add_argument("--plain", action="store_true", help="the text alone")
    parser.add_argument(
        "--json",
        action="store_true",
        help="a JSON line an answer: text, tokens, action_ids, log_prob, reward; or plan, value",
    )
    add_sampling(parser)
    add_engine(parser)
    search = parser.add_argument_group("search, for the answer that a reward function likes best")
    budget = search.add_mutually_exclusive_group()
    budget.add_argument(
        "--best-of",
        type=at_least(1),
        metavar="N",
        help="sample N answers; or try the N plans that are thought the best",
    )
    budget.add_argument("--tree", type=at_least(1), metavar="N", help="take N different answers from the tree of codes")
    search.add_argument("--reward-funcs", nargs="+", default=[], metavar="REWARD", help="as in `latent-trl grpo`")
    search.add_argument("--reward-kwargs", metavar="JSON", help="as in `latent-trl grpo`")
    search.add_argument("--columns", metavar="JSON", help="""what the rewards read: '{"answer": "red"}'""")
    args = parser.parse_args(argv)
    searches = args.best_of is not None or args.tree is not None
    if searches != bool(args.reward_funcs):
        parser.error("--best-of and --tree need --reward-funcs, and the other way round")
    if searches and (args.force or args.samples != 1):
        parser.error("--force and --samples are not for searches")
    if args.engine == "vllm" and args.tree is not None:
        parser.error("--tree reads the states of a model, which an engine does not give: use --best-of, or no --engine")
    if args.all_plans and (args.plan is not None or searches):
        parser.error("--all-plans is not for --plan and searches")
    if args.plan is not None and searches:
        parser.error("--plan is not for searches")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    with_engine = check_engine(args)
    from ..data.images import open_image
    from .plan_loading import is_plan_model
    from .replies import coloured, load_answerer

    images = [open_image(path) for path in args.image]
    prompt = sys.stdin.read().strip() if args.prompt is None else args.prompt
    if not prompt:
        raise ValueError("The prompt is empty. Pass `--prompt TEXT`, or text on standard input.")
    messages = [{"role": "system", "content": args.system}] if args.system else []
    messages.append({"role": "user", "content": prompt})
    if is_plan_model(args.model):
        refuse_given("latent-trl generate", args, OF_ENGINES, f"is for codes a token, and {args.model!r} has plans.")
        return under_plans(args, messages, images)
    refuse_given("latent-trl generate", args, OF_PLANS, f"is for plans, and {args.model!r} has codes a token.")
    answerer = load_answerer(args, with_engine)
    if args.reward_funcs:
        replies = [searched(args, answerer, messages, images)]
    else:
        replies = answerer(messages, images, args.samples, args.force)
    show(args, replies, coloured)
    return 0


def show(args: argparse.Namespace, replies: list, coloured) -> None:
    """Prints replies as the options say."""
    for reply in replies:
        if args.json:
            print(json.dumps({k: v for k, v in asdict(reply).items() if v is not None}, ensure_ascii=False))
        elif args.plain:
            print(reply.text)
        else:
            from rich.console import Console

            Console().print(coloured(reply), soft_wrap=True)
            if reply.reward is not None:
                print(f"reward {reply.reward:.4g}")


def under_plans(args: argparse.Namespace, messages: list, images: list) -> int:
    """The answer under the chosen plan, a named one, all of them, or the one that a reward likes best."""
    from .plan_replies import coloured, load_plan_answerer

    answerer = load_plan_answerer(args, "latent-trl generate")
    plans = None if args.plan is None else [args.plan]
    if args.all_plans:
        plans = list(answerer.plans)
    elif args.best_of is not None:
        if args.best_of > len(answerer.plans):
            raise ValueError(f"`--best-of` is {args.best_of}, and there are {len(answerer.plans)} plans.")
        every = args.best_of == len(answerer.plans)
        plans = list(answerer.plans) if every else answerer.ranked(messages, images)[: args.best_of]
    replies = answerer(messages, images, plans)
    if args.best_of is not None:
        from ..evaluation.answers import score_answers

        row = {"prompt": messages, "images": images, **(as_dict("columns", args.columns) or {})}
        texts, ids = [reply.text for reply in replies], [reply.token_ids for reply in replies]
        scores = score_answers(reward_of(args), [row] * len(replies), texts, ids)
        scored = [i for i, score in enumerate(scores) if score == score]
        if not scored:
            raise ValueError("No reward function could score any of the answers: all returned None.")
        best = max(scored, key=lambda i: scores[i])
        replies[best].reward = scores[best]
        replies = [replies[best]]
    show(args, replies, coloured)
    return 0


def reward_of(args: argparse.Namespace):
    """One reward function of all that were named."""
    from ..rewards.weighted_sum import WeightedSumReward
    from .loading import load_rewards

    rewards = load_rewards(args.reward_funcs, as_dict("reward_kwargs", args.reward_kwargs))
    return rewards[0] if len(rewards) == 1 else WeightedSumReward(rewards)


def searched(args: argparse.Namespace, answerer: Answerer, messages: list, images: list) -> Reply:
    """The best answer that was found within the budget."""
    from ..data.pieces import text_pieces
    from ..search import best_of_n, tree_search

    reward = reward_of(args)
    row = {"prompt": messages, "images": images, **(as_dict("columns", args.columns) or {})}
    options = {"max_new_tokens": args.max_new_tokens, "action_bias": answerer.bias}
    if args.tree is not None:
        (found,) = tree_search(answerer.model, answerer.processor, [row], reward, args.tree, **options)
    else:
        options |= {
            "action_temperature": args.temperature,
            "action_top_k": args.top_k,
            "action_top_p": args.top_p,
            "action_generator": answerer.generator,
        }
        (found,) = best_of_n(answerer.model, answerer.processor, [row], reward, args.best_of, **options)
    best = found.best
    tokens = text_pieces(answerer.tokenizer, best.token_ids)
    return Reply(best.text, tokens, best.action_ids, best.log_prob, best.reward)
