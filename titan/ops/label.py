"""What a teacher says about tokens, and what a loss is told of it.

Shape letters: N tokens, K head entries, M tail draws.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from torch import Tensor

MASS_TOLERANCE = 1e-3
"""By how much probabilities may miss one: labels are rounded on their way."""


@dataclass(frozen=True)
class SparseLabels:
    """Some entries of the teacher's distribution of each token, at the temperature of the loss."""

    ids_NK: Tensor
    """int64 vocabulary ids; with a bucket distinct within a row."""
    log_prob_NK: Tensor
    """float32 log-probabilities; -inf where a token has fewer entries."""
    tail: Literal["bucket", "none"] = "bucket"
    """`bucket`: what the head leaves is one more class. `none`: the entries are all there is and sum to one, as a
    renormalised top k (biased), or ids drawn from the whole distribution with their shares (unbiased, noisy)."""
    draw_ids_NM: Tensor | None = None
    """int64 ids drawn from the tail."""
    draw_log_prob_NM: Tensor | None = None
    """float32 log-probabilities of the draws in the whole distribution; -inf where a token has fewer."""
    shrink: float | Tensor = 1.0
    """How far draws correct the bucket, a number or one a token [N]: 1 is unbiased, less is less noisy."""
    control: float = 1.0
    """beta: the multiple of the student's own tail against which draws are held. Any that does not depend on these
    draws leaves the gradient unbiased; titan.ops.sparse says which is least noisy. A far student wants less."""
    draw_mass_N: Tensor | None = None
    """float32: what each draw of a token stands for. An entry p is among the draws p over this many times on average;
    0 for a token that nothing was drawn for."""

    def ids(self) -> list[Tensor]:
        """Head and draws, as the loss looks at them."""
        return [self.ids_NK] if self.draw_ids_NM is None else [self.ids_NK, self.draw_ids_NM]

    def log_probs(self) -> list[Tensor]:
        """Of the same."""
        return [self.log_prob_NK] if self.draw_log_prob_NM is None else [self.log_prob_NK, self.draw_log_prob_NM]

    def rows(self, part: slice) -> Self:
        """Labels of some of the tokens."""

        def cut(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[part]

        return replace(
            self,
            ids_NK=self.ids_NK[part],
            log_prob_NK=self.log_prob_NK[part],
            draw_ids_NM=cut(self.draw_ids_NM),
            draw_log_prob_NM=cut(self.draw_log_prob_NM),
            shrink=self.shrink[part] if isinstance(self.shrink, Tensor) else self.shrink,
            draw_mass_N=cut(self.draw_mass_N),
        )

    def check(self, tokens: int, size: int) -> None:
        """Raise ValueError for labels that cannot be right. Values are only looked at on the CPU: a GPU would wait."""
        entries = self.ids_NK.shape[-1]
        self._shape("ids_NK", self.ids_NK, (tokens, entries))
        self._shape("log_prob_NK", self.log_prob_NK, (tokens, entries))
        drawn = (self.draw_ids_NM, self.draw_log_prob_NM, self.draw_mass_N)
        if any(x is None for x in drawn) and not all(x is None for x in drawn):
            raise ValueError("labels.draw_ids_NM, draw_log_prob_NM and draw_mass_N belong together, got some of them")
        if self.draw_ids_NM is not None and self.draw_log_prob_NM is not None and self.draw_mass_N is not None:
            if self.tail == "none":
                raise ValueError("labels.tail must be bucket where there are draws, got none")
            draws = self.draw_ids_NM.shape[-1]
            self._shape("draw_ids_NM", self.draw_ids_NM, (tokens, draws))
            self._shape("draw_log_prob_NM", self.draw_log_prob_NM, (tokens, draws))
            self._shape("draw_mass_N", self.draw_mass_N, (tokens,))
        if isinstance(self.shrink, Tensor):
            self._shape("shrink", self.shrink, (tokens,))
        if self.ids_NK.device.type == "cpu" and not torch.compiler.is_compiling():
            self._check_values(size)

    def _shape(self, name: str, x: Tensor, shape: tuple[int, ...]) -> None:
        if x.shape != shape:
            raise ValueError(f"labels.{name} must be {list(shape)}, got {list(x.shape)}")

    def _check_values(self, size: int) -> None:
        for name, ids in (("ids_NK", self.ids_NK), ("draw_ids_NM", self.draw_ids_NM)):
            if ids is not None and ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= size):
                raise ValueError(f"labels.{name} must be in [0, {size}), got {int(ids.min())} to {int(ids.max())}")
        mass_N = self.log_prob_NK.exp().sum(dim=1)
        if not mass_N.numel():
            return
        low, high = float(mass_N.min()), float(mass_N.max())
        if not high <= 1 + MASS_TOLERANCE:  # also NaN
            raise ValueError(
                f"labels.log_prob_NK must hold probabilities that sum to at most 1 a token, got {high:.6g}"
            )
        if self.tail == "none" and low < 1 - MASS_TOLERANCE:
            raise ValueError(f"labels.log_prob_NK must hold probabilities that sum to 1 a token, got {low:.6g}")


@dataclass(frozen=True)
class DenseLabels:
    """The teacher's whole distribution of each token, on this rank's columns: logits, or what they are a product of.

    Logits are of temperature 1; a constant a token changes nothing, so that log-probabilities serve too (those of p_T
    times T). Columns beyond the real ones of the rank may be there or not, and are not looked at.
    """

    logits_NV: Tensor | None = None
    """Any float dtype; -inf counts as a probability of e^-10000."""
    hidden_ND: Tensor | None = None
    """The teacher's last hidden states, as they go into the product; D is the teacher's width."""
    weight_VD: Tensor | None = None
    """The teacher's output weight, of the same dtype."""

    def rows(self, part: slice) -> Self:
        """Labels of some of the tokens."""
        logits_NV = None if self.logits_NV is None else self.logits_NV[part]
        return type(self)(logits_NV, None if self.hidden_ND is None else self.hidden_ND[part], self.weight_VD)

    def check(self, tokens: int, columns: int) -> None:
        """Raise ValueError for labels that cannot be right. columns: the real ones of this rank."""
        if self.logits_NV is not None:
            if self.hidden_ND is not None or self.weight_VD is not None:
                raise ValueError("labels.hidden_ND and labels.weight_VD must be None where there are labels.logits_NV")
            self._shape("logits_NV", self.logits_NV, tokens, columns)
        elif self.hidden_ND is None or self.weight_VD is None:
            raise ValueError("labels must have logits_NV, or hidden_ND and weight_VD, got neither")
        else:
            self._shape("hidden_ND", self.hidden_ND, tokens, 1)
            width = self.hidden_ND.shape[1]
            if self.weight_VD.shape[-1] != width or len(self.weight_VD) < columns:
                shape = list(self.weight_VD.shape)
                raise ValueError(f"labels.weight_VD must be [at least {columns}, {width}], got {shape}")
            if self.weight_VD.dtype != self.hidden_ND.dtype:
                raise ValueError(
                    f"labels.weight_VD must be {self.hidden_ND.dtype} as hidden_ND is, got {self.weight_VD.dtype}"
                )

    def _shape(self, name: str, x: Tensor, tokens: int, columns: int) -> None:
        if x.ndim != 2 or len(x) != tokens or x.shape[1] < columns:
            raise ValueError(f"labels.{name} must be [{tokens}, at least {columns}], got {list(x.shape)}")


@dataclass(frozen=True)
class TailDraws:
    """What a label wants of the tail. The same seed, sample and position give the same draws.

    The first of many are what few would have been. For the entries of highest priority that means: with a threshold
    between the priorities of two that follow each other, a label may be cut to those above it.
    """

    count: int
    seed: int
    """64 bits, of the teacher's step."""
    sample_N: Tensor
    """int64 sample ids."""
    position_N: Tensor
    """int64 positions within the sample."""
    independent: bool = False
    """Independent draws from the whole distribution, without a head (RS-KD, arXiv 2503.16870), instead of the tail's
    entries of highest priority (titan.ops.vocab)."""

    def rows(self, part: slice) -> Self:
        """Of some of the tokens."""
        return replace(self, sample_N=self.sample_N[part], position_N=self.position_N[part])


@dataclass(frozen=True)
class TeacherSays:
    """Label parts of one micro-batch, before encoding."""

    ids_NK: Tensor
    """int64, most likely first; among equals the smaller id."""
    log_prob_NK: Tensor
    """float32 log-probabilities at temperature 1."""
    log_norm_N: Tensor
    """float32: log of the sum over the vocabulary of p^(1/T); 0 at T = 1. It turns log p into log p_T."""
    entropy_N: Tensor
    """float32, nats, at temperature 1."""
    draw_ids_NM: Tensor | None = None
    """int64 ids of the tail in order of priority, or with repetition where draws are independent."""
    draw_log_prob_NM: Tensor | None = None
    """float32 log-probabilities of the draws in p_T; -inf where the tail has no more."""
    log_prob_NV: Tensor | None = None
    """float32 log-probabilities at temperature 1 of the whole vocabulary, without padding."""

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """Labels of one micro-batch from those of its chunks."""
        first = parts[0]
        names = [name for name in cls.__dataclass_fields__ if getattr(first, name) is not None]
        return cls(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})
