"""A run in a folder, and going on from it: the trained weights, their optimizer, and the loop's state."""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerState
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import rotate_checkpoints

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.files import as_the_umask_says
from ppo_vs_dpo.models.loading.adapters import is_peft
from ppo_vs_dpo.models.sharding.collectives import barrier
from ppo_vs_dpo.models.sharding.deepspeed import whole_state
from ppo_vs_dpo.models.sharding.state import check_sharding, load_trained, save_trained
from ppo_vs_dpo.ppo.checkpoints.identity import SCHEDULE, adopt, changed
from ppo_vs_dpo.ppo.checkpoints.loop import PROGRESS, LoopState
from ppo_vs_dpo.ppo.checkpoints.state import (
    STATE,
    complete_folder,
    last_checkpoint,
    load_state,
    save_state,
)
from ppo_vs_dpo.ppo.config import PPOConfig
from ppo_vs_dpo.ppo.roles.roles import Roles


def trained_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The trained tensors of policy and value model (tied ones once), and their buffers."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    named.update((name, b) for name, b in model.named_buffers() if b.is_floating_point())
    return named


class Checkpoints:
    """A run's checkpoints: ``checkpoint-N`` with the policy as a Hub folder, and the run's exact state beside it."""

    def __init__(
        self, roles: Roles, loop: LoopState, args: PPOConfig, accelerator: Accelerator, settings: dict[str, Any]
    ):
        self.roles, self.loop, self.args, self.accelerator, self.settings = roles, loop, args, accelerator, settings
        self.root = Path(args.output_dir)
        self.sharded = accelerator.distributed_type == DistributedType.DEEPSPEED

    def write(self, optimizer: Optimizer, scheduler: LRScheduler, stateful: list[ExportableState]) -> Path:
        """Write one; all ranks must call this. The folder appears under its name only when it is complete, on all."""
        progress, writes = self.loop.progress, self.args.should_save
        target = self.root / f"checkpoint-{self.loop.step}"
        if progress.best_global_step:
            best = self.root / f"checkpoint-{progress.best_global_step}"
            progress.best_model_checkpoint = str(best) if best == target or best.is_dir() else None
        with complete_folder(target, self.accelerator.is_main_process) as folder:
            save_policy(folder, self.roles.policy, self.roles.tokenizer, self.sharded, writes)
            if not self.args.save_only_model:
                self._write_state(folder, optimizer, scheduler)
            if writes:
                for one in stateful:
                    name, states = type(one).__name__, progress.stateful_callbacks
                    kept = states.get(name)
                    states[name] = [*kept, one.state()] if isinstance(kept, list) else one.state()
                progress.save_to_json(str(folder / PROGRESS))
        return target

    def _write_state(self, folder: Path, optimizer: Optimizer, scheduler: LRScheduler) -> None:
        """Everything that going on needs, but for the progress."""
        state = {"settings": self.settings, "scheduler": scheduler.state_dict(), **self.loop.state_dict()}
        rank, scaler = self.accelerator.process_index, self.accelerator.scaler
        if self.sharded:
            save_trained(self.roles.trained, folder, rank, self.accelerator.num_processes)
        else:
            state["model"] = trained_tensors(self.roles.model)
            state["optimizer"] = optimizer.state_dict()
            if scaler is not None:
                state["scaler"] = scaler.state_dict()
        if self.args.sync_ref_model:
            state["reference"] = self.roles.reference.state(self.args.should_save)
        if self.args.should_save:
            save_state(folder, STATE, state)
        save_state(folder, f"rng_{rank}", self.loop.random.state_dict())

    def rotate(self) -> None:
        """Delete the oldest ones beyond ``save_total_limit``, never the best."""
        if self.args.should_save:
            best = self.loop.progress.best_model_checkpoint
            rotate_checkpoints(str(self.root), self.args.save_total_limit, best_model_checkpoint=best)
        barrier()

    def find(self, checkpoint: str | bool | None) -> Path | None:
        """The folder to go on from: a given one, with True the newest in ``output_dir``, or ``None``.

        Raises:
            UserError: the folder given is no checkpoint, or those there are hold no state.
        """
        if checkpoint is True:
            checkpoint = last_checkpoint(self.root)
            for folder in () if checkpoint else sorted(self.root.glob("checkpoint-*")):
                if (folder / PROGRESS).is_file():
                    raise UserError(
                        f"{folder} holds the model alone (ppo.save_only_model), so the run cannot go on from it. Set "
                        f"ppo.save_only_model=false for runs that are to go on; to start afresh, delete the folder."
                    )
        if not checkpoint:
            return None
        folder = Path(checkpoint)
        if not (folder / f"{STATE}.json").is_file():
            raise UserError(f"{folder} is not a checkpoint of ppo that can be resumed: it has no {STATE}.json.")
        return folder

    def read(self, folder: Path, optimizer: Optimizer, scheduler: LRScheduler) -> None:
        """Go on from one: afterwards everything is as it was when it was written.

        Raises:
            UserError: a torn checkpoint, or one of another run.
        """
        self.roles.version += 1
        state = load_state(folder, STATE)
        check_sharding(folder, self.sharded)
        different = changed(state["settings"], self.settings, self.args.resume_with, str(folder))
        fresh = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        self.loop.progress = TrainerState.load_from_json(str(folder / PROGRESS))
        if self.sharded:
            load_trained(self.roles.trained, folder)
        else:
            copy_tensors(trained_tensors(self.roles.model), state["model"], folder)
            optimizer.load_state_dict(state["optimizer"])
            if "scaler" in state and self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(state["scaler"])
        if "reference" in state:
            self.roles.reference.load(state["reference"])
        if not different & set(SCHEDULE):
            scheduler.load_state_dict(state["scheduler"])
        self.loop.load_state_dict(state)
        adopt(different, self.args, self.loop, optimizer, scheduler, fresh)
        own = folder / f"rng_{self.accelerator.process_index}.json"
        if own.is_file():
            # Fewer files than ranks: the run was made on fewer. Sampling does not use these generators.
            self.loop.random.load_state_dict(load_state(folder, own.stem))

    def read_best(self) -> None:
        """Put the weights of the best checkpoint (by ``metric_for_best_model``) into policy and value model."""
        folder = self.root / f"checkpoint-{self.loop.progress.best_global_step}"
        if not self.loop.progress.best_global_step or not folder.is_dir():
            return
        self.roles.version += 1
        if self.sharded:
            load_trained(self.roles.trained, folder, optimizer_too=False)
        else:
            copy_tensors(trained_tensors(self.roles.model), load_state(folder, STATE)["model"], folder)


@torch.no_grad()
def copy_tensors(into: dict[str, torch.Tensor], saved: dict[str, torch.Tensor], folder: Path) -> None:
    """Copy tensors of the same names and shapes.

    Raises:
        UserError: they are of another model.
    """
    if into.keys() != saved.keys():
        odd = sorted(into.keys() ^ saved.keys())[:3]
        raise UserError(f"{folder} belongs to another model: {', '.join(odd)} are in one and not in the other.")
    for name, tensor in into.items():
        if tensor.shape != saved[name].shape:
            raise UserError(
                f"{folder} belongs to another model: {name} is {tuple(saved[name].shape)} there and "
                f"{tuple(tensor.shape)} here."
            )
        tensor.copy_(saved[name])


def save_policy(
    folder: str | Path, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sharded: bool, writes: bool
) -> None:
    """Write the policy (its adapters, where it has some) and the tokenizer as a Hub folder.

    Args:
        sharded: the weights are in pieces; all ranks must call this.
        writes: whether this rank does.
    """
    weights = None
    if sharded:
        # A collective: one parameter at a time meets on the rank that writes.
        weights = whole_state(policy, keep=writes, trained_only=is_peft(policy))
    if writes:
        # On a shared base the other roles' adapters are not the policy's to save.
        only = {"selected_adapters": [policy.active_adapter]} if is_peft(policy) else {}
        policy.save_pretrained(folder, state_dict=weights, **only)
        tokenizer.save_pretrained(folder)
        as_the_umask_says(Path(folder))
