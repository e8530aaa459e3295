"""From run.toml and --set to a RunConfig; every mistake is reported, all at once, before anything starts."""

import difflib
import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import ValidationError

from titan.config.check import find_mistakes
from titan.config.check_layout import CHOSEN
from titan.config.pretrained import with_pretrained
from titan.config.settings import RunConfig
from titan.errors import ConfigError

LONGEST_VALUE = 60
"""Characters of a wrong value that a message repeats."""
WANTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "text, in quotes",
    "bool_type": "true or false",
    "tuple_type": "a list, in brackets",
}
"""What pydantic says in words of Python."""


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
    except (ValueError, RecursionError) as error:  # a number of 5000 digits, a list 1000 deep
        raise ConfigError(f"{path} is no TOML: {error}; correct it there") from None
    mistakes = [mistake for override in overrides if (mistake := _apply(values, override))]
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return check_config(values)


def check_config(values: dict[str, Any]) -> RunConfig:
    """A RunConfig of plain values. Raises ConfigError naming every mistake."""
    try:
        # JSON mode: strict about numbers and strings, but takes a list for a tuple
        config = RunConfig.model_validate_json(json.dumps(values, default=str))
    except ValidationError as error:
        raise ConfigError("\n".join(_describe(problem, values) for problem in _causes(error))) from None
    config = with_pretrained(config)
    mistakes = find_mistakes(config)
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return config


def dump_config(config: RunConfig) -> str:
    """TOML that loads to the same config, defaults included."""
    return tomli_w.dumps(_without_none(config.model_dump(mode="json")))


def _apply(values: dict[str, Any], override: str) -> str:
    """Set one dotted name; returns what is wrong with the override, "" if nothing is.

    A student is named by its index or its `name`.
    """
    dotted, equals, text = override.partition("=")
    *path, last = dotted.split(".")
    if not equals or not all((*path, last)):
        return f"--set {override}: want a.b=value, for example --set run.steps=100"
    place: Any = values
    for key in path:
        if isinstance(place, list):
            students = {str(item.get("name", index)): item for index, item in enumerate(place)}
            if key.isdigit() and int(key) < len(place):
                place = place[int(key)]
            elif key in students:
                place = students[key]
            else:
                return f"--set {override}: there is no {key!r}; there are {', '.join(students) or 'none'}"
        else:
            place = place.setdefault(key, {})
        if not isinstance(place, dict) and not _is_list_of_sections(place):
            return f"--set {override}: {key!r} is a value, not a section; leave out what comes after it"
    if not isinstance(place, dict):
        return f"--set {override}: say which one, by name, and which of its settings: --set students.NAME.SETTING=VALUE"
    place[last] = _parse_value(text)
    if (
        last == "planned" and place[last] is True
    ):  # what a file says of stages, a run's own config.toml among them, goes
        for name in CHOSEN:
            place.pop(name, None)
    return ""


def _is_list_of_sections(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _parse_value(text: str) -> Any:
    """A TOML value; what is none is a string, so that quotes may be left out."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text


def _causes(error: ValidationError) -> list[Any]:
    """The errors, without those that only follow from another: a list is too short because its one entry is wrong."""
    every = error.errors()
    inside = {problem["loc"][:end] for problem in every for end in range(len(problem["loc"]))}
    return [problem for problem in every if problem["type"] != "too_short" or problem["loc"] not in inside]


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
    kind, given = problem["type"], _short(problem["input"])
    if kind == "json_invalid":
        return f"a setting has characters that are no Unicode text ({problem['msg']}); correct it"
    if kind == "extra_forbidden":
        return f"{name} is no setting{_nearest(problem['loc'])}; docs/config.md lists them all"
    if kind == "missing":
        return f"{name} is missing and has no default; add it, docs/config.md says what it is"
    if kind in ("model_type", "dataclass_type"):
        return f"{name} is {given}; want a section: [{name}], or {name} = {{ ... }}"
    if kind == "tuple_type" and name == "students":
        return f"{name} is {given}; begin each student with a line [[students]]"
    if kind == "string_pattern_mismatch" and name == "teacher.source":
        return (
            f"{name} is {given}; use 'train', 'log:' and the path of a run, or 'hf:' and that of a Hugging Face folder"
        )
    if kind == "string_pattern_mismatch":
        return f"{name} is {given}; use letters, digits, '_', '.' and '-', beginning with a letter or digit"
    if kind == "too_short":
        return f"{name} is {given}; want at least {problem['ctx']['min_length']}"
    return f"{name} is {given}; want {WANTED.get(kind, problem['msg'].removeprefix('Input should be '))}"


def _short(given: object) -> str:
    """A value as one would write it, cut where it is long."""
    text = repr(given)
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..."


def _nearest(place: Sequence[str | int]) -> str:
    """A hint for a misspelt name: a setting of the same section, or else of any."""
    section: Any = RunConfig
    for key in place[:-1]:
        section = section if isinstance(key, int) else _section_of(section.model_fields[key].annotation)
    for names in ({name: name for name in section.model_fields}, _all_names(RunConfig)):
        close = difflib.get_close_matches(str(place[-1]), sorted(names), n=1)
        if close:
            return f"; did you mean {names[close[0]]}?"
    return ""


def _section_of(annotation: Any) -> Any:
    """The section that a field holds, or holds a list of; None if it holds none."""
    kinds = (annotation, *getattr(annotation, "__args__", ()))
    return next((kind for kind in kinds if hasattr(kind, "model_fields")), None)


def _all_names(section: Any, prefix: str = "") -> dict[str, str]:
    """Every setting's last name, with one dotted name that ends in it: the first, and the shortest."""
    names = {name: prefix + name for name in section.model_fields}
    for name, field in section.model_fields.items():
        inner = _section_of(field.annotation)
        if inner is not None:
            names = _all_names(inner, f"{prefix}{name}.") | names
    return names


def _without_none(value: Any) -> Any:
    """TOML has no null: what is None is left out."""
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_none(item) for item in value]
    return value
