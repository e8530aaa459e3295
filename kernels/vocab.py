"""Shapes of the operations on logits. They have no gradient of their own: the head makes gradients itself."""

import torch
from torch import Tensor

TAIL_BLOCK = 256
"""Columns whose tail weights are summed together."""


def register(library: str) -> None:
    """Tell torch about `<library>::vocab_*` and `counter_uniform`."""

    @torch.library.register_fake(f"{library}::vocab_statistics")
    def _(
        logits: Tensor, ids: Tensor, top_k: int, start: int, size: int, temperature: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        tokens = logits.shape[0]
        return (
            logits.new_empty(tokens, 4, dtype=torch.float32),
            logits.new_empty(ids.shape, dtype=torch.float32),
            logits.new_empty(tokens, top_k, dtype=torch.float32),
            logits.new_empty(tokens, top_k, dtype=torch.int64),
        )

    @torch.library.register_fake(f"{library}::vocab_gradient_")
    def _(
        logits: Tensor, coefficient: Tensor, log_sum_exp: Tensor, ids: Tensor, values: Tensor, start: int, size: int,
        temperature: float,
    ) -> None:  # fmt: skip
        return None

    @torch.library.register_fake(f"{library}::vocab_tail_blocks")
    def _(logits: Tensor, head_ids: Tensor, threshold: Tensor, start: int, size: int, temperature: float) -> Tensor:
        blocks = -(-logits.shape[1] // TAIL_BLOCK)
        return logits.new_empty(logits.shape[0], blocks, dtype=torch.float64)

    @torch.library.register_fake(f"{library}::vocab_tail_draws")
    def _(
        logits: Tensor, head_ids: Tensor, threshold: Tensor, blocks: Tensor, targets: Tensor, start: int, size: int,
        temperature: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        shape = targets.shape
        return logits.new_empty(shape, dtype=torch.int64), logits.new_empty(shape, dtype=torch.float32)

    @torch.library.register_fake(f"{library}::vocab_tail_priorities")
    def _(
        logits: Tensor, head_ids: Tensor, threshold: Tensor, turns: Tensor, count: int, start: int, size: int,
        temperature: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        shape = (logits.shape[0], count)
        return (
            logits.new_empty(shape, dtype=torch.int64),
            logits.new_empty(shape, dtype=torch.float32),
            logits.new_empty(shape, dtype=torch.float32),
        )

    @torch.library.register_fake(f"{library}::counter_uniform")
    def _(seed: int, sample: Tensor, position: Tensor, draws: int) -> Tensor:
        return sample.new_empty(sample.shape[0], draws, dtype=torch.float64)
