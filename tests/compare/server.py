"""An OpenAI-compatible server on loopback that answers as a test says, and judges that ask it."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from ppo_vs_dpo.preferences.judging.llm import Cache, Comparison, LLMJudge, LLMJudgeConfig

KEY = "sk-very-secret-key"


def comparisons(n, ours="a longer and good answer", theirs="short"):
    return [Comparison("ppo", "dpo", f"id{i}", f"Question {i}?", f"{ours} {i}", f"{theirs} {i}") for i in range(n)]


class Server:
    """A chat-completions endpoint on loopback; ``answer(question, number)`` gives text, a status code, raw bytes, or
    a function that writes on the connection."""

    def __init__(self, answer, logprobs=None, port=0):
        self.answer, self.logprobs, self.requests, self.headers = answer, logprobs, [], []
        lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.requests.append(body)
                    outer.headers.append({key.lower(): value for key, value in self.headers.items()})
                    number = len(outer.requests)
                found = outer.answer(body["messages"][-1]["content"], number)
                if callable(found):  # it writes what it likes
                    return found(self)
                if isinstance(found, int):
                    found = (found, "no")
                status, payload = found if isinstance(found, tuple) else (200, found)
                if status != 200:
                    payload = json.dumps({"error": {"message": payload}}).encode()
                if isinstance(payload, str):
                    choice = {
                        "index": 0,
                        "finish_reason": "stop",
                        "message": {"role": "assistant", "content": payload},
                    }
                    if outer.logprobs and body.get("logprobs"):
                        choice["logprobs"] = {"content": outer.logprobs}
                    usage = {"prompt_tokens": 50, "completion_tokens": 3, "total_tokens": 53}
                    content = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
                    payload = json.dumps({**content, "usage": usage}).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)
                return None

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def close(self):
        self.http.shutdown()
        self.http.server_close()


def judge_at(server, cache=None, **settings):
    config = {"model": "m", "base_url": server.url, "api_key_env": "JUDGE_KEY", "retries": 1, "timeout": 5.0}
    return LLMJudge(LLMJudgeConfig(**{**config, **settings}), cache=cache or Cache(None))


def answers_of(question):
    """The two texts that a question holds, in the order shown."""
    first = question.split("=== Reply A ===")[1].split("===")[0].strip()
    return first, question.split("=== Reply B ===")[1].split("===")[0].strip()


def prefers_longer(question, number=0):
    first, second = answers_of(question)
    return f"One says more than the other.\n{'A' if len(first) > len(second) else 'B'}"
