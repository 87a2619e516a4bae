"""Pieces of an HTML page: text, figures, tables and small pictures of intervals.

What comes from a file is a value here, never HTML: each function escapes it. Only cells are HTML
already; these functions make them.
"""
import html
import math
from typing import NamedTuple

WIDTH = 160  # of the picture of an interval, in pixels
EDGE = 6  # pixels to the left and right of its scale
UNITS = " kMBT"  # of 1, 10^3, 10^6, 10^9 and 10^12


class Interval(NamedTuple):
    """A figure with half the width of its interval, and what to compare it to."""

    middle: float | None
    half: float | None
    marks: dict[str, float]  # values by names, which the page's style knows


def text(value) -> str:
    """Anything as text."""
    return html.escape(str(value))


def span(kind: str, value) -> str:
    """Text of a kind that the page's style knows."""
    return f'<span class="{text(kind)}">{text(value)}</span>'


def number(value) -> float | None:
    """The value if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if not math.isfinite(value):
        return None
    return value


def figure(value, form: str = ".3f", half=None) -> str:
    """A figure, with half the width of its interval if that is known; a dash if there is none."""
    if number(value) is None:
        return span("half", "–")
    if number(half) is None:
        return format(value, form)
    width = format(half, form.strip("+"))
    return f"{format(value, form)} {span('half', f'± {width}')}"


def count(value) -> str:
    """A number of things, to three digits: 1.71M."""
    if number(value) is None or value < 1_000:
        return figure(value, ".0f")
    power = min(4, int(math.log10(value) // 3))
    return f"{value / 1e3 ** power:.3g}{UNITS[power]}"


def head(name, unit="") -> str:
    """The head of a column: its name, and in a second line its unit."""
    if not unit:
        return text(name)
    return f"{text(name)}<small>{text(unit)}</small>"


def table(rows: list[list[str]], kind: str) -> str:
    """A table of cells, the first row being its heads; the first row and column stay in sight."""
    heads = "".join(f"<th scope=col>{cell}</th>" for cell in rows[0])
    body = []
    for first, *others in rows[1:]:
        cells = "".join(f"<td>{cell}</td>" for cell in others)
        body.append(f"<tr><th scope=row>{first}</th>{cells}</tr>")
    return (
        f'<div class="scroll {kind}" tabindex=0><table><thead><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def pictures(intervals: list[Interval]) -> list[str]:
    """A picture of each interval with its own marks, all on one scale; "" where there is none."""
    shown = [interval for interval in intervals if interval.middle is not None]
    ends = [end for interval in shown for end in ends_of(interval)]
    ends += [mark for interval in shown for mark in interval.marks.values()]
    low = min(ends, default=0.0)
    high = max(ends, default=0.0)
    return [picture(interval, low, high) for interval in intervals]


def ends_of(interval: Interval) -> tuple[float, float]:
    """The ends of an interval; its middle twice where its width is not known."""
    half = interval.half or 0.0
    return interval.middle - half, interval.middle + half


def picture(interval: Interval, low: float, high: float) -> str:
    """A picture of an interval with its marks, on a scale from `low` to `high`."""
    if interval.middle is None:
        return ""

    def place(value: float) -> str:
        share = (value - low) / ((high - low) or 1.0)
        return f"{EDGE + (WIDTH - 2 * EDGE) * share:.1f}"

    lines = []
    for name, value in interval.marks.items():
        x = place(value)
        title = f"<title>{text(name)} {value:.3f}</title>"
        lines.append(f'<line class="mark {text(name)}" x1={x} x2={x} y1=2 y2=20>{title}</line>')
    left, right = ends_of(interval)
    label = f"{interval.middle:.3f} ± {interval.half or 0:.3f}"
    return (
        f'<svg class=interval width={WIDTH} height=22 role=img aria-label="{label}">'
        f"{''.join(lines)}<line x1={place(left)} x2={place(right)} y1=11 y2=11></line>"
        f"<circle cx={place(interval.middle)} cy=11 r=3.5></circle></svg>"
    )
