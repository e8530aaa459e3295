"""How far a student is from its teacher, and the gradient of that, from the few numbers that one look gave.

Shape letters as in titan.ops.head.
"""

import torch
from torch import Tensor

from titan.ops.label import SparseLabels
from titan.ops.look import Look

SMALLEST_TAIL = 1e-6
"""Floor of a tail mass in float32: below it 1 - Q is rounding noise."""


def soft_terms(look: Look, labels: SparseLabels, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Divergence from the teacher, and its gradient in logits / T: a multiple of q plus values at the label's ids.

    Weights that sum to one (a renormalised top k, or sampled ids): q - p.
    A head and its tail as one bucket, with r = (1 - P) / (1 - Q) of the masses behind the heads: q - p on the head and
    (1 - r) q on the tail. Draws j of the tail add -(shrink / M) (1 - P) w_j at j, where w_j = 1 - q~_j / p~_j compares
    the distributions within the tail: the student's own tail is the control variate, so that with shrink 1 the
    gradient is that of the whole distribution on average, and its noise vanishes as the student learns.
    """
    log_q_NJ = look.picked_NJ[:, 1:] / temperature - look.log_sum_exp_N2[:, 1:]
    head = labels.ids_NK.shape[1]
    log_q_NK, log_q_NM = log_q_NJ[:, :head], log_q_NJ[:, head:]
    present_NK = labels.log_prob_NK > -torch.inf
    p_NK = labels.log_prob_NK.exp()
    divergence_N = (p_NK * (labels.log_prob_NK - log_q_NK)).where(present_NK, 0.0).sum(dim=1)
    if labels.tail == "none":
        return divergence_N, p_NK.sum(dim=1), -p_NK
    q_NK = log_q_NK.exp().where(present_NK, 0.0)
    teacher_tail_N = (1.0 - p_NK.sum(dim=1)).clamp_min(SMALLEST_TAIL)
    student_tail_N = (1.0 - q_NK.sum(dim=1)).clamp_min(SMALLEST_TAIL)
    ratio_N = teacher_tail_N / student_tail_N
    bucket_N = teacher_tail_N * ratio_N.log()
    values_NJ = ratio_N[:, None] * q_NK - p_NK
    if labels.draw_ids_NM is None or labels.draw_log_prob_NM is None:
        return divergence_N + bucket_N, 1.0 - ratio_N, values_NJ
    drawn_NM = labels.draw_log_prob_NM > -torch.inf
    share_N1 = (teacher_tail_N / drawn_NM.sum(dim=1).clamp_min(1))[:, None]
    lead_NM = (labels.draw_log_prob_NM - log_q_NM).where(drawn_NM, 0.0)  # log p - log q
    tail_N = (share_N1 * lead_NM).sum(dim=1).where(drawn_NM.any(dim=1), bucket_N)
    weight_NM = (1.0 - ratio_N[:, None] * (-lead_NM).exp()).where(drawn_NM, 0.0)
    shrink = labels.shrink if isinstance(labels.shrink, float) else labels.shrink[:, None]
    values_NJ = torch.cat([values_NJ, -shrink * share_N1 * weight_NM], dim=1)
    return divergence_N + tail_N, 1.0 - ratio_N, values_NJ
