"""How long the phases of an update take."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from ppo_vs_dpo.artifacts.resources import part

# Of a stage's account of its time (`artifacts.resources.PARTS`).
PART = {"generate": "sampling", "score": "scoring", "forward": "scoring", "train": "training"}


@dataclass
class Clock:
    """Seconds spent in named phases, and the phase of the moment."""

    seconds: dict[str, float] = field(default_factory=dict)
    now: str = "start"

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """One phase."""
        started, self.now = time.monotonic(), name.rpartition("/")[2]
        with part(PART[self.now]):
            yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started
