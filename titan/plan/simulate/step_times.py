"""Seconds of one step on a simulated fleet: without trouble, with slow positions, and with noise."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from titan.config.simulation import SimulationConfig
from titan.plan.schedule import Action, Pass, Schedule, make_schedule
from titan.plan.timeline import StageTimes, Timeline, passes_in_order, timeline

Array = NDArray[np.float64]
JITTER_SAMPLES = 128
"""Steps whose noise is computed pass by pass; a run draws from them."""


@dataclass(frozen=True)
class Pipeline:
    """The step of a simulation: a schedule and its times, and how many devices each position has."""

    schedules: tuple[Schedule, ...]
    chunks: int
    times: tuple[StageTimes, ...]
    tail_s: tuple[float, ...]
    devices: tuple[int, ...]

    def timeline(self) -> Timeline:
        """One step without any trouble."""
        return timeline(self.schedules, self.chunks, self.times, self.tail_s)


def make_pipeline(config: SimulationConfig) -> Pipeline:
    """The pipeline of a simulation; a step that is given in seconds is one pass of one position of all devices."""
    step = config.step
    if step.seconds is not None:
        forward = ((Action(Pass.FORWARD, 0),),)
        return Pipeline(forward, 1, (StageTimes(step.seconds, 0.0),), (0.0,), (config.num_devices,))
    positions = [position for position in step.positions for _ in range(position.count)]
    stages = positions * step.chunks
    times = tuple(
        StageTimes(
            of.forward_s,
            of.backward_s,
            of.weight_s,
            of.to_next_s if index < len(stages) - 1 else 0.0,
            of.to_previous_s if index > 0 else 0.0,
        )
        for index, of in enumerate(stages)
    )
    schedules = tuple(
        make_schedule(step.schedule, index, len(positions), step.chunks, step.micro_batches)
        for index in range(len(positions))
    )
    tails, devices = tuple(of.tail_s for of in positions), tuple(of.devices for of in positions)
    return Pipeline(schedules, step.chunks, times, tails, devices)


def many_steps(pipeline: Pipeline, samples: int, factor: Callable[[int], Array]) -> Array:
    """Seconds of `samples` steps whose passes take longer, all at once: titan.plan.timeline on vectors.

    factor: of a position, asked for once a pass: how many times longer the pass takes in each sample
    """
    positions, last = len(pipeline.schedules), len(pipeline.times) - 1
    zero = np.zeros(samples)
    free_s = [zero] * positions
    link_free_s: dict[tuple[int, int], Array] = {}
    arrived_s: dict[tuple[Pass, int, int], Array] = {}
    for position, action in passes_in_order(pipeline.schedules, len(pipeline.times)):
        stage, index = action.chunk * positions + position, action.micro_batch
        times = pipeline.times[stage]
        start_s = np.maximum(free_s[position], arrived_s.pop((action.kind, stage, index), zero))
        end_s = free_s[position] = start_s + times.of(action.kind) * factor(position)
        if action.kind is Pass.FORWARD and stage < last:
            receiver, takes_s = stage + 1, times.to_next_s
        elif action.kind is Pass.BACKWARD and stage > 0:
            receiver, takes_s = stage - 1, times.to_previous_s
        else:
            continue
        link = (position, receiver % positions)
        link_free_s[link] = arrival_s = np.maximum(end_s, link_free_s.get(link, zero)) + takes_s
        arrived_s[action.kind, receiver, index] = arrival_s
    ends = [end_s + tail_s for end_s, tail_s in zip(free_s, pipeline.tail_s, strict=True)]
    longest_s: Array = np.max(ends, axis=0)
    return longest_s


def slow_steps_s(pipeline: Pipeline, slow: Sequence[frozenset[int]], factor: float) -> Array:
    """Seconds of a step while all passes of some positions take `factor` times as long, for each set of positions."""
    factors = np.ones((len(pipeline.schedules), len(slow)))
    for sample, positions in enumerate(slow):
        factors[list(positions), sample] = factor
    return many_steps(pipeline, len(slow), factors.__getitem__)


def jitter_factors(pipeline: Pipeline, config: SimulationConfig, rng: np.random.Generator) -> Array | None:
    """How many times the quiet step some noisy steps take; None where there is no noise.

    A position waits for the slowest of its n devices; the largest of n draws is one draw of U^(1/n) through the inverse
    of their distribution.
    """
    sigma, normal = config.jitter.pass_sigma, NormalDist()
    factors = np.ones(JITTER_SAMPLES)

    def slowest(position: int) -> Array:
        ranks = np.minimum(rng.random(JITTER_SAMPLES) ** (1.0 / pipeline.devices[position]), 1 - 1e-16)
        return np.exp(sigma * np.array([normal.inv_cdf(rank) for rank in ranks.tolist()]) - sigma**2 / 2)

    if sigma:
        factors = many_steps(pipeline, JITTER_SAMPLES, slowest) / pipeline.timeline().step_s
    if config.jitter.step_sigma:
        of_step = config.jitter.step_sigma
        factors = factors * np.exp(of_step * rng.standard_normal(JITTER_SAMPLES) - of_step**2 / 2)
    return factors if sigma or config.jitter.step_sigma else None
