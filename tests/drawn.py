"""Labels with draws as the codec would send them, but exact: from what a teacher says, without bytes between."""

import torch
from torch import Tensor

from titan.ops.label import SparseLabels, TailDraws, TeacherSays
from titan.ops.says import token_turns


def uniforms(draws: TailDraws, ids_NM: Tensor, size: int) -> Tensor:
    """float64 [N, M]: the numbers that ids are drawn with, by the formula of titan.ops.vocab."""
    a, b, c, d = token_turns(draws).split(1, dim=1)
    width = max(0, size - 1).bit_length()
    fraction = ((c * ids_NM + d) % 2**32).div(2**8, rounding_mode="floor")
    place = (a * ids_NM + b) % 2**width
    place = c * (place ^ place >> (width + 1) // 2) % 2**width
    return ((place ^ place >> (width + 1) // 2) + (fraction + 0.5) / 2**24) / 2**width


def priorities(says: TeacherSays, draws: TailDraws, size: int) -> Tensor:
    """float64 [N, M], of what a teacher drew."""
    assert says.draw_ids_NM is not None and says.draw_log_prob_NM is not None
    return says.draw_log_prob_NM.double().exp() / uniforms(draws, says.draw_ids_NM, size)


def drawn_labels(
    says: TeacherSays, draws: TailDraws, size: int, count: int | None = None, temperature: float = 1.0
) -> SparseLabels:
    """The head, and at most so many draws: those above the priority of the next, and above each entry of the tail."""
    assert says.draw_ids_NM is not None and says.draw_log_prob_NM is not None
    count = draws.count - 1 if count is None else count
    priority = priorities(says, draws, size)
    mass = torch.maximum(priority[:, count], says.draw_log_prob_NM.double().exp().amax(1))
    log_prob = says.draw_log_prob_NM[:, :count].where(priority[:, :count] > mass[:, None], -torch.inf)
    head = says.log_prob_NK / temperature - says.log_norm_N[:, None]
    return SparseLabels(says.ids_NK, head, "bucket", says.draw_ids_NM[:, :count], log_prob, draw_mass_N=mass.float())
