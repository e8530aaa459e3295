"""Numbers as people read them."""

import math


def duration(seconds: float) -> str:
    """`4.2 s`, `3m05s`, `2h07m`, `5d03h`."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 9.95:
        return f"{max(seconds, 0.0):.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def count(number: float) -> str:
    """Three digits and a unit: `950`, `41.2k`, `1.38M`, `2.07B`."""
    if not math.isfinite(number):
        return "?"
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= 0.9995 * size:
            scaled = number / size
            return f"{scaled:.{max(0, 2 - int(math.log10(max(abs(scaled), 1.0))))}f}{unit}"
    return f"{number:.0f}" if abs(number) >= 10 or number == int(number) else f"{number:.1f}"


def percent(share: float) -> str:
    """`14 %`; `<1 %` for what would round to nothing."""
    return "<1 %" if 0 < share < 0.005 else f"{100 * share:.0f} %"


def plural(number: int, noun: str) -> str:
    """`1 step`, `2 steps`, `12,000 steps`."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
