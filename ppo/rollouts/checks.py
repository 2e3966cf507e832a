"""What must hold of a rollout while a run goes on; where it does not, the run stops and the rollout is kept."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.artifacts.files import write_jsonl
from ppo_vs_dpo.models.devices import computes_in_tf32
from ppo_vs_dpo.models.sharding.collectives import any_rank
from ppo_vs_dpo.ppo.algorithm import masked_mean
from ppo_vs_dpo.ppo.config import PPOConfig
from ppo_vs_dpo.ppo.rollouts.rollout import Rollout

logger = logging.get_logger(__name__)


class Unusable(UserError):
    """A rollout that training cannot go on with. Raised without the trainer's folders; `keep` writes it down.

    Args:
        rollout: of this rank or of all.
        kind: one word, for the folder's name.
        say: the message, given where the rollout is kept.
    """

    def __init__(self, rollout: Rollout, kind: str, say: Callable[[Any], str]):
        super().__init__(say("no file"))
        self.rollout, self.kind, self.say = rollout, kind, say

    def keep(self, root: Path, number: int, tokenizer: PreTrainedTokenizerBase, writes: bool) -> str:
        """Keep the rollout of update ``number``: tensors (`Rollout.load` reads them) and texts; gives the message."""
        rollout, folder = self.rollout, root / f"rollout-{self.kind}-update-{number}"
        if writes:
            folder.mkdir(parents=True, exist_ok=True)
            rollout.save(folder / "rollout.safetensors")
            texts = (
                {
                    "prompt": tokenizer.decode(rollout.prompt_ids[row][rollout.prompt_mask[row]]),
                    "completion": tokenizer.decode(rollout.response_ids[row][rollout.mask[row]]),
                    "score": float(rollout.scores[row]),
                    "finished": bool(rollout.finished[row]),
                }
                for row in range(len(rollout))
            )
            write_jsonl(folder / "texts.jsonl", texts)
        return self.say(folder)


def non_finite(rollout: Rollout, what: str, args: PPOConfig, sharded: bool) -> Unusable:
    """A loss or gradient norm that is not a finite number.

    ``sharded``: DeepSpeed has stepped already.
    """
    kept = "The weights are those before it"
    if sharded:
        kept = "DeepSpeed's step has taken it into the weights (the last checkpoint is from before)"
    return Unusable(
        rollout,
        "nonfinite",
        lambda where: (
            f"{what} is not finite. {kept}, and the rollout is in {where}. "
            f"Usual causes: a learning rate too high ({args.learning_rate:g}), fp16 overflow (use bf16), "
            f"rewards of huge size (score_clip)."
        ),
    )


def rounding(dtype: torch.dtype) -> float:
    """The mean |log ratio| of two passes of one policy over the same tokens that rounding explains, in nats.

    Batches of other shapes take other kernels, whose sums round otherwise. The mantissas: 24 bits in fp32, 11 in tf32
    and float16, 8 in bfloat16. Dropout of 0.1 gives more than each of these bounds.
    """
    if dtype in (torch.float32, torch.float64):
        return 5e-3 if computes_in_tf32() else 1e-4
    return 3e-2 if dtype == torch.bfloat16 else 5e-3


def check_first_kl(rollout: Rollout, dtype: torch.dtype, is_start: bool) -> None:
    """Stop when the reference is not what the policy starts from: before the first step their KL must be 0.

    A reference that was passed may be another model on purpose (a run that goes on from a trained policy): then the
    distance is said, once.

    ``is_start``: the reference was made from the policy.

    Raises:
        Unusable: it is more than rounding, and the reference was made from the policy.
    """
    seen = float(masked_mean((rollout.logprobs - rollout.ref_logprobs).abs(), rollout.mask))
    allowed = rounding(dtype)
    # Written so that NaN stops, too.
    if seen <= allowed:
        return
    if not is_start:
        kl = float(masked_mean(rollout.logprobs - rollout.ref_logprobs, rollout.mask))
        logger.warning(
            "ref_model is another model than the policy starts from: before the first step their log-probabilities "
            f"differ by {seen:.2g} nats a token (KL {kl:.2g}; rounding: {allowed:g}), and the penalty pulls towards "
            f"it from the first update on. If the policy itself was meant, leave ref_model out."
        )
        return
    raise Unusable(
        rollout,
        "kl",
        lambda where: (
            f"before the first step the log-probabilities of policy and reference differ by {seen:.2g} nats a token "
            f"(allowed {allowed:g}), and the policy starts from the reference. Usual causes: adapters that do not "
            f"start at 0 (init_lora_weights), dropout that is still on, a model that answers differently in training "
            f"and evaluation. The rollout is in {where}. Pass the reference that is meant as ref_model; "
            f"check_first_ratio=false goes on regardless."
        ),
    )


def check_first_ratio(rollout: Rollout, deviation: dict[str, float], number: int, dtype: torch.dtype) -> None:
    """Stop when the policy that trains is not the policy that sampled (N+: ratio exactly 1 on the first pass).

    ``deviation`` is `ppo.updates.update.Update.deviation`.

    Raises:
        Unusable: it is more than rounding.
    """
    seen, allowed = deviation["mean"], rounding(dtype)
    # Written so that NaN stops, too.
    if seen <= allowed:
        return
    raise Unusable(
        rollout,
        "ratio",
        lambda where: (
            f"on the first pass over the rollout of update {number} the log ratio is off by {seen:.2g} on average "
            f"(allowed {allowed:g}), and the ratio must be 1 there. The policy that trains is not the one that "
            f"sampled. Usual causes: dropout that is still on, a model that answers differently in training and "
            f"evaluation. The rollout is in {where}; check_first_ratio=false goes on regardless."
        ),
    )


def check_agreement(rollout: Rollout, number: int, dtype: torch.dtype, device: torch.device) -> None:
    """Stop when an engine with weights of its own samples from another policy than the one that trains.

    Rounding gives mean differences below 1e-3 nats in fp32, and of a few hundredths in bf16.

    Raises:
        Unusable: it is more than rounding, on any rank.
    """
    allowed = 1e-2 if dtype in (torch.float32, torch.float64) else 0.2
    # Of this rank's share: a mean over all would dilute what one engine does wrong.
    distance = torch.where(rollout.mask, rollout.logprobs - rollout.engine_logprobs, 0).abs()
    seen = float(distance.sum() / rollout.mask.sum().clamp_min(1))
    # Written so that NaN stops, too; and all ranks together.
    if not any_rank(not seen <= allowed, device):
        return
    raise Unusable(
        rollout,
        "engine",
        lambda where: (
            f"the log-probabilities that the engine sampled update {number} with differ from the trainer's by "
            f"{seen:.2g} nats on average (allowed {allowed:g}): more than rounding. Usual causes: weights that did "
            f"not arrive, or an architecture that the engine computes differently. The rollout is in {where}. "
            f"Use ppo.generation_engine=transformers; check_first_ratio=false goes on regardless."
        ),
    )
