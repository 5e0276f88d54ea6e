"""The stages of learning the space: what each trains, needs to have been run before, and its schedule."""

from ...checkpoint.configuration import STAGES
from ...models.latent_action_model import LatentActionModel

STAGE_COMPONENTS = {
    "inverse_dynamics": ("inverse_dynamics", "codebook", "world_model"),
    "projector": ("projector",),
    "joint": ("inverse_dynamics", "codebook", "world_model", "projector"),
    "policy": ("policy",),
}
STAGE_NEEDS = {"inverse_dynamics": (), "projector": (), "joint": ("inverse_dynamics",), "policy": ("inverse_dynamics",)}
# Kind, options and share of warm-up: the paper's.
SCHEDULES: dict[str, tuple[str, dict[str, float], float]] = {
    "inverse_dynamics": ("cosine_with_min_lr", {"min_lr_rate": 0.1}, 0.0),
    "projector": ("linear", {}, 0.1),
    "joint": ("cosine_with_min_lr", {"min_lr_rate": 0.1}, 0.1),
    "policy": ("cosine", {}, 0.0),
}


def stage_components(model: LatentActionModel, stage: str) -> tuple[str, ...]:
    """What `stage` trains of `model`: without a projector, its joint stage trains all else."""
    return tuple(name for name in STAGE_COMPONENTS[stage] if name != "projector" or model.config.use_projector)


def check_stages(model: LatentActionModel, stages: list[str]) -> None:
    """Raises `ValueError` unless `model` has, or will have by then, what each stage needs."""
    ran = {stage for stage in STAGES if 0 < STAGES.index(stage) <= STAGES.index(model.config.stage)}
    for stage in stages:
        missing = [needed for needed in STAGE_NEEDS[stage] if needed not in ran]
        if missing:
            raise ValueError(
                f"Stage {stage!r} needs stage {missing[0]!r} to have been run; the model has reached "
                f"{model.config.stage!r}. Put {missing[0]!r} before it in `stages`."
            )
        if stage == "projector" and not model.config.use_projector:
            raise ValueError(
                "Stage 'projector' trains the cross-modal projector, which this model has not (`use_projector=False`). "
                "Leave it out of `stages`."
            )
        ran.add(stage)
