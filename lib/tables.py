"""Tables for people to read on a terminal."""


def columns(rows: list[list[str]]) -> str:
    """Cells as lines: the first column is aligned on the left, the others on the right."""
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
