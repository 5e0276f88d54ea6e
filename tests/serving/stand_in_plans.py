"""A model's own passes in the place of vLLM under plans, one row after another, and servers of it on loopback."""

import sys
from pathlib import Path

import torch
from safetensors.torch import load
from stand_in_engine import Served

from latent_trl.vllm.rows import EngineText

SLOTS, LONGEST = 8, 200


class StandInPlans:
    """
    Takes and answers requests as `LoraEngine` does; texts alone.

    Args:
        model (`PlanModel`): A model of its own.
        slots (`int`): For so many plans it has room.
    """

    longest = LONGEST

    def __init__(self, model, slots=SLOTS):
        self.model, self.slots, self.requests = model, slots, {}
        # Called before each step: a test may wait in it, or raise.
        self.before_step = lambda: None
        self.answered: list[int] = []
        # How many plans it was given, each time.
        self.given: list[int] = []

    def add(self, name, prompt, settings, max_new_tokens, output_support=False, **options):
        if settings["plan"] is not None and not 0 <= settings["plan"] < self.model.plan_config.num_plans:
            raise ValueError(f"`plan` must be one, got {settings['plan']}.")
        limit = min(settings["max_tokens"], max_new_tokens)
        self.requests[name] = (list(prompt), settings["plan"], limit, options["stop_token_ids"])

    def abort(self, names):
        for name in names:
            del self.requests[name]

    @torch.no_grad()
    def step(self):
        """One row."""
        self.before_step()
        name = next(iter(self.requests))
        prompt, plan, limit, ends = self.requests.pop(name)
        ids = torch.tensor([prompt])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        found = self.model._decode(inputs, None if plan is None else torch.tensor([plan]), limit, ends)
        self.answered.append(1)
        return {name: EngineText(prompt, found.token_ids[0])}

    def load_policy(self, tensors):
        given = load(tensors)
        count = len(next(iter(given.values())))
        self.given.append(count)
        if count > self.model.plan_config.num_plans:
            self.model.add_plans(count - self.model.plan_config.num_plans)
        for plan in range(count):
            self.model.plans.load_plan(plan, {name: tensor[plan] for name, tensor in given.items()})


def parts(folder, model, slots=SLOTS):
    """What a server has of a folder of plans: an engine, what the server makes of it, and its identity."""
    from latent_trl.plans.configuration import PlanConfig
    from latent_trl.plans.folder import stacked_plans
    from latent_trl.plans.plan_servers import identity_of_plans, policy_of_plans
    from latent_trl.serving.rollout_engine import RolloutEngine

    folder, engine = Path(folder), StandInPlans(model, slots)
    policy = policy_of_plans(stacked_plans(folder, PlanConfig.load(folder)))
    identity = identity_of_plans(folder) | {"slots": engine.slots, "max_model_len": engine.longest}
    return engine, RolloutEngine(engine, policy.data, engine.slots), identity


class ServedPlans(Served):
    """`Served` over plans."""

    def make(self):
        return parts(self.folder, self.make_model())


def main(folder, port):
    """Serves saved plans in this process: `python stand_in_plans.py FOLDER --port PORT`."""
    from latent_trl import PlanModel
    from latent_trl.serving.server import make_rollout_server

    torch.set_num_threads(1)
    _, engine, identity = parts(folder, PlanModel.from_pretrained(folder, dtype=torch.float32))
    ready = "Rollouts are served at {}".format
    make_rollout_server(engine, identity, port=port, ready=lambda url: print(ready(url), flush=True)).run()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[3]))
