"""How far a run is: told in weights of the compressed matrices, so that a share of the total is a share of the time, about."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lplr.stream.checkpoint import LayerPlan

Progress = Callable[[float, float, str], None]  # (done, total, what): in weights of the compressed matrices


@dataclass
class Meter:
    """Weights of compressed matrices done so far, told to the caller."""

    tell: Progress
    total: float
    done: float = 0.0

    def say(self, text: str) -> None:
        self.tell(self.done, self.total, text)

    def ahead(self, share: float) -> Callable[[float, str], None]:
        """What tells of work that comes first and takes `share` of the time of all the rest: (share done of it, what)."""
        first, extra = self.done, share * self.total
        self.total += extra

        def say(part: float, text: str) -> None:
            self.done = first + part * extra
            self.say(text)

        return say

    def finish(self, plans: list[LayerPlan], text: str) -> None:
        self.done += weights(plans)
        self.say(text)


def weights(plans: list[LayerPlan]) -> float:
    """Entries of the matrices that are compressed."""
    return float(sum(p.shape[0] * p.shape[1] for p in plans if p.format))
