"""Every trainer under every engine: the weights of one process, a checkpoint that one process reads, exact resuming."""

import shutil

import pytest
import torch
from engine_runs import greedy, train
from engines import DEEPSPEED, ENGINES, has_deepspeed, launch
from tiny_models import FAMILIES

from latent_trl import LatentActionModel

needs_deepspeed = pytest.mark.skipif(not has_deepspeed(), reason="DeepSpeed is not installed")
# What of the backbone is trained; learning trains components alone, and SFT the backbone.
RUNS = [
    ("space", "frozen"),
    ("sft", "lora"),
    ("sft", "layers"),
    *((kind, tuned) for kind in ("grpo", "rloo", "ppo") for tuned in ("frozen", "lora")),
]
QUICK = [("fsdp2", "grpo", "lora")]


def cases():
    for engine in ENGINES:
        for kind, tuned in RUNS:
            marks = [needs_deepspeed] if engine in DEEPSPEED else []
            if (engine, kind, tuned) not in QUICK:
                marks.append(pytest.mark.slow)
            yield pytest.param(engine, kind, tuned, marks=marks, id=f"{engine}-{kind}-{tuned}")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """`whole(kind, tuned)`: how the run ends in one process."""
    ended = {}

    def run(kind: str, tuned: str) -> dict:
        if (kind, tuned) not in ended:
            folder = tmp_path_factory.mktemp(f"{kind}-{tuned}")
            launch(None, train, kind, tuned, str(folder), 4, {})
            ended[kind, tuned] = torch.load(folder / "result.pt", weights_only=True)
        return ended[kind, tuned]

    return run


def difference(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    assert got.keys() == wanted.keys()
    return max((got[name] - tensor).abs().max().item() for name, tensor in wanted.items())


@pytest.mark.distributed
@pytest.mark.parametrize("engine, kind, tuned", list(cases()))
def test_an_engine_is_one_process(engine, kind, tuned, whole, tmp_path, record_property):
    """Updates of 4 rows with 0, 1 and 2 pictures: on two processes, one of which has none at times, and on one."""
    expected = whole(kind, tuned)
    launch(engine, train, kind, tuned, str(tmp_path / "two"), 2, {"save_total_limit": None})
    got = torch.load(tmp_path / "two" / "result.pt", weights_only=True)
    assert got["sharded"] == (engine in ("fsdp2", "zero3"))
    worst = difference(got["weights"], expected["weights"])
    record_property("difference", worst)
    print(f"{engine} {kind} {tuned}: {worst:.1e}")
    assert worst < 1e-5
    assert torch.equal(got["answers"], expected["answers"])

    tiny = FAMILIES["llava"]()
    loaded = LatentActionModel.from_pretrained(tmp_path / "two" / "saved", backbone=tiny.model)
    own = {name.replace(".default.", "."): tensor for name, tensor in loaded.state_dict().items()}
    whole_of_two = {name.replace(".default.", "."): tensor for name, tensor in got["weights"].items()}
    assert difference(own, whole_of_two) == 0.0
    assert torch.equal(greedy(loaded, tiny.processor), got["answers"])

    # From the last step but one, in the middle of a rollout batch.
    shutil.rmtree(tmp_path / "two" / "saved")
    if kind == "space":
        shutil.rmtree(tmp_path / "two" / "4-policy" / "checkpoint-4")
        stages = tmp_path / "two" / "stages.json"
        stages.write_text(stages.read_text().replace(',\n  "policy"', ""))
        launch(engine, train, kind, tuned, str(tmp_path / "two"), 2, {}, True)
    else:
        checkpoint = tmp_path / "two" / "checkpoint-3"
        launch(engine, train, kind, tuned, str(tmp_path / "two"), 2, {}, str(checkpoint))
    again = torch.load(tmp_path / "two" / "result.pt", weights_only=True)
    assert difference(again["weights"], got["weights"]) == 0.0
    assert again["logs"] == got["logs"]
