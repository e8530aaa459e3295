"""What `titan simulate` reads: a fleet, a step, and what goes wrong; every mistake is reported, all at once."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from titan.config.section import Name, Section
from titan.config.sections import check_values, read_values
from titan.errors import ConfigError


class FleetSettings(Section):
    """Nodes of one kind."""

    kind: Name
    """Kind of device; positions of the step name it."""
    nodes: PositiveInt
    """Nodes that train."""
    devices_per_node: PositiveInt = 8
    """Devices of a node; one that fails takes its node out."""
    spare_nodes: NonNegativeInt = 0
    """Nodes that stand ready beside those."""
    speed: PositiveFloat = 1.0
    """Of one device, against the other kinds: how much a run that goes on without a node slows down."""
    device_mtbf_hours: PositiveFloat | None = None
    """Mean time between failures of one device; absent for none."""
    node_mtbf_hours: PositiveFloat | None = None
    """Mean time between failures of one node, those of its devices not counted; absent for none."""
    repair_hours: NonNegativeFloat = 24.0
    """From the failure of a node until it is back, as a spare."""
    shrinks: bool = True
    """Whether a run can go on without one of these nodes; with `plan`, whether anything fits then."""
    shrunk_step_s: PositiveFloat | None = None
    """Seconds of a step without one of these nodes; absent for the fleet's speed without it. With `plan`, what the
    planner finds for that loss."""


class PositionSettings(Section):
    """Positions of the pipeline that are alike; seconds are per micro-batch, and per chunk where there are several."""

    kind: Name
    """The fleet its devices are of."""
    devices: PositiveInt
    """Devices at one position."""
    count: PositiveInt = 1
    """Positions in a row that are like this."""
    forward_s: NonNegativeFloat
    """Seconds of a forward pass."""
    backward_s: NonNegativeFloat
    """Seconds of a backward pass; with zero-bubble that of the input only."""
    weight_s: NonNegativeFloat = 0.0
    """Seconds of the gradient of the weights; only zero-bubble has it apart."""
    to_next_s: NonNegativeFloat = 0.0
    """Seconds that activations take to the next stage."""
    to_previous_s: NonNegativeFloat = 0.0
    """Seconds that gradients take to the previous stage."""
    tail_s: NonNegativeFloat = 0.0
    """Seconds after the last pass: gradient sync and optimizer."""


class StepSettings(Section):
    """One optimizer step: its seconds, or the pipeline that makes them."""

    seconds: PositiveFloat | None = None
    """Measured or predicted; absent where `positions` are given."""
    schedule: Literal["1f1b", "interleaved", "zero-bubble"] = "1f1b"
    """Order of the passes."""
    micro_batches: PositiveInt = 1
    """Micro-batches of a step."""
    chunks: PositiveInt = 1
    """Stages that a position holds; more than one only when interleaved."""
    positions: tuple[PositionSettings, ...] = ()
    """The pipeline, first to last."""


class JitterSettings(Section):
    """Noise: log-normal factors of mean one."""

    pass_sigma: NonNegativeFloat = 0.0
    """Of one pass on one device; a position takes as long as its slowest device."""
    step_sigma: NonNegativeFloat = 0.0
    """Of a whole step."""


class StragglerSettings(Section):
    """Devices that are slow for a while, and slow their whole position."""

    every_hours: PositiveFloat | None = None
    """Mean time between two slow spells of one device; absent for none."""
    hours: PositiveFloat = 1.0
    """Mean length of a spell."""
    factor: Annotated[float, Field(ge=1.0)] = 1.2
    """How much longer its passes take."""


class RecoverySettings(Section):
    """What a failure costs, and what is done when there is no spare node."""

    job_mtbf_hours: PositiveFloat | None = None
    """Mean time between failures of the job that take no node with them: software, planned stops; absent for none."""
    detect_s: NonNegativeFloat = 60.0
    """Until the failure is noticed."""
    rebuild_s: NonNegativeFloat = 120.0
    """New processes, new worlds."""
    reload_s: NonNegativeFloat = 60.0
    """Read the last checkpoint."""
    without_spare: Literal["wait", "shrink", "stop"] = "wait"
    """`wait` for a repaired node, `shrink` and go on slower until one is back, or `stop` the run."""
    shrink_efficiency: Annotated[float, Field(gt=0.0, le=1.0)] = 0.95
    """Speed of a run that lacks nodes, over its share of the fleet's speed: layers and samples split less evenly."""
    least_share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    """With a smaller share of the fleet's speed a shrunk run waits as well, for want of memory."""


class CheckpointSettings(Section):
    """How the state is saved."""

    every_steps: PositiveInt
    """Steps between two checkpoints."""
    stall_s: NonNegativeFloat = 5.0
    """Seconds that training stands still for one."""
    write_s: NonNegativeFloat = 0.0
    """Seconds after that until it is safe; a failure before loses it."""


class SimulationConfig(Section):
    """A whole run, to be simulated."""

    name: Annotated[str, Field(min_length=1, max_length=60)]
    """Names it in tables and pictures."""
    seed: NonNegativeInt = 1
    """The result depends on nothing else that is random."""
    days: PositiveFloat
    """Days of wall time."""
    steps: PositiveInt | None = None
    """Steps after which the run ends before that."""
    repeats: PositiveInt = 8
    """Runs of different chance, whose mean is told."""
    plan: str | None = None
    """Path of a plan file, from this file's folder, whose devices and best plan stand for `nodes`, `devices_per_node`
    and `step`."""
    weak_scaling: tuple[PositiveInt, ...] = ()
    """Numbers of devices for the curve: the same step on smaller and larger fleets of the same mixture."""
    fleet: Annotated[tuple[FleetSettings, ...], Field(min_length=1)]
    """Kinds of nodes."""
    step: StepSettings
    """One step without any trouble."""
    jitter: JitterSettings = JitterSettings()
    """Noise."""
    stragglers: StragglerSettings = StragglerSettings()
    """Slow devices."""
    recovery: RecoverySettings = RecoverySettings()
    """Failures."""
    checkpoint: CheckpointSettings
    """Checkpoints."""

    @property
    def num_devices(self) -> int:
        """Devices that train."""
        return sum(group.nodes * group.devices_per_node for group in self.fleet)


def load_simulation(path: Path) -> SimulationConfig:
    """Read a simulation's TOML. Raises ConfigError with one line a mistake: setting, value, remedy."""
    return check_simulation(read_values(path, "a simulation's TOML"))


def check_simulation(values: dict[str, Any]) -> SimulationConfig:
    """A SimulationConfig of plain values. Raises ConfigError naming every mistake."""
    config = check_values(SimulationConfig, values, "docs/simulate.md")
    mistakes = list(_mistakes(config))
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return config


def _mistakes(config: SimulationConfig) -> list[str]:
    """What is wrong between settings that are each right."""
    step, found = config.step, []
    kinds = {group.kind: group.nodes * group.devices_per_node for group in config.fleet}
    if len(kinds) < len(config.fleet):
        found.append("fleet names a kind twice; give each kind of node one [[fleet]]")
    if (step.seconds is None) == (not step.positions):
        given = "both" if step.positions else "neither"
        found.append(f"step has {given} of seconds and positions; give one of them")
    if step.chunks > 1 and step.schedule != "interleaved":
        found.append(f'step.chunks is {step.chunks}; want 1, or step.schedule = "interleaved"')
    positions = sum(position.count for position in step.positions)
    if step.schedule == "interleaved" and positions and step.micro_batches % positions:
        found.append(f"step.micro_batches is {step.micro_batches}; want a multiple of the {positions} positions")
    used = dict.fromkeys(kinds, 0)
    for index, position in enumerate(step.positions):
        if position.forward_s + position.backward_s + position.weight_s <= 0:
            found.append(f"step.positions.{index} takes no time; give forward_s and backward_s above 0")
        if position.weight_s and step.schedule != "zero-bubble":
            found.append(
                f'step.positions.{index}.weight_s is {position.weight_s}; want 0 unless schedule "zero-bubble"'
            )
        if position.kind not in kinds:
            found.append(f"step.positions.{index}.kind is {position.kind!r}; the fleet has {', '.join(kinds)}")
        else:
            used[position.kind] += position.count * position.devices
    all_known = bool(step.positions) and all(position.kind in kinds for position in step.positions)
    for kind, devices in kinds.items():
        if all_known and used[kind] != devices:
            found.append(f"positions use {used[kind]} {kind}, the fleet has {devices}; make them equal")
    return found
