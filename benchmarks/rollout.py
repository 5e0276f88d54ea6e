"""
Tokens a second of rollouts: our own loop with and without ended rows leaving, TRL's `generate`, and vLLM's engines.

    OMP_NUM_THREADS=1 python benchmarks/rollout.py --preset micro --clock cpu --json rollout_micro.json
    python benchmarks/rollout.py --preset smollm --quick                    # tiny sizes, to see that it runs

All answer the same prompts with as many tokens: of equal lengths, and of mixed ones, evenly spread. Arms alternate in
one process; figures are medians over `--repeats`, after `--warmup` with short texts. Prompts are text: a picture is
encoded once a prompt, whatever generates. Engines are measured where vLLM is installed, in this process.
"""

import argparse
import os
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# The engine runs in this process, whose time is measured.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import torch
from measuring import facts, median, seconds, spread, table, use_clock, use_device, write
from presets import EOS, PRESETS, Preset, add_options, build_backbone, processing_class, prompt_rows
from tqdm.auto import tqdm
from transformers import LogitsProcessor, PreTrainedModel

from latent_trl import LatentActionConfig, LatentActionModel
from latent_trl.data.prompts import encode_prompts

BARS = {
    ("own loop", "own loop, rows stay", "mixed"): 1.5,
    ("engine", "own loop", "equal"): 1.2,
    ("engine", "own loop", "mixed"): 1.5,
}


class EndsAt(LogitsProcessor):
    """Row i of the batch ends with its `lengths[i]`-th token, and not before."""

    def __init__(self, lengths: torch.Tensor, prompt_length: int):
        self.lengths, self.prompt_length = lengths, prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        ends = self.lengths == input_ids.shape[1] - self.prompt_length + 1
        scores[:, EOS] = torch.where(ends, 1e4, -torch.inf)
        return scores


class Rollouts:
    """
    The arms over one backbone.

    Args:
        preset (`Preset`): Of the backbone, its vision left out.
        device (`torch.device`): Of our own loop and of TRL's.
        folder (`Path`): Where the backbone is put for vLLM.
    """

    def __init__(self, preset: Preset, device: torch.device, folder: Path):
        self.preset, self.device = preset, device
        backbone = build_backbone(preset, device)
        config = LatentActionConfig(policy_decoder={"num_hidden_layers": preset.policy_layers})
        self.model = LatentActionModel.from_backbone(backbone, config).eval()
        self.model.inverse_dynamics = None
        inputs = encode_prompts(processing_class(preset), list(prompt_rows(preset, preset.prompts)))
        self.inputs = {name: value.to(device) for name, value in inputs.items()}
        self.arms: dict[str, Callable[[torch.Tensor], None]] = {
            "own loop": lambda lengths: self.own(lengths, output_cache=False),
            "own loop, rows stay": lambda lengths: self.own(lengths, output_cache=True),
            "TRL's generate": self.plain,
        }
        if find_spec("vllm") is not None:
            self.add_engines(backbone, folder)

    def add_engines(self, backbone: PreTrainedModel, folder: Path) -> None:
        from vllm import LLM

        longest = self.preset.prompt_characters + 64 + 2 * self.preset.completion_length
        options: dict[str, Any] = {"max_model_len": longest, "enforce_eager": True, "max_num_seqs": self.rows}
        # All prompts in one step: on a CPU vLLM takes no seeded request whose prompt is cut.
        options["max_num_batched_tokens"] = self.rows * longest
        options |= {"dtype": str(self.preset.dtype).removeprefix("torch."), "skip_tokenizer_init": True}
        backbone.save_pretrained(folder)
        self.llm = LLM(str(folder), **options)
        self.arms["TRL + vLLM"] = self.vllm
        if find_spec("latent_trl.vllm") is not None:
            from latent_trl.vllm.engine import LatentActionEngine

            self.engine = LatentActionEngine(self.model, **options)
            self.arms["engine"] = self.latent_engine

    @property
    def rows(self) -> int:
        return self.preset.prompts * self.preset.generations

    def own(self, lengths: torch.Tensor, output_cache: bool) -> None:
        """`lengths` are prompt by prompt; the rows of our loop are the whole batch of prompts again and again."""
        in_tiles = lengths.unflatten(0, (-1, self.preset.generations)).T.flatten()
        output = self.model.generate(
            **self.inputs,
            num_return_sequences=self.preset.generations,
            max_new_tokens=int(lengths.max()),
            action_sampling="arithmetic",
            logits_processor=[EndsAt(in_tiles.to(self.device), self.inputs["input_ids"].shape[1])],
            output_context_states=True,
            output_cache=output_cache,
            return_dict_in_generate=True,
        )
        self.check(output.sequences, lengths)

    def plain(self, lengths: torch.Tensor) -> None:
        """As TRL calls it: each prompt as often as it is answered."""
        inputs = {name: value.repeat_interleave(self.preset.generations, 0) for name, value in self.inputs.items()}
        sequences = self.model.backbone.generate(
            **inputs,
            do_sample=True,
            max_new_tokens=int(lengths.max()),
            logits_processor=[EndsAt(lengths.to(self.device), inputs["input_ids"].shape[1])],
        )
        self.check(sequences, lengths)

    def check(self, sequences: torch.Tensor, lengths: torch.Tensor) -> None:
        said = sequences[:, self.inputs["input_ids"].shape[1] :].cpu() == EOS
        assert torch.equal(said.byte().argmax(dim=1) + 1, lengths), "the texts must have the lengths asked for"

    def prompts(self) -> list[dict[str, Any]]:
        rows = zip(self.inputs["input_ids"], self.inputs["attention_mask"].bool(), strict=True)
        ids = [row[mask].tolist() for row, mask in rows]
        return [{"prompt_token_ids": one} for one in ids for _ in range(self.preset.generations)]

    def vllm(self, lengths: torch.Tensor) -> None:
        from vllm import SamplingParams

        params = [SamplingParams(max_tokens=n, ignore_eos=True, detokenize=False) for n in lengths.tolist()]
        outputs = self.llm.generate(self.prompts(), params, use_tqdm=False)
        assert [len(output.outputs[0].token_ids) for output in outputs] == lengths.tolist()

    def latent_engine(self, lengths: torch.Tensor) -> None:
        from latent_trl.vllm.engine import answer_of, sampling_params

        params, size = [], self.preset.generations
        for i, length in enumerate(lengths.tolist()):
            # Samples of a prompt are drawn together, as in our loop and in training.
            group = {"seed": i // size, "size": size, "point": (i % size + 0.5) / size}
            settings = {"action_seed": i, "action_group": group}
            params.append(sampling_params(length, settings, ignore_eos=True, detokenize=False))
        outputs = self.engine.llm.generate(self.prompts(), params, use_tqdm=False)
        found = [answer_of(output.prompt_token_ids, output.outputs[0]) for output in outputs]
        assert [len(answer.action_ids) for answer in found] == lengths.tolist()


def drawn_lengths(preset: Preset, shortest: int) -> dict[str, torch.Tensor]:
    """Lengths `[rows]`, prompt by prompt: all `completion_length`; and from `shortest` to twice that, in any order."""
    rows = preset.prompts * preset.generations
    spread_out = torch.linspace(shortest, 2 * preset.completion_length, rows).round().long()
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
    return {"equal": torch.full((rows,), preset.completion_length), "mixed": spread_out[order]}


def measure(preset: Preset, device: torch.device, repeats: int, warmup: int, shortest: int) -> dict[str, Any]:
    """Tokens a second of each arm in each repeat, by kind of lengths."""
    speeds: dict[str, dict[str, list[float]]] = {kind: defaultdict(list) for kind in ("equal", "mixed")}
    with TemporaryDirectory() as folder:
        rollouts = Rollouts(preset, device, Path(folder))
        lengths = drawn_lengths(preset, shortest)
        for repeat in tqdm(range(-warmup, repeats), desc="rollout", unit="repeat"):
            for kind, wanted in lengths.items():
                wanted = wanted if repeat >= 0 else wanted.clamp(max=shortest)
                for name, arm in rollouts.arms.items():
                    torch.manual_seed(repeat + warmup)
                    taken, _ = seconds(lambda arm=arm, wanted=wanted: arm(wanted))
                    tqdm.write(f"{kind}, {name}: {taken:.3g} s")
                    if repeat >= 0:
                        speeds[kind][name].append(float(wanted.sum()) / taken)
    return {kind: dict(found) for kind, found in speeds.items()}


def ratios(speeds: dict[str, dict[str, list[float]]]) -> list[list[Any]]:
    """Of arms that were measured: their names, lengths, the median of the ratios within a repeat, and the bar."""
    rows = []
    for (one, other, kind), bar in BARS.items():
        found = speeds[kind]
        if one in found and other in found:
            ratio = median([a / b for a, b in zip(found[one], found[other], strict=True)])
            rows.append([f"{one} over {other}", kind, ratio, bar, "yes" if ratio >= bar else "no"])
    return rows


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, preset="micro", repeats=3)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--completion-length", type=int, default=64, help="mixed lengths go up to twice that")
    parser.add_argument("--shortest", type=int, default=8, help="of the mixed lengths")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = parse(arguments)
    preset, device = PRESETS[options.preset].of_text(), use_device(options.device)
    use_clock(options.clock)
    if options.quick:
        preset = preset.scaled_down()
    sizes = {name: getattr(options, name) for name in ("prompts", "generations", "completion_length")}
    preset = replace(preset, **sizes)
    speeds = measure(preset, device, options.repeats, options.warmup, options.shortest)
    found = ratios(speeds)
    names = list(speeds["equal"])
    rows = [[name, *(median(speeds[kind][name]) for kind in ("equal", "mixed"))] for name in names]
    print(table(["tokens a second", "equal lengths", "mixed lengths"], rows))
    print("\n" + table(["ratio", "lengths", "measured", "bar", "met"], found))
    result = {
        "tokens_per_second": speeds,
        "spread": {kind: {name: spread(values) for name, values in speeds[kind].items()} for kind in speeds},
        "ratios": {f"{what}, {kind}": ratio for what, kind, ratio, _, _ in found},
        "preset": options.preset,
        "quick": options.quick,
        "clock": options.clock,
        "shortest": options.shortest,
        "sizes": {**sizes, "layers": preset.text["num_hidden_layers"], "policy_layers": preset.policy_layers},
        **facts(device),
    }
    write(options.json, result)
    return result


if __name__ == "__main__":
    main()
