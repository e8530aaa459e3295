"""The chunked, sharded head against a dense float64 one that autograd differentiates."""

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import titan.ops.look as look_module
from tests.worlds import run_world
from titan.config.model import LayoutSettings
from titan.ops.head import HeadResult, run_head
from titan.ops.label import SparseLabels
from titan.ops.look import VocabShard
from titan.ops.objective import Chunk, Objective
from titan.ops.sparse import SMALLEST_TAIL
from titan.parallel.world import World

WIDTH = 16
FLOOR = SMALLEST_TAIL
DEFAULT = Objective(0.6, 2.0)


@dataclass(frozen=True)
class Case:
    """Inputs of a head, whole."""

    hidden_ND: Tensor
    weight_VD: Tensor
    targets_N: Tensor
    token_weight_N: Tensor
    size: int
    labels: SparseLabels | None
    objective: Objective
    grad_scale: float = 1.0


def make_case(
    objective: Objective = DEFAULT,
    tokens: int = 40,
    size: int = 100,
    rows: int = 128,
    top_k: int = 5,
    sharpness: float = 1.0,
    teacher_mass: float | None = None,
    seed: int = 0,
) -> Case:
    """teacher_mass: how much of its probability the teacher has on the label's ids; None for any."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, WIDTH, generator=generator) * sharpness
    weight = torch.randn(rows, WIDTH, generator=generator) * 0.5
    ids = torch.rand(tokens, size, generator=generator).topk(top_k, dim=1).indices
    probability = torch.rand(tokens, top_k + 1, generator=generator, dtype=torch.float64).clamp_min(0.01)
    probability /= probability.sum(1, keepdim=True)
    probability = probability[:, :top_k]
    if teacher_mass is not None:
        probability = probability / probability.sum(1, keepdim=True) * teacher_mass
    targets = torch.randint(0, size, (tokens,), generator=generator)
    targets[::3] = ids[::3, 0]  # some targets are among the label's ids
    counts = torch.randint(0, 2, (tokens,), generator=generator).float() + 0.5
    return Case(hidden, weight, targets, counts, size, SparseLabels(ids, probability.log().float()), objective, 0.25)


@dataclass(frozen=True)
class Dense:
    """What the case should give."""

    cross_entropy: Tensor
    divergence: Tensor
    grad_hidden_ND: Tensor
    grad_weight_VD: Tensor
    log_q_NV: Tensor
    log_q_tempered_NV: Tensor


def dense(case: Case) -> Dense:
    """float64, whole logits, the loss as it is written in the docstring of Objective, gradients by autograd."""
    hidden = case.hidden_ND.double().requires_grad_()
    weight = case.weight_VD.double().requires_grad_()
    temperature = case.objective.temperature
    logits = (hidden @ weight.T)[:, : case.size]
    log_q = logits.log_softmax(1)
    log_q_tempered = (logits / temperature).log_softmax(1)
    counts = case.token_weight_N.double()
    cross_entropy = (F.nll_loss(log_q, case.targets_N, reduction="none") * counts).sum()
    divergence = torch.zeros((), dtype=torch.float64)
    soft = 0.0
    if case.labels is not None:
        soft = case.objective.weight
        log_p = case.labels.log_prob_NK.double()
        in_head = torch.zeros_like(logits, dtype=torch.bool).scatter(1, case.labels.ids_NK, True)
        log_tail_q = log_q_tempered.masked_fill(in_head, -math.inf).logsumexp(1)
        tail_p = (1 - log_p.exp().sum(1)).clamp_min(FLOOR)
        kl = (log_p.exp() * (log_p - log_q_tempered.gather(1, case.labels.ids_NK))).sum(1)
        kl = kl + tail_p * (tail_p.log() - log_tail_q.clamp_min(math.log(FLOOR)))
        divergence = (kl * counts).sum()
    loss = (1 - soft) * cross_entropy + soft * temperature**2 * divergence
    grad_hidden, grad_weight = torch.autograd.grad(loss * case.grad_scale, (hidden, weight))
    return Dense(cross_entropy.detach(), divergence.detach(), grad_hidden, grad_weight, log_q.detach(), log_q_tempered)


def head_of(
    case: Case, world: World | None = None, top_k: int = 0, chunk: Chunk | None = None
) -> tuple[HeadResult, Tensor]:
    """The head of this rank and its gradient of the weight (on top of 0.5 that was there before)."""
    tp = 1 if world is None else world.place.stage.tp
    tensor = 0 if world is None else world.place.tensor
    rows = len(case.weight_VD) // tp
    shard = VocabShard(tensor * rows, rows, case.size, None if world is None else world.groups.tp)
    grad_weight = torch.full((rows, WIDTH), 0.5)
    result = run_head(
        case.hidden_ND, case.weight_VD[shard.start : shard.start + rows], case.targets_N, case.token_weight_N, shard,
        objective=case.objective, labels=case.labels, grad_weight_VD=grad_weight, grad_scale=case.grad_scale,
        top_k=top_k, chunk=chunk,
    )  # fmt: skip
    return result, grad_weight - 0.5


def assert_like_dense(case: Case, result: HeadResult, grad_weight: Tensor, tolerance: float = 1e-5) -> None:
    """Sums within `tolerance` of a token's share, gradients within it of their largest element."""
    want = dense(case)
    per_token = len(case.targets_N) * tolerance
    assert result.cross_entropy.item() == pytest.approx(want.cross_entropy.item(), abs=per_token, rel=1e-6)
    assert result.divergence.item() == pytest.approx(want.divergence.item(), abs=per_token, rel=1e-6)
    assert result.grad_hidden_ND is not None
    for got, wanted in ((result.grad_hidden_ND, want.grad_hidden_ND), (grad_weight, want.grad_weight_VD)):
        assert (got - wanted).abs().max() <= tolerance * wanted.abs().max()


OBJECTIVES = [
    Objective(0.0, 1.0), Objective(0.0, 2.0), Objective(1.0, 1.0), Objective(0.6, 1.0), Objective(0.6, 2.0),
    Objective(1.0, 0.5), Objective(0.3, 10.0),
]  # fmt: skip


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize(("size", "rows"), [(128, 128), (100, 128), (65, 128)])
def test_losses_and_gradients_are_those_of_the_dense_head(objective: Objective, size: int, rows: int) -> None:
    case = make_case(objective, size=size, rows=rows)
    assert_like_dense(case, *head_of(case))


@pytest.mark.parametrize("product_rows", [1, 7, 64, 127])
def test_the_output_weight_may_be_multiplied_in_parts(monkeypatch: pytest.MonkeyPatch, product_rows: int) -> None:
    monkeypatch.setattr(look_module, "PRODUCT_ROWS", product_rows)
    case = make_case(size=100, rows=128)
    assert_like_dense(case, *head_of(case))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_without_labels_it_is_plain_cross_entropy_whatever_the_weight(temperature: float) -> None:
    case = replace(make_case(Objective(0.9, temperature)), labels=None)
    result, grad_weight = head_of(case)
    assert_like_dense(case, result, grad_weight)
    assert result.divergence == 0.0


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("top_k", [1, 2, 50, 100])
def test_a_label_may_have_one_entry_or_many_or_all(top_k: int, temperature: float) -> None:
    case = make_case(Objective(0.7, temperature), top_k=top_k, teacher_mass=None if top_k < 100 else 0.9)
    if top_k == 100:  # nothing is left for the tail: both tails are the floor
        assert case.labels is not None
        whole = SparseLabels(case.labels.ids_NK, case.labels.log_prob_NK.log_softmax(1))
        case = replace(case, labels=whole)
    assert_like_dense(case, *head_of(case), tolerance=2e-5)


@pytest.mark.parametrize("mass", [1e-6, 1e-3, 0.5, 0.999, 1 - 1e-5, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_teachers_tail_may_be_all_or_next_to_nothing(mass: float, temperature: float) -> None:
    """1 - P keeps about seven digits behind the point, so a tail of 1e-5 is known to about a percent, which is 1e-7
    of the gradient.
    """
    case = make_case(Objective(1.0, temperature), teacher_mass=mass)
    assert_like_dense(case, *head_of(case), tolerance=2e-5)


@pytest.mark.parametrize("student_tail", [1e-2, 1e-4])
def test_a_student_sure_of_the_labels_ids_gets_the_right_gradient(student_tail: float) -> None:
    """1 - Q loses digits: with a tail of q its relative error, and that of the tail's gradient, is about 1e-7 / q."""
    case = make_case(Objective(1.0, 1.0), tokens=30, size=40, rows=64, top_k=1, teacher_mass=0.9)
    assert case.labels is not None
    hidden = torch.zeros(30, WIDTH)
    hidden[:, 0] = math.log((1 - student_tail) / (student_tail / 39))
    weight = torch.zeros(64, WIDTH)
    weight[7, 0] = 1.0
    ids = torch.full((30, 1), 7)
    case = replace(case, hidden_ND=hidden, weight_VD=weight, labels=SparseLabels(ids, case.labels.log_prob_NK))
    assert_like_dense(case, *head_of(case), tolerance=4e-7 / student_tail + 1e-6)


def test_below_the_floor_of_the_tail_loss_and_gradient_stay_finite_and_pull_the_right_way() -> None:
    case = make_case(Objective(1.0, 1.0), top_k=1, teacher_mass=0.5)
    assert case.labels is not None
    weight = torch.zeros(128, WIDTH)
    weight[:, 0] = -60.0
    weight[7, 0] = 60.0
    hidden = torch.zeros(40, WIDTH)
    hidden[:, 0] = 1.0
    ids = torch.full((40, 1), 7)
    case = replace(case, hidden_ND=hidden, weight_VD=weight, labels=SparseLabels(ids, case.labels.log_prob_NK))
    result, grad_weight = head_of(case)
    assert result.grad_hidden_ND is not None
    assert result.divergence.isfinite() and result.divergence > 0
    assert grad_weight.isfinite().all() and result.grad_hidden_ND.isfinite().all()
    assert grad_weight[7, 0] > 0, "the logit that has all the mass is pushed down"


@pytest.mark.parametrize("temperature", [1.0, 0.5, 4.0])
def test_huge_and_tiny_logits_are_no_trouble(temperature: float) -> None:
    """Whole numbers are exact in float32, so the logits are. Their log-sum-exp of 4e4 is rounded by up to 2^-9,
    and so is every probability.
    """
    case = make_case(Objective(0.5, temperature), teacher_mass=0.9)
    generator = torch.Generator().manual_seed(3)
    weight = torch.randint(-9, 10, case.weight_VD.shape, generator=generator).float()
    huge = torch.zeros_like(case.hidden_ND)
    huge[:, 3] = 4096.0
    case = replace(case, hidden_ND=huge, weight_VD=weight)
    result, grad_weight = head_of(case)
    want = dense(case)
    assert result.grad_hidden_ND is not None
    assert result.cross_entropy.item() == pytest.approx(want.cross_entropy.item(), rel=1e-6)
    assert torch.isfinite(result.divergence) and grad_weight.isfinite().all()
    hard = replace(case, labels=None)
    assert_like_dense(hard, *head_of(hard), tolerance=2**-9)
    tiny = replace(case, hidden_ND=torch.full_like(huge, 1e-30), weight_VD=weight * 1e-6)
    result, grad_weight = head_of(tiny)
    wanted = dense(tiny).grad_hidden_ND
    assert result.grad_hidden_ND is not None
    assert (result.grad_hidden_ND - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert result.cross_entropy.item() == pytest.approx(math.log(100) * tiny.token_weight_N.sum().item(), rel=1e-6)


def test_a_token_of_weight_zero_does_not_count_and_gets_no_gradient() -> None:
    case = make_case(Objective(0.5, 2.0))
    some = torch.arange(40) % 4 == 0
    zeroed = replace(case, token_weight_N=case.token_weight_N.masked_fill(some, 0.0))
    result, grad_weight = head_of(zeroed)
    assert case.labels is not None and result.grad_hidden_ND is not None
    rest = SparseLabels(case.labels.ids_NK[~some], case.labels.log_prob_NK[~some])
    without = replace(
        case, hidden_ND=case.hidden_ND[~some], targets_N=case.targets_N[~some], labels=rest,
        token_weight_N=case.token_weight_N[~some],
    )  # fmt: skip
    assert_like_dense(without, replace(result, grad_hidden_ND=result.grad_hidden_ND[~some]), grad_weight)
    assert (result.grad_hidden_ND[some] == 0).all()
    assert (head_of(replace(case, token_weight_N=torch.zeros(40)))[1] == 0).all()


def test_looking_only_gives_the_same_losses_and_no_gradient() -> None:
    case = make_case()
    shard = VocabShard(0, 128, case.size, None)
    look = run_head(
        case.hidden_ND, case.weight_VD, case.targets_N, case.token_weight_N, shard,
        objective=case.objective, labels=case.labels,
    )  # fmt: skip
    train, _ = head_of(case)
    assert (look.cross_entropy, look.divergence) == (train.cross_entropy, train.divergence)
    assert look.grad_hidden_ND is None and look.labels is None


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 128, 150])
@pytest.mark.parametrize(
    "chunk", [Chunk(64), Chunk(1), Chunk(64, 128), Chunk(1000, 64), Chunk(7, 37), Chunk(64, 1)], ids=str
)
def test_chunk_boundaries_change_nothing(tokens: int, chunk: Chunk) -> None:
    case = make_case(tokens=tokens)
    whole, grad_whole = head_of(case, top_k=4)
    result, grad_weight = head_of(case, top_k=4, chunk=chunk)
    assert_like_dense(case, result, grad_weight)
    assert (grad_weight - grad_whole).abs().max() < 1e-5
    assert whole.labels is not None and result.labels is not None
    assert torch.equal(whole.labels.ids_NK, result.labels.ids_NK)
    assert torch.allclose(whole.labels.log_prob_NK, result.labels.log_prob_NK, atol=1e-6)
    assert len(result.labels.log_norm_N) == tokens


@pytest.mark.parametrize("objective", [Objective(0.0, 1.0), Objective(0.6, 2.0)], ids=str)
def test_bf16_hidden_states_and_weights_stay_within_their_rounding(objective: Objective) -> None:
    """A bf16 logit is off by at most 2^-9 of itself, here up to 2^-6 nats; a mean over 400 tokens by far less."""
    case = make_case(objective, tokens=400)
    case = replace(case, hidden_ND=case.hidden_ND.bfloat16(), weight_VD=case.weight_VD.bfloat16())
    result, grad_weight = head_of(case)
    want = dense(case)
    assert result.grad_hidden_ND is not None
    assert result.grad_hidden_ND.dtype == torch.bfloat16 and grad_weight.dtype == torch.float32
    assert abs(result.cross_entropy - want.cross_entropy) / 400 < 2**-9
    assert abs(result.divergence - want.divergence) / 400 < 2**-9
    for got, wanted in ((result.grad_hidden_ND, want.grad_hidden_ND), (grad_weight, want.grad_weight_VD)):
        assert (got - wanted).norm() < 2**-7 * wanted.norm()


# --- labels that it makes ---


def assert_top_k(case: Case, result: HeadResult, top_k: int) -> None:
    want, temperature = dense(case), case.objective.temperature
    values, ids = want.log_q_NV.topk(top_k, dim=1)
    says = result.labels
    assert says is not None
    assert torch.equal(says.ids_NK, ids)
    assert (says.log_prob_NK - values).abs().max() < 1e-5
    tempered = says.log_prob_NK / temperature - says.log_norm_N[:, None]
    assert (tempered - want.log_q_tempered_NV.gather(1, ids)).abs().max() < 1e-5


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("top_k", [1, 16, 100])
def test_the_labels_are_the_top_of_the_dense_distribution(top_k: int, temperature: float) -> None:
    case = make_case(Objective(temperature=temperature))
    assert_top_k(case, head_of(case, top_k=top_k)[0], top_k)


def test_what_a_teacher_says_of_its_own_distribution_has_no_divergence() -> None:
    case = make_case(Objective(1.0, 2.0))
    says = head_of(case, top_k=7)[0].labels
    assert says is not None
    itself = SparseLabels(says.ids_NK, says.log_prob_NK / 2.0 - says.log_norm_N[:, None])
    result, grad_weight = head_of(replace(case, labels=itself))
    assert abs(result.divergence) / 40 < 1e-6 and grad_weight.abs().max() < 1e-5


# --- the vocabulary over tensor ranks ---

SHARDED = {
    "whole": (256, 256),
    "padded": (200, 256),
    "a-rank-of-padding": (130, 256),  # of four ranks the last holds padding alone
}
TEMPERED = [Objective(0.0, 1.0), Objective(0.6, 1.0), Objective(0.6, 2.0)]


def sharded_heads(world: World) -> list[tuple[Any, Tensor]]:
    answers = []
    for size, rows in SHARDED.values():
        for objective in TEMPERED:
            case = make_case(objective, tokens=100, size=size, rows=rows)
            answers += [head_of(case, world, 9, chunk) for chunk in (Chunk(64), Chunk(), Chunk(64, 48))]
    return answers


@pytest.mark.parametrize("tp", [2, 4])
def test_a_sharded_vocabulary_gives_the_dense_losses_gradients_and_labels(tp: int) -> None:
    ranks = run_world(LayoutSettings(tp=tp), sharded_heads)
    cases = [make_case(objective, 100, size, rows) for size, rows in SHARDED.values() for objective in TEMPERED]
    for index, answers in enumerate(zip(*ranks, strict=True)):
        case = cases[index // 3]
        grad_weight = torch.cat([grad for _, grad in answers])
        for result, _ in answers:
            assert_like_dense(case, result, grad_weight)
            assert_top_k(case, result, 9)
            assert torch.equal(result.labels.ids_NK, answers[0][0].labels.ids_NK)


def wide_top_k(world: World) -> Any:
    """More entries than a rank has rows."""
    case = make_case(tokens=10, size=120, rows=128)
    return head_of(case, world, top_k=70)[0]


def test_a_label_may_have_more_entries_than_a_rank_has_rows() -> None:
    for result in run_world(LayoutSettings(tp=4), wide_top_k):
        assert_top_k(make_case(tokens=10, size=120, rows=128), result, 70)


def equal_logits(world: World) -> Tensor:
    case = make_case(tokens=20, size=100, rows=128)
    result, _ = head_of(replace(case, weight_VD=torch.zeros(128, WIDTH)), world, top_k=6)
    assert result.labels is not None
    return result.labels.ids_NK


def test_among_equal_logits_the_label_names_distinct_real_entries_the_same_on_every_rank() -> None:
    first, second = run_world(LayoutSettings(tp=2), equal_logits)
    assert torch.equal(first, second)
    assert all(len(set(row)) == 6 and max(row) < 100 for row in first.tolist())
