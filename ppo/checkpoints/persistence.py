"""How a PPO run is kept: checkpoints with its exact state, going on from one, models as Hub folders."""

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerState
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import rotate_checkpoints

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.models.sharding.deepspeed import whole, whole_state
from ppo_vs_dpo.models.sharding.state import INDEX, load_trained, save_trained
from ppo_vs_dpo.ppo.checkpoints.state import (
    STATE,
    barrier,
    check_settings,
    complete_folder,
    last_checkpoint,
    load_state,
    rng_state,
    save_state,
    set_rng_state,
)
from ppo_vs_dpo.ppo.roles.roles import is_peft
from ppo_vs_dpo.ppo.rollouts.rollout import Rollout

# Settings that make a run what it is: a checkpoint made with others belongs to another run.
IDENTITY = (
    "seed",
    "num_mini_batches",
    "num_ppo_epochs",
    "response_length",
    "kl_estimator",
    "kl_in",
    "parity",
    "optim",
)


class Persistence:
    """The part of `ppo.trainer.PPOTrainer` that writes and reads its state."""

    def settings(self) -> dict[str, Any]:
        """What must be equal for going on from a checkpoint."""
        mine = {name: getattr(self.args, name) for name in IDENTITY}
        return {**mine, "rollout_size": self.rollout_size, "updates": self.num_updates, "prompts": len(self.prompts)}

    def _trained(self) -> dict[str, torch.Tensor]:
        """The trained tensors of policy and value model (tied ones once), and their buffers."""
        named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        named.update((name, b) for name, b in self.model.named_buffers() if b.is_floating_point())
        return named

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any = None) -> None:
        """Write ``checkpoint-N``: the policy as a Hub folder, and the exact state of the run beside it.

        The folder appears under its name only when it is complete, on all ranks.
        """
        root, step = Path(self.args.output_dir), self.state.global_step
        target = root / f"checkpoint-{step}"
        if self.state.best_global_step:
            best = root / f"checkpoint-{self.state.best_global_step}"
            self.state.best_model_checkpoint = str(best) if best == target or best.is_dir() else None
        with complete_folder(target, self.is_world_process_zero()) as folder:
            self.save_model(str(folder), _internal_call=True)
            if not self.args.save_only_model:
                self._save_state(folder)
            if self.args.should_save:
                self._collect_callback_state()
                self.state.save_to_json(str(folder / "trainer_state.json"))
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(target))
        if self.args.should_save:
            rotate_checkpoints(
                str(root), self.args.save_total_limit, best_model_checkpoint=self.state.best_model_checkpoint
            )
        barrier()

    def _collect_callback_state(self) -> None:
        """As the Trainer does: the states of its callbacks travel in ``trainer_state.json``."""
        stateful = [cb for cb in [*self.callback_handler.callbacks, self.control] if isinstance(cb, ExportableState)]
        for callback in stateful:
            name, state = type(callback).__name__, callback.state()
            if isinstance(self.state.stateful_callbacks.get(name), list):
                self.state.stateful_callbacks[name].append(state)
            else:
                self.state.stateful_callbacks[name] = state

    def _save_state(self, folder: Path) -> None:
        state: dict[str, Any] = {
            "settings": self.settings(),
            "scheduler": self.lr_scheduler.state_dict(),
            "kl": self.kl.state_dict(),
            "score_bias": self.score_bias,
            "diagnosis": self.diagnosis.state_dict(),
        }
        if self.is_deepspeed_enabled:
            save_trained(self.model_wrapped, folder, self.args.process_index, self.args.world_size)
        else:
            state["model"] = self._trained()
            state["optimizer"] = self.optimizer.state_dict()
            if self.accelerator.scaler is not None:
                state["scaler"] = self.accelerator.scaler.state_dict()
        if self.args.sync_ref_model:
            state["reference"] = whole_state(self.reference.module, keep=self.args.should_save)
        if self.args.should_save:
            save_state(folder, STATE, state)
        save_state(folder, f"rng_{self.args.process_index}", rng_state())

    def resume(self, checkpoint: str | bool | None) -> None:
        """Go on from a checkpoint: afterwards everything is as it was when it was written.

        Args:
            checkpoint: a folder; True for the newest in ``output_dir``, where there is one.

        Raises:
            UserError: no such checkpoint, a torn one, or one of another run.
        """
        if checkpoint is True:
            checkpoint = last_checkpoint(self.args.output_dir)
        if not checkpoint:
            return
        folder = Path(checkpoint)
        if not (folder / f"{STATE}.json").is_file():
            raise UserError(f"{folder} is not a checkpoint of ppo that can be resumed: it has no {STATE}.json.")
        state = load_state(folder, STATE)
        if (folder / INDEX).is_file() != self.is_deepspeed_enabled:
            here, there = ("with", "without") if self.is_deepspeed_enabled else ("without", "with")
            raise UserError(
                f"{folder} was written {there} DeepSpeed and this run is {here} it. Set deepspeed as it was (stages "
                f"2 and 3, and any number of processes, go on from each other)."
            )
        check_settings(state["settings"], self.settings(), str(folder))
        self.state = TrainerState.load_from_json(str(folder / "trainer_state.json"))
        self.state.compute_steps(self.args, self.num_updates)
        self._load_callback_state()
        if self.is_deepspeed_enabled:
            load_trained(self.model_wrapped, folder)
        else:
            self._copy(self._trained(), state["model"], folder)
            self.optimizer.load_state_dict(state["optimizer"])
            if "scaler" in state and self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(state["scaler"])
        if "reference" in state:
            mine = dict(self.reference.module.named_parameters())
            with whole(mine.values()):
                self._copy(mine, {name: state["reference"][name] for name in mine}, folder)
        self.lr_scheduler.load_state_dict(state["scheduler"])
        self.kl.load_state_dict(state["kl"])
        self.score_bias = state["score_bias"]
        self.diagnosis.load_state_dict(state["diagnosis"])
        own = folder / f"rng_{self.args.process_index}.json"
        if own.is_file():
            # Fewer files than ranks: the run was made on fewer. Sampling does not use these generators.
            set_rng_state(load_state(folder, own.stem))

    @staticmethod
    @torch.no_grad()
    def _copy(into: dict[str, torch.Tensor], saved: dict[str, torch.Tensor], folder: Path) -> None:
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

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the policy (its adapters, where it has some) and the tokenizer as a Hub folder."""
        output_dir = output_dir or self.args.output_dir
        weights = None
        if self.is_deepspeed_enabled:
            # A collective: one parameter at a time meets on the rank that writes.
            weights = whole_state(self.policy, keep=self.args.should_save, trained_only=is_peft(self.policy))
        if self.args.should_save:
            # On a shared base the other roles' adapters are not the policy's to save.
            only = {"selected_adapters": [self.policy.active_adapter]} if is_peft(self.policy) else {}
            self.policy.save_pretrained(output_dir, state_dict=weights, **only)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def load_best(self) -> None:
        """Put the weights of the best checkpoint (by ``metric_for_best_model``) into policy and value model."""
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}"
        if not self.state.best_global_step or not folder.is_dir():
            return
        if self.is_deepspeed_enabled:
            load_trained(self.model_wrapped, folder, optimizer_too=False)
        else:
            self._copy(self._trained(), load_state(folder, STATE)["model"], folder)

    def save_rollout(self, rollout: Rollout, why: str) -> Path:
        """Keep a rollout for inspection: tensors (`Rollout.load` reads them) and the texts; returns the folder."""
        from ppo_vs_dpo.artifacts.files import write_jsonl

        folder = Path(self.args.output_dir) / f"rollout-{why}-update-{self.state.global_step + 1}"
        if self.is_world_process_zero():
            folder.mkdir(parents=True, exist_ok=True)
            rollout.save(folder / "rollout.safetensors")
            decode = self.processing_class.decode
            write_jsonl(
                folder / "texts.jsonl",
                (
                    {
                        "prompt": decode(rollout.prompt_ids[row][rollout.prompt_mask[row]]),
                        "completion": decode(rollout.response_ids[row][rollout.mask[row]]),
                        "score": float(rollout.scores[row]),
                        "finished": bool(rollout.finished[row]),
                    }
                    for row in range(len(rollout))
                ),
            )
        return folder
