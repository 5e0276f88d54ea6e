"""Everything that can go wrong between the judge and its endpoint: nothing is lost, nothing is made up."""

import asyncio
import datetime
import email.utils
import json
import logging
import sys
import time
import traceback

import pytest
from judge_server import Reply, right, scores, shown

from latent_trl.rewards.judge import JudgeReward, JudgeUnavailableError
from latent_trl.rewards.judge_template import JudgeReplyError, JudgeTemplate

SECRET = "secret-key-4711"


def call(judge, completions, **columns):
    count = len(completions)
    prompts, references = ["What is this?"] * count, ["reference"] * count
    return asyncio.run(judge(prompts=prompts, completions=completions, reference=references, **columns))


def about(word, reply):
    """Replies with `reply` where the answer begins with `word`, and rightly everywhere else."""

    def respond(request, count):
        return reply(request) if any(text.startswith(word) for text in shown(request)) else right(request, count)

    return respond


def altered(change):
    def reply(request):
        content = scores(request)
        change(content)
        return Reply(json.dumps(content, ensure_ascii=False))

    return reply


def set_first(value):
    return lambda content: content["first"].update(fluency=value)


def rename(content):
    content["second"] = {"流畅度": 8, "连贯性": 7}


FAILURES = {
    "garbage": (lambda request: Reply("I would rather talk about the weather."), "unparsable"),
    "cut JSON": (lambda request: Reply(json.dumps(scores(request))[:-40]), "unparsable"),
    "cut by the limit": (lambda request: Reply(json.dumps(scores(request)), finish_reason="length"), "truncated"),
    "filtered": (lambda request: Reply("{}", finish_reason="content_filter"), "refused"),
    "too high": (altered(set_first(11)), "out_of_range"),
    "too low": (altered(set_first(0)), "out_of_range"),
    "words for numbers": (altered(set_first("eight")), "not_a_number"),
    "numbers in quotes": (altered(set_first("8")), "not_a_number"),
    "truth for a number": (altered(set_first(True)), "not_a_number"),
    "no number": (altered(set_first(float("nan"))), "not_a_number"),
    "nothing for a number": (altered(set_first(None)), "not_a_number"),
    "another language": (lambda request: Reply("第一个回答:八分。第二个回答:七分。"), "unparsable"),
    "keys in another language": (altered(rename), "wrong_keys"),
    "an aspect too few": (altered(lambda content: content["first"].pop("fluency")), "wrong_keys"),
    "an aspect too many": (altered(lambda content: content["first"].update(charm=5)), "wrong_keys"),
    "one reply only": (altered(lambda content: content.pop("second")), "wrong_keys"),
    "a list": (altered(lambda content: content.update(first=[8, 7])), "wrong_keys"),
    "two verdicts": (lambda request: Reply(json.dumps(scores(request)) * 2), "unparsable"),
    "no text": (lambda request: Reply(None), "empty"),
    "not a completion": (lambda request: Reply(body='{"error": "busy"}'), "malformed"),
    "not JSON": (lambda request: Reply(body="<html>It works!</html>"), "malformed"),
    "no choices": (lambda request: Reply(body='{"choices": []}'), "malformed"),
    "endless nesting": (lambda request: Reply('{"first":' * 20_000), "unparsable"),
    "forbidden": (lambda request: Reply(body="no", status=403), "http_403"),
    "always busy": (lambda request: Reply(body="busy", status=503), "http_503"),
    "always limited": (lambda request: Reply(body="slow down", status=429), "http_429"),
    "cut connection": (lambda request: Reply(json.dumps(scores(request)), cut=True), "connection"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_is_none_and_counted_and_its_neighbours_keep_their_scores(make_judge, server, caplog, name):
    reply, reason = FAILURES[name]
    server.respond = about("poor", reply)
    judge = make_judge(max_retries=1)
    extra, metrics = {}, {}
    with caplog.at_level(logging.WARNING, logger="latent_trl"):
        rewards = call(judge, ["good", "poor", "fair"], log_extra=extra.__setitem__, log_metric=metrics.__setitem__)
    assert rewards == [1.5, None, 1.0]
    assert extra == {"judge_failure": ["", reason, ""]}
    assert judge.stats.reasons == {reason: 2} and judge.stats.failed == 2
    assert judge.stats.samples == 3 and judge.stats.unscored == 1
    assert metrics["judge/failed"] == 2 and metrics["judge/unscored_fraction"] == pytest.approx(1 / 3)
    assert f"1 of 3 completions not scored: {{'{reason}': 1}}" in caplog.text


def test_one_failed_order_is_a_failed_sample(make_judge, server):
    server.respond = lambda request, count: Reply("?") if shown(request)[0] == "poor" else right(request, count)
    judge = make_judge()
    assert call(judge, ["poor", "good"]) == [None, 1.5]
    assert judge.stats.failed == 1 and judge.stats.unscored == 1


def test_failures_are_not_cached(make_judge, server, tmp_path):
    server.respond = about("poor", lambda request: Reply("?"))
    assert call(make_judge(cache_dir=tmp_path), ["poor"]) == [None]
    server.respond = right
    assert call(make_judge(cache_dir=tmp_path), ["poor"]) == [0.5]


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 529])
def test_a_passing_error_is_tried_again(make_judge, server, status):
    judge = make_judge()
    server.respond = lambda request, count: Reply(body="later", status=status) if count <= 2 else right(request, count)
    assert call(judge, ["good"]) == [1.5]
    assert (judge.stats.calls, judge.stats.retries, judge.stats.failed) == (4, 2, 0)


@pytest.mark.parametrize("status", [400, 401, 404])
def test_a_lasting_error_is_not_tried_again(make_judge, server, status):
    judge = make_judge(structured_output=False)
    server.respond = lambda request, count: Reply(body="no", status=status)
    assert call(judge, ["good"]) == [None]
    assert judge.stats.retries == 0 and judge.stats.calls == 2


def test_retry_after_is_waited_for(make_judge, server):
    judge = make_judge(concurrency=1)
    limited = Reply(body="slow down", status=429, headers={"Retry-After": "0.4"})
    server.respond = lambda request, count: limited if count == 1 else right(request, count)
    assert call(judge, ["good"]) == [1.5]
    assert server.times[1] - server.times[0] >= 0.4


def test_delays_double_up_to_the_longest_and_retry_after_goes_first(make_judge):
    client = make_judge(checked=False, retry_delay=1.0, max_retry_delay=10.0).client
    for attempt, delay in enumerate([1, 2, 4, 8]):
        assert delay * 0.75 <= client.delay(attempt, {}) <= min(delay * 1.25, 10)
    assert client.delay(10, {}) == 10
    assert client.delay(0, {"retry-after": "7"}) == 7
    assert client.delay(0, {"retry-after": "700"}) == 10
    date = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=6)
    assert 4 < client.delay(0, {"retry-after": email.utils.format_datetime(date, usegmt=True)}) <= 6
    for nonsense in ("soon", "-5", "nan", "inf"):
        assert client.delay(0, {"retry-after": nonsense}) <= 1.25


def test_back_off_does_not_move_the_seeded_generator(make_judge):
    import random

    client = make_judge(checked=False).client
    state = random.getstate()
    client.delay(0, {})
    assert random.getstate() == state


def test_a_late_answer_is_tried_again_then_given_up(make_judge, server):
    judge = make_judge(timeout=0.2, max_retries=1)
    server.respond = lambda request, count: Reply(json.dumps(scores(request)), delay=0.5 if count <= 2 else 0)
    assert call(judge, ["good"]) == [1.5]
    assert judge.stats.retries == 2
    server.respond = lambda request, count: Reply(json.dumps(scores(request)), delay=0.5)
    started = time.monotonic()
    assert call(judge, ["poor"]) == [None]
    assert judge.stats.reasons == {"timeout": 2}
    assert time.monotonic() - started < 3


def test_a_refused_schema_is_left_out_from_then_on(make_judge, server):
    def respond(request, count):
        if "response_format" in request:
            return Reply(body='{"error": {"message": "response_format is not supported"}}', status=400)
        return Reply(f"Here they are:\n```json\n{json.dumps(scores(request), indent=1)}\n```\nI hope this helps!")

    server.respond = respond
    judge = make_judge(checked=False)
    assert call(judge, ["good"]) == [1.5]
    refused = [request for request in server.requests if "response_format" in request]
    assert len(refused) == 1 and judge.stats.failed == 0
    assert len(server.requests) == 4


def test_a_bad_request_of_another_kind_does_not_turn_the_schema_off(make_judge, server):
    server.respond = about("poor", lambda request: Reply(body="too long", status=400))
    judge = make_judge()
    assert call(judge, ["poor", "good"]) == [None, 1.5]
    assert judge.client.structured


def test_a_batch_in_which_too_much_failed_stops_the_run_when_asked(make_judge, server):
    server.respond = about("poor", lambda request: Reply("?"))
    judge = make_judge(max_unscored_fraction=0.4)
    assert call(judge, ["poor", "good", "fair"])[0] is None
    with pytest.raises(JudgeUnavailableError, match="1 of 2 completions.*max_unscored_fraction=0.4.*unparsable"):
        call(judge, ["poor", "good"])


@pytest.mark.parametrize("name", ["garbage", "no text", "not JSON", "forbidden", "always busy"])
def test_it_refuses_to_start_on_an_endpoint_that_gives_no_scores(make_judge, server, name):
    reply, reason = FAILURES[name]
    server.respond = lambda request, count: reply(request)
    judge = make_judge(checked=False, max_retries=0)
    with pytest.raises(JudgeUnavailableError, match=f"{reason}.*`base_url`, `model` or `api_key`"):
        judge.check()
    with pytest.raises(JudgeUnavailableError):
        call(judge, ["good"])


def test_it_refuses_to_start_where_nobody_listens(make_judge, server):
    server.close()
    with pytest.raises(JudgeUnavailableError, match="connection"):
        call(make_judge(checked=False, max_retries=1), ["good"])


def test_a_judge_that_takes_no_images_is_found_out_at_once(make_judge, server):
    def respond(request, count):
        if isinstance(request["messages"][1]["content"], list):
            return Reply(body="this model reads text only", status=400)
        return right(request, count)

    server.respond = respond
    with pytest.raises(JudgeUnavailableError, match="reads text only.*send_images=False"):
        make_judge(checked=False).check()
    make_judge(checked=False, send_images=False).check()


def test_keys_leak_nowhere(make_judge, server, tmp_path, caplog):
    def respond(request, count):
        if any(text.startswith("poor") for text in shown(request)):
            return Reply(body=f"Incorrect API key provided: {SECRET}, header Bearer {SECRET}", status=401)
        return Reply(json.dumps(scores(request)) + f" I was called with {SECRET}")

    server.respond = respond
    extra = {}
    with caplog.at_level(logging.DEBUG):
        judge = make_judge(cache_dir=tmp_path)
        assert call(judge, ["good", "poor"], log_extra=extra.__setitem__) == [1.5, None]
        server.respond = lambda request, count: Reply(body=f"Incorrect API key provided: {SECRET}", status=401)
        with pytest.raises(JudgeUnavailableError) as caught:
            make_judge(checked=False).check()
    assert server.headers[0]["authorization"] == f"Bearer {SECRET}"
    seen = [caplog.text, repr(judge), repr(judge.client), repr(extra), repr(judge.stats)]
    seen += ["".join(traceback.format_exception(caught.value))]
    seen += [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert "[key]" in str(caught.value)
    assert not [text for text in seen if SECRET in text]
    with pytest.raises(ValueError, match="without a user name or key") as caught:
        make_judge(checked=False, base_url=f"http://me:{SECRET}@localhost/v1")
    assert SECRET not in str(caught.value)


def test_without_the_openai_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ImportError, match=r"pip install openai"):
        JudgeReward("a-judge")


def test_plain_text_around_the_scores_and_reasoning_before_them_do_not_matter():
    template = JudgeTemplate(name="t", aspects={"wit": "?"}, system="", user="")
    verdict = '{"first": {"wit": 7.5}, "second": {"wit": 3}}'
    for reply in (
        verdict,
        f"```json\n{verdict}\n```",
        f"By {{my}} rules: {verdict}.",
        f"<think>{verdict}</think>{verdict}",
    ):
        assert template.parse(reply) == ({"wit": 7.5}, {"wit": 3.0})
    twice = '{"first": {"wit": 7, "wit": 9}, "second": {"wit": 3}}'
    for reply in (f"<think>{verdict}", "", "{", "[7, 3]", twice, f'{{"scores": {verdict}}}', f"{{{'9' * 5000}"):
        with pytest.raises(JudgeReplyError):
            template.parse(reply)
