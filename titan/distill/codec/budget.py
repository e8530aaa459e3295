"""From which probability on entries are the head, and what a draw stands for, under a budget of bytes.

An entry i of the tail that is drawn with probability pi_i adds p_i^2 d_i^2 (1 / pi_i - 1) to the squared error of the
gradient, d_i being the student's relative error there. For one d and so many entries in all, the least error has
pi_i = min(1, p_i / t) with one threshold t for all tokens: entries above t are the head, and a tail of mass R gets
about R / t draws, each of which stands for mass t. So the only unknown is t, one number a sample; it is found by
bisection, from the sample alone, so that the labels of a sample depend neither on the layout nor on what came before.
It does not depend on which draws a threshold would give, only on how many it gives on average: or they would be biased.

Shape letters: B samples, S tokens, K candidates for the head.
"""

import math
from dataclasses import dataclass

import numpy as np

ANYWHERE = (-14.0, 0.0)
"""Logarithms of all thresholds."""
PRECISION = 0.004
"""Nats: a threshold is known to 0.4 % of itself, and so is the size."""


@dataclass(frozen=True)
class EntryBits:
    """What a token's label costs."""

    head: float
    draw: float | np.ndarray
    """One number, or one a sample; 0 where labels have no draws."""
    token: float
    """Whatever the token's label has besides entries."""
    any_draws: float = 0.0
    """What it has besides where there are draws."""


class Tokens:
    """Candidates of some samples, and how many entries any threshold gives."""

    def __init__(self, p_BSK: np.ndarray, behind_BS: np.ndarray):
        """p: float32 probabilities of the candidates, falling; behind: mass behind all of them."""
        self.p_KBS = np.ascontiguousarray(np.moveaxis(p_BSK, -1, 0))
        self.behind_BS = behind_BS

    def bits(self, threshold_B: np.ndarray, cost: EntryBits) -> np.ndarray:
        """float64 [B]: mean size of the labels that a threshold gives."""
        threshold = threshold_B.astype(np.float32)[:, None]
        is_head_KBS = self.p_KBS >= threshold
        head_BS = _count(is_head_KBS)
        bits_BS = head_BS * cost.head + cost.token
        if np.any(cost.draw):
            tail_BS = self.behind_BS + np.where(is_head_KBS, np.float32(0.0), self.p_KBS).sum(axis=0)
            draws_BS = tail_BS / threshold
            bits_BS += draws_BS * np.reshape(cost.draw, (-1, 1)) + (1.0 - np.exp(-draws_BS)) * cost.any_draws
        else:
            bits_BS += (head_BS == 0) * cost.head  # the likeliest is always sent
        total_B: np.ndarray = bits_BS.sum(axis=1)
        return total_B


def threshold_of(
    tokens: Tokens, cost: EntryBits, budget_bits: float, log_low: np.ndarray | float = ANYWHERE[0],
    log_high: np.ndarray | float = ANYWHERE[1], precision: float = PRECISION,
) -> np.ndarray:  # fmt: skip
    """float64 [B]: the least threshold between two with which labels take at most so many bits a sample."""
    samples = tokens.p_KBS.shape[1]
    low, high = np.full(samples, log_low), np.full(samples, log_high)  # high keeps the budget, or nothing does
    for _ in range(math.ceil(math.log2(float((high - low).max()) / precision))):
        middle = (low + high) / 2
        fits = tokens.bits(np.exp(middle), cost) <= budget_bits
        low, high = np.where(fits, low, middle), np.where(fits, middle, high)
    threshold_B: np.ndarray = np.exp(high)
    return threshold_B


def _count(mask_KBS: np.ndarray) -> np.ndarray:
    """int64 [B, S]: how many are set; three times as fast as numpy's own counting along the first axis."""
    counts_BS: np.ndarray = np.add.reduce(mask_KBS.view(np.uint8), axis=0, dtype=np.uint16).astype(np.int64)
    return counts_BS
