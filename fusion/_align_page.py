"""The parts of report.html about correspondence: barriers as curves; matches, plans, distances of alignments."""

from collections.abc import Callable, Mapping, Sequence

from fusion import _pictures as draw
from fusion._align_report import Alignment, Barriers, lead
from fusion._heat import Entry, Heat, by_layer, heat
from fusion._merge_report import percent
from fusion._pictures import esc
from fusion._readings import is_number

LINES = ("teacher-0", "fused-0", "target", "fused-1", "fused-2", "fused-3")
LEVELS = 6  # shades of a plan
PLANS = 96  # drawn at most, so that the page of a deep network stays small
Section = Callable[[str, str, str], str]


def barriers(found: Sequence[Barriers], section: Section) -> str:
    """Bits per byte between weights: a picture for each target and domain, all models on one axis."""
    drawn = ""
    for one in found:
        lines = [
            draw.Line(
                cross.model, LINES[number % len(LINES)], cross.curve, number >= len(LINES), f"{cross.barrier:.3f}"
            )
            for number, cross in enumerate(one.crossings)
        ]
        drawn += draw.curves(f"From {one.target} on {one.domain}", lines, "bits per byte, by share of the other", True)
    said = "Loss on the straight line from one model's weights (0) to another's (1). The number is the barrier: the "
    said += "highest rise above the line between both ends."
    return section("Barrier", said, f'<div class="grid">{drawn}</div>') if drawn else ""


def aligned(one: Alignment, section: Section) -> str:
    """The part of the page about one alignment."""
    notes = "".join(f"<li>{esc(text)}</li>" for text in one.sentences)
    body = f'<ul class="notes">{notes}</ul>' if notes else ""
    return section(f"Alignment: {one.name}", lead(one), body + "".join(map(heat, maps(one))) + plans(one))


def maps(one: Alignment) -> list[Heat]:
    """By kind of space or tensor and layer: matched and moved units, spread of couplings, distances of weights."""
    found = []
    wanted: list[tuple[str, str, Callable[[Mapping], float | None], Callable[[float], str]]] = [
        ("Matched", "share of the target's units that have a counterpart", lambda s: _number(s, "matched"), percent),
        ("Moved", "share of units that changed places", _moved, percent),
        (
            "Spread",
            "donor units behind a target unit, exp(entropy)",
            lambda s: _number(s, "effective_support"),
            draw.short,
        ),
    ]
    for title, unit, value, printed in wanted:
        rows = by_layer(_space(name, value(space)) for name, space in one.spaces.items())
        largest = max((abs(v) for row in rows.values() for v in row if v is not None), default=0.0)
        if largest:
            found.append(Heat(title, unit, rows, 1.0 if printed is percent else largest, printed))
    tensors = [entry for entry in one.found.get("tensors", []) if isinstance(entry, dict)]
    both = {way: by_layer(_tensor(entry, way) for entry in tensors) for way in ("naive", "aligned")}
    ends = [v for rows in both.values() for row in rows.values() for v in row if v is not None]
    for way, title in (("naive", "Apart as they are"), ("aligned", "Apart when aligned")):
        if both[way] and max(ends) > 0:
            of = f"distance of the weights, of {one.target}'s length"
            found.append(Heat(title, of, both[way], max(ends), percent))
    return found


def plans(one: Alignment) -> str:
    """A small picture for each space and layer: which stretches of the donor's units go into which of the target's."""
    spaces = sorted(one.spaces.items(), key=lambda item: item[0].split(".")[2:])  # by kind, then by layer
    shown = {name: space["plan"] for name, space in spaces if isinstance(space.get("plan"), list)}
    if not shown:
        return ""
    drawn = "".join(
        f"<div>{_plan(table)}<small>{draw.breakable(name)}</small></div>" for name, table in list(shown.items())[:PLANS]
    )
    more = f" The first {PLANS} of {len(shown)}." if len(shown) > PLANS else ""
    unit = f"{one.target}'s units from top to bottom, {one.donor}'s from left to right, in stretches.{more}"
    return (
        f'<figure class="chart heat"><figcaption>Plans <small>{esc(unit)}</small></figcaption>'
        f'<div class="plans">{drawn}</div></figure>'
    )


def _plan(table: Sequence[Sequence[float]]) -> str:
    """Cells of a plan, one path a shade, darkest where a stretch comes from one place alone."""
    shades: dict[int, str] = {}
    for y, row in enumerate(table):
        for x, share in enumerate(row):
            level = min(LEVELS, round(LEVELS * share**0.5))
            if level:
                shades[level] = shades.get(level, "") + f"M{x} {y}h1v1h-1z"
    paths = "".join(f'<path fill-opacity="{level / LEVELS:.2f}" d="{path}"/>' for level, path in sorted(shades.items()))
    width, height = len(table[0]), len(table)
    return f'<svg class="plan" role="img" viewBox="0 0 {width} {height}" preserveAspectRatio="none">{paths}</svg>'


def _number(entry: Mapping, name: str) -> float | None:
    value = entry.get(name)
    return float(value) if is_number(value) else None


def _moved(space: Mapping) -> float | None:
    """Of a space within another `moved` counts all copies."""
    moved, units = _number(space, "moved"), _number(space, "units")
    copies = _number(space, "copies") or 1.0
    return None if moved is None or not units else moved / (units * copies)


def _space(name: str, value: float | None) -> Entry:
    """Of a name like layers.3.mlp."""
    head, _, rest = name.partition(".")
    number, _, kind = rest.partition(".")
    return (kind, int(number), value, 1) if head == "layers" and number.isdigit() and kind else (name, None, value, 1)


def _tensor(entry: Mapping, way: str) -> Entry:
    layer, kind = entry.get("layer"), str(entry.get("kind")).removesuffix(".weight")
    return (kind, None if layer is None else int(layer), _number(entry, way), int(entry.get("numel", 1)))
