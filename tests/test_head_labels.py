"""Forms of sparse labels in the loss, and the labels a teacher makes, against dense float64."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.drawn import priorities, uniforms
from tests.worlds import World, run_world
from titan.config.model import LayoutSettings
from titan.ops.head import HeadResult, run_head
from titan.ops.label import SparseLabels, TailDraws, TeacherSays
from titan.ops.look import VocabShard
from titan.ops.objective import Chunk, Objective
from titan.ops.says import label_logits

WIDTH = 16
SIZE, ROWS = 90, 128


def problem(tokens: int = 30, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, output weight, targets, and a teacher's log-probabilities over the whole vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, WIDTH, generator=generator)
    weight = torch.randn(ROWS, WIDTH, generator=generator) * 0.5
    targets = torch.randint(0, SIZE, (tokens,), generator=generator)
    teacher = (torch.randn(tokens, SIZE, generator=generator, dtype=torch.float64) * 2).log_softmax(1)
    return hidden, weight, targets, teacher


def tempered(log_p: Tensor, temperature: float) -> Tensor:
    return (log_p / temperature).log_softmax(1)


def gradients(
    labels: SparseLabels | None, objective: Objective, chunk: Chunk | None = None, tokens: int = 30
) -> tuple[HeadResult, Tensor]:
    hidden, weight, targets, _ = problem(tokens)
    grad_weight = torch.zeros(ROWS, WIDTH)
    result = run_head(
        hidden, weight, targets, torch.ones(tokens), VocabShard(0, ROWS, SIZE, None), objective=objective,
        labels=labels, grad_weight_VD=grad_weight, chunk=chunk,
    )  # fmt: skip
    return result, grad_weight


def dense_gradients(loss_of_logits: object, tokens: int = 30) -> tuple[Tensor, Tensor]:
    """Of a loss written in whole float64 logits."""
    hidden, weight, _, _ = problem(tokens)
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    loss = loss_of_logits((hidden @ weight.T)[:, :SIZE])  # type: ignore[operator]
    return torch.autograd.grad(loss, (hidden, weight))


def assert_gradients(result: HeadResult, grad_weight: Tensor, expected: tuple[Tensor, Tensor]) -> None:
    assert result.grad_hidden_ND is not None
    for got, wanted in zip((result.grad_hidden_ND, grad_weight), expected, strict=True):
        assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("chunk", [None, Chunk(7), Chunk(11, 37)], ids=str)
def test_weights_that_sum_to_one_give_the_cross_entropy_of_those_weights(
    temperature: float, chunk: Chunk | None
) -> None:
    """A renormalised top k; and sampled ids, some of them twice."""
    _, _, targets, teacher = problem()
    log_p, top = tempered(teacher, temperature).topk(6, dim=1)
    top_k = SparseLabels(top, log_p.log_softmax(1).float(), tail="none")
    sampled = torch.multinomial(teacher.exp(), 8, replacement=True, generator=torch.Generator().manual_seed(1))
    shares = SparseLabels(sampled, torch.full((30, 8), -math.log(8)), tail="none")
    for labels in (top_k, shares):
        objective = Objective(0.7, temperature)
        result, grad_weight = gradients(labels, objective, chunk)
        p = labels.log_prob_NK.double().exp()

        def loss(z: Tensor, labels: SparseLabels = labels, p: Tensor = p) -> Tensor:
            soft = -(p * tempered(z, temperature).gather(1, labels.ids_NK)).sum()
            hard = torch.nn.functional.cross_entropy(z, targets, reduction="sum")
            return 0.3 * hard + 0.7 * temperature**2 * soft

        assert_gradients(result, grad_weight, dense_gradients(loss))


@pytest.mark.parametrize("shrink", [1.0, 0.4])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_draws_of_the_tail_have_the_gradient_of_their_surrogate(temperature: float, shrink: float) -> None:
    """Bucket KL minus shrink (1 - P) / M sum_j stopgrad(w_j) z_j / T; rows have different numbers of draws."""
    labels, head_mass, tail_log_p = head_and_draws(temperature, draws=3)
    assert labels.draw_log_prob_NM is not None and labels.draw_ids_NM is not None
    fewer = labels.draw_log_prob_NM.clone()
    fewer[::3, 1] = -torch.inf
    fewer[5] = -torch.inf
    per_token = torch.full((30,), shrink) * torch.linspace(0.5, 1.0, 30)
    count = (fewer > -torch.inf).sum(1)
    mass = ((1 - head_mass) / count.clamp_min(1)).where(count > 0, 0.0).float()
    labels = replace(labels, draw_log_prob_NM=fewer, shrink=per_token, draw_mass_N=mass)
    result, grad_weight = gradients(labels, Objective(1.0, temperature))

    def loss(z: Tensor) -> Tensor:
        log_q = tempered(z, temperature)
        q = log_q.exp()
        in_head = torch.zeros_like(q, dtype=torch.bool).scatter(1, labels.ids_NK, True)
        tail_q = q.masked_fill(in_head, 0.0).sum(1)
        tail_p = 1 - head_mass
        log_p = labels.log_prob_NK.double()
        bucket = (log_p.exp() * (log_p - log_q.gather(1, labels.ids_NK))).sum(1) + tail_p * (tail_p / tail_q).log()
        ids, present = labels.draw_ids_NM, fewer > -torch.inf
        w = 1 - (q / tail_q[:, None]).gather(1, ids) / tail_log_p.gather(1, ids).exp()
        count = present.sum(1).clamp_min(1)
        term = (w.detach() * z.gather(1, ids) / temperature * present).sum(1) * per_token * tail_p / count
        return temperature**2 * (bucket - term).sum()

    assert_gradients(result, grad_weight, dense_gradients(loss))


def head_and_draws(temperature: float, draws: int) -> tuple[SparseLabels, Tensor, Tensor]:
    """Labels of the four most likely ids and independent draws; the head's mass; the log of the teacher's tail."""
    teacher = tempered(problem()[3], temperature)
    log_p, head = teacher.topk(4, dim=1)
    tail = teacher.scatter(1, head, -torch.inf).log_softmax(1)
    drawn = torch.multinomial(tail.exp(), draws, replacement=True, generator=torch.Generator().manual_seed(2))
    mass = ((1 - log_p.exp().sum(1)) / draws).float()
    labels = SparseLabels(head, log_p.float(), "bucket", drawn, teacher.gather(1, drawn).float(), draw_mass_N=mass)
    return labels, log_p.exp().sum(1), tail


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_over_all_draws_loss_and_gradient_are_those_of_the_whole_distribution(temperature: float) -> None:
    """Not sampled: each possible draw, weighted by the teacher's probability of drawing it."""
    labels, _, tail = head_and_draws(temperature, draws=1)
    teacher = tempered(problem()[3], temperature)
    mean_hidden = torch.zeros(30, WIDTH, dtype=torch.float64)
    divergence = torch.zeros((), dtype=torch.float64)
    for id in range(SIZE):
        # tokens that have this id in the head never draw it: their probability below is 0
        drawn = torch.full((30, 1), id)
        one = replace(labels, draw_ids_NM=drawn, draw_log_prob_NM=teacher[:, id : id + 1].float())
        probability = tail[:, id].exp()
        result, _ = gradients(one, Objective(1.0, temperature))
        assert result.grad_hidden_ND is not None
        mean_hidden += result.grad_hidden_ND.double() * probability[:, None]
        hidden, weight, targets, _ = problem()
        only = run_head(
            hidden, weight, targets, probability.float(), VocabShard(0, ROWS, SIZE, None),
            objective=Objective(1.0, temperature), labels=one,
        )  # fmt: skip
        divergence += only.divergence

    def kl(z: Tensor) -> Tensor:
        return (teacher.exp() * (teacher - tempered(z, temperature))).sum()

    expected, _ = dense_gradients(lambda z: temperature**2 * kl(z))
    assert (mean_hidden - expected).abs().max() <= 1e-5 * expected.abs().max()
    hidden, weight, _, _ = problem()
    exact = kl((hidden.double() @ weight.double().T)[:, :SIZE])
    assert divergence.item() == pytest.approx(exact.item(), rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("soft", [0.0, 0.6, 1.0])
def test_z_loss_adds_the_square_of_the_log_norm(temperature: float, soft: float) -> None:
    *_, teacher = problem()
    labels = SparseLabels(*reversed_pair(tempered(teacher, temperature).topk(5, dim=1)))
    objective = Objective(soft, temperature, z_loss=0.01)
    result, grad_weight = gradients(labels, objective)
    without, grad_without = gradients(labels, replace(objective, z_loss=0.0))
    assert result.grad_hidden_ND is not None and without.grad_hidden_ND is not None
    hidden, weight, _, _ = problem()
    exact = (hidden.double() @ weight.double().T)[:, :SIZE].logsumexp(1).square().sum()
    assert result.squared_log_norm.item() == pytest.approx(exact.item(), rel=1e-6)
    expected = dense_gradients(lambda z: 0.01 * z.logsumexp(1).square().sum())
    added = replace(result, grad_hidden_ND=result.grad_hidden_ND - without.grad_hidden_ND)
    scale = max(result.grad_hidden_ND.abs().max(), grad_weight.abs().max())
    for got, wanted in zip((added.grad_hidden_ND, grad_weight - grad_without), expected, strict=True):
        assert got is not None and (got - wanted).abs().max() <= 1e-5 * scale


def reversed_pair(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    values, ids = pair
    return ids, values.float()


def test_entries_of_probability_zero_are_as_if_they_were_not_there() -> None:
    labels, _, _ = head_and_draws(1.0, draws=2)
    assert labels.draw_ids_NM is not None and labels.draw_log_prob_NM is not None
    nothing = torch.full((30, 2), -torch.inf)
    padded = replace(
        labels,
        ids_NK=torch.cat([labels.ids_NK, torch.zeros(30, 2, dtype=torch.int64)], 1),
        log_prob_NK=torch.cat([labels.log_prob_NK, nothing], 1),
        draw_ids_NM=torch.cat([labels.draw_ids_NM, torch.zeros(30, 2, dtype=torch.int64)], 1),
        draw_log_prob_NM=torch.cat([labels.draw_log_prob_NM, nothing], 1),
    )
    result, grad = gradients(labels, Objective(0.8))
    same, grad_same = gradients(padded, Objective(0.8))
    assert torch.allclose(result.divergence, same.divergence) and torch.allclose(grad, grad_same, atol=1e-7)
    bare = replace(padded, draw_log_prob_NM=torch.full((30, 4), -torch.inf), draw_mass_N=torch.zeros(30))
    bucket = SparseLabels(labels.ids_NK, labels.log_prob_NK)
    assert torch.allclose(gradients(bare, Objective(0.8))[1], gradients(bucket, Objective(0.8))[1], atol=1e-7)


# --- labels that a teacher makes ---


def draws_of(tokens: int, count: int, seed: int = 5) -> TailDraws:
    return TailDraws(count, seed, torch.arange(tokens) // 7, torch.arange(tokens) % 7)


def says(
    world: World | None = None,
    chunk: Chunk | None = None,
    temperature: float = 1.0,
    tokens: int = 70,
    top_k: int = 5,
    count: int = 6,
    independent: bool = False,
    whole: bool = False,
) -> TeacherSays:
    hidden, weight, targets, _ = problem(tokens)
    weight = (weight * 64).round() / 64  # exact products, so that every layout has the same logits bit for bit
    hidden = (hidden * 64).round() / 64
    tp = 1 if world is None else world.place.stage.tp
    start = 0 if world is None else world.place.tensor * (ROWS // tp)
    shard = VocabShard(start, ROWS // tp, SIZE, None if world is None else world.groups.tp)
    result = run_head(
        hidden, weight[start : start + ROWS // tp], targets, torch.ones(tokens), shard,
        objective=Objective(temperature=temperature), top_k=top_k, whole=whole, chunk=chunk,
        draws=replace(draws_of(tokens, count), independent=independent),
    )  # fmt: skip
    assert result.labels is not None
    return result.labels


def exact_log_p(temperature: float, tokens: int = 70) -> Tensor:
    hidden, weight, _, _ = problem(tokens)
    weight, hidden = (weight * 64).round() / 64, (hidden * 64).round() / 64
    return tempered((hidden.double() @ weight.double().T)[:, :SIZE], temperature)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_label_has_its_entropy_and_draws_with_their_probabilities(temperature: float) -> None:
    label = says(temperature=temperature)
    log_p, log_p_T = exact_log_p(1.0), exact_log_p(temperature)
    assert (label.entropy_N - -(log_p.exp() * log_p).sum(1)).abs().max() < 1e-5
    assert label.draw_ids_NM is not None and label.draw_log_prob_NM is not None
    assert (label.draw_log_prob_NM - log_p_T.gather(1, label.draw_ids_NM)).abs().max() < 1e-5
    in_head = (label.draw_ids_NM[:, :, None] == label.ids_NK[:, None, :]).any()
    assert not in_head and label.draw_ids_NM.max() < SIZE


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("top_k", [5, 0])
def test_draws_are_the_entries_of_the_tail_with_the_highest_priorities(top_k: int, temperature: float) -> None:
    label, draws = says(top_k=top_k, count=20, temperature=temperature), draws_of(70, 20)
    assert label.draw_ids_NM is not None
    tail = exact_log_p(temperature).exp().scatter(1, label.ids_NK, 0.0)
    priority = tail / uniforms(draws, torch.arange(SIZE).expand(70, SIZE), SIZE)
    highest, ids = priority.topk(20, dim=1)
    near = (highest[:, 1:] / highest[:, :-1] > 1 - 1e-5).any(dim=1)
    assert near.float().mean() < 0.2 and torch.equal(ids[~near], label.draw_ids_NM[~near])


def test_a_label_of_few_draws_is_the_beginning_of_one_of_many() -> None:
    for top_k in (5, 0):
        many, few = says(top_k=top_k, count=33), says(top_k=top_k, count=7)
        assert many.draw_ids_NM is not None and few.draw_ids_NM is not None
        assert torch.equal(many.draw_ids_NM[:, :7], few.draw_ids_NM)


def test_independent_draws_are_distributed_as_the_whole_distribution() -> None:
    """20,000 samples of one position: chi-square of each draw alone. With 29 degrees of freedom one exceeds 72 about
    once in 50,000 times.
    """
    samples, count = 20_000, 6
    logits = (torch.randn(1, 30, generator=torch.Generator().manual_seed(4)) * 1.5).expand(samples, 30).contiguous()
    draws = TailDraws(count, 3, torch.arange(samples), torch.full((samples,), 11), independent=True)
    label = label_logits(logits, 0, draws, 1.0, VocabShard(0, 30, 30, None))
    assert label.draw_ids_NM is not None
    expected = logits[0].double().softmax(0) * samples
    for j in range(count):
        hits = torch.bincount(label.draw_ids_NM[:, j], minlength=30).double()
        assert ((hits - expected).square() / expected).sum() < 72
    pairs = (label.draw_ids_NM[:, 0] == label.draw_ids_NM[:, 1]).double().mean()
    by_chance = (expected / samples).square().sum()
    assert abs(pairs - by_chance) < 5 * math.sqrt(by_chance / samples)


@pytest.mark.parametrize("top_k", [4, 0])
def test_an_entry_is_above_a_level_as_often_as_its_probability_over_the_level(top_k: int) -> None:
    """20,000 samples of one position: each entry within 4.5 standard errors."""
    samples, size, level = 20_000, 30, 0.2
    logits = (torch.randn(1, size, generator=torch.Generator().manual_seed(4)) * 1.5).expand(samples, size).contiguous()
    draws = TailDraws(size, 3, torch.arange(samples), torch.full((samples,), 11))
    label = label_logits(logits, top_k, draws, 1.0, VocabShard(0, size, size, None))
    assert label.draw_ids_NM is not None
    above = (priorities(label, draws, size) > level).double()
    drawn = torch.zeros(samples, size, dtype=torch.float64).scatter_add(1, label.draw_ids_NM, above)
    p = logits[0].double().softmax(0)
    p[label.ids_NK[0]] = 0.0
    share = (p / level).clamp_max(1.0)
    error = (share * (1 - share) / samples).sqrt()
    assert ((drawn.mean(0) - share).abs() <= 4.5 * error + 1e-9).all()


def test_the_same_sample_and_position_draw_the_same_whatever_the_batch_and_chunks() -> None:
    label = says()
    for chunk in (Chunk(64), Chunk(1)):
        other = says(chunk=chunk)
        assert label.draw_ids_NM is not None and other.draw_ids_NM is not None
        assert torch.equal(label.draw_ids_NM, other.draw_ids_NM)


WANTED: list[dict[str, Any]] = [
    {}, {"temperature": 2.0, "whole": True}, {"top_k": 0}, {"top_k": 0, "independent": True, "whole": True},
]  # fmt: skip


def sharded_says(world: World) -> list[TeacherSays]:
    return [says(world, **wanted) for wanted in WANTED]


@pytest.mark.parametrize("tp", [2, 4])
def test_labels_and_draws_are_the_same_however_the_vocabulary_is_cut(tp: int) -> None:
    wanted = [says(**each) for each in WANTED]
    for answers in run_world(LayoutSettings(tp=tp), sharded_says):
        for got, want in zip(answers, wanted, strict=True):
            assert torch.equal(got.ids_NK, want.ids_NK)
            assert got.draw_ids_NM is not None and want.draw_ids_NM is not None
            assert torch.equal(got.draw_ids_NM, want.draw_ids_NM)
            assert torch.allclose(got.entropy_N, want.entropy_N, atol=1e-5)
            assert (got.log_prob_NV is None) == (want.log_prob_NV is None)
            if got.log_prob_NV is not None and want.log_prob_NV is not None:
                assert torch.allclose(got.log_prob_NV, want.log_prob_NV, atol=1e-5)


@pytest.mark.parametrize("top_k", [0, 5])
def test_a_label_of_everything_is_the_whole_distribution_without_padding(top_k: int) -> None:
    hidden, weight, targets, _ = problem(70)
    for chunk in (None, Chunk(13)):
        result = run_head(
            hidden, weight, targets, torch.ones(70), VocabShard(0, ROWS, SIZE, None),
            objective=Objective(temperature=2.0), top_k=top_k, whole=True, chunk=chunk,
            grad_weight_VD=torch.zeros(ROWS, WIDTH),
        )  # fmt: skip
        exact = (hidden.double() @ weight.double().T)[:, :SIZE].log_softmax(1)
        assert result.labels is not None and result.labels.log_prob_NV is not None
        assert result.labels.log_prob_NV.shape == (70, SIZE) and result.labels.ids_NK.shape == (70, top_k)
        assert (result.labels.log_prob_NV - exact).abs().max() < 1e-5


def test_a_head_that_is_the_whole_vocabulary_leaves_nothing_to_draw() -> None:
    hidden, weight, targets, _ = problem(4)
    result = run_head(
        hidden, weight, targets, torch.ones(4), VocabShard(0, ROWS, SIZE, None), objective=Objective(), top_k=SIZE,
        draws=draws_of(4, 3),
    )  # fmt: skip
    assert result.labels is not None and result.labels.draw_log_prob_NM is not None
    assert (result.labels.draw_log_prob_NM == -torch.inf).all()
    itself = SparseLabels(
        result.labels.ids_NK,
        result.labels.log_prob_NK,
        "bucket",
        result.labels.draw_ids_NM,
        result.labels.draw_log_prob_NM,
        draw_mass_N=torch.zeros(4),
    )
    assert gradients(itself, Objective(1.0), tokens=4)[0].divergence.isfinite()


# --- as a user calls it ---


def test_the_whole_loss_compiles_as_one_graph() -> None:
    hidden, weight, targets, _ = problem()
    labels, _, _ = head_and_draws(1.0, draws=2)

    def loss(hidden: Tensor, weight: Tensor, grad_weight: Tensor) -> tuple[Tensor, Tensor]:
        result = run_head(
            hidden, weight, targets, torch.ones(30), VocabShard(0, ROWS, SIZE, None), objective=Objective(0.5),
            labels=labels, grad_weight_VD=grad_weight, chunk=Chunk(8),
        )  # fmt: skip
        assert result.grad_hidden_ND is not None
        return result.divergence, result.grad_hidden_ND

    eager, whole = torch.zeros(ROWS, WIDTH), torch.zeros(ROWS, WIDTH)
    wanted = loss(hidden, weight, eager)
    got = torch.compile(loss, fullgraph=True, backend="aot_eager")(hidden, weight, whole)
    assert torch.allclose(got[0], wanted[0]) and torch.allclose(got[1], wanted[1]) and torch.allclose(eager, whole)


def test_a_mistake_is_named() -> None:
    hidden, weight, targets, _ = problem()
    labels, _, _ = head_and_draws(1.0, draws=2)
    shard, ones = VocabShard(0, ROWS, SIZE, None), torch.ones(30)

    def call(message: str, **changes: object) -> None:
        arguments: dict[str, object] = {
            "hidden_ND": hidden, "weight_VD": weight, "targets_N": targets, "token_weight_N": ones, "shard": shard,
            "objective": Objective(0.5), "labels": labels,
        }  # fmt: skip
        with pytest.raises((ValueError, RuntimeError), match=message):
            run_head(**(arguments | changes))  # type: ignore[arg-type]

    call(r"weight_VD must be \[128, 16\], got \[64, 16\]", weight_VD=weight[:64])
    call("weight_VD must be torch.float32 as hidden_ND is", weight_VD=weight.double())
    call(r"targets_N must be \[30\], got \[29\]", targets_N=targets[1:])
    call(r"token_weight_N must be \[30\]", token_weight_N=ones[1:])
    call("objective.weight must be from 0 to 1, got 1.5", objective=Objective(1.5))
    call("temperature above 0", objective=Objective(0.5, 0.0))
    call("top_k must be from 0 to the vocabulary's 90, got 91", top_k=91)
    call(
        "top_k must be 0 where draws are independent, got 2", draws=replace(draws_of(30, 2), independent=True), top_k=2
    )
    call("chunk.columns must be None", draws=draws_of(30, 2), top_k=2, chunk=Chunk(columns=8))
    call("chunk.columns must be None", whole=True, chunk=Chunk(columns=8))
    call("chunk.tokens must be at least 1, got 0", chunk=Chunk(tokens=0))
    call(
        r"labels.ids_NK must be in \[0, 90\), got 0 to 90",
        labels=replace(labels, ids_NK=labels.ids_NK.clone().fill_(90).triu()),
    )
    call(
        r"labels.log_prob_NK must hold probabilities that sum to at most 1",
        labels=replace(labels, log_prob_NK=labels.log_prob_NK + 1),
    )
    call("sum to at most 1", labels=replace(labels, log_prob_NK=labels.log_prob_NK * math.nan))
    call("sum to 1 a token", labels=SparseLabels(labels.ids_NK, labels.log_prob_NK - 1, tail="none"))
    call("labels.tail must be bucket", labels=replace(labels, tail="none"))
    call("belong together", labels=replace(labels, draw_ids_NM=None))
    call(r"labels.draw_log_prob_NM must be \[30, 2\]", labels=replace(labels, draw_log_prob_NM=torch.zeros(30, 3)))
    call(r"labels.ids_NK must be \[30, 4\]", labels=replace(labels, ids_NK=labels.ids_NK[1:]))
    call(r"targets_N must be in \[0, 90\), got 90 to 90", targets_N=torch.full((30,), SIZE))
