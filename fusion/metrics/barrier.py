"""The loss along the straight line between two models' weights (Frankle et al. 2020, arXiv:1912.05671)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from fusion.data import Document
from fusion.metrics.bits_per_byte import bits_per_byte

if TYPE_CHECKING:
    from torch import Tensor


def barrier(
    model: Any,
    tokenizer: Any,
    documents: Sequence[Document],
    *,
    target: str,
    open_model: Callable[[str], Any],
    points: int = 25,
    window: int = 1024,
    stride: int = 512,
    batch_tokens: int = 4096,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> dict[str, Any]:
    """How far bits per byte rise above the line between both ends, at most, from `target` (0) to this model (1).

    target: another of the models that are evaluated.  points: on the line, both ends included; the result has them as
    curve [[share of this model, bits per byte], ...], and where the barrier is and what the middle costs.
    Raises ValueError for models whose parameters have other names or shapes and for fewer than two points.
    """
    import torch

    if points < 2:
        raise ValueError(f"barrier: points counts both ends and is at least 2; given: {points}")
    ends = _pairs(model, open_model(target), target)
    same = all(torch.equal(start, stop) for _, start, stop in ends)
    shares = [0.0, 1.0] if same else [number / (points - 1) for number in range(points)]

    def loss(share: float) -> float:
        _place(ends, share)
        found = bits_per_byte(model, tokenizer, documents, window=window, stride=stride, batch_tokens=batch_tokens)
        return found["bits_per_byte"]

    try:
        losses = [loss(0.0)] * 2 if same else [loss(share) for share in progress(shares)]
        middle = losses[0] if same else losses[points // 2] if points % 2 else loss(0.5)
    finally:
        _place(ends, 1.0)  # other metrics measure the same model
    rises = [one - (1 - share) * losses[0] - share * losses[-1] for share, one in zip(shares, losses)]
    return {
        "target": target,
        "barrier": max(max(rises), 0.0),
        "at": shares[max(range(len(rises)), key=rises.__getitem__)],
        "middle": middle,
        "curve": [[share, one] for share, one in zip(shares, losses)],
    }


def _pairs(model: Any, other: Any, name: str) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(parameter, the target's, its own copy) of each; ValueError where they do not correspond."""
    mine, theirs = dict(model.named_parameters()), dict(other.named_parameters())
    odd = next((key for key in [*mine, *theirs] if key not in mine or key not in theirs), None)
    if odd is not None:
        lacks = name if odd not in theirs else "the other"
        raise ValueError(f"barrier: {lacks} has no parameter {odd}; only models of one architecture lie on a line")
    for key, one in mine.items():
        if one.shape != theirs[key].shape:
            sizes = f"{tuple(one.shape)} and {tuple(theirs[key].shape)}"
            raise ValueError(f"barrier: {key} has shapes {sizes}; only models of one architecture lie on a line")
    return [(one, theirs[key].detach().to(one.device), one.detach().clone()) for key, one in mine.items()]


def _place(ends: Sequence[tuple[Tensor, Tensor, Tensor]], share: float) -> None:
    import torch

    with torch.no_grad():
        for parameter, start, stop in ends:
            parameter.copy_(torch.lerp(start, stop, share))
