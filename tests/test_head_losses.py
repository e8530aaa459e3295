"""Divergences of the head, and whole teacher distributions, against dense float64 that autograd differentiates."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.drawn import drawn_labels
from tests.worlds import World, run_world
from titan.config.model import LayoutSettings
from titan.ops import choose
from titan.ops.head import HeadResult, run_head
from titan.ops.label import DenseLabels, SparseLabels, TailDraws
from titan.ops.look import VocabShard
from titan.ops.objective import Chunk, Objective
from titan.ops.says import label_logits

TOKENS, WIDTH, TEACHER_WIDTH = 30, 16, 24
LOSSES: list[dict[str, Any]] = [
    {"loss": "forward_kl"}, {"loss": "reverse_kl"}, {"loss": "jsd"}, {"loss": "jsd", "beta": 0.1}, {"loss": "mse"},
]  # fmt: skip
SIZES = [(128, 128), (90, 128), (65, 128), (7, 8)]
"""Vocabulary and rows of the output weight."""


@pytest.fixture(params=["auto", "torch"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Both implementations of what looks at the logits."""
    monkeypatch.setenv("TITAN_KERNELS", request.param)
    choose.choose.cache_clear()
    yield
    choose.choose.cache_clear()


def problem(size: int = 90, rows: int = 128, seed: int = 0) -> dict[str, Tensor]:
    """A student, a teacher, and what they are asked."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "hidden": normal(TOKENS, WIDTH), "weight": normal(rows, WIDTH) * 0.5,
        "teacher_hidden": normal(TOKENS, TEACHER_WIDTH), "teacher_weight": normal(rows, TEACHER_WIDTH) * 0.4,
        "targets": torch.randint(0, size, (TOKENS,), generator=generator),
        "counts": torch.rand(TOKENS, generator=generator) + 0.5,
    }  # fmt: skip


def teacher_log_p(given: dict[str, Tensor], size: int, temperature: float) -> Tensor:
    logits = (given["teacher_hidden"].double() @ given["teacher_weight"].double().T)[:, :size]
    return (logits / temperature).log_softmax(1)


def head_of(
    given: dict[str, Tensor],
    size: int,
    labels: SparseLabels | DenseLabels,
    objective: Objective,
    chunk: Chunk | None = None,
    world: World | None = None,
) -> tuple[HeadResult, Tensor]:
    """The head of this rank, and its gradient of the weight."""
    rows = len(given["weight"]) // (1 if world is None else world.place.stage.tp)
    start = 0 if world is None else world.place.tensor * rows
    grad_weight = torch.zeros(rows, WIDTH, dtype=torch.float32)
    result = run_head(
        given["hidden"], given["weight"][start : start + rows], given["targets"], given["counts"],
        VocabShard(start, rows, size, None if world is None else world.groups.tp),
        objective=objective, labels=labels, grad_weight_VD=grad_weight, grad_scale=0.25, chunk=chunk,
    )  # fmt: skip
    return result, grad_weight


def distance(log_p: Tensor, log_q: Tensor, objective: Objective) -> Tensor:
    """[N]: the loss over classes, as it is written in papers."""
    p, q, beta = log_p.exp(), log_q.exp(), objective.beta
    if objective.loss == "forward_kl":
        return (p * (log_p - log_q)).sum(1)
    if objective.loss == "reverse_kl":
        return (q * (log_q - log_p)).sum(1)
    if objective.loss == "mse":
        return (log_q - log_p).square().mean(1)
    middle = (beta * p + (1 - beta) * q).log()
    return beta * (p * (log_p - middle)).sum(1) + (1 - beta) * (q * (log_q - middle)).sum(1)


def assert_like(
    result: HeadResult,
    grad_weight: Tensor,
    given: dict[str, Tensor],
    size: int,
    objective: Objective,
    distance_of: Callable[[Tensor], Tensor],
    tolerance: float = 1e-5,
) -> None:
    """distance_of: from the student's log-probabilities at temperature T to the loss of each token."""
    hidden, weight = given["hidden"].double().requires_grad_(), given["weight"].double().requires_grad_()
    logits, counts = (hidden @ weight.T)[:, :size], given["counts"].double()
    divergence = (distance_of((logits / objective.temperature).log_softmax(1)) * counts).sum()
    hard = torch.nn.functional.cross_entropy(logits, given["targets"], reduction="none") * (1 - objective.weight)
    norm = objective.z_loss * logits.logsumexp(1).square()
    loss = ((hard + norm) * counts).sum() + objective.weight * objective.temperature**2 * divergence
    wanted = torch.autograd.grad(loss * 0.25, (hidden, weight))
    assert result.divergence.item() == pytest.approx(divergence.item(), rel=tolerance, abs=TOKENS * tolerance)
    assert result.grad_hidden_ND is not None
    for got, want in zip((result.grad_hidden_ND, grad_weight), wanted, strict=True):
        assert (got - want).abs().max() <= tolerance * want.abs().max()


# --- the whole distribution ---


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_whole_labels_give_the_dense_loss_and_its_gradient(loss: dict[str, Any], temperature: float) -> None:
    """From logits with or without padding, or from hidden states, in any chunks."""
    for size, rows in SIZES:
        given = problem(size, rows)
        logits = given["teacher_hidden"] @ given["teacher_weight"].T
        log_p = teacher_log_p(given, size, temperature)
        forms = [
            DenseLabels(logits), DenseLabels(logits[:, :size] - 3.0),
            DenseLabels(log_p.float() * temperature),
            DenseLabels(hidden_ND=given["teacher_hidden"], weight_VD=given["teacher_weight"]),
            DenseLabels(hidden_ND=given["teacher_hidden"], weight_VD=given["teacher_weight"][:size]),
        ]  # fmt: skip
        chunks = [None, Chunk(7), Chunk(11, 37 if size > 7 else 1)]
        for index, labels in enumerate(forms):
            objective = Objective((1.0, 0.6)[index % 2], temperature, (0.0, 0.01)[index // 2 % 2], **loss)
            chunk = chunks[(index + size) % 3]
            got = head_of(given, size, labels, objective, chunk)
            assert_like(*got, given, size, objective, lambda log_q, o=objective, p=log_p: distance(p, log_q, o))


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_a_teacher_of_probability_zero_is_no_trouble_where_the_loss_is_finite(loss: dict[str, Any]) -> None:
    given, objective = problem(), Objective(1.0, **loss)
    logits = given["teacher_hidden"] @ given["teacher_weight"].T
    logits[::2, ::3] = -torch.inf
    result, grad_weight = head_of(given, 90, DenseLabels(logits), objective)
    assert result.divergence.isfinite() and grad_weight.isfinite().all()
    if loss["loss"] in ("forward_kl", "jsd"):
        log_p = logits[:, :90].double().clamp_min(-1e3).log_softmax(1)
        assert_like(result, grad_weight, given, 90, objective, lambda log_q: distance(log_p, log_q, objective))


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_whole_labels_of_bf16_stay_within_its_rounding(loss: dict[str, Any]) -> None:
    """Logits of up to 8 are off by 2^-6; so may be a log-probability, and gradients by as much of themselves."""
    given, objective = problem(), Objective(0.8, 2.0, **loss)
    log_p = teacher_log_p(given, 90, 2.0)
    coarse = {name: x.bfloat16() if x.ndim == 2 else x for name, x in given.items()}
    labels = DenseLabels(hidden_ND=coarse["teacher_hidden"], weight_VD=coarse["teacher_weight"])
    result, grad_weight = head_of(coarse, 90, labels, objective, Chunk(7, 37))
    assert result.grad_hidden_ND is not None and result.grad_hidden_ND.dtype == torch.bfloat16
    exact = {name: x.float() for name, x in given.items()} | {"targets": given["targets"]}
    want_result, want_weight = head_of(exact, 90, DenseLabels(log_p.float() * 2.0), objective)
    assert abs(result.divergence - want_result.divergence) <= 2**-5 * want_result.divergence
    assert (grad_weight - want_weight).norm() <= 2**-5 * want_weight.norm()


# --- sparse labels ---


def sparse(given: dict[str, Tensor], size: int, temperature: float, top_k: int = 5) -> tuple[SparseLabels, Tensor]:
    """The head of the teacher's distribution, some rows with fewer entries; and where the entries are."""
    values, ids = teacher_log_p(given, size, temperature).topk(top_k, dim=1)
    values[::4, 2:] = -torch.inf
    head = torch.zeros(TOKENS, size, dtype=torch.bool).scatter(1, ids, values > -torch.inf)
    return SparseLabels(ids, values.float()), head


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("loss", LOSSES[:-1], ids=str)
def test_a_head_and_one_bucket_give_the_loss_over_those_classes(loss: dict[str, Any], temperature: float) -> None:
    for (size, rows), chunk, weight in product(SIZES, (None, Chunk(11, 37)), (1.0, 0.6)):
        given, objective = problem(size, rows), Objective(weight, temperature, 0.01, **loss)
        labels, head = sparse(given, size, temperature)
        told = labels.log_prob_NK.double()  # in float32, so that a small tail is not quite the teacher's
        log_p = torch.cat([told.clamp_min(-60.0), (1 - told.exp().sum(1, keepdim=True)).log()], dim=1)

        def by_class(log_q: Tensor, labels: SparseLabels = labels, head: Tensor = head) -> Tensor:
            """The head's entries, and the rest together in one more column."""
            present = labels.log_prob_NK > -math.inf
            tail = log_q.masked_fill(head, -math.inf).logsumexp(1, keepdim=True)
            return torch.cat([log_q.gather(1, labels.ids_NK).where(present, -60.0), tail], dim=1)

        got = head_of(given, size, labels, objective, chunk)
        assert_like(
            *got, given, size, objective,
            lambda log_q, p=log_p, f=by_class, o=objective: distance(p, f(log_q), o),
        )  # fmt: skip


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("with_draws", [False, True])
def test_mse_is_a_mean_over_the_given_ids(temperature: float, with_draws: bool) -> None:
    given, objective = problem(), Objective(0.7, temperature, loss="mse")
    labels, _ = sparse(given, 90, temperature)
    log_p = teacher_log_p(given, 90, temperature)
    if with_draws:
        drawn = torch.randint(0, 90, (TOKENS, 3), generator=torch.Generator().manual_seed(1))
        log_drawn = log_p.gather(1, drawn).float()
        labels = replace(labels, draw_ids_NM=drawn, draw_log_prob_NM=log_drawn, draw_mass_N=torch.ones(TOKENS))
    ids, given_log_p = torch.cat(labels.ids(), 1), torch.cat(labels.log_probs(), 1).double()
    present = given_log_p > -math.inf

    def of(log_q: Tensor) -> Tensor:
        squares = (log_q.gather(1, ids) - given_log_p.where(present, 0.0)).square().where(present, 0.0)
        return squares.sum(1) / present.sum(1)

    assert_like(*head_of(given, 90, labels, objective, Chunk(7)), given, 90, objective, of)


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_a_student_that_is_its_teacher_has_no_divergence_and_no_gradient(loss: dict[str, Any]) -> None:
    given = problem()
    given |= {"teacher_hidden": given["hidden"], "teacher_weight": given["weight"]}
    whole = DenseLabels(hidden_ND=given["hidden"], weight_VD=given["weight"])
    for labels in (whole, sparse(given, 90, 2.0)[0]):
        result, grad_weight = head_of(given, 90, labels, Objective(1.0, 2.0, **loss))
        assert abs(result.divergence) / TOKENS < 1e-6 and grad_weight.abs().max() < 1e-5


def test_jsd_goes_to_both_divergences_at_its_ends() -> None:
    """Where p / q is far below 1 / beta: JSD of a share of 1e-3 is that times KL, but for the ratio's square."""
    given = problem()
    noise = torch.randn(TOKENS, 128, generator=torch.Generator().manual_seed(1)) * 0.3
    labels = DenseLabels(given["hidden"] @ given["weight"].T + noise)

    def gradient(objective: Objective) -> Tensor:
        return head_of(given, 90, labels, objective)[1]

    to_p = gradient(Objective(1.0, loss="jsd", beta=1e-3)) / 1e-3
    to_q = gradient(Objective(1.0, loss="jsd", beta=1 - 1e-3)) / 1e-3
    forward, reverse = gradient(Objective(1.0)), gradient(Objective(1.0, loss="reverse_kl"))
    assert (to_p - forward).norm() < 5e-3 * forward.norm() < 0.1 * (to_q - forward).norm()
    assert (to_q - reverse).norm() < 5e-3 * reverse.norm()


# --- the vocabulary over tensor ranks ---


def sharded(world: World) -> list[tuple[Any, Tensor]]:
    answers = []
    for size, rows in ((90, 128), (60, 128)):  # of the second the last rank holds padding alone
        given = problem(size, rows)
        here = slice(world.place.tensor * rows // 2, (world.place.tensor + 1) * rows // 2)
        logits = (given["teacher_hidden"] @ given["teacher_weight"].T)[:, :size][:, here]
        whole = [
            DenseLabels(logits), DenseLabels(None, given["teacher_hidden"], given["teacher_weight"][here]),
        ]  # fmt: skip
        for loss, temperature in product(LOSSES, (1.0, 2.0)):
            forms = [*whole, sparse(given, size, temperature)[0]]
            for labels, chunk in product(forms, (None, Chunk(11, 37))):
                answers.append(head_of(given, size, labels, Objective(0.6, temperature, **loss), chunk, world))
    return answers


def test_a_sharded_vocabulary_gives_every_loss_of_one_process() -> None:
    """Which the tests above hold against float64: here within 1e-5 of that."""
    ranks = iter(zip(*run_world(LayoutSettings(tp=2), sharded), strict=True))
    for size, rows in ((90, 128), (60, 128)):
        given = problem(size, rows)
        logits = given["teacher_hidden"] @ given["teacher_weight"].T
        for loss, temperature in product(LOSSES, (1.0, 2.0)):
            forms = [DenseLabels(logits)] * 2 + [sparse(given, size, temperature)[0]]
            for labels, _ in product(forms, range(2)):
                want, want_weight = head_of(given, size, labels, Objective(0.6, temperature, **loss))
                answers = next(ranks)
                grad_weight = torch.cat([grad for _, grad in answers])
                assert (grad_weight - want_weight).abs().max() <= 1e-5 * want_weight.abs().max()
                for got, _ in answers:
                    assert got.divergence.item() == pytest.approx(want.divergence.item(), rel=1e-5, abs=1e-5)
                    difference = (got.grad_hidden_ND - want.grad_hidden_ND).abs().max()
                    assert difference <= 1e-5 * want.grad_hidden_ND.abs().max()  # type: ignore[union-attr]


# --- draws ---


def zipf(samples: int, size: int, exponent: float, noise: float) -> tuple[Tensor, Tensor, Tensor]:
    """One token many times over: its teacher's logits, and a student's hidden states and weight."""
    generator = torch.Generator().manual_seed(9)
    teacher = (-exponent * torch.arange(1, size + 1).log())[torch.randperm(size, generator=generator)]
    weight = torch.zeros(size, WIDTH)
    weight[:, 0] = teacher + torch.randn(size, generator=generator) * noise
    weight[:, 1:] = torch.randn(size, WIDTH - 1, generator=generator)
    hidden = torch.zeros(samples, WIDTH)
    hidden[:, 0] = 1.0
    return teacher.expand(samples, size).contiguous(), hidden, weight


def per_sample(hidden: Tensor, weight: Tensor, labels: SparseLabels | DenseLabels, temperature: float) -> Tensor:
    """[samples, D] gradients with respect to the hidden states."""
    tokens, size = len(hidden), len(weight)
    result = run_head(
        hidden, weight, torch.zeros(tokens, dtype=torch.int64), torch.ones(tokens), VocabShard(0, size, size, None),
        objective=Objective(1.0, temperature), labels=labels, grad_weight_VD=torch.zeros(size, WIDTH),
    )  # fmt: skip
    assert result.grad_hidden_ND is not None
    return result.grad_hidden_ND.double()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("top_k", "independent"), [(6, False), (0, False), (0, True)])
@pytest.mark.parametrize("exponent", [1.0, 2.0])
def test_any_first_draws_give_the_whole_gradient_on_average(
    exponent: float, top_k: int, independent: bool, temperature: float
) -> None:
    """20,000 samples of 8 and 16 draws: within 4.5 standard errors (of each of 16 components, 32 in a test: it fails
    once in 4,500), where one bucket alone is more than 10 off.
    """
    samples, size = 20_000, 600
    teacher, hidden, weight = zipf(samples, size, exponent, 1.0)
    shard = VocabShard(0, size, size, None)
    draws = TailDraws(17, 5, torch.arange(samples), torch.full((samples,), 3), independent)
    says = label_logits(teacher, top_k, draws, temperature, shard)
    assert says.draw_ids_NM is not None and says.draw_log_prob_NM is not None
    head = says.log_prob_NK / temperature - says.log_norm_N[:, None]
    exact = per_sample(hidden[:1], weight, DenseLabels(teacher[:1]), temperature)[0]
    for count in (8, 16):
        labels = drawn_labels(says, draws, size, count, temperature)
        if independent:
            mass = torch.full((samples,), 1 / count)
            drawn = (says.draw_ids_NM[:, :count], says.draw_log_prob_NM[:, :count])
            labels = SparseLabels(says.ids_NK, head, "bucket", *drawn, draw_mass_N=mass)
        gradients = per_sample(hidden, weight, labels, temperature)
        error = gradients.std(0) / math.sqrt(samples)
        assert ((gradients.mean(0) - exact).abs() <= 4.5 * error + 1e-5 * exact.abs().max()).all()
        bucket = per_sample(hidden[:1], weight, SparseLabels(says.ids_NK[:1], head[:1]), temperature)[0]
        assert ((bucket - exact).abs() / error).max() > 10


# --- mistakes ---


def test_a_loss_that_labels_cannot_give_is_refused_with_the_remedy() -> None:
    given = problem()
    bucket, _ = sparse(given, 90, 1.0)
    mass = torch.ones(TOKENS)
    drawn = replace(bucket, draw_ids_NM=bucket.ids_NK, draw_log_prob_NM=bucket.log_prob_NK, draw_mass_N=mass)
    none = SparseLabels(bucket.ids_NK, bucket.log_prob_NK.log_softmax(1), "none")
    whole = DenseLabels(torch.zeros(TOKENS, 128))
    for labels, objective, message in [
        (bucket, {"loss": "kl"}, "objective.loss must be forward_kl, reverse_kl, jsd or mse, got kl"),
        (whole, {"beta": 0.0}, "objective.beta must be between 0 and 1, got 0.0; at the ends use forward_kl or"),
        (drawn, {"loss": "reverse_kl"}, "reverse_kl is not linear .* draws would bias it; use labels without draws"),
        (drawn, {"loss": "jsd"}, "jsd is not linear"),
        (none, {"loss": "reverse_kl"}, "reverse_kl needs the teacher's own .* labels.tail none; use tail bucket"),
        (none, {"loss": "jsd"}, "jsd needs the teacher's own"),
        (none, {"loss": "mse"}, "mse needs the teacher's own"),
        (DenseLabels(), {}, "labels must have logits_NV, or hidden_ND and weight_VD, got neither"),
        (replace(whole, hidden_ND=given["hidden"]), {}, "must be None where there are labels.logits_NV"),
        (DenseLabels(torch.zeros(TOKENS, 89)), {}, r"labels.logits_NV must be \[30, at least 90\], got \[30, 89\]"),
        (DenseLabels(torch.zeros(29, 90)), {}, r"labels.logits_NV must be \[30, at least 90\], got \[29, 90\]"),
        (DenseLabels(None, torch.zeros(30, 4), torch.zeros(89, 4)), {}, r"labels.weight_VD must be \[at least 90, 4\]"),
        (DenseLabels(None, torch.zeros(30, 4), torch.zeros(90, 5)), {}, r"labels.weight_VD must be \[at least 90, 4\]"),
        (DenseLabels(None, torch.zeros(3, 4), torch.zeros(90, 4)), {}, r"labels.hidden_ND must be \[30, at least 1\]"),
        (DenseLabels(None, torch.zeros(30, 4), torch.zeros(90, 4).half()), {}, "must be torch.float32 as hidden_ND is"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            head_of(given, 90, labels, Objective(0.5, **objective))  # type: ignore[arg-type]
