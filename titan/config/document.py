"""Prints docs/config.md: every setting with its type, default and meaning, from the models of titan.config."""

import json
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from titan.config.settings import RunConfig

INTRODUCTION = """\
# Settings of a run

A run is one TOML file: `titan run RUN.toml`. Any setting can be changed on the command line, by its dotted name:
`--set run.steps=100`, `--set teacher.layout.tp=2`; a student by its name: `--set students.small.model.layers=6`.
All mistakes in a file are reported at once, before anything starts.

This page is generated from the models in `titan/config` by `make docs`; a test fails when it is stale.
A setting without a default must be given. Absent means that the setting may be left out and has no value then.
"""

_PLAIN = {int: "whole number", float: "number", str: "text", bool: "`true` or `false`"}
_COMPARISONS = {Ge: ("ge", "at least"), Gt: ("gt", "above"), Le: ("le", "at most"), Lt: ("lt", "below")}

Section = type[BaseModel]


def document() -> str:
    """The whole page."""
    parts = [INTRODUCTION, _contents()]
    for names, section in _sections():
        parts.append(_section_text(names, section))
    return "\n".join(parts)


def _sections() -> list[tuple[list[str], Section]]:
    """Every kind of section once, in the order of the file, with all the places where it stands."""
    places: dict[Section, list[str]] = {}

    def visit(section: Section, prefix: str) -> None:
        for name, field in section.model_fields.items():
            inner, many = _section_of(field.annotation)
            if inner is not None:
                place = f"{prefix}{name}"
                places.setdefault(inner, []).append(f"[[{place}]]" if many else f"[{place}]")
                visit(inner, f"{place}.")

    visit(RunConfig, "")
    return [(names, section) for section, names in places.items()]


def _section_of(annotation: Any) -> tuple[Section | None, bool]:
    """The section that a field holds, if it holds one, and whether it may hold several."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is tuple:
        return _section_of(arguments[0])[0], True
    if origin in (UnionType, Union, Annotated):
        return _section_of(arguments[0])
    return None, False


def _contents() -> str:
    lines = [f"- [{', '.join(f'`{name}`' for name in names)}](#{_anchor(section)})" for names, section in _sections()]
    return "\n".join(lines) + "\n"


def _anchor(section: Section) -> str:
    """A name for links that does not depend on how a site makes anchors of headings."""
    return section.__name__.removesuffix("Settings").lower()


def _section_text(names: list[str], section: Section) -> str:
    lines = [f'<a id="{_anchor(section)}"></a>', "", f"## {', '.join(f'`{name}`' for name in names)}", ""]
    lines += [_one_line(section.__doc__ or ""), "", "| setting | type | default | meaning |", "|---|---|---|---|"]
    for name, field in section.model_fields.items():
        meaning = _one_line(field.description or "").replace("|", "\\|")
        lines.append(f"| `{name}` | {_type_text(field)} | {_default_text(field)} | {meaning} |")
    return "\n".join(lines) + "\n"


def _type_text(field: FieldInfo) -> str:
    inner, _ = _section_of(field.annotation)
    if inner is not None:
        return f"[section](#{_anchor(inner)})"
    return _in_words(field.annotation, list(field.metadata))


def _in_words(annotation: Any, limits: list[Any]) -> str:
    """A type with its limits, in words: `whole number, at least 1`."""
    if hasattr(annotation, "__metadata__"):  # Annotated[...]
        return _in_words(annotation.__origin__, [*_flat(annotation.__metadata__), *limits])
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f'`"{value}"`' for value in arguments)
    if origin in (UnionType, Union):
        return _in_words(next(kind for kind in arguments if kind is not NoneType), limits)
    if origin is tuple:
        kind, *its_limits = _in_words(arguments[0], []).split(", ")
        return ", ".join([f"list of {kind}s", *its_limits, *_limits(limits, whole=True)])
    return ", ".join([_PLAIN[annotation], *_limits(limits, whole=annotation is int)])


def _flat(metadata: tuple[Any, ...]) -> Iterator[Any]:
    """Limits one by one: Field(...) inside Annotated holds several."""
    for item in metadata:
        yield from item.metadata if isinstance(item, FieldInfo) else (item,)


def _limits(limits: list[Any], whole: bool) -> Iterator[str]:
    for limit in limits:
        if whole and isinstance(limit, Gt):
            yield f"at least {int(limit.gt) + 1}"  # type: ignore[call-overload]
            continue
        for kind, (attribute, words) in _COMPARISONS.items():
            if isinstance(limit, kind):
                yield f"{words} {getattr(limit, attribute):g}"
        if isinstance(limit, MinLen):
            yield f"{limit.min_length} or more of them"
        elif isinstance(limit, MaxLen):
            yield f"at most {limit.max_length} characters"
        elif "A-Za-z" in (getattr(limit, "pattern", None) or ""):
            yield "of letters, digits, `_`, `.` and `-`"


def _default_text(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    default = field.get_default()
    if default is None:
        return "absent"
    if isinstance(default, BaseModel):
        return "its defaults"
    if isinstance(default, tuple):
        return f"`{list(default)}`"
    return f"`{default:_}`" if isinstance(default, int) and default >= 100_000 else f"`{json.dumps(default)}`"


def _one_line(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    print(document(), end="")
