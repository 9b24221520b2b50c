"""The parts of report.html about training: curves of every training step, and what preferences cost."""

from collections.abc import Callable, Mapping, Sequence

from fusion import _pictures as draw
from fusion._appendix import table
from fusion._readings import Training
from fusion._tax import Tax
from fusion._verdict import Difference

Section = Callable[[str, str, str], str]

CURVES = (
    ("lm_loss", "Language-model loss", "nats a token"),
    ("target_loss", "Target loss", "nats a token"),
    ("loss", "Loss", "the algorithm's own"),
    ("reward", "Reward", "mean of completions"),
    ("rewards/margins", "Reward margin", "chosen less rejected"),
    ("rewards/accuracies", "Pairs in the right order", "share"),
    ("kl", "KL from the reference", "nats"),
    ("online_update_kept", "Update kept by online merging", "share of entries"),
    ("online_sign_conflicts", "Update against task vector", "share of entries with opposite signs"),
    ("online_update_norm", "Length of the optimizer's update", "over all weights"),
    ("online_task_vector_norm", "Length of the task vector", "over all weights"),
    ("online_merged_norm", "Length of the merged update", "over all weights"),
    ("online_drift", "Distance from the reference", "of all weights"),
)
GAINED = {
    "reward": "reward",
    "rewards/margins": "reward margin",
    "rewards/accuracies": "in the right order",
    "kl": "KL",
}


def learning(training: Sequence[Training], colours: Mapping[str, str], section: Section) -> str:
    """Curves of all training steps on the same text, on one axis; the target loss beside them."""
    drawn = ""
    taught = {one.data for one in training if one.verb == "distill"}  # their texts come first
    for data in sorted(dict.fromkeys(one.data for one in training), key=lambda data: data not in taught):
        for key, title, unit in CURVES:
            lines: list[draw.Line] = []
            for one in (one for one in training if one.data == data):
                language = one.settings.get("algorithm", "clm") in ("clm", "sft")
                if key in ("lm_loss", "loss") and (key == "lm_loss") is not language:
                    continue
                found = "loss" if key == "lm_loss" and key not in one.curve else key
                pairs = zip(one.curve.get("step", []), one.curve.get(found, []), strict=False)
                points = [(x, y) for x, y in pairs if x is not None and y is not None]
                if len(points) > 1:
                    colour = colours.get(one.name, "other")
                    lines.append(draw.Line(one.name, colour, points, dashed=colour in [line.colour for line in lines]))
            if lines:
                drawn += draw.curves(f"{title} on {data}", lines, f"{unit}, by training step")
    lead = "Faint: what was logged. Full: its centred mean. The number is the last one of that mean."
    return section("Training", lead, f'<div class="grid">{drawn}</div>') if drawn else ""


def taxed(taxes: Sequence[Tax], colours: Mapping[str, str], section: Section) -> str:
    """What was lost on the way to the reward: dots around the model that each step started from, and all numbers."""
    if not taxes:
        return ""
    blocks = _bits(taxes, colours) + _blimp(taxes, colours)
    lead = (
        "Everything else that a model could do before it learnt from preferences or rewards, and can still do: "
        "after minus before, on the same data. Rewards are the trainer's own, where their curves end."
    )
    return section("Alignment tax", lead, f'<div class="grid">{blocks}</div>{_table(taxes)}')


def _named(tax: Tax, taxes: Sequence[Tax]) -> str:
    return tax.model if len({one.start for one in taxes}) == 1 else f"{tax.model} after {tax.start}"


def _zero(taxes: Sequence[Tax]) -> str:
    starts = {one.start for one in taxes}
    return starts.pop() if len(starts) == 1 else "before"


def _bits(taxes: Sequence[Tax], colours: Mapping[str, str]) -> str:
    """Dots by domain."""
    rows = [
        draw.Span(
            name=_named(tax, taxes),
            group=domain,
            value=d.bits_per_byte,
            stderr=d.stderr,
            colour=colours.get(tax.model, "other"),
            printed=draw.signed(d.bits_per_byte) + (f" ± {d.stderr:.3f}" if d.stderr else ""),
            faint=d.level,
        )
        for domain in dict.fromkeys(d.domain for tax in taxes for d in tax.bits_per_byte)
        for tax in taxes
        for d in tax.bits_per_byte
        if d.domain == domain
    ]
    return f"<div><h3>Bits per byte</h3>{draw.spans(rows, 'better', _zero(taxes), 'worse')}</div>" if rows else ""


def _blimp(taxes: Sequence[Tax], colours: Mapping[str, str]) -> str:
    """Dots for BLiMP: here more is better, so the sides change, and worse stays on the right."""
    rows = []
    for tax in taxes:
        if tax.blimp is not None:
            lost = 100 * (tax.blimp[0] - tax.blimp[1])
            colour = colours.get(tax.model, "other")
            rows.append(draw.Span(_named(tax, taxes), "", lost, None, colour, draw.signed(-lost, 1)))
    unit = "<small>points of accuracy</small>"
    return f"<div><h3>BLiMP {unit}</h3>{draw.spans(rows, 'better', _zero(taxes), 'worse')}</div>" if rows else ""


def _table(taxes: Sequence[Tax]) -> str:
    gained = [name for name in GAINED if any(name in tax.gains for tax in taxes)]
    domains = list(dict.fromkeys(d.domain for tax in taxes for d in tax.bits_per_byte))
    blimp = any(tax.blimp is not None for tax in taxes)
    head = ["model", "before", *(GAINED[name] for name in gained)]
    head += [f"{domain}, bits per byte" for domain in domains] + ["BLiMP, points"] * blimp
    rows = []
    for tax in taxes:
        row = [f"{draw.esc(tax.model)} <small>{tax.algorithm}</small>", draw.esc(tax.start)]
        row += [f"{tax.gains[name]:.3f}" if name in tax.gains else "" for name in gained]
        bits: dict[str, Difference] = {d.domain: d for d in tax.bits_per_byte}
        row += [draw.signed(bits[domain].bits_per_byte, 4) if domain in bits else "" for domain in domains]
        if blimp:
            row.append("" if tax.blimp is None else draw.signed(100 * (tax.blimp[1] - tax.blimp[0]), 2))
        rows.append(row)
    return table(head, rows)
