"""Writes JSON Schemas of the planner's files to docs/, from the models of titan.config.planning."""

import json
from pathlib import Path

from titan.config.planning import InventorySettings, PlanSettings, ProfileSettings
from titan.config.section import Section

DOCS = Path(__file__).parents[2] / "docs"
SCHEMAS: dict[str, type[Section]] = {
    "inventory.schema.json": InventorySettings,
    "profile.schema.json": ProfileSettings,
    "plan.schema.json": PlanSettings,
}


def schema(section: type[Section]) -> str:
    """The schema of one file, as text."""
    return json.dumps(section.model_json_schema(mode="validation"), indent=1) + "\n"


if __name__ == "__main__":
    for name, section in SCHEMAS.items():
        (DOCS / name).write_text(schema(section), encoding="utf-8")
