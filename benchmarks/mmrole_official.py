"""
What MMRole's official test can tell: ratios of models' answers by the authors' scores, with their standard errors.

    python benchmarks/mmrole_official.py FILE.json

FILE is a list of rows with `part` (`"in"` or `"out"`), `id`, and `scores`: model to aspect to the scores of its answer
and of the reference. They are summed up as `latent_trl.evaluation.judge_protocol` sums up a judge's.
"""

import json
import sys
from pathlib import Path

import numpy as np

from latent_trl.evaluation.judge_protocol import summarize_judgements
from latent_trl.rewards.judge_template import Judgement


def judged(pairs: dict[str, list[float]]) -> Judgement | None:
    """One answer's scores, where it has some."""
    if not pairs:
        return None
    return Judgement({a: own for a, (own, _) in pairs.items()}, {a: other for a, (_, other) in pairs.items()})


def main(path: Path) -> None:
    rows = json.loads(path.read_text(encoding="utf-8"))
    print("| model | in distribution | out of distribution |\n|---|---|---|")
    for model in rows[0]["scores"]:
        cells = []
        for part in ("in", "out"):
            own = [row for row in rows if row["part"] == part]
            report = summarize_judgements([row["id"] for row in own], [[judged(row["scores"][model]) for row in own]])
            values = list(report.samples.values())
            error = np.std(values, ddof=1) / len(values) ** 0.5
            cells.append(f"{report.mean:.3f} ± {error:.3f} ({len(values)} prompts)")
        print(f"| {model} | {' | '.join(cells)} |")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python benchmarks/mmrole_official.py FILE")
    main(Path(sys.argv[1]))
