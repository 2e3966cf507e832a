"""Settings of the DPO stage; every other key of its section is a field of ``trl.DPOConfig``."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.models.loading.config import LoraSettings

if TYPE_CHECKING:
    from trl import DPOConfig


@dataclass
class DPOStage:
    """The stage's own keys; each has its comment in ``configs/dpo/default.yaml``."""

    reference_path: str | None = None
    use_soft_labels: bool = True
    lora: LoraSettings | None = None
    merge_lora: bool = True
    test_pairs: int | None = None


def smoothed_loss(passed: dict[str, Any]) -> dict[str, Any]:
    """Conservative DPO (Mitchell 2023): ``label_smoothing`` with the sigmoid loss.

    TRL applies ``label_smoothing`` to some losses and ignores it for ``sigmoid``. With L+ = -log sigma(beta h) for the
    pair as labelled and L- for the pair swapped, cDPO is (1 - e) L+ + e L-, and TRL's robust loss is
    ((1 - e) L+ - e L-) / (1 - 2 e); so cDPO = 2 (1 - e) L+ - (1 - 2 e) robust, a weighted sum that TRL can train.

    Raises:
        UserError: a smoothing outside of [0, 0.5), weights that leave no room for it, or a beta that is not positive.
    """
    passed = dict(passed)
    if passed.get("beta", 0.1) <= 0:
        raise UserError(f"dpo.beta is {passed['beta']}; it must be above 0 (0 would ignore the pairs).")
    smoothing = passed.get("label_smoothing") or 0.0
    losses = passed.get("loss_type") or ["sigmoid"]
    losses = [losses] if isinstance(losses, str) else list(losses)
    if smoothing == 0.0:
        return passed
    if not 0.0 <= smoothing < 0.5:
        raise UserError(f"dpo.label_smoothing is {smoothing}; it must be in [0, 0.5), the share of flipped labels.")
    uses_it = {"sigmoid", "robust", "exo_pair", "aot", "aot_unpaired"}
    if not uses_it & set(losses):
        raise UserError(
            f"dpo.label_smoothing has no effect on the loss {', '.join(losses)}; "
            f"it belongs to {', '.join(sorted(uses_it))}."
        )
    if "sigmoid" not in losses:
        return passed
    if losses != ["sigmoid"]:
        raise UserError(
            "dpo.label_smoothing with several losses is ambiguous: use loss_type=sigmoid alone, or robust."
        )
    passed["loss_type"] = ["sigmoid", "robust"]
    passed["loss_weights"] = [2 * (1 - smoothing), -(1 - 2 * smoothing)]
    return passed


def prepare_soft_labels(args: "DPOConfig") -> None:
    """Set what soft labels need: reference log-probabilities beforehand.

    Raises:
        UserError: a loss that has no place for them.
    """
    plain = list(args.loss_type) == ["sigmoid"] and args.f_divergence_type == "reverse_kl"
    if not plain or args.use_weighting or args.ld_alpha is not None:
        raise UserError(
            f"the pairs have soft labels, and dpo's loss {', '.join(args.loss_type)} (or label_smoothing, "
            f"f_divergence_type, use_weighting, ld_alpha) has no place for them. Use the sigmoid loss alone, or set "
            f"dpo.use_soft_labels=false to take every pair for certain."
        )
    args.precompute_ref_log_probs = True
