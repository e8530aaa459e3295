"""Features on their way from a teacher's replicas to students: a bounded ring a replica, and nothing that waits.

A teacher writes the features of a step before it commits the step. So once a student has read the commit, features are
there, or they are gone because the student is slower than the ring is long; then it learns the step without them.
"""

from collections.abc import Sequence
from pathlib import Path

from titan.distill.features.codec import FeatureLabels, WireType, decode_step, encode_features, join
from titan.distill.log.ring import FeatureRing, ring_path
from titan.distill.service.client import FlightLabelReader
from titan.errors import LabelError


class FeatureWriter:
    """The ring of one replica of the stage that has the layer."""

    def __init__(self, folder: Path, part: int, parts: int, slots: int, slot_bytes: int, wire: WireType):
        """parts: replicas of the stage; rings of an earlier layout with more are removed
        slots:   steps that are held;  slot_bytes: as titan.distill.features.codec.step_bytes gives it
        """
        self.wire = wire
        if part == 0:
            for path in folder.glob("part-*.ring"):
                if int(path.stem.removeprefix("part-")) >= parts:
                    path.unlink(missing_ok=True)
        self.ring = FeatureRing.create(folder, part, slots, slot_bytes)

    def write(self, step: int, blocks: Sequence[FeatureLabels]) -> int:
        """Put a step's features in place of those `slots` steps before; returns their bytes."""
        data = b"".join(encode_features(block, self.wire) for block in blocks)
        self.ring.write(step, data)
        return len(data)

    def close(self) -> None:
        """The ring stays for its readers."""
        self.ring.close()


class FeatureReader:
    """All rings of a folder, wherever their teacher has begun anew meanwhile."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.rings: dict[int, tuple[int, FeatureRing]] = {}
        """By part: the file's number on disk, and its ring."""

    def read(self, step: int, samples: int) -> FeatureLabels | None:
        """Features of all samples of a committed step; None if they are gone, whole or in part.

        Raises LabelError for features that are too new for this titan. Never waits.
        """
        self._open()
        payloads = [ring.read(step) for _, ring in self.rings.values()]
        return join([block for data in payloads if data is not None for block in decode_step(data)], samples)

    def close(self) -> None:
        """Unmap all rings."""
        for _, ring in self.rings.values():
            ring.close()
        self.rings.clear()

    def _open(self) -> None:
        """Map rings that are new, and those that took the place of one that was mapped."""
        for path in sorted(self.folder.glob("part-*.ring")):
            part = int(path.stem.removeprefix("part-"))
            try:
                number = path.stat().st_ino
                known = self.rings.get(part)
                if known is None or known[0] != number:
                    self.rings[part] = (number, FeatureRing.open(self.folder, part))
                    if known is not None:
                        known[1].close()
            except (FileNotFoundError, LabelError):
                continue  # it is being replaced: its features are not there yet
        for part in [part for part in self.rings if not ring_path(self.folder, part).exists()]:
            self.rings.pop(part)[1].close()


class FeatureClient:
    """What `FeatureReader` is to a folder, this is to the label service that a student reads."""

    def __init__(self, reader: FlightLabelReader):
        self.reader = reader

    def read(self, step: int, samples: int) -> FeatureLabels | None:
        """Features of all samples of a committed step; None if they are gone, whole or in part. Never waits for them.

        Parts are asked for until all samples are there: their number changes when a teacher gets another layout.
        """
        blocks: list[FeatureLabels] = []
        for part in range(samples):
            try:
                payload = self.reader.features(step, part, wait_s=0.0)
            except LabelError:
                payload = None  # no such ring, for instance where the teacher has moved to another node
            if payload is None:
                return None
            blocks += decode_step(payload)
            if sum(block.samples for block in blocks) >= samples:
                break
        return join(blocks, samples)

    def close(self) -> None:
        """The connection is that of the labels."""
