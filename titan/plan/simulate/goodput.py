"""What simulated runs say: goodput and its parts, the best checkpoint interval, and how goodput falls with size."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from titan.config.simulation import PositionSettings, SimulationConfig
from titan.plan.simulate.failures import fleet_mtbf_s
from titan.plan.simulate.outcome import PARTS, Outcome, Part
from titan.plan.simulate.replay import World, make_worlds, replay
from titan.plan.simulate.step_times import Pipeline

INTERVAL_FACTORS = tuple(2.0 ** (half / 2) for half in range(-5, 6))
"""Checkpoint intervals that are tried, over Young's."""


@dataclass(frozen=True)
class Goodput:
    """The mean of several runs of one simulation."""

    step_s: float
    """A step without any trouble."""
    steps: float
    wall_s: float
    goodput: float
    """Share of wall time in steps that count, at the speed without trouble."""
    goodput_error: float
    """Standard error of that mean; 0 for one run."""
    num_failures: float
    parts_s: dict[Part, float]


@dataclass(frozen=True)
class Interval:
    """Goodput under a checkpoint interval."""

    every_steps: int
    interval_s: float
    """Seconds of those steps without trouble."""
    goodput: float


@dataclass(frozen=True)
class Scale:
    """Goodput on a fleet of another size."""

    num_devices: int
    goodput: Goodput


def mean_of(outcomes: Sequence[Outcome]) -> Goodput:
    """The mean of runs that differ in chance only."""
    number = len(outcomes)
    each = [outcome.goodput for outcome in outcomes]
    mean = sum(each) / number
    variance = sum((goodput - mean) ** 2 for goodput in each) / (number - 1) if number > 1 else 0.0
    parts = [outcome.parts_s for outcome in outcomes]
    return Goodput(
        step_s=outcomes[0].step_s,
        steps=sum(outcome.steps for outcome in outcomes) / number,
        wall_s=sum(outcome.wall_s for outcome in outcomes) / number,
        goodput=mean,
        goodput_error=math.sqrt(variance / number),
        num_failures=sum(outcome.num_failures for outcome in outcomes) / number,
        parts_s={part: sum(of[part] for of in parts) / number for part in PARTS},
    )


def young_s(stall_s: float, mtbf_s: float) -> float:
    """Best checkpoint interval, seconds of work (Young, CACM 17(9), 1974): sqrt(2 stall mtbf)."""
    return math.sqrt(2.0 * stall_s * mtbf_s)


def daly_s(stall_s: float, mtbf_s: float) -> float:
    """The same to a higher order (Daly, FGCS 22(3), 2006, equation 37)."""
    if stall_s >= 2.0 * mtbf_s:
        return mtbf_s
    ratio = stall_s / (2.0 * mtbf_s)
    return young_s(stall_s, mtbf_s) * (1.0 + math.sqrt(ratio) / 3.0 + ratio / 9.0) - stall_s


def expected_goodput(interval_s: float, stall_s: float, recovery_s: float, mtbf_s: float) -> float:
    """Share of useful time when failures come at any time, recovery included (Daly 2006, equation 20).

    interval_s: work between two checkpoints, each safe when its stall ends
    recovery_s: from a failure to the next step
    """
    if math.isinf(mtbf_s):
        return interval_s / (interval_s + stall_s)
    segment_s = mtbf_s * math.exp(recovery_s / mtbf_s) * math.expm1((interval_s + stall_s) / mtbf_s)
    return interval_s / segment_s


def try_intervals(worlds: Sequence[World]) -> tuple[Interval, ...]:
    """Goodput of intervals around Young's, all in the same worlds; none if nothing fails or saving is free."""
    config, step_s = worlds[0].config, worlds[0].step_s
    middle_s = young_s(config.checkpoint.stall_s, fleet_mtbf_s(config))
    if not 0.0 < middle_s < math.inf:
        return ()
    tried = sorted({max(1, round(middle_s * factor / step_s)) for factor in INTERVAL_FACTORS})
    means = {every: mean_of([replay(world, every) for world in worlds]).goodput for every in tried}
    return tuple(Interval(every, every * step_s, goodput) for every, goodput in means.items())


def scaled(config: SimulationConfig, num_devices: int) -> SimulationConfig:
    """The same step on a fleet of about so many devices of the same mixture: weak scaling, more samples a step.

    Nodes and devices of positions grow alike and are rounded, to one at the least; spares are rounded up.
    """
    factor = num_devices / config.num_devices
    fleet = tuple(
        group.model_copy(
            update={
                "nodes": max(1, round(group.nodes * factor)),
                "spare_nodes": math.ceil(group.spare_nodes * factor),
                "shrunk_step_s": None,  # one node is another share of the fleet
            }
        )
        for group in config.fleet
    )

    def position(of: PositionSettings) -> PositionSettings:
        return of.model_copy(update={"devices": max(1, round(of.devices * factor))})

    step = config.step.model_copy(update={"positions": tuple(map(position, config.step.positions))})
    return config.model_copy(update={"fleet": fleet, "step": step})


def weak_scaling(config: SimulationConfig, planned: Pipeline | None = None) -> tuple[Scale, ...]:
    """Goodput on fleets of the sizes that the config asks for, smallest first; planned: as `make_worlds` takes it."""
    curve = []
    for size in sorted(set(config.weak_scaling)):
        smaller, step = scaled(config, size), planned
        if planned is not None:
            factor = size / config.num_devices
            step = replace(planned, devices=tuple(max(1, round(number * factor)) for number in planned.devices))
        curve.append(Scale(smaller.num_devices, mean_of([replay(world) for world in make_worlds(smaller, step)])))
    return tuple(curve)
