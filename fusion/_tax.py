"""The alignment tax: what learning from preferences or rewards did to everything else, before and after on one data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fusion._pictures import signed, smooth
from fusion._readings import Scores, Training
from fusion._verdict import Difference, differences

ALGORITHMS = ("dpo", "kto", "grpo", "rloo")
GAINS = ("reward", "rewards/margins", "rewards/accuracies", "kl")  # what was paid for, where it was logged


@dataclass(frozen=True)
class Tax:
    """One `tune` step: what it gained, and what its model lost against the one it started from."""

    model: str
    start: str
    algorithm: str
    gains: dict[str, float]  # by GAINS: the end of the curve's mean
    bits_per_byte: list[Difference]  # by domain, after minus before: above zero is a loss
    blimp: tuple[float, float] | None  # accuracy before and after, on the same paradigms


def taxes(training: Sequence[Training], scores: Mapping[str, Scores]) -> list[Tax]:
    """Of every step that learnt from preferences or rewards and was measured before and after on the same data."""
    found = []
    for one in training:
        algorithm = str(one.settings.get("algorithm"))
        if algorithm not in ALGORITHMS or not {one.name, one.start} <= scores.keys():
            continue
        bits = differences(one.name, one.start, scores)
        before, after = scores[one.start], scores[one.name]
        same = before.blimp.keys() == after.blimp.keys()
        blimp = (
            (before.blimp_accuracy, after.blimp_accuracy)
            if same and before.blimp_accuracy is not None and after.blimp_accuracy is not None
            else None
        )
        if bits or blimp:
            found.append(Tax(one.name, one.start, algorithm, gains(one), bits, blimp))
    return found


def gains(one: Training) -> dict[str, float]:
    """Where the curves of reward and KL end, as the page prints it beside them."""
    logged = {name: [value for value in one.curve.get(name, []) if value is not None] for name in GAINS}
    return {name: settled(values) for name, values in logged.items() if values}


def settled(values: Sequence[float]) -> float:
    """The last value of a curve's smoothed course."""
    return smooth(values, max(1, len(values) // 16))[-1]


def sentences(found: Sequence[Tax], result: str | None) -> list[str]:
    """What the recipe's result cost, and what one other model did; the rest stand in a table."""
    return [sentence(tax) for tax in sorted(found, key=lambda tax: tax.model != result)[:2]]


def sentence(tax: Tax) -> str:
    """What it cost, in words."""
    parts = [
        f"{signed(d.bits_per_byte)} bits per byte on {d.domain}"
        if not number
        else f"{signed(d.bits_per_byte)} on {d.domain}"
        for number, d in enumerate(tax.bits_per_byte)
    ]
    if tax.blimp is not None:
        parts.append(f"{signed(100 * (tax.blimp[1] - tax.blimp[0]), 1)} points of BLiMP")
    margin = tax.gains.get("rewards/margins", tax.gains.get("reward"))
    gained = "" if margin is None else f" (reward {'margin ' if 'rewards/margins' in tax.gains else ''}{margin:.2f})"
    return f"{tax.model}{gained} against {tax.start}, before {tax.algorithm}: {', '.join(parts)}."
