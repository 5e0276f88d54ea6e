"""RL with rollouts from servers: what is learned does not depend on how many there are, nor on their ends."""

import threading

import pytest
from every_trainer import build, logs

from latent_trl.trainer.run.manifest import newest_whole_checkpoint
from latent_trl.vllm import servers as servers_module
from latent_trl.vllm.servers import RolloutServersError

pytestmark = pytest.mark.usefixtures("no_waiting")
# Rollout batches of 8 rows, each for four steps.
STEPS = 8


def trainer(kind, folder, servers, steps=STEPS, **options):
    own = {"use_vllm": True, "vllm_mode": "server", "vllm_server_hosts": [server.url for server in servers]}
    if kind == "rloo":
        own["vllm_importance_sampling_mode"] = "sequence_mask"
    return build(kind, folder, steps, **{**own, "vllm_server_timeout": 20.0, "save_strategy": "no", **options})


def weights(trained):
    return {name: parameter.detach().clone() for name, parameter in trained.model.named_parameters()}


def same(one, other):
    return all(one[name].equal(other[name]) for name in one)


def history(trained):
    return [{k: v for k, v in row.items() if not k.startswith("engine/")} for row in logs(trained)]


@pytest.mark.parametrize("kind", ["grpo", "rloo", "ppo"])
def test_rollouts_of_servers_are_scored_and_learned_from(kind, running, tmp_path):
    run = trainer(kind, tmp_path / kind, running[:2])
    before = weights(run)
    run.train()
    assert not same(before, weights(run))
    rows = [row for row in run.state.log_history if "sampling/log_prob_difference" in row]
    assert rows and max(row["sampling/log_prob_difference_max"] for row in rows) < 1e-3
    size = 4 * sum(p.numel() for p in run.model.policy.parameters())
    # At the second rollout batch the policy has changed.
    assert [row["engine/sync_servers"] for row in rows] == [2.0] * len(rows)
    assert rows[-1]["engine/sync_bytes"] == 2 * size and rows[-1]["engine/sync_seconds"] > 0
    assert sum(running[0].engine.answered) == sum(running[1].engine.answered) > 0


def test_what_is_learned_depends_neither_on_the_number_of_servers_nor_on_their_ends(running, tmp_path, monkeypatch):
    one = trainer("grpo", tmp_path / "one", running[:1], 16)
    one.train()
    three = trainer("grpo", tmp_path / "three", running, 16)
    three.train()
    assert same(weights(one), weights(three)) and history(one) == history(three)

    found = []
    monkeypatch.setattr(servers_module.logger, "warning", found.append)
    unlucky = trainer("grpo", tmp_path / "unlucky", running, 16)
    threads = []

    def die_at_the_second_batch():
        if unlucky.state.global_step == 4 and not threads:
            threads.append(threading.Thread(target=running[1].stop))
            threads[0].start()
            threads[0].join(1)

    def rise_before_the_fourth(*args, **kwargs):
        if unlucky.state.global_step == 12:
            threads[0].join(20)
            running[1].start()
        return step(*args, **kwargs)

    step, unlucky.training_step = unlucky.training_step, rise_before_the_fourth
    running[1].engine.before_step = die_at_the_second_batch
    unlucky.train()
    assert same(weights(one), weights(unlucky)) and history(one) == history(unlucky)
    assert [f"{running[1].url}" in warning for warning in found] == [True, True] and "is back" in found[1]
    assert sum(running[1].engine.answered) > 0


def test_without_servers_the_run_ends_and_goes_on_from_its_checkpoint(running, tmp_path):
    whole = trainer("grpo", tmp_path / "whole", running[:2])
    whole.train()

    broken = trainer("grpo", tmp_path / "broken", running[:2], save_strategy="steps", vllm_server_timeout=1.0)
    step = broken.training_step

    def stop_all(*args, **kwargs):
        if broken.state.global_step == 4:
            for server in running[:2]:
                server.stop()
        return step(*args, **kwargs)

    broken.training_step = stop_all
    with pytest.raises(RolloutServersError, match="No rollout server is left"):
        broken.train()
    assert newest_whole_checkpoint(tmp_path / "broken").endswith("checkpoint-4")
    for server in running[:2]:
        server.start()
    resumed = trainer("grpo", tmp_path / "broken", running[:2], save_strategy="steps")
    resumed.train(resume_from_checkpoint=True)
    assert same(weights(whole), weights(resumed)) and history(whole) == history(resumed)


def test_a_policy_whose_probabilities_are_not_finite_is_told_as_ever(running, tmp_path):
    run = trainer("grpo", tmp_path, running[:1])
    run.model.policy.head.weight.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="not finite"):
        run.train()


def test_evaluation_asks_the_servers_too(running, tmp_path):
    run = trainer("grpo", tmp_path, running[:2], per_device_eval_batch_size=4)
    metrics = run.evaluate(run.train_dataset.select(range(4)))
    assert metrics["eval_reward"] > 0 and sum(sum(server.engine.answered) for server in running) == 4
