"""
The few figures that a change must not worsen, beside their reference values, in some five minutes on two cores.

    python benchmarks/leaderboard.py                                # all; ends with 1 where a figure is worse
    python benchmarks/leaderboard.py --only exactness step          # some of them
    python benchmarks/leaderboard.py --update                       # a better figure is the new reference

Each check is a benchmark's own command at a small size, in a process of its own with one thread, with fixed seeds. The
reference is `leaderboard.json` beside this file: for each figure its value, which way is better, and by how much it may
be worse: what another processor or release moves it by.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = Path(__file__).with_suffix(".json")
EXACT = ("tests/trainer/test_grpo_equivalence.py", "tests/trainer/test_rloo_equivalence.py")
GAMED = "codes, guard"


@dataclass(frozen=True)
class Check:
    """
    A command and how its figures are read.

    Args:
        words (`tuple[str]`): Of the command, run by this Python; `{folder}` is where it may write.
        read (`Callable`): From its folder and what it printed to figures by name.
    """

    words: tuple[str, ...]
    read: Callable[[Path, str], dict[str, float]]


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def read_demo(folder: Path, printed: str) -> dict[str, float]:
    reward = _json(folder / "result.json")["reward"]
    return {"demo, before RL": reward["before RL"], "demo, after RL": reward["after RL"]}


def read_plans(folder: Path, printed: str) -> dict[str, float]:
    found = _json(folder / "reduced" / "pocket-0" / "figures-bandit.json")
    golds = found["runs"]["bandit"][0]["curve"]["512"]
    return {"plans, ceiling": found["ceiling"], "plans, after 512 rollouts": sum(golds) / len(golds)}


def read_gamed(folder: Path, printed: str) -> dict[str, float]:
    arms = _json(folder / "summary.json")["arms"]
    return {
        "gamed reward, codes: gold": arms[GAMED]["best_gold"],
        "gamed reward, codes: gold of samples": arms[GAMED]["last_gold_sampled"],
        "gamed reward, codes: falls": float(sum(at is not None for at in arms[GAMED]["rollouts_to_fall"])),
    }


def read_step(folder: Path, printed: str) -> dict[str, float]:
    found = _json(folder / "step.json")
    return {"step over TRL's": found["step_ratio"], "update over TRL's": found["update_ratio"]}


def read_exact(folder: Path, printed: str) -> dict[str, float]:
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|errors?)", printed)}
    failed = sum(number for word, number in counts.items() if word != "passed")
    return {"exactness: passed": float(counts.get("passed", 0)), "exactness: failed": float(failed)}


# The longest begins first.
CHECKS = {
    "demo": Check(("-m", "latent_trl", "demo", "--output-dir", "{folder}"), read_demo),
    "gamed": Check(
        ("benchmarks/overoptimisation/run.py", "--size", "reduced", "--proxies", "attributes", "--jobs", "1")
        + ("--arms", GAMED, "--output_dir", "{folder}"),
        read_gamed,
    ),
    "plans": Check(("benchmarks/plans.py", "--size", "reduced", "--output_dir", "{folder}"), read_plans),
    "step": Check(
        ("benchmarks/rl_step.py", "--preset", "mini", "--clock", "cpu", "--repeats", "3", "--no-lora")
        + ("--json", "{folder}/step.json"),
        read_step,
    ),
    "exactness": Check(("-m", "pytest", "-q", *EXACT), read_exact),
}


def measure(name: str, folder: Path) -> dict[str, float]:
    """Runs a check; raises `RuntimeError` with the end of what it printed where it leaves no figures."""
    own = folder / name
    own.mkdir(parents=True, exist_ok=True)
    words = [word.format(folder=own) for word in CHECKS[name].words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    try:
        return CHECKS[name].read(own, done.stdout)
    except (OSError, KeyError) as error:
        raise RuntimeError(
            f"`{' '.join(words)}` left no figures:\n{done.stdout[-1000:]}{done.stderr[-2000:]}"
        ) from error


def verdict(value: float, known: dict[str, Any] | None) -> str:
    """`worse`, `better` or `same`: beyond the tolerance on one side or the other, or within it; `new` without one."""
    if known is None:
        return "new"
    gain = value - known["value"] if known["better"] == "higher" else known["value"] - value
    # Decimal fractions are not exact.
    if gain < -known["tolerance"] - 1e-9:
        return "worse"
    return "better" if gain > known["tolerance"] + 1e-9 else "same"


def compare(figures: dict[str, float], reference: dict[str, dict[str, Any]]) -> dict[str, str]:
    """The verdict on each figure."""
    return {name: verdict(value, reference.get(name)) for name, value in figures.items()}


def updated(figures: dict[str, float], reference: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The reference with the figures that are better in it. One that has none yet must be written by hand, since no
    figure says which way is better and what may move it."""
    verdicts = compare(figures, reference)
    return {
        name: {**known, "value": figures[name]} if verdicts.get(name) == "better" else known
        for name, known in reference.items()
    }


def show(figures: dict[str, float], reference: dict[str, dict[str, Any]]) -> str:
    lines = ["| figure | measured | reference | tolerance | |", "|---|---|---|---|---|"]
    for name, word in compare(figures, reference).items():
        known = reference.get(name)
        beside = ["", ""] if known is None else [f"{known['value']:.3g}", f"{known['tolerance']:.2g}"]
        lines.append(f"| {name} | {figures[name]:.3g} | {' | '.join(beside)} | {word} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(CHECKS), default=list(CHECKS))
    parser.add_argument("--jobs", type=int, default=2, help="checks at once, one core each")
    parser.add_argument("--json", type=Path, help="write figures and verdicts here")
    parser.add_argument("--update", action="store_true", help="write better figures into the reference")
    options = parser.parse_args(arguments)
    # A fresh folder: a benchmark does not do again what is there, and that is of the code before the change.
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        found = list(pool.map(lambda name: measure(name, Path(folder)), options.only))
    figures = {name: value for one in found for name, value in one.items()}
    reference = _json(REFERENCE)
    verdicts = compare(figures, reference)
    if options.json:
        written = {"figures": figures, "verdicts": verdicts}
        options.json.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    print(show(figures, reference))
    if options.update:
        REFERENCE.write_text(json.dumps(updated(figures, reference), indent=1) + "\n", encoding="utf-8")
    return int("worse" in verdicts.values())


if __name__ == "__main__":
    sys.exit(main())
