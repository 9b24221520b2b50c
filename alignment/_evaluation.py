"""Networks run as they are, for what they compute."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Within it the module is in evaluation mode; afterwards each of its parts is in the mode it was in."""
    before = [(one, one.training) for one in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for one, training in before:
            one.training = training


def computed(module: nn.Module, tensors: Mapping[str, Tensor], args: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
    """What the module computes with these tensors in the place of its own; of shared weights the first name counts."""
    once = {name for name, _ in [*module.named_parameters(), *module.named_buffers()]}
    given = {name: tensor for name, tensor in tensors.items() if name in once}
    return torch.func.functional_call(module, given, args, dict(named))
