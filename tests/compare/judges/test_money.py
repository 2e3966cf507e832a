"""Judges that cost money: what is no reply is never kept, one refused prompt is one prompt, thinking is no verdict."""

import json
import time

import pytest

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.settings import split
from ppo_vs_dpo.compare.estimates.judgements import table_of
from ppo_vs_dpo.compare.sampling.policies import Prompts
from ppo_vs_dpo.models.sampling.chat import Reply
from ppo_vs_dpo.preferences.judging.cache import Cache
from ppo_vs_dpo.preferences.judging.llm import LLMJudgeConfig
from ppo_vs_dpo.preferences.judging.template import after_thinking, load_template
from tests.compare.server import KEY, comparisons, judge_at, prefers_longer


def body(content="It is longer.\nA", finish="stop", **message):
    """A chat completion."""
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": content, **message}}
    usage = {"prompt_tokens": 50, "completion_tokens": 3}
    return json.dumps({"id": "x", "object": "chat.completion", "choices": [choice], "usage": usage}).encode()


def prompts(n):
    return Prompts([""] * n, [f"id{i}" for i in range(n)])


# --- what is no reply ------------------------------------------------------------------------------------
POISON = {
    "a proxy's page": b"<html><body>proxy login</body></html>",
    "an object": b"{}",
    "null": b"null",
    "a list": b"[1, 2]",
    "a text": b'"A"',
    "choices of another kind": b'{"choices": "abc", "usage": 5}',
    "no choice": b'{"choices": []}',
    "no message": b'{"choices": [{"index": 0}]}',
    "no text": b'{"choices": [{"message": {"content": null}}]}',
    "an error with status 200": b'{"error": {"message": "overloaded"}}',
    "bytes": bytes(range(128, 256)),
    "half an object": b'{"choices": [{"mess',
    "nothing": b"",
}


@pytest.mark.parametrize("kind", POISON)
def test_what_is_no_reply_is_asked_again_and_never_kept(serve, tmp_path, kind):
    server = serve(lambda question, number: POISON[kind])
    found, stopped = judge_at(server, Cache(tmp_path / "c.jsonl"), retries=0, concurrency=1).judge(comparisons(2))
    assert found == []
    assert "does not answer: an answer that is none" in stopped
    assert not (tmp_path / "c.jsonl").exists()
    # The gateway is mended: everything is asked.
    server.answer = prefers_longer
    judge = judge_at(server, Cache(tmp_path / "c.jsonl"))
    found, stopped = judge.judge(comparisons(2))
    assert stopped is None
    assert [one.preference for one in found] == [1.0] * 4
    assert (judge.usage.requests, judge.usage.cached) == (4, 0)


def test_a_gateway_that_mends_itself(serve):
    server = serve(lambda question, number: POISON["a proxy's page"] if number == 1 else prefers_longer(question))
    judge = judge_at(server, concurrency=1, retries=1)
    judge.backend.endpoint.pause = 0.01
    found, stopped = judge.judge(comparisons(1))
    assert stopped is None
    assert [one.preference for one in found] == [1.0, 1.0]


ODD = {
    "text in parts": (body([{"type": "text", "text": "Longer.\n"}, {"type": "text", "text": "A"}]), 1.0),
    "thinking in parts": (body([{"type": "thinking", "thinking": "B"}, {"type": "text", "text": "A"}]), 1.0),
    "null log-probabilities": (
        b'{"choices":[{"message":{"content":"A"},"logprobs":{"content":[{"token":"A","logprob":null,'
        b'"top_logprobs":null}]}}],"usage":{"prompt_tokens":"x"}}',
        1.0,
    ),
    "infinite log-probabilities": (
        b'{"choices":[{"message":{"content":"A"},"logprobs":{"content":[{"token":"A","logprob":-Infinity,'
        b'"top_logprobs":[{"token":"A","logprob":NaN}]}]}}]}',
        1.0,
    ),
    "a verdict in the thinking alone": (body(None, "stop", reasoning_content="B\nA"), None),
    "thinking beside": (body("A", "stop", reasoning_content="It must be B.\nB"), 1.0),
    "a refusal": (body(None, "stop", refusal="I will not judge this."), None),
    "cut off": (body("Reply A is better in\nA", "length"), None),
    "cut off while thinking": (body(None, "length", reasoning="Is it A"), None),
    "filtered": (body("A", "content_filter"), None),
}


@pytest.mark.parametrize("kind", ODD)
def test_replies_of_odd_shapes(serve, tmp_path, kind):
    """All of these were paid for: they are kept, and asked no second time."""
    content, preference = ODD[kind]
    server = serve(lambda question, number: content)
    judge = judge_at(server, Cache(tmp_path / "c.jsonl"), reasks=0)
    found, stopped = judge.judge(comparisons(1))
    assert stopped is None
    assert found[0].preference == preference
    assert judge_at(server, Cache(tmp_path / "c.jsonl"), reasks=0).judge(comparisons(1)) == (found, None)
    assert len(server.requests) == 2


def test_lines_that_cannot_be_read_cost_themselves_alone(serve, tmp_path):
    server, path = serve(prefers_longer), tmp_path / "c.jsonl"
    judge_at(server, Cache(path), concurrency=1).judge(comparisons(4, ours="länger und gut"))
    lines = path.read_bytes().splitlines()
    assert len(lines) == 8
    half = '{"key": "k", "text": "ä"}'.encode()
    spoiled = [*lines[:2], b"\xff\xfe", lines[2][:30], b"[]", b'{"key": 1, "text": "A"}', *lines[3:], half[:-4]]
    path.write_bytes(b"\n".join(spoiled))
    judge = judge_at(server, Cache(path), concurrency=1)
    assert judge.cache.unreadable == 5
    found, _ = judge.judge(comparisons(4, ours="länger und gut"))
    assert len(found) == 8
    assert (judge.usage.requests, judge.usage.cached) == (1, 7)


def test_a_byte_now_and_then_is_given_up_in_time(serve):
    """The time-out is for the whole reply, not for each byte of it."""

    def drip(handler):
        handler.send_response(200)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", "100000")
        handler.end_headers()
        for _ in range(100):
            handler.wfile.write(b" ")
            handler.wfile.flush()
            time.sleep(0.05)

    started = time.monotonic()
    _, stopped = judge_at(serve(lambda question, number: drip), timeout=0.3, retries=0, concurrency=1).judge(
        comparisons(1)
    )
    assert "no whole answer within 0.3 seconds" in stopped
    assert time.monotonic() - started < 2.0


# --- one prompt that is refused ----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("status", "words"),
    [
        (400, "The response was filtered due to the prompt triggering Azure OpenAI's content management policy."),
        (403, "Your request was flagged by our moderation."),
        (413, "Request too large"),
        (422, "This model's maximum context length is 4096 tokens."),
        (500, "The prompt exceeds the context window of 8192 tokens."),
        (400, "What temperature is too hot? is not allowed by our content policy"),
    ],
)
def test_one_refused_prompt_is_left_out_and_counted(serve, tmp_path, status, words):
    def answer(question, number):
        return (status, words) if "Question 0?" in question else prefers_longer(question)

    server = serve(answer)
    for attempt in range(2):
        judge = judge_at(server, Cache(tmp_path / "c.jsonl"), concurrency=1, logprobs=False)
        found, stopped = judge.judge(comparisons(5))
        assert stopped is None
        assert [one.preference for one in found] == [None, None, *[1.0] * 8]
        assert [one.why for one in found[:3]] == ["refused", "refused", ""]
        assert judge.usage.refused == 2
        assert judge.usage.cached == 8 * attempt
        assert judge.backend.dropped() == []
    table, figures = table_of(found, prompts(5))
    assert (figures["judged"], figures["excluded"], figures["refused"]) == (4, 1, 1)
    assert table.preferences[1:, 0].tolist() == [1.0] * 4
    assert words[:40] in judge.refusal


def test_an_endpoint_that_refuses_everything_is_asked_no_further(serve):
    server = serve(lambda question, number: (400, "no credit"))
    found, stopped = judge_at(server, concurrency=1, logprobs=False).judge(comparisons(100))
    assert found == []
    assert "refuses a request: " in stopped
    assert len(server.requests) <= 20


# --- models that think ---------------------------------------------------------------------------------------
def test_reasoning_models(serve):
    """They take another name for the budget, no temperature and no log-probabilities; the first refusal teaches it."""

    def answer(question, number):
        asked = server.requests[-1]
        if "max_tokens" in asked:
            return 400, "Unsupported parameter: 'max_tokens' is not supported with this model."
        if asked.get("temperature", 1) != 1:
            return 400, "Unsupported value: 'temperature' does not support 0 with this model."
        if "logprobs" in asked:
            return 400, "logprobs are not supported"
        return prefers_longer(question)

    server = serve(answer)
    judge = judge_at(server, concurrency=1, max_completion_tokens=2000, price_out=1e6 / 2000)
    assert judge.estimate(comparisons(3))["cost"] == 6.0
    found, stopped = judge.judge(comparisons(3))
    assert stopped is None
    assert [one.preference for one in found] == [1.0] * 6
    assert server.requests[-1]["max_completion_tokens"] == 2000
    assert len(server.requests) == 6 + 2
    assert judge.identity()["without"] == "logprobs, temperature"
    assert judge.identity()["max_completion_tokens"] == 2000
    # Without the setting the budget is the template's, under the name that the endpoint knows.
    judge = judge_at(server, concurrency=1)
    assert judge.judge(comparisons(1))[1] is None
    assert server.requests[-1]["max_completion_tokens"] == judge.template.max_tokens


def test_an_old_server_that_does_not_know_the_new_name(serve):
    def answer(question, number):
        if "max_completion_tokens" in server.requests[-1]:
            return 400, "Unrecognized request argument supplied: max_completion_tokens"
        return prefers_longer(question)

    server = serve(answer)
    judge = judge_at(server, concurrency=1, max_completion_tokens=500, logprobs=False)
    assert judge.judge(comparisons(2))[1] is None
    assert server.requests[-1]["max_tokens"] == 500
    assert len(server.requests) == 5


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<think>A or B? B</think>\nShort.\nA", "\nShort.\nA"),
        ("so B it is</think>A", "A"),  # the template has opened it
        ("<think>It may be\nA", ""),
        ("[THINK]B[/THINK]A", "A"),
        ("<|channel|>analysis<|message|>B<|end|><|start|>assistant<|channel|>final<|message|>A", "A"),
        ("<|channel|>analysis<|message|>B", ""),
        ("<seed:think>B</seed:think>A", "A"),
        ("<think>one</think> <think>two\nB</think>\nA", "\nA"),
        ("I think\nA", "I think\nA"),
    ],
)
def test_thinking_is_no_verdict(text, said):
    assert after_thinking(text) == said
    template = load_template("hh_helpfulness")
    assert template.read(Reply(text, finish="stop"), 160) == (1.0 if said.endswith("A") else None)
    assert template.read(Reply(text, finish="length"), 160) is None


def test_a_verdict_that_stands_first_is_whole_where_something_follows():
    template = load_template("alpaca_eval")
    assert template.read(Reply("m", finish="stop"), 4) == 1.0
    assert template.read(Reply("m because", finish="length"), 4) == 1.0
    assert template.read(Reply("m", finish="length"), 4) is None
    assert template.read(Reply("M", finish="length"), 1) == 0.0
    assert template.read(Reply("<think>m is", finish="length"), 4) is None


# --- who was asked ---------------------------------------------------------------------------------------------
def test_the_same_name_at_another_address_is_another_judge(serve, tmp_path):
    one, two = serve(prefers_longer), serve(lambda question, number: "B")
    cache = tmp_path / "c.jsonl"
    judge_at(one, Cache(cache)).judge(comparisons(2))
    other = judge_at(two, Cache(cache))
    assert [j.preference for j in other.judge(comparisons(2))[0]] == [0.0, 1.0] * 2
    assert other.usage.cached == 0
    path = judge_at(one, Cache(cache), base_url=one.url.replace("/v1", "/other/v1"))
    assert path.estimate(comparisons(2))["requests"] == 4
    # What does not change a reply asks for none: prices, names, the number of prompts, how verdicts are read.
    same = judge_at(one, Cache(cache), name="x", price_in=3.0, reasks=0, logprobs=False, concurrency=1)
    assert same.estimate(comparisons(2))["requests"] == 0
    assert judge_at(one, Cache(cache), max_completion_tokens=999).estimate(comparisons(2))["requests"] == 4


def test_addresses_are_written_down_without_secrets(serve, tmp_path):
    server = serve(prefers_longer)
    url = server.url.replace("http://", "http://user:hunter2@") + "?token=abc"
    judge = judge_at(server, base_url=url)
    assert judge.identity()["endpoint"] == server.url
    server = serve(lambda question, number: (500, "bad"))
    _, stopped = judge_at(server, base_url=server.url.replace("http://", "http://user:hunter2@"), retries=0).judge(
        comparisons(1)
    )
    assert "hunter2" not in stopped


@pytest.mark.parametrize("status", [400, 401, 403, 404, 429, 500])
def test_a_key_that_comes_back_is_masked(serve, tmp_path, status):
    server = serve(lambda question, number: (status, f"Incorrect API key provided: Bearer {KEY}"))
    judge = judge_at(server, Cache(tmp_path / "c.jsonl"), retries=0)
    try:
        _, said = judge.judge(comparisons(1))
    except UserError as error:
        said = str(error)
    assert KEY not in said
    assert "***" in said
    server = serve(lambda question, number: f"Your key is {KEY}.\nA")
    judge = judge_at(server, Cache(tmp_path / "c.jsonl"))
    found, _ = judge.judge(comparisons(1))
    assert found[0].preference == 1.0
    assert KEY not in found[0].raw + (tmp_path / "c.jsonl").read_text()


def test_settings_that_cannot_be_meant():
    wrong = (("repeats", 0), ("reasks", -1), ("max_completion_tokens", 0), ("timeout", 0.0), ("concurrency", 300))
    for setting, value in wrong:
        with pytest.raises(UserError, match=f"{setting} is {value}"):
            split({"model": "m", setting: value}, LLMJudgeConfig, where="compare.judges[0]", kind="judge")
    assert LLMJudgeConfig().repeats == 1
