"""Charts as SVG. A page holds them without a script, in its own colours, also on a phone."""

import html
import math
from typing import NamedTuple

import numpy as np

from lib.curves import Series, above, limits

WIDTH, HEIGHT = 340, 250  # about those that a phone has, so that text is as large as it says
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 10, 38  # margins
FREE = 3  # pixels between an axis and its label


class Line(NamedTuple):
    """A curve with the name and the colour that the key of its chart shows."""

    name: str
    color: int  # of the page's
    x: np.ndarray  # [n]
    y: np.ndarray  # [n]
    half: np.ndarray | None = None  # [n], half of an interval around each point
    end: tuple[float, float, float | None] | None = None  # a figure at its end: x, y, half


class Frame(NamedTuple):
    """What a chart shows of the plane."""

    right: float
    low: float
    high: float

    def x(self, value: float) -> float:
        """A value's place across, in pixels; the axis begins at 0."""
        room = WIDTH - LEFT - RIGHT
        return LEFT + room * value / self.right

    def y(self, value: float) -> float:
        """A value's place downwards."""
        room = HEIGHT - TOP - BOTTOM
        share = (value - self.low) / (self.high - self.low)
        return TOP + room * (1 - share)


def chart(title: str, across: str, lines: list[Line], zero: bool = False) -> str:
    """A figure for a page: title, key and curves; across: what its horizontal axis has.

    zero: whether 0 is shown, by a line. A curve that begins above the chart says so in the key.
    """
    frame = frame_of(lines, zero)
    title = html.escape(title)
    clip = f"clip {title} {across}".replace(" ", "-")
    inner = []
    if zero:
        y = frame.y(0)
        inner.append(segment("zero", 0, y, WIDTH, y))
    for line in lines:
        inner += drawn(line, frame)
    area = f"x={LEFT} y={TOP} width={WIDTH - LEFT} height={HEIGHT - TOP - BOTTOM}"
    keys = [key(line, frame.high) for line in lines]
    pieces = [
        f"<figure><h3>{title}</h3><p class=keys>",
        *keys,
        f'</p><svg class=still viewBox="0 0 {WIDTH} {HEIGHT}" role=img aria-label="{title}">',
        f'<clipPath id="{clip}"><rect {area} /></clipPath>',
        *axes(frame, across),
        f'<g clip-path="url(#{clip})">',
        *inner,
        "</g></svg></figure>",
    ]
    return "".join(pieces)


def frame_of(lines: list[Line], zero: bool) -> Frame:
    """What of the plane is shown: all but a steep beginning."""
    curves = []
    marks = []
    right = 0.0
    if zero:
        marks.append(0.0)
    for line in lines:
        curves.append(Series(line.x, line.y))
        right = max([right, *line.x])
        if line.half is not None:
            marks += list(line.y - line.half)
            marks += list(line.y + line.half)
        if line.end:
            x, y, half = line.end
            half = half or 0.0
            right = max(right, x)
            marks += [y - half, y + half]
    marks = [mark for mark in marks if math.isfinite(mark)]
    low, high = limits(curves, marks)
    return Frame(right or 1.0, low, high)


def key(line: Line, high: float) -> str:
    """A piece of a line and its name, with what the chart does not show of it."""
    curve = Series(line.x, line.y)
    said = html.escape(line.name + above(curve, high))
    stroke = f'stroke="var(--c{line.color})"'
    sample = f"<svg width=26 height=10><line x1=1 x2=25 y1=5 y2=5 {stroke}></line></svg>"
    return f"<span class=key>{sample}{said}</span> "


def drawn(line: Line, frame: Frame) -> list[str]:
    """The pieces of a curve: its band, itself, its points, its end with an interval."""
    color = f"var(--c{line.color})"
    pieces = []
    if line.half is not None:
        there = points(line.x, line.y + line.half, frame)
        back = points(line.x, line.y - line.half, frame)
        outline = " ".join(there + back[::-1])
        pieces.append(f'<polygon class=band fill="{color}" points="{outline}" />')
    places = points(line.x, line.y, frame)
    path = " ".join(places)
    pieces.append(f'<polyline class=curve stroke="{color}" points="{path}" />')
    for place in places:
        x, y = place.split(",")
        pieces.append(f'<circle fill="{color}" cx={x} cy={y} r=2.2 />')
    if line.end:
        x, y, half = line.end
        x = frame.x(x)
        if half:
            low = frame.y(y - half)
            high = frame.y(y + half)
            pieces.append(segment("curve", x, low, x, high, color))
        y = frame.y(y)
        pieces.append(f'<circle fill="{color}" cx={x:.1f} cy={y:.1f} r=4.5 />')
    return pieces


def points(x: np.ndarray, y: np.ndarray, frame: Frame) -> list[str]:
    """Places of a curve's points, "x,y"; those without a value are left out."""
    found = []
    for across, down in zip(x, y, strict=True):
        if np.isfinite(down):
            found.append(f"{frame.x(across):.1f},{frame.y(down):.1f}")
    return found


def segment(kind: str, x1: float, y1: float, x2: float, y2: float, color: str = "") -> str:
    """A straight line of a kind that the page's style knows."""
    stroke = f'stroke="{color}" ' if color else ""
    ends = f"x1={x1:.1f} y1={y1:.1f} x2={x2:.1f} y2={y2:.1f}"
    return f'<line class="{kind}" {stroke}{ends} />'


def axes(frame: Frame, across: str) -> list[str]:
    """Lines and figures of both axes, and the name of the horizontal one."""
    bottom = HEIGHT - BOTTOM
    end = WIDTH - RIGHT
    pieces = [segment("frame", LEFT, bottom, end, bottom)]
    for value in ticks(frame.low, frame.high):
        y = frame.y(value)
        pieces.append(segment("grid", LEFT, y, end, y))
        pieces.append(label(LEFT - FREE, y + 4, "end", short(value)))
    for value in ticks(0.0, frame.right):
        x = frame.x(value)
        side = "end" if x > end - RIGHT else "middle"
        pieces.append(segment("frame", x, bottom, x, bottom + 4))
        pieces.append(label(x, bottom + 17, side, short(value)))
    pieces.append(label(end, HEIGHT - FREE, "end", across))
    return pieces


def label(x: float, y: float, side: str, words: str) -> str:
    """Words at a place: "start", "middle" or "end" is there."""
    return f"<text x={x:.1f} y={y:.1f} text-anchor={side}>{html.escape(words)}</text>"


def ticks(low: float, high: float, most: int = 4) -> list[float]:
    """Round values between two, about so many."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= 0.999 * rough)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def short(value: float) -> str:
    """A value in few characters: 20k, 1.5e12."""
    size = abs(value)
    if 1e3 <= size < 1e9:
        power = int(math.log10(size) // 3)
        return f"{value / 1e3**power:.4g}{' kM'[power]}"
    return f"{value:.4g}".replace("e+", "e")
