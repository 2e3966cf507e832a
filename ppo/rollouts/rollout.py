"""The rollout: what one round of sampling leaves behind, and all that the update needs.

A rollout holds a few numbers a token (no logits, no hidden states), so every rank can hold the whole of it: it is
gathered once, and minibatches are then the same whatever the number of ranks.
"""

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.files import atomic_path
from ppo_vs_dpo.models.passes.logprobs import Batch, pad_batch
from ppo_vs_dpo.models.sharding.collectives import global_max, several

PROMPT_FIELDS = ("prompt_ids", "prompt_mask")


class Extents(NamedTuple):
    """How far the ``N`` rows of a rollout reach, on the host.

    Attributes:
        prompt: ``(N,)`` real prompt tokens.
        tokens: ``(N,)`` real response tokens.
        width: ``(N,)`` columns up to the last where a token or a value counts.
    """

    prompt: torch.Tensor
    tokens: torch.Tensor
    width: torch.Tensor

    @property
    def total(self) -> torch.Tensor:
        """``(N,)`` real tokens, prompt and response."""
        return self.prompt + self.tokens


@dataclass
class Rollout:
    """``N`` prompts with one response each; prompts of at most ``P`` tokens, responses of at most ``R``.

    Example::

        from datasets import Dataset
        from ppo_vs_dpo import PPOConfig, PPOTrainer, Rollout

        args = PPOConfig(output_dir="out", max_steps=1, rollout_batch_size=4, response_length=8, report_to="none")
        prompts = Dataset.from_dict({"prompt": ["the film", "a story"]})
        trainer = PPOTrainer("my_model", reward_funcs=lambda prompts, completions: [1.0] * len(prompts), args=args,
                             train_dataset=prompts)
        trainer.prepare()
        rollout: Rollout = trainer.collect(0)
        print(rollout.response_ids.shape, rollout.scores)

    Attributes:
        prompt_ids: ``(N, P)`` left-padded.
        prompt_mask: ``(N, P)`` bool, True where real.
        response_ids: ``(N, R)`` right-padded, EOS included.
        mask: ``(N, R)`` bool, True at real response tokens.
        value_mask: ``(N, R)`` bool, where values count; ``mask`` but for the parity conventions (one longer).
        finished: ``(N,)`` bool, the response ended by itself.
        logprobs: ``(N, R)`` of the policy that sampled, at the sampling temperature, as the trainer computes them.
        engine_logprobs: ``(N, R)`` of the same tokens, as the engine that sampled them computed them; ``logprobs``
            where that was the trainer's own loop.
        entropy: ``(N, R)`` of its next-token distributions, nats.
        ref_logprobs: ``(N, R)`` of the reference.
        values: ``(N, R)`` of the states before each token.
        scores: ``(N,)`` as the reward gave them.
        final_scores: ``(N,)`` after bias, clip and the penalty for a missing EOS: what the token rewards carry.
        dense_rewards: ``(N, R)`` what reward functions gave for each token; a part of the scores.
        rewards: ``(N, R)`` KL penalty and final score.
        advantages: ``(N, R)`` whitened where the configuration says so.
        returns: ``(N, R)`` targets of the value model.
    """

    prompt_ids: torch.Tensor
    prompt_mask: torch.Tensor
    response_ids: torch.Tensor
    mask: torch.Tensor
    value_mask: torch.Tensor
    finished: torch.Tensor
    logprobs: torch.Tensor
    engine_logprobs: torch.Tensor
    entropy: torch.Tensor
    ref_logprobs: torch.Tensor
    values: torch.Tensor
    dense_rewards: torch.Tensor
    scores: torch.Tensor
    final_scores: torch.Tensor
    rewards: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor

    def __len__(self) -> int:
        return self.response_ids.shape[0]

    @classmethod
    def empty(cls, prompt_ids: list[list[int]], response_ids: list[list[int]], finished: list[bool], pad_id: int):
        """A rollout with the sampled tokens in place and zeros for everything that is computed from them."""
        batch = pad_batch(prompt_ids, response_ids, pad_id)
        prompt_mask = batch.attention_mask[:, : batch.prompt_length].bool()
        tokens, rows = torch.zeros(batch.response_mask.shape), torch.zeros(len(batch))
        return cls(
            prompt_ids=batch.input_ids[:, : batch.prompt_length],
            prompt_mask=prompt_mask,
            response_ids=batch.response_ids,
            mask=batch.response_mask,
            value_mask=batch.response_mask.clone(),
            finished=torch.tensor(finished),
            scores=rows.clone(),
            final_scores=rows.clone(),
            **{name: tokens.clone() for name in TOKEN_FLOATS},
        )

    def fields(self) -> dict[str, torch.Tensor]:
        """Its tensors by name."""
        return {name: getattr(self, name) for name in FIELDS}

    @functools.cached_property
    def extents(self) -> "Extents":
        """How far its rows reach, on the host: one copy, and cutting it up waits for no device afterwards."""
        columns = torch.arange(1, self.mask.shape[1] + 1, device=self.mask.device)
        width = ((self.value_mask | self.mask) * columns).amax(1)
        found = torch.stack([self.prompt_mask.sum(1), self.mask.sum(1), width]).cpu()
        return Extents(*found)

    def to(self, device: torch.device | str) -> "Rollout":
        """The same rollout on another device."""
        moved = Rollout(**{name: value.to(device) for name, value in self.fields().items()})
        if "extents" in self.__dict__:
            moved.__dict__["extents"] = self.extents
        return moved

    def select(self, rows: torch.Tensor | list[int]) -> "Rollout":
        """Some rows, with the columns that are padding in all of them cut off."""
        rows = torch.as_tensor(rows, device="cpu")
        extents = Extents(*(one[rows] for one in self.extents))
        index = rows.to(self.mask.device)
        picked = {name: value[index] for name, value in self.fields().items()}
        # Never narrower than one column: a response may be empty.
        prompt, response = (max(1, int(one.max())) for one in (extents.prompt, extents.width))
        for name, value in picked.items():
            if name in PROMPT_FIELDS:
                picked[name] = value[:, value.shape[1] - prompt :]
            elif value.dim() == 2:
                picked[name] = value[:, :response]
        selected = Rollout(**picked)
        selected.__dict__["extents"] = extents
        return selected

    def batch(self) -> Batch:
        """Prompts and responses side by side, as the models take them."""
        attention_mask = torch.cat([self.prompt_mask, self.mask], dim=1).long()
        on_host = (attention_mask, self.mask)
        if self.mask.device.type != "cpu":
            prompt, response = self.prompt_mask.shape[1], self.mask.shape[1]
            real = torch.arange(response) < self.extents.tokens[:, None]
            shown = torch.arange(prompt) >= prompt - self.extents.prompt[:, None]
            on_host = (torch.cat([shown, real], dim=1).long(), real)
        return Batch(
            input_ids=torch.cat([self.prompt_ids, self.response_ids], dim=1),
            attention_mask=attention_mask,
            position_ids=(attention_mask.cumsum(-1) - 1).clamp_min(0),
            response_ids=self.response_ids,
            response_mask=self.mask,
            prompt_length=self.prompt_ids.shape[1],
            on_host=on_host,
        )

    def lengths(self) -> torch.Tensor:
        """``(N,)`` real response tokens."""
        return self.mask.sum(1)

    def gather(self) -> "Rollout":
        """The rollouts of all ranks, in the order of the global list of prompts; itself on a single rank."""
        if not several():
            return self
        widths = [self.prompt_ids.shape[1], self.response_ids.shape[1]]
        prompt, response = global_max(torch.tensor(widths, device=self.mask.device)).tolist()
        gathered = {}
        for name, value in self.fields().items():
            if name in PROMPT_FIELDS:
                value = torch.nn.functional.pad(value, (prompt - value.shape[1], 0))
            elif value.dim() == 2:
                value = torch.nn.functional.pad(value, (0, response - value.shape[1]))
            # Booleans travel as bytes: not every backend takes them.
            sent = (value.byte() if value.dtype == torch.bool else value).contiguous()
            parts = [torch.empty_like(sent) for _ in range(dist.get_world_size())]
            dist.all_gather(parts, sent)
            # Ranks took turns along the global list of prompts; so do the rows.
            gathered[name] = torch.stack(parts, dim=1).flatten(0, 1).to(value.dtype)
        return Rollout(**gathered)

    def save(self, path: str | Path) -> None:
        """Write all fields as safetensors (no pickle), atomically; `Rollout.load` reads them."""
        from safetensors.torch import save_file

        with atomic_path(path) as temporary:
            save_file({name: value.detach().cpu().contiguous() for name, value in self.fields().items()}, temporary)

    @classmethod
    def load(cls, path: str | Path) -> "Rollout":
        """Read a rollout that `save` wrote.

        Raises:
            UserError: the file is no rollout.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return cls(**load_file(path))
        except (TypeError, SafetensorError, FileNotFoundError) as error:
            raise UserError(f"{path} is not a rollout written by ppo: {error}") from None


TOKEN_FLOATS = (
    "logprobs",
    "engine_logprobs",
    "entropy",
    "ref_logprobs",
    "values",
    "dense_rewards",
    "rewards",
    "advantages",
    "returns",
)
FIELDS = tuple(field.name for field in dataclasses.fields(Rollout))
