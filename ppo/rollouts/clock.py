"""How long the phases of an update take."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass
class Clock:
    """Seconds spent in named phases, and the phase of the moment."""

    seconds: dict[str, float] = field(default_factory=dict)
    now: str = "start"

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """One phase."""
        started, self.now = time.monotonic(), name.rpartition("/")[2]
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started
