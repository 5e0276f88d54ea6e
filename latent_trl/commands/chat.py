"""`latent-trl chat MODEL`: talk to a model, see its codes, and answer again from any step with another code."""

import argparse
from collections.abc import Callable
from typing import Any

from .arguments import CommandParser, refuse_given
from .replies import OF_CODES, OF_PLANS, add_sampling

HELP = """\
/codes            show the last answer token by token: step, code, token
/again            answer again
/again N CODE     keep the first N tokens, take CODE there, and go on freely
/again N          keep the first N tokens, and go on freely
/image FILE       show a picture with the next message
/greedy, /sample  the most likely tokens, or sampled codes
/temperature X    of the codes
/colour           colours on or off
/new              a new conversation
/quit             leave"""

OF_PLANS_HELP = """\
/plans            what every plan answers to the last message
/plan N           answer again under plan N, and hold it from now on
/plan             the plan that the chooser finds the best, from now on"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = CommandParser(
        prog="latent-trl chat",
        description="Talk to a latent action model.",
        epilog="While talking:\n" + HELP + "\n\nWith plans, in the place of what is about codes:\n" + OF_PLANS_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", nargs="?", help="folder or Hub id of latent actions; with --url a name there")
    parser.add_argument("--url", help="of a server that answers, `latent-trl serve`: http://127.0.0.1:8000/v1")
    parser.add_argument("--image", metavar="FILE", help="a picture to show with the first message")
    parser.add_argument("--system", help="a system message")
    add_sampling(parser)
    args = parser.parse_args(argv)
    if args.model is None and args.url is None:
        parser.error("give a model, or --url")
    if args.url is not None and (args.backbone or args.dtype):
        parser.error("--backbone and --dtype are the server's with --url")
    return args


class Chat:
    """
    A conversation.

    Args:
        answerer ([`~latent_trl.commands.replies.Answerer`] or [`~latent_trl.commands.remote.RemoteAnswerer`]):
            Who answers.
        console (`Console`): Where answers are printed.
        system (`str`, *optional*): A system message.
    """

    help = HELP

    def __init__(self, answerer, console, system: str | None = None):
        self.answerer, self.console, self.system = answerer, console, system
        self.colours = True
        self.new()

    def new(self) -> None:
        self.messages = [{"role": "system", "content": self.system}] if self.system else []
        self.images: list = []
        self.pending: list = []
        self.last: Any = None

    def actions(self) -> dict[str, Callable[..., None]]:
        """What can be asked for, by name."""
        return {
            "codes": self.show_codes,
            "again": self.again,
            "greedy": lambda: setattr(self.answerer.args, "greedy", True),
            "sample": lambda: setattr(self.answerer.args, "greedy", False),
            "temperature": self.set_temperature,
            "colour": lambda: setattr(self, "colours", not self.colours),
        }

    def hear(self, line: str) -> bool:
        """Acts on one line of the user's. Returns whether to go on."""
        line = line.strip()
        if not line:
            return True
        if not line.startswith("/"):
            try:
                self.say(line)
            except ConnectionError as error:
                self.problem(str(error))
            return True
        name, *words = line[1:].split()
        if name in ("quit", "exit", "q"):
            return False
        commands: dict[str, Callable[..., None]] = {
            **self.actions(),
            "image": self.show_image,
            "new": self.new,
            "help": lambda: self.console.print(self.help, markup=False, highlight=False),
        }
        if name not in commands:
            self.problem(f"no command /{name}; /help lists them")
            return True
        try:
            commands[name](*words)
        except (TypeError, ValueError, OSError) as error:
            self.problem(str(error))
        return True

    def problem(self, text: str) -> None:
        self.console.print(text, style="red", markup=False, highlight=False)

    def say(self, text: str) -> None:
        self.messages.append({"role": "user", "content": text})
        self.images += self.pending
        self.pending = []
        try:
            self._answer(None)
        except Exception:
            self.messages.pop()
            raise

    def _answer(self, forced: list[int] | None) -> None:
        """Answers the messages, printing tokens as they come."""
        from ..evaluation.report import code_colour
        from .replies import visible

        special = self.answerer.special_tokens
        # A pipe has no colours, and so no use for tokens that only carry one.
        coloured = self.colours and self.console.is_terminal

        def show(token: str, code: int) -> None:
            style = f"black on {code_colour(code)}" if coloured else None
            if coloured or token not in special:
                self.console.print(visible(token), style=style, end="", markup=False, highlight=False, soft_wrap=True)

        try:
            (reply,) = self.answerer(self.messages, self.images, forced=forced, on_token=show)
        finally:
            self.console.print()
        self.keep(reply)

    def keep(self, reply: Any) -> None:
        """Puts the answer into the conversation."""
        self.last = reply
        self.messages.append({"role": "assistant", "content": reply.text})

    def again(self, place: str | None = None, code: str | None = None) -> None:
        """Answers the last message again, from step `place` with `code`."""
        if self.last is None:
            raise ValueError("there is no answer yet")
        kept = 0 if place is None else int(place)
        if not 0 <= kept <= len(self.last.action_ids):
            raise ValueError(f"the answer has {len(self.last.action_ids)} tokens; /codes shows them")
        forced = self.last.action_ids[:kept]
        if code is not None:
            if not 0 <= int(code) < self.answerer.num_codes:
                raise ValueError(f"codes are 0 to {self.answerer.num_codes - 1}")
            forced = [*forced, int(code)]
        self.messages.pop()
        self._answer(forced)

    def show_codes(self) -> None:
        from rich.table import Table
        from rich.text import Text

        from ..evaluation.report import code_colour

        if self.last is None:
            raise ValueError("there is no answer yet")
        table = Table(box=None)
        for column in ("step", "code", "token"):
            table.add_column(column, justify="left" if column == "token" else "right")
        for step, (token, code) in enumerate(zip(self.last.tokens, self.last.action_ids, strict=True)):
            table.add_row(str(step), str(code), Text(repr(token), style=f"black on {code_colour(code)}"))
        self.console.print(table)

    def show_image(self, *words: str) -> None:
        from ..data.images import open_image

        self.pending.append(open_image(" ".join(words)))

    def set_temperature(self, value: str) -> None:
        if not float(value) > 0:
            raise ValueError("the temperature must be positive; /greedy takes the most likely tokens")
        self.answerer.args.temperature = float(value)


def remote_chat(args: argparse.Namespace, console: Any) -> tuple[Chat, str]:
    """A conversation with a server, and what it chooses among."""
    from .plan_chat import PlanChat
    from .remote import RemotePlanAnswerer, remote_answerer

    answerer = remote_answerer(args.url, args.model, args)
    if isinstance(answerer, RemotePlanAnswerer):
        refuse_given("latent-trl chat", args, OF_CODES, "is for codes a token, and the server answers under plans.")
        return PlanChat(answerer, console, args.system, args.plan), f"{len(answerer.plans)} plans"
    refuse_given("latent-trl chat", args, OF_PLANS, "is for plans, and the server answers with codes a token.")
    return Chat(answerer, console, args.system), f"{answerer.num_codes} codes"


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    from rich.console import Console

    from .plan_loading import is_plan_model

    chat: Chat
    console = Console()
    if args.url is not None:
        chat, what = remote_chat(args, console)
    elif is_plan_model(args.model):
        from .plan_chat import PlanChat
        from .plan_replies import load_plan_answerer

        chat = PlanChat(load_plan_answerer(args, "latent-trl chat"), console, args.system, args.plan)
        what = f"{len(chat.answerer.plans)} plans"
    else:
        from .replies import load_answerer

        refuse_given("latent-trl chat", args, OF_PLANS, f"is for plans, and {args.model!r} has codes a token.")
        chat = Chat(load_answerer(args), console, args.system)
        what = f"{chat.answerer.num_codes} codes"
    if args.image:
        chat.show_image(args.image)
    console.print(f"{what}. /help lists what can be done, /quit leaves.", highlight=False)
    while True:
        try:
            line = input("> ")
        except EOFError:
            return 0
        if not chat.hear(line):
            return 0
