"""Hidden states as labels: any layout of the teacher writes them, any of the student makes the distribution again."""

import numpy as np
import pytest
import torch

from tests.test_tap import IDS, SHARPER, make_teacher, true_log_probs
from tests.worlds import GQA, LENGTH, TIED, VOCAB, make_trainer, run_world, tokens_of
from titan.config.distillation import LabelSettings
from titan.config.model import LayoutSettings, ModelSettings, Precision
from titan.distill.codec.block import HEADER_BYTES, BlockHeader, LabelBlock, decode_block, encode_block
from titan.distill.tap import label_wish, raw_labels
from titan.errors import LabelError
from titan.ops.look import VocabShard
from titan.ops.objective import Objective
from titan.parallel.world import World
from titan.tasks.causal_lm import told
from titan.tasks.sample_labels import SampleLabels

HIDDEN, FULL = LabelSettings(codec="hidden"), LabelSettings(codec="full")
ONE = LayoutSettings()
LAYOUTS = {
    "one rank": ONE,
    "tp 2, dp 2, two micro-batches": LayoutSettings(tp=2, dp=2, micro_batches=2),
    "tp 2, cut along the sequence": LayoutSettings(tp=2, sequence_parallel=True),
    "pp 2": LayoutSettings(pp=2),
}


def written(
    world: World, layout: LayoutSettings, settings: LabelSettings, model: ModelSettings, precision: Precision = "fp32"
) -> list[bytes]:
    """Blocks that this rank of a teacher writes in its third step, so that weights are those before an update."""
    trainer = make_teacher(world, layout, model, precision)
    data: list[bytes] = []

    def encode(parts: list) -> None:  # type: ignore[type-arg]
        for part in parts:
            rows = slice(part.start, part.start + part.samples)
            block = LabelBlock(
                3, part.start, IDS[rows], tokens_of(1)[rows].astype(np.int32), raw_labels(settings, part, LENGTH, 3)
            )
            data.append(encode_block(block, VOCAB, settings.bytes_per_token))

    trainer.step(
        tokens_of(1), 1.0, Objective(), wish=label_wish(settings, 5, 3), sample_ids=IDS, on_labels=encode
    )  # a step so large that weights after it are others
    return data


def read(ranks: list[list[bytes]]) -> list[LabelBlock]:
    """Blocks of all ranks in sample order."""
    blocks = [
        decode_block(BlockHeader.unpack(data[:HEADER_BYTES]), data[HEADER_BYTES:]) for rank in ranks for data in rank
    ]
    return sorted(blocks, key=lambda block: block.first_sample)


def labels_of_step(blocks: list[LabelBlock]) -> SampleLabels:
    return SampleLabels.cat([block.labels.at(1.0) for block in blocks])


def log_probs(labels: SampleLabels) -> np.ndarray:
    assert labels.hidden_BSD is not None and labels.output_weight_VD is not None
    logits = labels.hidden_BSD.astype(np.float64) @ labels.output_weight_VD.T.astype(np.float64)
    return torch.from_numpy(logits).log_softmax(-1).numpy()


def learned(
    world: World, layout: LayoutSettings, labels: SampleLabels, weight: float = 1.0
) -> tuple[float, float, float]:
    """What a student of half its teacher's width hears of its loss, and how far one step moved it."""
    model = GQA.model_copy(update={"hidden": 32, "heads": 2, "kv_heads": 2})
    trainer = make_trainer(world, layout, model, seed=9)
    result = trainer.step(tokens_of(1), 1e-3, Objective(weight), labels=labels)
    assert result.grad_norm is not None
    return result.divergence, result.grad_norm, trainer.evaluate(tokens_of(1))


@pytest.mark.parametrize("model", [GQA, TIED], ids=["own output weight", "tied embeddings"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_any_layout_writes_the_hidden_states_and_the_whole_output_weight_once_a_step(
    name: str, model: ModelSettings
) -> None:
    layout = LAYOUTS[name]
    blocks = read(run_world(layout, written, layout, HIDDEN, model, model=model))
    assert [block.labels.output_weight_VD is not None for block in blocks] == [True] + [False] * (len(blocks) - 1)
    assert {block.labels.weight_version for block in blocks} == {3}
    assert len(blocks) == layout.dp * layout.num_micro_batches
    labels = labels_of_step(blocks)
    assert labels.output_weight_VD is not None and labels.output_weight_VD.shape == (VOCAB, model.hidden)
    truth = run_world(ONE, true_log_probs, ONE, model, model=model)[0].numpy()
    assert labels.hidden_BSD is not None
    terms = np.square(labels.hidden_BSD)[:4] @ np.square(labels.output_weight_VD).T
    bound = 2.0**-9 * 2 * np.sqrt(terms) * 4  # both factors are rounded; four deviations
    error = np.abs(log_probs(labels) - truth)[:4]
    assert (error - 2 * bound.max(-1, keepdims=True) < 0).all(), error.max()
    assert 1e-5 < error.max() < 0.05


def before_its_step(world: World) -> tuple[list[bytes], torch.Tensor]:
    """Blocks of a teacher that computes in bfloat16, and its output weight before the step."""
    weight = make_trainer(world, ONE, TIED, "bf16").stage.module.output_weight
    return written(world, ONE, HIDDEN, TIED, "bf16"), weight[:VOCAB].detach().float() * SHARPER


def test_of_a_teacher_that_computes_in_bfloat16_nothing_is_lost_and_weights_are_those_of_the_pass() -> None:
    data, weight = run_world(ONE, before_its_step, model=TIED)[0]
    found = read([data])[0].labels.output_weight_VD
    assert found is not None and torch.equal(torch.from_numpy(found), weight.bfloat16().float())


def test_a_student_of_any_layout_learns_from_hidden_states_what_it_learns_from_whole_labels() -> None:
    layout = LayoutSettings(tp=2, dp=2, micro_batches=2)
    hidden, full = (
        labels_of_step(read(run_world(layout, written, layout, settings, GQA))) for settings in (HIDDEN, FULL)
    )
    want = run_world(ONE, learned, ONE, full)[0]
    again = run_world(ONE, learned, ONE, hidden)[0]
    assert again == pytest.approx(want, rel=5e-4), "bfloat16, and 2^-12 nats of whole labels"
    assert again != want
    for other in (LayoutSettings(tp=2), LayoutSettings(dp=2), LayoutSettings(pp=2)):
        for rank in run_world(other, learned, other, hidden)[:1]:
            assert rank == pytest.approx(again, rel=1e-5), other


def test_a_tensor_rank_takes_its_rows_of_the_weight_and_a_step_without_one_is_refused() -> None:
    labels = SampleLabels(
        np.zeros((2, 3, 0), np.int32), np.zeros((2, 3, 0), np.float32),
        hidden_BSD=np.ones((2, 3, 4), np.float32), output_weight_VD=np.arange(40, dtype=np.float32).reshape(10, 4),
    )  # fmt: skip
    second = told(labels, VocabShard(6, 6, 10, None), 2.0, 1.0, torch.device("cpu"))
    assert second.weight_VD[:, 0].tolist() == [24.0, 28.0, 32.0, 36.0], "without two rows of padding"
    assert second.hidden_ND.shape == (6, 4)
    with pytest.raises(LabelError, match="without an output weight"):
        told(
            SampleLabels(labels.ids_BSK, labels.log_prob_BSK, hidden_BSD=labels.hidden_BSD),
            VocabShard(0, 10, 10, None), 1.0, 1.0, torch.device("cpu"),
        )  # fmt: skip
