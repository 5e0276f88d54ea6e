"""Talking to a model of plans: the plan that was chosen, another one, and what all of them answer."""

from collections.abc import Callable
from typing import Any

from .chat import HELP, OF_PLANS_HELP, Chat
from .plan_replies import PlanReply, coloured

# What is not about codes.
SHARED = "\n".join(line for line in HELP.splitlines() if line.split()[0] in ("/image", "/new", "/quit"))


class PlanChat(Chat):
    """
    A conversation under plans.

    Args:
        answerer ([`~latent_trl.commands.plan_replies.PlanAnswerer`] or
            [`~latent_trl.commands.remote.RemotePlanAnswerer`]), console (`Console`), system (`str`, *optional*):
            As in [`~latent_trl.commands.chat.Chat`].
        plan (`int`, *optional*): The plan that is held; by default the chooser's. Without a chooser, plan 0.
    """

    help = f"{OF_PLANS_HELP}\n{SHARED}"
    answerer: Any
    last: PlanReply | None

    def __init__(self, answerer: Any, console: Any, system: str | None = None, plan: int | None = None):
        super().__init__(answerer, console, system)
        if plan is None and not answerer.has_chooser:
            console.print("No chooser has been trained: plan 0 is held. /plan N holds another.", highlight=False)
            plan = 0
        self.plan = self._checked(plan)

    def _checked(self, plan: int | None) -> int | None:
        if plan is not None and plan not in self.answerer.plans:
            raise ValueError(f"plans are 0 to {len(self.answerer.plans) - 1}")
        return plan

    def actions(self) -> dict[str, Callable[..., None]]:
        return {"plan": self.hold, "plans": self.show_plans}

    def _answer(self, forced: Any) -> None:
        (reply,) = self.answerer(self.messages, self.images, None if self.plan is None else [self.plan])
        self.console.print(coloured(reply), soft_wrap=True)
        self.keep(reply)

    def hold(self, plan: str | None = None) -> None:
        """Answers the last message again under a plan, or the chooser's, which is held from then on."""
        if plan is None and not self.answerer.has_chooser:
            raise ValueError("no chooser has been trained; /plan N holds a plan")
        self.plan = self._checked(None if plan is None else int(plan))
        if self.last is not None:
            self.messages.pop()
            self._answer(None)

    def show_plans(self) -> None:
        """The answers of all plans to the last message."""
        if self.last is None:
            raise ValueError("there is no answer yet")
        for reply in self.answerer(self.messages[:-1], self.images, list(self.answerer.plans)):
            mark = "> " if reply.plan == self.last.plan else "  "
            self.console.print(mark, coloured(reply), sep="", soft_wrap=True)
