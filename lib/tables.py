"""Text, figures and tables for people to read on a terminal."""
import math
import re

HALF_95 = 1.96  # standard errors in half a 95 % interval
UNITS = {"bpb": "bits per byte", "loss": "nats per token"}  # of eval/SOURCE/FIGURE
# What moves a cursor, changes a terminal, or turns the reading direction; not line ends and tabs.
CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str) -> str:
    """A text that may be anybody's, with escapes as Python writes them for what is no character."""
    return CONTROL.sub(escaped, text)


def escaped(found: re.Match) -> str:
    """What stands for a control character."""
    number = ord(found[0])
    return f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}"


def in_words(found: dict[str, float]) -> str:
    """Metrics with their units and, where a standard error is known, half a 95 % interval."""
    said = []
    for name, value in found.items():
        if name.endswith(("_se", "_low", "_high")):
            continue
        text = f"{value:.4f}"
        error = found.get(f"{name}_se", math.nan)
        if math.isfinite(error):
            text += f" ± {HALF_95 * error:.4f}"
        source, _, figure = name.removeprefix("eval/").rpartition("/")
        if name.startswith("eval/") and figure in UNITS:
            said.append(f"{source} {text} {UNITS[figure]}")
        else:
            said.append(f"{name.removeprefix('eval/')} {text}")
    return ", ".join(said)


def columns(rows: list[list[str]]) -> str:
    """Cells as lines: the first column is aligned on the left, the others on the right."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = {}
    for row in rows:
        for place, cell in enumerate(row):
            known = widths.get(place, 0)
            widths[place] = max(known, len(cell))
    lines = []
    for row in rows:
        line = ""
        for place, cell in enumerate(row):
            width = widths[place]
            if place:
                line += "  " + cell.rjust(width)
            else:
                line += cell.ljust(width)
        lines.append(line.rstrip())
    return "\n".join(lines)
