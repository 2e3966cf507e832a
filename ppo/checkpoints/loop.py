"""What a run is at one moment, beside its weights and their optimizer: exactly what a checkpoint holds of it."""

from dataclasses import dataclass, field, fields
from typing import Any

from transformers import TrainerState

from ppo_vs_dpo.ppo.checkpoints.state import RandomStreams
from ppo_vs_dpo.ppo.config import PPOConfig
from ppo_vs_dpo.ppo.updates.kl_controllers import AdaptiveKL, FixedKL
from ppo_vs_dpo.ppo.watching.diagnosis import Diagnosis

PROGRESS = "trainer_state.json"


@dataclass
class LoopState:
    """Everything that changes from update to update. There is no other such place in the trainer.

    Attributes:
        progress: step, epoch, log, best so far, cost: transformers' own, in ``trainer_state.json``.
        kl: the controller, with the coefficient of the moment.
        score_bias: subtracted from scores; ``None`` until it has been measured.
        diagnosis: the figures that trends are judged by, and what has been said.
        random: the random number generators of this rank, in a file a rank.
    """

    progress: TrainerState
    kl: FixedKL
    score_bias: float | None
    diagnosis: Diagnosis
    random: RandomStreams = field(default_factory=RandomStreams)

    @classmethod
    def start(cls, args: PPOConfig) -> "LoopState":
        """That of a run which has not begun."""
        adaptive = args.kl_controller == "adaptive"
        kl = AdaptiveKL(args.kl_coef, args.kl_target, args.kl_horizon) if adaptive else FixedKL(args.kl_coef)
        bias = None if args.score_bias == "auto" else float(args.score_bias)
        return cls(TrainerState(), kl, bias, Diagnosis())

    @property
    def step(self) -> int:
        """Updates done."""
        return self.progress.global_step

    def state_dict(self) -> dict[str, Any]:
        """What all ranks have in common, but for the progress: an entry for each field."""
        return {
            one.name: value.state_dict() if hasattr(value, "state_dict") else value
            for one in fields(self)
            if one.name not in ("progress", "random")
            for value in (getattr(self, one.name),)
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        for name in self.state_dict():
            value = getattr(self, name)
            if hasattr(value, "load_state_dict"):
                value.load_state_dict(state[name])
            else:
                setattr(self, name, state[name])
