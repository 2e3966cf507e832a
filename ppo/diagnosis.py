"""A diagnosis in words: what is seen, why it usually happens, what to try."""

from typing import Any


class Diagnosis:
    """Watches the figures of a run."""

    def observe(self, update: int, metrics: dict[str, float]) -> list[str]:
        return []

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass
