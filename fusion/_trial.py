"""A merge tried on two rows of eight: what a method refuses by the values of its parameters, before a model is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fusion._family import After, Family
from fusion._method import Method

SHAPE = (2, 8)


def trial(
    method: Method,
    params: Mapping[str, Any],  # of one tensor, as Method.resolve gives them
    weights: torch.Tensor,  # (K,)
    base: bool,
    post: Sequence[tuple[Method, Mapping[str, Any]]] = (),
) -> None:
    """Raises the method's own ValueError, so that a rule about a parameter is written in the method alone.

    Says nothing about methods of adapters, and of those that read statistics of the models.
    """
    if method.unit == "adapter" or method.inputs:
        return
    after = [After(word, given, {}) for word, given in post if not word.inputs]
    count = len(weights)
    every = torch.sin(torch.arange(1.0, 1 + (count + 1) * SHAPE[0] * SHAPE[1])).reshape(count + 1, *SHAPE)
    Family(method, "a trial", every[:count].unbind(), every[count] if base else None, weights, (0, 1)).merged(
        params, None, after
    )
