"""Every layout follows one process, and one process follows a plain float64 model that is written out here."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.parity import ALONE, MODELS, RATE, START, History, Parity, assert_same
from tests.worlds import (
    BATCH,
    GQA,
    LENGTH,
    TIED,
    VOCAB,
    World,
    make_trainer,
    run_world,
    tokens_of,
)
from titan.config.model import LayoutSettings, ModelSettings, OptimizerSettings, Precision
from titan.model.parameters import initial_value, parameter_specs
from titan.ops.objective import Objective


@pytest.fixture(scope="module")
def follow(tmp_path_factory: pytest.TempPathFactory) -> Parity:
    return Parity(tmp_path_factory)


FOUR = {
    "tp2-pp2": LayoutSettings(tp=2, pp=2),
    "tp2-dp2": LayoutSettings(tp=2, dp=2),
    "pp2-uneven": LayoutSettings(pp=2, layers=(1, 3)),
    "pp2-dp2-sharded": LayoutSettings(pp=2, dp=2, shard=2),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gqa", "tied"])
@pytest.mark.parametrize("layout", FOUR.values(), ids=FOUR)
def test_a_layout_follows_one_process_for_thirty_steps(follow: Parity, layout: LayoutSettings, kind: str) -> None:
    assert_same(*follow(layout, kind))


MORE = {
    "tp2-sequence-parallel": (LayoutSettings(tp=2, sequence_parallel=True), "gqa"),
    "tp2-pp2-sequence-parallel-tied": (LayoutSettings(tp=2, pp=2, sequence_parallel=True), "tied"),
    "pp2-recompute": (LayoutSettings(pp=2, recompute=True), "gqa"),
    "tp2-dp2-everything": (LayoutSettings(tp=2, dp=2, shard=2, sequence_parallel=True, recompute=True), "tied"),
    "dp2-sharded-many-micro-batches": (LayoutSettings(dp=2, shard=2, micro_batches=4), "gqa"),
    "pp4": (LayoutSettings(pp=4), "tied"),
    "tp4": (LayoutSettings(tp=4), "mha"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "kind"), MORE.values(), ids=MORE)
def test_so_do_the_other_ways_to_cut(follow: Parity, layout: LayoutSettings, kind: str) -> None:
    assert_same(*follow(layout, kind))


UNEVEN = {
    "dp2": LayoutSettings(dp=2, micro_batches=5),
    "dp2-sharded": LayoutSettings(dp=2, shard=2, micro_batches=5),
    "pp2-dp2": LayoutSettings(pp=2, dp=2, micro_batches=5),
}


@pytest.mark.slow
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("layout", UNEVEN.values(), ids=UNEVEN)
def test_a_micro_batch_of_three_samples_over_two_replicas_counts_every_token_once(
    follow: Parity, layout: LayoutSettings, soft: bool
) -> None:
    assert_same(*follow(layout, batch=15, soft=soft, steps=10))


@pytest.mark.slow
@pytest.mark.parametrize("layout", FOUR.values(), ids=FOUR)
def test_a_student_of_soft_labels_follows_one_process_too(follow: Parity, layout: LayoutSettings) -> None:
    assert_same(*follow(layout, "tied", soft=True, steps=10))


def test_two_tensor_ranks_follow_one_process_for_a_few_steps(follow: Parity) -> None:
    assert_same(*follow(LayoutSettings(tp=2), steps=4))


# --- half precision ---


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("layout", [FOUR["tp2-pp2"], FOUR["pp2-dp2-sharded"]], ids=["tp2-pp2", "pp2-dp2-sharded"])
def test_half_precision_stays_near_single_precision_in_any_layout(
    follow: Parity, layout: LayoutSettings, precision: Precision
) -> None:
    """bf16 rounds a value by at most 2^-9 of itself, fp16 by 2^-12. The loss stays within one rounding; the norm, in
    which the roundings of many layers add up, within five.
    """
    many, alone = follow(layout, precision=precision, reference="fp32", steps=12)
    rounding = 2.0**-9 if precision == "bf16" else 2.0**-12
    assert all(history == many[0] for history in many)
    for step, (got, want) in enumerate(zip(many[0], alone, strict=True), START + 1):
        assert got[0] == pytest.approx(want[0], abs=rounding), f"cross-entropy of step {step}"
        assert got[2] == pytest.approx(want[2], rel=5 * rounding), f"gradient norm of step {step}"


def overflow_on_one_rank(world: World, layout: LayoutSettings, culprit: int) -> list[tuple[Any, ...]]:
    """Steps 2 and 3 overflow on one rank alone. Per step: norm, scale after it, whether weights moved."""
    trainer = make_trainer(world, layout, TIED, "fp16")
    stage = trainer.stage
    plain_step, number = trainer.optimizer.step, 0

    def step(rate: float) -> float | None:
        if number in (2, 3) and world.place.rank == culprit:
            for parameter in stage.module.parameters():
                parameter.main_grad.view(-1).fill_(math.inf)
        return plain_step(rate)

    trainer.optimizer.step = step  # type: ignore[method-assign]
    seen = []
    for number in range(1, 5):
        before = [parameter.detach().clone() for parameter in stage.module.parameters()]
        result = trainer.step(tokens_of(number), RATE, Objective())
        after = list(stage.module.parameters())
        moved = [not torch.equal(old, new) for old, new in zip(before, after, strict=True)]
        seen.append((result.grad_norm, trainer.optimizer.loss_scale, any(moved)))
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("layout", [FOUR["tp2-pp2"], FOUR["pp2-dp2-sharded"]], ids=["tp2-pp2", "pp2-dp2-sharded"])
def test_an_overflow_on_one_rank_skips_the_step_on_all_and_a_second_halves_the_scale(layout: LayoutSettings) -> None:
    for seen in run_world(layout, overflow_on_one_rank, layout, layout.ranks - 1, model=TIED):
        (first, *_), (_, scale_2, moved_2), (norm_3, scale_3, moved_3), (norm_4, scale_4, moved_4) = seen
        assert first is not None and seen[1][0] is None and norm_3 is None and norm_4 is not None
        assert (moved_2, moved_3, moved_4) == (False, False, True)
        assert seen[0][2], "a good step moves the weights"
        # megatron-core forgives one overflow (hysteresis 2) before it halves
        assert (seen[0][1], scale_2, scale_3, scale_4) == (2.0**16, 2.0**16, 2.0**15, 2.0**15)


# --- the slow obvious version ---


class PlainModel:
    """A Llama-shaped decoder, its AdamW and its clipping, in float64 and nothing but torch; titan's names."""

    def __init__(self, model: ModelSettings, optimizer: OptimizerSettings):
        self.model, self.optimizer, self.steps = model, optimizer, 0
        specs = parameter_specs(model, VOCAB)
        self.weights = {name: initial_value(name, spec, 1).double().requires_grad_() for name, spec in specs.items()}
        self.moments = {name: (torch.zeros_like(w), torch.zeros_like(w)) for name, w in self.weights.items()}

    def norm(self, x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + self.model.norm_eps).sqrt() * self.weights[name]

    def rotate(self, x_BSHD: Tensor) -> Tensor:
        """Pairs (i, i + D / 2) of position s turn by s * theta^(-2 i / D)."""
        width = x_BSHD.shape[-1]
        frequency = self.model.rope_theta ** (-2.0 * torch.arange(width // 2, dtype=torch.float64) / width)
        angle = torch.arange(x_BSHD.shape[1], dtype=torch.float64)[:, None] * frequency
        cos, sin = angle.cos()[:, None, :], angle.sin()[:, None, :]
        left, right = x_BSHD.split(width // 2, dim=-1)
        return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)

    def attention(self, x: Tensor, layer: str) -> Tensor:
        model, (batch, length, _) = self.model, x.shape
        groups, width = model.num_kv_heads, model.hidden // model.heads
        queries = model.heads // groups
        qkv = (x @ self.weights[f"{layer}.self_attention.linear_qkv.weight"].T).view(batch, length, groups, -1, width)
        out = []
        mask = torch.ones(length, length, dtype=torch.bool).tril()
        for head in range(model.heads):
            group = qkv[:, :, head // queries]
            query = self.rotate(group[:, :, head % queries : head % queries + 1])[:, :, 0]
            key = self.rotate(group[:, :, queries : queries + 1])[:, :, 0]
            score = (query @ key.mT / math.sqrt(width)).masked_fill(~mask, -math.inf)
            out.append(score.softmax(-1) @ group[:, :, queries + 1])
        return torch.cat(out, -1) @ self.weights[f"{layer}.self_attention.linear_proj.weight"].T

    def logits(self, tokens: Tensor) -> Tensor:
        hidden = self.weights["embedding.weight"][tokens]
        for index in range(self.model.layers):
            layer = f"layers.{index}"
            hidden = hidden + self.attention(self.norm(hidden, f"{layer}.input_layernorm.weight"), layer)
            inner = self.norm(hidden, f"{layer}.pre_mlp_layernorm.weight")
            gate, up = (inner @ self.weights[f"{layer}.mlp.linear_fc1.weight"].T).chunk(2, -1)
            hidden = hidden + (gate * gate.sigmoid() * up) @ self.weights[f"{layer}.mlp.linear_fc2.weight"].T
        output = self.weights["embedding.weight" if self.model.tied else "head"]
        return (self.norm(hidden, "final_norm.weight") @ output.T)[..., :VOCAB]

    def step(self, tokens: np.ndarray, rate: float) -> tuple[float, float]:
        """Loss before the update and norm of its gradient."""
        both = torch.from_numpy(tokens)
        loss = F.cross_entropy(self.logits(both[:, :-1]).reshape(-1, VOCAB), both[:, 1:].reshape(-1))
        gradients = torch.autograd.grad(loss, list(self.weights.values()))
        norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
        settings, clip = self.optimizer, min(1.0, self.optimizer.clip / (norm + 1e-6))
        self.steps += 1
        with torch.no_grad():
            for (name, weight), gradient in zip(self.weights.items(), gradients, strict=True):
                first, second = self.moments[name]
                first.mul_(settings.beta1).add_(gradient * clip, alpha=1 - settings.beta1)
                second.mul_(settings.beta2).add_((gradient * clip).square(), alpha=1 - settings.beta2)
                if weight.dim() > 1:
                    weight.mul_(1 - rate * settings.weight_decay)
                unbiased = first / (1 - settings.beta1**self.steps)
                root = (second / (1 - settings.beta2**self.steps)).sqrt()
                weight.sub_(rate * unbiased / (root + settings.eps))
        return loss.item(), norm


def plain_history(world: World, model: ModelSettings, optimizer: OptimizerSettings, steps: int) -> History:
    trainer = make_trainer(world, ALONE, model, optimizer=optimizer)
    results = [trainer.step(tokens_of(step), RATE, Objective()) for step in range(steps)]
    return [(result.cross_entropy, 0.0, result.grad_norm) for result in results]


@pytest.mark.parametrize("kind", ["gqa", "tied"])
def test_one_process_follows_a_plain_float64_model(kind: str) -> None:
    model, steps = MODELS[kind], 8
    optimizer = OptimizerSettings(weight_decay=0.3, clip=0.5, eps=1e-6)
    (got,) = run_world(ALONE, plain_history, model, optimizer, steps, model=model)
    plain = PlainModel(model, optimizer)
    want = [plain.step(tokens_of(step), RATE) for step in range(steps)]
    assert want[0][0] - want[-1][0] > 0.1 and any(norm > optimizer.clip for _, norm in want), "it learns and is clipped"
    for step, ((loss, _, norm), (plain_loss, plain_norm)) in enumerate(zip(got, want, strict=True)):
        assert loss == pytest.approx(plain_loss, abs=1e-5), f"cross-entropy of step {step}"
        assert norm == pytest.approx(plain_norm, rel=1e-4), f"gradient norm of step {step}"


def test_the_tiny_model_is_the_issues() -> None:
    assert (GQA.layers, GQA.hidden, VOCAB, LENGTH, BATCH) == (4, 64, 500, 64, 16)
