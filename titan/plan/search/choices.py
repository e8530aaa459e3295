"""What the planner may choose from, as numbers: the ways to make a stage of each kind of device, for every number of
micro-batches, in the terms of `titan.plan.search.options`.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

from titan.config.model import VOCAB_MULTIPLE, LayoutSettings, StageSettings
from titan.config.planning import SearchSettings
from titan.errors import ConfigError
from titan.plan.cost import Costs
from titan.plan.fleet import Kind
from titan.plan.layout import Stage
from titan.plan.memory import bytes_per_parameter
from titan.plan.profile import DTYPE_BYTES, BlockCost, BlockKind, num_layer_parameters, num_vocabulary_parameters
from titan.plan.search.options import Combo, Option, Pipeline, SearchProblem, StageCost

MOST_MICRO_BATCHES = 1024
"""Unless the search says otherwise: with more, fill is below a percent in any pipeline."""
ANY_REPLICAS = 8
"""Every number of replicas up to this is tried, then powers of two."""


def problems(costs: Costs, search: SearchSettings) -> list[SearchProblem]:
    """One problem a number of micro-batches, those without any option left out.

    Raises ConfigError if none has an option: the profile has holes, or the batch is too small for any replica.
    """
    found, holes = list[SearchProblem](), dict[str, None]()
    for micro_batches in micro_batch_choices(costs.task.batch_size, search):
        samples = costs.task.batch_size // micro_batches
        options = {
            kind.name: tuple(_options(costs, search, kind, samples, holes)) for kind in costs.fleet.kinds.values()
        }
        if any(options.values()):
            found.append(_problem(costs, options, micro_batches, samples))
    if not found:
        raise ConfigError("\n".join(holes) or _nothing_to_choose(costs, search))
    return found


def micro_batch_choices(batch_size: int, search: SearchSettings) -> list[int]:
    """Numbers of micro-batches to try. Raises ConfigError if one does not divide the batch."""
    if search.micro_batches is None:
        most = min(batch_size, MOST_MICRO_BATCHES)
        return [number for number in range(1, most + 1) if batch_size % number == 0]
    wrong = [number for number in search.micro_batches if batch_size % number]
    if wrong:
        raise ConfigError(
            f"search.micro_batches has {wrong[0]}, which does not divide task.batch_size ({batch_size}); use divisors"
        )
    return sorted(set(search.micro_batches))


def replica_choices(most: int, search: SearchSettings) -> list[int]:
    """Numbers of replicas to try, up to `most`."""
    powers = [1 << power for power in range(most.bit_length())]
    wanted = search.replicas or sorted({*range(1, min(ANY_REPLICAS, most) + 1), *powers})
    return [number for number in wanted if number <= most]


def tensor_choices(costs: Costs, search: SearchSettings, kind: Kind) -> list[int]:
    """Tensor degrees that the model can be cut by, and that fill nodes of a kind without a rest."""
    model = costs.task.model
    whole = math.gcd(VOCAB_MULTIPLE, model.num_kv_heads, model.ffn, model.hidden)
    return sorted(tp for tp in set(search.tensor) if whole % tp == 0 and kind.devices_per_node % tp == 0)


def _options(
    costs: Costs, search: SearchSettings, kind: Kind, samples: int, holes: dict[str, None]
) -> Iterator[Option]:
    """All ways to make a stage of a kind when a micro-batch has so many samples; holes: collects what is not known.

    A number of replicas is left out where fewer have no larger share of the samples.
    """
    for tp in tensor_choices(costs, search, kind):
        shares: dict[int, int] = {}
        for replicas in replica_choices(min(samples, kind.devices // tp), search):
            shares.setdefault(math.ceil(samples / replicas), replicas)
        for share, replicas in shares.items():
            blocks = _blocks(costs, kind.name, tp, share, holes)
            if blocks is not None:
                yield make_option(costs, search, kind, tp, replicas, share, blocks)


def _blocks(
    costs: Costs, kind: str, tp: int, samples: int, holes: dict[str, None]
) -> dict[BlockKind, BlockCost] | None:
    """Costs of every kind of block, or None where the profile does not reach."""
    kinds: tuple[BlockKind, ...] = ("embedding", "layer", "head")
    try:
        return {block: costs.profile.block(kind, block, tp, samples) for block in kinds}
    except ConfigError as error:
        holes[str(error)] = None
        return None


def make_option(
    costs: Costs, search: SearchSettings, kind: Kind, tp: int, replicas: int, samples: int,
    blocks: dict[BlockKind, BlockCost],
) -> Option:  # fmt: skip
    """One option, its numbers those of `titan.plan.cost` and `titan.plan.memory`.

    samples: of the replica that has most
    Seconds of gradient exchange and update of embedding and head are left out: a search that does not see them can only
    promise too little time, which keeps its bound true.
    """
    task, recompute = costs.task, search.recompute
    edge_bytes = samples * _sample_bytes(costs)
    each = bytes_per_parameter(task.precision, replicas if search.shard_optimizer else 1)
    layer_count, rows_count = num_layer_parameters(task) / tp, num_vocabulary_parameters(task) / tp
    layer, embedding, head = blocks["layer"], blocks["embedding"], blocks["head"]
    workspace = layer.workspace_bytes + recompute * layer.activation_bytes
    tail_s, tail_layer_s = 0.0, layer_count * each / costs.profile.update_bytes_per_s(kind.name)
    if replicas > 1:
        network = costs.fleet.network(kind.name, kind.name)
        tail_s = network.latency_s
        tail_layer_s += 2 * (replicas - 1) / replicas * 4 * layer_count / network.bytes_per_s
    return Option(
        kind=kind.name,
        tp=tp,
        dp=replicas,
        layer=StageCost(
            layer.forward_s,
            layer.backward_in(recompute),
            layer_count * each,
            edge_bytes if recompute else layer.activation_bytes,
        ),
        # the first stage asks for no activations ahead, the last for no gradients, and the last sends none on
        embedding=StageCost(
            embedding.forward_s,
            embedding.backward_s,
            rows_count * each + max(0.0, embedding.workspace_bytes - workspace) - edge_bytes,
            embedding.activation_bytes,
        ),
        head=StageCost(
            head.forward_s,
            head.backward_s,
            rows_count * each + max(0.0, head.workspace_bytes - workspace) - edge_bytes,
            head.activation_bytes - edge_bytes,
        ),
        fixed_bytes=costs.profile.fixed_bytes(kind.name) + workspace + 2 * edge_bytes,
        limit_bytes=kind.memory_bytes,
        tail_s=tail_s,
        tail_layer_s=tail_layer_s,
    )


def _problem(costs: Costs, options: dict[str, tuple[Option, ...]], micro_batches: int, samples: int) -> SearchProblem:
    """A search problem whose edges are the fastest that any two options have: what is bounded must not be missed."""
    task, sample_bytes = costs.task, _sample_bytes(costs)
    most = {kind: max((option.dp for option in of_kind), default=0) for kind, of_kind in options.items()}
    edges = {}
    for one in options:
        for other in options:
            alone = one == other and all(2 * option.devices > costs.fleet.kinds[one].devices for option in options[one])
            if most[one] and most[other] and not alone:
                largest = math.ceil(samples / min(most[one], most[other]))
                edges[one, other] = costs.fleet.network(one, other).seconds(largest * sample_bytes)
    devices = {kind.name: kind.devices for kind in costs.fleet.kinds.values()}
    return SearchProblem(task.model.layers, devices, options, micro_batches, edges)


def with_own_edges(
    costs: Costs, problem: SearchProblem, combo: Combo, of_both: Callable[[float, float], float] = max
) -> SearchProblem:
    """The problem with no options but those of a combo, and their true edges.

    of_both: what to take of the two ways across an edge, which differ where tensor degrees do
    """
    task = costs.task
    samples = task.batch_size // problem.micro_batches

    def stage(option: Option, index: int) -> Stage:
        return Stage(index, 0, 0, False, False, option.tp, option.dp, 1, index * option.devices, device=option.kind)

    edges = {
        (one.kind, other.kind): of_both(
            costs.edge_s(stage(one, 0), stage(other, 1), samples, False),
            costs.edge_s(stage(other, 0), stage(one, 1), samples, False),
        )
        for one in combo
        for other in combo
        if (one.kind, other.kind) in problem.edge_s
    }
    return replace(problem, options={option.kind: (option,) for option in combo}, edge_s=edges)


def with_held_tensors(costs: Costs, problem: SearchProblem, number: int) -> SearchProblem:
    """The problem where each stage also holds so many of the tensors that it sends on, one a micro-batch in flight."""
    samples, in_flight = costs.task.batch_size // problem.micro_batches, min(number, problem.micro_batches)

    def holding(option: Option) -> Option:
        share = math.ceil(samples / option.dp)
        return replace(option, fixed_bytes=option.fixed_bytes + in_flight * share * _sample_bytes(costs))

    options = {kind: tuple(map(holding, of_kind)) for kind, of_kind in problem.options.items()}
    return replace(problem, options=options)


def _sample_bytes(costs: Costs) -> int:
    """Of one sample's hidden states."""
    return costs.task.sequence_length * costs.task.model.hidden * DTYPE_BYTES[costs.task.precision]


def layout_settings(problem: SearchProblem, pipeline: Pipeline, search: SearchSettings) -> LayoutSettings:
    """A pipeline as one would write it in run.toml."""
    stages = tuple(
        StageSettings(
            layers=(stage.layers,),
            tp=stage.option.tp,
            dp=stage.option.dp,
            shard=stage.option.dp if search.shard_optimizer else 1,
            device=stage.option.kind,
        )
        for stage in pipeline
    )
    return LayoutSettings(stages=stages, micro_batches=problem.micro_batches, recompute=search.recompute)


def _nothing_to_choose(costs: Costs, search: SearchSettings) -> str:
    kinds = ", ".join(f"{kind.name} has nodes of {kind.devices_per_node}" for kind in costs.fleet.kinds.values())
    return (
        f"search.tensor is {list(search.tensor)}, of which none divides kv_heads ({costs.task.model.num_kv_heads}) and "
        f"the devices of a node ({kinds}); add 1"
    )
