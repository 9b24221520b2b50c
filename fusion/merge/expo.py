"""ExPO: beyond an aligned model, away from the model it was aligned from (Zheng et al. 2024, arXiv:2404.16792)."""

from torch import Tensor

MODELS = (1, 1)
NEUTRAL = {"alpha": 0.0}


def expo(tensors: Tensor, base: Tensor, *, alpha: float = 0.1) -> Tensor:  # (1, n), (n,)
    """(n,) th + alpha (th - base): th the aligned model, base the one before alignment (usually the SFT model)."""
    return tensors[0] + (tensors[0] - base) * alpha
