"""What sparse labels tell of the teacher: the divergence from it, and its gradient, from their entries and draws.

Shape letters as in titan.ops.head.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from titan.ops.divergence import Loss, parts, slopes
from titan.ops.label import SparseLabels
from titan.ops.look import Look

SMALLEST_TAIL = 1e-6
"""Floor of a tail mass in float32: below it 1 - Q is rounding noise."""
LOOKED_AT = 32
"""The student's largest logits, among which are those that `_correct` caps."""
CAP = 0.02
"""Over 1 - beta, of what a draw stands for: the nearer a student, the higher its own tail is trusted."""


@dataclass(frozen=True)
class SparseTerms:
    """Divergence from the teacher, and its gradient in logits / T: a multiple of q plus values at the label's ids."""

    divergence_N: Tensor
    multiple_N: Tensor
    values_NJ: Tensor
    fit_N2: Tensor | None = None
    """Where there are draws, what tells the best control (`_correct`)."""
    capped: tuple[Tensor, Tensor] | None = None
    """Where there are draws, more ids and their values: [N, LOOKED_AT] each."""


def sparse_terms(look: Look, labels: SparseLabels, temperature: float, loss: Loss, beta: float) -> SparseTerms:
    """How far the student is from what sparse labels tell.

    Weights that sum to one (a renormalised top k, or sampled ids), forward KL only: q - p.
    A head and its tail as one bucket: D over K + 1 classes. It is exact on the head and knows nothing of the
    distribution within the tail, so it is a lower bound of the whole D, and biased. In forward KL draws of the tail
    correct it (`_correct`). Reverse KL and JSD have this form alone: they are not linear in p.
    mse: the mean of (log p - log q)^2 over the given ids, head and draws. The student's log q depends on all logits,
    but other ids are missing from the mean, and the given ones were chosen by their probability: biased.
    """
    log_q_NJ = look.picked_NJ[:, 1:] / temperature - look.log_sum_exp_N2[:, 1:]
    head = labels.ids_NK.shape[1]
    log_q_NK, log_q_NM = log_q_NJ[:, :head], log_q_NJ[:, head:]
    if loss == "mse" or labels.tail == "none":
        both = loss == "mse" and labels.draw_log_prob_NM is not None
        log_p_NJ = torch.cat(labels.log_probs(), dim=1) if both else labels.log_prob_NK
        return _open(log_p_NJ, log_q_NJ, loss, beta)
    bucket, ratio_N, teacher_tail_N = _bucket(labels.log_prob_NK, log_q_NK, loss, beta)
    if labels.draw_log_prob_NM is None:
        return bucket
    log_q_NT = look.top_values_NK[:, :LOOKED_AT] / temperature - look.log_sum_exp_N2[:, 1:]
    largest = look.top_ids_NK[:, :LOOKED_AT], log_q_NT
    return _correct(bucket, labels, (log_q_NK, log_q_NM), largest, ratio_N, teacher_tail_N)


def _open(log_p_NJ: Tensor, log_q_NJ: Tensor, loss: Loss, beta: float) -> SparseTerms:
    """Of the given ids alone."""
    present_NJ = log_p_NJ > -torch.inf
    log_p_NJ = log_p_NJ.where(present_NJ, 0.0)
    part_NJ = parts(log_p_NJ, log_q_NJ, loss, beta).where(present_NJ, 0.0)
    slope_NJ = slopes(log_p_NJ, log_q_NJ, loss, beta).where(present_NJ, 0.0)
    if loss == "mse":
        count_N1 = present_NJ.sum(dim=1, keepdim=True).clamp_min(1)
        part_NJ, slope_NJ = part_NJ / count_N1, slope_NJ / count_N1
    return SparseTerms(part_NJ.sum(dim=1), -slope_NJ.sum(dim=1), slope_NJ)


def _bucket(log_p_NK: Tensor, log_q_NK: Tensor, loss: Loss, beta: float) -> tuple[SparseTerms, Tensor, Tensor]:
    """Of the head and the rest as one more class b: s - q S on the head, and (s_b / q_b - S) q on the tail.

    returns: these, and (1 - P) / (1 - Q) of the masses behind the head, and 1 - P
    """
    present_NK = log_p_NK > -torch.inf
    q_NK = log_q_NK.exp().where(present_NK, 0.0)
    # A teacher's large entries have exact logarithms, so its tail is known well beyond float32; the student's is not.
    teacher_tail_N = (1.0 - log_p_NK.double().exp().sum(dim=1)).clamp_min(SMALLEST_TAIL).float()
    student_tail_N = (1.0 - q_NK.sum(dim=1)).clamp_min(SMALLEST_TAIL)
    log_p_NK = log_p_NK.where(present_NK, 0.0)
    part_NK = parts(log_p_NK, log_q_NK, loss, beta).where(present_NK, 0.0)
    slope_NK = slopes(log_p_NK, log_q_NK, loss, beta).where(present_NK, 0.0)
    tails = teacher_tail_N.log(), student_tail_N.log()
    part_N, slope_N = parts(*tails, loss, beta), slopes(*tails, loss, beta)
    ratio_N = slope_N / student_tail_N
    terms = SparseTerms(
        part_NK.sum(dim=1) + part_N, ratio_N - slope_NK.sum(dim=1) - slope_N, slope_NK - q_NK * ratio_N[:, None]
    )
    return terms, teacher_tail_N / student_tail_N, teacher_tail_N


def _correct(
    bucket: SparseTerms, labels: SparseLabels, log_q: tuple[Tensor, Tensor], largest: tuple[Tensor, Tensor],
    ratio_N: Tensor, teacher_tail_N: Tensor,
) -> SparseTerms:  # fmt: skip
    """The bucket's forward KL and its gradient q - t, corrected by draws j of the tail.

    With p~ and q~ the distributions within the tail, and s the mass that each draw j stands for:
        bucket    t = (1 - P) q~
        draws     t = (1 - P) beta g + s sum_j e_j (1 - beta r_j),  r_j = g_j / p~_j
        used      shrink * draws + (1 - shrink) * bucket
    An entry i is drawn p_i / s times on average, so draws alone are (1 - P) p~ on average whatever beta and g are: the
    student's own tail, from which g is made, is a control variate. An entry that is drawn with probability p_i / s adds
    about s p_i (1 - beta r_i)^2 to the squared error, which vanishes as the student learns (r to 1, beta 1) and, at its
    least, is never above that of draws without it (beta 0). The sum over all is least at
        beta = sum w r / sum w r^2 over the draws of all tokens, with w = s^2
    whose two sums are `fit_N2`; they have to be those of other draws, or the gradient would be biased.
    g is q~, but among the student's LOOKED_AT largest at most CAP / (1 - beta) of s: what is likelier than a draw
    stands for the teacher would have put into the head, so there a student errs, and once in a long while a draw would
    say so with a huge r.
    The divergence gets the sum of s log(p~_j / q~_j), whatever the shrinkage. Tokens whose draws stand for nothing stay
    with the bucket.
    log_q: of the head's ids and of the draws;  largest: ids and log q;  ratio: (1 - P) / (1 - Q)
    """
    assert labels.draw_ids_NM is not None and labels.draw_log_prob_NM is not None and labels.draw_mass_N is not None
    log_q_NK, log_q_NM = log_q
    top_ids_NT, log_q_NT = largest
    drawn_NM = labels.draw_log_prob_NM > -torch.inf
    share_N1 = labels.draw_mass_N[:, None]
    any_N1 = share_N1 > 0.0
    log_odds_NM = labels.draw_log_prob_NM - log_q_NM - ratio_N.log()[:, None]  # log(p~ / q~)
    log_odds_NM = log_odds_NM.where(drawn_NM, 0.0)
    cap_N1 = CAP / max(1.0 - labels.control, SMALLEST_TAIL) * share_N1
    is_top_NM = (labels.draw_ids_NM[:, :, None] == top_ids_NT[:, None, :]).any(dim=2)
    most_NM = (cap_N1.log() - labels.draw_log_prob_NM).where(drawn_NM & is_top_NM, torch.inf)
    relative_NM = torch.minimum(-log_odds_NM, most_NM).exp()  # r
    shrink = labels.shrink[:, None] if isinstance(labels.shrink, Tensor) else labels.shrink
    values_NM = (-shrink * share_N1 * (1.0 - labels.control * relative_NM)).where(drawn_NM, 0.0)
    less_N1 = (shrink * (1.0 - labels.control) * ratio_N[:, None]).where(any_N1, 0.0)  # of the bucket's multiple of q
    present_NK = labels.log_prob_NK > -torch.inf
    q_NK = log_q_NK.exp().where(present_NK, 0.0)
    in_head_NT = ((labels.ids_NK[:, :, None] == top_ids_NT[:, None, :]) & present_NK[:, :, None]).any(dim=1)
    above_NT = (log_q_NT.exp() * ratio_N[:, None] - cap_N1).clamp_min(0.0).where(any_N1 & ~in_head_NT, 0.0)
    weighted_NM = (share_N1.square() * relative_NM).where(drawn_NM, 0.0)
    return SparseTerms(
        bucket.divergence_N + (share_N1 * log_odds_NM).sum(dim=1),
        bucket.multiple_N + less_N1[:, 0],
        torch.cat([bucket.values_NJ - less_N1 * q_NK, values_NM], dim=1),
        torch.stack([weighted_NM.sum(dim=1), (weighted_NM * relative_NM).sum(dim=1)], dim=1),
        (top_ids_NT, shrink * labels.control * above_NT),
    )
