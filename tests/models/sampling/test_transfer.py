"""Weights by vLLM's own transfer: real processes, ZeRO-3, a stand-in for vLLM that joins by gloo (its classes, its
order of calls). What NCCL and CUDA IPC do with them only GPUs can show."""

import base64
import pickle
import time

import pytest
import torch

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.models.sampling import weights
from ppo_vs_dpo.models.sampling.generation import SamplingConfig
from ppo_vs_dpo.models.sampling.vllm.client import VLLMServerEngine
from ppo_vs_dpo.models.sampling.vllm.transfer import Routes, transfer_for
from tests.models.sampling.pretended_vllm import Server, installed
from tests.models.sampling.test_weights import sharded, wholly
from tests.ranks import on_ranks

LIMIT = 4000


def sent(build, url, folder, fails):
    """What two updates bring; numbers whole at once on this rank; seconds, and what was said, of a failure."""
    with installed():
        engine, seen = sharded(build())
        client = VLLMServerEngine(url, folder, engine.module, SamplingConfig(4), [2], 16, torch.float32, "nccl")
        started, said = time.monotonic(), None
        try:
            for _ in range(2):
                client.update_weights(engine.module)
                with wholly(engine.module):
                    for parameter in engine.module.parameters():
                        parameter.data.add_(0.5)
        except UserError as error:
            said = str(error)
        return max(seen, default=0), time.monotonic() - started, said


def test_a_bucket_is_whole_at_once_and_all_workers_get_all(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "BUCKET", LIMIT)
    server, model = Server(workers=2), tiny_llama(num_hidden_layers=4)
    for most, _, said in on_ranks(2, sent, lambda: tiny_llama(num_hidden_layers=4), server.url, tmp_path / "no", None):
        assert said is None
        assert most <= LIMIT / 4
    assert sum(p.numel() for p in model.parameters()) > 4 * LIMIT / 4
    for worker in server.weights:
        assert worker.keys() == dict(model.named_parameters()).keys()
        for name, parameter in model.named_parameters():
            # Those of the second update.
            torch.testing.assert_close(worker[name], parameter.detach() + 0.5, atol=1e-6, rtol=0)
    once = ["start_weight_update", "update_weights", "finish_weight_update", "reset_prefix_cache"]
    assert server.calls == ["collective_rpc", "init_weight_transfer_engine", *once, *once]
    assert not (tmp_path / "no").exists()


def test_a_server_that_fails_leaves_no_rank_waiting(tiny_llama, tmp_path):
    server = Server(workers=1)
    server.broken = "start_weight_update"
    for _, seconds, said in on_ranks(2, sent, tiny_llama, server.url, tmp_path, None, timeout=30):
        assert "answers 500" in said
        assert seconds < 15


def test_which_way_they_go():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")

    def never():
        raise AssertionError("the server was asked")

    assert transfer_for("auto", cpu, never) == "files"
    assert transfer_for("files", cuda, never) == "files"
    with pytest.raises(UserError, match="vllm_weight_transfer=nccl needs vLLM in the trainer's environment"):
        transfer_for("nccl", cuda, never)
    with installed():
        for offered, found in (("nccl", "nccl"), ("ipc", "ipc"), ("", "files"), ("sharded_rdt", "files")):
            assert transfer_for("auto", cuda, lambda offered=offered: offered) == found
        with pytest.raises(UserError, match=r"started for nccl\. Start it with .*\"backend\": \"ipc\""):
            transfer_for("ipc", cuda, lambda: "nccl")


def test_handles_travel_as_vllm_reads_them():
    """By IPC what is sent is where the weights lie: pickled in base64, as the server's workers take it over HTTP."""
    asked = []
    routes = Routes(lambda path, body: asked.append((path, body)))
    handles = {"GPU-1": (1, b"handle", "x")}
    routes.update_weights({"names": ["a"], "ipc_handles": handles, "tensor_sizes": [4]})
    ((path, body),) = asked
    assert path == "/update_weights"
    assert body["update_info"].keys() == {"names", "tensor_sizes", "ipc_handles_pickled"}
    assert pickle.loads(base64.b64decode(body["update_info"]["ipc_handles_pickled"])) == handles
