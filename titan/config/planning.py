"""What the planner reads: which devices there are (an inventory), what they take (a profile), and what to plan."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from titan.config.model import ModelSettings, Precision
from titan.config.section import Name, Section
from titan.config.sections import check_values, read_values
from titan.errors import ConfigError

PAGE = "docs/planner.md"
Share = Annotated[float, Field(gt=0.0, le=1.0)]


class NodeSettings(Section):
    """Like nodes."""

    name: Name
    """Names the group; its nodes are name-0, name-1 and so on."""
    kind: Name
    """Kind of device; the profile knows it by this name."""
    devices: PositiveInt
    """Devices in one node; a tensor-parallel group never leaves a node."""
    count: PositiveInt = 1
    """Nodes of the group."""
    memory_gb: PositiveFloat
    """Memory of one device, GB of 10^9 bytes."""
    island: Name | None = None
    """Nodes joined by one fast network for which one collective library serves; the default is the kind's name."""
    paced: bool = False
    """CPU ranks that stand in for this kind: real numbers and messages, but passes take the time of the profile."""


class LinkSettings(Section):
    """The network between two islands, or inside one."""

    between: tuple[Name, Name]
    """Two islands; the same one twice for the network between its nodes."""
    latency_s: NonNegativeFloat = 0.0
    """Seconds before the first byte arrives."""
    gb_per_s: PositiveFloat
    """Bytes a second of one device's traffic, in 10^9."""


class InventorySettings(Section):
    """All devices."""

    nodes: Annotated[tuple[NodeSettings, ...], Field(min_length=1)]
    """Groups of like nodes."""
    links: tuple[LinkSettings, ...] = ()
    """Networks."""


class BlockSettings(Section):
    """What one kind of block costs on one kind of device, as measured."""

    kind: Name
    """Kind of device."""
    block: Literal["embedding", "layer", "head"]
    """The head is final norm, output weight and loss."""
    tp: PositiveInt
    """Tensor-parallel degree."""
    samples: PositiveInt
    """Samples of a micro-batch on one replica."""
    forward_s: PositiveFloat
    """Seconds of a forward pass. The head's includes its loss and gradients of the logits."""
    backward_s: PositiveFloat
    """Seconds of a backward pass."""
    activation_bytes: NonNegativeInt
    """Kept from forward to backward by each tensor rank."""
    workspace_bytes: NonNegativeInt = 0
    """Needed for a moment beside what is kept."""


class ShapeSettings(Section):
    """Measurements of one shape of model."""

    hidden: PositiveInt
    """Width."""
    heads: PositiveInt
    """Query heads."""
    kv_heads: PositiveInt
    """Key and value heads."""
    ffn: PositiveInt
    """Inner width."""
    vocab_size: PositiveInt
    """Pieces of the tokenizer."""
    sequence_length: PositiveInt
    """Tokens a sample."""
    precision: Precision
    """Type of weights and activations."""
    blocks: Annotated[tuple[BlockSettings, ...], Field(min_length=1)]
    """One entry a kind of device, block, tensor degree and number of samples."""


class PeakSettings(Section):
    """What a kind of device reaches, for shapes that nobody measured on it."""

    kind: Name
    """Kind of device."""
    tflops: PositiveFloat
    """10^12 operations a second that matrix products reach, by the whole device."""
    efficiency: Share = 0.5
    """Share of them that a layer reaches."""
    tensor_gb_per_s: PositiveFloat = 100.0
    """Bytes a second, in 10^9, of an all-reduce among the devices of a node."""


class DeviceCostSettings(Section):
    """What belongs to a device whatever it computes."""

    kind: Name
    """Kind of device."""
    fixed_gb: NonNegativeFloat = 0.0
    """Memory that context, libraries and buffers take, GB of 10^9 bytes."""
    update_gb_per_s: PositiveFloat = 10.0
    """Bytes of optimizer state, in 10^9, that an update goes through in a second."""
    calibration: PositiveFloat = 1.0
    """Measured over predicted time of passes, learned from steps of a run."""


class ProfileSettings(Section):
    """What devices take."""

    devices: tuple[DeviceCostSettings, ...] = ()
    """Fixed costs; a kind that is not listed has the defaults."""
    shapes: tuple[ShapeSettings, ...] = ()
    """Measurements."""
    peaks: tuple[PeakSettings, ...] = ()
    """For what was not measured."""
    links: tuple[LinkSettings, ...] = ()
    """Networks as measured, by islands; a link that the inventory gives counts more."""


class TaskSettings(Section):
    """The role to plan for."""

    model: ModelSettings
    """Shape of the model."""
    vocab_size: PositiveInt
    """Pieces of the tokenizer."""
    sequence_length: PositiveInt
    """Tokens a sample."""
    batch_size: PositiveInt
    """Samples in a step."""
    precision: Precision = "bf16"
    """Type of weights and activations."""


class SearchSettings(Section):
    """What the planner may choose from."""

    tensor: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 2, 4, 8)
    """Tensor-parallel degrees."""
    replicas: tuple[PositiveInt, ...] | None = None
    """Replicas of a stage; the default is every power of two, and every number up to 8."""
    micro_batches: tuple[PositiveInt, ...] | None = None
    """Micro-batches in a step; the default is every divisor of the batch up to 1024."""
    shard_optimizer: bool = False
    """Whether replicas share the optimizer's state."""
    recompute: bool = False
    """Whether only layer inputs are kept."""
    schedule: Literal["auto", "1f1b"] = "auto"
    """Order of passes. Layouts are searched for under 1F1B; with `auto` the best few are also tried interleaved, in 2
    to 4 chunks, and the fastest of all is taken."""
    mixed: bool = True
    """Whether to try, from the best layouts on, stages whose replicas are of several kinds of devices, with unequal
    shares of the samples."""


class PlanSettings(Section):
    """A plan file: everything `titan plan` needs, without a run."""

    name: Name
    """Names the plan."""
    task: TaskSettings
    """The role to plan for."""
    inventory: InventorySettings | str
    """The devices, or the path of a file that lists them, from this file's folder."""
    profile: ProfileSettings | str
    """What they take, or the path of a file that says it."""
    search: SearchSettings = SearchSettings()
    """What the planner may choose from."""


def load_inventory(path: Path) -> InventorySettings:
    """Read an inventory. Raises ConfigError with one line a mistake."""
    return check_inventory(check_values(InventorySettings, read_values(path, "an inventory"), PAGE))


def load_profile(path: Path) -> ProfileSettings:
    """Read a profile. Raises ConfigError with one line a mistake."""
    return check_profile(check_values(ProfileSettings, read_values(path, "a profile"), PAGE))


def load_plan(path: Path) -> tuple[PlanSettings, InventorySettings, ProfileSettings]:
    """Read a plan file and what it refers to. Raises ConfigError with one line a mistake."""
    values = read_values(path, "a plan file")
    inventory: InventorySettings | None = None
    profile: ProfileSettings | None = None
    # a mistake inside a section that may also be a path would be told twice: sections are checked on their own
    if isinstance(values.get("inventory"), str):
        inventory = load_inventory(path.parent / values["inventory"])
    elif isinstance(values.get("inventory"), dict):
        inventory = check_inventory(check_values(InventorySettings, values["inventory"], PAGE))
        values["inventory"] = "in this file"
    if isinstance(values.get("profile"), str):
        profile = load_profile(path.parent / values["profile"])
    elif isinstance(values.get("profile"), dict):
        profile = check_profile(check_values(ProfileSettings, values["profile"], PAGE))
        values["profile"] = "in this file"
    plan = check_values(PlanSettings, values, PAGE)
    assert inventory is not None and profile is not None, "both are required settings"
    return plan, inventory, profile


def check_inventory(inventory: InventorySettings) -> InventorySettings:
    """Raise ConfigError for nodes and links that contradict each other."""
    _raise(_inventory_mistakes(inventory))
    return inventory


def check_profile(profile: ProfileSettings) -> ProfileSettings:
    """Raise ConfigError for entries that contradict each other."""
    _raise(_profile_mistakes(profile))
    return profile


def _raise(mistakes: Iterator[str]) -> None:
    found = list(mistakes)
    if found:
        raise ConfigError("\n".join(found))


def _inventory_mistakes(inventory: InventorySettings) -> Iterator[str]:
    names = [node.name for node in inventory.nodes]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"inventory.nodes name {name!r} is used {names.count(name)} times; give every group a name of its own"
    memory: dict[str, float] = {}
    for node in inventory.nodes:
        if memory.setdefault(node.kind, node.memory_gb) != node.memory_gb:
            yield (
                f"inventory.nodes {node.name}.memory_gb is {node.memory_gb:g}, but another {node.kind} has "
                f"{memory[node.kind]:g}; give devices of other memory a kind of their own"
            )
    islands = {node.island or node.kind for node in inventory.nodes}
    for index, link in enumerate(inventory.links):
        for end in link.between:
            if end not in islands:
                known = ", ".join(sorted(islands))
                yield f"inventory.links.{index}.between names {end!r}; there are the islands {known}"


def _profile_mistakes(profile: ProfileSettings) -> Iterator[str]:
    for index, shape in enumerate(profile.shapes):
        seen: set[tuple[object, ...]] = set()
        for block in shape.blocks:
            key = (block.kind, block.block, block.tp, block.samples)
            if key in seen:
                what = f"{block.block} on {block.kind}, tp {block.tp}, {block.samples} samples"
                yield f"profile.shapes.{index}.blocks has {what} twice; keep one"
            seen.add(key)
    for name in ("devices", "peaks"):
        kinds = [entry.kind for entry in getattr(profile, name)]
        for kind in sorted({kind for kind in kinds if kinds.count(kind) > 1}):
            yield f"profile.{name} has {kind!r} {kinds.count(kind)} times; keep one"
