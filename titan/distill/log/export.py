"""Labels of a range of steps as a Parquet file, a row a token, for whoever wants to look at them with other tools."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from titan.distill.codec.block import LabelBlock
from titan.distill.codec.raw import RawLabels
from titan.distill.log.reader import LabelReader
from titan.errors import LabelError

_PAIRS = (
    ("ids_BSK", "log_prob_BSK", "ids", "log_prob"),
    ("draw_ids_BSM", "draw_log_prob_BSM", "draw_ids", "draw_log_prob"),
)
_DENSE = (("dense_BSV", "dense_log_prob"), ("hidden_BSD", "hidden"))
_PER_TOKEN = (("entropy_BS", "entropy"), ("log_norm_BS", "log_norm"))


def export_labels(folder: Path, first: int, last: int, out: Path) -> int:
    """Write steps `first` to `last` of a log to a Parquet file; returns its rows.

    Columns: step, sample (position in the batch), sample_id, position, token and next_token; and of the label what its
    codec has: ids and log_prob, draw_ids and draw_log_prob (lists; absent entries left out), dense_log_prob, hidden,
    entropy, log_norm. Log-probabilities in nats, as RawLabels defines them.
    Raises LabelError if the log does not have all these steps.
    """
    reader = LabelReader(folder, timeout_s=0.0)
    try:
        reader.poll()
        if not reader.first_step <= first <= last <= reader.last_committed:
            raise LabelError(
                f"{folder} has steps {reader.first_step} to {reader.last_committed}, not {first} to {last}; "
                "choose --first and --last among them"
            )
        return _write(out, (_table(block) for block in _blocks(reader, first, last)))
    finally:
        reader.close()


def _blocks(reader: LabelReader, first: int, last: int) -> Iterator[LabelBlock]:
    for step in range(first, last + 1):
        commit = reader.wait_commit(step)
        assert commit is not None
        yield from reader.read(commit)[0]


def _write(out: Path, tables: Iterator[pa.Table]) -> int:
    """One row group a block, so that memory does not grow with the range; the file appears when it is whole."""
    draft = out.with_name(f".{out.name}.tmp")
    rows, writer = 0, None
    try:
        for table in tables:
            writer = writer or pq.ParquetWriter(draft, table.schema)
            writer.write_table(table)
            rows += table.num_rows
        assert writer is not None
        writer.close()
        draft.replace(out)
    except OSError as error:
        raise LabelError(f"cannot write {out}: {error.strerror or error}; make room or choose another --out") from error
    finally:
        draft.unlink(missing_ok=True)
    return rows


def _table(block: LabelBlock) -> pa.Table:
    samples, length = block.tokens_BS1.shape[0], block.tokens_BS1.shape[1] - 1
    shape = (samples, length)
    positions = block.first_sample + np.arange(samples)
    columns: dict[str, pa.Array] = {
        "step": pa.array(np.full(samples * length, block.step)),
        "sample": pa.array(np.repeat(positions, length)),
        "sample_id": pa.array(np.repeat(block.sample_ids_B, length)),
        "position": pa.array(np.tile(np.arange(length, dtype=np.int32), samples)),
        "token": pa.array(np.ascontiguousarray(block.tokens_BS1[:, :-1]).reshape(-1)),
        "next_token": pa.array(np.ascontiguousarray(block.tokens_BS1[:, 1:]).reshape(-1)),
    }
    return pa.table(columns | _label_columns(block.labels, shape))


def _label_columns(labels: RawLabels, shape: tuple[int, int]) -> dict[str, pa.Array]:
    """What the codec has of a label."""
    columns: dict[str, pa.Array] = {}
    for ids_name, log_prob_name, ids_column, log_prob_column in _PAIRS:
        ids, log_prob = getattr(labels, ids_name), getattr(labels, log_prob_name)
        if ids is not None and log_prob is not None:
            there = np.isfinite(log_prob)
            ends = np.concatenate([[0], np.cumsum(there.sum(-1).reshape(-1))]).astype(np.int32)
            columns[ids_column] = pa.ListArray.from_arrays(ends, pa.array(ids[there].astype(np.int32)))
            columns[log_prob_column] = pa.ListArray.from_arrays(ends, pa.array(log_prob[there].astype(np.float32)))
    for name, column in _DENSE:
        array = getattr(labels, name)
        if array is not None:
            flat = pa.array(np.ascontiguousarray(array, dtype=np.float32).reshape(-1))
            columns[column] = pa.FixedSizeListArray.from_arrays(flat, array.shape[-1])
    for name, column in _PER_TOKEN:
        array = getattr(labels, name)
        if array is not None:
            columns[column] = pa.array(np.broadcast_to(array, shape).astype(np.float32).reshape(-1))
    return columns
