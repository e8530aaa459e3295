"""Losses between features beside the papers' equations written out in loops, and gradients beside differences."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from titan.ops.attention import Visibility
from titan.ops.features.exchange import with_loss
from titan.ops.features.hidden import affinity_loss, hint_loss
from titan.ops.features.relation import relation_loss

SAMPLES, LENGTH = 2, 7
CAUSAL = Visibility()
SEGMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1, 2]], dtype=torch.int32)
VISIBILITIES = {
    "causal": CAUSAL,
    "all": Visibility(causal=False),
    "segments": Visibility(True, SEGMENTS, SEGMENTS),
}


def heads(seed: int, count: int, width: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """[S, B, H, D]"""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(LENGTH, SAMPLES, count, width, generator=generator, dtype=torch.float64)
    return x.to(dtype)


def sees(visibility: Visibility, sample: int, row: int) -> list[int]:
    keys = range(row + 1) if visibility.causal else range(LENGTH)
    segments = visibility.query_segments
    return [key for key in keys if segments is None or segments[sample, row] == segments[sample, key]]


def distribution(left: Tensor, right: Tensor, count: int, head: int, sample: int, row: int, keys: list[int]) -> Tensor:
    """softmax over keys of left . right / sqrt(d_r), of one relation head of one position."""
    group = left.shape[2] // right.shape[2]
    right = torch.stack([right[:, :, index // group] for index in range(left.shape[2])], dim=2)
    width = left.shape[2] * left.shape[3] // count
    own = slice(head * width, (head + 1) * width)
    query, seen = left[row, sample].reshape(-1)[own], right[keys, sample].reshape(len(keys), -1)[:, own]
    return (seen @ query / math.sqrt(width)).softmax(dim=0)


def slow_relation(
    student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], count: int, visibility: Visibility, rule: str
) -> Tensor:
    """Relation head by relation head, sample by sample, position by position."""
    total = torch.zeros((), dtype=torch.float64)
    for head in range(count):
        for sample in range(SAMPLES):
            for row in range(LENGTH):
                keys = sees(visibility, sample, row)
                p = distribution(*teacher, count, head, sample, row, keys)
                q = distribution(*student, count, head, sample, row, keys)
                loss = (p * (p.log() - q.log())).sum() if rule == "kl" else ((p - q) ** 2).sum()
                total = total + loss / count
    return total


def slow_affinity(student: Tensor, teacher: Tensor, visibility: Visibility) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for sample in range(SAMPLES):
        for row in range(LENGTH):
            keys = sees(visibility, sample, row)
            for key in keys:
                cosines = [F.cosine_similarity(h[row, sample], h[key, sample], dim=0) for h in (student, teacher)]
                total = total + (cosines[0] - cosines[1]).abs() / len(keys)
    return total


# student's heads and key heads, teacher's, relation heads
SHAPES = {
    "same heads": ((4, 4, 3), (4, 4, 5), 4),
    "fewer heads than the teacher": ((2, 2, 6), (6, 6, 4), 2),
    "more relation heads than heads": ((2, 2, 6), (3, 3, 4), 6),
    "relation heads across heads": ((2, 2, 6), (8, 8, 3), 3),
    "grouped queries": ((4, 2, 4), (6, 3, 2), 2),
}


@pytest.mark.parametrize("visibility", VISIBILITIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_relations_are_those_of_the_paper_in_any_chunks(shape: str, visibility: str) -> None:
    """Queries with queries, and queries with keys, with their gradients."""
    (own, own_keys, own_width), (their, their_keys, their_width), count = SHAPES[shape]
    query, key = heads(1, own, own_width).requires_grad_(), heads(2, own_keys, own_width).requires_grad_()
    their_query, their_key = heads(3, their, their_width), heads(4, their_keys, their_width)
    seen = VISIBILITIES[visibility]
    for rule, right, their_right in [
        ("kl", query, their_query), ("kl", key, their_key), ("squared", key, their_key)
    ]:  # fmt: skip
        inputs = [query] if right is query else [query, key]
        want = slow_relation((query, right), (their_query, their_right), count, seen, rule)
        assert want > 0.01
        wanted = torch.autograd.grad(want * 0.7, inputs)
        for chunk in (1, 13, 20, 100, 1 << 20):
            got = relation_loss(
                (query, right), (their_query, their_right), count, seen, rule=rule, chunk_elements=chunk
            )
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(torch.autograd.grad(got * 0.7, inputs), wanted, rtol=1e-10, atol=1e-12)


def test_queries_with_keys_at_the_models_own_heads_are_its_attention() -> None:
    """ERNIE 3.0 Titan's loss: KL of the attention probabilities that torch itself makes."""
    query, key, their_query, their_key = heads(1, 4, 3), heads(2, 2, 3), heads(3, 4, 5), heads(4, 4, 5)

    def probabilities(q: Tensor, k: Tensor) -> Tensor:
        k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
        eye = torch.eye(LENGTH, dtype=torch.float64).expand(SAMPLES, q.shape[2], LENGTH, LENGTH)
        return F.scaled_dot_product_attention(q.permute(1, 2, 0, 3), k.permute(1, 2, 0, 3), eye, is_causal=True)

    log_q, p = probabilities(query, key).log(), probabilities(their_query, their_key)
    want = torch.where(p > 0, p * (p.log() - log_q), 0.0).sum() / 4
    torch.testing.assert_close(relation_loss((query, key), (their_query, their_key), 4, CAUSAL), want)


@pytest.mark.parametrize("rule", ["kl", "squared"])
def test_gradients_of_relations_are_differences_of_the_loss(rule: str) -> None:
    visibility = "segments"
    query, key = heads(1, 4, 3).requires_grad_(), heads(2, 2, 3).requires_grad_()
    teacher = heads(3, 2, 5), heads(4, 2, 5)

    def loss(query: Tensor, key: Tensor) -> Tensor:
        return relation_loss((query, key), teacher, 2, VISIBILITIES[visibility], rule=rule, chunk_elements=20)

    def of_one(query: Tensor) -> Tensor:
        return relation_loss((query, query), teacher[:1] * 2, 2, VISIBILITIES[visibility], rule=rule, chunk_elements=20)

    assert torch.autograd.gradcheck(loss, (query, key))
    assert torch.autograd.gradcheck(of_one, (query,))


@pytest.mark.parametrize("widths", [(6, 6, False), (6, 6, True), (6, 10, True)], ids=str)
def test_a_hint_is_the_squared_distance_after_the_projection(widths: tuple[int, int, bool]) -> None:
    own, their, projects = widths
    student, teacher = heads(1, 1, own)[:, :, 0].requires_grad_(), heads(2, 1, their)[:, :, 0]
    projection = torch.randn(their, own, dtype=torch.float64, requires_grad=True) if projects else None
    inputs = [student] if projection is None else [student, projection]
    want = torch.zeros((), dtype=torch.float64)
    for row in range(LENGTH):
        for sample in range(SAMPLES):
            said = student[row, sample] if projection is None else projection @ student[row, sample]
            want = want + ((said - teacher[row, sample]) ** 2).mean()
    for rows in (1, 5, 1000):
        got = hint_loss(student, teacher, projection, rows)
        torch.testing.assert_close(got, want)
        for mine, wanted in zip(
            torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs, retain_graph=True), strict=True
        ):
            torch.testing.assert_close(mine, wanted)
    assert torch.autograd.gradcheck(lambda *x: hint_loss(x[0], teacher, *x[1:] or [None], rows=5), tuple(inputs))


@pytest.mark.parametrize("visibility", VISIBILITIES)
def test_affinity_is_how_alike_the_positions_of_a_sample_are(visibility: str) -> None:
    student, teacher = heads(1, 1, 6)[:, :, 0].requires_grad_(), heads(2, 1, 10)[:, :, 0]
    seen = VISIBILITIES[visibility]
    want = slow_affinity(student, teacher, seen)
    (wanted,) = torch.autograd.grad(want, student)
    for chunk in (1, 20, 1 << 20):
        got = affinity_loss(student, teacher, seen, chunk)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(torch.autograd.grad(got, student)[0], wanted)
    # the cosine of a position with itself is 1 in both models up to rounding: a kink, but one without a slope in h
    assert torch.autograd.gradcheck(lambda x: affinity_loss(x, teacher, seen, 20), (student,), atol=1e-4)


def test_what_a_position_is_taught_does_not_depend_on_later_ones() -> None:
    """The relation of a causal row is to itself and those before, on both sides."""
    student, teacher = heads(1, 2, 6), heads(2, 2, 6)
    later, later_teacher = student.clone(), teacher.clone()
    later[4:], later_teacher[4:] = heads(3, 2, 6)[4:], heads(4, 2, 6)[4:]

    def of_first_rows(x: Tensor, y: Tensor) -> Tensor:
        return relation_loss((x[:4], x[:4]), (y[:4], y[:4]), 2, CAUSAL)

    assert of_first_rows(student, teacher) == of_first_rows(later, later_teacher)
    rows = [(head, sample, row) for head in range(2) for sample in range(SAMPLES) for row in range(4, LENGTH)]
    rest = torch.zeros((), dtype=torch.float64)
    for head, sample, row in rows:
        q, p = (distribution(x, x, 2, head, sample, row, list(range(row + 1))) for x in (later, later_teacher))
        rest += F.kl_div(q.log(), p, reduction="sum") / 2
    whole = relation_loss((later, later), (later_teacher, later_teacher), 2, CAUSAL)
    torch.testing.assert_close(whole, of_first_rows(student, teacher) + rest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_features_are_compared_in_float32(dtype: torch.dtype) -> None:
    """The loss is that of the rounded numbers; the gradient comes back in their type."""
    query, teacher = heads(1, 4, 3, dtype).requires_grad_(), heads(2, 2, 5, dtype)
    exact = query.detach().double().requires_grad_()
    got = relation_loss((query, query), (teacher, teacher), 2, CAUSAL)
    want = relation_loss((exact, exact), (teacher.double(), teacher.double()), 2, CAUSAL)
    assert got.dtype == torch.float32 and got.item() == pytest.approx(want.item(), rel=1e-5)
    (mine,), (wanted,) = torch.autograd.grad(got, query), torch.autograd.grad(want, exact)
    assert mine.dtype == dtype
    torch.testing.assert_close(mine.double(), wanted, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


def test_the_teacher_gets_no_gradient() -> None:
    student, teacher = heads(1, 2, 6).requires_grad_(), heads(2, 2, 6).requires_grad_()
    losses: list[Callable[[], Tensor]] = [
        lambda: relation_loss((student, student), (teacher, teacher), 2, CAUSAL),
        lambda: hint_loss(student[:, :, 0], teacher[:, :, 0], None),
        lambda: affinity_loss(student[:, :, 0], teacher[:, :, 0], CAUSAL),
    ]
    for loss in losses:
        loss().backward()
    assert student.grad is not None and student.grad.any() and teacher.grad is None


def test_a_loss_that_joins_hidden_states_is_differentiated_with_them() -> None:
    x, upstream = heads(1, 1, 6).requires_grad_(), heads(2, 1, 6)
    hidden = x * 2.0
    joined = with_loss(hidden, x.square().sum(), 0.25)
    assert torch.equal(joined, hidden)
    joined.backward(upstream)
    torch.testing.assert_close(x.grad, 2.0 * upstream + 0.25 * 2.0 * x.detach())


def test_memory_is_that_of_one_chunk() -> None:
    """The largest tensor that the losses make, beside the scores of all heads and samples at once."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else [out]:
                if isinstance(x, Tensor):
                    self.size = max(self.size, x.numel())
            return out

    x, y = torch.randn(256, 4, 8, 4, requires_grad=True), torch.randn(256, 4, 8, 8)
    features = 256 * 4 * 8 * 8
    with Largest() as largest:
        relation_loss((x, x), (y, y), 8, CAUSAL, chunk_elements=8192).backward()
        hint_loss(x.flatten(2), y.flatten(2)[..., :32], None).backward()
        affinity_loss(x.flatten(2), y.flatten(2), CAUSAL, chunk_elements=8192).backward()
    assert largest.size <= features < 256 * 256 * 4 * 8


def test_what_does_not_fit_is_refused_with_a_remedy() -> None:
    with pytest.raises(ValueError, match="2 heads of 6 cannot be cut into 5 relation heads; take a divisor of 2"):
        relation_loss((heads(1, 2, 6),) * 2, (heads(2, 5, 6),) * 2, 5, CAUSAL)
    with pytest.raises(ValueError, match="hidden states of 6 and 10 need a projection"):
        hint_loss(heads(1, 1, 6)[:, :, 0], heads(2, 1, 10)[:, :, 0], None)
