"""The Hub when it is gated, missing, busy or not there: a real server on this machine stands in for it."""

import itertools
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.preferences.reading.readers import explain_hub_error, read_hub
from tests.preferences.conftest import ROOT

READ = """
import sys, time
time.sleep = lambda seconds: None  # between the Hub client's attempts; how many there are is its own affair
from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.preferences.reading.readers import read_hub
try:
    print(sum(1 for _ in read_hub("owner/pairs", sys.argv[1])))
except UserError as error:
    print("UserError:", error)
"""


def read(endpoint, split="train", **environment):
    """Read ``owner/pairs`` in a process of its own: the Hub's address is fixed at import."""
    env = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_secret", **environment}
    done = subprocess.run(
        [sys.executable, "-c", READ, split], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "hf_secret" not in done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def hub():
    """A Hub that answers every request with one status."""

    class Handler(BaseHTTPRequestHandler):
        status, headers_out, body = 404, {}, {}

        def do_GET(self):
            data = json.dumps(self.body).encode()
            self.send_response(self.status)
            for name, value in {**self.headers_out, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_HEAD = do_POST = do_GET

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield Handler, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_gated_set_says_how_to_get_access(hub, tmp_path):
    handler, url = hub
    handler.status, handler.headers_out = 403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is gated"}
    said = read(url, HF_HOME=str(tmp_path))
    assert said.startswith("UserError: owner/pairs is gated")
    assert "hf auth login" in said
    assert "data.path=FILE" in said


def test_an_unreachable_hub(tmp_path):
    """Nobody listens at that port: refused at once, and said so."""
    said = read("http://127.0.0.1:9", HF_HOME=str(tmp_path))
    assert said.startswith("UserError: owner/pairs could not be reached")
    assert "Check the network" in said


def test_a_hub_that_is_too_busy(hub, tmp_path):
    handler, url = hub
    handler.status, handler.headers_out = 429, {"Retry-After": "0"}
    said = read(url, HF_HOME=str(tmp_path))
    assert said.startswith("UserError: the Hub answered 429 for owner/pairs"), said


def test_a_missing_set_asks_to_check_the_name(hub, tmp_path):
    handler, url = hub
    handler.headers_out = {"X-Error-Code": "RepoNotFound"}
    said = read(url, HF_HOME=str(tmp_path))
    assert "not a data set on the Hub" in said
    assert "data.path" in said


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_of_a_data_set_one_at_a_time(tmp_path, monkeypatch, streaming):
    """A folder stands in for the Hub: the same loader, with a copy in the cache or streamed."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(5)]
    (tmp_path / "set").mkdir()
    for split in ("train", "test"):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "set" / f"{split}.jsonl").write_text(lines)
    found = list(read_hub(str(tmp_path / "set"), "test", streaming=streaming))
    assert [row for _, row in found] == rows
    assert found[2][0] == f"{tmp_path / 'set'}, test row 3"
    with pytest.raises(UserError, match="tain"):
        list(read_hub(str(tmp_path / "set"), "tain", streaming=streaming))


def test_switched_off(tmp_path):
    said = read("http://127.0.0.1:9", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert "HF_HUB_OFFLINE" in said


class Response:
    def __init__(self, status_code):
        self.status_code = status_code


def chained(*errors):
    """Errors as the libraries raise them: each with the one before as its cause."""
    for outer, inner in itertools.pairwise(errors):
        outer.__cause__ = inner
    return errors[0]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            chained(ConnectionError("Couldn't reach 'x' on the Hub"), OSError("Name or service not known")),
            "be reached",
        ),
        (TimeoutError("timed out"), "be reached"),
        (ValueError("Unknown split \"tain\". Should be one of ['train', 'test']."), "Unknown split"),
    ],
)
def test_other_errors_in_words(error, said):
    assert said in explain_hub_error(error, "x")


def test_a_busy_hub_is_named_as_busy():
    error = OSError("too many requests")
    error.response = Response(429)
    assert "answered 429" in explain_hub_error(chained(RuntimeError("failed"), error), "x")


def test_a_defect_stays_a_defect():
    assert explain_hub_error(KeyError("x"), "x") is None
