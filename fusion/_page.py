"""report.html: one file without a request, a script or a font to load. A section is there when its numbers are."""

import re
from collections.abc import Mapping, Sequence

from fusion import _pictures as draw
from fusion._align_page import aligned, barriers
from fusion._appendix import numbers, provenance, runs
from fusion._gather import Model, Report
from fusion._merge_page import merged
from fusion._pictures import esc
from fusion._style import CSS
from fusion._tune_page import learning, taxed

ROLE = {
    "target": "target",
    "teacher": "teacher",
    "baseline": "continued training",
    "fused": "fused",
    "other": "also here",
}
SHADES = {"teacher": 3, "baseline": 2, "fused": 4}
MADE = ("target", "fused-0", "teacher-0", "fused-1", "baseline-0", "fused-2", "fused-3")  # where nothing is fused
ARROW = ("arrow_bytes_per_token", "as Arrow lists")


def page(report: Report) -> str:
    """The whole document."""
    colours = palette(report)
    said = [esc(sentence) for sentence in report.verdict]
    sections = [
        _bits(report, colours),
        _against(report, colours),
        taxed(report.taxes, colours, section),
        learning(report.training, colours, section),
        _targets(report, colours),
        _blimp(report, colours),
        barriers(report.barriers, section),
        *(aligned(one, section) for one in report.alignments),
        *(merged(merge, colours, section) for merge in report.merges),
        _time(report, colours),
        numbers(report),
        runs(report),
        provenance(report, highlight(report.text)),
    ]
    more = f'<p class="more">{" ".join(said[1:])}</p>' if said[1:] else ""
    about = f"seed {report.seed} · {draw.duration(report.seconds)} in {len(report.steps)} steps"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f"<title>{esc(report.recipe)} · fusion report</title>\n"
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        f'<meta name="description" content="{said[0]}"><style>{CSS}</style></head>\n<body><main>\n'
        f'<header><p class="eyebrow"><b>{esc(report.recipe)}</b> · {about}</p>\n'
        f"<h1>{said[0]}</h1>{more}{_cast(report, colours)}</header>\n"
        f"{chr(10).join(section for section in sections if section)}\n</main></body></html>\n"
    )


def palette(report: Report) -> dict[str, str]:
    """Model name -> CSS colour: its role's, in shades where several share a role; the hero has the first green.

    In a run that fuses nothing, every model that it made has one of its own, as long as there are any.
    """
    if all(model.role == "other" for model in report.models):
        made = [model.name for model in report.models if model.start is not None]
        return {model.name: "other" for model in report.models} | {
            name: MADE[number % len(MADE)] for number, name in enumerate(made)
        }
    models = sorted(report.models, key=lambda model: model.name != report.hero)
    taken: dict[str, int] = {}
    found = {}
    for model in models:
        number = taken.get(model.role, 0)
        taken[model.role] = number + 1
        found[model.name] = f"{model.role}-{number % SHADES[model.role]}" if model.role in SHADES else model.role
    return found


def section(title: str, lead: str, body: str) -> str:
    """A titled part of the page; the lead is plain text."""
    return f"<section><h2>{esc(title)}</h2><p>{esc(lead)}</p>{body}</section>"


def highlight(text: str) -> str:
    """A recipe with its comments set back."""
    lines = (re.fullmatch(r"((?:[^#]|(?<=\S)#)*)(#.*)?", line) for line in text.splitlines())
    drawn = (f"{esc(m[1])}{f'<i>{esc(m[2])}</i>' if m[2] else ''}" if m else "" for m in lines)
    return "\n".join(drawn)


def _cast(report: Report, colours: Mapping[str, str]) -> str:
    """Who is who: start + teachers -> what was fused, and the baseline beside it. Also the legend of every colour."""

    def chip(model: Model) -> str:
        below = f"<span>{esc(_origin(model))}</span>" if _origin(model) else ""
        said = f"<span>{ROLE[model.role]}</span><b>{draw.breakable(model.name)}</b>{below}"
        return f'<div class="chip" style="--c:var(--{colours[model.name]})">{said}</div>'

    drawn = ""
    for role, sign in (("target", ""), ("teacher", "+"), ("fused", "\u2192"), ("baseline", "vs")):
        for number, model in enumerate(model for model in report.models if model.role == role):
            lead = f"<i>{sign}</i>" if sign and drawn and not number else ""
            drawn += f'<div class="pair">{lead}{chip(model)}</div>'
    return f'<div class="cast">{drawn}</div>' if drawn else ""


def _origin(model: Model) -> str:
    """Where a model comes from, in a word or two."""
    if model.start is not None:
        return f"from {model.start}"
    for key in ("hub", "path"):
        if isinstance(model.source.get(key), str):
            return str(model.source[key])
    return str((model.source.get("config") or {}).get("model_type", ""))


def _bits(report: Report, colours: Mapping[str, str]) -> str:
    """Bars of bits per byte, a block for each domain, all on one scale, the best on top."""
    if not report.domains:
        return ""
    ends = [
        score.bits_per_byte + (score.stderr or 0)
        for model in report.models
        for score in model.scores.bits_per_byte.values()
    ]
    blocks = ""
    for domain in report.domains:
        measured = [
            (model, model.scores.bits_per_byte[domain])
            for model in report.models
            if domain in model.scores.bits_per_byte
        ]
        measured.sort(key=lambda pair: pair[1].bits_per_byte)
        rows = [
            draw.Bar(
                name=model.name,
                value=score.bits_per_byte,
                colour=colours[model.name],
                printed=f"{score.bits_per_byte:.3f}",
                note=f"± {score.stderr:.3f}" if score.stderr else "",
                stderr=score.stderr,
                strong=model.name == report.hero,
            )
            for model, score in measured
        ]
        sizes = {score.bytes for _, score in measured}
        size = sizes.pop() if len(sizes) == 1 else None
        of = f" <small>{draw.count(size)} bytes of text</small>" if size else ""
        blocks += f"<div><h3>{esc(domain)}{of}</h3>{draw.bars(rows, max(ends))}</div>"
    whisker = " A whisker is one standard error over documents." if "whisker" in blocks else ""
    lead = f"How many bits a model needs for a byte of text it never saw; lower is better.{whisker}"
    return section("Bits per byte", lead, f'<div class="grid">{blocks}</div>')


def _against(report: Report, colours: Mapping[str, str]) -> str:
    """The same numbers as differences, on a scale that shows them."""
    if not report.differences:
        return ""
    rivals = list(dict.fromkeys(d.against for d in report.differences))
    zero = rivals[0] if len(rivals) == 1 else "its rival"
    rows = [
        draw.Span(
            name=d.model if len(rivals) == 1 else f"{d.model} against {d.against}",
            group=d.domain,
            value=d.bits_per_byte,
            stderr=d.stderr,
            colour=colours[d.model],
            printed=draw.signed(d.bits_per_byte) + (f" ± {d.stderr:.3f}" if d.stderr else ""),
            faint=d.level,
        )
        for domain in report.domains
        for d in sorted(report.differences, key=lambda d: d.bits_per_byte)
        if d.domain == domain
    ]
    roles = {model.name: model.role for model in report.models}
    title = "Against continued training" if all(roles[name] == "baseline" for name in rivals) else "Against the start"
    lead = (
        "Bits per byte of the fused model minus those of "
        + (f"{zero}" if len(rivals) == 1 else "what it must beat")
        + "."
    )
    paired = " The line through a dot is the standard error of the difference, on the same documents."
    drawn = draw.spans(rows, "fused better", zero, "worse")
    return section(
        title, lead + (paired if any(row.stderr for row in rows) else ""), f'<div style="margin-top:20px">{drawn}</div>'
    )


def _targets(report: Report, colours: Mapping[str, str]) -> str:
    """How much of the text had a target, and what a token of a store costs."""
    blocks = ""
    shares = []
    for one in report.training:
        logged = [value for value in one.curve.get("target_share", []) if value is not None]
        share = one.numbers.get("target_share", sum(logged) / len(logged) if logged else None)
        if share is not None and one.verb == "distill":
            shares.append(draw.Bar(one.name, share, colours.get(one.name, "other"), f"{100 * share:.1f} %"))
    if shares:
        blocks += f"<div><h3>Share of tokens with a target</h3>{draw.bars(shares, 1.0)}</div>"
    rows: list[draw.Bar] = []
    for store in report.stores:
        if "bytes_per_token" in store.numbers:
            cost = store.numbers["bytes_per_token"]
            rows.append(draw.Bar(store.name, cost, colours.get(store.teacher, "teacher-0"), f"{cost:.1f} B"))
        if ARROW[0] in store.numbers:
            plain = store.numbers[ARROW[0]]
            rows.append(draw.Bar(f"{store.name} {ARROW[1]}", plain, "other", f"{plain:.1f} B"))
    if rows:
        blocks += f"<div><h3>Store, bytes a token</h3>{draw.bars(rows, max(row.value for row in rows))}</div>"
    lead = (
        "A target stands where both tokenizations end at the same byte; elsewhere the language-model loss stays whole."
    )
    return section("Targets", lead, f'<div class="grid">{blocks}</div>') if blocks else ""


def _blimp(report: Report, colours: Mapping[str, str]) -> str:
    """Accuracy per paradigm: target, baseline, and the fused model as the full dot, by how much it moved."""
    shown = [
        model
        for model in report.models
        if model.scores.blimp and (model.role in ("target", "baseline") or model.name == report.hero)
    ]
    paid = {name for tax in report.taxes for name in (tax.start, tax.model)}
    shown = shown or [model for model in report.models if model.scores.blimp and (not paid or model.name in paid)][:3]
    if not shown:
        return ""
    shown.sort(key=lambda model: model.name == report.hero)
    rows = []
    for paradigm in dict.fromkeys(name for model in shown for name in model.scores.blimp):
        found = [model for model in shown if paradigm in model.scores.blimp]
        marks = [(colours[model.name], model.scores.blimp[paradigm]) for model in found]
        rows.append(draw.Move(paradigm.replace("_", " "), marks))
    rows.sort(key=lambda row: row.marks[0][1] - row.marks[-1][1])
    low = min(0.4, *(value for row in rows for _, value in row.marks))
    legend = "".join(
        f"<span>{draw.named(model.name, colours[model.name])}<b>{_percent(model.scores.blimp_accuracy)}</b></span>"
        for model in shown
    )
    change = f"Numbers: {shown[-1].name}, and its change from {shown[0].name}. " if len(shown) > 1 else ""
    lead = f"Accuracy on minimal pairs, in percent. {change}The upright line is chance."
    return section("BLiMP", lead, f'<div class="legend" style="margin-top:12px">{legend}</div>{draw.moves(rows, low)}')


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def _time(report: Report, colours: Mapping[str, str]) -> str:
    """The steps one after another, to scale."""
    teacher = {store.name: colours.get(store.teacher, "teacher-0") for store in report.stores}
    pace = {one.name: _pace(one.curve.get("seconds_per_step", [])) for one in report.training}
    rows = [
        draw.Stretch(
            name=step.name,
            verb="" if step.name.startswith(step.verb) else step.verb,
            seconds=step.seconds,
            colour=colours.get(step.name, teacher.get(step.name, "other")),
            note=f"{draw.duration(pace[step.name])} a training step" if pace.get(step.name) else "",
        )
        for step in report.steps
    ]
    lead = f"{draw.duration(report.seconds)} in all, pauses between resumed runs left out."
    return section("Time", lead, f'<div style="margin-top:16px">{draw.timeline(rows)}</div>') if rows else ""


def _pace(seconds: Sequence[float | None]) -> float:
    """The median of the logged times of a training step; 0 without any."""
    found = sorted(value for value in seconds if value is not None)
    return found[len(found) // 2] if found else 0.0
