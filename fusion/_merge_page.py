"""The part of report.html about one merge: sentences, lengths and cosines of task vectors, heat maps by layer."""

import math
from collections.abc import Callable, Mapping, Sequence

from fusion import _pictures as draw
from fusion._heat import Heat, by_layer, heat
from fusion._merge_report import Merge, Part, percent, weight_sentences
from fusion._pictures import esc
from fusion._readings import is_number

ROWS = 24  # of a heat map; a mixture of experts has them by the hundred, so numbers inside a kind count as one


def merged(merge: Merge, colours: Mapping[str, str], section: Callable[[str, str, str], str]) -> str:
    """The part of the page about one merge."""
    harmless = weight_sentences(merge) if merge.base is not None or merge.divides else []
    kinds = {text: "" if text in harmless else ' class="warn"' for text in merge.sentences}
    notes = "".join(f"<li{kind}>{esc(text)}</li>" for text, kind in kinds.items())
    blocks = [_lengths(merge, colours), _kept(merge, colours), _cosines(merge)]
    body = f'<ul class="notes">{notes}</ul>' if notes else ""
    body += f'<div class="grid">{"".join(block for block in blocks if block)}</div>' if any(blocks) else ""
    body += "".join(heat(one) for one in maps(merge))
    return section(f"Merge: {merge.name}", _lead(merge), body)


def _lead(merge: Merge) -> str:
    params = ", ".join(
        f"{name} {value}" for name, value in merge.params.items() if is_number(value) or isinstance(value, str)
    )
    made = f"{merge.method or 'layers'} of {_listed(merge.models)}" + (f" on {merge.base}" if merge.base else "")
    said = f"{made}{f' ({params})' if params else ''}."
    counts = {action: sum(part.action == action for part in merge.parts) for action in ("merged", "copied", "equal")}
    said += f" Of {len(merge.parts)} tensors {counts['merged']} were merged"
    said += f", {counts['copied']} copied" if counts["copied"] else ""
    said += f", {counts['equal']} are the same in all" if counts["equal"] else ""
    if "seconds" in merge.numbers:
        said += f"; {draw.duration(merge.numbers['seconds'])}"
    if "peak_rss" in merge.numbers:
        said += f" and {merge.numbers['peak_rss'] / 1e6:.0f} MB of memory at the most"
    moved = (
        "" if merge.moved is None else f" The result lies {percent(merge.moved)} of {merge.base}'s length away from it."
    )
    return f"{said}.{moved}"


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else "".join(names)


def _lengths(merge: Merge, colours: Mapping[str, str]) -> str:
    if merge.lengths is None or not merge.base_length:
        return ""
    rows = [
        draw.Bar(
            name,
            length / merge.base_length,
            colours.get(name, "other"),
            percent(length / merge.base_length),
            "" if merge.weights is None else f"weight {draw.short(merge.weights[number])}",
        )
        for number, (name, length) in enumerate(zip(merge.models, merge.lengths, strict=True))
    ]
    of = f"of {merge.base}'s length" if merge.base else "of their mean's length, from that mean"
    return f"<div><h3>Task vectors <small>{esc(of)}</small></h3>{draw.bars(rows, max(r.value for r in rows))}</div>"


def _kept(merge: Merge, colours: Mapping[str, str]) -> str:
    if merge.kept is None:
        return ""
    pairs = zip(merge.models, merge.kept, strict=True)
    rows = [draw.Bar(name, share, colours.get(name, "other"), percent(share)) for name, share in pairs]
    return f"<div><h3>Kept <small>share of each task vector's entries</small></h3>{draw.bars(rows, 1.0)}</div>"


def _cosines(merge: Merge) -> str:
    found = merge.cosines
    if found is None or len(merge.models) < 2 or not merge.base:
        return ""
    head = "".join(f"<th>{draw.breakable(name)}</th>" for name in merge.models[1:])
    rows = ""
    for i, name in enumerate(merge.models[:-1]):
        cells = "".join(f"<td>{draw.signed(found[i][j], 3) if j > i else ''}</td>" for j in range(1, len(merge.models)))
        rows += f"<tr><td>{draw.breakable(name)}</td>{cells}</tr>"
    conflict = "" if merge.conflict is None else f"; {percent(merge.conflict)} of the entries are pulled both ways"
    title = f"<h3>Cosines <small>between task vectors{esc(conflict)}</small></h3>"
    return f'<div>{title}<div class="scroll"><table><tr><th></th>{head}</tr>{rows}</table></div></div>'


def maps(merge: Merge) -> list[Heat]:
    """How far tensors moved, how often signs disagree, how the task vectors point; empty ones are left out.

    Without a base only the first: around their own mean the models always pull apart.
    """
    k = len(merge.models)

    def moved(part: Part) -> float | None:
        length = (
            part.moved if part.moved is not None else math.hypot(*part.norms) / math.sqrt(k) if part.norms else None
        )
        return None if length is None or not part.base_norm else length / part.base_norm

    def cosine(part: Part) -> float | None:
        rows = part.cosines or ()
        pairs = [rows[i][j] for i in range(len(rows)) for j in range(i)]
        return sum(pairs) / len(pairs) if pairs else None

    of = f"of {merge.base}'s length" if merge.base else "root mean square distance from their mean, of its length"
    title = "How far the result moved" if merge.base else "How far the models are apart"
    between = "of the task vectors" if k == 2 else "of the task vectors, mean over pairs"
    wanted: list[tuple[str, str, Callable[[Part], float | None], Callable[[float], str]]] = [
        (title, of, moved, percent),
        ("Conflict of signs", "share of entries that are pulled both ways", lambda part: part.conflict, percent),
        ("Cosine", between, cosine, lambda value: draw.signed(value, 2)),
    ]
    found = []
    for title, unit, value, printed in wanted if k > 1 and merge.base else wanted[:1]:
        rows = _rows(merge.parts, value)
        values = sorted(abs(one) for row in rows.values() for one in row if one is not None)
        if values and values[-1] > 0:
            limit = values[math.ceil(0.98 * len(values)) - 1] or values[-1]  # one wild tensor leaves the rest a colour
            found.append(Heat(title, unit, rows, limit, printed))
    return found


def _rows(parts: Sequence[Part], value: Callable[[Part], float | None]) -> dict[str, list[float | None]]:
    """Kind -> values by layer, of the largest kinds."""
    found = [(_kind(part), part.layer, number, part.numel) for part in parts if (number := value(part)) is not None]
    sizes: dict[str, int] = {}
    for kind, _, _, numel in found:
        sizes[kind] = sizes.get(kind, 0) + numel
    shown = set(sorted(sizes, key=lambda kind: -sizes[kind])[:ROWS])
    return by_layer(entry for entry in found if entry[0] in shown)


def _kind(part: Part) -> str:
    return ".".join("*" if piece.isdigit() else piece for piece in part.kind.removesuffix(".weight").split("."))
