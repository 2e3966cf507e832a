"""An OpenAI-compatible endpoint, as a real server on this machine that can be slow, busy, broken and silent."""

import json
import math
import os
import threading
import time
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.files import read_json, read_jsonl
from ppo_vs_dpo.models.sampling.chat import Refused
from ppo_vs_dpo.preferences.config import Endpoint
from ppo_vs_dpo.preferences.constitution.endpoints import HARD_LOGIT, EndpointError, OpenAIModel, Request
from tests.preferences.conftest import log_of, make_run, run_here, run_step, with_policy

KEY = "sk-secret-0123456789"


def reply(text, top=None, finish="stop"):
    logprobs = None
    if top is not None:
        options = [{"token": token, "logprob": value, "bytes": None} for token, value in top.items()]
        logprobs = {"content": [{**options[0], "top_logprobs": options}], "refusal": None}
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": finish, "logprobs": logprobs}
    return {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}


class Server:
    """Answers by a function of the request's number and body: (status, body), (status, body, how often it is
    sent again, a twentieth of a second apart), or seconds to sleep."""

    def __init__(self):
        self.requests, self.lock = [], threading.Lock()
        self.behave = lambda number, body: (200, reply("Fine."))
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    outer.requests.append((self.headers.get("Authorization"), body))
                    number = len(outer.requests)
                result = outer.behave(number, body)
                if isinstance(result, float):
                    time.sleep(result)
                    return
                status, content, *drops = result
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data) * (1 + sum(drops))))
                self.end_headers()
                self.wfile.write(data)
                for _ in range(sum(drops)):
                    time.sleep(0.05)
                    self.wfile.write(data)
                    self.wfile.flush()

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("TEST_KEY", KEY)
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def model_of(server, **settings):
    settings = {"retries": 3, "timeout": 0.5, "requests_at_once": 4, **settings}
    endpoint = Endpoint(kind="openai", model="m", base_url=server.url, api_key_env="TEST_KEY", **settings)
    model = OpenAIModel(endpoint, max_tokens=20, temperature=0.7, top_p=0.9)
    model.endpoint.pause = 0.01
    return model


def ask(text="Hi", seed=1):
    return Request([{"role": "user", "content": text}], seed)


def asked_at(server, retries, **sizes):
    """The section ``data`` of a constitution whose helper and critic are one endpoint."""
    url = {"base_url": server.url, "api_key_env": "TEST_KEY"}
    endpoint = {"kind": "openai", "model": "m", **url, "retries": retries}
    common = {"source": "constitution", "constitution": "testbed", "rounds": 1}
    return {**common, "helper": endpoint, "critic": endpoint, **sizes}


def test_answers_keep_their_numbers_and_the_settings_are_sent(server):
    server.behave = lambda number, body: (200, reply(f" to {body['messages'][-1]['content']} ", finish="stop"))
    answers = dict(model_of(server).answer([ask(f"q{i}", seed=i) for i in range(10)]))
    assert {number: answer.text for number, answer in answers.items()} == {i: f"to q{i}" for i in range(10)}
    authorization, body = server.requests[0]
    assert authorization == f"Bearer {KEY}"
    assert (body["max_tokens"], body["temperature"], body["top_p"]) == (20, 0.7, 0.9)
    assert {body["seed"] for _, body in server.requests} == set(range(10))


def test_an_answer_that_was_cut_off_is_not_finished(server):
    server.behave = lambda number, body: (200, reply("Half an ans", finish="length"))
    assert dict(model_of(server).answer([ask()]))[0].finished is False


@pytest.mark.parametrize(
    "trouble",
    [
        (429, {"error": {"message": "slow down"}}),
        (500, {"error": {"message": "oops"}}),
        (503, b"<html>busy</html>"),
        (200, b"this is not JSON"),
        (200, {"unexpected": True}),
        (200, reply(None)),
        1.0,
    ],
    ids=["429", "500", "503 with HTML", "not JSON", "another shape", "no text", "timeout"],
)
def test_trouble_that_passes_is_waited_out(server, trouble):
    server.behave = lambda number, body: trouble if number <= 2 else (200, reply("Fine."))
    assert dict(model_of(server).answer([ask()]))[0].text == "Fine."
    assert len(server.requests) == 3


def test_pauses_grow(server, monkeypatch):
    pauses = []
    monkeypatch.setattr("ppo_vs_dpo.models.sampling.chat.time.sleep", pauses.append)
    server.behave = lambda number, body: (429, {"error": {"message": "slow down"}})
    with pytest.raises(EndpointError):
        list(model_of(server, retries=4).answer([ask()]))
    assert len(pauses) == 4
    for number, pause in enumerate(pauses):
        assert 0.75 * 0.01 * 2**number <= pause <= 1.25 * 0.01 * 2**number


def test_a_wrong_key_is_not_tried_again_and_never_shown(server):
    server.behave = lambda number, body: (401, {"error": {"message": f"Incorrect API key provided: {KEY}"}})
    with pytest.raises(EndpointError) as error:
        list(model_of(server).answer([ask()]))
    assert len(server.requests) == 1
    assert "401" in str(error.value)
    assert KEY not in str(error.value)
    assert error.value.__cause__ is None
    assert error.value.__suppress_context__


@pytest.mark.parametrize(
    ("top", "log_odds"),
    [
        ({"A": math.log(0.8), "B": math.log(0.2)}, math.log(4)),
        ({" B": math.log(0.75), "(A": math.log(0.2), "A": math.log(0.05)}, math.log(0.25 / 0.75)),
        ({"A": math.log(0.9), "C": math.log(0.05)}, math.log(0.9 / 0.05)),
    ],
)
def test_choice_from_log_probabilities(server, top, log_odds):
    server.behave = lambda number, body: (200, reply(next(iter(top)), top))
    assert dict(model_of(server).choose([ask()]))[0] == pytest.approx(log_odds, abs=1e-5)
    assert server.requests[0][1]["logprobs"] is True


def test_a_byte_now_and_then_is_given_up_and_thinking_is_no_answer(server):
    parts = [{"type": "thinking", "thinking": "B"}, {"type": "text", "text": "Fine."}]
    server.behave = lambda number, body: (200, reply(parts))
    assert dict(model_of(server).answer([ask()]))[0].text == "Fine."
    server.behave = lambda number, body: (200, reply("<think>B or A?</think> A"))
    assert dict(model_of(server).answer([ask()]))[0].text == "A"
    assert dict(model_of(server).choose([ask()]))[0] == HARD_LOGIT
    server.behave = lambda number, body: (200, b" ", 40)  # a byte now, and another each twentieth of a second
    with pytest.raises(EndpointError, match=r"no whole answer within 0.2 seconds"):
        list(model_of(server, timeout=0.2, retries=0).answer([ask()]))


def test_choice_from_the_letter_where_there_are_no_log_probabilities(server):
    server.behave = lambda number, body: (200, reply("I prefer (B)."))
    assert dict(model_of(server).choose([ask()]))[0] == -HARD_LOGIT


def test_a_judge_that_says_neither_is_asked_again_and_then_given_up(server):
    server.behave = lambda number, body: (200, reply("Both are nice."))
    with pytest.raises(EndpointError, match=r"that is none.*neither A nor B.*4 times.*the same command goes on"):
        list(model_of(server).choose([ask()]))


REFUSING = {
    "content filter": (
        400,
        {"error": {"message": "The prompt triggered the content filter.", "code": "content_filter"}},
    ),
    "too long": (400, {"error": {"message": "maximum context length is 8 tokens"}}),
    "too long, as a fault of the server's": (500, {"error": {"message": "prompt exceeds the context window"}}),
    "forbidden by a filter": (403, {"error": {"message": "flagged by moderation"}}),
}


@pytest.mark.parametrize("trouble", REFUSING.values(), ids=REFUSING)
def test_one_refused_request_does_not_cost_the_others(server, trouble):
    server.behave = lambda number, body: trouble if "bad" in body["messages"][-1]["content"] else (200, reply("A"))
    requests = [ask(text) for text in ("bad", "good", "bad", "fine")]
    for found in (dict(model_of(server).answer(requests)), dict(model_of(server).choose(requests))):
        assert {number for number, one in found.items() if isinstance(one, Refused)} == {0, 2}
    assert len(server.requests) == 8  # what is refused is not asked again


def test_an_endpoint_that_refuses_everything_stops(server):
    server.behave = lambda number, body: REFUSING["content filter"]
    with pytest.raises(EndpointError, match=r"content filter.*answered none"):
        list(model_of(server).answer([ask(f"q{i}") for i in range(40)]))
    assert 16 <= len(server.requests) <= 24
    with pytest.raises(EndpointError, match="answered none"):
        list(model_of(server).answer([ask()]))


def test_no_key_and_no_name_are_errors(monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(UserError, match="needs an API key in the environment variable NO_SUCH_KEY"):
        OpenAIModel(Endpoint(kind="openai", model="m", api_key_env="NO_SUCH_KEY"), 1, 1.0, 1.0)
    with pytest.raises(UserError, match="needs model"):
        Endpoint(kind="openai")
    with pytest.raises(UserError, match="needs function"):
        Endpoint(kind="python")
    with pytest.raises(UserError, match="kind is 'gpt'"):
        Endpoint(kind="gpt")


def test_a_run_against_an_endpoint_that_dies_keeps_what_was_done_and_goes_on(server, tmp_path, testbed_policy):
    """All three roles at the endpoint; it fails for good after 30 answers, then is well again."""

    def well(number, body):
        last = body["messages"][-1]["content"]
        if body.get("logprobs"):
            return 200, reply("A", {"A": math.log(0.6), "B": math.log(0.4)})
        return 200, reply(f"Answer {number} to {len(last)} letters.")

    endpoint = {"kind": "openai", "model": "m", "base_url": server.url, "api_key_env": "TEST_KEY", "retries": 0}
    data = {
        "source": "constitution",
        "constitution": "testbed",
        "mode": "both",
        "rounds": 1,
        "helper": endpoint,
        "critic": endpoint,
        "judge": endpoint,
        "train_prompts": 20,
        "test_prompts": 4,
        "heldout_prompts": 4,
        "sft_examples": 30,
        "batch": 8,
    }
    run = with_policy(make_run(tmp_path / "run", data), testbed_policy)
    run_here(run, "data")
    server.behave = lambda number, body: well(number, body) if number <= 30 else (500, {"error": {"message": KEY}})
    with pytest.raises(EndpointError, match="Finished steps are kept: the same command goes on") as error:
        run_here(run, "pairs")
    said = "".join(traceback.format_exception(error.value))
    kept = read_jsonl(log_of(run, "steps_train"))
    assert len(kept) == 30
    asked = len(server.requests)
    server.behave = well
    run_here(run, "pairs")
    # 20 + 4 prompts: answer, critique, revision, two samples, two choices.
    assert len(server.requests) - asked == 24 * 7 - 30
    assert read_jsonl(log_of(run, "steps_train"))[:30] == kept
    figures = read_json(run / "pairs" / "done.json")["figures"]
    # The judge likes (A) whatever it is: all preference cancels.
    assert figures["position_bias"] == pytest.approx(math.log(1.5), abs=1e-5)
    # The key is in no file and in no message.
    assert KEY not in said
    for path in run.rglob("*"):
        if path.is_file() and "sft" not in path.parts:
            assert KEY.encode() not in path.read_bytes(), path


def test_a_run_leaves_out_what_the_endpoint_refuses_and_counts_it(server, tmp_path, testbed_policy):
    """The critic refuses every fifth prompt; the run goes on, and asks for nothing twice."""
    refused: set[str] = set()

    def behave(number, body):
        first = body["messages"][0]["content"]
        asked = len(body["messages"]) > 1 and sum(map(ord, first)) % 5 == 0
        if asked:
            refused.add(first)
        return REFUSING["content filter"] if asked else (200, reply(f"Answer {number}."))

    data = asked_at(server, retries=0, train_prompts=20, test_prompts=4, heldout_prompts=4, sft_examples=30)
    run = with_policy(make_run(tmp_path / "run", data), testbed_policy)
    run_here(run, "data")
    server.behave = behave
    run_here(run, "pairs")
    assert refused
    figures = read_json(run / "pairs" / "done.json")["figures"]
    assert figures["left_out"]["refused"] == len(refused)
    assert figures["pair_set"]["n_train"] + figures["pair_set"]["n_test"] + len(refused) == 24
    asked = len(server.requests)
    run_here(run, "pairs")
    assert len(server.requests) == asked


def test_the_key_is_in_nothing_that_a_failing_process_leaves(server, tmp_path, testbed_policy):
    """As the pipeline starts it, its output caught; the endpoint throws the key back in every form it can."""
    data = asked_at(server, retries=1, train_prompts=4, test_prompts=2, heldout_prompts=2, sft_examples=30)
    run = with_policy(make_run(tmp_path / "run", data), testbed_policy)
    run_here(run, "data")
    troubles = [
        (500, {"error": {"message": f"key {KEY}"}}),
        (200, KEY.encode()),
        (401, f"<html>{KEY}</html>".encode()),
    ]
    for trouble in troubles:
        server.behave = lambda number, body, trouble=trouble: trouble
        # The client reads that variable when it is loaded.
        done = run_step(run, "pairs", fork=False, env={**os.environ, "OPENAI_LOG": "debug"})
        assert done.returncode == 2
        assert "the same command goes on" in done.stderr
        assert "Traceback" not in done.stderr
        assert KEY not in done.stdout + done.stderr
    for path in run.rglob("*"):
        if path.is_file() and "sft" not in path.parts:
            assert KEY.encode() not in path.read_bytes(), path
