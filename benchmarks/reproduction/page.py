"""Tables and plots of the reproduction, from the files that its runs left."""

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from matrix import (
    BY_END,
    LATENT_VARIANTS,
    SIZES,
    SWEPT,
    TOKEN_LOSSES,
    VARIANTS,
    Size,
    matrix,
    name_over,
)

from latent_trl.evaluation.intervals import paired_bootstrap

BEGIN, END = "<!-- tables -->", "<!-- end of tables -->"
TOKEN_COLOUR, CODE_COLOUR = "#b5651d", "#1f5fa8"
# Rollouts at which the curves are read, and the share of fluent samples at which diversity is compared.
ROLLOUTS = (256, 512, 1024, 2048, 3840)
FLUENCY = 0.9
SHOWN = {"space": "defaults"}
# Questions of which the arms, and the spaces, are compared: their name on the page and in a run's file.
ASKED = (("held out", "held_out"), ("other style", "other_style"))


class Runs:
    """Results by name and seed."""

    def __init__(self, folder: Path):
        self.by_name: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
        for path in sorted((folder / "runs").glob("*.json")):
            run = json.loads(path.read_text(encoding="utf-8"))
            self.by_name[run["name"]][run["seed"]] = run

    def __contains__(self, name: str) -> bool:
        return name in self.by_name

    def swept(self, name: str) -> bool:
        """Whether every seed's samples were measured by several laws."""
        return name in self and all("sweep" in run for run in self.each(name))

    def described(self, name: str) -> bool:
        """Whether every seed's descriptions were looked at alone, which earlier runs did not do."""
        return all("fluent_described" in run["sampled"] for run in self.each(name))

    def each(self, name: str) -> list[dict[str, Any]]:
        return [run for _, run in sorted(self.by_name[name].items())]

    def values(self, name: str, *keys: str) -> list[float]:
        """A figure of every seed; the mean of what is a list."""
        found = []
        for value in self.each(name):
            for key in keys:
                value = value[key]
            found.append(float(np.mean(value)))
        return found

    def difference(self, first: str, second: str, figure: str) -> list[str]:
        """Over the same questions, each with the mean over the seeds that both have, and its interval; then each
        seed's."""
        seeds = sorted(set(self.by_name[first]) & set(self.by_name[second]))
        if not seeds:
            return ["–", "–"]
        sides = [np.array([self.by_name[name][seed][figure] for seed in seeds]) for name in (first, second)]
        found = paired_bootstrap(*(side.mean(axis=0) for side in sides))
        each = (sides[0] - sides[1]).mean(axis=1)
        return [
            f"{found.estimate:+.3f} [{found.low:+.3f}, {found.high:+.3f}]",
            " ".join(f"{value:+.3f}" for value in each),
        ]


def figure(values: list[float], digits: int = 3) -> str:
    """Mean and range over the seeds."""
    if not values:
        return "–"
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def markdown(header: list[str], rows: Iterable[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def main_rows(runs: Runs) -> list[str]:
    over = {name_over(*pair): bool(pair[1]) for size in SIZES.values() for pair in size.over}
    order = ["base", "sft", "latent, before RL", *(name for name, trained in over.items() if not trained)]
    for kind, variants in (("token", VARIANTS), ("latent", VARIANTS | LATENT_VARIANTS)):
        order += [f"{kind} {loss}" for loss in TOKEN_LOSSES]
        names = [f"{kind} grpo", *(f"{kind} grpo, {variant}" for variant in variants)]
        order += [*names[1:], *(f"{name}{BY_END}" for name in names)]
        if kind == "token":
            order.append("token grpo, all text parameters")
    order += [*(name for name, trained in over.items() if trained), "latent ppo"]
    return [name for name in order if name in runs]


def main_table(runs: Runs) -> str:
    rows, some_described = [], any(map(runs.described, main_rows(runs)))
    for name in main_rows(runs):
        described = figure(runs.values(name, "sampled", "fluent_described") if runs.described(name) else [], 2)
        language = "backbone" if "backbone" in runs.each(name)[0]["perplexity"] else "marginal"
        rows.append(
            [
                name,
                str(len(runs.each(name))),
                figure(runs.values(name, "held_out")),
                figure(runs.values(name, "other_style")),
                figure(runs.values(name, "blind")),
                figure(runs.values(name, "sampled", "reward")),
                figure(runs.values(name, "sampled", "diversity"), 2),
                figure(runs.values(name, "sampled", "fluent"), 2),
                *([described] if some_described else []),
                figure(runs.values(name, "perplexity", language), 0),
                figure(runs.values(name, "answer_perplexity"), 2),
            ]
        )
    header = ["run", "seeds", "held out", "other style", "other picture", "sampled", "diversity", "fluent"]
    header += ["fluent descriptions"] if some_described else []
    return markdown([*header, "perplexity, small talk", "perplexity, own answers"], rows)


def best_run(runs: Runs, kind: str) -> str | None:
    """The run over `"token"`s or over codes (`"latent"`) that answers best, of those with the most seeds: one seed's
    luck is no mark to beat."""
    names = [name for name in main_rows(runs) if name.startswith(f"{kind} ")]
    most = max((len(runs.each(name)) for name in names), default=0)
    names = [name for name in names if len(runs.each(name)) == most]
    return max(names, key=lambda name: np.mean(runs.values(name, "held_out"))) if names else None


def difference_table(runs: Runs) -> str:
    best = best_run(runs, "token")
    rows = []
    for name in main_rows(runs):
        if best and name.startswith("latent") and not name.endswith("before RL"):
            for shown, key in ASKED:
                rows.append([f"{name} − {best}", shown, *runs.difference(name, best, key)])
    return markdown(["difference", "questions", "mean and 95 % interval over questions", "each seed"], rows)


def reach(curve: list[dict[str, float]], target: float) -> tuple[str, str]:
    """Rollouts and seconds to a validation reward, `–` where it is not reached."""
    for point in curve:
        if point["reward"] >= target:
            return f"{point['rollouts']:.0f}", f"{point['seconds']:.0f}"
    return "–", "–"


def curve_table(runs: Runs) -> str:
    rows = []
    for name in main_rows(runs):
        curves = [{point["rollouts"]: point["reward"] for point in run.get("curve", [])} for run in runs.each(name)]
        if all(curves):
            rows.append([name, *(figure([c[count] for c in curves if count in c]) for count in ROLLOUTS)])
    return markdown(["run", *map(str, ROLLOUTS)], rows)


def at_fluency(points: list[dict[str, Any]], level: float) -> tuple[float, float] | None:
    """
    The most diverse sampling whose share of fluent samples is at least `level`, between measured temperatures too.

    Args:
        points (`list[dict]`): Of [`measures.sweep`], by rising temperature for each number of likeliest.
        level (`float`): Of fluency.

    Returns:
        Its diversity and its best of 8, or `None` where all laws are less fluent.
    """
    found = [(p["diversity"], p["best"]) for p in points if p["fluent"] >= level]
    for first, second in zip(points, points[1:]):
        if first["top_k"] != second["top_k"]:
            continue
        if min(first["fluent"], second["fluent"]) < level < max(first["fluent"], second["fluent"]):
            share = (first["fluent"] - level) / (first["fluent"] - second["fluent"])
            diversity, best = (first[key] + share * (second[key] - first[key]) for key in ("diversity", "best"))
            found.append((diversity, best))
    return max(found, default=None)


def fluency_table(runs: Runs) -> str:
    rows = []
    for names in SWEPT:
        if not all(runs.swept(name) for name in names):
            continue
        of_seed = [{s: at_fluency(run["sweep"], FLUENCY) for s, run in runs.by_name[name].items()} for name in names]
        for name, found in zip(names, of_seed, strict=True):
            if any(row[0] == name for row in rows):
                continue
            known = [value for value in found.values() if value]
            reached = f"{len(known)} of {len(found)}"
            rows.append([name, reached, figure([v[0] for v in known], 2), figure([v[1] for v in known])])
        both = [s for s in of_seed[0] if of_seed[0][s] and of_seed[1].get(s)]
        ratios = [of_seed[1][s][0] / of_seed[0][s][0] for s in both]
        rows.append([f"{names[1]} / {names[0]}", str(len(both)), figure(ratios, 2), ""])
    return markdown(["model", "seeds so fluent", "diversity", "best of 8"], rows)


def cost_table(runs: Runs) -> str:
    best = best_run(runs, "token")
    if best is None:
        return ""
    rows = []
    for name in main_rows(runs):
        for run in runs.each(name):
            other = runs.by_name[best].get(run["seed"])
            if "curve" not in run or other is None:
                continue
            last, target = run["curve"][-1], other["curve"][-1]["reward"]
            per_rollout = 1000 * last["seconds"] / last["rollouts"]
            rows.append(
                [name, str(run["seed"]), f"{run['learning_rate']:g}", f"{run['trained']:,}", f"{per_rollout:.1f}"]
                + [value for level in (0.9, target) for value in reach(run["curve"], level)]
            )
    header = ["run", "seed", "learning rate", "trained parameters", "ms a rollout"]
    header += ["rollouts to .90", "seconds", f"rollouts to the end of {best}", "seconds"]
    return markdown(header, rows)


def ablations(runs: Runs, size: Size) -> dict[str, str]:
    """Learned spaces and the run over each, the first that with which the others are compared."""
    main, *others = size.learned
    names = {main: f"latent grpo, {size.ablated}" if size.ablated else "latent grpo"}
    names |= {space: f"{space}, latent grpo" for space in others}
    return {space: name for space, name in names.items() if name in runs and space in runs}


def ablation_table(runs: Runs, size: Size) -> str:
    main, rows = size.learned[0], []
    for space, name in ablations(runs, size).items():
        health = [run["health"] for run in runs.each(space)]
        rows.append(
            [
                f"{SHOWN.get(space, space)}{' (as above)' if space == main else ''}",
                str(len(runs.each(name))),
                figure(runs.values(name, "held_out")),
                figure(runs.values(name, "other_style")),
                figure([run["curve"][0]["reward"] for run in runs.each(name)]),
                figure(runs.values(name, "sampled", "diversity"), 2),
                figure(runs.values(name, "perplexity", "marginal"), 0),
                " ".join(reach(run["curve"], 0.9)[0] for run in runs.each(name)),
                figure([h["codebook/used"] for h in health], 0),
                figure([h["codebook/perplexity"] for h in health], 0),
                figure([h["world_model/ce_gap_no_action"] for h in health], 2),
                figure([h["policy/reachable"] for h in health if "policy/reachable" in h], 2),
            ]
        )
    header = ["space", "seeds", "held out", "other style", "validation before RL", "diversity"]
    header += ["perplexity, small talk", "rollouts to .90", "codes used", "code perplexity", "nats gained by codes"]
    header += ["probability reached"]
    return markdown(header, rows)


def ablation_difference_table(runs: Runs, size: Size) -> str:
    main, found = size.learned[0], ablations(runs, size)
    reference = found.pop(main, None)
    if not reference or not found:
        return ""
    rows = []
    for space, name in found.items():
        row = [f"{SHOWN.get(space, space)} − {SHOWN.get(main, main)}"]
        rows.append(sum((runs.difference(name, reference, key) for _, key in ASKED), row))
    return markdown(["difference", *(name for shown, _ in ASKED for name in (shown, "each seed"))], rows)


def control_table(runs: Runs) -> str:
    rows = []
    for name in ("latent, before RL", "latent grpo", "latent ppo"):
        if name in runs:
            controls = [run["controls"] for run in runs.each(name)]
            permuted = [value for c in controls for value in c["permuted"]]
            rows.append(
                [
                    name,
                    figure(runs.values(name, "held_out")),
                    figure(permuted),
                    figure([c["shuffled"] for c in controls]),
                ]
                + [figure(runs.values(name, "blind"))]
            )
    header = ["run", "its own codes", "codes permuted", "codes shuffled over positions", "other picture"]
    return markdown(header, rows)


def sweep_table(runs: Runs) -> str:
    rows = []
    for name in dict.fromkeys(sum(SWEPT, ())):
        if not runs.swept(name):
            continue
        for points in zip(*(run["sweep"] for run in runs.each(name))):
            keys = (("fluent", 2), ("distinct", 2), ("diversity", 2), ("reward", 3), ("best", 3))
            rows.append(
                [name, points[0]["temperature"], str(points[0]["top_k"] or "all")]
                + [figure([p[key] for p in points], digits) for key, digits in keys]
            )
    header = ["model", "temperature", "of the likeliest", "fluent", "distinct of 8", "diversity", "reward", "best of 8"]
    return markdown(header, rows)


def ends(curve: list[dict[str, float]]) -> str:
    rewards = [point["reward"] for point in curve]
    return f"{rewards[-1]:.3f} ({np.mean(rewards):.3f})"


def tuning_table(runs: Runs, size: Size) -> str:
    rows = []
    for arm in size.arms:
        found = [runs.by_name.get(f"tune {arm} {rate:g}", {}) for rate in size.learning_rates]
        rows.append([arm, *(" ".join(ends(r["curve"]) for r in seeds.values()) or "–" for seeds in found)])
    return markdown(["arm", *(f"{rate:g}" for rate in size.learning_rates)], rows)


def tables(size_name: str, folder: Path) -> str:
    """All tables, as Markdown."""
    runs = Runs(folder)
    planned = matrix(size_name)
    done = sum(cell.seed in runs.by_name.get(cell.name, {}) for cell in planned)
    size = SIZES[size_name]
    parts = [
        f"Size `{size_name}`: {done} of {len(planned)} runs. {size.steps} steps of {size.prompts * size.generations} "
        f"rollouts where a run's name does not say otherwise; {size.questions} held-out questions. Mean over seeds, "
        "with the range in brackets.",
        "### Rewards, diversity, language",
        main_table(runs),
        "### Against the best token-level run",
        difference_table(runs),
        "### Validation reward after so many rollouts",
        curve_table(runs),
        "### Rollouts and seconds",
        cost_table(runs),
        "### Learning rates",
        "Validation reward at the end and, in brackets, its mean over the curve, by which the rate is chosen; seed 0.",
        tuning_table(runs, size),
        "### Controls",
        control_table(runs),
        "### Exploration",
        sweep_table(runs),
        f"### Diversity where {FLUENCY:.0%} of the samples are fluent",
        "The most diverse law at that fluency, between the measured temperatures too.",
        fluency_table(runs),
        "### Spaces",
        ablation_table(runs, size),
        ablation_difference_table(runs, size),
    ]
    return "\n\n".join(part for part in parts if part)


def plot(folder: Path, target: Path) -> None:
    """Learning curves, and exploration at matched fluency."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    runs = Runs(folder)
    drawn, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for kind, colour in (("token", TOKEN_COLOUR), ("latent", CODE_COLOUR)):
        name = best_run(runs, kind)
        for i, curve in enumerate([run["curve"] for run in runs.each(name)] if name else []):
            xs, ys = [p["rollouts"] for p in curve], [p["reward"] for p in curve]
            left.plot(xs, ys, color=colour, alpha=0.8, label=name if i == 0 else None)
    left.set(xlabel="rollouts", ylabel="validation reward", title="Learning: the best of each arm")
    left.legend(frameon=False, fontsize=8, loc="lower right")
    for name, colour, side in (("base", TOKEN_COLOUR, 1), ("latent, before RL", CODE_COLOUR, -1)):
        sweeps = [[p for p in run["sweep"] if not p["top_k"]] for run in runs.each(name)] if runs.swept(name) else []
        points = [
            (of_seeds[0]["temperature"], *(np.mean([p[key] for p in of_seeds]) for key in ("fluent", "best")))
            for of_seeds in zip(*sweeps)
        ]
        right.plot([x for _, x, _ in points], [y for _, _, y in points], "o-", color=colour, linewidth=0.8, label=name)
        # The hottest lie apart.
        for (temperature, x, y), above in zip(points[-2:], (4, -10)):
            right.annotate(
                f"T = {temperature}",
                (x, y),
                fontsize=7,
                color=colour,
                xytext=(6 * side, above),
                ha="left" if side > 0 else "right",
                textcoords="offset points",
            )
    right.set(xlabel="fluent answers", ylabel="best of 8", title="Sampling before RL")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    target.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(target, dpi=110)
    pyplot.close(drawn)


def write_page(size_name: str, folder: Path, page: Path) -> None:
    """Puts the tables between the two marks of `page`, and the plot beside it."""
    plot(folder, page.parent / "assets" / f"{page.stem}.png")
    text = page.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise ValueError(f"{str(page)!r} must hold the lines {BEGIN!r} and {END!r}.")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n\n{tables(size_name, folder)}\n\n{END}{after}", encoding="utf-8")
