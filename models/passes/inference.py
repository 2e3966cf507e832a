"""Frozen models that several ranks read together: each rank works on its share of the rows.

Without ZeRO-3 every rank holds a model whole. With it a model is a ZeRO-3 inference engine, 1/N of the weights on
each rank, whose layers are gathered on all ranks at once: then all must make the same number of forward passes.
`Ranks.share` gives each rank equally many rows for that; generation, which ends at different times, gathers the
weights once.
"""

import contextlib
import gc
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from ppo_vs_dpo.artifacts.files import read_json
from ppo_vs_dpo.artifacts.resources import parameter_size
from ppo_vs_dpo.artifacts.stage import StageContext
from ppo_vs_dpo.models.devices import arithmetic
from ppo_vs_dpo.models.loading.config import ModelConfig
from ppo_vs_dpo.models.loading.prepared import halve_frozen
from ppo_vs_dpo.models.sharding.collectives import of_first
from ppo_vs_dpo.models.sharding.deepspeed import deepspeed_settings, gathered, start_deepspeed

Value = TypeVar("Value")


@dataclass
class Frozen:
    """A model that is only read.

    Attributes:
        model: to be called.
        engine: the ZeRO-3 engine around it, whose hooks gather its layers; ``None`` where the model is whole.
    """

    model: PreTrainedModel
    engine: torch.nn.Module | None = None

    def generating(self) -> contextlib.AbstractContextManager:
        """The weights whole on this rank inside the block; ranks may then stop decoding at different steps."""
        return contextlib.nullcontext() if self.engine is None else gathered(self.engine, self.model)

    def release(self) -> None:
        """Let go of the weights: an engine and its hooks refer to each other, and would stay until some later time."""
        engine, self.engine, self.model = self.engine, None, None
        if engine is not None:
            engine.destroy()
            del engine
            gc.collect()

    def count_parameters(self) -> int:
        """How many parameters the model has, those of other ranks included."""
        return sum(map(parameter_size, self.model.parameters()))


class Ranks:
    """The processes that read models together; one process is the common case, and then nothing is exchanged.

    Args:
        rank: of this process.
        world: how many there are.
        settings: DeepSpeed's configuration of inference engines; ``None``: every rank holds models whole.

    Attributes:
        step: what the ranks are doing, for the message of one that waits in vain.
    """

    def __init__(self, rank: int = 0, world: int = 1, settings: dict[str, Any] | None = None):
        self.rank, self.world, self.settings = rank, world, settings
        self.step = "start"
        self._configured = None
        if settings is not None:
            from transformers.integrations import HfDeepSpeedConfig

            # While this object lives, `from_pretrained` splits every model as it reads it.
            self._configured = HfDeepSpeedConfig(settings)

    @classmethod
    def join(cls, context: StageContext, config: ModelConfig, reference: Path) -> "Ranks":
        """Meet the other processes of a launcher, where there are any.

        Args:
            context: the stage; its run's ``deepspeed`` section says whether models are split (ZeRO-3).
            reference: folder whose saved dtype counts where ``model.dtype`` is auto.
        """
        world = int(os.environ.get("WORLD_SIZE", "1"))
        sharding = deepspeed_settings(context)
        sharded = sharding is not None and sharding["zero_optimization"]["stage"] == 3
        if world == 1 and not sharded:
            return cls()
        accelerator = torch.accelerator.is_available()
        if accelerator:
            torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", "0")))
        if not sharded:
            # Only Python objects are exchanged.
            torch.distributed.init_process_group("gloo")
            return cls(int(os.environ["RANK"]), world)
        start_deepspeed(use_cpu=not accelerator)
        return cls(int(os.environ["RANK"]), world, inference_settings(sharding, dtype_of(config, reference)))

    @staticmethod
    def computing(config: ModelConfig) -> contextlib.AbstractContextManager:
        """The arithmetic of the training stages where nothing is said for one (`models.devices`): bfloat16 products.

        Sampled, scored and compared in another one, a policy would be another than the one that was trained.
        """
        accelerator = torch.accelerator.is_available()
        if not arithmetic(config, {}, accelerator)["bf16"]:
            return contextlib.nullcontext()
        kind = torch.accelerator.current_accelerator().type if accelerator else "cpu"
        return torch.autocast(kind, torch.bfloat16)

    @property
    def alone(self) -> bool:
        """One process that holds its models whole."""
        return self.world == 1 and self.settings is None

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def load(self, loader: Callable[..., PreTrainedModel], path: str | Path, config: ModelConfig) -> Frozen:
        """Load a model, whole onto this rank's device or split over the ranks; all ranks must call this.

        Args:
            loader: `models.loading.pretrained.load_policy` or `models.loading.heads.load_reward`.
        """
        if self.settings is None:
            model = loader(path, config).requires_grad_(False)
            if arithmetic(config, {}, torch.accelerator.is_available())["bf16"]:
                halve_frozen(model, torch.bfloat16)
            if torch.accelerator.is_available():
                model = model.to(torch.accelerator.current_accelerator())
            return Frozen(model)
        import deepspeed

        model = loader(path, config)
        engine, *_ = deepspeed.initialize(model=model, config=self.settings)
        engine.eval()
        return Frozen(engine.module, engine)

    def share(self, n: int) -> list[int]:
        """This rank's rows of ``n``. Every rank gets equally many: what is missing at the end begins anew at row 0."""
        return [(self.rank + self.world * i) % n for i in range(-(-n // self.world))]

    def merge(self, values: Sequence[Value], n: int) -> list[Value]:
        """All ``n`` values in order, on every rank, from each rank's values of its own `share`."""
        if self.world == 1:
            return list(values)
        parts: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(parts, list(values))
        return [parts[row % self.world][row // self.world] for row in range(n)]

    def agree(self, make: Callable[[], Value]) -> Value:
        """What ``make`` gives on the main process, on every rank."""
        return of_first(make() if self.is_main else None)

    def leave(self) -> bool:
        """End the common work; True on the main process, which goes on alone. Split models are of no more use."""
        if not self.alone:
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
        return self.is_main


def inference_settings(sharding: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """DeepSpeed's configuration of a ZeRO-3 engine that trains nothing.

    Args:
        sharding: the run's ``deepspeed`` section.
        dtype: of the weights.
    """
    zero = sharding["zero_optimization"]
    return {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 1_000_000_000,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
        # No optimizer to offload, and no Trainer to fill in what is left to it.
        "zero_optimization": {k: v for k, v in zero.items() if k != "offload_optimizer" and v != "auto"},
    }


def dtype_of(config: ModelConfig, folder: Path) -> torch.dtype:
    """The dtype that models of a run are loaded in; ``auto`` is what the model in ``folder`` was saved in."""
    name = config.dtype
    if name == "auto":
        saved = read_json(folder / "config.json")
        name = saved.get("dtype") or saved.get("torch_dtype") or "float32"
    return getattr(torch, name)
