"""The control variate of drawn labels: any multiple of the student's tail is unbiased, and the one that draws tell is
the least noisy.
"""

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.drawn import drawn_labels
from tests.worlds import labels_of, make_trainer, run_world, tokens_of
from titan.config.model import LayoutSettings
from titan.distill.control import ControlTracker
from titan.ops.head import HeadResult, run_head
from titan.ops.label import DenseLabels, SparseLabels, TailDraws
from titan.ops.look import VocabShard
from titan.ops.objective import Chunk, Objective
from titan.ops.says import label_logits
from titan.ops.sparse import CAP, LOOKED_AT
from titan.parallel.world import World

TOKENS, SIZE, ROWS, WIDTH = 30, 90, 128, 16


def problem() -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, output weight, and a teacher's log-probabilities."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator)
    weight = torch.randn(ROWS, WIDTH, generator=generator) * 0.5
    teacher = (torch.randn(TOKENS, SIZE, generator=generator, dtype=torch.float64) * 2).log_softmax(1)
    return hidden, weight, teacher


def head_and_draws(temperature: float, draws: int) -> SparseLabels:
    """Four entries and independent draws from behind them; every third token lacks a draw, one has none."""
    teacher = (problem()[2] / temperature).log_softmax(1)
    log_p, head = teacher.topk(4, dim=1)
    log_p[::4, 2:] = -torch.inf
    kept = torch.zeros(TOKENS, SIZE, dtype=torch.bool).scatter(1, head, log_p > -torch.inf)
    tail = teacher.masked_fill(kept, -torch.inf).exp()
    drawn = torch.multinomial(tail, draws, replacement=True, generator=torch.Generator().manual_seed(2))
    log_drawn = teacher.gather(1, drawn)
    log_drawn[::3, 1:2] = -torch.inf
    log_drawn[5] = -torch.inf
    count = (log_drawn > -torch.inf).sum(1)
    mass = ((1 - log_p.exp().sum(1)) / count.clamp_min(1)).where(count > 0, 0.0)
    return SparseLabels(head, log_p.float(), "bucket", drawn, log_drawn.float(), draw_mass_N=mass.float())


def head_of(
    labels: SparseLabels, objective: Objective, counts: Tensor | None = None, chunk: Chunk | None = None
) -> tuple[HeadResult, Tensor]:
    hidden, weight, _ = problem()
    grad_weight = torch.zeros(ROWS, WIDTH)
    result = run_head(
        hidden, weight, torch.zeros(TOKENS, dtype=torch.int64), torch.ones(TOKENS) if counts is None else counts,
        VocabShard(0, ROWS, SIZE, None), objective=objective, labels=labels, grad_weight_VD=grad_weight, chunk=chunk,
    )  # fmt: skip
    return result, grad_weight


def student_tail(labels: SparseLabels, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """float64: q, the student's distribution within the tail, the teacher's tail mass, and which ids are the head."""
    hidden, weight, _ = problem()
    q = ((hidden.double() @ weight.double().T)[:, :SIZE] / temperature).softmax(1)
    real = labels.log_prob_NK > -torch.inf
    head = torch.zeros(TOKENS, SIZE, dtype=torch.bool).scatter(1, labels.ids_NK, real)
    tail = q.masked_fill(head, 0.0)
    return q, tail / tail.sum(1, keepdim=True), 1 - labels.log_prob_NK.double().exp().sum(1), head


def held_against(q: Tensor, inner: Tensor, draws: int, control: float) -> Tensor:
    """The student's own tail, of whose largest entries none may be above a share of what a draw stands for."""
    own = inner.clone()
    for id in q.topk(LOOKED_AT).indices if control < 1 else ():
        own[id] = min(float(own[id]), CAP / (1 - control) / max(1, draws))
    return own


def written_out(labels: SparseLabels, temperature: float) -> Tensor:
    """q - t in logits / T, entry by entry."""
    q, inner, mass, _ = student_tail(labels, temperature)
    assert labels.draw_ids_NM is not None and labels.draw_log_prob_NM is not None
    target = mass[:, None] * inner
    shrink = labels.shrink if isinstance(labels.shrink, Tensor) else torch.full((TOKENS,), float(labels.shrink))
    for n in range(TOKENS):
        draws = [j for j in range(labels.draw_ids_NM.shape[1]) if labels.draw_log_prob_NM[n, j] > -torch.inf]
        own = held_against(q[n], inner[n], len(draws), labels.control)
        drawn = mass[n] * labels.control * own
        for j in draws:
            id = int(labels.draw_ids_NM[n, j])
            r = own[id] / (labels.draw_log_prob_NM[n, j].double().exp() / mass[n])
            drawn[id] += mass[n] / len(draws) * (1 - labels.control * r)
        if draws:
            target[n] = shrink[n] * drawn + (1 - shrink[n]) * target[n]
        for k in range(labels.ids_NK.shape[1]):
            if labels.log_prob_NK[n, k] > -torch.inf:
                target[n, labels.ids_NK[n, k]] = labels.log_prob_NK[n, k].double().exp()
    return q - target


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("control", [0.0, 0.3, 1.0])
def test_the_gradient_is_the_students_distribution_minus_the_target_written_out(
    control: float, temperature: float
) -> None:
    hidden, weight, _ = problem()
    for shrink in (1.0, torch.linspace(0.4, 1.0, TOKENS)):
        labels = replace(head_and_draws(temperature, 3), control=control, shrink=shrink)
        result, grad_weight = head_of(labels, Objective(1.0, temperature), chunk=Chunk(7))
        logits = temperature * written_out(labels, temperature)
        assert result.grad_hidden_ND is not None
        for got, want in (
            (result.grad_hidden_ND, logits @ weight[:SIZE].double()),
            (grad_weight[:SIZE], logits.T @ hidden.double()),
        ):
            assert (got - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("control", [0.0, 0.4, 1.0])
def test_over_all_draws_the_gradient_is_that_of_the_whole_distribution(control: float) -> None:
    """Not sampled: each possible draw, weighted by the teacher's probability of drawing it."""
    hidden, weight, teacher = problem()
    labels = head_and_draws(1.0, 1)
    *_, head = student_tail(labels, 1.0)
    tail = teacher.masked_fill(head, -torch.inf).softmax(1)
    mean = torch.zeros(TOKENS, WIDTH, dtype=torch.float64)
    for id in range(SIZE):
        one = replace(
            labels, draw_ids_NM=torch.full((TOKENS, 1), id), draw_log_prob_NM=teacher[:, id : id + 1].float(),
            control=control, draw_mass_N=(1 - labels.log_prob_NK.double().exp().sum(1)).float(),
        )  # fmt: skip
        gradient = head_of(one, Objective(1.0))[0].grad_hidden_ND
        assert gradient is not None
        mean += gradient.double() * tail[:, id : id + 1]
    q = (hidden.double() @ weight.double().T)[:, :SIZE].softmax(1)
    want = (q - teacher.exp()) @ weight[:SIZE].double()
    assert (mean - want).abs().max() <= 1e-5 * want.abs().max()


def test_what_draws_tell_of_the_control_is_summed_over_tokens_that_count() -> None:
    """sum w r and sum w r^2, in any chunks, at any control; padding tokens of weight 0 tell nothing."""
    counts = torch.linspace(0.0, 1.5, TOKENS)
    labels = head_and_draws(2.0, 3)
    q, inner, mass, _ = student_tail(labels, 2.0)
    assert labels.draw_ids_NM is not None and labels.draw_log_prob_NM is not None
    real = labels.draw_log_prob_NM > -torch.inf
    w = (counts * mass / real.sum(1).clamp_min(1)).square()[:, None] * real
    for chunk, control in ((None, 1.0), (Chunk(7), 0.2), (Chunk(11, 37), 0.0)):
        own = torch.stack([held_against(q[n], inner[n], int(real[n].sum()), control) for n in range(TOKENS)])
        assert ((own < inner).any(dim=1).float().mean() > 0.9) == (control < 1), "nearly all tokens have some capped"
        r = own.gather(1, labels.draw_ids_NM) / (labels.draw_log_prob_NM.double().exp() / mass[:, None])
        want = [(w * r.where(real, 0.0)).sum().item(), (w * r.where(real, 0.0).square()).sum().item()]
        got = head_of(replace(labels, control=control), Objective(0.6, 2.0), counts, chunk)[0].tail_fit
        assert got is not None and got.tolist() == pytest.approx(want, rel=1e-5)
    assert head_of(SparseLabels(labels.ids_NK, labels.log_prob_NK), Objective(1.0, 2.0))[0].tail_fit is None


@pytest.mark.parametrize(("noise", "low", "high"), [(1.0, 0.2, 0.6), (0.25, 0.85, 1.0)])
def test_the_control_that_earlier_draws_tell_has_less_error_than_none_and_the_whole(
    noise: float, low: float, high: float
) -> None:
    """Logits of a Zipf teacher plus noise: a far student wants little of its own tail, a near one nearly all."""
    tokens, size = 400, 500
    generator = torch.Generator().manual_seed(6)
    order = torch.rand(tokens, size, generator=generator).argsort(1)
    teacher = (-1.2 * torch.arange(1, size + 1).log()).expand(tokens, size).gather(1, order)
    student = teacher + torch.randn(tokens, size, generator=generator) * noise
    shard = VocabShard(0, size, size, None)

    def learn(labels: SparseLabels | DenseLabels) -> HeadResult:
        """A head that multiplies by one: hidden states are logits."""
        return run_head(
            student, torch.eye(size), torch.zeros(tokens, dtype=torch.int64), torch.ones(tokens), shard,
            objective=Objective(1.0), labels=labels, grad_weight_VD=torch.zeros(size, size),
        )  # fmt: skip

    def drawn(seed: int) -> SparseLabels:
        draws = TailDraws(5, seed, torch.arange(tokens), torch.zeros(tokens, dtype=torch.int64))
        return drawn_labels(label_logits(teacher, 8, draws, 1.0, shard), draws, size)

    tracker = ControlTracker()
    fit = learn(drawn(1)).tail_fit
    assert fit is not None
    tracker.add(*fit.tolist())
    assert low < tracker.control < high
    exact = learn(DenseLabels(teacher)).grad_hidden_ND
    assert exact is not None
    error = {}
    for control in (0.0, tracker.control / 2, tracker.control, (1 + tracker.control) / 2, 1.0):
        gradient = learn(replace(drawn(2), control=control)).grad_hidden_ND
        assert gradient is not None
        error[control] = (gradient - exact).square().sum().item()
    assert min(error, key=error.__getitem__) == tracker.control or error[tracker.control] < 1.02 * min(error.values())
    assert error[tracker.control] < 0.9 * error[0.0]


def test_a_tracker_begins_with_one_stays_below_and_comes_back_from_a_checkpoint_with_the_same_bits() -> None:
    tracker = ControlTracker()
    assert tracker.control == 1.0
    tracker.add(0.0, 0.0)
    assert tracker.control == 1.0, "no draws, nothing known"
    tracker.add(2.0, 1.0)
    assert tracker.control == 1.0, "a sample may say more than one; it is never best"
    tracker.add(0.1, 7.7)
    again = ControlTracker(**json.loads(json.dumps(vars(tracker))))
    for one in (tracker, again):
        one.add(0.3, 0.7)
    assert again == tracker and 0 < tracker.control < 1
    for _ in range(200):
        tracker.add(0.5, 1.0)
    assert tracker.control == pytest.approx(0.5, abs=1e-3), "what was long ago is forgotten"


def norms(world: World) -> list[float | None]:
    """Of a first step's gradient, by control."""
    layout = LayoutSettings()
    return [
        make_trainer(world, layout)
        .step(tokens_of(1), 1e-3, Objective(1.0), labels=labels_of(1), control=control)
        .grad_norm
        for control in (0.0, 1.0)
    ]


def test_a_trainer_learns_with_the_control_that_it_is_given() -> None:
    without, whole = run_world(LayoutSettings(), norms)[0]
    assert abs(without - whole) > 1e-6 * whole, "a fresh student is flat, so little of it is in the draws"


def stepped(world: World, layout: LayoutSettings) -> list[tuple[float, float]]:
    trainer = make_trainer(world, layout)
    found = []
    for step in (1, 2):
        result = trainer.step(
            tokens_of(step), 1e-3, Objective(0.6, 2.0), labels=labels_of(step), control=0.5 if step > 1 else 1.0
        )
        assert result.grad_norm is not None
        found += [result.tail_fit, (result.divergence, result.grad_norm)]
    return found


@pytest.mark.parametrize("layout", [LayoutSettings(dp=2, micro_batches=2), LayoutSettings(tp=2, pp=2)], ids=str)
def test_every_rank_of_any_layout_is_told_the_same_of_the_control(layout: LayoutSettings) -> None:
    alone = run_world(LayoutSettings(), stepped, LayoutSettings())[0]
    ranks = run_world(layout, stepped, layout)
    assert all(rank == ranks[0] for rank in ranks)
    for got, want in zip(ranks[0], alone, strict=True):
        assert got == pytest.approx(want, rel=1e-4)
    assert alone[0][0] > 0 and alone[2][1] > 0
