"""A chain that was interrupted goes on bit by bit; a damaged checkpoint is passed over."""

import json

import pytest
from learning_runs import (
    STAGES,
    InterruptAt,
    Interrupted,
    build_sft,
    build_space,
    changed,
    logs,
    tensors,
)

from latent_trl.trainer.run.manifest import MANIFEST_FILE, checkpoint_fault, newest_whole_checkpoint

RUN = {"save_strategy": "steps", "save_steps": 100, "logging_steps": 3, "lr_scheduler_type": "linear"}
RUN |= {f"{stage}_max_steps": 6 for stage in STAGES}
CASES = {
    "in the first stage": ("inverse_dynamics", 2, 0, {}),
    "between a checkpoint and the next": ("inverse_dynamics", 1, 1, {}),
    "in the projector's": ("projector", 2, 0, {}),
    "in the joint stage, in a second epoch": ("joint", 5, 0, {}),
    "at the end of an epoch": ("joint", 4, 0, {}),
    "in cloning, with accumulated gradients": ("policy", 1, 0, {"gradient_accumulation_steps": 2}),
    "after the last step of a stage": ("joint", 6, 0, {}),
    "after the last epoch of a stage": ("projector", 4, 0, {"projector_max_steps": -1}),
    "with workers": ("joint", 2, 0, {"dataloader_num_workers": 2}),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run for each set of options."""
    runs = {}

    def run(**options):
        key = json.dumps(options, sort_keys=True)
        if key not in runs:
            trainer = build_space(tmp_path_factory.mktemp("whole"), **{**RUN, **options})
            trainer.train()
            runs[key] = (tensors(trainer.model), logs(trainer.history))
        return runs[key]

    return run


QUICK = ("between a checkpoint and the next", "in the joint stage, in a second epoch", "after the last step of a stage")


def slow_unless(quick, values):
    return [value if value in quick else pytest.param(value, marks=pytest.mark.slow) for value in values]


@pytest.mark.parametrize("case", slow_unless(QUICK, CASES))
def test_interrupted_chain_is_the_uninterrupted_one(case, whole, tmp_path):
    stage, step, later, options = CASES[case]
    weights, history = whole(**{k: v for k, v in options.items() if k != "dataloader_num_workers"})
    cut = build_space(tmp_path, callback=InterruptAt(stage, step, later), **{**RUN, **options})
    with pytest.raises(Interrupted):
        cut.train()
    assert cut.args.output_dir == str(tmp_path)
    resumed = build_space(tmp_path, **{**RUN, **options})
    outputs = resumed.train(resume_from_checkpoint=True)
    assert len(outputs) == len(STAGES) - STAGES.index(stage)
    assert changed(weights, tensors(resumed.model)) == set()
    assert logs(resumed.history) == history


@pytest.mark.parametrize("stage", slow_unless(["joint"], STAGES[1:]))
def test_chain_stopped_between_stages(stage, whole, tmp_path):
    weights, history = whole()

    class StopBefore(InterruptAt):
        def on_train_begin(self, args, state, control, **kwargs):
            if args.output_dir.endswith(f"-{stage}"):
                raise Interrupted

    with pytest.raises(Interrupted):
        build_space(tmp_path, callback=StopBefore(None, -1), **RUN).train()
    resumed = build_space(tmp_path, **RUN)
    resumed.train(resume_from_checkpoint=True)
    assert changed(weights, tensors(resumed.model)) == set()
    assert logs(resumed.history) == history


def test_stages_in_runs_of_their_own_are_the_chain(whole, tmp_path):
    weights, _ = whole()
    model = None
    for stage in STAGES:
        trainer = build_space(tmp_path / stage, model=model, stages=[stage], **RUN)
        trainer.train()
        model = trainer.model
    assert changed(weights, tensors(model)) == set()


def test_a_finished_chain_is_loaded(whole, tmp_path):
    build_space(tmp_path, **RUN).train()
    again = build_space(tmp_path, **RUN)
    assert again.train(resume_from_checkpoint=True) == []
    assert changed(whole()[0], tensors(again.model)) == set()
    assert again.model.config.stage == "policy"


@pytest.mark.slow
def test_the_same_seed_gives_the_same_run_and_another_seed_another(whole, tmp_path):
    weights, history = whole()
    again = build_space(tmp_path / "same", **RUN)
    again.train()
    assert changed(weights, tensors(again.model)) == set() and logs(again.history) == history
    other = build_space(tmp_path / "other", seed=7, **RUN)
    other.train()
    assert changed(weights, tensors(other.model))


def test_a_new_run_does_not_mix_with_the_checkpoints_of_an_earlier_one(tmp_path):
    with pytest.raises(Interrupted):
        build_space(tmp_path, callback=InterruptAt("projector", 2), **RUN).train()
    with pytest.raises(ValueError, match="holds checkpoints of an earlier run.*resume_from_checkpoint=True"):
        build_space(tmp_path, **RUN).train()
    with pytest.raises(ValueError, match="must be a bool"):
        build_space(tmp_path, **RUN).train(resume_from_checkpoint=str(tmp_path))


DAMAGE = {
    "truncated": lambda folder: (folder / "codebook" / "model.safetensors").write_bytes(b"0" * 10),
    "changed": lambda folder: flip_last_byte(folder / "optimizer.pt"),
    "missing": lambda folder: (folder / "trainer_state.json").unlink(),
    "not finished": lambda folder: (folder / MANIFEST_FILE).unlink(),
    "no list": lambda folder: (folder / MANIFEST_FILE).write_text("{"),
}


def flip_last_byte(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", slow_unless(["changed", "not finished"], DAMAGE))
def test_a_damaged_checkpoint_is_passed_over(damage, whole, tmp_path, caplog):
    options = {**RUN, "save_steps": 2}
    with pytest.raises(Interrupted):
        build_space(tmp_path, callback=InterruptAt("joint", 5, 0), **options).train()
    folder = tmp_path / "3-joint"
    assert {p.name for p in folder.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4", "checkpoint-5"}
    DAMAGE[damage](folder / "checkpoint-5")
    assert checkpoint_fault(folder / "checkpoint-5")
    resumed = build_space(tmp_path, **options)
    resumed.train(resume_from_checkpoint=True)
    assert any("checkpoint-5 is damaged" in record.message for record in caplog.records)
    assert changed(whole()[0], tensors(resumed.model)) == set()
    assert checkpoint_fault(folder / "checkpoint-6") is None


def test_older_checkpoints_are_kept_until_the_new_one_is_whole(tmp_path, monkeypatch):
    """With `save_total_limit=1` too."""
    from latent_trl.trainer.run import whole_checkpoints

    options = {**RUN, "stages": ["inverse_dynamics"], "save_steps": 2, "save_total_limit": 1}
    calls = []

    def fail(folder):
        calls.append(folder)
        if len(calls) == 2:
            raise Interrupted
        write_manifest(folder)

    write_manifest = whole_checkpoints.write_manifest
    monkeypatch.setattr(whole_checkpoints, "write_manifest", fail)
    with pytest.raises(Interrupted):
        build_space(tmp_path, **options).train()
    monkeypatch.undo()
    folder = tmp_path / "1-inverse_dynamics"
    assert newest_whole_checkpoint(folder).endswith("checkpoint-2")
    resumed = build_space(tmp_path, **options)
    resumed.train(resume_from_checkpoint=True)
    assert [p.name for p in folder.glob("checkpoint-*")] == ["checkpoint-6"]
    assert json.loads((folder / "checkpoint-6" / "training_args.json").read_text())["save_total_limit"] == 1


@pytest.mark.parametrize("kind", [{}, {"trained_layers": ["model.language_model.layers.2", "lm_head"]}])
@pytest.mark.parametrize("step", slow_unless([4], [1, 4, 5]))
def test_interrupted_sft_is_the_uninterrupted_one(kind, step, tmp_path):
    options = {**kind, "save_strategy": "steps", "save_steps": 100, "max_steps": 6, "logging_steps": 3}
    whole = build_sft(tmp_path / "whole", **options)
    whole.train()
    with pytest.raises(Interrupted):
        build_sft(tmp_path / "cut", callback=InterruptAt(None, step), **options).train()
    resumed = build_sft(tmp_path / "cut", **options)
    resumed.train(resume_from_checkpoint=True)
    assert changed(tensors(whole.model), tensors(resumed.model)) == set()
    assert logs(resumed.state.log_history) == logs(whole.state.log_history)


def test_sft_passes_over_a_damaged_checkpoint_and_refuses_to_go_on_from_nothing(tmp_path, caplog):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    with pytest.raises(ValueError, match="holds no whole checkpoint"):
        build_sft(tmp_path, **options).train(resume_from_checkpoint=True)
    whole = build_sft(tmp_path, **options)
    whole.train()
    flip_last_byte(tmp_path / "checkpoint-6" / "adapter" / "adapter_model.safetensors")
    resumed = build_sft(tmp_path, **options)
    resumed.train(resume_from_checkpoint=True)
    assert any("checkpoint-6 is damaged" in record.message for record in caplog.records)
    assert changed(tensors(whole.model), tensors(resumed.model)) == set()


@pytest.mark.parametrize("build", [build_space, build_sft])
def test_one_process_alone_writes_the_checkpoint(build, tmp_path, monkeypatch):
    trainer = build(tmp_path / "run")
    monkeypatch.setattr(type(trainer.args), "should_save", property(lambda self: False))
    trainer.save_model(str(tmp_path / "model"))
    assert not (tmp_path / "model").exists()
    monkeypatch.undo()
    trainer.save_model(str(tmp_path / "model"))
    assert (tmp_path / "model" / "latent_action_config.json").is_file()
