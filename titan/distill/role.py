"""One rank of a role, as a plain class: joins its world, restores its state, trains to the end, answers questions.

`titan.cluster` puts a thin actor around it; tests and the benchmark without Ray call it directly.
"""

import threading
import time
from abc import ABC, abstractmethod
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import TCPStore

from titan.checkpoint.folder import FROZEN, newest_step, step_name
from titan.checkpoint.load import Checkpoint
from titan.checkpoint.pretrained import PretrainedWeights
from titan.checkpoint.save import CheckpointWriter
from titan.data.corpus import Corpus
from titan.data.sampler import Sampler
from titan.distill.keeper import LogKeeper
from titan.distill.news import UNTOLD, News, Outbox
from titan.distill.rank import RankSpec, RoleReport
from titan.distill.storage import Storage
from titan.model.auxiliary import Auxiliary
from titan.model.parameters import num_parameters
from titan.observe.metrics import EvalMetric, Metric, StepMetric, to_line
from titan.ops.choose import choices
from titan.parallel.host_transport import own_address
from titan.parallel.world import join_world
from titan.plan.layout import make_layout
from titan.plan.straggler import MeasuredSteps, StragglerWatch
from titan.platform.device import Platform
from titan.train.restore import load_pretrained, restore_trainer, start_from, trainer_pieces, trainer_state
from titan.train.trainer import StepResult, Trainer, TrainerSettings

STOP, PAUSE = 1.0, 0.5
"""Votes."""
NATS_PER_BIT = 0.6931471805599453


class RoleRank(ABC):
    """What teacher and student ranks share; `train` is theirs."""

    def __init__(self, spec: RankSpec, platform: Platform):
        self.spec, self.config, self.platform = spec, spec.config, platform
        self.storage = Storage(spec)
        self.layout = make_layout(spec.settings.model, spec.settings.layout)
        self.step = 0
        self.stopping, self.pausing = threading.Event(), threading.Event()
        self.paused = False
        self.outbox = Outbox()
        self.store: TCPStore | None = None
        self.train_seconds, self.tokens_here = 0.0, 0
        self.keeper: LogKeeper | None = None
        """Of a role that makes labels."""
        self.student_wait_s = 0.0
        """Waited for students before this start."""
        self.stragglers = StragglerWatch(spec.expected_busy_s)
        self.measured = MeasuredSteps(self.layout)

    # --- joining ---

    def open_store(self, host: str) -> int:
        """On the lead: open the meeting point of the role's ranks and return its port."""
        timeout = timedelta(seconds=self.config.cluster.start_timeout_s)
        self.store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout)
        return int(self.store.port)

    def join(self, host: str, port: int) -> None:
        """Meet the other ranks, build this rank's part of the model and restore the newest checkpoint."""
        config, spec = self.config, self.spec
        timeout = timedelta(seconds=config.cluster.start_timeout_s)
        store = self.store or TCPStore(host, port, is_master=False, timeout=timeout)
        settings = spec.settings
        self.world = join_world(
            spec.role, self.layout, spec.rank, self.platform, store, config.cluster.step_timeout_s, own_address(host)
        )
        self.corpus = Corpus.open(self.storage.corpus())
        data = config.data
        self.sampler = Sampler(self.corpus, data.sequence_length, data.batch_size, config.run.seed)
        self.trainer = Trainer(
            self.world,
            TrainerSettings(
                model=settings.model,
                layout=settings.layout,
                optimizer=settings.optimizer,
                precision=settings.precision,
                vocab_size=self.corpus.vocab_size,
                sequence_length=data.sequence_length,
                batch_size=settings.batch_size,
                seed=spec.initial_seed,
                auxiliary=self.auxiliary(),
                frozen=settings.frozen,
            ),
            spec.pace,
        )
        files = self.storage.files(spec.checkpoint_folder)
        self.checkpoints = CheckpointWriter(
            files, spec.rank, self.layout.num_ranks, config.checkpoint.keep, config.cluster.step_timeout_s
        )
        if settings.frozen:
            assert spec.init is not None, "a frozen teacher is a folder"
            load_pretrained(self.trainer, PretrainedWeights(spec.init))
        newest = newest_step(files)
        if newest is not None:
            checkpoint = Checkpoint(files.below(step_name(newest)))
            if not settings.frozen:
                restore_trainer(self.trainer, checkpoint)
            self.step = checkpoint.step
            self.train_seconds = checkpoint.state["train_seconds"]
            self.student_wait_s = checkpoint.state.get("student_wait_s", 0.0)
            self.load_state(checkpoint.state)
        elif spec.init is not None and not settings.frozen:
            start_from(self.trainer, Checkpoint(self.storage.initial_weights()))
        self.saved_step = self.step
        kernels = choices(self.world.platform.kind)
        self.tell_event("kernels", **{operation: choice.backend for operation, choice in kernels.items()})

    # --- training ---

    @abstractmethod
    def train(self) -> RoleReport:
        """Train to the end of the run, or until asked to stop."""

    def auxiliary(self) -> Auxiliary | None:
        """What the role's model has only in training."""
        return None

    def own_state(self) -> dict[str, Any]:
        """What the role keeps besides the model, as JSON."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:  # noqa: B027  (a teacher keeps nothing)
        """Inverse of `own_state`."""

    def save_checkpoint(self) -> None:
        """Start writing a checkpoint of the step just made."""
        begin = time.perf_counter()
        if self.measured.num_steps:
            self.tell_event("measured", step=self.step, **self.measured.take())
        settings = self.spec.settings
        manifest = {
            "role": self.spec.role,
            "model": settings.model.model_dump(),
            "vocab_size": self.corpus.vocab_size,
            "layout": settings.layout.model_dump(),
            "precision": settings.precision,
            "corpus": self.spec.corpus_folder.name,
            "state": trainer_state(self.trainer) | self._times() | self.own_state(),
            UNTOLD: [to_line(metric) for metric in self.outbox.metrics()],
        }
        if settings.frozen:
            manifest[FROZEN] = str(self.spec.init)
        self.checkpoints.save(self.step, trainer_pieces(self.trainer), manifest)
        self.saved_step = self.step
        self.tell_event("checkpoint", step=self.step, stall_s=round(time.perf_counter() - begin, 4))

    def evaluate(self) -> float | None:
        """Held-out bits per byte on the run's fixed samples; None if the corpus has too few."""
        batch = self.sampler.heldout(self.config.eval.samples)
        nats = self.trainer.evaluate(batch.tokens)
        targets = batch.tokens[:, 1:]
        num_bytes = int(self.corpus.tokenizer.piece_bytes()[targets].sum())
        bits_per_byte = nats * targets.size / num_bytes / NATS_PER_BIT
        self.tell(EvalMetric(self.spec.role, self.step, time.time(), nats, bits_per_byte, int(targets.size)))
        return bits_per_byte

    def finish(self, stopped: bool, extra: dict[str, float]) -> RoleReport:
        """Last evaluation and checkpoint, and the report."""
        if self.saved_step != self.step:
            self.save_checkpoint()
        self.checkpoints.wait()
        bits_per_byte = None if stopped or self.step == 0 else self.evaluate()
        settings = self.spec.settings
        return RoleReport(
            role=self.spec.role,
            step=self.step,
            params=num_parameters(settings.model, self.corpus.vocab_size),
            tokens=self.samples_made() * self.config.data.sequence_length,
            train_seconds=self.train_seconds,
            heldout_bits_per_byte=bits_per_byte,
            stopped=stopped,
            paused=stopped and self.paused,
            extra=extra | ({"student_wait_s": self.keeper.waited_s} if self.keeper and self.keeper.may_pause else {}),
        )

    def samples_made(self) -> int:
        """Samples that it trained on."""
        return self.step * self.config.data.batch_size

    def _times(self) -> dict[str, float]:
        waited_s = self.keeper.waited_s if self.keeper is not None else self.student_wait_s
        return {"train_seconds": self.train_seconds, "student_wait_s": waited_s}

    def keep_log(self) -> None:
        """From now on the role makes labels: its log is kept within bounds, and its students may make it pause."""
        self.keeper = LogKeeper(self.spec, self.world, self.storage.upkeep(), self.tell_event, self.student_wait_s)

    def heed_disk(self, low: bool) -> None:
        """The driver's word on the disk that labels go to."""
        if self.keeper is not None:
            self.keeper.disk_low = low

    def pause(self) -> float:
        """Before a step: wait for students, if some are to be waited for; a vote to stop that came meanwhile, or 0."""
        return 0.0 if self.keeper is None else self.keeper.hold(self.step + 1, self.asked)

    def watch_pace(self, result: StepResult) -> None:
        """Keep what a step took beside what was expected, and name ranks that are slower than their kind."""
        self.measured.add(result.seconds, result.busy_s)
        if not self.spec.expected_busy_s:
            return
        for slow in self.stragglers.look(result.busy_s):
            device, factor = self.layout.place(slow.rank).device, round(slow.factor, 3)
            self.tell_event("straggler", rank=slow.rank, device=device, factor=factor, step=self.step)

    def stop_vote(self) -> list[float]:
        """The lead's wish to stop, passed along with every step's sums so that all ranks stop after the same one."""
        if not self.world.is_lead:
            return [0.0]
        return [STOP if self.stopping.is_set() else PAUSE if self.pausing.is_set() else 0.0]

    def votes(self, step: int) -> list[float]:
        """What is passed along with a step: the wish to stop, and that to wait for students after it."""
        return [*self.stop_vote(), 0.0 if self.keeper is None else self.keeper.vote(step)]

    def heed(self, result: StepResult) -> bool:
        """Whether the vote of a step was to stop, for good or not."""
        if self.keeper is not None:
            self.keeper.due = result.votes[1] > 0
        return self.heed_vote(result.votes[0])

    def heed_vote(self, vote: float) -> bool:
        """Whether a vote was to stop, for good or not."""
        self.paused = vote == PAUSE
        return vote > 0

    def asked(self) -> float:
        """The lead's vote to stop, where it is not passed along with a step."""
        return self.stop_vote()[0]

    def tell(self, metric: Metric) -> None:
        """Queue a metric for the driver; only the lead speaks."""
        if self.world.is_lead:
            self.outbox.put(metric)

    def tell_event(self, event: str, **fields: Any) -> None:
        """Queue an event for the driver."""
        if self.world.is_lead:
            self.outbox.put({"event": event, "role": self.spec.role, **fields})

    def step_metric(self, result: StepResult, loss: float, **student: Any) -> StepMetric:
        """A step's metric; students add what they know of labels."""
        fields: dict[str, Any] = dict.fromkeys(
            ("distill_loss", "distill_weight", "lag", "lead", "label_bytes", "label_wait_s", "student_wait_s")
        )
        if self.keeper is not None and self.keeper.may_pause:
            fields["student_wait_s"] = self.keeper.last_s
        return StepMetric(
            role=self.spec.role,
            step=self.step,
            time_s=time.time(),
            loss=loss,
            cross_entropy=result.cross_entropy,
            grad_norm=float("nan") if result.grad_norm is None else result.grad_norm,
            learning_rate=result.learning_rate,
            tokens=result.tokens,
            step_s=result.seconds,
            **(fields | student),
        )

    # --- questions from other threads ---

    def request_stop(self, for_good: bool = True) -> None:
        """Ask the role to stop after the step it is in; not for good if it goes on in another layout."""
        (self.stopping if for_good else self.pausing).set()

    def take_news(self, heard: int) -> tuple[int, list[News]]:
        """News from number `heard` on, those before having arrived, and the number of the next to come."""
        return self.outbox.take(heard)

    def leave(self) -> None:
        """Leave the world."""
        self.world.leave()
        self.storage.close()
