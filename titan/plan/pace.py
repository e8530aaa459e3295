"""Told time: what a paced device, a CPU rank standing in for another device, takes for its passes."""

from dataclasses import dataclass

from titan.plan.schedule import Action, Pass


@dataclass(frozen=True)
class Pace:
    """Seconds of one rank's passes of one micro-batch, by chunk, and of what ends its step."""

    forward_s: tuple[float, ...]
    backward_s: tuple[float, ...]
    update_s: float = 0.0
    """Gradient exchange and optimizer."""

    def pass_s(self, action: Action) -> float:
        """Seconds of one pass."""
        return (self.forward_s if action.kind is Pass.FORWARD else self.backward_s)[action.chunk]
