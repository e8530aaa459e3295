"""How far a student trusts its own tail when it learns from drawn labels: the control of titan.ops.sparse."""

from dataclasses import dataclass

from titan.distill.lead import SMOOTHING


@dataclass
class ControlTracker:
    """Running sums of w r and w r^2 over the draws of earlier steps (titan.ops.sparse).

    r is how many times as likely as its teacher the student holds a drawn entry. Only earlier steps: a control that
    depended on a step's own draws would bias it.
    """

    product: float = 0.0
    square: float = 0.0

    def add(self, product: float, square: float) -> None:
        """Of one step, over all tokens; zeros where it had no draws."""
        self.product = SMOOTHING * self.product + (1 - SMOOTHING) * product
        self.square = SMOOTHING * self.square + (1 - SMOOTHING) * square

    @property
    def control(self) -> float:
        """The multiple with the least expected error, from 0 (a far student) to 1 (a near one); 1 before any draw."""
        return min(1.0, self.product / self.square) if self.square > 0 else 1.0
