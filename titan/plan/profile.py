"""What a block costs on a kind of device: looked up among measurements, or estimated from what the device reaches."""

from dataclasses import dataclass, field
from typing import Literal

from titan.config.model import VOCAB_MULTIPLE
from titan.config.planning import BlockSettings, PeakSettings, ProfileSettings, ShapeSettings, TaskSettings
from titan.errors import ConfigError

BlockKind = Literal["embedding", "layer", "head"]
DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
FARTHEST = 2.0
"""How far beyond the largest measured micro-batch, or below the smallest, a time is believed, as a factor."""
SMALL_FLOATS = 8
"""Floats a token that a layer keeps for its statistics."""


@dataclass(frozen=True)
class BlockCost:
    """One block, one micro-batch, on each of its tensor ranks."""

    forward_s: float
    backward_s: float
    activation_bytes: float
    workspace_bytes: float

    def backward_in(self, recompute: bool) -> float:
        """Seconds of a backward pass, after the forward pass is done again where that is wanted."""
        return self.backward_s + recompute * self.forward_s


@dataclass(frozen=True)
class Profile:
    """The costs of one role's blocks."""

    task: TaskSettings
    settings: ProfileSettings
    _known: dict[tuple[str, BlockKind, int, int], BlockCost] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    """Blocks that were asked for: a search asks for the same ones again and again."""

    def block(self, kind: str, block: BlockKind, tp: int, samples: int) -> BlockCost:
        """One block for `samples` samples. Raises ConfigError where the profile has a hole."""
        key = (kind, block, tp, samples)
        if key not in self._known:
            self._known[key] = self._block(*key)
        return self._known[key]

    def _block(self, kind: str, block: BlockKind, tp: int, samples: int) -> BlockCost:
        shape = self._measured_shape()
        entries = [] if shape is None else _entries(shape, kind, block, tp)
        peak = next((peak for peak in self.settings.peaks if peak.kind == kind), None)
        calibration = self.calibration(kind)
        if entries:
            cost = _interpolated(entries, samples)
        elif peak is not None:
            cost = _estimated(peak, self.task, block, tp, samples)
        else:
            raise ConfigError(self._hole(kind, block, tp))
        return BlockCost(
            cost.forward_s * calibration, cost.backward_s * calibration, cost.activation_bytes, cost.workspace_bytes
        )

    def has(self, kind: str, tp: int) -> bool:
        """Whether every block of a kind of device is known at a tensor degree."""
        if any(peak.kind == kind for peak in self.settings.peaks):
            return True
        shape = self._measured_shape()
        return shape is not None and all(_entries(shape, kind, block, tp) for block in ("embedding", "layer", "head"))

    def reaches(self, kind: str, tp: int, samples: int) -> bool:
        """Whether times are known for so many samples, or for some larger number."""
        if any(peak.kind == kind for peak in self.settings.peaks):
            return True
        shape = self._measured_shape()
        blocks: tuple[BlockKind, ...] = ("embedding", "layer", "head")
        of_each = [_entries(shape, kind, block, tp) for block in blocks] if shape is not None else [[]]
        return all(entries and samples <= FARTHEST * entries[-1].samples for entries in of_each)

    def calibration(self, kind: str) -> float:
        """Measured over predicted time of passes."""
        return next((device.calibration for device in self.settings.devices if device.kind == kind), 1.0)

    def fixed_bytes(self, kind: str) -> float:
        """Memory that a device has lost before anything is computed."""
        return next((device.fixed_gb for device in self.settings.devices if device.kind == kind), 0.0) * 1e9

    def update_bytes_per_s(self, kind: str) -> float:
        """Bytes of optimizer state that an update goes through."""
        return next((device.update_gb_per_s for device in self.settings.devices if device.kind == kind), 10.0) * 1e9

    def _measured_shape(self) -> ShapeSettings | None:
        model, task = self.task.model, self.task
        wanted = (model.hidden, model.heads, model.num_kv_heads, model.ffn, task.vocab_size, task.sequence_length)
        for shape in self.settings.shapes:
            has = (shape.hidden, shape.heads, shape.kv_heads, shape.ffn, shape.vocab_size, shape.sequence_length)
            if has == wanted and shape.precision == task.precision:
                return shape
        return None

    def _hole(self, kind: str, block: BlockKind, tp: int) -> str:
        model, task = self.task.model, self.task
        return (
            f"profile knows nothing of {block} on {kind} at tp {tp} for hidden {model.hidden}, heads {model.heads}, "
            f"ffn {model.ffn}, vocabulary {task.vocab_size}, {task.sequence_length} tokens, {task.precision}; "
            f"measure it with `titan doctor --profile`, or add [[profile.peaks]] for {kind}"
        )


def num_layer_parameters(task: TaskSettings) -> int:
    """Weights of one layer."""
    model = task.model
    attention = model.hidden * (2 * model.hidden + 2 * model.num_kv_heads * (model.hidden // model.heads))
    return attention + 3 * model.hidden * model.ffn + 2 * model.hidden


def num_vocabulary_parameters(task: TaskSettings) -> int:
    """Weights of the embedding, or of the output."""
    return -(-task.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE * task.model.hidden


def _entries(shape: ShapeSettings, kind: str, block: BlockKind, tp: int) -> list[BlockSettings]:
    found = [entry for entry in shape.blocks if (entry.kind, entry.block, entry.tp) == (kind, block, tp)]
    return sorted(found, key=lambda entry: entry.samples)


def _interpolated(entries: list[BlockSettings], samples: int) -> BlockCost:
    """Linear between measured micro-batches, and a little beyond them. Raises ConfigError farther out."""
    smallest, largest = entries[0], entries[-1]
    if samples > FARTHEST * largest.samples:
        raise ConfigError(
            f"profile has {largest.block} on {largest.kind} at tp {largest.tp} for at most {largest.samples} samples, "
            f"a layout needs {samples}; measure larger micro-batches or use more of them"
        )
    if samples * FARTHEST < smallest.samples:
        raise ConfigError(
            f"profile has {smallest.block} on {smallest.kind} at tp {smallest.tp} for {smallest.samples} samples or "
            f"more, a layout needs {samples}; measure smaller micro-batches or use fewer of them"
        )
    if samples < smallest.samples:  # a smaller micro-batch takes no less than its share
        share = samples / smallest.samples
        return _weighted([(smallest, share)])
    above = next((entry for entry in entries if entry.samples >= samples), largest)
    if above.samples == samples or len(entries) == 1:
        return _weighted([(above, samples / above.samples)])
    below = entries[entries.index(above) - 1]
    part = (samples - below.samples) / (above.samples - below.samples)
    return _weighted([(below, 1.0 - part), (above, part)])


def _weighted(parts: list[tuple[BlockSettings, float]]) -> BlockCost:
    def total(name: str) -> float:
        return sum(share * float(getattr(entry, name)) for entry, share in parts)

    return BlockCost(total("forward_s"), total("backward_s"), total("activation_bytes"), total("workspace_bytes"))


def _estimated(peak: PeakSettings, task: TaskSettings, block: BlockKind, tp: int, samples: int) -> BlockCost:
    """From operations and bytes: 2 a weight and token forward, twice as many backward; attention sees half its square.

    Tensor ranks exchange each activation twice forward and twice backward (arXiv 1909.08053, section 3).
    """
    model, size = task.model, DTYPE_BYTES[task.precision]
    tokens = samples * task.sequence_length
    hidden_bytes = tokens * model.hidden * size
    exchange_s = 2 * (tp - 1) / tp * hidden_bytes / (peak.tensor_gb_per_s * 1e9)
    rate = peak.tflops * 1e12 * peak.efficiency * tp
    if block == "layer":
        operations = 2 * num_layer_parameters(task) * tokens + 2 * tokens * task.sequence_length * model.hidden
        forward_s = operations / rate + 2 * exchange_s
        kv = model.num_kv_heads * (model.hidden // model.heads)
        floats = 4 * model.hidden + 3 * (model.hidden + kv + model.ffn) / tp + SMALL_FLOATS
        return BlockCost(forward_s, 2 * operations / rate + 2 * exchange_s, tokens * floats * size, 4 * hidden_bytes)
    rows = num_vocabulary_parameters(task)
    if block == "embedding":  # a look-up, bound by memory: a small part of a layer
        seconds = 2 * tokens * model.hidden / rate + exchange_s
        return BlockCost(seconds, seconds, tokens * 8, hidden_bytes)
    operations = 6 * rows * tokens  # logits and both gradients in one go
    logits_bytes = min(tokens, 256) * rows / model.hidden / tp * 4
    seconds = operations / rate + exchange_s
    return BlockCost(seconds, hidden_bytes / rate + 1e-9, 2 * hidden_bytes, logits_bytes + hidden_bytes)
