"""`latent-trl check-backbone NAME`: does everything that the package promises hold on this backbone?"""

import argparse
import copy
from collections.abc import Callable
from typing import TYPE_CHECKING

from .arguments import CommandParser

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from ..models.latent_action_model import LatentActionModel

LENGTH = 8
TOLERANCE = {"float32": 1e-4, "float16": 0.1, "bfloat16": 0.5}


def check_backbone(
    model_or_name: "PreTrainedModel | str", inputs: "dict[str, torch.Tensor] | None" = None, **load_kwargs
) -> list[tuple[str, bool, str]]:
    """
    Tries a small latent action model on a backbone. The backbone is given back as it was.

    Args:
        model_or_name (`PreTrainedModel` or `str`): The backbone, or a folder or Hub id of one.
        inputs (`dict`, *optional*): A batch of a processor, padded on the left, with images if they are to be tried.
            By default three made-up prompts of text, of different lengths.
        load_kwargs: For loading a name: `dtype`, `quantization_config`, `device_map`, `revision`, ...

    Returns:
        `(check, ok, detail)` for each check. After one that fails the later ones are still tried.
    """
    results: list[tuple[str, bool, str]] = []

    def run(name: str, check: Callable[[], str]) -> None:
        try:
            results.append((name, True, check()))
        except Exception as error:
            results.append((name, False, f"{type(error).__name__}: {error}".splitlines()[0]))

    import torch

    from ..models.backbone import Backbone
    from ..models.checkpoint import load_backbone

    backbone = model_or_name
    if isinstance(model_or_name, str):
        run("the backbone loads", lambda: "")
        try:
            backbone = load_backbone(model_or_name, **load_kwargs)
        except Exception as error:
            return [("the backbone loads", False, f"{type(error).__name__}: {error}".splitlines()[0])]
        results[-1] = ("the backbone loads", True, type(backbone).__name__)

    def look() -> str:
        view = Backbone(backbone)
        norm = type(view.final_norm).__name__ if view.final_norm is not None else "not found: read-out 'residual' only"
        return (
            f"text model {type(view.decoder).__name__}, width {view.hidden_size}, final norm {norm}, states of rms "
            f"{view.state_rms:.3g}, placeholders {view.vision_token_ids or 'none'}"
        )

    run("its parts are found", look)
    if not results[-1][1]:
        return results
    flags = [(p, p.requires_grad) for p in backbone.parameters()]
    training = backbone.training
    state = torch.random.get_rng_state()
    try:
        _run_checks(backbone, inputs, run)
    finally:
        torch.random.set_rng_state(state)
        backbone.train(training)
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)
    return results


def _run_checks(backbone: "PreTrainedModel", inputs, run: Callable[[str, Callable[[], str]], None]) -> None:
    import torch

    from ..checkpoint.configuration import LatentActionConfig
    from ..models.latent_action_model import LatentActionModel

    torch.manual_seed(0)
    config = LatentActionConfig(
        num_codes=16,
        world_model_intermediate_size=64,
        inverse_dynamics_decoder={"num_hidden_layers": 1},
        policy_decoder={"num_hidden_layers": 2},
    )
    made: dict[str, LatentActionModel] = {}

    def build() -> str:
        made["model"] = LatentActionModel.from_backbone(backbone, config).eval()
        count = sum(p.numel() for name, p in made["model"].named_parameters() if not name.startswith("backbone."))
        return f"{count:,} parameters in small components, {made['model'].config.decoder_kind} decoder layers"

    run("components are made", build)
    if "model" not in made:
        return
    model = made["model"]
    inputs = _made_up_prompts(model) if inputs is None else dict(inputs)
    run("an untrained head gives the backbone's greedy text", lambda: _parity(model, inputs))
    _perturb(model)
    run("rollouts are scored as they were taken", lambda: _scores(model, inputs))
    run("... with a static cache", lambda: _scores(model, inputs, cache_implementation="static"))
    run("... without a cache", lambda: _scores(model, inputs, use_cache=False))
    run("several samples share a prompt", lambda: _samples(model, inputs))
    run("the policy sees nothing later, the inverse model one token", lambda: _no_leak(model, inputs))
    run("gradients reach the components and not the backbone", lambda: _gradients(model, inputs))


def _made_up_prompts(model: "LatentActionModel") -> "dict[str, torch.Tensor]":
    import torch

    view = model.backbone_view
    high = min([view.text_config.vocab_size, *model.config.vision_token_ids])
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(high // 2, high, (3, 12), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :5], mask[1, :2] = 0, 0
    pad = model.generation_config.pad_token_id
    ids = ids.masked_fill(mask == 0, 0 if pad is None else pad)
    return {"input_ids": ids.to(model.backbone.device), "attention_mask": mask.to(model.backbone.device)}


def _perturb(model: "LatentActionModel") -> None:
    """Noise on the components, so that none is at its neutral start."""
    import torch

    with torch.no_grad():
        for name in model.component_classes:
            component = getattr(model, name)
            for parameter in component.parameters() if component is not None and name != "codebook" else ():
                noise = torch.randn(parameter.shape) * max(parameter.std().item() if parameter.numel() > 1 else 0, 0.02)
                parameter.add_(noise.to(parameter) * 0.5)


def _generate(model, inputs, **options):
    settings = {"max_new_tokens": LENGTH, "min_new_tokens": LENGTH, "return_dict_in_generate": True, **options}
    return model.generate(**inputs, **settings)


def _parity(model, inputs) -> str:
    import torch

    from ..generation.settings import settled_config, without_own_defaults

    suppressed = model.config.vision_token_ids or None
    settings = {"max_new_tokens": LENGTH, "min_new_tokens": LENGTH, "suppress_tokens": suppressed}
    config, _, _ = settled_config(None, model.generation_config, settings)
    with without_own_defaults(model.backbone):
        want = model.backbone.generate(**inputs, generation_config=config)
    got = _generate(model, inputs).sequences
    if not torch.equal(got, want):
        agree = (got == want)[:, inputs["input_ids"].shape[1] :].float().mean().item()
        raise AssertionError(f"{agree:.0%} of {got.shape[0]} x {LENGTH} tokens agree")
    return f"{got.shape[0]} x {LENGTH} tokens"


def _whole(model, inputs, sequences):
    """The inputs of prompts, for the whole sequences."""
    import torch

    later = {"attention_mask": 1, "token_type_ids": model.backbone_view.completion_type}
    added = sequences.shape[1] - inputs["input_ids"].shape[1]
    out = {**inputs, "input_ids": sequences}
    for name, value in inputs.items():
        if name != "input_ids" and isinstance(value, torch.Tensor) and value.shape == inputs["input_ids"].shape:
            out[name] = torch.cat([value, value.new_full((len(value), added), later.get(name, 0))], dim=1)
    return out


def _compare(model, inputs, sequences, action_ids, recorded) -> str:
    import torch

    from ..generation.action_law import ActionLaw

    with torch.no_grad():
        passed = model(**_whole(model, inputs, sequences), return_logits=False)
    log_probs, _ = ActionLaw().score(passed.action_logits[:, -LENGTH - 1 : -1], action_ids)
    worst = (log_probs - recorded).abs().max().item()
    dtype = str(model.policy.head.weight.dtype).removeprefix("torch.")
    if not worst < TOLERANCE[dtype]:
        raise AssertionError(f"log-probabilities differ by up to {worst:.2g}, more than {TOLERANCE[dtype]:g} ({dtype})")
    return f"within {worst:.1e} ({dtype})"


def _scores(model, inputs, **options) -> str:
    out = _generate(model, inputs, **options)
    return _compare(model, inputs, out.sequences, out.action_ids, out.action_log_probs)


def _samples(model, inputs) -> str:
    out = _generate(model, inputs, num_return_sequences=2)
    details = [
        _compare(model, inputs, out.sequences[i::2], out.action_ids[i::2], out.action_log_probs[i::2]) for i in range(2)
    ]
    return max(details)


def _no_leak(model, inputs) -> str:
    import torch

    # The last two tokens stand for a completion: a prompt may be read both ways.
    completion = torch.zeros_like(inputs["input_ids"])
    completion[:, -2:] = 1

    def logits(batch):
        with torch.no_grad():
            states, positions = model.encode(**batch, completion_mask=completion)
            mask = batch.get("attention_mask")
            return model.policy(states, mask, positions), model.inverse_dynamics(states, mask, positions)

    changed = copy.copy(inputs)
    changed["input_ids"] = inputs["input_ids"].clone()
    changed["input_ids"][:, -1] = inputs["input_ids"][:, -2]
    (policy, inverse), (other_policy, other_inverse) = logits(inputs), logits(changed)
    # What stands at padding is nobody's input, and some attention lets it see everything.
    shown = (
        inputs["attention_mask"].bool()[..., None] if "attention_mask" in inputs else torch.ones_like(policy[..., :1])
    )
    policy, other_policy = policy * shown, other_policy * shown
    inverse, other_inverse = inverse * shown[:, 1:], other_inverse * shown[:, 1:]
    if (policy[:, :-1] - other_policy[:, :-1]).abs().max() > 1e-3 * policy.abs().max():
        raise AssertionError(
            "the policy's logits before a token depend on it: pass completions, not bidirectional prompts"
        )
    if (inverse[:, :-1] - other_inverse[:, :-1]).abs().max() > 1e-3 * inverse.abs().max():
        raise AssertionError("the inverse model sees more than one token ahead")
    if torch.equal(inverse[:, -1], other_inverse[:, -1]):
        raise AssertionError("the inverse model does not see the token that it must explain")
    return ""


def _gradients(model, inputs) -> str:
    import torch

    out = model(**inputs, action_ids=torch.zeros_like(inputs["input_ids"]))
    (out.logits.float().logsumexp(-1).mean() + out.action_logits[..., 0].mean()).backward()
    missing = [
        name
        for part in ("world_model", "policy", "codebook")
        for name, p in getattr(model, part).named_parameters(prefix=part)
        if p.grad is None
    ]
    leaked = [name for name, p in model.backbone.named_parameters() if p.grad is not None]
    model.zero_grad()
    if missing or leaked:
        raise AssertionError(f"without gradient: {missing[:3]}; of the backbone, with one: {leaked[:3]}")
    return ""


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = CommandParser(
        prog="latent-trl check-backbone",
        description="Tries generation, scoring, caches, masks and gradients on a backbone with small components.",
    )
    parser.add_argument("model", metavar="REPO_OR_FOLDER")
    parser.add_argument("--revision", help="branch, tag or commit of a repository")
    parser.add_argument("--dtype", default="float32", choices=sorted(TOLERANCE), help="default: %(default)s")
    parser.add_argument("--device-map", default=None, help="such as auto or cuda; default: the CPU")
    parser.add_argument("--attn-implementation", default=None, help="such as eager or sdpa")
    parser.add_argument("--load-in-4bit", action="store_true", help="quantise with bitsandbytes")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Prints a table of the checks. Returns 0 when all hold, else 1."""
    arguments = parse(argv)
    import torch
    from rich.console import Console
    from rich.table import Table

    from .loading import check_is_backbone
    from .rows import check_exists

    load = {"dtype": getattr(torch, arguments.dtype)}
    for name in ("revision", "device_map", "attn_implementation"):
        if getattr(arguments, name) is not None:
            load[name] = getattr(arguments, name)
    if arguments.load_in_4bit:
        from transformers import BitsAndBytesConfig

        load["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=load["dtype"])
    try:
        check_exists(arguments.model, "backbone")
        check_is_backbone(arguments.model)
    except (FileNotFoundError, ValueError) as error:
        results = [("loads", False, str(error))]
    else:
        results = check_backbone(arguments.model, **load)
    table = Table(title=f"{arguments.model}")
    table.add_column("check")
    table.add_column("", justify="center")
    table.add_column("detail", overflow="fold")
    for check, ok, detail in results:
        table.add_row(check, "[green]ok[/]" if ok else "[red]no[/]", detail.replace("[", r"\["))
    Console().print(table)
    return 0 if all(ok for _, ok, _ in results) else 1
