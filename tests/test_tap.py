"""From a teacher's logits to a student's gradient: labels made, encoded, read and learned, against the whole
distribution.
"""

import numpy as np
import pytest
import torch

from tests.worlds import BATCH, GQA, LENGTH, VOCAB, make_trainer, run_world, tokens_of
from titan.config.distillation import LabelSettings
from titan.config.model import LayoutSettings, ModelSettings, Precision
from titan.distill.codec.block import HEADER_BYTES, BlockHeader, LabelBlock, decode_block, encode_block
from titan.distill.tap import label_wish, raw_labels
from titan.ops.head import run_head
from titan.ops.objective import Objective
from titan.parallel.world import World
from titan.tasks.causal_lm import told
from titan.tasks.sample_labels import SampleLabels
from titan.train.trainer import Trainer

IDS = np.arange(BATCH) * 7 + 3


SHARPER = 12.0
"""Fresh weights say next to nothing: the output weight is made so many times as large."""


def make_teacher(
    world: World, layout: LayoutSettings, model: ModelSettings = GQA, precision: Precision = "fp32"
) -> Trainer:
    """A teacher that is sure of something."""
    trainer = make_trainer(world, layout, model, precision)
    module = trainer.stage.module
    with torch.no_grad():
        if world.place.head_stage is not None:
            module.output_weight.mul_(SHARPER)
        elif model.tied and "embedding.weight" in dict(module.named_parameters()):
            module.embedding.weight.mul_(SHARPER)
    return trainer


def true_log_probs(world: World, layout: LayoutSettings, model: ModelSettings = GQA) -> torch.Tensor:
    """float64 [B, S, V] of that teacher on the first batch, without head, labels or codec."""
    trainer = make_teacher(world, layout, model)
    tokens = torch.from_numpy(tokens_of(1)[:, :-1].astype(np.int64))
    with torch.no_grad():
        hidden = trainer.stage.module({"tokens": tokens, "rope": trainer.rope})["hidden"]
    logits_SBV = hidden.double() @ trainer.stage.module.output_weight[:VOCAB].detach().double().t()
    return logits_SBV.transpose(0, 1).log_softmax(-1)


def published(
    world: World, layout: LayoutSettings, settings: LabelSettings, step: int = 1
) -> tuple[SampleLabels, list[bytes]]:
    """What students read of a teacher's first training step, had it been step `step` of its run."""
    trainer = make_teacher(world, layout)
    tokens, data = tokens_of(1), []

    def encode(parts: list) -> None:  # type: ignore[type-arg]
        for part in parts:
            rows = slice(part.start, part.start + part.samples)
            raw = raw_labels(settings, part, LENGTH)
            block = LabelBlock(step, part.start, IDS[rows], tokens[rows].astype(np.int32), raw)
            data.append(encode_block(block, VOCAB, settings.bytes_per_token))

    wish = label_wish(settings, 5, step)
    objective = Objective(temperature=settings.temperature)
    trainer.step(tokens, 1e-3, objective, wish=wish, sample_ids=IDS, on_labels=encode)
    blocks = [decode_block(BlockHeader.unpack(block[:HEADER_BYTES]), block[HEADER_BYTES:]) for block in data]
    return SampleLabels.cat([block.labels.at(settings.temperature) for block in blocks]), data


def looked(world: World, layout: LayoutSettings, temperature: float) -> dict[str, object]:
    every = {"top_k": 12, "draws": 30, "bytes_per_token": None}
    found: dict[str, object] = {
        codec: published(world, layout, LabelSettings(codec=codec, temperature=temperature, **more))[0]  # type: ignore[arg-type]
        for codec, more in {
            "full": {},
            "top_k": {"top_k": 12, "bytes_per_token": None},
            "sampled": every,
            "random": {"draws": 50},
        }.items()
    }
    settings = LabelSettings(codec="sampled", temperature=temperature, **every)  # type: ignore[arg-type]
    found["truth"] = (true_log_probs(world, layout) / temperature).log_softmax(-1).numpy()
    found["again"] = published(world, layout, settings)[1] == published(world, layout, settings)[1]
    found["other step"] = published(world, layout, settings, step=2)[0]
    found["in budget"] = sum(map(len, published(world, layout, LabelSettings(bytes_per_token=20.0, draws=6))[1]))
    return found


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_every_codec_says_of_each_token_what_the_whole_distribution_has(temperature: float) -> None:
    found = run_world(LayoutSettings(micro_batches=2), looked, LayoutSettings(micro_batches=2), temperature)[0]
    dense = found["full"].dense_BSV
    assert dense.shape == (BATCH, LENGTH, VOCAB)
    likely = found["truth"] > -12
    assert np.abs(dense - found["truth"])[likely].max() < 2e-3
    for codec in ("top_k", "sampled"):
        labels = found[codec]
        present = labels.log_prob_BSK > -np.inf
        want = np.take_along_axis(dense, labels.ids_BSK.astype(np.int64), -1)
        assert np.abs(labels.log_prob_BSK - want)[present].max() < 0.15, "8 bits of p^(1/4)"
        best = np.take_along_axis(dense, labels.ids_BSK[..., :1].astype(np.int64), -1)[..., 0]
        headed = present.any(-1)
        assert headed.mean() > 0.2 and (best >= dense.max(-1) - 0.15)[headed].all()
    drawn = found["sampled"]
    real = drawn.draw_log_prob_BSM > -np.inf
    want = np.take_along_axis(dense, drawn.draw_ids_BSM.astype(np.int64), -1)
    assert real.any() and np.abs(drawn.draw_log_prob_BSM - want)[real].max() < 0.32, "half a step of 0.6, and rounding"
    assert found["again"] is True
    assert not np.array_equal(found["other step"].draw_ids_BSM, drawn.draw_ids_BSM)
    shares = np.exp(found["random"].log_prob_BSK.astype(float))
    assert np.allclose(shares.sum(-1), 1, atol=1e-3)
    assert found["in budget"] / BATCH / LENGTH < 20 + 9 / 8 * 1.1 + 1, "token ids and headers come on top"


def student_gradients(world: World, layout: LayoutSettings, temperature: float) -> dict[str, torch.Tensor]:
    """Gradient of the output weight of a fresh student under labels of a teacher, by codec."""
    trainer = make_trainer(world, layout, GQA, seed=9)
    assert trainer.shard is not None
    weight = trainer.stage.module.output_weight.detach()
    hidden = torch.randn(BATCH * LENGTH, weight.shape[1], generator=torch.Generator().manual_seed(3))
    targets = torch.zeros(len(hidden), dtype=torch.int64)
    objective = Objective(1.0, temperature)
    p = (true_log_probs(world, layout) / temperature).softmax(-1).transpose(0, 1).reshape(len(hidden), VOCAB)
    q = (hidden.double() @ weight[:VOCAB].double().t() / temperature).softmax(-1)
    truth = torch.zeros_like(weight)
    truth[:VOCAB] = (temperature * (q - p).t() @ hidden.double() / len(hidden)).float()
    found = {"truth": truth}
    for name, settings, steps in (
        ("full", LabelSettings(codec="full", temperature=temperature), (1,)),
        ("bucket", LabelSettings(codec="top_k", top_k=4, bytes_per_token=None, temperature=temperature), (1,)),
        ("early", LabelSettings(top_k=4, draws=4, bytes_per_token=None, temperature=temperature), range(1, 13)),
        ("late", LabelSettings(top_k=4, draws=4, bytes_per_token=None, temperature=temperature), range(13, 25)),
    ):
        total = torch.zeros_like(weight)
        for step in steps:
            labels = told(
                published(world, layout, settings, step)[0], trainer.shard, temperature, 1.0, torch.device("cpu")
            )
            run_head(
                hidden, weight, targets, torch.ones(len(hidden)), trainer.shard, objective=objective, labels=labels,
                grad_weight_VD=total, grad_scale=1.0 / len(hidden) / len(steps),
            )  # fmt: skip
        found[name] = total
    return found


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_sampled_labels_teach_what_the_whole_distribution_does(temperature: float) -> None:
    """Over 32,000 numbers an unbiased mean is as far from the truth as half the difference of its two halves."""
    found = run_world(LayoutSettings(), student_gradients, LayoutSettings(), temperature, timeout_s=200.0)[0]
    assert (found["full"] - found["truth"]).norm() < 0.01 * found["truth"].norm(), "T (q_T - p_T) h, a token"
    error = ((found["early"] + found["late"]) / 2 - found["full"]).norm()
    noise = ((found["early"] - found["late"]) / 2).norm()
    bias = (found["bucket"] - found["full"]).norm()
    assert 0.9 < error / noise < 1.1, float(error / noise)
    assert bias > 0.1 * found["full"].norm(), "one bucket is far off"
