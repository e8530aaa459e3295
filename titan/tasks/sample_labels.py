"""What a task is told of the teacher: labels of whole samples, at the temperature of the loss, as numpy arrays.

Shape letters: B samples, S tokens of a sample, K head entries, M draws, V vocabulary, D hidden width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal, Self

import numpy as np

FILL = {"ids_BSK": 0, "log_prob_BSK": -np.inf, "draw_ids_BSM": 0, "draw_log_prob_BSM": -np.inf}
"""What stands in for the entries that a token does not have."""


@dataclass(frozen=True)
class SampleLabels:
    """Labels of B samples of S tokens. Either entries (and draws), or everything as `dense_BSV` or `hidden_BSD`."""

    ids_BSK: np.ndarray
    """int32 vocabulary ids; K may be 0."""
    log_prob_BSK: np.ndarray
    """float32 log-probabilities in the whole distribution; -inf where a token has fewer entries."""
    tail: Literal["bucket", "none"] = "bucket"
    """`bucket`: the head leaves a tail. `none`: the entries are all there is and sum to one."""
    draw_ids_BSM: np.ndarray | None = None
    """int32 ids drawn from the tail."""
    draw_log_prob_BSM: np.ndarray | None = None
    """float32 log-probabilities of the draws in the whole distribution; -inf where a token has fewer."""
    draw_mass_BS: np.ndarray | None = None
    """float32: what each of a token's draws stands for, which is drawn with its probability over this."""
    entropy_BS: np.ndarray | None = None
    """float32 nats, of the teacher's distribution at temperature 1."""
    dense_BSV: np.ndarray | None = None
    """float32 log-probabilities of the whole vocabulary."""
    hidden_BSD: np.ndarray | None = None
    """float32 last hidden states of the teacher."""
    output_weight_VD: np.ndarray | None = None
    """float32 output weight that turns `hidden_BSD` into logits."""

    def rows(self, start: int, end: int) -> Self:
        """Labels of the samples [start, end), as views."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        cut = {
            name: x[start:end] for name, x in values.items() if name.split("_")[-1].startswith("B") and x is not None
        }
        return type(self)(**(values | cut))

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """Labels of all samples of several parts; tokens with fewer entries than others are filled up.

        Raises ValueError if the parts do not hold the same kinds of things.
        """
        if len(parts) == 1:
            return parts[0]
        first = parts[0]
        values: dict[str, object] = {"tail": first.tail, "output_weight_VD": first.output_weight_VD}
        if any(part.tail != first.tail for part in parts):
            raise ValueError(f"labels to join must have one tail, got {sorted({part.tail for part in parts})}")
        for name in [field.name for field in fields(cls) if field.name not in values]:
            arrays = [getattr(part, name) for part in parts]
            missing = sum(x is None for x in arrays)
            if 0 < missing < len(arrays):
                raise ValueError(f"labels to join must all have {name} or none, {missing} of {len(arrays)} lack it")
            values[name] = None if missing else np.concatenate(_as_wide(name, arrays))
        return cls(**values)  # type: ignore[arg-type]


def _as_wide(name: str, arrays: list[np.ndarray]) -> list[np.ndarray]:
    """Arrays whose last axis is filled up to the widest of them."""
    if name not in FILL:
        return arrays
    width = max(x.shape[-1] for x in arrays)
    return [np.pad(x, ((0, 0), (0, 0), (0, width - x.shape[-1])), constant_values=FILL[name]) for x in arrays]
