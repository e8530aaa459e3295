"""A checkpoint's content: pieces of parameters under global names, whatever sharding held them."""

import re
from dataclasses import dataclass

from torch import Tensor

KINDS = ("weight", "exp_avg", "exp_avg_sq")
"""float32 weights (the masters of a bf16 or fp16 model) and the moments of AdamW."""


@dataclass(frozen=True)
class PieceKey:
    """Which part of what: elements [start, end) of the flattened slice of tensor rank `tensor` of `tp`."""

    kind: str
    name: str
    tensor: int
    tp: int
    start: int
    end: int

    def __str__(self) -> str:
        return f"{self.kind}/{self.name}/{self.tensor}of{self.tp}/{self.start}-{self.end}"

    @staticmethod
    def parse(text: str) -> "PieceKey":
        """Inverse of str()."""
        match = re.fullmatch(r"(\w+)/(.+)/(\d+)of(\d+)/(\d+)-(\d+)", text)
        assert match, f"{text!r} is no key of a piece"
        kind, name, *numbers = match.groups()
        return PieceKey(kind, name, *map(int, numbers))


@dataclass(frozen=True)
class Piece:
    """A key and its flat float32 values."""

    key: PieceKey
    values: Tensor
