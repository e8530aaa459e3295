"""Before a run starts: planned layouts are searched for, and what can be predicted of every role is."""

from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from titan.config.model import LayoutSettings
from titan.config.planning import SearchSettings, TaskSettings, load_inventory, load_profile
from titan.config.settings import TEACHER, RunConfig, StudentSettings, TeacherSettings
from titan.errors import ConfigError
from titan.observe.gantt import draw_gantt
from titan.plan.cost import Costs, Prediction
from titan.plan.fleet import Fleet, make_fleet
from titan.plan.layout import Layout, make_layout
from titan.plan.profile import Profile
from titan.plan.search.joint import plan_jointly


@dataclass(frozen=True)
class Planned:
    """A run's config with all layouts known."""

    config: RunConfig
    predictions: Mapping[str, Prediction] = field(default_factory=dict)
    """By role, for those of whose devices and blocks the profile knows."""
    unknown: Mapping[str, str] = field(default_factory=dict)
    """Why there is no prediction for a role, where there is an inventory at all."""
    costs: Mapping[str, Costs] = field(default_factory=dict)
    """By role, on the devices that no other role has claimed by name."""
    schedules_s: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    """By role, for those that were planned: step of each schedule, seconds; None where nothing fits."""
    paced: frozenset[str] = frozenset()
    """Kinds of devices that CPU ranks stand in for."""

    def predict(self, role: str, layout: Layout) -> Prediction | None:
        """What another layout of a role takes; None where that is not known."""
        with suppress(ConfigError):
            return self.costs[role].predict(layout) if role in self.costs else None
        return None


def plan_run(config: RunConfig, vocab_size: int) -> Planned:
    """Choose planned layouts and predict all. Raises ConfigError for a wrong file, and a model that fits nowhere."""
    if config.cluster.inventory is None:
        return Planned(config)
    costs = role_costs(config, vocab_size)
    _check_devices(config, next(iter(costs.values())).fleet)
    wanted = {role: costs[role] for role, settings in config.roles.items() if settings.layout.planned}
    schedules_s: dict[str, Mapping[str, float | None]] = {}
    if wanted:
        free = _left_over(next(iter(costs.values())).fleet, config)
        on_free = {role: Costs(cost.task, free, cost.profile) for role, cost in wanted.items()}
        plans = plan_jointly(on_free, _search(config))
        schedules_s = {role: plan.schedules_s for role, plan in plans.items()}
        config = with_layouts(config, {role: keeping(config, role, plan.settings) for role, plan in plans.items()})
    predictions, unknown = {}, {}
    for role, settings in config.roles.items():
        try:
            predictions[role] = costs[role].predict(make_layout(settings.model, settings.layout))
        except ConfigError as error:
            unknown[role] = str(error)
    kinds = next(iter(costs.values())).fleet.kinds.values()
    paced = frozenset(kind.name for kind in kinds if kind.paced)
    on_their_own = {role: _on_its_own(cost, role, config) for role, cost in costs.items()}
    return Planned(config, predictions, unknown, on_their_own, schedules_s, paced)


def plan_picture(name: str, prediction: Prediction) -> bytes:
    """When each stage computes in a step, as a PNG."""
    labels = []
    for index, (stage, kind) in enumerate(zip(prediction.layout.positions, prediction.kinds, strict=True)):
        parts = prediction.layout.stages[index :: len(prediction.kinds)]
        layers = ", ".join(f"{part.first_layer}-{part.end_layer - 1}" for part in parts)
        ranks = f" x{len(stage.ranks)}" if len(stage.ranks) > 1 else ""
        labels.append(f"stage {index} · {kind}{ranks} · layers {layers}")
    line = prediction.timeline
    return draw_gantt(f"{name}: a step of {prediction.step_s:.3g} s, as planned", labels, line.spans, line.tail_s)


def role_costs(config: RunConfig, vocab_size: int) -> dict[str, Costs]:
    """What every role costs on the run's inventory. Raises ConfigError for a file that is wrong."""
    cluster = config.cluster
    assert cluster.inventory is not None
    if cluster.profile is None:
        raise ConfigError(f"cluster.inventory is {cluster.inventory!r}, but cluster.profile is absent; give both")
    profile = load_profile(Path(cluster.profile))
    fleet = make_fleet(load_inventory(Path(cluster.inventory)), profile.links)
    costs = {}
    for role, settings in config.roles.items():
        task = TaskSettings(
            model=settings.model,
            vocab_size=vocab_size,
            sequence_length=config.data.sequence_length,
            batch_size=settings.batch_size,
            precision=settings.precision,
        )
        costs[role] = Costs(task, fleet, Profile(task, profile), settings.frozen)
    return costs


def _check_devices(config: RunConfig, fleet: Fleet) -> None:
    """Raise ConfigError for a kind of device that the inventory has not, or not enough of."""
    mistakes = []
    used = dict.fromkeys(fleet.kinds, 0)
    for role, settings in config.roles.items():
        for index, stage in enumerate(settings.layout.stages or ()):
            where = f"{role}.layout.stages.{index}.device"
            for kind, replicas in Counter(stage.kinds).items():
                if kind is not None and kind not in fleet.kinds:
                    mistakes.append(f"{where} is {kind!r}; the inventory has {', '.join(fleet.kinds)}")
                elif kind is not None:
                    used[kind] += stage.tp * replicas
    for kind, count in used.items():
        if count > fleet.kinds[kind].devices:
            have = fleet.kinds[kind].devices
            mistakes.append(f"layouts claim {count} devices of kind {kind!r}, the inventory has {have}; use fewer")
    if mistakes:
        raise ConfigError("\n".join(mistakes))


def _search(config: RunConfig) -> SearchSettings:
    return SearchSettings(recompute=config.teacher.layout.recompute, mixed=config.teacher.layout.mixed)


def _on_its_own(costs: Costs, role: str, config: RunConfig) -> Costs:
    """A role's costs on what other roles leave to it."""
    return replace(costs, fleet=_left_over(costs.fleet, config, but=role))


def _left_over(fleet: Fleet, config: RunConfig, but: str | None = None) -> Fleet:
    """The devices that no role, or none but one, has claimed by name."""
    used = dict.fromkeys(fleet.kinds, 0)
    for role, settings in config.roles.items():
        for stage in (() if role == but else settings.layout.stages) or ():
            for kind in stage.kinds:
                if kind in used:
                    used[kind] += stage.tp
    return fleet.without(used)


def keeping(config: RunConfig, role: str, planned: LayoutSettings) -> LayoutSettings:
    """A planned layout with what a plan does not choose."""
    own = config.roles[role].layout
    return planned.model_copy(
        update={key: getattr(own, key) for key in ("transport", "recompute", "sequence_parallel", "mixed")}
    )


def with_layouts(config: RunConfig, layouts: Mapping[str, LayoutSettings]) -> RunConfig:
    """The config with other layouts for some roles."""

    def changed(role: str, settings: TeacherSettings | StudentSettings) -> dict[str, LayoutSettings]:
        return {"layout": layouts.get(role, settings.layout)}

    return config.model_copy(
        update={
            "teacher": config.teacher.model_copy(update=changed(TEACHER, config.teacher)),
            "students": tuple(s.model_copy(update=changed(s.name, s)) for s in config.students),
        }
    )
