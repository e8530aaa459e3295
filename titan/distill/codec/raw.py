"""What a teacher said about samples, before encoding and after decoding.

Shape letters: B samples, S tokens of a sample, K head entries, M draws, V vocabulary, D hidden width.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from titan.errors import LabelError
from titan.tasks.sample_labels import SampleLabels

CodecName = Literal["sampled", "top_k", "random", "full", "hidden"]


@dataclass(frozen=True)
class RawLabels:
    """Arrays are [B, S, ...]; those that a codec does not use are None.

    sampled: ids, log_prob and draws.  top_k: ids and log_prob.  random: draws, or after decoding ids and log_prob.
    full: dense.  hidden: hidden, and the output weight where this block brings it.
    """

    codec: CodecName
    temperature: float = 1.0
    """The log's: draws and log_norm are of p_T, proportional to p^(1/T)."""
    ids_BSK: np.ndarray | None = None
    """int32, most likely first when they come from a teacher."""
    log_prob_BSK: np.ndarray | None = None
    """float32 at temperature 1, -inf where a token has fewer; from `random` at the log's temperature."""
    log_norm_BS: np.ndarray | None = None
    """float32: log of the sum over the vocabulary of p^(1/T); may be None at T = 1."""
    entropy_BS: np.ndarray | None = None
    """float32 nats, at temperature 1."""
    draw_ids_BSM: np.ndarray | None = None
    """int32, from behind the head in order of priority, or for `random` drawn from the whole distribution."""
    draw_log_prob_BSM: np.ndarray | None = None
    """float32 log-probabilities in p_T; -inf where there are fewer draws."""
    threshold_BS: np.ndarray | None = None
    """float32, after decoding: what each of a token's draws stands for, in p_T."""
    dense_BSV: np.ndarray | None = None
    """float32 log-probabilities at temperature 1."""
    hidden_BSD: np.ndarray | None = None
    """float32 last hidden states."""
    output_weight_VD: np.ndarray | None = None
    """float32; None where it is that of an earlier block with this `weight_version`."""
    weight_version: int = 0
    """Teacher step of the output weight."""

    def at(self, temperature: float) -> SampleLabels:
        """The labels that a loss at this temperature learns from.

        Any codec gives those of the log's temperature. `full` and `hidden` give any other, and `top_k` and the head of
        `sampled`, without its draws, that of temperature 1. Raises LabelError for what the log cannot give.
        """
        if self.codec == "full":
            assert self.dense_BSV is not None
            return SampleLabels(*self._no_entries(self.dense_BSV), dense_BSV=_tempered(self.dense_BSV, temperature))
        if self.codec == "hidden":
            assert self.hidden_BSD is not None
            entries = self._no_entries(self.hidden_BSD)
            return SampleLabels(*entries, hidden_BSD=self.hidden_BSD, output_weight_VD=self.output_weight_VD)
        assert self.ids_BSK is not None and self.log_prob_BSK is not None
        same = temperature == self.temperature
        if not same and (temperature != 1.0 or self.codec == "random"):
            raise LabelError(
                f"a student's loss is at temperature {temperature:g} and the labels are at {self.temperature:g}; "
                "make them equal (labels.temperature)"
            )
        if self.codec == "random":
            return SampleLabels(self.ids_BSK, self.log_prob_BSK, "none", entropy_BS=self.entropy_BS)
        draws = (self.draw_ids_BSM, self.draw_log_prob_BSM, self.threshold_BS) if same else (None, None, None)
        log_prob = self.tempered_log_prob() if same else self.log_prob_BSK
        return SampleLabels(self.ids_BSK, log_prob, "bucket", *draws, self.entropy_BS)

    def tempered_log_prob(self) -> np.ndarray:
        """float32 [B, S, K]: log-probabilities of the head at the log's temperature."""
        assert self.log_prob_BSK is not None
        if self.temperature == 1.0:
            return self.log_prob_BSK
        assert self.log_norm_BS is not None, "labels at a temperature other than 1 come with log_norm"
        tempered: np.ndarray = self.log_prob_BSK / np.float32(self.temperature) - self.log_norm_BS[..., None]
        return tempered.astype(np.float32)

    @staticmethod
    def _no_entries(like: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        shape = (*like.shape[:2], 0)
        return np.zeros(shape, np.int32), np.zeros(shape, np.float32)


def _tempered(log_prob_BSV: np.ndarray, temperature: float) -> np.ndarray:
    """Log-probabilities of p^(1/T), which sum to one again also after rounding."""
    scaled = log_prob_BSV / np.float32(temperature)
    highest = scaled.max(axis=-1, keepdims=True)
    norm = np.log(np.exp(scaled - highest).sum(axis=-1, keepdims=True, dtype=np.float64)) + highest
    tempered: np.ndarray = (scaled - norm).astype(np.float32)
    return tempered
