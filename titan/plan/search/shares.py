"""How a stage's replicas of unlike devices share the samples of a micro-batch, so that the slowest is done soonest."""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping

from titan.config.model import LayoutSettings, StageSettings
from titan.errors import ConfigError
from titan.plan.cost import Costs

Seconds = Callable[[str, int], float]
"""Of a micro-batch, both ways, on a replica of a kind that has so many of its samples; never less for more samples."""
SOONEST_S = 1e-30


def with_shares(costs: Costs, settings: LayoutSettings) -> LayoutSettings:
    """The layout with the best shares on every stage whose replicas are of several kinds; its micro-batches are given.

    Raises ConfigError where a stage has more replicas than a micro-batch has samples.
    """
    stages, samples = settings.stages or (), costs.task.batch_size // (settings.micro_batches or 1)
    return settings.model_copy(
        update={
            "stages": tuple(
                _shared(costs, stage, samples, index == 0, index == len(stages) - 1, settings.recompute)
                if isinstance(stage.device, tuple)
                else stage
                for index, stage in enumerate(stages)
            )
        }
    )


def _shared(
    costs: Costs, stage: StageSettings, samples: int, first: bool, last: bool, recompute: bool
) -> StageSettings:
    if stage.dp > samples:
        raise ConfigError(f"a stage has {stage.dp} replicas, a micro-batch {samples} samples; use fewer micro-batches")
    seconds = replica_seconds(costs, sum(stage.layers), stage.tp, first, last, recompute)
    kinds = [kind for kind in stage.kinds if kind is not None]
    by_kind = water_filled(Counter(kinds), samples, seconds)
    shares = [by_kind[kind].pop(0) for kind in kinds]
    least = math.gcd(*shares)
    return stage.model_copy(update={"shares": tuple(share // least for share in shares)})


def replica_seconds(costs: Costs, layers: int, tp: int, first: bool, last: bool, recompute: bool) -> Seconds:
    """Seconds of a stage on one replica, by kind and samples.

    Where the profile does not reach, no time at all for few samples, so that more are given, and no end for many.
    """
    known: dict[tuple[str, int], float] = {}

    def seconds(kind: str, samples: int) -> float:
        if (kind, samples) not in known:
            try:
                layer = costs.profile.block(kind, "layer", tp, samples)
                ends = [costs.profile.block(kind, "embedding", tp, samples)] if first else []
                ends += [costs.profile.block(kind, "head", tp, samples)] if last else []
            except ConfigError:
                known[kind, samples] = 0.0 if costs.profile.reaches(kind, tp, samples + 1) else math.inf
            else:
                ends_s = sum(block.forward_s + block.backward_s for block in ends)
                known[kind, samples] = layers * (layer.forward_s + layer.backward_in(recompute)) + ends_s
        return known[kind, samples]

    return seconds


def water_filled(replicas: Mapping[str, int], samples: int, seconds: Seconds) -> dict[str, list[int]]:
    """Whole samples of every replica, at least one each, with the least time of the slowest one.

    replicas: number of each kind;  samples: of a micro-batch, at least as many as replicas
    returns:  by kind, the largest first

    From parts by speed on, a sample goes from the slowest replica to whichever has one more done before it, until there
    is none. Then nothing is better: where the slowest has fewer samples another has more, and that one would have been
    no slower than the slowest with one more.
    """
    number = sum(replicas.values())
    assert samples >= number > 0, f"{samples} samples for {number} replicas"
    even = max(1, samples // number)
    speed = {kind: even / max(seconds(kind, even), SOONEST_S) for kind in replicas}
    whole = max(sum(speed[kind] * count for kind, count in replicas.items()), SOONEST_S)
    shares = {kind: [max(1, int(samples * speed[kind] / whole))] * count for kind, count in replicas.items()}
    missing = samples - sum(itertools.chain(*shares.values()))
    for _ in range(abs(missing)):
        (_give if missing > 0 else _take)(shares, seconds)
    for _ in range(samples):
        slowest = max(shares, key=lambda kind: seconds(kind, shares[kind][0]))
        soonest = min(shares, key=lambda kind: seconds(kind, shares[kind][-1] + 1))
        if (
            shares[slowest][0] == 1
            or seconds(soonest, shares[soonest][-1] + 1) >= seconds(slowest, shares[slowest][0])
        ):  # fmt: skip
            break
        _take(shares, seconds)
        _give(shares, seconds)
    return shares


def _give(shares: dict[str, list[int]], seconds: Seconds) -> None:
    """One sample more, where it is done soonest."""
    soonest = min(shares, key=lambda kind: seconds(kind, shares[kind][-1] + 1))
    shares[soonest][-1] += 1
    shares[soonest].sort(reverse=True)


def _take(shares: dict[str, list[int]], seconds: Seconds) -> None:
    """One sample less, on the slowest replica that has more than one."""
    slowest = max((kind for kind in shares if shares[kind][0] > 1), key=lambda kind: seconds(kind, shares[kind][0]))
    shares[slowest][0] -= 1
    shares[slowest].sort(reverse=True)
