"""The runs of the reproduction: what is compared with what, and in which order."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from latent_trl.data.shapes import ERROR_RATE

ROOT = Path(__file__).resolve().parents[2]
# Runs over tokens and over codes whose samples are measured by several laws.
SWEPT = (
    ("base", "latent, before RL"),
    ("base", "latent, no projector, before RL"),
    ("token grpo", "latent grpo"),
    (
        "token grpo, 4 updates, decaying rate",
        "latent grpo, 4 updates, decaying rate, anchor 0.1 with captions, arithmetic",
    ),
    (
        "token grpo, 4 updates, decaying rate",
        "latent grpo, no projector, 4 updates, decaying rate, anchor 0.1 with captions, arithmetic",
    ),
)
TOKEN_LOSSES = {
    "grpo": {"loss_type": "grpo"},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
    "bnpo": {"loss_type": "bnpo"},
}


@dataclass(frozen=True)
class Size:
    """
    What is run, and how much of it. `steps` are RL steps of `prompts` x `generations` rollouts, with so many `updates`
    of each where a run has no number of its own; `learning_rates` are the same grid for every arm, on the validation
    questions of seed 0; `arms` are those that choose one of them, and `spaces` those of `SPACES` that are learned, the
    first for all but the ablations, which have its options but for their own and are trained as the variant `ablated`,
    and `over`, variants of codes over another space, before RL where the variant is empty;
    `losses` and `variants` are run in both arms where both have them; with `by_end` variants are also run at the rate
    that ended best; validation curves have a point every `evaluate_every` steps, the ablations' every
    `ablations_evaluate_every`; sweeps are over so many of the `likeliest` tokens or codes, 0 for all. `error_rate` is
    that of the annotator whose answers `backbone` was taught. A `gpu` is used where there is one.
    """

    backbone: Path = ROOT / "model_cards" / "pocket-vlm"
    error_rate: float = ERROR_RATE
    gpu: bool = False
    seeds: tuple[int, ...] = (0, 1, 2)
    learning_rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3)
    arms: tuple[str, ...] = ("tokens", "codes", "ppo")
    spaces: tuple[str, ...] | None = None
    ablated: str = ""
    over: tuple[tuple[str, str], ...] = ()
    losses: tuple[str, ...] = tuple(TOKEN_LOSSES)
    variants: tuple[str, ...] = ()
    pairs: int = 1500
    texts: int = 1500
    space_steps: int = 150
    projector_steps: int = 40
    joint_steps: int = 60
    cloning_steps: int = 150
    space_rate: float = 3e-3
    balance_coef: float = 0.1
    sft_steps: int = 30
    steps: int = 30
    updates: int = 1
    by_end: bool = False
    prompts: int = 16
    generations: int = 8
    questions: int = 600
    others: int = 240
    evaluate_every: int = 2
    ablations_evaluate_every: int = 4
    likeliest: tuple[int, ...] = (0, 4, 8)

    @property
    def learned(self) -> tuple[str, ...]:
        """Names of the spaces, all where none are chosen."""
        return self.spaces or tuple(SPACES)


SIZES = {
    "pocket": Size(
        spaces=(
            "space",
            "K = 1",
            "random frozen codebook",
            "no cycle",
            "no projector",
            "no text",
            "100 pairs",
            "500 pairs",
            "2 000 pairs",
            "all pairs",
            "K = 16",
            "K = 64",
            "K = 512",
            "read-out subtract",
            "read-out last block",
            "no balance",
        ),
        cloning_steps=100,
    ),
    # What might make RL over codes better, and what else was tried.
    "levers": Size(
        arms=("tokens", "codes", "all text parameters"),
        spaces=("space", "no projector", "coverage", "cloned from inferred codes", "policy from last layers"),
        over=(
            ("no projector", ""),
            ("no projector", "4 updates, decaying rate, anchor 0.1 with captions, arithmetic"),
        ),
        losses=("grpo",),
        variants=(
            "2 updates",
            "T = 0.7",
            "T = 1.5",
            "hot",
            "decaying rate",
            "KL 0.04",
            "entropy 0.01",
            "entropy 0.1, arithmetic",
            "anchor 0.1",
            "entropy 0.01, anchor 0.1",
            "arithmetic",
            "4 updates, decaying rate",
            "4 updates, decaying rate, anchor 0.1 with captions, arithmetic",
        ),
    ),
    "reduced": Size(
        seeds=(0,),
        learning_rates=(3e-4, 1e-3),
        spaces=("space", "K = 1"),
        losses=("grpo",),
        variants=(),
        pairs=300,
        texts=300,
        space_steps=60,
        projector_steps=15,
        joint_steps=15,
        cloning_steps=60,
        sft_steps=10,
        steps=10,
        questions=120,
        others=48,
        evaluate_every=5,
        likeliest=(0,),
    ),
    # The pocket VLM taught by a far worse annotator, made by `rare.py`.
    "rare": Size(
        backbone=ROOT / "outputs" / "rare-vlm",
        error_rate=0.97,
        seeds=(0, 1, 2, 3, 4, 5, 6),
        learning_rates=(1e-4, 3e-4, 5e-4, 1e-3, 2e-3),
        arms=tuple(
            f"{arm}{law}"
            for arm in ("tokens", "codes")
            for law in ("", ", hot", ", decaying rate", ", hot, decaying rate")
        )
        + ("codes, hot, decaying rate, anchor 0.1, arithmetic",),
        spaces=(
            "coverage",
            "space",
            "random frozen codebook",
            "no text",
            "no projector",
            "no cycle",
            "K = 16",
            "K = 512",
            "100 pairs",
            "K = 1",
            "no balance",
            "read-out subtract",
            "read-out last block",
            "cloned from inferred codes",
            "policy from last layers",
        ),
        ablated="hot, 4 updates, decaying rate, anchor 0.1, arithmetic",
        losses=("grpo",),
        variants=(
            "hot",
            "decaying rate",
            "hot, decaying rate",
            "4 updates, decaying rate",
            "4 updates, decaying rate, arithmetic",
            "hot, 4 updates, decaying rate",
            "hot, decaying rate, anchor 0.1",
            "hot, decaying rate, anchor 0.1, arithmetic",
            "hot, 4 updates, decaying rate, anchor 0.1, arithmetic",
            "hot, decaying rate, anchor 0.1, arithmetic, 4 times the steps",
            "hot, 4 updates, decaying rate, anchor 0.1, arithmetic, guard",
            "hot, 4 updates, decaying rate, anchor 0.1, arithmetic, KL 0.01",
            "4 updates, decaying rate, KL 0.01",
        ),
        cloning_steps=300,
        updates=2,
        by_end=True,
    ),
    # SmolLM2-135M with a vision tower, made by `smol.py`.
    "smol": Size(
        backbone=ROOT / "outputs" / "smol-vlm",
        gpu=True,
        learning_rates=(3e-5, 1e-4, 3e-4, 1e-3),
        spaces=("space", "K = 1", "random frozen codebook"),
        losses=("grpo",),
        variants=(),
        space_rate=2e-3,
        # At .1 this language model's codes in use fell to 25 (`examples/scripts/train_smollm2_codebook.py`).
        balance_coef=1.0,
    ),
}


@dataclass(frozen=True)
class Cell:
    """
    One run.

    Args:
        name (`str`): Of the arm, the same for all seeds.
        kind (`str`): `learn` (a latent action space and policy), `base`, `sft`, `tokens` or `codes`.
        seed (`int`): Of everything that is drawn.
        options (`dict`): For `learn`, of configuration and size; else of the trainer.
        space (`str`): The name of the `learn` cell to start from: of `codes`, and of a space whose first stages are
            another one's.
        arm (`str`): Whose chosen learning rate is used; empty for a run that has its own.
        by_end (`bool`): Chosen by the end of the validation curve, not its mean.
        ablation (`bool`): Its validation curve has fewer points, and what no table shows is not measured.
    """

    name: str
    kind: str
    seed: int
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    space: str = ""
    arm: str = ""
    by_end: bool = False
    ablation: bool = False

    def needs(self, other: "Cell") -> bool:
        """Whether `other` must have been run before."""
        if other.kind == "learn":
            return (other.name, other.seed) == (self.space, self.seed)
        return other.name.startswith(f"tune {self.arm} ")

    @property
    def key(self) -> str:
        return f"{self.name}-{self.seed}"


# With `stages` only those are learned, after the first space's own.
SPACES: dict[str, dict[str, Any]] = {
    # What the package does by itself, said for a size whose other spaces have it.
    "space": {"coverage_coef": 0.0},
    "K = 1": {"num_codes": 1},
    "random frozen codebook": {"freeze_codebook": True},
    "no cycle": {"cycle_coef": 0.0, "stages": ("joint", "policy")},
    "no projector": {"use_projector": False},
    "no text": {"texts": 0, "stages": ("joint", "policy")},
    "100 pairs": {"pairs": 100},
    "500 pairs": {"pairs": 500},
    "2 000 pairs": {"pairs": 2000},
    "all pairs": {"pairs": 2600},
    "K = 16": {"num_codes": 16},
    "K = 64": {"num_codes": 64},
    "K = 512": {"num_codes": 512},
    "read-out subtract": {"read_out": "subtract"},
    "read-out last block": {"read_out": "last_block"},
    "no balance": {"balance_coef": 0.0},
    "coverage": {"coverage_coef": 0.2},
    "cloned from inferred codes": {"cloning_target": "inferred", "stages": ("policy",)},
    "policy from last layers": {"policy_init": "last_layers"},
}
# Sampling among the 16 likeliest, far hotter than they are.
HOT = {"temperature": 2.0, "top_k": 16}
# Rates are constant elsewhere: a curve then shows what any number of rollouts gives.
DECAYING = {"lr_scheduler_type": "linear"}
# Held where it was on the small talk that the space was learned from.
ANCHORED = {"anchor_coef": 0.1}
# And on what it says of pictures that it is asked to describe.
ANCHORED_WITH_CAPTIONS = ANCHORED | {"captions": True}
# Samples of a prompt that differ as much as their law allows.
ARITHMETIC = {"action_sampling": "arithmetic"}
# Of GRPO over tokens and over codes.
VARIANTS: dict[str, dict[str, Any]] = {
    "2 updates": {"num_iterations": 2},
    "T = 0.7": {"temperature": 0.7},
    "T = 1.5": {"temperature": 1.5},
    "hot": HOT,
    "decaying rate": DECAYING,
    "arithmetic": ARITHMETIC,
    "KL 0.04": {"beta": 0.04},
    "hot, decaying rate": HOT | DECAYING,
    "4 updates, decaying rate": DECAYING | {"num_iterations": 4},
    "4 updates, decaying rate, arithmetic": DECAYING | {"num_iterations": 4} | ARITHMETIC,
    "hot, 4 updates, decaying rate": HOT | DECAYING | {"num_iterations": 4},
    "4 updates, decaying rate, KL 0.01": DECAYING | {"num_iterations": 4, "beta": 0.01},
}
BY_END = ", rate by its end"
# Of GRPO over codes alone.
LATENT_VARIANTS: dict[str, dict[str, Any]] = {
    "entropy 0.01": {"entropy_coef": 0.01},
    "entropy 0.1, arithmetic": {"entropy_coef": 0.1} | ARITHMETIC,
    "anchor 0.1": ANCHORED,
    "entropy 0.01, anchor 0.1": ANCHORED | {"entropy_coef": 0.01},
    "4 updates, decaying rate, anchor 0.1 with captions, arithmetic": DECAYING
    | ANCHORED_WITH_CAPTIONS
    | ARITHMETIC
    | {"num_iterations": 4},
    "hot, decaying rate, anchor 0.1": HOT | DECAYING | ANCHORED,
    "hot, decaying rate, anchor 0.1, arithmetic": HOT | DECAYING | ANCHORED | ARITHMETIC,
    "hot, 4 updates, decaying rate, anchor 0.1, arithmetic": HOT
    | DECAYING
    | ANCHORED
    | ARITHMETIC
    | {"num_iterations": 4},
    # What the guard of language costs where the right word hardly ever comes.
    "hot, 4 updates, decaying rate, anchor 0.1, arithmetic, guard": HOT
    | DECAYING
    | ANCHORED
    | ARITHMETIC
    | {"num_iterations": 4, "language_guard": True},
    # Words that fall out of the 16 likeliest codes come back.
    "hot, 4 updates, decaying rate, anchor 0.1, arithmetic, KL 0.01": HOT
    | DECAYING
    | ANCHORED
    | ARITHMETIC
    | {"num_iterations": 4, "beta": 0.01},
    # In about the time of a run over tokens.
    "hot, decaying rate, anchor 0.1, arithmetic, 4 times the steps": HOT
    | DECAYING
    | ANCHORED
    | ARITHMETIC
    | {"times": 4},
}


def name_over(space: str, variant: str) -> str:
    """Of a run over codes of a space that is not the first."""
    return f"latent grpo, {space}, {variant}" if variant else f"latent, {space}, before RL"


def arm_of(kind: str, variant: str, size: Size) -> str:
    """Whose rate a variant takes: that of its law and schedule, where it was sought, drawn together or not."""

    def law(name: str) -> str:
        for apart in ("4 updates, ", ", 4 times the steps", ", arithmetic", ", guard", ", KL 0.01"):
            name = name.replace(apart, "")
        return name

    return next((arm for arm in size.arms if law(arm) == law(f"{kind}, {variant}")), kind)


def matrix(size_name: str) -> list[Cell]:
    """All runs in their order: each comes after those that it needs."""
    size = SIZES[size_name]
    main, *others = size.learned
    tuned = {
        "tokens": ("tokens", {}),
        "codes": ("codes", {}),
        "ppo": ("codes", {"algorithm": "ppo"}),
        "all text parameters": ("tokens", {"train_all": True}),
    }
    for variant, options in VARIANTS.items():
        tuned |= {f"{kind}, {variant}": (kind, options) for kind in ("tokens", "codes")}
    tuned |= {f"codes, {variant}": ("codes", options) for variant, options in LATENT_VARIANTS.items()}
    tune = [
        Cell(f"tune {arm} {rate:g}", kind, 0, {"learning_rate": rate, **options}, main if kind == "codes" else "")
        for arm, (kind, options) in tuned.items()
        for rate in size.learning_rates
        if arm in size.arms
    ]
    compared, losses, variants = [], [], {seed: [] for seed in size.seeds}
    for seed in size.seeds:
        compared += [Cell("base", "base", seed), Cell("sft", "sft", seed)]
        compared.append(Cell("latent, before RL", "codes", seed, {"times": 0}, main))
        compared.append(Cell("token grpo", "tokens", seed, TOKEN_LOSSES["grpo"], arm="tokens"))
        compared.append(Cell("latent grpo", "codes", seed, TOKEN_LOSSES["grpo"], main, arm="codes"))
        if "ppo" in size.arms:
            compared.append(Cell("latent ppo", "codes", seed, {"algorithm": "ppo"}, main, arm="ppo"))
        for loss in size.losses:
            if loss != "grpo":
                losses.append(Cell(f"token {loss}", "tokens", seed, TOKEN_LOSSES[loss], arm="tokens"))
                losses.append(Cell(f"latent {loss}", "codes", seed, TOKEN_LOSSES[loss], main, arm="codes"))
        if "all text parameters" in size.arms:
            name = "token grpo, all text parameters"
            losses.append(Cell(name, "tokens", seed, {"train_all": True}, arm="all text parameters"))
        for variant, options in (VARIANTS | LATENT_VARIANTS).items():
            if variant in size.variants:
                if variant in VARIANTS:
                    arm = arm_of("tokens", variant, size)
                    variants[seed].append(Cell(f"token grpo, {variant}", "tokens", seed, options, arm=arm))
                arm, longer = arm_of("codes", variant, size), "times" in options
                variants[seed].append(Cell(f"latent grpo, {variant}", "codes", seed, options, main, arm, longer))
        if size.by_end:
            # A decaying rate is for the end.
            constant = [v for v in size.variants if "lr_scheduler_type" not in (VARIANTS | LATENT_VARIANTS)[v]]
            laws = {"": {}} | {f", {variant}": VARIANTS[variant] for variant in constant}
            for law, options in laws.items():
                for kind, arm, space in (("token", "tokens", ""), ("latent", "codes", main)):
                    cell = Cell(f"{kind} grpo{law}{BY_END}", arm, seed, options, space, arm=f"{arm}{law}", by_end=True)
                    variants[seed].append(cell)
    cells = [Cell(main, "learn", seed, SPACES[main]) for seed in size.seeds] + tune + compared + losses
    trained = (VARIANTS | LATENT_VARIANTS)[size.ablated] if size.ablated else {}
    arm = arm_of("codes", size.ablated, size)
    # One seed of every variant and ablation before the second of any.
    for seed in size.seeds:
        cells += variants[seed]
        for name in others:
            start = main if "stages" in SPACES[name] else ""
            cells.append(Cell(name, "learn", seed, SPACES[main] | SPACES[name], start))
        cells += [Cell(f"{name}, latent grpo", "codes", seed, trained, name, arm, ablation=True) for name in others]
        for space, variant in size.over:
            options = (VARIANTS | LATENT_VARIANTS)[variant] if variant else {"times": 0}
            run_arm = arm_of("codes", variant, size) if variant else ""
            cells.append(Cell(name_over(space, variant), "codes", seed, options, space, arm=run_arm))
    return cells
