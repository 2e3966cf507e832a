"""LLM judges: both orders, an OpenAI-compatible server that behaves and one that does not."""

import json
import math
import threading
import time

import numpy as np
import pytest

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.files import read_jsonl
from ppo_vs_dpo.compare.estimates.judgements import table_of
from ppo_vs_dpo.compare.judges.agreement import agreement, position_bias
from ppo_vs_dpo.compare.sampling.policies import Prompts
from ppo_vs_dpo.models.sampling.chat import RateLimit, Reply
from ppo_vs_dpo.preferences.judging.llm import Cache, LLMJudge, LLMJudgeConfig, preference_from_tokens
from ppo_vs_dpo.preferences.judging.template import load_template
from tests.compare.server import KEY, comparisons, judge_at, prefers_longer


# --- a server that behaves -------------------------------------------------------------------------------
def test_both_orders_and_a_fair_judge(serve):
    server = serve(prefers_longer)
    judge = judge_at(server, logprobs=False)
    found, stopped = judge.judge(comparisons(10))
    assert stopped is None
    assert len(found) == 20
    assert [one.order for one in found[:4]] == ["forward", "swapped"] * 2
    assert all(one.preference == 1.0 for one in found)
    assert len(server.requests) == 20
    assert judge.counted()["prompt_tokens"] == 20 * 50
    table, figures = table_of(found, Prompts([""] * 10, [f"id{i}" for i in range(10)]))
    assert table.preferences[:, 0].tolist() == [1.0] * 10
    assert figures["position_bias"] == {"n": 10, "bias": 0.0, "consistent": 1.0}


def test_always_a_gives_one_half_and_position_bias_one(serve):
    judge = judge_at(serve(lambda question, number: "A"), logprobs=False)
    found, _ = judge.judge(comparisons(8))
    table, figures = table_of(found, Prompts([""] * 8, [f"id{i}" for i in range(8)]))
    assert table.preferences[:, 0].tolist() == [0.5] * 8
    assert figures["position_bias"] == {"n": 8, "bias": 1.0, "consistent": 0.0}


def test_cached_by_content(serve, tmp_path):
    server = serve(prefers_longer)
    first = judge_at(server, Cache(tmp_path / "cache.jsonl")).judge(comparisons(5))
    again = judge_at(server, Cache(tmp_path / "cache.jsonl"))
    assert again.estimate(comparisons(5))["requests"] == 0
    assert again.judge(comparisons(5)) == first
    assert len(server.requests) == 10
    assert again.usage.cached == 10
    # Another question, another temperature: not the same content.
    assert again.estimate(comparisons(6))["requests"] == 2
    assert (
        judge_at(server, Cache(tmp_path / "cache.jsonl"), temperature=0.3).estimate(comparisons(5))["requests"] == 10
    )


def test_verdicts_weighted_by_log_probabilities(serve):
    def token(first, second):
        top = [{"token": "A", "logprob": math.log(first)}, {"token": " B", "logprob": math.log(second)}]
        return [{"token": "A", "logprob": math.log(first), "top_logprobs": top}]

    judge = judge_at(serve(lambda question, number: "A", logprobs=token(0.6, 0.2)))
    found, _ = judge.judge(comparisons(1))
    assert found[0].preference == pytest.approx(0.75)
    assert found[1].preference == pytest.approx(0.25)
    assert judge.usage.weighted == 2


def test_log_probabilities_of_something_else_are_not_used():
    template = load_template("hh_helpfulness")
    reply = Reply("x", [{"A": -0.1, "B": -3.0}, {"quick": -0.1, "A": -4.0}])
    assert preference_from_tokens(template, reply) == pytest.approx(1 / (1 + math.exp(-2.9)))
    assert preference_from_tokens(template, Reply("x", [{"quick": -0.1}])) is None
    assert preference_from_tokens(template, Reply("x")) is None


def test_an_endpoint_without_log_probabilities_is_asked_without(serve):
    def answer(question, number):
        return (400, "logprobs are not supported") if server.requests[-1].get("logprobs") else prefers_longer(question)

    server = serve(answer)
    judge = judge_at(server, concurrency=1)
    found, stopped = judge.judge(comparisons(3))
    assert stopped is None
    assert [one.preference for one in found] == [1.0] * 6
    assert len(server.requests) == 7


def test_a_request_that_is_refused_says_why(serve):
    found, stopped = judge_at(serve(lambda question, number: (400, "context too long"))).judge(comparisons(1))
    assert found == []
    assert "refuses a request" in stopped
    assert "context too long" in stopped


# --- a server that does not ------------------------------------------------------------------------------
def test_unparseable_replies_are_asked_again_then_left_out(serve):
    def answer(question, number):
        if "Question 0?" in question:
            return "I would rather not say."
        return prefers_longer(question)

    server = serve(answer)
    judge = judge_at(server, logprobs=False, reasks=2)
    found, stopped = judge.judge(comparisons(4))
    assert stopped is None
    assert [one.preference for one in found] == [None, None, *[1.0] * 6]
    assert found[0].attempts == 3
    assert found[0].raw == "I would rather not say."
    assert len(server.requests) == 6 + 2 * 3
    # A greedy judge would only repeat itself: later tries sample.
    assert {r["temperature"] for r in server.requests if "Question 0?" in r["messages"][-1]["content"]} == {0.0, 0.7}
    table, figures = table_of(found, Prompts([""] * 4, [f"id{i}" for i in range(4)]))
    assert np.isnan(table.preferences[0, 0])
    assert figures["excluded"] == 1
    assert figures["judged"] == 3


def test_a_reply_that_improves_on_asking_again(serve):
    judge = judge_at(serve(lambda question, number: "hm" if number == 1 else prefers_longer(question)), concurrency=1)
    found, _ = judge.judge(comparisons(1))
    assert [(one.preference, one.attempts) for one in found] == [(1.0, 2), (1.0, 1)]


def test_down_mid_way_loses_nothing(serve, tmp_path):
    down = threading.Event()

    def answer(question, number):
        return 503 if number > 7 or down.is_set() else prefers_longer(question)

    server = serve(answer)
    judge = judge_at(server, Cache(tmp_path / "cache.jsonl"), concurrency=1, retries=0)
    found, stopped = judge.judge(comparisons(10))
    assert "does not answer" in stopped
    assert len(found) == 7
    assert len(read_jsonl(tmp_path / "cache.jsonl")) == 7
    # It is asked no further: one failure, not thirteen.
    assert len(server.requests) == 8
    server.answer = lambda question, number: prefers_longer(question)
    found, stopped = judge_at(server, Cache(tmp_path / "cache.jsonl"), concurrency=1).judge(comparisons(10))
    assert stopped is None
    assert len(found) == 20
    assert len(server.requests) == 8 + 13


def test_rate_limited_then_fine(serve):
    server = serve(lambda question, number: 429 if number == 1 else prefers_longer(question))
    found, stopped = judge_at(server, concurrency=1, retries=2).judge(comparisons(1))
    assert stopped is None
    assert [one.preference for one in found] == [1.0, 1.0]


@pytest.mark.parametrize("body", [b"<html>gateway</html>", b'{"choices": []}', b'{"choices": [{"message": {}}]}'])
def test_bodies_that_are_no_answers(serve, body):
    judge = judge_at(serve(lambda question, number: body), reasks=0, retries=0)
    found, stopped = judge.judge(comparisons(1))
    assert (stopped is not None) or all(one.preference is None for one in found)


def test_a_wrong_key_or_model_is_the_users_to_mend(serve):
    for status in (401, 404):
        with pytest.raises(UserError, match="refuses m"):
            judge_at(serve(lambda question, number, status=status: status)).judge(comparisons(1))


def test_no_server_at_all():
    config = LLMJudgeConfig(model="m", base_url="http://127.0.0.1:9/v1", retries=0)
    found, stopped = LLMJudge(config).judge(comparisons(2))
    assert found == []
    assert "does not answer" in stopped


def test_time_out(serve):
    def slow(question, number):
        time.sleep(1.0)
        return "A"

    _, stopped = judge_at(serve(slow), timeout=0.2, retries=0).judge(comparisons(1))
    assert "does not answer" in stopped


# --- money, secrets, limits ------------------------------------------------------------------------------
def test_estimate_covers_what_is_counted_and_stops_before_it_costs(serve):
    server = serve(prefers_longer)
    judge = judge_at(server, price_in=10.0, price_out=30.0)
    estimate = judge.estimate(comparisons(4))
    judge.judge(comparisons(4))
    assert estimate["requests"] == judge.usage.requests == 8
    assert estimate["cost"] >= judge.counted()["cost"] > 0
    with pytest.raises(UserError, match="more than max_cost"):
        judge_at(server, price_in=10.0, price_out=30.0, max_cost=0.0001).judge(comparisons(4))
    assert len(server.requests) == 8


def test_the_key_is_sent_and_written_nowhere(serve, tmp_path):
    server = serve(prefers_longer)
    judge = judge_at(server, Cache(tmp_path / "cache.jsonl"))
    judge.judge(comparisons(2))
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"
    assert KEY not in (tmp_path / "cache.jsonl").read_text()
    assert KEY not in json.dumps(judge.identity())
    assert KEY not in repr(judge.config)


def test_a_missing_key_is_named():
    with pytest.raises(UserError, match="NOT_SET_ANYWHERE"):
        LLMJudge(LLMJudgeConfig(model="m", api_key_env="NOT_SET_ANYWHERE"))


def test_concurrency(serve):
    running, most, lock = 0, 0, threading.Lock()

    def answer(question, number):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.05)
        with lock:
            running -= 1
        return "A"

    judge_at(serve(answer), concurrency=3, logprobs=False).judge(comparisons(6))
    assert 2 <= most <= 3


def test_rate_limit_spreads_calls():
    limit = RateLimit(per_minute=1200)
    started = time.monotonic()
    for _ in range(5):
        limit.wait()
    assert 0.19 <= time.monotonic() - started < 0.6


# --- agreement -------------------------------------------------------------------------------------------
def test_kappa_and_position_bias():
    one = np.array([1.0, 1.0, 0.0, 0.0, 0.5, np.nan])
    assert agreement(one, one)["kappa"] == pytest.approx(1.0)
    rng = np.random.default_rng(0)
    random = agreement(rng.integers(0, 2, 20_000).astype(float), rng.integers(0, 2, 20_000).astype(float))
    assert random["kappa"] == pytest.approx(0.0, abs=0.03)
    # Hand-worked: 20 + 15 of 50 agree, chance agreement 0.5 (Cohen 1960's shape).
    a = np.array([1.0] * 25 + [0.0] * 25)
    b = np.array([1.0] * 20 + [0.0] * 5 + [1.0] * 10 + [0.0] * 15)
    assert agreement(a, b) == {"n": 50, "agreement": 0.7, "kappa": pytest.approx(0.4)}
    assert agreement(np.ones(5), np.ones(5))["kappa"] is None
    assert position_bias(np.full(4, 0.0), np.full(4, 1.0))["bias"] == -1.0
