"""The same seed gives the same run, with one data worker and with two; another seed gives another."""

import pytest
from every_trainer import KINDS, build, logs
from learning_runs import changed, tensors


def run(kind: str, folder, **options):
    length = {"stages": ["inverse_dynamics", "joint"]} if kind == "space" else {"steps": 8}
    trainer = build(kind, folder, **length, **{"save_strategy": "no", **options})
    trainer.train()
    return tensors(trainer.model), logs(trainer)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_run(kind, tmp_path):
    weights, rows = run(kind, tmp_path / "first", dataloader_num_workers=1)
    assert len(rows) > 2
    for workers in (1, 2):
        again, same = run(kind, tmp_path / f"again-{workers}", dataloader_num_workers=workers)
        assert changed(weights, again) == set() and same == rows
    other, _ = run(kind, tmp_path / "other", seed=7)
    assert changed(weights, other)
