"""One rank of one role: a step turns samples into a better model, in any layout."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

from titan.config.model import LayoutSettings, ModelSettings, OptimizerSettings, Precision
from titan.model.auxiliary import Auxiliary
from titan.model.capture import Capture
from titan.model.stage import rope_table
from titan.ops.label import TeacherSays
from titan.ops.objective import Objective
from titan.parallel.edge import Tensors
from titan.parallel.executor import EdgeSpec, HeadStep, PipelineExecutor
from titan.parallel.stage import build_stage
from titan.parallel.world import World
from titan.plan.layout import Stage
from titan.plan.pace import Pace
from titan.plan.schedule import Action, forward_only
from titan.tasks.causal_lm import LabelWish, MicroBatch, make_micro_batch, run_task_head, vocab_shard
from titan.tasks.sample_labels import SampleLabels
from titan.tasks.teacher_hidden import TeacherHidden, teacher_hidden
from titan.train.features import FeaturePass, FeatureTap
from titan.train.optimizer import RoleOptimizer, learning_rate

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class TrainerSettings:
    """What a trainer must know of its role and of the run."""

    model: ModelSettings
    layout: LayoutSettings
    optimizer: OptimizerSettings
    precision: Precision
    vocab_size: int
    sequence_length: int
    batch_size: int
    seed: int
    auxiliary: Auxiliary | None = None
    """What a student has only while it is distilled."""
    frozen: bool = False
    """Forward passes only: no gradients, no optimizer."""


@dataclass(frozen=True)
class LabelPart:
    """Labels that this rank made for samples [start, start + samples) of the batch; rows over (position, sample)."""

    start: int
    samples: int
    says: TeacherSays | TeacherHidden


@dataclass
class StepResult:
    """A step as every rank of the role sees it."""

    cross_entropy: float
    """nats a token over the whole batch, before the update."""
    divergence: float
    """Bucketed KL in nats a token; 0 without labels."""
    grad_norm: float | None
    """None if there was no update: fp16 skipped it, or the model is frozen."""
    learning_rate: float
    tokens: int
    seconds: float
    busy_s: list[float] = field(default_factory=list)
    """Seconds that each rank of the role computed, not waited, in its passes."""
    votes: list[float] = field(default_factory=list)
    """Sums over all ranks of what each passed as `votes`."""
    tail_fit: tuple[float, float] = (0.0, 0.0)
    """What the draws of the labels told of the best `control` (titan.ops.head.HeadResult), over the whole batch."""
    features: dict[str, float] = field(default_factory=dict)
    """Losses of features by name, a token, over the whole batch."""


class Trainer:
    """Model stage, optimizer and pipeline of one rank."""

    def __init__(self, world: World, settings: TrainerSettings, pace: Pace | None = None):
        """pace: on a paced device, what its passes take"""
        self.world, self.settings, self.pace = world, settings, pace
        self.dtype = self._dtype_of(world.place.stage)
        self.stage = build_stage(
            world, settings.model, settings.vocab_size, self.dtype, settings.seed, settings.auxiliary, settings.frozen
        )
        self.trained = None if settings.frozen else RoleOptimizer(self.stage, settings.optimizer, self.dtype)
        self.executor = PipelineExecutor(world, self._dtype_of, pace)
        self.rope = rope_table(settings.model, settings.sequence_length, world.platform.device)
        self.shard = None
        if world.place.head_stage is not None:
            self.shard = vocab_shard(self.stage.module, settings.vocab_size, world.groups.tp)

    @property
    def optimizer(self) -> RoleOptimizer:
        """Of a model that is not frozen."""
        assert self.trained is not None, "a frozen model has no optimizer"
        return self.trained

    def step(
        self,
        tokens: np.ndarray,
        learning_rate: float,
        objective: Objective,
        labels: SampleLabels | None = None,
        weight_B: np.ndarray | None = None,
        wish: LabelWish | None = None,
        sample_ids: np.ndarray | None = None,
        shrink: float = 1.0,
        control: float = 1.0,
        votes: list[float] | None = None,
        on_labels: Callable[[list[LabelPart]], None] | None = None,
        features: FeatureTap | None = None,
    ) -> StepResult:
        """One optimizer step on the whole batch; of a frozen model the forward pass alone.

        tokens: int [batch_size, S + 1], the same on every rank
        labels: of all samples; needed on the last stage when the objective has a weight for them
        weight_B: 0 for samples that only fill the batch up; None for 1 throughout
        wish:   the labels to make, None for none
        sample_ids: int64 [batch_size]; needed where labels are drawn
        shrink, control: how far a label's draws correct its bucket, and against what (titan.ops.label.SparseLabels)
        votes:  summed over ranks on the way, so that all can agree on something at no cost
        on_labels: called with the labels this rank made, before the exchange that ends the step: once `step` returns
                anywhere, it has returned from `on_labels` everywhere
        features: what to do with those of a layer, None for nothing
        """
        begin = time.perf_counter()
        weight_B = np.ones(len(tokens)) if weight_B is None else weight_B
        batches = self._micro_batches(tokens, weight_B, labels, sample_ids)
        count = int(weight_B.sum()) * (tokens.shape[1] - 1)
        grad_scale = None if self.trained is None else self.trained.loss_scale / count
        sums, fit = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
        parts: list[LabelPart] = []

        def head(index: int, hidden: torch.Tensor) -> torch.Tensor | None:
            assert self.shard is not None
            first, batch = batches[index]
            result = run_task_head(
                self.stage.module, hidden, batch, self.shard, objective, grad_scale=grad_scale, wish=wish,
                shrink=shrink, control=control,
            )  # fmt: skip
            sums.add_(torch.stack([result.cross_entropy, result.divergence]).cpu())
            if result.tail_fit is not None:
                fit.add_(result.tail_fit.cpu())
            says: TeacherSays | TeacherHidden | None = result.labels
            if wish is not None and wish.hidden:
                says = teacher_hidden(self.stage.module, hidden, self.shard, with_weight=first == 0)
            if says is not None and self.world.place.tensor == 0:
                parts.append(LabelPart(first, len(batch.tokens_BS), says))
            return result.grad_hidden_ND

        feature_pass = None if features is None else self._feature_pass(features, grad_scale or 0.0)
        actions = self.world.layout.actions(self.world.place.position, frozen=self.trained is None)
        if self.trained is not None:
            self.trained.zero_gradients()
        self._run(actions, batches, head, feature_pass)
        passed = time.perf_counter()
        norm = None
        if self.trained is not None:
            self.stage.reduce_gradients()
            norm = self.trained.step(learning_rate)
            self.stage.publish_weights()
        if self.pace is not None:
            time.sleep(max(0.0, passed + self.pace.update_s - time.perf_counter()))
        if on_labels is not None:
            on_labels(parts)
        votes = votes or []
        busy_s = [0.0] * self.world.layout.num_ranks
        busy_s[self.world.place.rank] = sum(self.executor.seconds.values())
        learned = {} if feature_pass is None else feature_pass.named_sums()
        totals = self._total(torch.cat([sums, fit]), [*votes, *busy_s, *learned.values()])
        busy_at = 4 + len(votes)
        feature_at = busy_at + len(busy_s)
        return StepResult(
            cross_entropy=totals[0] / count,
            divergence=totals[1] / count,
            grad_norm=norm,
            learning_rate=learning_rate,
            tokens=count,
            seconds=time.perf_counter() - begin,
            busy_s=totals[busy_at:feature_at],
            votes=totals[4:busy_at],
            tail_fit=(totals[2], totals[3]),
            features={name: total / count for name, total in zip(learned, totals[feature_at:], strict=True)},
        )

    def evaluate(self, tokens: np.ndarray) -> float:
        """Mean cross-entropy in nats a token over given samples, int [any number, S + 1]; weights stay as they are."""
        size = self.settings.batch_size
        sums = torch.zeros(2, dtype=torch.float64)
        for start in range(0, len(tokens), size):
            piece = tokens[start : start + size]
            missing = size - len(piece)  # a short last batch is filled with samples of weight 0
            weight = np.concatenate([np.ones(len(piece)), np.zeros(missing)])
            piece = np.concatenate([piece, np.repeat(tokens[:1], missing, axis=0)])
            sums += self._forward(piece, weight)
        mean: float = self._total(sums, [])[0] / (len(tokens) * (tokens.shape[1] - 1))
        return mean

    def _forward(self, tokens: np.ndarray, weight: np.ndarray) -> torch.Tensor:
        batches = self._micro_batches(tokens, weight, None)
        sums = torch.zeros(2, dtype=torch.float64)

        def head(index: int, hidden: torch.Tensor) -> torch.Tensor | None:
            assert self.shard is not None
            result = run_task_head(
                self.stage.module, hidden, batches[index][1], self.shard, Objective(), grad_scale=None
            )
            sums[0] += result.cross_entropy.cpu()
            return None

        self._run(forward_only(self.world.layout.chunks, len(batches)), batches, head)
        return sums

    def _feature_pass(self, tap: FeatureTap, scale: float) -> FeaturePass:
        size = self.settings.batch_size // self.world.layout.micro_batches
        place = self.world.place
        return FeaturePass(tap, size, place.stage.samples(size)[place.replica][0], scale)

    def _run(
        self,
        schedule: Sequence[Action],
        batches: list[tuple[int, MicroBatch]],
        head: HeadStep,
        features: FeaturePass | None = None,
    ) -> None:
        inputs: list[Tensors] = [{"rope": self.rope, "tokens": batch.tokens_BS} for _, batch in batches]
        samples = self.settings.batch_size // self.world.layout.micro_batches
        edge = EdgeSpec(samples, self.settings.sequence_length, {"hidden": (self.settings.model.hidden,)})
        self.executor.run(schedule, partial(self._run_chunk, features=features), inputs, edge, head)

    def _run_chunk(self, inputs: Tensors, chunk: int, features: FeaturePass | None) -> Tensors:
        """The module on one micro-batch, and what is done with its features."""
        outputs = self._own_samples(inputs, chunk, None if features is None else features.tap.capture)
        return outputs if features is None else features.join(outputs, chunk)

    def _own_samples(self, inputs: Tensors, chunk: int, capture: Capture | None) -> Tensors:
        """The module on one micro-batch; with static shapes on samples filled up with zeros, which are cut off again.

        Samples do not see each other and what is cut off gets no gradient, so loss and gradients stay what they are.
        """
        stage = self.world.place.stage
        if not stage.static_shapes:
            return self.stage.module(inputs, chunk, capture)  # type: ignore[no-any-return]
        shares = stage.samples(self.settings.batch_size // self.world.layout.micro_batches)
        most = max(end - start for start, end in shares)
        axes = {"tokens": 0, "hidden": 1}
        filled = {
            name: _filled(tensor, axes[name], most) if name in axes else tensor for name, tensor in inputs.items()
        }
        start, end = shares[self.world.place.replica]
        produced: Tensors = self.stage.module(filled, chunk, capture)
        return {name: tensor[:, : end - start] for name, tensor in produced.items()}

    def _micro_batches(
        self, tokens: np.ndarray, weight: np.ndarray, labels: SampleLabels | None, sample_ids: np.ndarray | None = None
    ) -> list[tuple[int, MicroBatch]]:
        """Own share of every micro-batch, with the index of its first sample in the batch."""
        place, number = self.world.place, self.world.layout.micro_batches
        size = len(tokens) // number
        start, end = place.stage.samples(size)[place.replica]
        batches = []
        for index in range(number):
            part = slice(index * size + start, index * size + end)
            own = None if labels is None else labels.rows(part.start, part.stop)
            ids = None if sample_ids is None else sample_ids[part]
            batches.append(
                (part.start, make_micro_batch(tokens[part], weight[part], own, self.world.platform.device, ids))
            )
        return batches

    def _total(self, sums: torch.Tensor, votes: list[float]) -> list[float]:
        """Sums over the replicas of the last stage, and over all ranks for votes."""
        place = self.world.place
        counts = place.head_stage is not None and place.tensor == 0
        return self.world.sum_over_ranks([*(sums if counts else torch.zeros_like(sums)).tolist(), *votes])

    def _dtype_of(self, stage: Stage) -> torch.dtype:
        return DTYPES[stage.precision or self.settings.precision]

    def learning_rate(self, step: int, total_steps: int) -> float:
        """Learning rate of a step, counted from 1."""
        return learning_rate(self.settings.optimizer, step, total_steps)


def _filled(tensor: torch.Tensor, axis: int, size: int) -> torch.Tensor:
    """The tensor with zeros up to `size` along an axis."""
    missing = size - tensor.shape[axis]
    if not missing:
        return tensor
    shape = list(tensor.shape)
    shape[axis] = missing
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=axis)
