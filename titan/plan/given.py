"""What a layout that somebody gives would take, without any search."""

from collections import Counter
from collections.abc import Iterator

from titan.errors import ConfigError
from titan.plan.cost import Costs, Prediction
from titan.plan.layout import Layout


def evaluate_layout(costs: Costs, layout: Layout) -> Prediction:
    """The same numbers as a plan's; whether it fits is `Prediction.too_large`.

    Raises ConfigError, one line a mistake, for layers left out, held twice or not there, stages without layers, batches
    that cannot be cut so, and more devices than there are.
    """
    mistakes = [*_layer_mistakes(costs, layout), *_batch_mistakes(costs, layout), *_device_mistakes(costs, layout)]
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return costs.predict(layout)


def _layer_mistakes(costs: Costs, layout: Layout) -> Iterator[str]:
    end, layers = 0, costs.task.model.layers
    for stage in layout.stages:
        span = f"stage {stage.index} holds layers [{stage.first_layer}, {stage.end_layer})"
        if stage.end_layer <= stage.first_layer:
            yield f"{span}, which is none; give every stage one layer at least"
        elif stage.first_layer > end:
            yield f"{span}, but the one before ends at {end}; layers {end} to {stage.first_layer - 1} are on no stage"
        elif stage.first_layer < end:
            yield f"{span}, but the one before ends at {end}; layers {stage.first_layer} to {end - 1} are on two stages"
        end = max(end, stage.end_layer)
    if end != layers:
        yield f"the stages end at layer {end}, the model has {layers} layers; make them equal"
    ends = [(stage.has_embedding, stage.has_head) for stage in layout.stages]
    first, last = [has for has, _ in ends], [has for _, has in ends]
    if first != [index == 0 for index in range(len(ends))] or last != first[::-1]:
        yield "the embedding belongs on the first stage alone and the head on the last alone; put them there"


def _batch_mistakes(costs: Costs, layout: Layout) -> Iterator[str]:
    batch, number = costs.task.batch_size, layout.micro_batches
    if batch % number:
        yield f"micro_batches is {number}, which does not divide task.batch_size ({batch}); use a divisor"
        return
    for stage in layout.positions:
        if min(end - start for start, end in stage.samples(batch // number)) < 1:
            yield (
                f"stage {stage.index} has {stage.dp} replicas, but a micro-batch has {batch // number} samples, not "
                "one for each; use fewer micro-batches or replicas"
            )


def _device_mistakes(costs: Costs, layout: Layout) -> Iterator[str]:
    used: dict[str, int] = {}
    for stage in layout.positions:
        for name, replicas in Counter(costs.kinds_of(stage)).items():
            kind = costs.fleet.kinds[name]
            used[name] = used.get(name, 0) + replicas * stage.tp
            if stage.tp > kind.devices_per_node:
                yield (
                    f"stage {stage.index} has tp {stage.tp}, but a node of {name} has {kind.devices_per_node} "
                    "devices; a tensor-parallel group stays on one node: use a smaller tp"
                )
    for name, number in used.items():
        if number > costs.fleet.kinds[name].devices:
            yield (
                f"the layout wants {number} devices of {name}, the inventory has {costs.fleet.kinds[name].devices}; "
                "use fewer replicas or stages"
            )
