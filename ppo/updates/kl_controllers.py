"""Step 8: what becomes of the KL coefficient from one update to the next. A checkpoint holds it."""


class FixedKL:
    """A constant KL coefficient (Stiennon 2020, InstructGPT, N+ and nearly everyone since)."""

    def __init__(self, coef: float):
        self.coef = coef

    def update(self, kl: float, n: int) -> None:
        """Nothing to do."""

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from a checkpoint."""
        self.coef = state["coef"]


class AdaptiveKL(FixedKL):
    """A coefficient that steers the KL towards a target (Ziegler et al. 2019, section 2.2).

    ``coef <- coef (1 + clip(kl / target - 1, -0.2, 0.2) n / horizon)``.

    Args:
        init: first coefficient.
        target: sequence KL in nats.
        horizon: episodes over which the coefficient may change by 20 %.
    """

    def __init__(self, init: float, target: float, horizon: float):
        super().__init__(init)
        if target <= 0 or horizon <= 0:
            raise ValueError(f"kl_target ({target}) and kl_horizon ({horizon}) must be positive.")
        self.target, self.horizon = target, horizon

    def update(self, kl: float, n: int) -> None:
        """Account for ``n`` episodes with a mean sequence KL of ``kl`` nats."""
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.coef *= 1 + error * n / self.horizon
