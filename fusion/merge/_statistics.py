"""What the methods that are fed statistics share: checks in sentences, and the average of the models."""

from collections.abc import Sequence

import torch
from torch import Tensor


def average(word: str, tensors: Tensor, weights: Tensor) -> Tensor:  # (K, ...) and (K,)
    """(...) sum_t w_t theta_t / sum_t w_t. Raises ValueError for a negative weight and weights that are all 0."""
    check_weights(word, weights)
    share = (weights.double() / weights.double().sum()).tolist()
    mean = torch.zeros_like(tensors[0])
    for tensor, part in zip(tensors, share):
        mean.add_(tensor, alpha=part)
    return mean


def check_weights(word: str, weights: Tensor) -> None:
    if bool((weights < 0).any()) or not bool((weights > 0).any()):
        raise ValueError(
            f"{word} averages the models, so no weight may be negative and not all 0, got {weights.tolist()}"
        )


def complete(word: str, name: str, statistic: str, given: Sequence[Tensor | None] | None) -> list[Tensor]:
    """The K tensors, or an empty list when no model has one; ValueError naming models that lack what others have."""
    missing = [str(t) for t, one in enumerate(given or ()) if one is None]
    if given is not None and 0 < len(missing) < len(given):
        raise ValueError(
            f"{word}: '{name}' has the statistic '{statistic}' in some models and not in model {', '.join(missing)}; "
            f"give it for every model or for none"
        )
    return [one for one in given or () if one is not None]


def needed(word: str, name: str, statistic: str, given: Sequence[Tensor | None] | None, hint: str = "") -> list[Tensor]:
    """The K tensors; ValueError naming the tensor, and the models that lack it."""
    found = complete(word, name, statistic, given)
    if not found:
        raise ValueError(f"{word}: '{name}' has no statistic '{statistic}', which is needed here{hint}")
    return found


def shaped(word: str, name: str, statistic: str, found: list[Tensor], shape: tuple[int, ...]) -> list[Tensor]:
    """The same, checked to have that shape and finite entries; ValueError naming tensor and model."""
    for t, one in enumerate(found):
        if one.shape != shape:
            raise ValueError(f"{word}: '{statistic}' of '{name}' in model {t} is {tuple(one.shape)}; {shape} is needed")
        if not bool(one.isfinite().all()):
            raise ValueError(f"{word}: '{statistic}' of '{name}' in model {t} has infinity or NaN in it")
    return found


def positive(word: str, name: str, statistic: str, given: Tensor | None) -> Tensor:  # (K, n)
    """The same, checked to be there, finite and nowhere negative; ValueError naming tensor and model."""
    if given is None:
        raise ValueError(f"{word}: '{name}' has no statistic '{statistic}', which every tensor needs here")
    for t, one in enumerate(given):
        if not bool(((one >= 0) & one.isfinite()).all()):
            raise ValueError(f"{word}: '{statistic}' of '{name}' in model {t} has negative entries, or infinity or NaN")
    return given


def shrunk(gram: Tensor, off_diagonal: float, added: float = 0.0) -> Tensor:  # (n, n)
    """(n, n) float64 the matrix with its off-diagonal multiplied and something added to its diagonal."""
    wide = gram.double()
    out = wide * off_diagonal
    out.diagonal().copy_(wide.diagonal() + added)
    return out
