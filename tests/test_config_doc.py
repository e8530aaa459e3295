"""docs/config.md says what the settings are."""

import re
from pathlib import Path

import pytest

from titan.config.document import document
from titan.config.load import dump_config, load_config
from titan.config.section import Section
from titan.config.settings import RunConfig

PAGE = Path(__file__).parents[1] / "docs" / "config.md"

ROOT = Path(__file__).parent.parent


def test_the_page_is_fresh() -> None:
    assert PAGE.read_text(encoding="utf-8") == document(), "docs/config.md is stale; write it again with `make docs`"


def test_every_setting_of_every_section_has_a_line_with_a_meaning() -> None:
    lines = {match[1] for match in re.finditer(r"^\| `(\w+)` \| [^|]+ \| [^|]+ \| \S", document(), re.MULTILINE)}
    homes = {f"titan.config.{name}" for name in ("settings", "model", "distillation")}
    every = [section for section in Section.__subclasses__() if section.__module__ in homes]
    sections = [section for section in every if section is not RunConfig]
    names = {name for section in sections for name in section.model_fields}
    assert names <= lines
    assert document().count("| setting | type |") == len(sections)


def test_nested_sections_stand_once_and_are_referred_to() -> None:
    assert document().count("## `[teacher.model]`, `[students.model]`") == 1
    assert document().count("[section](#model)") == 2


def test_types_are_plain_words() -> None:
    page = document()
    assert "| `steps` | whole number, at least 1 | **required** |" in page
    assert '| `schedule` | `"cosine"`, `"linear"`, `"constant"` | `"cosine"` |' in page
    assert "| `heldout_fraction` | number, above 0, below 0.5 | `0.02` |" in page
    assert "| `kv_heads` | whole number, at least 1 | absent |" in page
    assert "| `layers` | list of whole numbers, at least 1 | absent |" in page
    assert "| `sources` | list of texts, 1 or more of them | **required** |" in page
    assert "pydantic" not in page.lower() and "NoneType" not in page


@pytest.mark.parametrize(
    "change", ["labels.codec=full", "labels.codec=random", "teacher.optimizer.schedule=constant", "run.seed=3"]
)
def test_what_a_run_wrote_down_loads_again(tmp_path: Path, change: str) -> None:
    """config.toml of a run names every setting, so that none of them may be a mistake for having been named."""
    config = load_config(ROOT / "configs" / "quickstart.toml", [change])
    written = tmp_path / "config.toml"
    written.write_text(dump_config(config))
    assert load_config(written, []) == config
