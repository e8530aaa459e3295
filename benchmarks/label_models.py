"""A real teacher and a student at several steps of its training, for the benchmarks of labels.

Two ranks, one a core, without Ray: the teacher trains on the quickstart's text and a student learns from its log. What
they leave in a folder is used again.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from titan.platform.device import prepare_process, select_platform

CPU = select_platform("cpu")
prepare_process(CPU)  # comes before megatron-core is imported

from titan.checkpoint.folder import newest_step, step_folder  # noqa: E402
from titan.checkpoint.load import Checkpoint  # noqa: E402
from titan.config.distillation import LabelSettings  # noqa: E402
from titan.config.load import check_config  # noqa: E402
from titan.config.settings import TEACHER, RunConfig, StudentSettings, TeacherSettings  # noqa: E402
from titan.data.corpus import Corpus  # noqa: E402
from titan.data.prepare import prepare_corpus  # noqa: E402
from titan.data.sampler import SampleBatch, Sampler  # noqa: E402
from titan.distill.build import make_rank  # noqa: E402
from titan.distill.codec.bits import packed_bytes, width_of  # noqa: E402
from titan.distill.codec.block import HEADER_BYTES, BlockHeader, LabelBlock, decode_block, encode_block  # noqa: E402
from titan.distill.rank import RankSpec  # noqa: E402
from titan.distill.tap import label_wish, raw_labels  # noqa: E402
from titan.ops.label import SparseLabels, TailDraws  # noqa: E402
from titan.ops.look import VocabShard  # noqa: E402
from titan.ops.says import label_logits  # noqa: E402
from titan.parallel.local import run_processes, run_worlds  # noqa: E402
from titan.parallel.world import World  # noqa: E402
from titan.plan.layout import make_layout  # noqa: E402
from titan.tasks.sample_labels import SampleLabels  # noqa: E402
from titan.train.restore import restore_trainer  # noqa: E402
from titan.train.trainer import LabelPart, Trainer, TrainerSettings  # noqa: E402

STUDENT = "small"
STEPS, STUDENT_START, EVERY = 500, 100, 25
TIMEOUT_S = 3600.0


def config_of(folder: Path) -> RunConfig:
    """The quickstart's text with twice its vocabulary; the student starts once the teacher has something to say."""
    return check_config(
        {
            "run": {"name": "models", "dir": str(folder), "steps": STEPS},
            "data": {
                "sources": ["python-stdlib"], "vocab_size": 4096, "sequence_length": 128, "batch_size": 16,
                "workers": 1,
                "cache": str(folder / "data"),
            },
            "teacher": {
                "model": {"layers": 4, "hidden": 160, "heads": 4, "kv_heads": 2, "ffn": 448},
                "optimizer": {"learning_rate": 2e-3},
            },
            "students": [
                {
                    "name": STUDENT,
                    "model": {"layers": 4, "hidden": 96, "heads": 4, "kv_heads": 2, "ffn": 256},
                    "optimizer": {"learning_rate": 3e-3, "warmup_steps": 30},
                    "start": {"step": STUDENT_START},
                    "distill": {"weight": 0.9, "schedule": "constant"},
                }
            ],
            "checkpoint": {"every_steps": EVERY, "keep": 1000},
            "cluster": {"device": "cpu", "step_timeout_s": TIMEOUT_S},
        }
    )  # fmt: skip


def train(folder: Path) -> RunConfig:
    """Train both, or go on where they stopped; nothing to do if they are finished."""
    config, run = config_of(folder), folder / "models"
    corpus = prepare_corpus(config.data, folder / "data")

    def job(role: str) -> None:
        worker = make_rank(RankSpec(config, role, 0, run, corpus))
        worker.join("127.0.0.1", worker.open_store("127.0.0.1"))
        worker.train()
        worker.leave()

    if any(newest_step(RankSpec(config, role, 0, run, corpus).checkpoint_folder) != STEPS for role in roles()):
        run.mkdir(parents=True, exist_ok=True)
        run_processes([lambda role=role: job(role) for role in roles()], TIMEOUT_S)  # type: ignore[misc]
    return config


def with_models(folder: Path, function: Callable[..., Any], *args: Any) -> Any:
    """Train if needed, then `function(models, *args)` in a rank of its own."""
    config = train(folder)

    def call(world: World) -> Any:
        return function(Models(world, config, folder), *args)

    assert config.teacher.model is not None
    layout = make_layout(config.teacher.model, config.teacher.layout)
    return run_worlds({"models": layout}, CPU, call, timeout_s=TIMEOUT_S)["models"][0]


def roles() -> tuple[str, str]:
    """Both of them."""
    return TEACHER, STUDENT


class Models:
    """Both, loaded in a world of one rank."""

    def __init__(self, world: World, config: RunConfig, folder: Path):
        corpus = prepare_corpus(config.data, folder / "data")
        self.run, self.config, self.corpus = folder / "models", config, Corpus.open(corpus)
        self.vocab_size, self.length = self.corpus.vocab_size, config.data.sequence_length
        self.teacher, self.student = self._trainer(world, config.teacher), self._trainer(world, config.students[0])
        self.load(self.teacher, TEACHER, STEPS)

    def _trainer(self, world: World, role: TeacherSettings | StudentSettings) -> Trainer:
        assert role.model is not None and self.config.teacher.model is not None
        assert role.model.layers == self.config.teacher.model.layers, "one world's layout serves both"
        settings = TrainerSettings(
            role.model, role.layout, role.optimizer, role.precision, self.vocab_size, self.length, 1, seed=1
        )
        return Trainer(world, settings)

    def load(self, trainer: Trainer, role: str, step: int) -> None:
        """What a role was after a teacher's step."""
        restore_trainer(trainer, Checkpoint(step_folder(self.run / "checkpoints" / role, step)))

    def load_student(self, own_step: int) -> None:
        """The student after a step of its own."""
        self.load(self.student, STUDENT, STUDENT_START + own_step)

    def sampler(self, batch_size: int) -> Sampler:
        """Batches in another order than the run's."""
        return Sampler(self.corpus, self.length, batch_size, seed=77)

    def hidden(self, trainer: Trainer, batch: SampleBatch) -> Tensor:
        """[S * B, D] last hidden states, rows over (position, sample)."""
        tokens = torch.from_numpy(batch.tokens[:, :-1].astype(np.int64))
        hidden: Tensor = trainer.stage.module({"tokens": tokens, "rope": trainer.rope})["hidden"]
        return hidden.reshape(-1, hidden.shape[-1])

    def weight(self, trainer: Trainer) -> Tensor:
        """[V, D] output weight."""
        return trainer.stage.module.output_weight.detach()


def sent(logits_NV: Tensor, settings: LabelSettings, step: int, sample_ids_B: np.ndarray) -> tuple[SampleLabels, float]:
    """Labels of a teacher's logits as a student reads them: said, encoded, decoded; and bytes a token without ids.

    logits: rows over (position, sample)
    """
    samples, tokens = len(sample_ids_B), len(logits_NV)
    length, size = tokens // samples, logits_NV.shape[1]
    wish = label_wish(settings, 1, step)
    draws = None
    if wish.draws:
        rows = torch.arange(tokens)
        ids_N = torch.from_numpy(sample_ids_B.astype(np.int64))[rows % samples]
        draws = TailDraws(wish.draws, wish.seed, ids_N, rows // samples, wish.independent)
    says = label_logits(logits_NV, wish.top_k, draws, settings.temperature, VocabShard(0, size, size, None))
    raw = raw_labels(settings, LabelPart(0, samples, says), length)
    block = LabelBlock(step, 0, sample_ids_B, np.zeros((samples, length + 1), np.int32), raw)
    data = encode_block(block, size, settings.bytes_per_token)
    besides = HEADER_BYTES + 8 * samples + packed_bytes(samples * (length + 1), width_of(size))
    labels = decode_block(BlockHeader.unpack(data[:HEADER_BYTES]), data[HEADER_BYTES:]).labels
    return labels.at(settings.temperature), (len(data) - besides) / tokens


def renormalised(labels: SparseLabels) -> SparseLabels:
    """The head alone, made to sum to one: top k as it is commonly distilled."""
    return SparseLabels(labels.ids_NK, labels.log_prob_NK.log_softmax(1), "none")


def random_draws(logits_NV: Tensor, sample_ids_B: np.ndarray, budget_bytes: float) -> int:
    """The most draws of `random` whose labels keep to so many bytes a token."""
    fits, beyond = 1, 1024
    while beyond - fits > 1:
        middle = (fits + beyond) // 2
        _, size = sent(logits_NV, LabelSettings(codec="random", draws=middle), 1, sample_ids_B)
        fits, beyond = (middle, beyond) if size <= budget_bytes else (fits, middle)
    return fits
