"""Chance, drawn before a run is replayed: when nodes and jobs fail, and when which positions are slow."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from titan.config.simulation import FleetSettings, SimulationConfig
from titan.errors import ConfigError
from titan.plan.simulate.step_times import Array

HOUR_S, DAY_S = 3600.0, 86400.0
MOST_EVENTS = 5_000_000
"""Failures, slow spells or checkpoints of a run; this many take a minute or so."""


@dataclass(frozen=True)
class Failure:
    """Something fails at a time, seconds from the start of the run."""

    time_s: float
    group: int | None
    """Place of its node's kind in the fleet; None for the job itself, which costs no node."""
    luck: float
    """Uniform in [0, 1): it strikes one of the group's places, which may be empty by then, and then nothing happens."""


def failures_a_second(group: FleetSettings) -> float:
    """Rate at which the nodes of a group fail, all together."""
    of_devices = group.devices_per_node / group.device_mtbf_hours if group.device_mtbf_hours else 0.0
    return group.nodes * (of_devices + (1.0 / group.node_mtbf_hours if group.node_mtbf_hours else 0.0)) / HOUR_S


def fleet_mtbf_s(config: SimulationConfig) -> float:
    """Mean time between two interruptions of the run, seconds; infinite if nothing ever fails."""
    rate = sum(failures_a_second(group) for group in config.fleet)
    if config.recovery.job_mtbf_hours:
        rate += 1.0 / (HOUR_S * config.recovery.job_mtbf_hours)
    return 1.0 / rate if rate else float("inf")


def draw_failures(config: SimulationConfig, rng: np.random.Generator) -> tuple[Failure, ...]:
    """Every failure of a whole fleet in the time of the run, in order: exponential times between them."""
    rates: list[tuple[int | None, float]] = [(index, failures_a_second(of)) for index, of in enumerate(config.fleet)]
    if config.recovery.job_mtbf_hours:
        rates.append((None, 1.0 / (HOUR_S * config.recovery.job_mtbf_hours)))
    found: list[Failure] = []
    for group, rate in rates:
        number = rng.poisson(rate * config.days * DAY_S)
        times, luck = rng.random(number) * config.days * DAY_S, rng.random(number)
        found += [Failure(*each) for each in zip(times.tolist(), [group] * number, luck.tolist(), strict=True)]
    return tuple(sorted(found, key=lambda failure: failure.time_s))


@dataclass(frozen=True)
class SlowTimes:
    """From each of these seconds on, which positions are slow; the first is 0."""

    start_s: Array
    positions: tuple[frozenset[int], ...]


def draw_slow_times(config: SimulationConfig, devices: Sequence[int], rng: np.random.Generator) -> SlowTimes:
    """When each position has at least one slow device.

    devices: of each position
    Spells come to a position as a Poisson stream and last exponentially long, so that at any time, the first included,
    a device is slow with probability 1 - exp(-hours / every_hours).
    """
    changes: list[tuple[float, int, bool]] = []
    end_s, settings = config.days * DAY_S, config.stragglers
    for position, number in enumerate(devices if settings.every_hours else ()):
        assert settings.every_hours is not None
        under_way = rng.poisson(number * settings.hours / settings.every_hours)
        coming = rng.poisson(number * end_s / (settings.every_hours * HOUR_S))
        starts = np.concatenate([np.zeros(under_way), rng.random(coming) * end_s])
        lasts = rng.exponential(settings.hours * HOUR_S, under_way + coming)
        for start_s, stop_s in _united(starts, starts + lasts):
            changes += [(start_s, position, True), (stop_s, position, False)]
    times, sets, slow = [0.0], [frozenset[int]()], set[int]()
    for time_s, position, begins in sorted(changes):
        if begins:
            slow.add(position)
        else:
            slow.discard(position)
        if time_s <= times[-1]:
            sets[-1] = frozenset(slow)
        elif time_s < end_s:
            times.append(time_s)
            sets.append(frozenset(slow))
    return SlowTimes(np.array(times), tuple(sets))


def check_size(config: SimulationConfig, step_s: float) -> None:
    """Raise ConfigError if a run has so many events that it would take hours to replay."""
    run_s = config.days * DAY_S
    failures, spells = run_s / fleet_mtbf_s(config), 0.0
    if config.stragglers.every_hours:
        spells = config.num_devices * run_s / (HOUR_S * config.stragglers.every_hours)
    checkpoints = run_s / (config.checkpoint.every_steps * step_s)
    if config.steps is not None:
        checkpoints = min(checkpoints, config.steps / config.checkpoint.every_steps)
    for number, what, setting in (
        (failures, "failures", "a mean time between failures"),
        (spells, "slow spells", "stragglers.every_hours"),
        (checkpoints, "checkpoints", "checkpoint.every_steps"),
    ):
        if number > MOST_EVENTS:
            raise ConfigError(
                f"days is {config.days:g}, which means {number:,.0f} {what}, more than the {MOST_EVENTS:,} that can be "
                f"simulated; raise {setting}, or simulate fewer days"
            )


def _united(starts: Array, stops: Array) -> list[tuple[float, float]]:
    """Intervals without overlap that cover the same times."""
    if not len(starts):
        return []
    order = np.argsort(starts, kind="stable")
    starts, covered = starts[order], np.maximum.accumulate(stops[order])
    first = np.concatenate([[True], starts[1:] > covered[:-1]])
    last = np.concatenate([first[1:], [True]])
    return list(zip(starts[first].tolist(), covered[last].tolist(), strict=True))
