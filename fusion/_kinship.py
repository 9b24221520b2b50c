"""Sentences about models that are too far from their base, or from one another, for a merge of them to make sense."""

from collections.abc import Sequence

STRANGE = 0.9  # of the distance between models that have nothing to do with one another
OUTLIER = 5.0  # times the median distance of the others


def warnings(names: Sequence[str], base: str, shares: Sequence[float], distances: Sequence[float]) -> list[str]:
    """What is odd about the models: each one's distance from the base, and its share of the distance that a model
    without any relation to the base would have."""
    found = [
        f"{name} is as far from {base} as a model that has nothing to do with it "
        f"({100 * share:.0f} % of that distance): is {base} its base?"
        for name, share in zip(names, shares, strict=True)
        if share > STRANGE
    ]
    for number, name in enumerate(names):
        others = sorted(distance for other, distance in enumerate(distances) if other != number)
        middle = others[len(others) // 2] if len(others) > 1 else 0.0
        if middle and distances[number] > OUTLIER * middle:
            found.append(f"{name} is {distances[number] / middle:.0f} times as far from {base} as the others are")
    return found
