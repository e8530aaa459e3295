"""Reading a file into a section: every mistake at once, each as setting, value, remedy."""

import difflib
import json
import tomllib
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from titan.config.section import Section
from titan.errors import ConfigError

LONGEST_VALUE = 60
"""Characters of a wrong value that a message repeats."""
Some = TypeVar("Some", bound=Section)


def read_values(path: Path, what: str) -> dict[str, Any]:
    """A TOML file, or a JSON file if its name ends so. Raises ConfigError; what: "a simulation", for its message."""
    try:
        text = path.read_text(encoding="utf-8")
        values: Any = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; give the path of {what}") from None
    except (ValueError, RecursionError) as error:
        form = "JSON" if path.suffix == ".json" else "TOML"
        raise ConfigError(f"{path} is no {form}: {error}; correct it there") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds {type(values).__name__}; want sections, as {what} has them")
    return values


def check_values(section: type[Some], values: dict[str, Any], page: str) -> Some:
    """A section of plain values. Raises ConfigError naming every mistake; page: where the settings are listed."""
    try:
        # JSON mode: strict about numbers and strings, but takes a list for a tuple
        return section.model_validate_json(json.dumps(values, default=str))
    except ValidationError as error:
        every = error.errors()
        # a list is too short because one of its entries is wrong
        inside = {problem["loc"][:end] for problem in every for end in range(len(problem["loc"]))}
        causes = [problem for problem in every if problem["type"] != "too_short" or problem["loc"] not in inside]
        raise ConfigError("\n".join(_describe(problem, section, page) for problem in causes)) from None


def _describe(problem: Any, section: type[Section], page: str) -> str:
    """One pydantic error as setting, value and remedy."""
    name, given = ".".join(str(part) for part in problem["loc"]), repr(problem["input"])
    if len(given) > LONGEST_VALUE:
        given = f"{given[:LONGEST_VALUE]}..."
    if problem["type"] == "extra_forbidden":
        close = difflib.get_close_matches(str(problem["loc"][-1]), _names(section), n=1)
        return f"{name} is no setting{f'; did you mean {close[0]}?' if close else ''}; {page} lists them all"
    if problem["type"] == "missing":
        return f"{name} is missing and has no default; add it, {page} says what it is"
    if problem["type"] in ("too_short", "string_too_short"):
        return f"{name} is {given}; want at least {problem['ctx']['min_length']}"
    return f"{name} is {given}; want {problem['msg'].removeprefix('Input should be ')}"


def _names(section: type[Section]) -> list[str]:
    """Every setting's last name."""
    found = list(section.model_fields)
    for field in section.model_fields.values():
        for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(kind, type) and issubclass(kind, Section):
                found += _names(kind)
    return found
