"""The teacher's tap: what its head is asked to say of a step, and what it said as labels of samples."""

import numpy as np
from torch import Tensor

from titan.config.distillation import LabelSettings
from titan.distill.codec.raw import RawLabels
from titan.tasks.causal_lm import LabelWish
from titan.tasks.teacher_hidden import TeacherHidden
from titan.train.trainer import LabelPart


def label_wish(settings: LabelSettings, run_seed: int, step: int) -> LabelWish:
    """What the labels of a step are made of; draws are a function of seed, step, sample and position."""
    seed = (run_seed << 32 | step) & 0x7FFFFFFFFFFFFFFF
    if settings.codec == "full":
        return LabelWish(whole=True)
    if settings.codec == "hidden":
        return LabelWish(hidden=True)
    if settings.codec == "random":
        return LabelWish(draws=settings.draws, independent=True, seed=seed)
    if settings.codec == "top_k":
        return LabelWish(settings.top_k)
    # One more than are sent tells how likely these were; readers know the step, sample and position, and no seed.
    return LabelWish(settings.top_k, settings.draws + 1, seed=step)


def raw_labels(settings: LabelSettings, part: LabelPart, length: int, step: int = 0) -> RawLabels:
    """What the teacher said of a micro-batch of samples of `length` tokens, by samples.

    step: of the teacher; `hidden` labels name it as the version of their output weight
    """
    says = part.says

    def by_sample(rows: Tensor | None) -> np.ndarray | None:
        if rows is None:
            return None
        return rows.view(length, part.samples, *rows.shape[1:]).transpose(0, 1).cpu().numpy()

    if isinstance(says, TeacherHidden):
        weight = None if says.weight_VD is None else says.weight_VD.float().cpu().numpy()
        return RawLabels(
            "hidden", settings.temperature, hidden_BSD=by_sample(says.hidden_ND.float()), output_weight_VD=weight,
            weight_version=step,
        )  # fmt: skip
    heads = settings.codec in ("sampled", "top_k")
    return RawLabels(
        codec=settings.codec,
        temperature=settings.temperature,
        ids_BSK=by_sample(says.ids_NK) if heads else None,
        log_prob_BSK=by_sample(says.log_prob_NK) if heads else None,
        log_norm_BS=by_sample(says.log_norm_N) if settings.temperature != 1.0 else None,
        entropy_BS=by_sample(says.entropy_N),
        draw_ids_BSM=by_sample(says.draw_ids_NM),
        draw_log_prob_BSM=by_sample(says.draw_log_prob_NM),
        dense_BSV=by_sample(says.log_prob_NV),
    )
