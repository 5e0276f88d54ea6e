"""The demo, whole: three seeds, and the one-code control. Slow: `pytest tests/test_demo.py -m slow`."""

import json

import pytest

from latent_trl.commands.demo import BACKBONE, Demo, DemoSettings, find_folder
from latent_trl.commands.main import main
from latent_trl.commands.progress import progress_bars

pytestmark = pytest.mark.slow


def run(tmp_path, **settings):
    with progress_bars() as bars:
        return Demo(DemoSettings(**settings), find_folder(BACKBONE), tmp_path, bars).run()


@pytest.mark.parametrize("seed", range(3))
def test_rl_raises_the_reward_on_held_out_prompts(tmp_path, seed):
    reward = run(tmp_path, seed=seed).reward
    print(f"seed {seed}: {reward}")
    assert reward["after RL"] >= reward["before RL"] + 0.15


def test_ppo_raises_the_reward_on_held_out_prompts(tmp_path):
    reward = run(tmp_path, algorithm="ppo").reward
    print(f"ppo: {reward}")
    assert reward["after RL"] >= reward["before RL"] + 0.15


def test_one_code_cannot(tmp_path):
    reward = run(tmp_path, num_codes=1, rl_steps=20).reward
    print(f"one code: {reward}")
    assert reward["after RL"] <= reward["before RL"] + 0.03


def test_command_from_a_learned_model(tmp_path, capsys):
    words = ["demo", "--from-pretrained", "--rl-steps", "3", "--test-prompts", "60", "--output-dir", str(tmp_path)]
    assert main(words) == 0
    assert set(json.loads((tmp_path / "result.json").read_text())["reward"]) == {"before RL", "after RL"}
    assert "data:image/png" in (tmp_path / "report.html").read_text()
    assert "all" in capsys.readouterr().out
