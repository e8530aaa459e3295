"""What a log holds: its segments one by one, and its size, steps and samples in all."""

from dataclasses import dataclass
from pathlib import Path

from titan.distill.log.reader import LabelReader
from titan.distill.log.retention import read_places
from titan.distill.log.segment import index_path, parts_of, scan, segments_of


@dataclass(frozen=True)
class SegmentContents:
    """One segment, as far as its headers are intact."""

    part: int
    path: Path
    first_step: int
    """0 if it is empty."""
    last_step: int
    blocks: int
    samples: int
    tokens: int
    size_bytes: int
    """Index included."""


@dataclass(frozen=True)
class LogContents:
    """One log. Steps are those that can be read; segments may hold steps that are not committed."""

    producer: str
    first_step: int
    """0 if no step is committed."""
    last_step: int
    ended: str
    """Why no more steps will come; empty while they may."""
    segments: tuple[SegmentContents, ...]
    readers: dict[str, int]
    """Last step of each reader's checkpoint."""

    @property
    def num_steps(self) -> int:
        """Steps that can be read."""
        return self.last_step - self.first_step + 1 if self.last_step else 0

    @property
    def samples(self) -> int:
        """In all segments."""
        return sum(segment.samples for segment in self.segments)

    @property
    def tokens(self) -> int:
        """In all segments."""
        return sum(segment.tokens for segment in self.segments)

    @property
    def size_bytes(self) -> int:
        """Segments and indexes."""
        return sum(segment.size_bytes for segment in self.segments)

    @property
    def bytes_per_token(self) -> float:
        """Labels, token ids, sample ids, headers and index."""
        return self.size_bytes / max(1, self.tokens)


def read_contents(folder: Path) -> LogContents:
    """Look through a log's headers. Raises LabelError for damaged commit records or readers' places."""
    reader = LabelReader(folder, timeout_s=0.0)
    try:
        reader.poll()
        first, last, ended = reader.first_step, reader.last_committed, reader.ended
    finally:
        reader.close()
    segments = tuple(_segment(part, path) for part in parts_of(folder) for path in segments_of(folder, part))
    return LogContents(folder.name, first, last, ended.reason if ended else "", segments, read_places(folder))


def _segment(part: int, path: Path) -> SegmentContents:
    first = last = blocks = samples = tokens = 0
    for block in scan(path):
        header = block.header
        first, last, blocks = first or header.step, header.step, blocks + 1
        samples, tokens = samples + header.samples, tokens + header.samples * header.sequence_length
    index = index_path(path)
    size = path.stat().st_size + (index.stat().st_size if index.exists() else 0)
    return SegmentContents(part, path, first, last, blocks, samples, tokens, size)
