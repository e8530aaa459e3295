"""log.json: what a label log is, so that nobody learns from one that does not fit."""

import hashlib
import json
import zlib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from titan.checkpoint.files import Files, files_of
from titan.config.settings import RunConfig
from titan.data.corpus import Corpus
from titan.errors import LabelError
from titan.observe.files import write_whole

MANIFEST = "log.json"
FORMAT_VERSION = 2
"""1 was one file a part, without segments and without this manifest."""


@dataclass(frozen=True)
class LogManifest:
    """Written before the first block, and never changed."""

    run_id: str
    producer: str
    """Role that makes the labels: the teacher, or a teacher assistant."""
    tokenizer_sha256: str
    """Of the tokenizer's model file."""
    vocab_size: int
    """Pieces of the tokenizer, without padding of the output layer."""
    sequence_length: int
    batch_size: int
    """Samples a step."""
    codec: str
    temperature: float
    """Of the labels."""
    seed: int
    """Of the run: batches and draws follow from it."""
    start_step: int = 0
    """The log's first step is the one after this."""
    weights: str = ""
    """Fingerprint of a frozen teacher's weights; empty where the teacher trains."""
    format_version: int = FORMAT_VERSION


Use = Literal["write", "follow", "offline"]
"""Who asks: the producer, a student of the same run, or a student of another run."""

_WHY: dict[str, str] = {
    "run_id": "it is the log of another run",
    "producer": "it was made by another role",
    "tokenizer_sha256": "its token ids are those of another tokenizer",
    "vocab_size": "its labels are over another vocabulary",
    "sequence_length": "its samples have another length, and a sample's context never changes",
    "batch_size": "its steps have another number of samples",
    "codec": "its labels are encoded in another way",
    "temperature": "its labels are at another temperature",
    "seed": "its batches were drawn from another seed",
    "start_step": "it begins at another step",
    "weights": "its teacher was frozen with other weights",
}
_OFFLINE = ("tokenizer_sha256", "vocab_size", "sequence_length")
"""All that a student of another run must agree on."""
_FOLLOW = tuple(name for name in _WHY if name not in ("start_step", "batch_size", "weights"))


def log_manifest(
    config: RunConfig, corpus: Corpus, run_folder: Path | Files, producer: str, start_step: int = 0, weights: str = ""
) -> LogManifest:
    """What a log of this run says of itself; weights: fingerprint of a frozen teacher's."""
    return LogManifest(
        run_id=run_id(run_folder),
        producer=producer,
        tokenizer_sha256=hashlib.sha256(corpus.tokenizer.path.read_bytes()).hexdigest(),
        vocab_size=corpus.vocab_size,
        sequence_length=config.data.sequence_length,
        batch_size=config.data.batch_size,
        codec=config.labels.codec,
        temperature=config.labels.temperature,
        seed=config.run.seed,
        start_step=start_step,
        weights=weights,
    )


def run_id(run_folder: Path | Files) -> str:
    """What tells runs apart: a hash of their settings; empty without any."""
    settings = files_of(run_folder).read("config.toml")
    return "" if settings is None else hashlib.sha256(settings).hexdigest()[:16]


def write_manifest(folder: Path, manifest: LogManifest) -> None:
    """Write log.json whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / MANIFEST, encode_manifest(manifest))


def encode_manifest(manifest: LogManifest) -> bytes:
    """log.json, with a checksum of itself."""
    return _encode(asdict(manifest))


def read_manifest(folder: Path) -> LogManifest:
    """log.json of a log. Raises LabelError if it is missing, damaged, or of a version this titan does not read."""
    path = folder / MANIFEST
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise LabelError(
            f"{folder} is no label log: it has no {MANIFEST}; give the folder labels/PRODUCER of a run"
        ) from None
    try:
        found = json.loads(data)
        found.pop("crc32")
        whole = _encode(found) == data
    except (ValueError, KeyError, AttributeError, TypeError):
        found, whole = {}, False
    if not whole:
        raise LabelError(f"{path} is damaged; restore it from a copy of the log")
    version = found.get("format_version", 0)
    if version > FORMAT_VERSION:
        raise LabelError(
            f"{path}: the log has format version {version}, this titan reads up to {FORMAT_VERSION}; update titan"
        )
    names = {field.name for field in fields(LogManifest)}
    return LogManifest(**{name: value for name, value in found.items() if name in names})


def refusals(found: LogManifest, wanted: LogManifest, use: Use) -> list[str]:
    """Why a log cannot be used, one line a reason; [] if it can."""
    names = {"write": tuple(_WHY), "follow": _FOLLOW, "offline": _OFFLINE}[use]
    different = [name for name in names if getattr(found, name) != getattr(wanted, name)]
    return [f"{_WHY[name]} ({name} {getattr(found, name)}, wanted {getattr(wanted, name)})" for name in different]


def check_manifest(folder: Path, wanted: LogManifest, use: Use) -> LogManifest:
    """The manifest of a log that fits. Raises LabelError with one line a reason if it does not."""
    found = read_manifest(folder)
    reasons = refusals(found, wanted, use)
    if reasons:
        raise LabelError("\n".join(f"{folder}: {reason}; name another log" for reason in reasons))
    return found


def sign_log(folder: Path, wanted: LogManifest) -> None:
    """Say in a log what it is, or check that it is that. Raises LabelError with one line a reason if it is not."""
    if (folder / MANIFEST).exists():
        check_manifest(folder, wanted, "write")
    else:
        write_manifest(folder, wanted)


def _encode(record: dict[str, Any]) -> bytes:
    checksum = zlib.crc32(json.dumps(record).encode())
    return json.dumps(record | {"crc32": checksum}, indent=1).encode() + b"\n"
