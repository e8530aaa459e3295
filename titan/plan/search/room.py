"""Why a model fits nowhere: by how many bytes, and what would fit."""

from collections.abc import Sequence
from dataclasses import replace

from titan.config.model import LayoutSettings
from titan.config.planning import SearchSettings
from titan.plan.cost import Costs, Prediction
from titan.plan.layout import make_layout
from titan.plan.search.bottleneck import PLAIN, bottleneck, memory_layers
from titan.plan.search.choices import layout_settings
from titan.plan.search.options import Option, SearchProblem

ACCURACY = 1e-4
"""Of the missing bytes, relative to a device's memory."""
GB = 1e9


def does_not_fit(costs: Costs, search: SearchSettings, choices: Sequence[SearchProblem]) -> str:
    """One line: the bytes that every device lacks, and how many layers would fit.

    For the number of micro-batches, and for each kind the degrees, whose stages hold most. Both answers are those of
    layouts whose memory has been predicted: with so much more, or so few layers, there is one that fits.
    """
    problem = max(choices, key=_room)
    layers, largest = problem.layers, max(kind.memory_bytes for kind in costs.fleet.kinds.values())
    low, high = 0.0, largest
    while _excess(costs, search, problem, high, layers) is None:
        low, high = high, 2 * high
    while high - low > ACCURACY * largest:
        middle = (low + high) / 2
        fits = _excess(costs, search, problem, middle, layers) is not None
        low, high = (low, middle) if fits else (middle, high)
    lacking = _excess(costs, search, problem, high, layers)
    assert lacking is not None
    most = next((fewer for fewer in range(layers - 1, 0, -1) if _excess(costs, search, problem, 0.0, fewer) == 0.0), 0)
    devices = " and ".join(
        f"{kind.devices} {kind.name} of {kind.memory_bytes:,.0f} bytes" for kind in costs.fleet.kinds.values()
    )
    fitting = f"{most} of the model's {layers} layers would" if most else "not even one of its layers does"
    return (
        f"the model fits nowhere: each device lacks {max(lacking, high):,.0f} bytes ({devices}), {fitting}; use a "
        "smaller model, more devices, a smaller task.batch_size, search.recompute or search.shard_optimizer"
    )


def roomiest_layout(costs: Costs, search: SearchSettings, choices: Sequence[SearchProblem]) -> LayoutSettings | None:
    """The fastest of a few layouts that leave most memory, one a number of micro-batches; None if none fits."""
    found: list[tuple[float, LayoutSettings]] = []
    for problem in choices:
        laid_out = _laid_out(costs, search, problem, 0.0, problem.layers)
        if laid_out is not None and not laid_out[1].too_large:
            found.append((laid_out[1].step_s, laid_out[0]))
    return min(found, key=lambda each: each[0])[1] if found else None


def _excess(
    costs: Costs, search: SearchSettings, problem: SearchProblem, spare_bytes: float, layers: int
) -> float | None:
    """Bytes that the fullest device has too many when so many layers are laid out in so much more memory.

    None if there is no such layout.
    """
    laid_out = _laid_out(costs, search, problem, spare_bytes, layers)
    if laid_out is None:
        return None
    sizes = zip(laid_out[1].memory, laid_out[1].limit_bytes, strict=True)
    return max(0.0, *(memory.total - limit for memory, limit in sizes))


def _laid_out(
    costs: Costs, search: SearchSettings, problem: SearchProblem, spare_bytes: float, layers: int
) -> tuple[LayoutSettings, Prediction] | None:
    """So many layers on the options that hold most, if every device had so much more memory."""
    combo = tuple(_roomiest(problem, options, spare_bytes) for options in problem.options.values() if options)
    combo = tuple(option for option in combo if problem.units(option))
    if not combo:
        return None
    found = bottleneck(replace(problem, layers=layers), combo)
    if found is None:
        return None
    model = costs.task.model.model_copy(update={"layers": layers})
    task = costs.task.model_copy(update={"model": model})
    fewer = Costs(task, costs.fleet, replace(costs.profile, task=task))
    settings = layout_settings(problem, found.pipeline, search)
    return settings, fewer.predict(make_layout(model, settings))


def _roomiest(problem: SearchProblem, options: Sequence[Option], spare_bytes: float) -> Option:
    wide = [replace(option, limit_bytes=option.limit_bytes + spare_bytes) for option in options]
    return max(wide, key=lambda option: _layers(problem, option))


def _room(problem: SearchProblem) -> float:
    """Layers that all kinds hold together."""
    best = [max(_layers(problem, option) for option in options) for options in problem.options.values() if options]
    return sum(best)


def _layers(problem: SearchProblem, option: Option) -> float:
    """Layers of all stages of an option, plus a fraction that grows as one device needs less for a layer."""
    stages = min(problem.units(option), problem.layers)
    needed = option.fixed_bytes + option.layer.state_bytes + option.layer.activation_bytes
    return sum(memory_layers(problem, option, stages, PLAIN)) + 1.0 / (2.0 + needed / max(1.0, option.limit_bytes))
