"""What vLLM 0.32 offers to a trainer, as far as this project asks for it, on gloo and with the own loop.

`installed` puts it in vLLM's place: the classes and arguments are those of ``vllm.distributed.weight_transfer`` and
``vllm.LLM``, and it insists on the order of calls that these insist on.
"""

import contextlib
import importlib.machinery
import json
import sys
import threading
import types
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import torch
import torch.distributed as dist

from ppo_vs_dpo.models.sampling.generation import SamplingConfig, generate


@dataclass(frozen=True)
class ParamMeta:
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class WeightSource(ABC):
    @abstractmethod
    def metadata(self) -> list[ParamMeta]: ...

    @abstractmethod
    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]: ...


@dataclass
class NCCLTrainerInitInfo:
    backend: ClassVar[str] = "nccl"
    master_address: str
    master_port: int
    world_size: int
    packed: bool = True
    packed_buffer_size_bytes: int = 1 << 30
    packed_num_buffers: int = 2
    rank: int = field(kw_only=True)


def join(address: str, port: int, rank: int, world: int):
    """A group of gloo's beside torch's own."""
    store = dist.TCPStore(address, port, world, rank == 0, timedelta(seconds=60))
    return dist.ProcessGroupGloo(store, rank, world, timedelta(seconds=60))


class TrainerEngine:
    def __init__(self, info, client, source):
        self.info, self.client, self.source, self.group = info, client, source, None

    @staticmethod
    def trainer_init(*, init_info, client, source):
        engine = TrainerEngine(init_info, client, source)
        if init_info.rank == 0:
            worker = {key: value for key, value in asdict(init_info).items() if key != "rank"} | {"rank_offset": 1}
            with ThreadPoolExecutor(1) as pool:
                joined = pool.submit(client.init_weight_transfer_engine, worker)
                engine.group = join(init_info.master_address, init_info.master_port, 0, init_info.world_size)
                joined.result()
        return engine

    def send_weights(self):
        meta = self.source.metadata()
        if self.info.rank != 0:
            for _ in self.source:
                pass
            return
        self.client.start_weight_update()
        told = {"names": [m.name for m in meta], "dtype_names": [str(m.dtype).split(".")[-1] for m in meta],
                "shapes": [list(m.shape) for m in meta]}  # fmt: skip
        with ThreadPoolExecutor(1) as pool:
            done = pool.submit(self.client.update_weights, told)
            for (name, tensor), one in zip(self.source, meta, strict=True):
                assert (name, tensor.dtype, tuple(tensor.shape)) == (one.name, one.dtype, one.shape)
                self.group.broadcast(tensor.contiguous(), 0).wait()
            done.result()
        self.client.finish_weight_update()


class Server:
    """vLLM's routes for weights, with so many workers, each a thread with a place in the trainer's group."""

    def __init__(self, workers: int = 2):
        self.workers, self.groups, self.weights, self.calls = workers, [], [{} for _ in range(workers)], []
        self.open, self.broken = False, ""
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                answers = {"/v1/models": {"data": [{"max_model_len": 64}]}, "/get_world_size": {"world_size": workers}}
                self.answer(answers[self.path])

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                name = self.path.strip("/")
                outer.calls.append(name)
                if name == outer.broken:
                    self.answer({"error": "out of memory"}, 500)
                else:
                    self.answer(getattr(outer, name)(body) or {"message": "done"})

            def answer(self, body, status=200):
                text = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *arguments):
                """Nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def collective_rpc(self, body):
        assert body["method"] == "transfer_backend"
        return {"results": ["nccl"] * self.workers}

    def init_weight_transfer_engine(self, body):
        info = body["init_info"]
        where = (info["master_address"], info["master_port"])
        with ThreadPoolExecutor(self.workers) as pool:
            ranks = [info["rank_offset"] + number for number in range(self.workers)]
            self.groups = list(pool.map(lambda rank: join(*where, rank, info["world_size"]), ranks))

    def start_weight_update(self, body):
        assert not self.open
        self.open = True

    def update_weights(self, body):
        assert self.open
        info = body["update_info"]

        def receive(worker: int) -> None:
            for name, dtype, shape in zip(info["names"], info["dtype_names"], info["shapes"], strict=True):
                tensor = torch.empty(shape, dtype=getattr(torch, dtype))
                self.groups[worker].broadcast(tensor, 0).wait()
                self.weights[worker][name] = tensor

        with ThreadPoolExecutor(self.workers) as pool:
            list(pool.map(receive, range(self.workers)))

    def finish_weight_update(self, body):
        assert self.open
        self.open = False

    def reset_prefix_cache(self, body):
        assert not self.open


class SamplingParams:
    def __init__(self, max_tokens, temperature=1.0, seed=0, stop_token_ids=(), **others):
        self.max_tokens, self.temperature, self.seed = max_tokens, temperature, seed
        self.stop_token_ids = stop_token_ids


class LLM:
    """The colocated engine: generates awake only, and without weights after a sleep of level 2."""

    made: ClassVar[list["LLM"]] = []

    def __init__(self, model, enable_sleep_mode=False, distributed_executor_backend=None, **settings):
        from transformers import AutoConfig, LlamaForCausalLM

        self.model = LlamaForCausalLM(AutoConfig.from_pretrained(model)).eval()
        self.sleeps, self.backend, self.calls = enable_sleep_mode, distributed_executor_backend, []
        self.awake, self.loaded = {"weights", "kv_cache"}, False
        LLM.made.append(self)

    def collective_rpc(self, method, kwargs):
        assert method == "reload_weights"
        assert "weights" in self.awake
        weights = {name: tensor.clone() for name, tensor in kwargs["weights_iterator"]}
        self.model.load_state_dict(weights)
        self.loaded = True
        self.calls.append("weights")

    def apply_model(self, function):
        """Nothing is packed here."""

    def reset_prefix_cache(self):
        """There is none."""

    def sleep(self, level):
        assert self.sleeps
        assert level == 2
        self.awake, self.loaded = set(), False
        self.calls.append("sleep")

    def wake_up(self, tags):
        self.awake |= set(tags)
        self.calls.append(f"wake {tags[0]}")

    def generate(self, prompts, params, use_tqdm):
        assert self.awake == {"weights", "kv_cache"}
        if isinstance(prompts, dict):  # the try at its start
            return []
        assert self.loaded
        self.calls.append("generate")
        sampling = SamplingConfig(params[0].max_tokens, params[0].temperature)
        drawn = generate(
            self.model, [one["prompt_token_ids"] for one in prompts], sampling, with_logprobs=True,
            eos_token_ids=params[0].stop_token_ids, seeds=[one.seed for one in params],
        )  # fmt: skip
        found = []
        for one in drawn:
            logprobs = [
                {token: types.SimpleNamespace(logprob=x)} for token, x in zip(one.token_ids, one.logprobs, strict=True)
            ]
            output = types.SimpleNamespace(token_ids=one.token_ids, logprobs=logprobs)
            found.append(types.SimpleNamespace(outputs=[output]))
        return found


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """In vLLM's place inside the block."""
    contents = {
        "vllm": {"LLM": LLM, "SamplingParams": SamplingParams},
        "vllm.distributed": {},
        "vllm.distributed.weight_transfer": {
            "ParamMeta": ParamMeta, "WeightSource": WeightSource, "WeightTransferTrainerFactory": TrainerEngine,
        },
        "vllm.distributed.weight_transfer.nccl_engine": {"NCCLTrainerInitInfo": NCCLTrainerInitInfo},
    }  # fmt: skip
    before = {name: sys.modules.get(name) for name in contents}
    for name, content in contents.items():
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)
        vars(sys.modules[name]).update(content)
    LLM.made.clear()
    try:
        yield
    finally:
        for name, module in before.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module
