"""The pictures of a report, as HTML and inline SVG that keep their type size at any width.

Every drawing is laid out in percent of the space it gets: bars, whiskers and dots by percent coordinates, curves by an
inner SVG that stretches while its strokes do not. So one file reads well on a phone, on a desk and on paper. Colours
are CSS variables, chosen in page.css for light and dark.
"""

import html
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

RAW_POINTS = 400


def esc(value: object) -> str:
    """`value` as text that is safe in HTML content and in quoted attributes."""
    return html.escape(str(value), quote=True)


def named(name: str, colour: str) -> str:
    """A name with its dot; a long one may break after an underscore, a hyphen or a dot."""
    return f"{dot(colour)}<span>{breakable(name)}</span>"


def breakable(name: str) -> str:
    """A name as HTML that may break where its parts join."""
    return esc(re.sub(r"([_\-./])(?=.)", "\\1\u200b", name)).replace("\u200b", "<wbr>")


def duration(seconds: float) -> str:
    """45 ms, 1.23 s, 12.3 s, 4 min 05 s, 3 h 20 min."""
    if seconds < 59.95:
        return (
            f"{seconds:.1f} s"
            if seconds >= 9.995
            else f"{seconds:.2f} s"
            if seconds >= 0.1
            else f"{1000 * seconds:.0f} ms"
        )
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def count(number: float) -> str:
    """1,234,567 with thin spaces, so that no locale misreads it."""
    return f"{number:,.0f}".replace(",", "\u202f")


def short(number: float) -> str:
    """Any number in about four figures."""
    if number == 0 or (abs(number) < 1e15 and float(number).is_integer()):
        return count(number)
    if abs(number) >= 1000:
        return count(number)
    return f"{number:.3g}" if abs(number) < 0.01 else f"{number:.4g}"


def signed(number: float, places: int = 3) -> str:
    """A number with its sign, a true minus, and no sign at zero as printed."""
    text = f"{abs(number):.{places}f}"
    return text if float(text) == 0 else ("+" if number > 0 else "\u2212") + text


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers 1, 2 or 5 x 10^n apart that lie in [low, high]."""
    if not high > low:
        return [low]
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def dot(colour: str) -> str:
    """A small round mark in a model's colour."""
    return f'<i class="dot" style="--c:var(--{colour})"></i>'


def picture(kind: str, label: str, colour: str, shapes: str) -> str:
    """A drawing one row high; its label is read aloud, and shown under a pointer."""
    said = esc(label)
    style = f'style="--c:var(--{colour})"'
    return f'<svg class="{kind}" {style} role="img" aria-label="{said}"><title>{said}</title>{shapes}</svg>'


def line_up(name: str, drawing: str, value: str, kind: str = "") -> str:
    """Name, drawing and value of one row; all three are HTML."""
    return f'<div class="row{kind}"><span class="name">{name}</span>{drawing}<span class="value">{value}</span></div>'


def remark(value: str, note: str) -> str:
    """A printed value with a small note after it, as HTML."""
    return f"{esc(value)} <small>{esc(note)}</small>" if note else esc(value)


def rule(kind: str, x1: float, x2: float, y1: float = 50, y2: float = 50) -> str:
    """A straight line, in percent of the drawing."""
    return f'<line class="{kind}" x1="{x1:.3f}%" x2="{x2:.3f}%" y1="{y1:g}%" y2="{y2:g}%"/>'


@dataclass(frozen=True)
class Bar:
    """One row of a bar picture; `low`, `high` are the ends of its whisker in units of `value`."""

    name: str
    value: float
    colour: str
    printed: str
    note: str = ""
    stderr: float | None = None
    strong: bool = False


def bars(rows: Sequence[Bar], limit: float) -> str:
    """Horizontal bars from zero to `limit`, the value printed at the end of each."""
    drawn = []
    for row in rows:
        scale = 100 / limit if limit > 0 else 0
        shape = f'<rect width="{max(row.value, 0) * scale:.3f}%" height="100%" rx="2"/>'
        if row.stderr:
            low, high = max(0.0, row.value - row.stderr) * scale, (row.value + row.stderr) * scale
            shape += (
                rule("whisker", low, high) + rule("whisker", low, low, 28, 72) + rule("whisker", high, high, 28, 72)
            )
        drawing = picture("bar", f"{row.name}: {row.printed} {row.note}".strip(), row.colour, shape)
        strong = " strong" if row.strong else ""
        drawn.append(line_up(named(row.name, row.colour), drawing, remark(row.printed, row.note), strong))
    return f'<div class="bars">{"".join(drawn)}</div>'


@dataclass(frozen=True)
class Span:
    """One row of a picture around a zero line: a dot with an interval."""

    name: str
    group: str
    value: float
    stderr: float | None
    colour: str
    printed: str
    faint: bool = False


def spans(rows: Sequence[Span], left: str, zero: str, right: str) -> str:
    """Dots with error bars on both sides of a zero line in the middle."""
    reach = 1.15 * max([abs(row.value) + (row.stderr or 0) for row in rows] + [1e-3])
    drawn, group = [], None
    for row in rows:
        if row.group != group:
            drawn.append(f'<div class="group">{esc(row.group)}</div>')
            group = row.group
        middle = 50 + 50 * row.value / reach
        error = 50 * (row.stderr or 0) / reach
        shapes = rule("zero", 50, 50, 0, 100) + rule("stem", 50, middle) + rule("error", middle - error, middle + error)
        shapes += f'<circle cx="{middle:.3f}%" cy="50%" r="5"/>'
        drawing = picture("span", f"{row.name}, {row.group}: {row.printed}", row.colour, shapes)
        drawn.append(line_up(named(row.name, row.colour), drawing, esc(row.printed), " faint" if row.faint else ""))
    axis = (
        f'<div class="row axis"><span></span><span class="ends"><span>\u2190 {esc(left)}</span><span>{esc(zero)}</span>'
    )
    return f'<div class="bars">{"".join(drawn)}{axis}<span>{esc(right)} \u2192</span></span><span></span></div></div>'


def smooth(values: Sequence[float], width: int) -> list[float]:
    """Triangular mean over 2 x width + 1 points: centred, so without lag, but for the end, where it looks back only."""
    out = []
    for middle in range(len(values)):
        back = min(width, middle)
        shifts = range(-back, min(width, len(values) - 1 - middle, back) + 1)
        weights = [width + 1 - abs(shift) for shift in shifts]
        out.append(
            sum(weight * values[middle + shift] for weight, shift in zip(weights, shifts, strict=True)) / sum(weights)
        )
    return out


@dataclass(frozen=True)
class Line:
    """One curve; `points` are (step, value), ordered by step."""

    name: str
    colour: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False
    printed: str = ""  # in the legend, instead of the last value


def curves(title: str, lines: Sequence[Line], unit: str, exact: bool = False) -> str:
    """Curves over training steps: what was logged, faint, under its smoothed course; last values in the legend.

    exact: every point counts, and x is any number from 0 on.
    """
    widths = {line.name: 0 if exact else max(1, len(line.points) // 16) for line in lines}
    smoothed = {line.name: smooth([y for _, y in line.points], widths[line.name]) for line in lines}
    last_step = max(x for line in lines for x, _ in line.points)
    low, high = _range([y for line in lines for _, y in line.points], [y for ys in smoothed.values() for y in ys])

    def place(x: float, y: float) -> str:
        return f"{1000 * x / last_step:.1f},{1000 * (high - y) / (high - low):.1f}"

    drawn = ""
    for line in lines:
        raw = line.points[:: max(1, len(line.points) // RAW_POINTS)]
        style = f'style="--c:var(--{line.colour})"'
        if len(line.points) > 8 and not exact:
            drawn += f'<polyline class="raw" {style} points="{" ".join(place(x, y) for x, y in raw)}"/>'
        course = " ".join(place(x, y) for (x, _), y in zip(line.points, smoothed[line.name], strict=True))
        drawn += f'<polyline class="course{" dashed" if line.dashed else ""}" {style} points="{course}"/>'
    grid = ""
    for y in ticks(low, high):
        at = 100 * (high - y) / (high - low)
        grid += f'<line class="grid" x1="0" x2="100%" y1="{at:.2f}%" y2="{at:.2f}%"/>'
        grid += f'<text x="-8" y="{at:.2f}%" dy=".32em" text-anchor="end">{y:g}</text>'
    for x in ticks(0, last_step):
        at = 100 * x / last_step
        anchor = "end" if at > 97 else "start" if at < 1 else "middle"
        grid += f'<text x="{at:.2f}%" y="100%" dy="1.5em" text-anchor="{anchor}">{short(x)}</text>'
    legend = "".join(
        f"<span>{named(line.name, line.colour)}<b>{line.printed or format(smoothed[line.name][-1], '.3f')}</b></span>"
        for line in lines
    )
    inner = f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" width="100%" height="100%">{drawn}</svg>'
    return (
        f'<figure class="chart"><figcaption>{esc(title)} <small>{esc(unit)}</small></figcaption>'
        f'<div class="legend">{legend}</div>'
        f'<div class="plot"><svg role="img" aria-label="{esc(title)}">{grid}{inner}</svg></div></figure>'
    )


def _range(raw: Sequence[float], course: Sequence[float]) -> tuple[float, float]:
    """An axis that shows every smoothed value and all but the wildest 2 % of the logged ones."""
    ordered = sorted(raw)
    low = min(min(course), ordered[len(ordered) // 100])
    high = max(max(course), ordered[(99 * len(ordered) - 1) // 100])
    level = high - low <= 1e-9 * abs(high)  # means of one number differ in its last bit
    margin = max(abs(high), 1.0) * 0.05 if level else 0.04 * (high - low)
    return low - margin, high + margin


@dataclass(frozen=True)
class Stretch:
    """One step on the timeline, in seconds."""

    name: str
    verb: str
    seconds: float
    colour: str
    note: str = ""


def timeline(rows: Sequence[Stretch]) -> str:
    """The steps end to end, without the pauses between resumed runs."""
    total = sum(row.seconds for row in rows) or 1.0
    drawn, begun = "", 0.0
    for row in rows:
        width = max(100 * row.seconds / total, 0.3)
        shape = f'<rect x="{100 * begun / total:.3f}%" width="{width:.3f}%" height="100%" rx="2"/>'
        drawing = picture("bar", f"{row.name}: {duration(row.seconds)}", row.colour, shape)
        name = f"<span>{breakable(row.name)} <small>{esc(row.verb)}</small></span>"
        drawn += line_up(name, drawing, remark(duration(row.seconds), row.note))
        begun += row.seconds
    return f'<div class="bars times">{drawn}</div>'


@dataclass(frozen=True)
class Move:
    """Accuracy on one paradigm, before and after, in [0, 1]."""

    name: str
    marks: Sequence[tuple[str, float]]  # (colour, accuracy) in drawing order: before first, after last


def moves(rows: Sequence[Move], low: float) -> str:
    """One line per paradigm from `low` to 100 %: a hollow dot before, full dots after, chance as a line at 50 %."""

    def at(accuracy: float) -> float:
        return 100 * (accuracy - low) / (1 - low)

    drawn = ""
    for row in rows:
        before, after = row.marks[0][1], row.marks[-1][1]
        change = 100 * (after - before)
        way = " up" if change > 0.05 else " down" if change < -0.05 else ""
        shape = rule("zero", at(0.5), at(0.5), 0, 100) + rule("stem", at(before), at(after))
        for position, (colour, value) in enumerate(row.marks):
            kind = ' class="hollow"' if position < len(row.marks) - 1 else ""
            shape += f'<circle{kind} style="--c:var(--{colour})" cx="{at(value):.2f}%" cy="50%" r="4"/>'
        label = f"{row.name}: " + ", ".join(f"{100 * value:.1f} %" for _, value in row.marks)
        drawing = picture("span", label, row.marks[-1][0], shape)
        drawn += line_up(
            esc(row.name), drawing, remark(f"{100 * after:.0f}", signed(change, 1) if row.marks[1:] else ""), way
        )
    return f'<div class="bars moves">{drawn}</div>'
