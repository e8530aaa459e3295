"""Layouts for a role on unlike devices some of which are lost: planned while all is well, looked up at the loss."""

import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

from titan.cluster.planning import Planned, keeping
from titan.config.check_layout import layout_mistakes
from titan.config.model import LayoutSettings
from titan.config.planning import SearchSettings
from titan.errors import ConfigError
from titan.observe.events import EventLog
from titan.plan.fleet import Fleet
from titan.plan.search.node_loss import plans_after_node_loss
from titan.plan.search.role import plan_role

Devices = tuple[tuple[str, int], ...]
"""How many there are of each kind."""


class Fallbacks:
    """The fastest layout of a role on what is left of its devices. Answers are kept."""

    def __init__(self, planned: Planned):
        self.config = planned.config
        self.costs = {role: costs for role, costs in planned.costs.items() if not costs.frozen}
        """On the devices that no other role has claimed by name, all of them well."""
        self._known: dict[tuple[str, Devices], LayoutSettings | None] = {}

    def prepare(self, roles: Sequence[str], events: EventLog) -> None:
        """Plan aside for the loss of a node of each kind: seconds with hundreds of devices, much less with few."""
        if roles:
            threading.Thread(target=self._prepare, args=(roles, events), name="fallbacks", daemon=True).start()

    def layout(self, role: str, devices: Mapping[str, int]) -> LayoutSettings | None:
        """On so many devices of these kinds and all of any other; None if the model fits nowhere."""
        costs = self.costs[role]
        lost = {name: kind.devices - devices.get(name, kind.devices) for name, kind in costs.fleet.kinds.items()}
        left = costs.fleet.without({name: max(0, number) for name, number in lost.items()})
        key = role, _devices_of(left)
        if key not in self._known:
            found = None
            with suppress(ConfigError):
                found = plan_role(replace(costs, fleet=left), self._search(role)).settings
            self._remember(key, found)
        return self._known[key]

    def _prepare(self, roles: Sequence[str], events: EventLog) -> None:
        for role in roles:
            costs, begin = self.costs[role], time.monotonic()
            step_s: dict[str, float | None] = {}
            with suppress(ConfigError):
                for kind, after in plans_after_node_loss(plan_role(costs, self._search(role))).items():
                    left = costs.fleet.without({kind: costs.fleet.kinds[kind].largest_node})
                    self._remember((role, _devices_of(left)), after.settings if after is not None else None)
                    step_s[kind] = round(after.step_s, 4) if after is not None else None
            seconds = round(time.monotonic() - begin, 2)
            with suppress(ValueError):  # the run has ended in the meantime, and closed its log
                events.emit("planned_for_loss", role=role, step_s_without_a_node=step_s, seconds=seconds)

    def _remember(self, key: tuple[str, Devices], found: LayoutSettings | None) -> None:
        role = key[0]
        if found is not None:
            found = keeping(self.config, role, found)
            if any(layout_mistakes("", replace(self.config.roles[role], layout=found), self.config.data)):
                found = None
        self._known[key] = found

    def _search(self, role: str) -> SearchSettings:
        layout = self.config.roles[role].layout
        return SearchSettings(recompute=layout.recompute, mixed=layout.mixed)


def _devices_of(fleet: Fleet) -> Devices:
    return tuple((name, kind.devices) for name, kind in fleet.kinds.items())
