"""Figures, table and plot of the runs, from the files that they left."""

from pathlib import Path
from typing import Any

LAWS, MEASURES = ("greedy", "sampled"), ("gold", "proxy", "whole")


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def fall(points: list[dict[str, Any]]) -> int | None:
    """Rollouts after which the sampled gold is below its start and stays there; `None` where it does not fall."""
    golds = [mean(point["sampled"]["gold"]) for point in points]
    at = None
    for point, value in zip(points, golds):
        if value >= golds[0]:
            at = None
        elif at is None:
            at = point["rollouts"]
    return at


def fell(points: list[dict[str, Any]]) -> bool:
    """Whether the sampled gold ends below its start by more than the error: the 95 % interval over questions."""
    from latent_trl.evaluation.intervals import paired_bootstrap

    return paired_bootstrap(points[-1]["sampled"]["gold"], points[0]["sampled"]["gold"]).high < 0


def best(points: list[dict[str, Any]], validation: int) -> dict[str, Any]:
    """The point whose greedy answers are the best on the validation pictures."""
    return max(points, key=lambda point: mean(point["greedy"]["gold"][:validation]))


def of_arm(runs: list[list[dict[str, Any]]], validation: int) -> dict[str, Any]:
    """The figures of the runs of one arm, each a list of points: means over them, and each question's best gold."""
    tops = [best(points, validation)["greedy"]["gold"] for points in runs]
    return {
        "best_gold": mean([mean(top[validation:]) for top in tops]),
        "best_gold_validation": mean([mean(top[:validation]) for top in tops]),
        "first_gold_sampled": mean([mean(points[0]["sampled"]["gold"]) for points in runs]),
        "last_gold_greedy": mean([mean(points[-1]["greedy"]["gold"]) for points in runs]),
        "last_gold_sampled": mean([mean(points[-1]["sampled"]["gold"]) for points in runs]),
        "last_whole_sampled": mean([mean(points[-1]["sampled"]["whole"]) for points in runs]),
        "rollouts_to_fall": [fall(points) for points in runs],
        "fell_beyond_error": [fell(points) for points in runs],
        "rollouts": runs[0][-1]["rollouts"],
        # Runs share the questions: an interval is over these alone.
        "questions": [mean(list(golds)) for golds in zip(*(top[validation:] for top in tops), strict=True)],
    }


def summary(runs: dict[tuple, list[dict[str, Any]]], kinds: dict[str, str], validation: int) -> dict[str, Any]:
    """
    The figures of all runs, and the comparison of the best arm of each kind.

    Args:
        runs (`dict`): Points by (arm, proxy, seed).
        kinds (`dict`): `tokens` or `codes` by arm.
        validation (`int`): How many of the questions choose points and arms; the others are reported.
    """
    from latent_trl.evaluation.intervals import paired_bootstrap

    names = {name: None for name, *_ in runs}
    arms = {arm: of_arm([points for (name, *_), points in runs.items() if name == arm], validation) for arm in names}
    found: dict[str, Any] = {"chosen": {}}
    for kind in ("codes", "tokens"):
        own = [arm for arm in arms if kinds[arm] == kind]
        chosen = max(own, key=lambda arm: arms[arm]["best_gold_validation"], default=None)
        found["chosen"][kind] = chosen
        found[f"best_gold_{kind}"] = arms[chosen]["best_gold"] if own else None
        found[f"rollouts_to_fall_{kind}"] = arms[chosen]["rollouts_to_fall"] if own else None
    found |= {"difference": None, "interval": None}
    if all(found["chosen"].values()):
        codes, tokens = (arms[found["chosen"][kind]]["questions"] for kind in ("codes", "tokens"))
        interval = paired_bootstrap(codes, tokens)
        found |= {"difference": interval.estimate, "interval": [interval.low, interval.high]}
    found["arms"] = {name: {k: v for k, v in arm.items() if k != "questions"} for name, arm in arms.items()}
    found["frontier"] = {" | ".join(map(str, key)): [frontier(point) for point in runs[key]] for key in runs}
    return found


def frontier(point: dict[str, Any]) -> dict[str, float]:
    """A point of a run, with means over its questions."""
    figures = {f"{law}_{name}": mean(point[law][name]) for law in LAWS for name in MEASURES}
    return {"rollouts": point["rollouts"], "kl": point["kl"], **figures}


def show(found: dict[str, Any]) -> str:
    heads = ["arm", "best gold", "gold, end: greedy", "sampled", "sampled at the start", "whole sentences, end"]
    heads += ["falls after rollouts", "ends below the start beyond error", "of"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    keys = ("best_gold", "last_gold_greedy", "last_gold_sampled", "first_gold_sampled", "last_whole_sampled")
    for name, arm in found["arms"].items():
        falls = ", ".join("never" if at is None else f"{at:,}" for at in arm["rollouts_to_fall"])
        fallen = f"{sum(arm['fell_beyond_error'])} of {len(arm['fell_beyond_error'])}"
        figures = " | ".join(f"{arm[key]:.3f}" for key in keys)
        lines.append(f"| {name} | {figures} | {falls} | {fallen} | {arm['rollouts']:,} |")
    if found["interval"] is not None:
        low, high = found["interval"]
        best_of = {
            kind: f"{kind} ({found['chosen'][kind]}) {found[f'best_gold_{kind}']:.3f}" for kind in found["chosen"]
        }
        lines += [
            "",
            f"best gold: {best_of['codes']}, {best_of['tokens']}, difference {found['difference']:+.3f} "
            f"[{low:+.3f}, {high:+.3f}]",
        ]
    return "\n".join(lines)


def plot(found: dict[str, Any], target: Path) -> None:
    """Gold of samples against the proxy, each as a difference from the start, and against the KL from the start."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn, axes = pyplot.subplots(1, 2, figsize=(10, 3.8), layout="constrained", sharey=True)
    colours = {arm: f"C{i}" for i, arm in enumerate(found["arms"])}
    named = set()
    for key, points in found["frontier"].items():
        arm = key.split(" | ")[0]
        golds = [point["sampled_gold"] for point in points]
        across = ([p["sampled_proxy"] - points[0]["sampled_proxy"] for p in points], [p["kl"] for p in points])
        for axis, xs in zip(axes, across, strict=True):
            label = None if arm in named else arm
            axis.plot(xs, golds, "o-", color=colours[arm], linewidth=0.8, markersize=3, alpha=0.8, label=label)
        named.add(arm)
    axes[0].set(xlabel="proxy, above the start", ylabel="gold of samples")
    axes[1].set(xlabel="KL from the policy before RL, nats a code or token")
    axes[1].legend(fontsize=7)
    drawn.savefig(target, dpi=130)
    pyplot.close(drawn)
