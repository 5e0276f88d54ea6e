"""A model's own passes in the place of vLLM, one row after another, and servers of it on loopback."""

import threading
from contextlib import contextmanager

import torch
from safetensors.torch import load
from tiny_models import latent, latent_config

from latent_trl.generation.action_law import ActionLaw
from latent_trl.generation.choice import draw, masked_law
from latent_trl.vllm.rows import EngineAnswer


class StandInEngine:
    """
    Takes and answers requests as `LatentActionEngine` does.

    Args:
        model (`LatentActionModel`): A model of its own, of Llama's kind.
    """

    def __init__(self, model):
        self.model, self.requests, self.steps = model, {}, 0
        # Called before each step: a test may wait in it, or raise.
        self.before_step = lambda: None
        self.answered: list[int] = []

    def add(self, name, prompt, settings, max_new_tokens, output_support=False, **options):
        if settings["action_top_p"] > 1:
            raise ValueError("`action_top_p` is too large.")
        self.requests[name] = (list(prompt), [], [], [], [], settings, max_new_tokens, output_support, options)

    def abort(self, names):
        for name in names:
            del self.requests[name]

    @torch.no_grad()
    def step(self):
        self.before_step()
        self.steps += 1
        ended = {}
        for name, (prompt, tokens, codes, log_probs, supports, settings, most, support, options) in [
            *self.requests.items()
        ]:
            states, positions = self.model.encode(torch.tensor([prompt + tokens]))
            logits = self.model.policy(states, position_ids=positions, keep_last=1)[0]
            law = ActionLaw(settings["action_temperature"], settings["action_top_k"], settings["action_top_p"])
            if logits.isnan().any():
                del self.requests[name]
                ended[name] = FloatingPointError("No code could be drawn: the policy's probabilities are not finite.")
                continue
            values = masked_law(law, logits, None)[0]
            generator = torch.Generator().manual_seed(settings["action_seed"] + len(tokens))
            code = draw(values.exp(), torch.empty_like(values).exponential_(generator=generator))
            code = code if settings["action_do_sample"] else values.argmax(dim=-1)
            tokens.append(self.model.read(states[:, -1:], code[None])[0].argmax().item())
            codes.append(code.item())
            log_probs.append(values[0, code].item())
            supports.append(~values[0].isneginf())
            if tokens[-1] in options["stop_token_ids"] or len(tokens) == most:
                del self.requests[name]
                mask = torch.stack(supports) if support else None
                ended[name] = EngineAnswer(prompt, tokens, codes, log_probs, mask)
        self.answered.append(len(ended))
        return ended

    def load_policy(self, tensors):
        stack = self.model.policy.decoder_stack
        parts = {"decoder.model.": stack.decoder, "policy_input.": stack.input, "policy_head.": self.model.policy.head}
        given = load(tensors)
        with torch.no_grad():
            for prefix, part in parts.items():
                own = {n.removeprefix(prefix): t for n, t in given.items() if n.startswith(prefix)}
                part.load_state_dict(own)


class Served:
    """
    A server that can be ended and begun again at its address.

    Args:
        make_model (`Callable`): A model for each start.
        folder (`str`): A checkpoint of it, of which the server says that it serves it.
        options: Of `make_rollout_server`.
    """

    def __init__(self, make_model, folder, **options):
        self.make_model, self.folder, self.options = make_model, folder, options
        self.url, self.server, self.thread = None, None, None
        self.starts = 0

    def make(self):
        """What is served: an engine of the checkpoint, what the server makes of it, and its identity."""
        from latent_trl.serving.rollout_engine import RolloutEngine
        from latent_trl.vllm.identity import identity_of_checkpoint
        from latent_trl.vllm.wire import PolicyFile

        model = self.make_model()
        engine = StandInEngine(model)
        rollout_engine = RolloutEngine(engine, PolicyFile.of(model.policy).data)
        return engine, rollout_engine, identity_of_checkpoint(self.folder)

    def start(self):
        from latent_trl.serving.server import make_rollout_server

        ready = threading.Event()
        self.engine, self.rollout_engine, identity = self.make()

        def note(url):
            self.url = url
            ready.set()

        port = 0 if self.url is None else int(self.url.rpartition(":")[2])
        self.server = make_rollout_server(self.rollout_engine, identity, port=port, ready=note, **self.options)
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        assert ready.wait(20)
        self.starts += 1
        return self

    def stop(self):
        """As a process that is killed: connections break, and nothing is answered."""
        if self.server is not None:
            self.engine.before_step = lambda: None
            self.server.force_exit = self.server.should_exit = True
            self.thread.join(20)
            assert not self.thread.is_alive()
            self.server = None


def make_model(seed=0):
    model, _ = latent("llama", latent_config(use_projector=False))
    if seed:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.policy.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@contextmanager
def served(make_model, folder, count=1, kind=Served, **options):
    """So many servers."""
    servers = [kind(make_model, folder, **options) for _ in range(count)]
    try:
        yield [server.start() for server in servers]
    finally:
        for server in servers:
            server.stop()


def main(folder, port):
    """Serves a checkpoint in this process: `python stand_in_engine.py FOLDER --port PORT`."""
    from latent_trl import LatentActionModel
    from latent_trl.serving.rollout_engine import RolloutEngine
    from latent_trl.serving.server import make_rollout_server
    from latent_trl.vllm.identity import identity_of_checkpoint
    from latent_trl.vllm.wire import PolicyFile

    torch.set_num_threads(1)
    model = LatentActionModel.from_pretrained(folder, dtype=torch.float32)
    engine = RolloutEngine(StandInEngine(model), PolicyFile.of(model.policy).data)
    identity = identity_of_checkpoint(folder)
    ready = "Rollouts are served at {}".format
    make_rollout_server(engine, identity, port=port, ready=lambda url: print(ready(url), flush=True)).run()


if __name__ == "__main__":
    import sys

    main(sys.argv[1], int(sys.argv[3]))
