"""MaTS: models merged in their task subspaces by conjugate gradients (Tam et al. 2023, arXiv:2312.04339).

W solves sum_t w_t A_t W B_t = sum_t w_t A_t W_t B_t. `mode` says what A_t and B_t are:
identity: none, the weighted average; diagonal: entry by entry times the statistic "fisher" (shaped like the tensor);
gram: B_t is the Gram matrix of the layer's inputs ("gram", (in, in), weights are [out, in]), as in RegMean;
kronecker: A_t is also the Gram matrix of the output gradients ("output_gram", (out, out)), as in K-FAC.
Off-diagonals of Gram matrices are multiplied by `off_diagonal`. It starts at the weighted average, which directions
without information keep, and stops at |residual| <= tolerance * |right side| or after `iterations`. In the Gram modes
what is no matrix is averaged, and every matrix needs its statistics; `mode: {match: {"*embed*": identity, "*": gram}}`
averages embeddings too.
Memory beside the inputs: 11 tensors (conjugate gradients are in float64), and twice the Gram matrices.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from fusion.merge._linalg import conjugate_gradients
from fusion.merge._statistics import average, needed, positive, shaped, shrunk
from fusion.merge._x import choice

UNIT = "tensor"
INPUTS = {"gram": "tensor", "output_gram": "tensor", "fisher": "tensor"}
OPTIONAL = ("gram", "output_gram", "fisher")
NEUTRAL: dict[str, float] = {}
READS = {"identity": (), "diagonal": ("fisher",), "gram": ("gram",), "kronecker": ("gram", "output_gram")}


def mats(
    tensors: Tensor,  # (K, *shape)
    weights: Tensor,  # (K,)
    *,
    inputs: Mapping[str, Sequence[Tensor | None] | None],
    name: str,
    mode: Literal["identity", "diagonal", "gram", "kronecker"] = "gram",
    off_diagonal: float = 1.0,
    iterations: int = 100,
    tolerance: float = 1e-6,
) -> Tensor:
    """(*shape) the solution, or what `iterations` steps towards it reach.

    Raises ValueError for a negative weight, weights that are all 0, an unknown mode, statistics that the mode reads and
    nobody or only some models have, that do not fit the tensor or are negative, and parameters out of range.
    """
    choice("mats", "mode", mode, tuple(READS))
    if not 0 <= off_diagonal <= 1 or iterations < 0 or tolerance < 0:
        allowed = "off_diagonal is from 0 to 1, iterations and tolerance are 0 or more"
        raise ValueError(
            f"mats got off_diagonal {off_diagonal}, iterations {iterations}, tolerance {tolerance}; {allowed}"
        )
    mean = average("mats", tensors, weights)
    if mode == "identity" or (mode != "diagonal" and mean.dim() != 2):
        return mean
    hint = f"; mode: {{match: {{'{name}': identity, '*': {mode}}}}} averages this tensor"
    found = {one: needed("mats", name, one, inputs[one], hint) for one in READS[mode]}
    if mode == "diagonal":
        fishers = torch.stack(shaped("mats", name, "fisher", found["fisher"], tuple(mean.shape))).to(mean.device)
        wide = positive("mats", name, "fisher", fishers).double()
        factors: list[Callable[[Tensor], Tensor]] = [fisher.mul for fisher in wide]
    else:
        sides = {"gram": mean.shape[1], "output_gram": mean.shape[0]}
        fit = {one: shaped("mats", name, one, grams, (sides[one],) * 2) for one, grams in found.items()}
        wides = {one: [shrunk(gram.to(mean.device), off_diagonal) for gram in grams] for one, grams in fit.items()}
        factors = [_both(a, b) for a, b in zip(wides.get("output_gram", [None] * len(tensors)), wides["gram"])]
    shares = (weights.double() / weights.double().sum()).tolist()

    def whole(each: Callable[[int], Tensor]) -> Tensor:
        out = torch.zeros_like(mean, dtype=torch.float64)
        for t, (factor, share) in enumerate(zip(factors, shares)):
            out.add_(factor(each(t)), alpha=share)
        return out

    target = whole(lambda t: (tensors[t] - mean).double())
    solution = conjugate_gradients(lambda x: whole(lambda _: x), target, iterations, tolerance)
    return solution.add_(mean).float()


def _both(a: Tensor | None, b: Tensor) -> Callable[[Tensor], Tensor]:  # (out, out), (in, in)
    """X -> A X B."""
    return (lambda x: x @ b) if a is None else (lambda x: a @ x @ b)
