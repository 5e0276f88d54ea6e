"""
One RL step over latent actions beside TRL's token-level GRPO, on the same backbone, prompts, lengths and batch.

    python benchmarks/rl_step.py --preset small --json rl_step_small.json
    python benchmarks/rl_step.py --preset 3b --json rl_step_3b.json          # one GPU
    python benchmarks/rl_step.py --preset 3b --quick                         # tiny sizes, to see that it runs

Three trainers alternate in one process: latent actions, TRL's with all text parameters, TRL's with LoRA (r = 16),
which `--no-lora` leaves out. Times are medians over `--repeats`, after `--warmup`; a ratio is the median of the ratios
within one repeat. Interrupted (also by SIGTERM, as `timeout` does), it reports the repeats that it has.
"""

import argparse
import os
import signal
import tempfile
from collections import defaultdict
from dataclasses import replace
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import torch.nn.functional as F
from measuring import (
    MIB,
    facts,
    median,
    now,
    optimizer_bytes,
    peak_memory,
    seconds,
    spread,
    table,
    tensor_bytes,
    use_clock,
    use_device,
    write,
)
from peft import LoraConfig
from presets import PRESETS, Preset, add_options, build_backbone, processing_class, prompt_rows
from tqdm.auto import tqdm
from trl import GRPOConfig, GRPOTrainer

from latent_trl import LatentActionConfig, LatentActionGRPOConfig, LatentActionGRPOTrainer, LatentActionModel
from latent_trl.generation.output import trunk_positions

LORA_TARGETS = r".*\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj"
PARTS = ("rollout", "scoring", "update", "step")


def reward(completion_ids, **columns) -> list[float]:
    """Different within a group, and free."""
    return [float(sum(ids) % 97) for ids in completion_ids]


class Arm:
    """
    One trainer, driven as its own loop drives it, with a clock in it.

    Args:
        trainer (`GRPOTrainer`): The trainer.
        rows (`list[dict]`): A batch, each prompt repeated for its group.
    """

    def __init__(self, trainer: GRPOTrainer, rows: list[dict[str, Any]]):
        self.trainer, self.rows = trainer, rows
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        self.optimizer = trainer.create_optimizer()
        self.trained = [p for p in trainer.model.parameters() if p.requires_grad]
        self.rollout_seconds = 0.0
        # From prompts to decoded completions, in either trainer.
        name = "draw_samples" if isinstance(trainer, LatentActionGRPOTrainer) else "_generate"
        generate = getattr(trainer, name)

        def timed(prompts):
            self.rollout_seconds, result = seconds(lambda: generate(prompts))
            return result

        setattr(trainer, name, timed)

    def collect(self) -> tuple[dict[str, float], dict[str, Any]]:
        """Times of rollout and scoring, and the batch."""
        total, batch = seconds(lambda: self.trainer._generate_and_score_completions(self.rows))
        return {"rollout": self.rollout_seconds, "scoring": total - self.rollout_seconds}, batch

    def update(self, batch: dict[str, Any]) -> None:
        trainer = self.trainer
        self.step(trainer.compute_loss(trainer.model, batch))

    def plain_update(self, batch: dict[str, Any]) -> None:
        """The same update without TRL's chunked head: one forward, logits of the completion, policy gradient."""
        trainer, length = self.trainer, batch["completion_ids"].shape[1]
        visual = {k: batch[k] for k in ("pixel_values", "image_grid_thw", "mm_token_type_ids") if k in batch}
        with trainer.accelerator.autocast():
            logits = trainer.model(
                input_ids=torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
                attention_mask=torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
                logits_to_keep=length + 1,
                **visual,
            ).logits
        self.step(policy_gradient(logits[:, :-1], batch["completion_ids"], batch))

    def step(self, loss: torch.Tensor) -> None:
        self.trainer.accelerator.backward(loss)
        self.trainer.accelerator.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def update_memory(self, batch: dict[str, Any]) -> int:
        """Peak bytes of an update over the weights: activations, gradients, optimizer's state and the batch."""
        with peak_memory(self.trainer.accelerator.device) as peak:
            self.update(batch)
        held = tensor_bytes(v for v in batch.values() if isinstance(v, torch.Tensor))
        return peak.growth + held + optimizer_bytes(self.optimizer)


class PolicyOnly:
    """The arm's bare policy stack on stored states: what an update over codes costs at least."""

    def __init__(self, arm: Arm):
        self.autocast = arm.trainer.accelerator.autocast
        self.policy, self.optimizer = arm.trainer.model.policy, arm.optimizer

    def update(self, batch: dict[str, Any]) -> None:
        states, codes = batch["context_states"], batch["action_ids"]
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)[:, :-1]
        positions = trunk_positions(batch.get("position_ids"), states.device)
        with self.autocast():
            logits = self.policy(states, mask, positions, keep_last=codes.shape[1])
        policy_gradient(logits, codes, batch).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def policy_gradient(logits: torch.Tensor, choices: torch.Tensor, batch: dict[str, Any]) -> torch.Tensor:
    losses = F.cross_entropy(logits.float().flatten(0, 1), choices.flatten(), reduction="none").view(choices.shape)
    weights = batch["advantages"][:, None] * batch["completion_mask"]
    return (losses * weights).sum() / batch["completion_mask"].sum()


def trainer_options(preset: Preset, device: torch.device) -> dict[str, Any]:
    """What all trainers have in common."""
    return {
        "use_cpu": device.type == "cpu",
        "bf16": device.type == "cuda",
        "per_device_train_batch_size": preset.prompts * preset.generations,
        "num_generations": preset.generations,
        "max_completion_length": preset.completion_length,
        # Texts of equal length on both sides, whatever random weights say.
        "generation_kwargs": {"min_new_tokens": preset.completion_length},
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "learning_rate": 1e-6,
    }


def shared_arguments(preset: Preset) -> dict[str, Any]:
    data = prompt_rows(preset, max(preset.prompts, 2))
    return {"reward_funcs": reward, "train_dataset": data, "processing_class": processing_class(preset)}


def batch_rows(preset: Preset, data) -> list[dict[str, Any]]:
    return [data[i] for i in range(preset.prompts) for _ in range(preset.generations)]


def latent_arm(
    preset: Preset, backbone, folder: str, beta: float = 0.0, num_codes: int = 128, cuda_graphs: bool | None = None
) -> Arm:
    """The trainer over latent actions, around `backbone`."""
    config = LatentActionConfig(num_codes=num_codes, policy_decoder={"num_hidden_layers": preset.policy_layers})
    model = LatentActionModel.from_backbone(backbone, config)
    model.inverse_dynamics = None  # only learning needs it
    options = trainer_options(preset, backbone.device)
    args = LatentActionGRPOConfig(f"{folder}/latent", beta=beta, cuda_graphs=cuda_graphs, **options)
    shared = shared_arguments(preset)
    return Arm(LatentActionGRPOTrainer(model=model, args=args, **shared), batch_rows(preset, shared["train_dataset"]))


def token_arm(preset: Preset, backbone, folder: str, lora: bool) -> Arm:
    """TRL's own trainer on `backbone`: all text parameters, or an adapter."""
    peft_config = None
    if lora:
        peft_config = LoraConfig(r=16, lora_alpha=32, target_modules=LORA_TARGETS)
    else:
        backbone.requires_grad_(False)
        backbone.get_decoder().requires_grad_(True)
        backbone.get_output_embeddings().requires_grad_(True)
    args = GRPOConfig(f"{folder}/{'lora' if lora else 'token'}", **trainer_options(preset, backbone.device))
    shared = shared_arguments(preset)
    trainer = GRPOTrainer(model=backbone, args=args, peft_config=peft_config, **shared)
    return Arm(trainer, batch_rows(preset, shared["train_dataset"]))


def build_arms(
    preset: Preset, device: torch.device, folder: str, beta: float, cuda_graphs: bool | None, lora: bool
) -> dict[str, Arm]:
    arms = {
        "latent": latent_arm(preset, build_backbone(preset, device), folder, beta, cuda_graphs=cuda_graphs),
        "token": token_arm(preset, build_backbone(preset, device), folder, lora=False),
    }
    if lora:
        arms["lora"] = token_arm(preset, build_backbone(preset, device), folder, lora=True)
    return arms


def decode_seconds(decoder, generate, length: int) -> float:
    """Seconds a token of cached decoding: from the second call of the text model to the last."""
    times, calls = [], 0

    def watch(*args):
        nonlocal calls
        calls += 1
        if calls in (2, length):
            times.append(now())

    handle = decoder.register_forward_pre_hook(watch)
    try:
        generate()
    finally:
        handle.remove()
    return (times[1] - times[0]) / (length - 2)


def decode_pair(arm: Arm, batch: dict[str, Any], length: int) -> dict[str, float]:
    """Seconds a token of decoding the batch's prompts with the latent model, and with its backbone alone."""
    model, width = arm.trainer.model, batch["prompt_ids"].shape[1]
    inputs = {"input_ids": batch["prompt_ids"], "attention_mask": batch["prompt_mask"]}
    inputs |= {k: batch[k] for k in ("pixel_values", "image_grid_thw") if k in batch}
    if "mm_token_type_ids" in batch:
        inputs["mm_token_type_ids"] = batch["mm_token_type_ids"][:, :width]
    lengths = {"max_new_tokens": length, "min_new_tokens": length}
    decoder = model.get_decoder()
    return {
        "decode_latent": decode_seconds(decoder, lambda: model.generate(**inputs, **lengths), length),
        "decode_backbone": decode_seconds(
            decoder, lambda: model.backbone.generate(**inputs, do_sample=False, **lengths), length
        ),
    }


def measure_once(arms: dict[str, Arm], policy_only: PolicyOnly, length: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Seconds of every part, and each arm's batch."""
    found: dict[str, float] = {}
    batches = {}
    for name, arm in arms.items():
        parts, batches[name] = arm.collect()
        found |= {f"{part}_{name}": value for part, value in parts.items()}
    for name, arm in arms.items():
        found[f"update_{name}"] = seconds(lambda a=arm, b=batches[name]: a.update(b))[0]
        found[f"step_{name}"] = sum(found[f"{part}_{name}"] for part in PARTS[:3])
        if name == "latent":
            found["policy_only"] = seconds(lambda b=batches["latent"]: policy_only.update(b))[0]
        if name == "token":
            found["update_plain"] = seconds(lambda a=arm, b=batches["token"]: a.plain_update(b))[0]
    return found | decode_pair(arms["latent"], batches["token"], length), batches


def measure(preset: Preset, device: torch.device, repeats: int, warmup: int, **choices) -> dict[str, Any]:
    """Seconds of every part in every repeat, and bytes of an update. `choices` are those of [`build_arms`]."""
    times: dict[str, list[float]] = defaultdict(list)
    update_bytes: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        arms = build_arms(preset, device, folder, **choices)
        policy_only = PolicyOnly(arms["latent"])
        try:
            for repeat in tqdm(range(-warmup, repeats), desc="rl_step", unit="repeat"):
                found, batches = measure_once(arms, policy_only, preset.completion_length)
                tqdm.write("  ".join(f"{name} {value:.3g}" for name, value in found.items()))
                if repeat < 0:
                    continue
                if repeat == 0:
                    update_bytes = {name: arm.update_memory(batches[name]) for name, arm in arms.items()}
                for name, value in found.items():
                    times[name].append(value)
        except KeyboardInterrupt:
            if not times:
                raise
        weights = {name: tensor_bytes(arm.trainer.model.parameters()) for name, arm in arms.items()}
    return {"times": times, "update_bytes": update_bytes, "weight_bytes": weights}


def ratios(found: dict[str, Any], against: str = "token") -> dict[str, float]:
    times, memory = found["times"], found["update_bytes"]

    def ratio(one: str, other: str) -> float:
        return median([a / b for a, b in zip(times[one], times[other], strict=True)])

    return {
        "rollout_ratio": ratio("rollout_latent", f"rollout_{against}"),
        "update_ratio": ratio("update_latent", f"update_{against}"),
        "step_ratio": ratio("step_latent", f"step_{against}"),
        "update_memory_ratio": memory["latent"] / memory[against],
    } | (
        {
            "update_ratio_plain": ratio("update_latent", "update_plain"),
            "rollout_over_backbone_decode": ratio("decode_latent", "decode_backbone"),
            "update_over_policy_only": ratio("update_latent", "policy_only"),
        }
        if against == "token"
        else {}
    )


def targets(preset_name: str, preset: Preset) -> dict[str, float]:
    gpu = preset_name in ("3b", "7b")
    layers = preset.text["num_hidden_layers"]
    return {
        "rollout_ratio": 0.8 if gpu else 1.0,
        "update_ratio": 0.20 if gpu else 0.15,
        "update_ratio_plain": 0.25 if gpu else 0.40,
        "step_ratio": 0.5,
        "update_memory_ratio": 0.3,
        "rollout_over_backbone_decode": 1.15 if gpu else (layers + preset.policy_layers) / layers * 1.05,
        "update_over_policy_only": 1.25,
    }


def report(result: dict[str, Any]) -> str:
    times = result["seconds"]
    rows = [
        [name, *[times[f"{part}_{arm}"] for part in PARTS], result["update_mib"][arm]]
        for name, arm in (("latent actions", "latent"), ("TRL, all text parameters", "token"), ("TRL, LoRA", "lora"))
        if arm in result["update_mib"]
    ]
    parts = table(["trainer", *[f"{part}, s" for part in PARTS], "update's peak over weights, MiB"], rows)
    rows = [
        [f"`{key}`", result[key], result["targets"][key], "yes" if result[key] <= result["targets"][key] else "no"]
        for key in result["targets"]
    ]
    shown = table(["ratio", "measured", "target", "met"], rows)
    if not result["against_lora"]:
        return f"{parts}\n\n{shown}"
    lora = table(["against LoRA", "measured"], [[f"`{key}`", value] for key, value in result["against_lora"].items()])
    return f"{parts}\n\n{shown}\n\n{lora}"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, preset="small", repeats=5)
    parser.add_argument("--beta", type=float, default=0.0, help="KL weight of the latent side; TRL's default is 0")
    parser.add_argument("--no-cuda-graphs", action="store_true", help="the latent side decodes without them")
    parser.add_argument("--no-lora", action="store_true", help="without TRL's trainer with LoRA")
    for name in ("prompts", "generations", "prompt-characters", "completion-length", "image-size", "policy-layers"):
        parser.add_argument(f"--{name}", type=int)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = parse(arguments)
    preset, device = PRESETS[options.preset], use_device(options.device)
    use_clock(options.clock)
    if options.quick:
        preset = preset.scaled_down()
    sizes = ("prompts", "generations", "prompt_characters", "completion_length", "image_size", "policy_layers")
    preset = replace(preset, **{name: getattr(options, name) for name in sizes if getattr(options, name)})
    if preset.completion_length < 3:
        raise SystemExit("--completion-length must be at least 3: decoding is timed from the second token on.")
    found = measure(
        preset,
        device,
        options.repeats,
        options.warmup,
        beta=options.beta,
        cuda_graphs=False if options.no_cuda_graphs else None,
        lora=not options.no_lora,
    )
    result = {
        **ratios(found),
        "targets": targets(options.preset, preset),
        "against_lora": {} if options.no_lora else ratios(found, "lora"),
        "seconds": {name: median(values) for name, values in found["times"].items()},
        "spread": {name: spread(values) for name, values in found["times"].items()},
        "update_mib": {name: value / MIB for name, value in found["update_bytes"].items()},
        "weight_mib": {name: value / MIB for name, value in found["weight_bytes"].items()},
        "preset": options.preset,
        "quick": options.quick,
        "repeats": len(found["times"]["step_latent"]),
        "clock": options.clock,
        "beta": options.beta,
        "cuda_graphs": not options.no_cuda_graphs,
        "sizes": {name: getattr(preset, name) for name in sizes} | {"layers": preset.text["num_hidden_layers"]},
        **facts(device),
    }
    print(report(result))
    write(options.json, result)
    return result


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    main()
