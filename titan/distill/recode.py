"""Labels of a log in another codec, made from a log whose labels say everything.

What a teacher would have said of the same step is said again from its log-probabilities: the same samples, tokens and
seeds, so draws are those of the teacher's own pass as far as the log's rounding does not move them.

Shape letters: N tokens, B samples, S tokens of a sample, V vocabulary, D hidden width.
"""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from titan.config.distillation import LabelSettings
from titan.distill.codec.block import HEADER_BYTES, BlockHeader, LabelBlock, decode_block, encode_block
from titan.distill.codec.raw import RawLabels
from titan.distill.log.manifest import MANIFEST, LogManifest, check_manifest, read_manifest, write_manifest
from titan.distill.log.reader import LabelReader
from titan.distill.log.repair import reopen
from titan.distill.log.writer import CommitWriter, LabelWriter
from titan.distill.tap import label_wish, raw_labels
from titan.errors import LabelError
from titan.observe.events import FILE as EVENTS
from titan.observe.events import EventLog, read_events
from titan.observe.files import Record
from titan.ops.label import TailDraws, TeacherSays
from titan.ops.look import VocabShard
from titan.ops.says import label_logits
from titan.train.trainer import LabelPart

CHUNK_ELEMENTS = 1 << 20
"""Logits at a time."""
DURABLE_STEPS = 64
EVENT = "recode_started"
LOCK = ".recode.lock"
Progress = Callable[[int, int], None]
"""Steps that are done, and all."""


@dataclass(frozen=True)
class Wanted:
    """The log to make."""

    labels: LabelSettings
    renormalise: bool = False
    """Scale the head of each `top_k` label to sum to one: its tail then has nothing, and what a student learns is top k
    as it is commonly distilled, biased. For comparisons."""


@dataclass(frozen=True)
class Recoded:
    """What was made, or found to be made."""

    folder: Path
    """The new log."""
    first_step: int
    last_step: int
    steps: int
    """Made now."""
    ended: bool
    """Whether the source has ended, and so this log."""


def recode(source: Path, out: Path, wanted: Wanted, progress: Progress = lambda done, total: None) -> Recoded:
    """Make `out/labels/PRODUCER` from the log folder `source`, or go on with it where it was stopped.

    Steps are committed one by one, so a stop of any kind loses at most one, and students may follow while it grows. A
    source that has not ended is recoded as far as it goes; called again, this goes on.
    Raises LabelError if the source's labels are not whole, or `out` is something else.
    """
    manifest = read_manifest(source)
    if manifest.codec not in ("full", "hidden"):
        raise LabelError(
            f"{source} has labels of codec {manifest.codec!r}, from which no others can be made; "
            "name a log of 'full' or 'hidden'"
        )
    labels = wanted.labels.model_copy(update={"temperature": manifest.temperature})
    _check(labels, wanted, manifest)
    reader = LabelReader(source, timeout_s=0.0)
    try:
        reader.poll()
        first, last = reader.first_step, reader.last_committed
        if not last:
            raise LabelError(f"{source} has no step yet; wait for its first commit")
        _refuse_other(out)
        with _hold(out):
            folder = _open(out, source, replace(manifest, codec=labels.codec, start_step=first - 1), wanted)
            done = max(reopen(folder), first - 1)
            if done > last:
                raise LabelError(f"{folder} has steps up to {done}, {source} only {last}; name another OUT")
            maker = _Maker(labels, wanted.renormalise, manifest)
            _copy(
                reader,
                folder,
                maker,
                range(done + 1, last + 1),
                lambda step: progress(step - first + 1, last - first + 1),
            )
        return Recoded(folder, first, last, last - done, reader.ended is not None)
    finally:
        reader.close()


def _check(labels: LabelSettings, wanted: Wanted, manifest: LogManifest) -> None:
    if labels.codec in ("sampled", "top_k") and labels.top_k > manifest.vocab_size:
        raise LabelError(
            f"--top-k {labels.top_k} is more than the log's vocabulary ({manifest.vocab_size}); ask for less"
        )
    if labels.codec == "hidden":
        raise LabelError("--codec hidden cannot be made from a log: hidden states come from a teacher; choose another")
    if wanted.renormalise and (labels.codec != "top_k" or manifest.temperature != 1.0):
        raise LabelError(
            f"--renormalise is for --codec top_k of a log at temperature 1, got {labels.codec} at "
            f"{manifest.temperature:g}; leave it out"
        )


def _beginnings(out: Path) -> list[Record]:
    return [event for event in read_events(out) if event["event"] == EVENT]


def _refuse_other(out: Path) -> None:
    """Raise LabelError if a folder holds anything but a recoded log."""
    if out.exists() and not out.is_dir():
        raise LabelError(f"{out} is a file; name another OUT")
    if out.is_dir() and not _beginnings(out) and any(path.name not in (LOCK, EVENTS) for path in out.iterdir()):
        raise LabelError(f"{out} is not empty, and no recoded log; name another OUT")


@contextmanager
def _hold(out: Path) -> Iterator[None]:
    """One at a time writes into a folder."""
    out.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(out / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise LabelError(
            f"another `titan labels recode` is writing to {out}; wait for it, or name another OUT"
        ) from None
    finally:
        os.close(descriptor)


def _open(out: Path, source: Path, manifest: LogManifest, wanted: Wanted) -> Path:
    """The folder of the new log, signed; `out` says in its events what it is made from."""
    folder = out / "labels" / manifest.producer
    made = {
        "source": str(source.resolve()),
        "labels": wanted.labels.model_dump(mode="json"),
        "renormalise": wanted.renormalise,
    }
    known = _beginnings(out)
    if known:
        different = [name for name, value in made.items() if known[0].get(name) != value]
        if different:
            was = ", ".join(f"{name} {known[0].get(name)}" for name in different)
            raise LabelError(f"{out} was begun with {was}; name another OUT, or delete it")
    else:
        with EventLog(out) as events:
            events.emit(EVENT, **made, **{f"log_{name}": value for name, value in asdict(manifest).items()})
    if (folder / MANIFEST).exists():
        check_manifest(folder, manifest, "write")
    else:
        write_manifest(folder, manifest)
    return folder


def _copy(reader: LabelReader, folder: Path, maker: "_Maker", steps: range, show: Callable[[int], None]) -> None:
    """Append and commit these steps, and say that the log ends if the source does."""
    writer, commits = LabelWriter(folder, 0, steps.start - 1), CommitWriter(folder, steps.start - 1)
    try:
        for step in steps:
            commit = reader.wait_commit(step)
            assert commit is not None
            blocks, _ = reader.read(commit)
            reader.forget(step)
            for block, data in zip(blocks, maker.step(blocks), strict=True):
                writer.append(step, data, block.sample_ids_B.tolist())
            commits.commit(replace(commit, parts=(0,)))
            if step % DURABLE_STEPS == 0:
                writer.make_durable()
                commits.make_durable()
            show(step)
        writer.make_durable()
        if reader.ended is not None:
            commits.end(reader.ended.reason)
        commits.make_durable()
    finally:
        writer.close()
        commits.close()


class _Maker:
    """Blocks of a step in another codec."""

    def __init__(self, labels: LabelSettings, renormalise: bool, manifest: LogManifest):
        self.labels, self.renormalise = labels, renormalise
        self.seed, self.size = manifest.seed, manifest.vocab_size

    def step(self, blocks: list[LabelBlock]) -> Iterator[bytes]:
        """The same samples, encoded; blocks of a whole step: the first has the output weight, if there is one."""
        array = blocks[0].labels.output_weight_VD
        weight_VD = None if array is None else torch.from_numpy(array)
        for block in blocks:
            yield self.encoded(block, weight_VD)

    def encoded(self, block: LabelBlock, weight_VD: Tensor | None) -> bytes:
        samples, length = block.tokens_BS1.shape[0], block.tokens_BS1.shape[1] - 1
        part = LabelPart(block.first_sample, samples, self._says(block, weight_VD))
        made = replace(block, labels=raw_labels(self.labels, part, length))
        budget = self.labels.bytes_per_token
        data = encode_block(made, self.size, budget)
        if not self.renormalise:
            return data
        sent = decode_block(BlockHeader.unpack(data[:HEADER_BYTES]), data[HEADER_BYTES:]).labels
        return encode_block(replace(made, labels=_renormalised(made.labels, sent)), self.size)

    def _says(self, block: LabelBlock, weight_VD: Tensor | None) -> TeacherSays:
        """Rows over (position, sample), as a teacher has them."""
        wish = label_wish(self.labels, self.seed, block.step)
        rows = _by_position(block)
        samples, tokens = len(block.sample_ids_B), len(rows)
        draws = None
        if wish.draws:
            row_N = torch.arange(tokens)
            sample_N = torch.from_numpy(block.sample_ids_B.astype(np.int64))[row_N % samples]
            draws = TailDraws(wish.draws, wish.seed, sample_N, row_N // samples, wish.independent)
        chunk = max(1, CHUNK_ELEMENTS // self.size)
        shard = VocabShard(0, self.size, self.size, None)
        said = []
        for start in range(0, tokens, chunk):
            part = slice(start, start + chunk)
            logits_NV = rows[part]
            if block.labels.codec == "hidden":
                if weight_VD is None:
                    raise LabelError(f"step {block.step} has hidden states and no output weight; restore the log")
                logits_NV = logits_NV @ weight_VD.t()
            part_draws = draws and draws.rows(part)
            said.append(label_logits(logits_NV, wish.top_k, part_draws, self.labels.temperature, shard, wish.whole))
        return TeacherSays.cat(said)


def _by_position(block: LabelBlock) -> Tensor:
    """[N, V] log-probabilities, or [N, D] hidden states."""
    array = block.labels.hidden_BSD if block.labels.codec == "hidden" else block.labels.dense_BSV
    assert array is not None
    return torch.from_numpy(array).transpose(0, 1).flatten(0, 1)


def _renormalised(raw: RawLabels, sent: RawLabels) -> RawLabels:
    """As many entries of each token as were sent of it, scaled to sum to one."""
    assert raw.log_prob_BSK is not None and sent.log_prob_BSK is not None
    kept_BS1 = np.count_nonzero(sent.log_prob_BSK > -np.inf, axis=-1)[..., None]
    head_BSK = np.where(np.arange(raw.log_prob_BSK.shape[-1]) < kept_BS1, raw.log_prob_BSK, -np.inf)
    norm_BS1 = np.log(np.exp(head_BSK.astype(np.float64)).sum(axis=-1, keepdims=True))
    return replace(raw, log_prob_BSK=(head_BSK - norm_BS1).astype(np.float32))
