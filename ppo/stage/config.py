"""The stage's own keys. Apart from `ppo.config`, so that the pipeline can read them without importing transformers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ppo_vs_dpo.artifacts.errors import UserError
from ppo_vs_dpo.models.loading.config import LoraSettings

# The parts of the reward that are no functions: the run's own reward model, and ``ppo.judge``.
MODEL, JUDGE = "reward_model", "judge"


def trains_values(section: Mapping[str, Any]) -> bool:
    """Whether a ``ppo`` section trains a value model: `ppo.config.PPOConfig.has_critic`, for who cannot import it."""
    return section.get("advantage") in (None, "gae") and section.get("loss") in (None, "ppo")


def trained_share(section: Mapping[str, Any]) -> float:
    """Share of a rollout's responses that an update trains on: online DPO takes two of each prompt's."""
    return 1.0 if section.get("loss") in (None, "ppo") else 2.0 / max(2, int(section.get("samples_per_prompt") or 2))


def reward_models(config: Mapping[str, Any]) -> int:
    """How many reward models PPO holds, by a run's configuration: none, one, or an ensemble's."""
    section, model = config.get("ppo") or {}, config.get("reward_model") or {}
    parts = section.get("reward") or MODEL
    parts = [parts] if isinstance(parts, str) else list(parts)
    if section.get("gold_reward") or MODEL not in parts:
        return 0
    return 1 if model.get("average_weights") else int(model.get("ensemble") or 1)


@dataclass
class PPOStage:
    """Keys of the ``ppo`` section that belong to the stage, not to `ppo.config.PPOConfig`; each has its comment in
    ``configs/ppo/default.yaml``.
    """

    lora: LoraSettings | None = None
    shared_base: bool = False
    validation_prompts: int = 128
    value_from: str = "reward_model"
    value_path: str | None = None
    reward: Any = "reward_model"
    judge: dict[str, Any] | None = None
    gold_reward: bool = False

    @property
    def rewards(self) -> list[str]:
        """The parts of the reward by name; the reward model is ``reward_model``.

        Raises:
            UserError: something that is neither.
        """
        parts = self.reward if isinstance(self.reward, list) else [self.reward]
        if not parts or not all(isinstance(one, str) and (one in (MODEL, JUDGE) or ":" in one) for one in parts):
            raise UserError(
                f"ppo.reward is {self.reward!r}; it must be {MODEL}, {JUDGE}, my_file.py:function, or a list of them, "
                f"[{MODEL}, my_file.py:function]."
            )
        if len(set(parts)) < len(parts):
            raise UserError(f"ppo.reward is {self.reward!r}: a part stands there twice.")
        if self.gold_reward and parts != [MODEL]:
            raise UserError("ppo.gold_reward and ppo.reward: give one; the gold reward stands in place of all others.")
        return parts

    @property
    def uses_model(self) -> bool:
        """Whether the run's reward model has a part in the reward."""
        return not self.gold_reward and MODEL in self.rewards

    @property
    def functions(self) -> list[str]:
        """The functions (and the judge) among the parts, in their order."""
        return [one for one in self.rewards if one != MODEL]

    def problems(self) -> list[str]:
        """What cannot be meant, a sentence each; the command asks before the first stage starts."""
        lora = self.lora if isinstance(self.lora, dict) else vars(self.lora or LoraSettings())
        if lora.get("dropout"):
            return [
                f"ppo.lora.dropout is {lora['dropout']}, and PPO trains without dropout: with it the policy that "
                f"trains is not the one that sampled (the ratio of the first pass must be 1). Set it to 0."
            ]
        if self.value_path is not None and self.shared_base:
            return ["ppo.value_path is a model of its own, and ppo.shared_base holds all four on one base: drop one."]
        try:
            self.rewards  # noqa: B018
        except UserError as error:
            return [str(error)]
        return []
