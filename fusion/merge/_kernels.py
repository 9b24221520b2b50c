"""Whether the compiled loops can be had: numba is loaded by the first primitive that uses one, and only then."""

import functools
import importlib.util
from types import ModuleType

from torch import Tensor


@functools.cache
def installed() -> bool:
    return importlib.util.find_spec("numba") is not None


def kernels(x: Tensor) -> ModuleType | None:
    """The compiled loops, for a tensor they can work on; None where plain torch has to do."""
    if x.device.type != "cpu" or not installed():
        return None
    from fusion.merge import _compiled

    return _compiled
