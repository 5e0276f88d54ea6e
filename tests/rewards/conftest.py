import pytest
from judge_server import JudgeServer


@pytest.fixture
def server():
    server = JudgeServer()
    yield server
    server.close()


@pytest.fixture
def make_judge(server, monkeypatch):
    """Makes a judge of the loopback server, tried already, with short waits; its trial is not in `server.requests`."""
    pytest.importorskip("openai")
    from latent_trl.rewards.judge import JudgeReward

    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)

    def make(checked=True, **options):
        settings = {
            "model": "a-judge",
            "base_url": server.url,
            "api_key": "secret-key-4711",
            "retry_delay": 0.01,
            "timeout": 5.0,
        }
        judge = JudgeReward(**{**settings, **options})
        if checked:
            judge.check()
            server.forget()
            judge.client.stats.__init__()
        return judge

    return make
