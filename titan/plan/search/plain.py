"""Layouts that one would write down without a planner: what a plan's gain is measured against."""

from collections.abc import Iterator, Sequence

from titan.plan.layout import even_split
from titan.plan.search.options import Option, Pipeline, PlacedStage, SearchProblem, fits

NUM_PREDICTED = 3
"""Best by the formula, of which the exact timeline is taken."""


def uniform_pipelines(choices: Sequence[SearchProblem]) -> list[tuple[SearchProblem, Pipeline]]:
    """The fastest layouts with like stages of equally many layers on all devices, kinds one after the other.

    Ranked by sum + (M - 1) max of the stages' seconds. Empty if none fits.
    """
    found = [(_about_s(problem, pipeline), problem, pipeline) for problem in choices for pipeline in _uniform(problem)]
    return [(problem, pipeline) for _, problem, pipeline in sorted(found, key=lambda each: each[0])[:NUM_PREDICTED]]


def _uniform(problem: SearchProblem) -> Iterator[Pipeline]:
    """Every degree of tensor and data parallelism that all kinds know and that uses up all devices."""
    by_degree: dict[tuple[int, int], list[Option]] = {}
    for options in problem.options.values():
        for option in options:
            by_degree.setdefault((option.tp, option.dp), []).append(option)
    for alike in by_degree.values():
        stages = [option for option in alike for _ in range(problem.units(option))]
        uses_all = sum(option.devices for option in stages) == sum(problem.devices.values())
        if not uses_all or len(stages) > problem.layers:
            continue
        layers = even_split(problem.layers, len(stages))
        pipeline = tuple(PlacedStage(option, number) for option, number in zip(stages, layers, strict=True))
        if fits(problem, pipeline):
            yield pipeline


def _about_s(problem: SearchProblem, pipeline: Pipeline) -> float:
    seconds = [stage.layers * stage.option.layer.both_s for stage in pipeline]
    return sum(seconds) + (problem.micro_batches - 1) * max(seconds)
