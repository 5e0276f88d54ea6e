"""Broken rows: found before the first step, raised, or skipped without losing a batch, a count or a reason."""

import io
import json

import pytest
import torch
from datasets import Dataset, List
from datasets import Image as ImageFeature
from PIL import Image
from tiny_models import IMAGE, llava

from latent_trl.data.bad_rows import BadRows
from latent_trl.data.collator import LatentActionDataCollator
from latent_trl.data.mixing import MixedRows, MixedRowsCollator
from latent_trl.data.prompts import PromptEncoder
from latent_trl.data.reading import StoredRows
from latent_trl.data.rows import RowError

PROCESSOR = llava().processor
USER = [{"role": "user", "content": "what is it?"}]


def encoded(broken: bool = False) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((16, 16), 50).convert("RGB").save(buffer, "PNG")
    data = buffer.getvalue()
    return data[: len(data) // 2] if broken else data


def dataset(count: int, broken: set[int]) -> Dataset:
    rows = [
        {
            "prompt": USER,
            "completion": [{"role": "assistant", "content": f"number {i}"}],
            "images": [{"bytes": encoded(i in broken), "path": None}],
        }
        for i in range(count)
    ]
    return Dataset.from_list(rows).cast_column("images", List(ImageFeature()))


def learning(rows, on_bad_row="skip", folder=None):
    mixed = MixedRows(rows)
    collate = LatentActionDataCollator(PROCESSOR, vision_token_ids=[IMAGE])
    return mixed, MixedRowsCollator(collate, BadRows(on_bad_row, folder, mixed.sources))


def answers(batch) -> list[str]:
    ids, mask = batch["input_ids"], batch["loss_mask"]
    return [PROCESSOR.tokenizer.decode(row[own], skip_special_tokens=True) for row, own in zip(ids, mask, strict=True)]


def test_one_row_in_a_hundred_costs_no_batch_and_is_listed_once(tmp_path):
    broken = {7, 106, 107, 199}
    mixed, collate = learning(dataset(200, broken), folder=tmp_path)
    for _ in range(2):
        for start in range(0, 200, 8):
            wanted = list(range(start, start + 8))
            batch = collate([mixed[i] for i in wanted])
            instead = {7: 8, 106: 108, 107: 108, 199: 0}
            assert answers(batch) == [f"number {instead.get(i, i)}" for i in wanted]
            assert len(batch["vision"]["pixel_values"]) == 8
    lines = [json.loads(line) for line in (tmp_path / "bad_rows.jsonl").read_text().splitlines()]
    assert {line["row"] for line in lines} == broken and len(lines) == 4 == collate.bad_rows.count()
    assert all(line["data"] == "train_dataset" and "cannot be read as an image" in line["reason"] for line in lines)


def test_the_first_bad_row_raises_by_default():
    mixed, collate = learning(dataset(4, {2}), "raise")
    assert collate([mixed[0], mixed[1]])["input_ids"].shape[0] == 2
    with pytest.raises(RowError, match="^Row 2: `images`"):
        collate([mixed[1], mixed[2]])
    assert collate.bad_rows.count() == 0


def test_text_only_rows_are_replaced_by_text_only_rows(tmp_path):
    text = [{"messages": [*USER, {"role": "assistant", "content": words}]} for words in ("", "b", "c")]
    mixed = MixedRows(dataset(3, set()), text)
    bad = BadRows("skip", tmp_path, mixed.sources)
    collate = MixedRowsCollator(LatentActionDataCollator(PROCESSOR, vision_token_ids=[IMAGE]), bad)
    assert answers(collate([mixed[0], mixed[2]])) == ["number 0", "number 2", "b", "c"]
    assert bad.listed()[0] | {"reason": ""} == {"data": "text_dataset", "row": 0, "reason": ""}
    assert "Row 0 of the text-only data: the assistant's message 1 is empty" in bad.listed()[0]["reason"]


def test_prompts_of_rl_are_replaced_with_what_was_made_of_them(tmp_path):
    rows = StoredRows(dataset(6, {1, 2}))
    bad, encoder = BadRows("skip", tmp_path, [rows]), PromptEncoder(PROCESSOR)
    calls = []

    def use(row):
        calls.append(row["_index"])
        return encoder(row)

    group = [rows[0], rows[0], rows[1], rows[1]]
    group[1], group[3] = group[0], group[2]
    pairs = bad.usable(group, use)
    assert [row["_index"] for row, _ in pairs] == [0, 0, 3, 3] and calls == [0, 1, 2, 3]
    assert pairs[2][1] is pairs[3][1] and encoder.collate([e for _, e in pairs])["input_ids"].shape[0] == 4


def test_rows_of_a_stream_are_replaced_within_their_batch(tmp_path):
    bad = BadRows("skip", tmp_path)
    rows = [{"prompt": 3}, {"prompt": "a"}, {"prompt": "b"}, {"prompt": None}]
    assert [row["prompt"] for row, _ in bad.usable(rows, PromptEncoder(PROCESSOR))] == ["a", "a", "b", "b"]
    assert len(bad.listed()) == 2
    with pytest.raises(RowError, match="No row of the batch can be used"):
        bad.usable(rows[:1], PromptEncoder(PROCESSOR))


def test_the_preflight_says_what_it_found_before_the_first_step(tmp_path, caplog):
    rows, encoder = StoredRows(dataset(40, {5, 30})), PromptEncoder(PROCESSOR)
    with pytest.raises(RowError, match=r"(?s)^Row 5: .*Row 30: .*\(2 of 40 rows of `train_dataset` .*'skip'"):
        BadRows("raise", sources=[rows]).preflight(encoder, 64)
    bad = BadRows("skip", tmp_path, [rows])
    with caplog.at_level("WARNING", "latent_trl"):
        assert set(bad.preflight(encoder, 64)) == {"5", "30"}
        assert set(bad.preflight(encoder, 10, seed=1)) == set(bad.preflight(encoder, 10, seed=1))
        BadRows("raise", sources=[StoredRows(dataset(3, set()))]).preflight(encoder)
    assert bad.preflight(encoder, 0) == {}


def test_when_every_row_is_bad_it_is_the_settings(tmp_path):
    rows = StoredRows([{"prompt": USER, "image": "a.png"}] * 5)
    bad, encoder = BadRows("skip", tmp_path, [rows]), PromptEncoder(PROCESSOR)
    with pytest.raises(RowError, match="no `image_root` says.*5 of 5 rows .* a matter of the settings"):
        bad.preflight(encoder)
    with pytest.raises(RowError, match="Row 1: .*Nor can the 4 rows after it"):
        bad.usable([rows[1]], encoder)


def test_workers_list_what_they_skip(tmp_path):
    mixed, collate = learning(dataset(12, {3, 9}), folder=tmp_path)
    loader = torch.utils.data.DataLoader(mixed, batch_size=4, collate_fn=collate, num_workers=2)
    assert [len(answers(batch)) for batch in loader] == [4, 4, 4]
    assert collate.bad_rows.count() == 2


@pytest.mark.parametrize("options, message", [(("ignore",), "must be one of"), (("skip",), "needs a folder")])
def test_options_that_do_not_work(options, message):
    with pytest.raises(ValueError, match=message):
        BadRows(*options)


@pytest.mark.parametrize("stage", ["sft", "space"])
def test_a_run_with_a_broken_row_in_fifty_is_not_lost(stage, tmp_path):
    from tiny_models import latent

    from latent_trl import (
        LatentActionSFTConfig,
        LatentActionSFTTrainer,
        LatentActionSpaceConfig,
        LatentActionSpaceTrainer,
    )

    options = {"use_cpu": True, "bf16": False, "save_strategy": "no", "disable_tqdm": True}
    options |= {"num_train_epochs": 1, "per_device_train_batch_size": 10}
    if stage == "space":
        options |= {"stages": ["inverse_dynamics"], "inverse_dynamics_max_steps": -1}

    def trainer(on_bad_row):
        model, own = latent("llava")
        model.config.stage = "policy"
        make, config = {
            "sft": (LatentActionSFTTrainer, LatentActionSFTConfig),
            "space": (LatentActionSpaceTrainer, LatentActionSpaceConfig),
        }[stage]
        args = config(str(tmp_path / on_bad_row), on_bad_row=on_bad_row, **options)
        return make(model, args, dataset(50, {44}), processing_class=own.processor)

    run = trainer("skip")
    run.train()
    assert run.state.global_step == 5 and [line["row"] for line in run.data_collator.bad_rows.listed()] == [44]
    run = trainer("raise")
    with pytest.raises(RowError, match="Row 44: "):
        run.train()
