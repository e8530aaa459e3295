"""From run.toml and --set to a RunConfig; every mistake is reported, all at once, before anything starts."""

import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import ValidationError

from titan.config.check import find_mistakes
from titan.config.settings import RunConfig
from titan.errors import ConfigError


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run.toml, apply `a.b=value` overrides, check everything.

    Raises ConfigError with one line a mistake: setting, value, remedy.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; give the path of a run.toml") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is no UTF-8 text; give the path of a run.toml") from None
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is no TOML: {error}") from None
    for override in overrides:
        _apply(values, override)
    return check_config(values)


def check_config(values: dict[str, Any]) -> RunConfig:
    """A RunConfig of plain values. Raises ConfigError naming every mistake."""
    try:
        # JSON mode: strict about numbers and strings, but takes a list for a tuple
        config = RunConfig.model_validate_json(json.dumps(values, default=str))
    except ValidationError as error:
        raise ConfigError("\n".join(_describe(problem, values) for problem in error.errors())) from None
    mistakes = find_mistakes(config)
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return config


def dump_config(config: RunConfig) -> str:
    """TOML that loads to the same config, defaults included."""
    return tomli_w.dumps(_without_none(config.model_dump(mode="json")))


def _apply(values: dict[str, Any], override: str) -> None:
    """Set one dotted name. A student is named by its index or its `name`."""
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise ConfigError(f"--set {override}: want a.b=value, for example --set run.steps=100")
    *path, last = dotted.split(".")
    place: Any = values
    for key in path:
        place = _step_into(place, key, override)
    if not isinstance(place, dict):
        raise ConfigError(f"--set {override}: {'.'.join(path)} is not a section")
    place[last] = _parse_value(text)


def _step_into(place: Any, key: str, override: str) -> Any:
    if isinstance(place, list):
        if key.isdigit() and int(key) < len(place):
            return place[int(key)]
        named = [item for item in place if isinstance(item, dict) and item.get("name") == key]
        if named:
            return named[0]
        known = ", ".join(str(item.get("name", index)) for index, item in enumerate(place) if isinstance(item, dict))
        raise ConfigError(f"--set {override}: no student {key!r}; there are {known}")
    if not isinstance(place, dict):
        raise ConfigError(f"--set {override}: {key!r} is inside a value, not a section")
    return place.setdefault(key, {})


def _parse_value(text: str) -> Any:
    """A TOML value; what is none is a string, so that quotes may be left out."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _describe(problem: Any, values: dict[str, Any]) -> str:
    """One pydantic error as setting, value and remedy."""
    path = [str(part) for part in problem["loc"]]
    place: Any = values
    for position, part in enumerate(problem["loc"]):
        if isinstance(place, list) and isinstance(part, int) and part < len(place):
            place = place[part]
            if isinstance(place, dict) and "name" in place:
                path[position] = str(place["name"])
        elif isinstance(place, dict):
            place = place.get(str(part))
    name = ".".join(path)
    kind, given = problem["type"], problem["input"]
    if kind == "extra_forbidden":
        return f"{name} is no setting{_nearest(path)}; docs/config.md lists them all"
    if kind == "missing":
        return f"{name} is missing; it has no default"
    if kind == "string_pattern_mismatch":
        return f"{name} is {given!r}; use letters, digits, '_', '.' and '-', beginning with a letter or digit"
    message = problem["msg"].replace("Input should be", "want").replace("Input", "it")
    return f"{name} is {given!r}; {message}"


def _nearest(path: list[str]) -> str:
    """A hint for a misspelt name."""
    import difflib

    names = _all_names(RunConfig)
    close = difflib.get_close_matches(path[-1], names, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _all_names(model: Any) -> set[str]:
    names: set[str] = set()
    for name, field in model.model_fields.items():
        names.add(name)
        for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if hasattr(kind, "model_fields"):
                names |= _all_names(kind)
    return names


def _without_none(value: Any) -> Any:
    """TOML has no null: what is None is left out."""
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_none(item) for item in value]
    return value
