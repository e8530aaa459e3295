"""plan.json and plan.png of a run: where its ranks are to be, and what each role's present layout should take."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from titan.cluster.planning import Planned, plan_picture
from titan.config.settings import TEACHER
from titan.observe.events import EventLog
from titan.observe.files import write_whole
from titan.observe.planned import PICTURE_FILE, PLAN_FILE
from titan.plan.cost import Prediction
from titan.plan.inventory import Inventory, plan_json
from titan.plan.layout import Layout


class PlanRecord:
    """Of one run; its driver is the only writer."""

    def __init__(self, planned: Planned, run_folder: Path, events: EventLog):
        self._planned, self._folder, self._events = planned, run_folder, events
        self._plan: dict[str, Any] = {}

    def begin(self, layouts: Mapping[str, Layout], inventory: Inventory) -> None:
        """Write down what was planned, before ranks start."""
        found = self._planned.predictions
        self._plan = plan_json(layouts, inventory)
        self._plan["predictions"] = {role: prediction.to_json() for role, prediction in found.items()}
        self._write()
        if TEACHER in found:
            write_whole(self._folder / PICTURE_FILE, plan_picture(TEACHER, found[TEACHER]))
        self._events.emit("plan", ranks=self._plan["num_ranks"], slots=inventory.slots, nodes=len(inventory.nodes))
        for role, prediction in found.items():
            self._tell(role, prediction)
        for role, why in self._planned.unknown.items():
            self._events.emit("not_predicted", role=role, why=why)

    def prediction(self, role: str, layout: Layout) -> Prediction | None:
        """What a layout of a role should take; None where that, or what its own takes, is not known."""
        known = self._planned.predictions.get(role)
        return known if known is None or known.layout == layout else self._planned.predict(role, layout)

    def goes_on(self, role: str, layout: Layout) -> None:
        """Write down what is expected of a role that starts again, if that is something else than before."""
        found, known = self.prediction(role, layout), self._plan["predictions"]
        now = found.to_json() if found is not None else None
        if now == known.get(role):
            return
        if found is None:
            del known[role]
        else:
            known[role] = now
            self._tell(role, found)
        self._write()

    def _tell(self, role: str, prediction: Prediction) -> None:
        step_s = round(prediction.step_s, 4)
        self._events.emit("predicted", role=role, step_s=step_s, devices=list(prediction.kinds))

    def _write(self) -> None:
        write_whole(self._folder / PLAN_FILE, json.dumps(self._plan, indent=1).encode())
