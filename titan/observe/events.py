"""The event log of a run: every decision with its numbers, one JSON line each in events.jsonl."""

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from titan.observe.files import Record, append_line, open_lines, read_lines, to_json

FILE = "events.jsonl"
LONGEST_TEXT = 300
"""Characters of one value in a readable line; the file has all of them."""


class EventLog:
    """Appends events; each is with the system when `emit` returns. Threads and processes may share the file."""

    def __init__(self, folder: Path, echo: Callable[[str], None] | None = None) -> None:
        """`echo` is given each event as one readable line, for a terminal."""
        folder.mkdir(parents=True, exist_ok=True)
        self._file = open_lines(folder / FILE)
        self._echo = echo

    def emit(self, event: str, /, **fields: object) -> None:
        """Write `{"time": ..., "event": event, ...fields}`. Values are what JSON knows; others are written as text."""
        assert not {"time", "event"} & fields.keys(), f"event {event} may not set time or event: {fields}"
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        append_line(self._file, {"time": time, "event": event, **fields})
        if self._echo is not None:
            self._echo(event_text(event, fields))

    def close(self) -> None:
        """Close the file; closing twice does nothing."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def read_events(folder: Path) -> list[Record]:
    """All events of a run, oldest first; [] if there are none. A torn last line is left out."""
    return [record for record in read_lines(folder / FILE) if isinstance(record.get("event"), str)]


def event_time_s(event: Record) -> float:
    """Unix time of an event; 0 if it has none that can be read."""
    try:
        return datetime.fromisoformat(str(event.get("time"))).timestamp()
    except ValueError:
        return 0.0


def event_text(event: str, fields: Mapping[str, object]) -> str:
    """An event as one line: `student started: role small, step 41, reason lead 0.31 reached 0.3`."""
    said = ", ".join(f"{name} {_value_text(value)}" for name, value in fields.items() if value is not None)
    return event.replace("_", " ") + (f": {said}" if said else "")


def _value_text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, str):
        text = " ".join(value.split())
        return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]}…"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} {_value_text(item)}" for key, item in value.items()) + "}"
    return to_json(value)
