"""The arms of `pretrained.py`: how each is trained, and one way to ask all of them."""

import re
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedTokenizerBase, set_seed
from trl import GRPOConfig, GRPOTrainer

from latent_trl import (
    LatentActionGRPOConfig,
    LatentActionGRPOTrainer,
    LatentActionModel,
    LatentActionSpaceConfig,
    LatentActionSpaceTrainer,
    PlanBanditConfig,
    PlanBanditTrainer,
    PlanConfig,
    PlanModel,
    PlanSpaceConfig,
    PlanSpaceTrainer,
)
from latent_trl.data.collator import LatentActionDataCollator
from latent_trl.data.prompts import encode_prompts
from latent_trl.evaluation.answers import answer
from latent_trl.evaluation.perplexity import text_perplexity

CODEBOOK = Path(__file__).resolve().parents[1] / "model_cards" / "smollm2-135m-latent-actions"
ANSWER_TOKENS = 40
# Of tokens: at 1 this model's samples are no sentences.
TEMPERATURE = 0.7
ROWS = 64


class Speaker:
    """An arm that is asked."""

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase):
        self.model, self.tokenizer = model.eval(), tokenizer

    def inputs(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {name: value.to(self.model.device) for name, value in encode_prompts(self.tokenizer, rows).items()}

    def decoded(self, ids: torch.Tensor, inputs: dict[str, torch.Tensor]) -> list[str]:
        new = ids[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.tokenizer.batch_decode(new, skip_special_tokens=True)]

    def say(self, rows: list[dict[str, Any]]) -> list[str]:
        """The greedy answer to each row."""
        raise NotImplementedError

    def samples(self, rows: list[dict[str, Any]], count: int, seed: int) -> list[list[str]]:
        """So many answers to each row, by the law that RL explores with."""
        raise NotImplementedError

    def nats(self, rows: list[dict[str, Any]], texts: list[str]) -> list[list[float]]:
        """Negative log-likelihood and number of tokens of a text to each row."""
        raise NotImplementedError


class TokenSpeaker(Speaker):
    """A language model that samples tokens."""

    @torch.no_grad()
    def _generated(self, rows: list[dict[str, Any]], **law: Any) -> list[str]:
        texts = []
        for start in range(0, len(rows), ROWS):
            inputs = self.inputs(rows[start : start + ROWS])
            ids = self.model.generate(**inputs, max_new_tokens=ANSWER_TOKENS, top_k=0, **law)
            texts += self.decoded(ids, inputs)
        return texts

    def say(self, rows):
        self.model.eval()
        return self._generated(rows, do_sample=False)

    def samples(self, rows, count, seed):
        self.model.eval()
        torch.manual_seed(seed)
        copies = [row for row in rows for _ in range(count)]
        texts = self._generated(copies, do_sample=True, temperature=TEMPERATURE)
        return [texts[i : i + count] for i in range(0, len(texts), count)]

    @torch.no_grad()
    def nats(self, rows, texts):
        collate, found = LatentActionDataCollator(self.tokenizer), []
        for batch in _batches(collate, rows, texts, self.model.device):
            ids, mask = batch["input_ids"], batch["loss_mask"][:, 1:]
            logits = self.model(input_ids=ids, attention_mask=batch["attention_mask"]).logits[:, :-1].float()
            losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
            found += [[float(loss), float(n)] for loss, n in zip((losses * mask).sum(1), mask.sum(1), strict=True)]
        return found


def _batches(collate: LatentActionDataCollator, rows: list[dict], texts: list[str], device: torch.device):
    """Conversations of rows and answers that are not empty."""
    said = [(row, text) for row, text in zip(rows, texts, strict=True) if text.strip()]
    for start in range(0, len(said), 16):
        some = [
            {"messages": [*row["prompt"], {"role": "assistant", "content": text}]}
            for row, text in said[start : start + 16]
        ]
        yield {name: value.to(device) for name, value in collate(some).items() if isinstance(value, torch.Tensor)}


class CodeSpeaker(Speaker):
    """A latent action model that samples codes."""

    def say(self, rows):
        return answer(self.model, self.tokenizer, rows, max_new_tokens=ANSWER_TOKENS).texts

    def samples(self, rows, count, seed):
        torch.manual_seed(seed)
        copies = [row for row in rows for _ in range(count)]
        texts = answer(self.model, self.tokenizer, copies, max_new_tokens=ANSWER_TOKENS, action_do_sample=True).texts
        return [texts[i : i + count] for i in range(0, len(texts), count)]

    def nats(self, rows, texts):
        found = text_perplexity(self.model, self.tokenizer, rows, texts, law="marginal")
        return [[loss, float(n)] for loss, n in zip(found.nats, found.tokens, strict=True)]


class PlanSpeaker(Speaker):
    """
    A model of plans. Before its chooser is trained, plans are drawn evenly. Samples are answers under the plans that
    are the best for the first sentence, held throughout; so is a text whose likelihood is asked for.
    """

    def _plans(self, rows: list[dict[str, Any]], count: int, seed: int) -> torch.Tensor:
        """Different plans `[N, count]`, the best first."""
        plans = self.model.plan_config.num_plans
        if not self.model.chooser_is_trained:
            generator = torch.Generator().manual_seed(seed)
            return torch.stack([torch.randperm(plans, generator=generator)[:count] for _ in rows])
        found = []
        for start in range(0, len(rows), ROWS):
            logits = self.model.plan_logits(**self.inputs(rows[start : start + ROWS]))
            found.append(logits.topk(min(count, plans)).indices.cpu())
        return torch.cat(found)

    def _spoken(self, rows: list[dict[str, Any]], plans: torch.Tensor | None) -> list[str]:
        """Answers under plans that are held throughout, or under one that is chosen for each sentence."""
        texts = []
        for start in range(0, len(rows), ROWS):
            inputs = self.inputs(rows[start : start + ROWS])
            own = None if plans is None else plans[start : start + ROWS]
            ids = self.model.generate(**inputs, plan_ids=own, max_new_tokens=ANSWER_TOKENS)
            texts += self.decoded(ids, inputs)
        return texts

    def say(self, rows):
        return self._spoken(rows, None if self.model.chooser_is_trained else self._plans(rows, 1, 0)[:, 0])

    def samples(self, rows, count, seed):
        plans = self._plans(rows, count, seed)
        texts = self._spoken([row for row in rows for _ in range(count)], plans.flatten())
        return [texts[i : i + count] for i in range(0, len(texts), count)]

    @torch.no_grad()
    def nats(self, rows, texts):
        collate, found = LatentActionDataCollator(self.tokenizer), []
        # Batches are of the texts that there are.
        rows = [row for row, text in zip(rows, texts, strict=True) if text.strip()]
        texts = [text for text in texts if text.strip()]
        plans, start = self._plans(rows, 1, 0)[:, 0], 0
        for batch in _batches(collate, rows, texts, self.model.device):
            ids, mask = batch["input_ids"], batch["loss_mask"]
            own = plans[start : start + len(ids)]
            start += len(ids)
            log_probs = self.model.log_probs(
                input_ids=ids, attention_mask=batch["attention_mask"], completion_mask=mask, plan_ids=own
            )
            found += [[-float(a), float(n)] for a, n in zip(log_probs.sum(1), mask[:, 1:].sum(1), strict=True)]
        return found


def own_answers(speaker: TokenSpeaker, rows: list[dict[str, Any]], count: int, seed: int) -> list[dict[str, Any]]:
    """Conversations with the model's own samples, up to the last sentence that ended."""
    found = []
    for row, texts in zip(rows, speaker.samples(rows, count, seed), strict=True):
        for text in dict.fromkeys(texts):
            whole = re.match(r".*[.!?]", text, re.DOTALL)
            if whole:
                found.append({"messages": [*row["prompt"], {"role": "assistant", "content": whole[0]}]})
    return found


def quiet(bench: Any, name: str) -> dict[str, Any]:
    """What all trainers have in common."""
    return {
        "output_dir": str(bench.folder / "work" / name),
        "seed": bench.seed,
        "use_cpu": bench.device == "cpu",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def grpo_options(bench: Any, name: str, rate: float) -> dict[str, Any]:
    """Of GRPO over tokens and over codes."""
    size = bench.size
    # Of one pass: memory is short without a GPU.
    rows = min(size.step_rollouts, 4 if bench.device == "cpu" else 64)
    return {
        **quiet(bench, name),
        "max_steps": size.rollouts // size.step_rollouts,
        "learning_rate": rate,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": size.step_rollouts // rows,
        "num_generations": size.generations,
        "max_completion_length": ANSWER_TOKENS,
        "logging_steps": 1,
        "bf16": False,
        "gradient_checkpointing": False,
    }


def history(trainer: Any) -> dict[str, Any]:
    """What was logged of rewards."""
    return {"train_reward": [row["reward"] for row in trainer.state.log_history if "reward" in row]}


def train_tokens(bench: Any, reward: Any, rate: float) -> tuple[Speaker, dict[str, Any]]:
    """TRL's GRPO of a LoRA on all linear maps."""
    set_seed(bench.seed)
    model, tokenizer = bench.backbone()
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    trainer = GRPOTrainer(
        model,
        reward,
        GRPOConfig(**grpo_options(bench, f"tokens {rate:g}", rate), temperature=TEMPERATURE),
        train_dataset=_dataset(bench.task.rl),
        processing_class=tokenizer,
    )
    trainer.train()
    return TokenSpeaker(model, tokenizer), history(trainer)


def _dataset(rows: list[dict[str, Any]]):
    from datasets import Dataset

    return Dataset.from_list(rows)


def learned_codes(bench: Any, reward: Any) -> tuple[Speaker, dict[str, Any]]:
    """The codebook, gone on from the published one where it is of this backbone."""
    set_seed(bench.seed)
    backbone, tokenizer = bench.backbone()
    if (bench.folder / "codes").is_dir():
        return CodeSpeaker(LatentActionModel.from_pretrained(bench.folder / "codes", backbone=backbone), tokenizer), {}
    model = published_codebook(backbone)
    rows, size = bench.answers(), bench.size
    trainer = LatentActionSpaceTrainer(
        model,
        LatentActionSpaceConfig(
            **quiet(bench, "codes"),
            stages=["inverse_dynamics", "policy"],
            inverse_dynamics_max_steps=size.space_steps,
            policy_max_steps=size.cloning_steps,
            inverse_dynamics_learning_rate=1e-3,
            policy_learning_rate=1e-3,
            balance_coef=1.0,
            max_length=256,
            logging_steps=8,
        ),
        _dataset(rows),
        processing_class=tokenizer,
    )
    trainer.train()
    model.save_pretrained(bench.folder / "codes")
    health = {key: value for row in trainer.history for key, value in row.items()}
    return CodeSpeaker(model, tokenizer), {"rows": len(rows), "health": health}


def published_codebook(backbone: Any) -> LatentActionModel:
    """In float32, to be trained."""
    model = LatentActionModel.from_pretrained(CODEBOOK, backbone=backbone)
    for name in ("codebook", "world_model", "inverse_dynamics", "policy"):
        getattr(model, name).float()
    return model


def train_codes(bench: Any, reward: Any, rate: float) -> tuple[Speaker, dict[str, Any]]:
    """GRPO over codes."""
    set_seed(bench.seed)
    backbone, tokenizer = bench.backbone()
    model = LatentActionModel.from_pretrained(bench.folder / "codes", backbone=backbone)
    trainer = LatentActionGRPOTrainer(
        model,
        reward,
        LatentActionGRPOConfig(**grpo_options(bench, f"codes {rate:g}", rate)),
        train_dataset=_dataset(bench.task.rl),
        processing_class=tokenizer,
    )
    trainer.train()
    return CodeSpeaker(model, tokenizer), history(trainer)


def learned_plans(bench: Any, reward: Any) -> tuple[Speaker, dict[str, Any]]:
    """The space of plans, and the rewards `[prompts, K]` of all plans on validation prompts."""
    set_seed(bench.seed)
    backbone, tokenizer = bench.backbone()
    size = bench.size
    if (bench.folder / "plans").is_dir():
        return PlanSpeaker(PlanModel.from_pretrained(bench.folder / "plans", backbone=backbone), tokenizer), {}
    rows = bench.task.learn[: size.plan_rows * 3 // 4]
    rows = [*rows, *({"prompt": row["prompt"]} for row in bench.talk[0][: size.plan_rows // 4])]
    trainer = PlanSpaceTrainer(
        PlanModel(backbone, PlanConfig(num_plans=size.plans, segment="sentence", seed=bench.seed)),
        PlanSpaceConfig(
            **quiet(bench, "plans"),
            max_steps=size.plan_steps,
            per_device_train_batch_size=size.plan_prompts,
            answers_per_prompt=min(5, size.plans // 2),
            max_branches=size.branches,
            segment_starts=2,
            max_completion_length=ANSWER_TOKENS,
            scoring_batch_size=ROWS,
            eval_strategy="no",
            early_stopping_patience=None,
        ),
        train_dataset=rows,
        processing_class=tokenizer,
        reward_funcs=reward,
    )
    trainer.train()
    gains = [row["assignment/gain"] for row in trainer.state.log_history if "assignment/gain" in row]
    # Before the figures, which may take as long as learning.
    trainer.save_model(str(bench.folder / "plans"))
    figures = trainer.evaluate(bench.task.validation)
    return PlanSpeaker(trainer.model, tokenizer), {"figures": figures, "gain": gains}


def train_plans(bench: Any, reward: Any, rate: float) -> tuple[Speaker, dict[str, Any]]:
    """A bandit over plans, one a sentence: two rollouts a prompt."""
    set_seed(bench.seed)
    backbone, tokenizer = bench.backbone()
    model, size = PlanModel.from_pretrained(bench.folder / "plans", backbone=backbone), bench.size
    batches = size.rollouts // (2 * size.bandit_prompts)
    trainer = PlanBanditTrainer(
        model,
        reward,
        PlanBanditConfig(
            **quiet(bench, f"plans {rate:g}"),
            max_steps=20 * batches,
            learning_rate=rate,
            rollout_prompts=size.bandit_prompts,
            rollout_batch_size=ROWS,
            max_completion_length=ANSWER_TOKENS,
            measure_ceiling=False,
        ),
        train_dataset=bench.task.rl,
        processing_class=tokenizer,
    )
    trainer.train()
    return PlanSpeaker(model, tokenizer), history(trainer)
