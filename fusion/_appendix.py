"""The tables of a report: every number, every step, and where it all came from."""

from collections.abc import Sequence

from fusion._gather import Model, Report
from fusion._pictures import esc, short
from fusion._readings import Ran

LAST = ("loss", "lm_loss", "target_loss", "target_share", "tokens_per_second")
Cell = str  # HTML, escaped already


def table(head: Sequence[str], rows: Sequence[Sequence[Cell]], caption: str = "", text: Sequence[int] = ()) -> str:
    """A table that scrolls by itself when it is wider than the page; columns in `text` are set to the left."""

    def line(tag: str, cells: Sequence[Cell]) -> str:
        kinds = [' class="text"' if number in text else "" for number in range(len(cells))]
        return (
            "<tr>" + "".join(f"<{tag}{kind}>{cell}</{tag}>" for kind, cell in zip(kinds, cells, strict=True)) + "</tr>"
        )

    title = f"<caption>{esc(caption)}</caption>" if caption else ""
    body = "".join(line("td", row) for row in rows)
    inner = f"{title}<thead>{line('th', [esc(name) for name in head])}</thead><tbody>{body}</tbody>"
    return f'<div class="scroll"><table>{inner}</table></div>'


def numbers(report: Report) -> str:
    """Every measured number of every model; the best of each column is bold."""
    measured = [model for model in report.models if _cells(model)]
    columns = list(dict.fromkeys(column for model in measured for column in _cells(model)))
    if not columns:
        return ""
    rows = []
    for model in measured:
        cells = _cells(model)
        row = [f"{esc(model.name)} <small>{esc(model.role)}</small>"]
        for column in columns:
            if column not in cells:
                row.append("")
                continue
            value, printed, sign = cells[column]
            best = sign != 0 and all(
                sign * value >= sign * _cells(other)[column][0] for other in measured if column in _cells(other)
            )
            row.append(f"<b>{printed}</b>" if best and len(measured) > 1 else printed)
        rows.append(row)
    drawn = table(["model", *columns], rows)
    return f"<section><h2>All numbers</h2><p>The best of each column is bold.</p>{drawn}</section>"


def _cells(model: Model) -> dict[str, tuple[float, Cell, int]]:
    """Column -> (value, its HTML, +1 where more is better, -1 where less is, 0 where nobody knows)."""
    cells: dict[str, tuple[float, Cell, int]] = {}
    for domain, score in model.scores.bits_per_byte.items():
        error = f" <small>± {score.stderr:.3f}</small>" if score.stderr else ""
        cells[f"{domain}, bits per byte"] = (score.bits_per_byte, f"{score.bits_per_byte:.4f}{error}", -1)
    if model.scores.blimp_accuracy is not None:
        cells["BLiMP, %"] = (model.scores.blimp_accuracy, f"{100 * model.scores.blimp_accuracy:.2f}", 1)
    for name, value in model.scores.other.items():
        cells[name.replace("_", " ").replace("/", ", ")] = (value, short(value), 0)
    return cells


def runs(report: Report) -> str:
    """What each step wrote about itself."""
    parts = []
    for title, entries in (
        ("Recorded", [(store.name, store.numbers) for store in report.stores]),
        ("Trained", [(one.name, {**_last(one.curve), **one.numbers}) for one in report.training]),
    ):
        columns = list(dict.fromkeys(column for _, found in entries for column in found))
        if columns:
            head = ["step", *(column.replace("_", " ").replace("/", ", ") for column in columns)]
            rows = [[esc(name), *(short(found[c]) if c in found else "" for c in columns)] for name, found in entries]
            parts.append(table(head, rows, title))
    return f"<section><h2>What the steps measured</h2>{''.join(parts)}</section>" if parts else ""


def _last(curve: dict[str, list[float | None]]) -> dict[str, float]:
    """The last logged number of each column that says how it went."""
    logged = {key: [value for value in curve.get(key, []) if value is not None] for key in LAST}
    return {f"last {key}": values[-1] for key, values in logged.items() if values}


def provenance(report: Report, recipe: str) -> str:
    """Command, versions, models, steps with keys, and the recipe; `recipe` is HTML."""
    versions = list(
        dict.fromkeys(f"{name} {version}" for step in report.steps for name, version in step.versions.items())
    )
    facts = [
        ("command", f"<code>{esc(report.command)}</code>"),
        ("seed", str(report.seed)),
        ("result", esc(report.result or "none named")),
        ("versions", esc(", ".join(versions)) or "not recorded"),
        ("machines", esc(", ".join(dict.fromkeys(step.host for step in report.steps if step.host))) or "not recorded"),
    ]
    facts += [
        (
            f"model {model.name}",
            f"<code>{esc(', '.join(f'{key}: {value}' for key, value in model.source.items()))}</code>",
        )
        for model in report.models
        if model.source
    ]
    listed = "".join(f"<dt>{esc(name)}</dt><dd>{value}</dd>" for name, value in facts)
    head = ["step", "directory", "started", "seconds", "key, first 16"]
    rows = [
        [
            f"{esc(step.name)} <small>{esc(step.verb)}</small>",
            _code(step.directory),
            esc(step.started or ""),
            f"{step.seconds:.1f}",
            _code(step.key[:16]),
        ]
        for step in report.steps
    ]
    inputs = "".join(_inputs(step) for step in report.steps)
    return (
        f"<section><h2>How it was made</h2><dl>{listed}</dl>"
        f'<pre aria-label="recipe">{recipe}</pre>'
        f"{table(head, rows, 'Steps', text=(1, 2, 4))}"
        f"{f'<details><summary>Inputs of each step</summary>{inputs}</details>' if inputs else ''}</section>"
    )


def _inputs(step: Ran) -> str:
    """What a step read, with digests."""
    if not step.inputs:
        return ""
    pairs = step.inputs.items() if isinstance(step.inputs, dict) else enumerate(step.inputs)
    listed = "".join(f"<dt>{esc(name)}</dt><dd><code>{esc(value)}</code></dd>" for name, value in pairs)
    return f"<dl><dt><b>{esc(step.name)}</b></dt><dd></dd>{listed}</dl>"


def _code(value: str) -> Cell:
    return f"<code>{esc(value)}</code>"
