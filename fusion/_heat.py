"""Heat maps of a report: kinds of tensors down, layers across, one drawing a row that stretches with the page."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from fusion._merge_report import average
from fusion._pictures import breakable, esc, line_up, ticks


@dataclass(frozen=True)
class Heat:
    """A map: values by row and column, None where there is no such tensor; a row of one value is one wide cell.

    Colours run from nothing at 0 to full at `limit`, values below zero in another hue.
    """

    title: str
    unit: str
    rows: Mapping[str, Sequence[float | None]]
    limit: float
    printed: Callable[[float], str]


# kind, layer (None: outside the layers), value, how much it counts in the mean where several share a place
Entry = tuple[str, int | None, float | None, int]


def by_layer(entries: Iterable[Entry]) -> dict[str, list[float | None]]:
    """Rows of a map: kind -> values by layer, in the order given; last the kinds outside the layers, of one value."""
    sums: dict[str, dict[int | None, list[tuple[float, int]]]] = {}
    for kind, layer, value, weight in entries:
        if value is not None:
            sums.setdefault(kind, {}).setdefault(layer, []).append((value, weight))
    layers = 1 + max((layer for by in sums.values() for layer in by if layer is not None), default=-1)
    return {
        kind: [average(by[None])] if None in by else [average(by.get(layer, ())) for layer in range(layers)]
        for kind, by in sorted(sums.items(), key=lambda item: None in item[1])
    }


def heat(map: Heat) -> str:
    """The rows, the numbers of the layers below them and a scale above."""
    columns = max((len(values) for values in map.rows.values()), default=0)
    drawn = "".join(_row(name, values, map) for name, values in map.rows.items())
    below = any(value is not None and value < 0 for values in map.rows.values() for value in values)
    beyond = any(value is not None and abs(value) > map.limit for values in map.rows.values() for value in values)
    ends = (map.printed(-map.limit) if below else "0", f"{map.printed(map.limit)}{' and more' if beyond else ''}")
    bar = '<i class="scale both"></i>' if below else '<i class="scale"></i>'
    legend = f'<div class="legend"><span>{esc(ends[0])}{bar}{esc(ends[1])}</span></div>'
    return (
        f'<figure class="chart heat"><figcaption>{esc(map.title)} <small>{esc(map.unit)}</small></figcaption>{legend}'
        f"{drawn}{_axis(columns) if columns > 1 else ''}</figure>"
    )


def _row(name: str, values: Sequence[float | None], map: Heat) -> str:
    width = 100 / max(len(values), 1)
    cells = ""
    for number, value in enumerate(values):
        if value is None:
            continue
        strength = min(abs(value) / map.limit, 1.0) if map.limit > 0 else 0.0
        kind = ' class="below"' if value < 0 else ""
        where = f"layer {number}: " if len(values) > 1 else ""
        cells += (
            f'<rect{kind} x="{number * width:.3f}%" width="{width:.3f}%" height="100%" fill-opacity="{strength:.3f}">'
            f"<title>{esc(where + map.printed(value))}</title></rect>"
        )
    found = [value for value in values if value is not None]
    mean = map.printed(sum(found) / len(found)) if found else ""
    label = esc(f"{name}: {mean} on average")
    drawing = f'<svg class="cells" role="img" aria-label="{label}">{cells}</svg>'
    return line_up(f"<span>{breakable(name)}</span>", drawing, esc(mean))


def _axis(columns: int) -> str:
    marks = ""
    for tick in ticks(0, columns - 1, 8):
        if float(tick).is_integer():
            at = 100 * (tick + 0.5) / columns
            marks += f'<text x="{at:.2f}%" y="1em" text-anchor="middle">{tick:.0f}</text>'
    return line_up(
        "<small>layer</small>", f'<svg class="numbers" aria-hidden="true">{marks}</svg>', "<small>mean</small>"
    )
