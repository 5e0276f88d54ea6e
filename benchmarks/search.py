"""
Search over codes beside sampling of tokens, on the pocket VLM's questions about shapes.

    python benchmarks/search.py --json search.json          # one core, minutes
    python benchmarks/search.py --questions 12 --n 1 2      # to see that it runs

Every method decodes up to N answers to each question, and a selector picks one, which exact match scores. Of the two
selectors `oracle` is exact match itself, so its figure is an upper bound, the share of questions with a right answer
among the N; `verdict` does not see the answer: the untouched VLM is asked whether what was said is true of the picture.

Budgets are equal in answers (N) and, in a second table, in decoded tokens: those of the answers, and in the tree also
those that repeat a forced beginning. Intervals are over questions (bootstrap, 95 %); draws are made once.
"""

import argparse
import re
import time
from functools import partial
from typing import Any

import torch
from measuring import facts, table, use_device, write
from tqdm.auto import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging

from latent_trl import LatentActionModel
from latent_trl.data.prompts import encode_prompts
from latent_trl.data.shapes import ANSWERS, COLOURS, SHAPES, shape_questions
from latent_trl.evaluation.intervals import bootstrap_interval, paired_bootstrap
from latent_trl.rewards.exact_match import ExactMatchReward
from latent_trl.search import Candidate, SearchResult, best_of_n, tree_search

BACKBONE = "model_cards/pocket-vlm"
MODELS = ("model_cards/pocket-vlm-latent-actions", "model_cards/pocket-vlm-latent-actions-grpo")
MAX_NEW_TOKENS = 12
BATCH = 256
CLAIM = re.compile(r"(?:is it|is the shape|would you say it is) (.+)\?")
SAMPLED, BEAMS = "tokens, sampled", "tokens, beams"


class VerdictReward:
    """
    How true of the picture the untouched VLM finds an answer: its probability of "true." over "false." to the answer
    put as a statement. Answers that are not one short answer of the kind that was asked for score 0. Nothing of the
    data set but prompt and picture is read.
    """

    __name__ = "verdict"

    def __init__(self, backbone, processor):
        self.backbone, self.processor = backbone, processor
        tokenizer = processor.tokenizer
        self.verdicts = [tokenizer(word, add_special_tokens=False).input_ids[0] for word in ("true", "false")]
        self.known: dict[tuple[int, str], float] = {}

    def __call__(self, prompts, completions, images, **columns) -> list[float]:
        claims = [
            self.claim(prompt[-1]["content"], completion[0]["content"])
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        asked = {(id(i[0]), c[0]): i for c, i in zip(claims, images, strict=True) if c is not None}
        new = [key for key in asked if key not in self.known]
        for start in range(0, len(new), BATCH):
            keys = new[start : start + BATCH]
            rows = [
                {"prompt": [{"role": "user", "content": f"true or false: it is {text}."}], "images": asked[place, text]}
                for place, text in keys
            ]
            inputs = encode_prompts(self.processor, rows).items()
            with torch.no_grad():
                logits = self.backbone(**{k: v.to(self.backbone.device) for k, v in inputs}).logits[:, -1]
            self.known.update(zip(keys, logits[:, self.verdicts].softmax(-1)[:, 0].tolist(), strict=True))
        rewards = []
        for claim, pictures in zip(claims, images, strict=True):
            true = 0.0 if claim is None else self.known[id(pictures[0]), claim[0]]
            rewards.append(1 - true if claim is not None and claim[1] else true)
        return rewards

    @staticmethod
    def claim(question: str, answer: str) -> tuple[str, bool] | None:
        """What an answer says of the picture, and whether it denies it; `None` where it is no answer."""
        words = re.findall("[a-z]+", answer.lower())
        said = set(words) & set(ANSWERS)
        if len(said) != 1 or len(words) > 6:
            return None
        (word,) = said
        asked = CLAIM.fullmatch(question)
        if asked:
            return (asked[1], word == "no") if word in ("yes", "no") else None
        wanted = COLOURS if "color" in question else SHAPES
        return (f"a {word}" if word in SHAPES else word, False) if word in wanted else None


def answered_by_tokens(backbone, processor, rows: list[dict], count: int, **options: Any) -> list[SearchResult]:
    """`count` answers to each question from the stock model's own `generate`."""
    tokenizer, results = processor.tokenizer, []
    end = backbone.generation_config.eos_token_id
    for start in range(0, len(rows), max(1, BATCH // count)):
        batch = rows[start : start + max(1, BATCH // count)]
        inputs = {k: v.to(backbone.device) for k, v in encode_prompts(processor, batch).items()}
        sequences = backbone.generate(
            **inputs, max_new_tokens=MAX_NEW_TOKENS, num_return_sequences=count, pad_token_id=0, **options
        )
        found = []
        for ids in sequences[:, inputs["input_ids"].shape[1] :].tolist():
            ids = ids[: ids.index(end) + 1] if end in ids else ids
            found.append(Candidate(tokenizer.decode(ids, skip_special_tokens=True).strip(), ids, [], 0.0))
        results += [SearchResult(found[i : i + count]) for i in range(0, len(found), count)]
    return results


def answered_by_beams(backbone, processor, rows: list[dict], count: int) -> list[SearchResult]:
    return answered_by_tokens(backbone, processor, rows, count, do_sample=False, num_beams=count)


def found_by(search, model, processor, rows: list[dict], options: dict, count: int) -> list[SearchResult]:
    return search(model, processor, rows, ExactMatchReward(), n=count, **options)


class Comparison:
    """
    Methods, each with answers to all questions, under both selectors.

    Args:
        rows (`list[dict]`): The questions.
        selectors (`dict`): Reward functions by name.
        budgets (`list[int]`): Ns.
    """

    def __init__(self, rows: list[dict], selectors: dict[str, Any], budgets: list[int]):
        self.rows, self.selectors, self.budgets = rows, selectors, budgets
        self.found: dict[str, dict[int, list[SearchResult]]] = {}
        self.scores: dict[str, dict[str, dict[tuple[int, str], float]]] = {}
        self.seconds: dict[str, float] = {}

    def add(self, name: str, search, per_budget: bool = False) -> None:
        """Runs `search(n)` once for the largest n, whose first answers serve the smaller, or for each n."""
        start = time.perf_counter()
        budgets = self.budgets if per_budget else [max(self.budgets)]
        self.found[name] = {n: search(n) for n in budgets}
        self.seconds[name] = time.perf_counter() - start
        self.scores[name] = {selector: self._scored(name, selector) for selector in self.selectors}

    def _scored(self, name: str, selector: str) -> dict[tuple[int, str], float]:
        """Rewards of a selector, by question and text."""
        keys = {
            (i, candidate.text)
            for results in self.found[name].values()
            for i, result in enumerate(results)
            for candidate in result.candidates
        }
        ordered = sorted(keys)
        rows = [self.rows[i] for i, _ in ordered]
        rewards = self.selectors[selector](
            prompts=[row["prompt"] for row in rows],
            completions=[[{"role": "assistant", "content": text}] for _, text in ordered],
            images=[row["images"] for row in rows],
            answer=[row["answer"] for row in rows],
        )
        return dict(zip(ordered, rewards, strict=True))

    def _candidates(self, name: str, n: int) -> list[list[Candidate]]:
        runs = self.found[name]
        return [result.candidates[:n] for result in runs.get(n, runs[max(runs)])]

    def chosen(self, name: str, selector: str, candidates: list[list[Candidate]]) -> list[float]:
        """Exact match of what the selector chooses; of equals, what came first."""
        right, scores = self.scores[name]["oracle"], self.scores[name][selector]
        return [
            right[i, max(group, key=lambda candidate: scores[i, candidate.text]).text] if group else 0.0
            for i, group in enumerate(candidates)
        ]

    def at_answers(self, name: str, selector: str) -> dict[int, list[float]]:
        return {n: self.chosen(name, selector, self._candidates(name, n)) for n in self.budgets}

    def at_tokens(self, name: str, selector: str, limits: list[int]) -> dict[int, list[float]]:
        """With as many answers, of the largest run that fits, as were finished within a number of decoded tokens."""
        values = {}
        for limit in limits:
            best: list[list[Candidate]] = [[] for _ in self.rows]
            for n in sorted(self.found[name]):
                for i, group in enumerate(self._candidates(name, n)):
                    # Beams are decoded together: a run of them counts whole or not at all.
                    within = group if len(self.found[name]) > 1 else first_within(group, limit)
                    if tokens(within) <= limit and len(within) >= len(best[i]):
                        best[i] = within
            values[limit] = self.chosen(name, selector, best)
        return values

    def facts_of(self, name: str) -> dict[int, dict[str, float]]:
        """Decoded tokens and different texts, means over questions."""
        figures = {}
        for n in self.budgets:
            groups = self._candidates(name, n)
            figures[n] = {
                "decoded_tokens": sum(map(tokens, groups)) / len(groups),
                "different_texts": sum(len({c.text for c in group}) for group in groups) / len(groups),
            }
        return figures


def tokens(group: list[Candidate]) -> int:
    return sum(len(candidate.token_ids) for candidate in group)


def first_within(group: list[Candidate], limit: int) -> list[Candidate]:
    """The first candidates that fit into a number of decoded tokens."""
    kept: list[Candidate] = []
    for candidate in group:
        if tokens(kept) + len(candidate.token_ids) > limit:
            break
        kept.append(candidate)
    return kept


def summarised(values: dict[str, dict[int, list[float]]]) -> dict[str, Any]:
    """Means with intervals, and paired differences from the token-level methods at the same budget."""
    figures: dict[str, Any] = {}
    for name, by_budget in values.items():
        figures[name] = {}
        for budget, scores in by_budget.items():
            interval = bootstrap_interval(scores)
            figures[name][str(budget)] = {"estimate": interval.estimate, "low": interval.low, "high": interval.high}
            for group in (SAMPLED, BEAMS):
                # The temperature is chosen with the result in view, in favour of the baseline.
                others = [other for other in values if other.startswith(group)]
                best = max(others, key=lambda other: sum(values[other][budget]))
                gain = paired_bootstrap(scores, values[best][budget])
                figures[name][str(budget)][f"gain over {group}"] = {
                    "baseline": best,
                    "estimate": gain.estimate,
                    "low": gain.low,
                    "high": gain.high,
                }
    return figures


def show(title: str, figures: dict[str, Any], budgets: list[int]) -> None:
    def written(cell: dict[str, float], sign: str = "") -> str:
        return f"{cell['estimate']:{sign}.3f} [{cell['low']:{sign}.3f}, {cell['high']:{sign}.3f}]"

    rows = [[name, *(written(cells[str(b)]) for b in budgets)] for name, cells in figures.items()]
    print(f"\n{title}\n\n" + table(["", *map(str, budgets)], rows))
    for group in (SAMPLED, BEAMS):
        rows = [
            [name, *(written(cells[str(b)][f"gain over {group}"], "+") for b in budgets)]
            for name, cells in figures.items()
            if not name.startswith("tokens")
        ]
        best = ", the best temperature" if group == SAMPLED else ""
        print(f"\nGain over {group}{best}\n\n" + table(["", *map(str, budgets)], rows))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=300, help="a multiple of 6 (%(default)s)")
    parser.add_argument("--n", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="answers a question (%(default)s)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8, 16, 32, 64], help="decoded tokens (%(default)s)")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.7, 1.0, 1.5, 2.0], help="(%(default)s)")
    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="FOLDER", help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (%(default)s)")
    parser.add_argument("--device", help="(a GPU where there is one)")
    parser.add_argument("--json", metavar="FILE", help="where to write all figures")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = parse(argv)
    logging.set_verbosity_error()
    device = use_device(args.device)
    processor = AutoProcessor.from_pretrained(BACKBONE, padding_side="left")
    backbone = AutoModelForImageTextToText.from_pretrained(BACKBONE, dtype="float32").to(device).eval()
    rows = list(shape_questions("test", args.questions, seed=args.seed))
    comparison = Comparison(
        rows, {"oracle": ExactMatchReward(), "verdict": VerdictReward(backbone, processor)}, sorted(args.n)
    )
    arms = len(args.temperatures) * (1 + len(args.models)) + 1 + len(args.models)
    bar = tqdm(total=arms, desc="search", unit="method")

    def add(name, search, per_budget=False):
        comparison.add(name, search, per_budget)
        bar.update()

    for temperature in args.temperatures:
        torch.manual_seed(args.seed)
        options = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        add(f"{SAMPLED}, T = {temperature:g}", partial(answered_by_tokens, backbone, processor, rows, **options))
    add(BEAMS, partial(answered_by_beams, backbone, processor, rows), per_budget=True)
    # Attached last: an adapter of the model would change the backbone.
    for folder in args.models:
        model = LatentActionModel.from_pretrained(folder, dtype="float32").to(device)
        label = folder.rstrip("/").rsplit("/", 1)[-1].removeprefix("pocket-vlm-latent-actions").strip("-")
        label = f"codes after {label.upper()}" if label else "codes"
        common = {"max_new_tokens": MAX_NEW_TOKENS, "batch_size": BATCH}
        for temperature in args.temperatures:
            generator = torch.Generator(device=device).manual_seed(args.seed)
            options = {**common, "action_temperature": temperature, "action_generator": generator}
            add(f"{label}, sampled, T = {temperature:g}", partial(found_by, best_of_n, model, processor, rows, options))
        add(f"{label}, tree", partial(found_by, tree_search, model, processor, rows, common))
    bar.close()
    result = {
        "questions": len(rows),
        "seed": args.seed,
        **facts(device),
        "seconds": comparison.seconds,
        "budgets": {name: comparison.facts_of(name) for name in comparison.found},
        "at_answers": {},
        "at_tokens": {},
    }
    for selector in comparison.selectors:
        answers = {name: comparison.at_answers(name, selector) for name in comparison.found}
        within = {name: comparison.at_tokens(name, selector, args.tokens) for name in comparison.found}
        result["at_answers"][selector], result["at_tokens"][selector] = summarised(answers), summarised(within)
        show(f"{selector}: exact match, by answers decoded", result["at_answers"][selector], comparison.budgets)
        show(f"{selector}: exact match, by tokens decoded", result["at_tokens"][selector], args.tokens)
    spent = [
        [
            name,
            *(f"{figures[n]['decoded_tokens']:.1f} / {figures[n]['different_texts']:.1f}" for n in comparison.budgets),
        ]
        for name, figures in result["budgets"].items()
    ]
    print("\nDecoded tokens / different texts a question\n\n" + table(["", *map(str, comparison.budgets)], spent))
    write(args.json, result)
    return result


if __name__ == "__main__":
    main()
