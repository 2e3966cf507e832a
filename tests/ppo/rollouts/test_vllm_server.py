"""vLLM as a server: the whole exchange with a stand-in that samples by the own loop, and with vLLM's own server."""

import functools
import json
import os
import subprocess
import threading
import time
import urllib.request
from collections import Counter
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.models.sampling.generation import SamplingConfig, generate
from ppo_vs_dpo.models.sampling.vllm.client import VLLMServerEngine
from ppo_vs_dpo.models.sampling.vllm.server import command
from ppo_vs_dpo.ppo.rollouts.responses import sample
from tests.ppo.conftest import count_good, logs
from tests.ranks import beside_tests, free_port, on_ranks, settings_of

ROOT = Path(__file__).parents[3]
EIGHT = SamplingConfig(8, batch_size=8)


class Server(ThreadingHTTPServer):
    """As many connections waiting as the engine opens at once; five, the default, are reset now and then."""

    request_queue_size = 128
    connections = 0

    def process_request(self, request, client_address):
        self.connections += 1
        super().process_request(request, client_address)


class StandIn:
    """A server with vLLM's three endpoints on this project's own loop, in threads of this process."""

    def __init__(self, model):
        self.model, self.loads, self.resets, self.keys = model, 0, 0, set()
        self.room, self.lock, self.broken = 64, threading.Lock(), False
        # Path -> how many of the next requests end with the connection closed and no answer.
        self.drops, self.asked = Counter(), Counter()
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                self.answer({"data": [{"id": "policy", "max_model_len": stand_in.room}]})

            def do_POST(self):
                stand_in.keys.add(self.headers.get("Authorization"))
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with stand_in.lock:
                    stand_in.asked[self.path] += 1
                    if stand_in.drops[self.path] > 0:
                        stand_in.drops[self.path] -= 1
                        self.close_connection = True
                        return
                    reply = getattr(stand_in, self.path.strip("/").replace("/", "_"), None)
                    self.answer(*((reply(body),) if reply else ({"error": "unknown"}, 404)))

            def answer(self, body, status=200):
                text = json.dumps(body).encode()
                self.send_response(500 if stand_in.broken else status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *arguments):
                """Nothing."""

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def collective_rpc(self, body):
        weights = {name: tensor for path in body["args"][0] for name, tensor in load_file(path).items()}
        missing = self.model.load_state_dict(weights, strict=False).missing_keys
        assert body["method"] == "load_policy"
        assert not missing
        self.loads += 1
        return {"results": [str(len(weights))]}

    def reset_prefix_cache(self, body):
        self.resets += 1
        return {}

    def inference_v1_generate(self, body):
        asked = body["sampling_params"]
        sampling = SamplingConfig(asked["max_tokens"], asked["temperature"])
        (one,) = generate(
            self.model, [body["token_ids"]], sampling,
            eos_token_ids=asked["stop_token_ids"], seeds=[asked["seed"]], with_logprobs=True,
        )  # fmt: skip
        content = [{"token_id": t, "logprob": x} for t, x in zip(one.token_ids, one.logprobs, strict=True)]
        return {"choices": [{"token_ids": one.token_ids, "logprobs": {"content": content}}]}


@pytest.fixture
def stand_in(tiny_llama):
    server = StandIn(tiny_llama(9))
    yield server
    server.server.shutdown()
    server.server.server_close()


def served(server: StandIn, **settings) -> dict:
    return {"generation_engine": "vllm", "vllm_mode": "server", "vllm_server_base_url": server.url, **settings}


def test_the_run_is_that_of_the_own_loop(make_trainer, stand_in, tmp_path):
    """New weights before each sampling, each row from its seed: the same tokens, the same training up to rounding."""
    own = make_trainer(max_steps=3)
    own.train()
    expected = {name: p.detach().clone() for name, p in own.policy.named_parameters()}
    trainer = make_trainer(max_steps=3, **served(stand_in))
    trainer.train()
    for name, parameter in trainer.policy.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], atol=1e-5, rtol=1e-5)
    assert stand_in.loads == stand_in.resets >= 3
    assert max(row["engine/logprob_difference_max"] for row in logs(trainer)) < 1e-5
    folder = Path(trainer.roles.engine.folder.name)
    assert folder.parent == Path(trainer.args.output_dir)
    trainer.roles.engine.folder.cleanup()
    assert not folder.exists()


def test_weights_are_sent_once_a_change(make_trainer, prompts, stand_in):
    """An evaluation after an update samples from what the server has; the reference goes over once a run."""
    parts = {"eval_dataset": prompts.select(range(5))}
    trainer = make_trainer(parts, max_steps=3, eval_strategy="no", **served(stand_in))
    trainer.train()
    assert stand_in.loads == 3
    trainer.evaluate()  # the weights of the last update, then the reference's
    assert stand_in.loads == 5
    seeds = list(range(3))
    assert trainer.roles.sent == ("reference", 0)
    drawn = sample(trainer.roles, trainer.prompts.ids[:3], seeds, trainer.args, reference=True)
    own = generate(
        trainer.roles.reference.module, trainer.prompts.ids[:3], trainer.args.sampling(),
        eos_token_ids=trainer.roles.eos_ids, seeds=seeds,
    )  # fmt: skip
    assert [one.token_ids for one in drawn] == [one.token_ids for one in own]
    trainer.evaluate()  # the policy again; the reference's samples are kept
    trainer.evaluate()
    assert stand_in.loads == 6


def engine_of(server: StandIn, folder: Path) -> VLLMServerEngine:
    """Eight requests at once."""
    return VLLMServerEngine(server.url, folder, server.model, EIGHT, [2], 32, torch.float32)


def test_connections_are_kept(stand_in, tmp_path):
    """A hundred completions by as many connections as are asked at once; the tokens are the loop's."""
    engine = engine_of(stand_in, tmp_path)
    prompts = [[5, 6, 7, 8][: 1 + row % 4] for row in range(100)]
    drawn = engine.generate(prompts, EIGHT, range(100))
    assert stand_in.asked["/inference/v1/generate"] == 100
    assert 1 <= stand_in.server.connections <= 8 + 1
    own = generate(stand_in.model, prompts, EIGHT, eos_token_ids=[2], seeds=range(100))
    assert [one.token_ids for one in drawn] == [one.token_ids for one in own]


def test_a_connection_that_broke_off_costs_one_more_request(stand_in, tmp_path):
    engine = engine_of(stand_in, tmp_path)
    stand_in.drops["/inference/v1/generate"] = 1
    (one,) = engine.generate([[5, 6]], EIGHT, [3])
    assert stand_in.asked["/inference/v1/generate"] == 2
    assert one.token_ids == generate(stand_in.model, [[5, 6]], EIGHT, eos_token_ids=[2], seeds=[3])[0].token_ids
    stand_in.drops["/inference/v1/generate"] = 2
    with pytest.raises(UserError, match=r"no vLLM server at .*the run goes on from its last checkpoint"):
        engine.generate([[5, 6]], EIGHT, [3])


def test_a_step_of_a_transfer_is_never_made_twice(stand_in, tmp_path):
    engine = engine_of(stand_in, tmp_path)
    stand_in.drops["/update_weights"] = 1
    with pytest.raises(UserError, match=r"no vLLM server at "):
        engine._ask("/update_weights", {})
    assert stand_in.asked["/update_weights"] == 1


def test_the_key_is_sent_and_told_to_nobody(make_trainer, stand_in, monkeypatch, capfd):
    monkeypatch.setenv("VLLM_API_KEY", "a-secret-word")
    trainer = make_trainer(max_steps=1, **served(stand_in))
    trainer.train()
    assert stand_in.keys == {"Bearer a-secret-word"}
    told = capfd.readouterr()
    assert "a-secret-word" not in told.out + told.err
    for path in Path(trainer.args.output_dir).rglob("*.json"):
        assert "a-secret-word" not in path.read_text()


def test_nobody_answers(make_trainer):
    with pytest.raises(UserError, match=r"no vLLM server at http://127.0.0.1:\d+ \(ppo.vllm_server_base_url\)"):
        make_trainer(
            generation_engine="vllm", vllm_mode="server", vllm_server_base_url=f"http://127.0.0.1:{free_port()}"
        )


def test_a_server_without_the_endpoints(make_trainer, stand_in):
    """Plain `vllm serve` has none for weights."""
    stand_in.collective_rpc = None
    with pytest.raises(
        UserError, match=r"answers 404 to .*collective_rpc.*python -m ppo_vs_dpo.models.sampling.vllm.server"
    ):
        make_trainer(max_steps=1, **served(stand_in)).train()


def test_something_else_answers(make_trainer, tmp_path):
    """A web server of another kind, at the same address."""
    (tmp_path / "v1").mkdir()
    (tmp_path / "v1" / "models").write_text("<html>hello</html>")
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    try:
        with pytest.raises(UserError, match=r"is no vLLM server: it answers /v1/models with b'<html>hello"):
            make_trainer(generation_engine="vllm", vllm_mode="server", vllm_server_base_url=url)
    finally:
        server.shutdown()
        server.server_close()


def test_weights_left_by_a_killed_run_are_removed(make_trainer, stand_in, tmp_path):
    left = tmp_path / "out" / ".weights-old"
    left.mkdir(parents=True)
    (left / "policy.safetensors").write_bytes(b"0")
    trainer = make_trainer(max_steps=1, **served(stand_in))
    assert not left.exists()
    assert Path(trainer.roles.engine.folder.name).exists()


def test_too_little_room(make_trainer, stand_in):
    stand_in.room = 5
    with pytest.raises(UserError, match=r"takes 5 tokens, .* Start it with --max-model-len \d+"):
        make_trainer(**served(stand_in))


def test_a_server_that_fails_stops_the_run(make_trainer, stand_in):
    trainer = make_trainer(max_steps=1, **served(stand_in))
    stand_in.broken = True
    with pytest.raises(UserError, match="answers 500"):
        trainer.train()


def test_half_of_the_weights_are_noticed(make_trainer, stand_in):
    stand_in.collective_rpc = lambda body: {"results": ["3"]}
    with pytest.raises(UserError, match=r"read \{3\} tensors of \d+"):
        make_trainer(max_steps=1, **served(stand_in)).train()


def test_the_line_that_starts_a_server():
    """Defaults give way to what is said."""
    line = command(["some/model", "--port", "9000", "--host=0.0.0.0"])
    assert line[2:7] == ["--model", "some/model", "--port", "9000", "--host=0.0.0.0"]
    assert "--host" not in line
    assert "--weight-transfer-config" not in line
    gpus = command(["some/model"], gpus=True)
    assert json.loads(gpus[gpus.index("--weight-transfer-config") + 1]) == {"backend": "nccl"}
    assert line[line.index("--worker-extension-cls") + 1] == "ppo_vs_dpo.models.sampling.vllm.server.PolicyWeights"


# ------------------------------------------------------------------------------------------------ vLLM's own server


@pytest.fixture
def vllm_server(tmp_path, tiny_llama, word_tokenizer):
    """A function that starts vLLM's server for a tiny model: ``vllm_server(tied)`` gives its address and the model."""
    python = os.environ.get("PPO_VS_DPO_VLLM_PYTHON")
    if not python:
        pytest.skip("PPO_VS_DPO_VLLM_PYTHON does not name a Python with vLLM")
    started = []

    def start(tied: bool) -> tuple[str, object]:
        # vLLM's CPU kernels need heads of 32.
        model = tiny_llama(0, initializer_range=0.2, hidden_size=64, tie_word_embeddings=tied)
        model.save_pretrained(tmp_path / "model")
        word_tokenizer.save_pretrained(tmp_path / "model")
        port = free_port()
        line = [
            python,
            "-m",
            "ppo_vs_dpo.models.sampling.vllm.server",
            str(tmp_path / "model"),
            "--port",
            str(port),
            "--enforce-eager",
        ]
        line += ["--dtype", "float32", "--max-model-len", "64", "--max-num-seqs", "32", "--skip-tokenizer-init"]
        environment = {"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ, "PYTHONPATH": beside_tests(tmp_path)}
        log = (tmp_path / "server.log").open("w")
        process = subprocess.Popen(line, cwd=ROOT, env=environment, stdout=log, stderr=log)
        started.append((process, log))
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 300
        while time.monotonic() < deadline and process.poll() is None:
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5)
            except OSError:
                time.sleep(1)
            else:
                return url, model
        raise AssertionError((tmp_path / "server.log").read_text()[-3000:])

    yield start
    for process, log in started:
        process.terminate()
        process.wait(60)
        log.close()


@pytest.mark.slow
@pytest.mark.parametrize(("tied", "ranks", "deepspeed"), [(False, 1, None), (True, 2, "zero3")])
def test_ppo_with_a_vllm_server(vllm_server, make_trainer, tied, ranks, deepspeed):
    """Engine and trainer agree to 1e-3 after every update; on two ranks under ZeRO-3, too."""
    url, model = vllm_server(tied)

    def train() -> list[dict]:
        parts = {"model": model, "reward_model": None, "reward_funcs": count_good}
        trainer = make_trainer(
            parts, generation_engine="vllm", vllm_mode="server", vllm_server_base_url=url, max_steps=3,
            learning_rate=2e-3, response_length=12, deepspeed=settings_of(deepspeed) if deepspeed else None,
        )  # fmt: skip
        trainer.train()
        return logs(trainer)

    for rows in on_ranks(ranks, train):
        assert len(rows) == 3
        assert max(row["engine/logprob_difference_max"] for row in rows) < 1e-3
        assert min(row["policy/approxkl_avg"] for row in rows) > 1e-4
        assert max(row["val/first_ratio_deviation"] for row in rows) < 1e-5
