"""How many head entries and draws each token gets under a budget of bytes.

An entry i of the tail that is drawn with probability pi_i adds p_i^2 d_i^2 (1 / pi_i - 1) to the squared error of the
gradient, d_i being the student's relative error there. For one d and so many entries in all, the least error has
pi_i = min(1, p_i / t) with one threshold t for all tokens: entries above t are the head, and a tail of mass R gets
R / t draws, each of which stands for mass t. So the only unknown is t, one number a sample; it is found by bisection,
from the sample alone, so that the labels of a sample depend neither on the layout nor on what came before.

Shape letters: B samples, S tokens, K candidates for the head.
"""

from dataclasses import dataclass

import numpy as np

NEGLIGIBLE_TAIL = 2.0**-10
"""A tail of less mass gets no draw where entries are rationed: at most twice this is missing from the gradient (L1)."""
SMALLEST_THRESHOLD = 1e-6
HALVINGS = 13
"""Of the interval of log t, 14 nats: t is known to 0.2 % of itself, and so is the size."""


@dataclass(frozen=True)
class EntryBits:
    """What a token's label costs."""

    head: int
    draw: int
    token: int
    """Whatever the token's label has besides entries."""
    any_draws: int = 0
    """What it has besides where there are draws."""


@dataclass(frozen=True)
class Shares:
    """What each token gets."""

    head_BS: np.ndarray
    """int64 number of candidates sent exactly."""
    draws_BS: np.ndarray
    """int64 number of draws from what is behind them."""

    def bits(self, cost: EntryBits) -> np.ndarray:
        """int64 [B, S]: size of each token's label."""
        bits_BS: np.ndarray = self.head_BS * cost.head + self.draws_BS * cost.draw + cost.token
        bits_BS += (self.draws_BS > 0) * cost.any_draws
        return bits_BS


def everything(p_BSK: np.ndarray, drawn_BS: np.ndarray) -> Shares:
    """All candidates that there are, and all draws."""
    return Shares(np.count_nonzero(p_BSK > 0, axis=-1), drawn_BS.astype(np.int64))


def share_out(p_BSK: np.ndarray, drawn_BS: np.ndarray, most_draws: int, cost: EntryBits, budget_bytes: float) -> Shares:
    """The entries of each token, so that each sample keeps to budget_bytes a token on average.

    p_BSK:    float32 probabilities of the candidates, falling
    drawn_BS: how many draws there are from what is behind all candidates; 0 also where nothing is behind them
    most_draws: of any token, 0 where labels have none
    returns:  shares that fill the budget as far as there are entries worth sending; where even one entry a token is too
              much, that is what they are
    """
    samples, length, _ = p_BSK.shape
    problem = _Tokens(p_BSK, drawn_BS, most_draws)
    budget = budget_bytes * 8 * length
    low, high = np.full(samples, np.log(SMALLEST_THRESHOLD)), np.zeros(samples)  # of log t; high keeps the budget
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        fits = problem.shares(np.exp(middle)).bits(cost).sum(axis=1) <= budget
        low, high = np.where(fits, low, middle), np.where(fits, middle, high)
    return _fill(problem.shares(np.exp(high)), problem.shares(np.exp(low)), cost, budget)


def _fill(within: Shares, beyond: Shares, cost: EntryBits, budget: float) -> Shares:
    """The first tokens get what a hair's breadth of threshold more would give them, as long as there is room."""
    bits_BS = within.bits(cost)
    spent_BS = bits_BS.sum(axis=1, keepdims=True) + np.cumsum(beyond.bits(cost) - bits_BS, axis=1)
    more_BS = np.logical_and.accumulate(spent_BS <= budget, axis=1)
    return Shares(
        np.where(more_BS, beyond.head_BS, within.head_BS), np.where(more_BS, beyond.draws_BS, within.draws_BS)
    )


class _Tokens:
    """What the number of entries of each token follows from, at any threshold."""

    def __init__(self, p_BSK: np.ndarray, drawn_BS: np.ndarray, most_draws: int):
        samples, length, entries = p_BSK.shape
        self.p_KBS = np.ascontiguousarray(np.moveaxis(p_BSK, -1, 0))
        tail = np.ones((entries + 1, samples, length), np.float32)
        np.subtract(1.0, np.cumsum(self.p_KBS, axis=0, dtype=np.float32), out=tail[1:])
        self.tail = np.maximum(tail, 0.0)
        """[K + 1, B, S]: mass behind so many candidates."""
        with np.errstate(divide="ignore"):
            steps = self.tail[:-1] / np.maximum(self.p_KBS, np.float32(1e-30))
        self.joins_KBS = np.arange(entries, dtype=np.float32)[:, None, None] + steps
        """Number of entries from which on a candidate is likelier than what a draw would stand for."""
        whole_BS = (drawn_BS == 0) & (self.tail[-1] < NEGLIGIBLE_TAIL)
        self.drawn_BS = np.where(whole_BS, 1e6, drawn_BS).astype(
            np.float32
        )  # nothing behind the candidates is never asked for
        self.can_draw_BS = (self.drawn_BS > 0) & (most_draws > 0)
        self.most_draws = most_draws

    def shares(self, threshold_B: np.ndarray) -> Shares:
        threshold = threshold_B.astype(np.float32)[:, None]
        head = _count(self.p_KBS >= threshold)
        head = np.where(self.can_draw_BS, head, np.maximum(head, min(1, len(self.p_KBS))))
        tail = self.behind(head)
        draws = np.maximum(np.rint(tail / threshold), np.float32(1.0))
        total = np.where(self.can_draw_BS, head + draws, head).astype(np.float32)
        joined = _count(self.joins_KBS <= total)
        head = np.where(self.can_draw_BS, np.maximum(head, np.minimum(joined, total - 1)), head).astype(np.int64)
        tail = self.behind(head)
        draws = np.minimum(total - head, self.limit(tail))
        return Shares(head, np.where(tail < NEGLIGIBLE_TAIL, 0, draws).astype(np.int64))

    def behind(self, head_BS: np.ndarray) -> np.ndarray:
        """float32 mass behind so many candidates."""
        mass: np.ndarray = np.take_along_axis(self.tail, head_BS[None], axis=0)[0]
        return mass

    def limit(self, tail_BS: np.ndarray) -> np.ndarray:
        """With more draws, more would have to come from behind all candidates than were drawn there."""
        most_BS = np.floor(self.drawn_BS * tail_BS / np.maximum(self.tail[-1], np.float32(1e-9)))
        result: np.ndarray = np.where(self.can_draw_BS, np.minimum(most_BS, self.most_draws), 0.0)
        return result


def _count(mask_KBS: np.ndarray) -> np.ndarray:
    """int64 [B, S]: how many are set; three times as fast as numpy's own counting along the first axis."""
    counts_BS: np.ndarray = np.add.reduce(mask_KBS.view(np.uint8), axis=0, dtype=np.uint16).astype(np.int64)
    return counts_BS
