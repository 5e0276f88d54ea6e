"""The arms of the reproduction: how each is trained, and one way to ask all of them."""

import json
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from matrix import Cell, Size
from tasks import Tasks, described, small_talk
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LogitsProcessor,
    LogitsProcessorList,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from trl import GRPOConfig, GRPOTrainer

from latent_trl import (
    LatentActionConfig,
    LatentActionGRPOConfig,
    LatentActionGRPOTrainer,
    LatentActionModel,
    LatentActionPPOConfig,
    LatentActionPPOTrainer,
    LatentActionSpaceConfig,
    LatentActionSpaceTrainer,
)
from latent_trl.checkpoint.configuration import STAGES
from latent_trl.data.prompts import encode_prompts
from latent_trl.data.shapes import shape_pairs, shape_questions
from latent_trl.evaluation.answers import answer
from latent_trl.generation.arithmetic_sampling import ArithmeticSampler, even_points, random_orders
from latent_trl.rewards.exact_match import ExactMatchReward
from latent_trl.trainer.space.trainer import HISTORY_FILE

MAX_NEW_TOKENS = 12
DESCRIPTION_TOKENS = 24
# Of the figures on a space that are kept.
PREFIXES = ("codebook/", "world_model/", "policy/")
REWARD = ExactMatchReward()


def device_of(size: Size) -> str:
    return "cuda" if size.gpu and torch.cuda.is_available() else "cpu"


def seconds(size: Size) -> float:
    """Of processor time, which other jobs do not lengthen; of the wall clock on a GPU."""
    if device_of(size) == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def quiet(size: Size) -> dict[str, Any]:
    """What all trainers have in common."""
    use_cpu = device_of(size) == "cpu"
    return {"save_strategy": "no", "disable_tqdm": True, "report_to": "none", "use_cpu": use_cpu}


def load_backbone(size: Size):
    if not size.backbone.is_dir():
        raise SystemExit(f"{str(size.backbone)!r} is not there: make it with benchmarks/reproduction/smol.py.")
    return AutoModelForImageTextToText.from_pretrained(size.backbone, dtype="float32").to(device_of(size))


def load_processor(size: Size):
    return AutoProcessor.from_pretrained(size.backbone)


class TokenSpeaker:
    """A backbone that samples tokens."""

    def __init__(self, model, processor):
        self.model, self.processor = model, processor

    @torch.no_grad()
    def say(self, rows: list[dict[str, Any]], temperature: float | None = None, tokens=MAX_NEW_TOKENS, top_k: int = 0):
        """Answers, the most likely tokens by default."""
        self.model.eval()
        law = {"do_sample": False} if temperature is None else {"do_sample": True, "temperature": temperature}
        texts = []
        for start in range(0, len(rows), 64):
            inputs = encode_prompts(self.processor, rows[start : start + 64])
            inputs = {name: value.to(self.model.device) for name, value in inputs.items()}
            ids = self.model.generate(**inputs, max_new_tokens=tokens, top_k=top_k, **law)
            new = ids[:, inputs["input_ids"].shape[1] :]
            texts += [t.strip() for t in self.processor.batch_decode(new, skip_special_tokens=True)]
        return texts


class ArithmeticTokens(LogitsProcessor):
    """Draws the tokens of a prompt's samples, which stand side by side, from one arithmetic code, at temperature 1."""

    def __init__(self, rows: int, samples: int):
        self.groups, self.samples = rows // samples, samples
        points = even_points(self.groups, samples, None, "cpu").T.flatten()
        self.sampler = ArithmeticSampler(points, samples)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        probs = scores.softmax(dim=-1)
        order = random_orders(self.groups, probs.shape[1], None, "cpu").repeat_interleave(self.samples, dim=0)
        tokens = self.sampler.draw(probs, order, torch.multinomial(probs, 1).squeeze(-1))
        return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)


@contextmanager
def drawn_together(model, samples: int):
    """Inside the block the samples of each prompt that TRL's trainer asks `model` for come from one arithmetic code."""
    generate = model.generate

    def together(*args, generation_config=None, **options):
        # The validation curve, which takes the likeliest tokens, gives no configuration.
        if generation_config is not None:
            processor = ArithmeticTokens(len(options["input_ids"]), samples)
            options |= {"generation_config": generation_config, "logits_processor": LogitsProcessorList([processor])}
        return generate(*args, **options)

    model.generate = together
    try:
        yield
    finally:
        del model.generate


class CodeSpeaker:
    """A latent action model that samples codes."""

    def __init__(self, model: LatentActionModel, processor):
        self.model, self.processor = model, processor

    def answers(self, rows, temperature: float | None = None, tokens: int = MAX_NEW_TOKENS, **options):
        if temperature is not None:
            options |= {"action_do_sample": True, "action_temperature": temperature}
        return answer(self.model, self.processor, rows, max_new_tokens=tokens, **options)

    def say(self, rows, temperature: float | None = None, tokens: int = MAX_NEW_TOKENS, top_k: int = 0):
        return self.answers(rows, temperature, tokens, action_top_k=top_k).texts


def rewards_of(rows: list[dict[str, Any]], texts: list[str]) -> list[float]:
    return REWARD(prompts=None, completions=texts, answer=[row["answer"] for row in rows])


class Curve(TrainerCallback):
    """Reward on the validation questions every so many steps, with rollouts and seconds of training so far."""

    def __init__(self, speaker, tasks: Tasks, size: Size, cell: Cell):
        self.speaker, self.tasks, self.size = speaker, tasks, size
        self.rollouts = size.prompts * size.generations
        # A longer run has as many points.
        every = size.ablations_evaluate_every if cell.ablation else size.evaluate_every
        self.every = every * cell.options.get("times", 1)
        self.points: list[dict[str, float]] = []
        self.paused = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.start = seconds(self.size)
        self.take(0)

    def on_step_end(self, args, state, control, **kwargs):
        steps, left = divmod(state.global_step, args.num_iterations)
        if left == 0 and (steps % self.every == 0 or state.global_step == state.max_steps):
            self.take(steps)

    def take(self, steps: int) -> None:
        now = seconds(self.size)
        training = self.speaker.model.training
        with torch.random.fork_rng():
            texts = self.speaker.say(self.tasks.validation)
        reward = sum(rewards_of(self.tasks.validation, texts)) / len(texts)
        self.speaker.model.train(training)
        spent = now - self.start - self.paused
        self.points.append({"rollouts": steps * self.rollouts, "reward": reward, "seconds": spent})
        self.paused += seconds(self.size) - now


def learn(cell: Cell, size: Size, folder: Path) -> dict[str, Any]:
    """A latent action space and the policy cloned, saved in `folder`. Returns the codebook's health. Where only some
    `stages` are learned, those before them are the first space's, found beside `folder`."""
    set_seed(cell.seed)
    options = dict(cell.options)
    stages = list(options.pop("stages", STAGES[1:5]))
    pairs, texts = options.pop("pairs", size.pairs), options.pop("texts", size.texts)
    freeze = options.pop("freeze_codebook", False)
    names = ("balance_coef", "cycle_coef", "cloning_target", "coverage_coef")
    learning = {name: options.pop(name) for name in names if name in options}
    config = LatentActionConfig(
        allow_single_code=options.get("num_codes") == 1,
        inverse_dynamics_decoder={"num_hidden_layers": 2},
        policy_decoder={"num_hidden_layers": 2},
        gumbel_temperature=1.0,
        **options,
    )
    start = seconds(size)
    processor, history = load_processor(size), []
    if cell.space:
        last = STAGES.index(stages[0]) - 1
        done = folder.parent / f"{cell.space}-{cell.seed}" / "run" / f"{last}-{STAGES[last]}"
        model = LatentActionModel.from_pretrained(done, backbone=load_backbone(size))
        history = json.loads((done / HISTORY_FILE).read_text(encoding="utf-8"))
    else:
        model = LatentActionModel.from_backbone(load_backbone(size), config)
    if freeze:
        model.codebook.weight.register_hook(torch.zeros_like)
    if not model.config.use_projector:
        stages.remove("projector")
    trainer = LatentActionSpaceTrainer(
        model,
        LatentActionSpaceConfig(
            str(folder / "run"),
            stages=stages,
            inverse_dynamics_max_steps=size.space_steps,
            projector_max_steps=size.projector_steps,
            joint_max_steps=size.joint_steps,
            policy_max_steps=size.cloning_steps,
            inverse_dynamics_learning_rate=size.space_rate,
            joint_learning_rate=1e-3,
            policy_learning_rate=1e-3,
            per_device_train_batch_size=16,
            max_length=96,
            logging_steps=5,
            seed=cell.seed,
            **({"balance_coef": size.balance_coef} | learning),
            **quiet(size),
        ),
        shape_pairs("base", pairs, cell.seed, size.error_rate),
        text_dataset=small_talk(texts, cell.seed, size.others) if texts else None,
        processing_class=processor,
    )
    trainer.train()
    model.save_pretrained(folder / "model")
    health = {k: v for row in history + trainer.history for k, v in row.items() if k.startswith(PREFIXES)}
    return {"health": health, "seconds": seconds(size) - start}


def rl_options(cell: Cell, size: Size, folder: Path, learning_rate: float, own: dict[str, Any]) -> dict[str, Any]:
    """What RL over tokens and over codes have in common, and an arm's `own`; `times` of them is how often the size's
    steps. Each further update of a rollout is a further step, so that the rollouts stay the same."""
    own = dict(own)
    rollouts = size.steps * own.pop("times", 1)
    return {
        "output_dir": str(folder / "rl"),
        "max_steps": rollouts * own.get("num_iterations", size.updates),
        "num_iterations": size.updates,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": size.prompts * size.generations,
        "num_generations": size.generations,
        "max_completion_length": MAX_NEW_TOKENS,
        "beta": 0.0,
        "logging_steps": 1,
        "bf16": False,
        "gradient_checkpointing": False,
        "seed": cell.seed,
        **quiet(size),
        **own,
    }


def train_tokens(cell: Cell, size: Size, folder: Path, tasks: Tasks, learning_rate: float):
    """TRL's GRPO on the backbone's own tokens. By default the last two layers are trained: as many parameters as the
    latent arm's policy has, and the same layers."""
    set_seed(cell.seed)
    options = dict(cell.options)
    train_all = options.pop("train_all", False)
    together = options.pop("action_sampling", "independent") == "arithmetic"
    model, processor = load_backbone(size), load_processor(size)
    model.requires_grad_(False)
    decoder = model.get_decoder()
    for part in [decoder, model.get_output_embeddings()] if train_all else decoder.layers[-2:]:
        part.requires_grad_(True)
    speaker = TokenSpeaker(model, processor)
    options = rl_options(cell, size, folder, learning_rate, options)
    curve = Curve(speaker, tasks, size, cell)
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=REWARD,
        args=GRPOConfig(**options),
        train_dataset=shape_questions("rl", seed=cell.seed),
        processing_class=processor,
        callbacks=[curve],
    )
    with drawn_together(model, size.generations) if together else nullcontext():
        trainer.train()
    return speaker, curve, trainer


def train_codes(cell: Cell, size: Size, folder: Path, tasks: Tasks, learning_rate: float, space: Path):
    """RL over codes from the learned model in `space`."""
    set_seed(cell.seed)
    options = dict(cell.options)
    captions = []
    if options.pop("captions", False):
        captions = described(shape_pairs("base", size.pairs, cell.seed, size.error_rate))
    model, processor = LatentActionModel.from_pretrained(space, backbone=load_backbone(size)), load_processor(size)
    speaker = CodeSpeaker(model, processor)
    if options.get("times") == 0:
        return speaker, None, None
    # The trainers' own default is named: rows that are drawn together say so.
    options.setdefault("action_sampling", "independent")
    for name in ("temperature", "top_k"):
        if name in options:
            options[f"action_{name}"] = options.pop(name)
    trainer_class, config_class = LatentActionGRPOTrainer, LatentActionGRPOConfig
    if options.pop("algorithm", "grpo") == "ppo":
        # Two updates of each rollout.
        options |= {"num_iterations": 2, "value_learning_rate": 1e-3}
        trainer_class, config_class = LatentActionPPOTrainer, LatentActionPPOConfig
    options = rl_options(cell, size, folder, learning_rate, options)
    curve = Curve(speaker, tasks, size, cell)
    held = None
    if "anchor_coef" in options:
        # As much small talk as captions.
        held = list(small_talk(len(captions) or size.texts, cell.seed, size.others)) + captions
    trainer = trainer_class(
        model,
        REWARD,
        config_class(**options),
        train_dataset=shape_questions("rl", seed=cell.seed),
        processing_class=processor,
        callbacks=[curve],
        anchor_dataset=held,
    )
    trainer.train()
    return speaker, curve, trainer


def train_sft(cell: Cell, size: Size, folder: Path):
    """SFT of the backbone on the rows that the space is learned from, for comparison: no other arm has one."""
    from peft import LoraConfig, get_peft_model

    from latent_trl.data.collator import LatentActionDataCollator
    from latent_trl.data.mixing import MixedRows, MixedRowsCollator

    set_seed(cell.seed)
    processor = load_processor(size)
    model = get_peft_model(load_backbone(size), LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    plain = MixedRowsCollator(LatentActionDataCollator(processor, vision_token_ids=[model.config.image_token_index]))

    def collate(rows):
        batch = plain(rows)
        labels = batch["input_ids"].masked_fill(~batch["loss_mask"], -100)
        return {k: batch[k] for k in ("input_ids", "attention_mask")} | batch["vision"] | {"labels": labels}

    args = TrainingArguments(
        str(folder / "sft"),
        max_steps=size.sft_steps,
        learning_rate=2e-4,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,
        per_device_train_batch_size=24,
        remove_unused_columns=False,
        seed=cell.seed,
        **quiet(size),
    )
    rows = MixedRows(shape_pairs("base", size.pairs, cell.seed + 1, size.error_rate))
    Trainer(model, args, data_collator=collate, train_dataset=rows).train()
    return TokenSpeaker(model.merge_and_unload(), processor)
