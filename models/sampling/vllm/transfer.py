"""The policy's weights to a vLLM server by vLLM's own transfer: NCCL to other GPUs, or CUDA IPC on the same ones.

vLLM has an engine for either side (``vllm.distributed.weight_transfer``, 0.32): the trainer's asks a *source* for the
weights and a *client* for the server. Here are both: a source that gathers one bucket at a time
(`models.sampling.weights`), and a client that speaks the server's four routes. No file is written, and no rank holds
the whole policy. The trainer's environment needs vLLM, too; without it weights go by files
(`models.sampling.vllm.client`).
"""

import base64
import importlib.util
import pickle
import socket
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ppo_vs_dpo.artifacts.errors import UserError, first_sentence
from ppo_vs_dpo.models.sampling.weights import BUCKET, buckets, weights_of

# Bytes of one message; vLLM keeps two of them on either side.
MESSAGE = BUCKET // 4


def transfer_for(wish: str, device: torch.device, offered: Callable[[], str]) -> str:
    """How weights go to a server: ``nccl``, ``ipc`` or ``files``.

    Args:
        wish: ``ppo.vllm_weight_transfer``; ``auto`` is what the server was started for where the trainer can do it,
            too, else files.
        offered: what the server was started for (``--weight-transfer-config``); empty for nothing.

    Raises:
        UserError: what is asked for cannot be.
    """
    installed = importlib.util.find_spec("vllm") is not None
    if wish == "auto":
        found = offered() if device.type == "cuda" and installed else ""
        return found if found in ("nccl", "ipc") else "files"
    if wish == "files":
        return wish
    if not installed:
        raise UserError(
            f"ppo.vllm_weight_transfer={wish} needs vLLM in the trainer's environment, too: pip install "
            f"ppo-vs-dpo[vllm] there, or use files."
        )
    found = offered()
    if found != wish:
        raise UserError(
            f"ppo.vllm_weight_transfer={wish}: the server was started for {found or 'no transfer'}. Start it with "
            f'--weight-transfer-config \'{{"backend": "{wish}"}}\', or use files.'
        )
    return wish


class Routes:
    """The four calls that vLLM's engine makes to a server, as its HTTP routes.

    Args:
        ask: sends one, ``ask(path, body)``.
    """

    def __init__(self, ask: Callable[[str, dict], dict]):
        self.ask = ask

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """The server's workers join."""
        self.ask("/init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        """Weights will come."""
        self.ask("/start_weight_update", {})

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """What comes: names, dtypes and shapes; by IPC also where it lies, as vLLM's own client says it."""
        handles = update_info.get("ipc_handles")
        if handles is not None:
            update_info = {key: value for key, value in update_info.items() if key != "ipc_handles"}
            update_info["ipc_handles_pickled"] = base64.b64encode(pickle.dumps(handles)).decode()
        self.ask("/update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """All have come."""
        self.ask("/finish_weight_update", {} if weight_version is None else {"weight_version": weight_version})


class Transfer:
    """Sends a policy's weights, whole one bucket at a time; all ranks must call it together.

    Args:
        kind: ``nccl`` or ``ipc``.
        ask: see `Routes`.
        url: of the server.
        dtype: that weights are sent in.
        rank: of this process; the first one sends.
        world: GPUs that the server runs on, where this is the first rank.
        policy: whose weights will be sent first.

    Raises:
        UserError: the server does not join.
    """

    def __init__(
        self,
        kind: str,
        ask: Callable[[str, dict], dict],
        url: str,
        dtype: torch.dtype,
        rank: int,
        world: int,
        policy: torch.nn.Module,
    ):
        from vllm.distributed.weight_transfer import WeightTransferTrainerFactory

        # By IPC every rank shows its own GPU's worker where the weights are.
        self.source = make_source(dtype, rank == 0 or kind == "ipc")
        self.source.begin(policy)
        info = _nccl(url, world, rank) if kind == "nccl" else _ipc(rank)
        try:
            self.engine = WeightTransferTrainerFactory.trainer_init(
                init_info=info, client=Routes(ask), source=self.source
            )
        except (RuntimeError, ValueError, OSError, UserError) as error:
            raise UserError(
                f"ppo.vllm_weight_transfer={kind}: the server at {url} did not join ({first_sentence(error)}). "
                f"Its log says more; ppo.vllm_weight_transfer=files needs no connection."
            ) from error

    def send(self, policy: torch.nn.Module) -> None:
        """All weights, once.

        Raises:
            UserError: the server fails, or the connection; other ranks are not left waiting for their part.
        """
        self.source.begin(policy)
        try:
            self.engine.send_weights()
        except (RuntimeError, ValueError, OSError) as error:
            raise UserError(f"the weights did not reach the vLLM server: {first_sentence(error)}") from error
        finally:
            # A rank that gave up still helps to gather what is left.
            self.source.finish()


def make_source(dtype: torch.dtype, keep: bool) -> Any:
    """A ``WeightSource`` of vLLM's over `models.sampling.weights.buckets`; ``begin`` comes before each pass."""
    from vllm.distributed.weight_transfer import ParamMeta, WeightSource

    class Source(WeightSource):
        def begin(self, policy: torch.nn.Module) -> None:
            self.policy, self.left = policy, buckets(policy, dtype, keep)

        def metadata(self) -> list:
            return [ParamMeta(one.name, dtype, one.shape) for one in weights_of(self.policy)]

        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            for bucket in self.left:
                # Let go of one by one: none of this bucket is left when the next is gathered.
                while bucket:
                    name = next(iter(bucket))
                    yield name, bucket.pop(name)

        def finish(self) -> None:
            for _ in self.left:
                """Gathered with the others."""

    return Source()


def _nccl(url: str, world: int, rank: int) -> Any:
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    address, port = meeting_place(url) if rank == 0 else ("127.0.0.1", 0)
    return NCCLTrainerInitInfo(
        master_address=address, master_port=port, world_size=1 + world, packed_buffer_size_bytes=MESSAGE, rank=rank
    )


def _ipc(rank: int) -> Any:
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

    return IPCTrainerInitInfo(packed=True, packed_buffer_size_bytes=MESSAGE, rank=rank)


def meeting_place(url: str) -> tuple[str, int]:
    """An address of this machine that the server reaches, and a free port."""
    parts = urllib.parse.urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port or 80), timeout=30) as connection:
        address = connection.getsockname()[0]
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as listener:
        listener.bind((address, 0))
        return address, listener.getsockname()[1]
