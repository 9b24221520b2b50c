"""AIM: columns that read the base's strongest activations stay nearer to the base (Nobari et al. 2025,
arXiv:2502.02421)."""

from torch import Tensor

UNIT = "row"
INPUTS = {"activations": "tensor"}


def aim(
    tensor: Tensor,  # (rows * in,) merged, whole rows
    base: Tensor,
    *,
    inputs: dict[str, Tensor | None],
    shape: tuple[int, ...],
    omega: float = 0.4,
) -> Tensor:
    """(rows * in,) base + r_j (tensor - base) in column j, r_j = 1 - (1 - omega) a_j / max a.

    a = inputs["activations"] (in,) is the mean magnitude of the base model's input j to this matrix. omega 1 changes
    nothing; at 0 the strongest column returns to the base. What has no statistics (or only zeros) stays as it is.
    Raises ValueError where they do not fit the tensor or are no magnitudes, and for an omega outside 0..1.
    """
    if not 0 <= omega <= 1:
        raise ValueError(f"aim: omega is {omega:g}; allowed are numbers from 0 to 1")
    a = inputs["activations"]
    if a is None:
        return tensor.clone()
    if len(shape) != 2 or tuple(a.shape) != (shape[1],):
        raise ValueError(f"aim: activations of shape {tuple(a.shape)} do not fit a tensor of shape {tuple(shape)}")
    if not bool(((a >= 0) & a.isfinite()).all()):
        raise ValueError("aim: activations are mean magnitudes, and some given are negative, infinity or NaN")
    strongest = float(a.max())
    if strongest <= 0:
        return tensor.clone()
    relax = 1 - (1 - omega) * a.to(tensor) / strongest
    return base + ((tensor - base).view(-1, shape[1]) * relax).flatten()
